"""The parameters of a model as one vector."""

from collections.abc import Iterable

import torch
from torch import Tensor

from l2l_ref.errors import InputError


def flatten_(params: Iterable[Tensor]) -> Tensor:
    """Move parameters onto one vector θ [N] and their gradients onto θ.grad [N]; returns θ.

    From then on a parameter views its part of θ, and its `.grad` the same part of θ.grad, to which
    `backward` adds. So any optimizer trains the whole as one tensor: `SGD([theta], lr)`. Zero
    θ.grad in place, `zero_grad(set_to_none=False)`, for None would cut the tie. A parameter that
    the loss does not reach has a gradient of zero. θ itself takes part in no graph.

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
        param.data, param.grad = data.view_as(param), grad.view_as(param)
    return theta
