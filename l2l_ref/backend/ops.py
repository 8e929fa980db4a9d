"""The operators of `equations.py` in C++ and CUDA: the same names, signatures and results.

They are PyTorch operators, `torch.ops.l2l_ref.*`, registered by the extensions `backend._C` (the
CPU) and `backend._C_cuda` (csrc/): float32 and float64, contiguous tensors, any number of layers,
up to 256 units on the CPU and as many as a GPU has shared memory for. What they cannot take raises
a RuntimeError that says so. On a GPU they queue their work on the current stream, wait for
nothing, and may be captured in a CUDA graph. Shapes are those of `equations.py`.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from typing_extensions import Unpack

from l2l_ref import equations
from l2l_ref.backend._C import build_info  # noqa: F401  registers the operators
from l2l_ref.equations import Form

if torch.cuda.is_available() and find_spec("l2l_ref.backend._C_cuda"):
    import_module("l2l_ref.backend._C_cuda")  # registers them on CUDA

_ops = torch.ops.l2l_ref


def preprocess(gradient: Tensor, p: float) -> Tensor:
    """Eq. 5 alone, differentiable twice: [2, *gradient.shape], float32 or float64."""
    return _ops.preprocess(gradient, p=p)


def theta_step_(
    theta: Tensor, gradient: Tensor, state: Tensor, phi: Tensor, **form: Unpack[Form]
) -> None:
    """Eq. 3 in place: writes θ + u into `theta` and the next state into `state`; keeps no graph.

    Allocates no tensors; scratch is kept by each thread from its first call on.
    """
    with torch.no_grad():
        _ops.theta_step_(theta, gradient, state, phi, **form)
        if not torch.compiler.is_compiling():
            increment_version((theta, state))  # autograd notices what it saved and we changed


def theta_step(
    theta: Tensor, gradient: Tensor, state: Tensor, phi: Tensor, **form: Unpack[Form]
) -> tuple[Tensor, Tensor]:
    """Eq. 3, differentiable in theta, gradient, state and phi: returns θ + u and the next state."""
    return _ops.theta_step(theta, gradient, state, phi, **form)


def unroll_meta_gradient(
    gradients: Tensor,
    state: Tensor,
    cotangents: Tensor,
    phi: Tensor,
    thetas: Tensor | None = None,
    **form: Unpack[Form],
) -> Tensor:
    """dφ [P] of an unroll in closed form, back through time one block of coordinates at a time.

    The same bits whatever the number of threads.
    """
    with torch.no_grad():
        return _ops.unroll_meta_gradient(gradients, state, cotangents, phi, thetas, **form)


def _check_devices(**tensors: Tensor) -> None:
    """One tensor on "meta" among others brings a call here, which would return without a word."""
    (first, device), *others = ((name, tensor.device) for name, tensor in tensors.items())
    for name, other in others:
        if other != device:
            raise RuntimeError(f"{name} is on {other}, {first} on {device}: move one")


@torch.library.register_fake("l2l_ref::preprocess")
def _(gradient, *, p):
    return gradient.new_empty((2, *gradient.shape))


@torch.library.register_fake("l2l_ref::preprocess_backward")
def _(gradient, d_result, *, p):
    _check_devices(gradient=gradient, d_result=d_result)
    return torch.empty_like(gradient)


@torch.library.register_fake("l2l_ref::theta_step_")
def _(theta, gradient, state, phi, **form):
    _check_devices(theta=theta, gradient=gradient, state=state, phi=phi)


@torch.library.register_fake("l2l_ref::theta_step")
def _(theta, gradient, state, phi, **form):
    _check_devices(theta=theta, gradient=gradient, state=state, phi=phi)
    return torch.empty_like(theta), torch.empty_like(state)


@torch.library.register_fake("l2l_ref::theta_step_backward")
def _(theta, gradient, state, phi, d_next_theta, d_next_state, **form):
    inputs = {"theta": theta, "gradient": gradient, "state": state, "phi": phi}
    _check_devices(**inputs, d_next_theta=d_next_theta, d_next_state=d_next_state)
    return tuple(map(torch.empty_like, inputs.values()))


@torch.library.register_fake("l2l_ref::unroll_meta_gradient")
def _(gradients, state, cotangents, phi, thetas, **form):
    seen = {} if thetas is None else {"thetas": thetas}
    _check_devices(gradients=gradients, state=state, cotangents=cotangents, phi=phi, **seen)
    return torch.empty_like(phi)


def _setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.form = keyword_only_inputs


def _backward(ctx, d_next_theta, d_next_state):
    return _ops.theta_step_backward(
        *ctx.saved_tensors, d_next_theta.contiguous(), d_next_state.contiguous(), **ctx.form
    )


def _double_backward(ctx, *cotangents):
    """The derivative of the derivative, rarely asked for: autograd through the reference."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        outputs = equations.theta_step(*inputs[:4], **ctx.form)
        first = torch.autograd.grad(outputs, inputs[:4], inputs[4:], create_graph=True)
        return torch.autograd.grad(first, inputs, cotangents, allow_unused=True)


def _preprocess_backward(ctx, d_result):
    return _ops.preprocess_backward(*ctx.saved_tensors, d_result.contiguous(), **ctx.form)


def _preprocess_double_backward(ctx, cotangent):
    with torch.enable_grad():
        gradient, d_result = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        result = equations.preprocess(gradient, **ctx.form)
        (first,) = torch.autograd.grad(result, gradient, d_result, create_graph=True)
        return torch.autograd.grad(first, (gradient, d_result), cotangent)


_RULES: dict[str, Callable] = {
    "theta_step": _backward,
    "theta_step_backward": _double_backward,
    "preprocess": _preprocess_backward,
    "preprocess_backward": _preprocess_double_backward,
}
for _name, _rule in _RULES.items():
    torch.library.register_autograd(f"l2l_ref::{_name}", _rule, setup_context=_setup)
