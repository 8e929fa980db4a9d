"""The operators of `equations.py` in C++ and CUDA: the same names, signatures and results.

They are PyTorch operators, `torch.ops.l2l_ref.*`, registered by the extensions `backend._C` (the
CPU) and `backend._C_cuda` (csrc/): float32 and float64, contiguous tensors, any number of layers,
up to 256 units on the CPU and as many as a GPU has shared memory for. What they cannot take raises
a RuntimeError that says so. On a GPU they queue their work on the current stream, wait for
nothing, and may be captured in a CUDA graph. Shapes are those of `equations.py`.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from typing_extensions import Unpack

from l2l_ref import equations
from l2l_ref.equations import Form, Tensors

import_module("l2l_ref.backend._C")  # registers the operators
if torch.cuda.is_available() and find_spec("l2l_ref.backend._C_cuda"):
    import_module("l2l_ref.backend._C_cuda")  # registers them on CUDA

_ops = torch.ops.l2l_ref


def theta_step_(
    thetas: Tensors, gradients: Tensors, states: Tensors, phi: Tensor, **form: Unpack[Form]
) -> None:
    """Eq. 3 in place: θ + u into each of `thetas`, of any shape S, its next state into `states`.

    Threads share out the coordinates of all tensors; a GPU has one launch for up to 72 of them. No
    two may share memory, of which one is written. Allocates no tensors; scratch is kept by each
    thread from its first call on.
    """
    step = _ops.theta_step_ if torch.compiler.is_compiling() else _theta_step_
    step(thetas, gradients, states, phi, **form)


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


def _setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.form = keyword_only_inputs


def _backward(ctx, *cotangents):
    """The derivative of `theta_step` by the engine's own operator."""
    cotangents = (d.contiguous() for d in cotangents)
    return _ops.theta_step_backward(*ctx.saved_tensors, *cotangents, **ctx.form)


def _double_backward(ctx, *cotangents):
    """The derivative of the derivative, rarely asked for: autograd through the reference."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        outputs = equations.theta_step(*inputs[:4], **ctx.form)
        first = torch.autograd.grad(outputs, inputs[:4], inputs[4:], create_graph=True)
        return torch.autograd.grad(first, inputs, cotangents, allow_unused=True)


def _theta_step_(thetas, gradients, states, phi, **form):
    """The operator, and autograd notices what it saved and we change."""
    increment_version((*thetas, *states))
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _ops.theta_step_(thetas, gradients, states, phi, **form)


_library = torch.library.Library("l2l_ref", "IMPL")
_library.impl("theta_step_", _theta_step_, "ADInplaceOrView")  # for who calls it by its name
# What each operator returns on "meta", of its tensors in the order of its schema.
for _name, _fake in {
    "theta_step_": lambda *inputs, **form: None,
    "theta_step": lambda *inputs, **form: tuple(map(torch.empty_like, inputs[:3:2])),
    "theta_step_backward": lambda *inputs, **form: tuple(map(torch.empty_like, inputs[:4])),
    "unroll_meta_gradient": lambda *inputs, **form: torch.empty_like(inputs[3]),
}.items():
    torch.library.register_fake(f"l2l_ref::{_name}", _fake)
for _name, _rule in {"theta_step": _backward, "theta_step_backward": _double_backward}.items():
    torch.library.register_autograd(f"l2l_ref::{_name}", _rule, setup_context=_setup)
