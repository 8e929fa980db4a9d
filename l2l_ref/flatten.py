"""Parameters as vectors: all of a model on one, and one of any shape, dtype or placement."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from l2l_ref.errors import InputError


def flatten_(params: Iterable[Tensor]) -> Tensor:
    """Move parameters onto one vector θ [N] and their gradients onto θ.grad [N]; returns θ.

    From then on a parameter views its part of θ, and its `.grad` the same part of θ.grad, to which
    `backward` adds. So any optimizer trains the whole as one tensor: `SGD([theta], lr)`. Zero
    θ.grad in place, `zero_grad(set_to_none=False)`, for None would cut the tie (`check_tied`). A
    parameter that the loss does not reach has a gradient of zero. θ itself takes part in no graph.

    Raises:
        InputError: parameters of several dtypes or devices.
    """
    params = list(params)
    if len(kinds := {(param.dtype, param.device) for param in params}) > 1:
        names = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise InputError(f"parameters of {names} do not fit on one vector: move them with .to()")
    theta = torch.cat([param.detach().reshape(-1) for param in params])
    theta.grad = torch.zeros_like(theta)
    sizes = [param.numel() for param in params]
    for param, data, grad in zip(params, theta.split(sizes), theta.grad.split(sizes), strict=True):
        if param.grad is not None:
            grad.copy_(param.grad.reshape(-1))
        param.data, param.grad = data.view_as(param), grad.view_as(param)
    return theta


def check_tied(params: Iterable[Tensor], theta: Tensor) -> None:
    """Raise an InputError if a parameter that `flatten_` moved, or its gradient, has left θ."""
    for param in params:
        pairs = ((param, theta), (param.grad, theta.grad))
        if not all(same_memory(part, whole) for part, whole in pairs):
            raise InputError(
                "a parameter that was moved onto one vector, or its .grad, was replaced since: "
                "change them in place only, zero_grad(set_to_none=False), no .to() and no copies"
            )


def same_memory(part: Tensor | None, whole: Tensor | None) -> bool:
    if part is None or whole is None:
        return False
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def local(tensor: Any, like: Any = None) -> Tensor:
    """What this process holds: of a `DTensor` its shard, placed as `like` is; of another all."""
    if not hasattr(tensor, "to_local"):
        return tensor
    if like is not None:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.detach().to_local()


def flat(tensor: Tensor, dtype: torch.dtype, *axes: int) -> Tensor:
    """As [*axes, N] of that dtype: a view of the tensor if it `is_flat`, else of a copy."""
    kept = tensor if is_flat(tensor, dtype) else tensor.to(dtype).contiguous()
    return kept.view(*axes, -1)


def is_flat(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous()
