"""The operators of `equations.py` in C++: the same names, signatures and results.

They are PyTorch operators, `torch.ops.l2l_ref.*`, registered by the extension `l2l_ref._engine`
(csrc/): float32 and float64 on the CPU, contiguous tensors, any number of layers, up to 256 units.
What they cannot take raises a RuntimeError that says so. Shapes are those of `equations.py`.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from typing_extensions import Unpack

from l2l_ref import equations
from l2l_ref._engine import build_info  # noqa: F401  registers the operators
from l2l_ref.equations import Form

_ops = torch.ops.l2l_ref


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
    theta: Tensor,
    gradients: Tensor,
    state: Tensor,
    cotangents: Tensor,
    phi: Tensor,
    **form: Unpack[Form],
) -> Tensor:
    """dφ [P] of an unroll in closed form, back through time one block of coordinates at a time.

    The same bits whatever the number of threads.
    """
    with torch.no_grad():
        return _ops.unroll_meta_gradient(theta, gradients, state, cotangents, phi, **form)


def _check_devices(**tensors: Tensor) -> None:
    """One tensor on "meta" among others brings a call here, which would return without a word."""
    device = tensors["theta"].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise RuntimeError(f"{name} is on {tensor.device}, theta on {device}: move one")


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
def _(theta, gradients, state, cotangents, phi, **form):
    _check_devices(theta=theta, gradients=gradients, state=state, cotangents=cotangents, phi=phi)
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


torch.library.register_autograd("l2l_ref::theta_step", _backward, setup_context=_setup)
torch.library.register_autograd(
    "l2l_ref::theta_step_backward", _double_backward, setup_context=_setup
)
