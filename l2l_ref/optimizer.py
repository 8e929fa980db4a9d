"""The optimizer that applies a meta-optimizer to the parameters of a model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.backend import resolve
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, phi_groups


class LearnedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update rule is a meta-optimizer.

    φ is not changed: train it with `meta_train`, or differentiate `MetaOptimizer.forward`. The
    LSTM states and the moments of the nominal term live here, zero at the start. A parameter
    without a gradient is left alone, its state too. No graph is kept.

    Args:
        params: parameters, or groups of them; a group may bring its own "meta_optimizer".
        meta_optimizer: φ of the groups that bring none.
        backend: "auto", "reference" or "fused".

    Raises:
        InputError: a group without φ; dtypes or devices that differ from φ's; sparse gradients.

    Example:
        >>> optimizer = LearnedOptimizer(model.parameters(), meta_optimizer)
        >>> loss(model(x), y).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable,
        meta_optimizer: MetaOptimizer | None = None,
        *,
        backend: str = "auto",
    ):
        resolve(backend)  # a wrong name is wrong now, not at the first step
        self._joint: dict[int, tuple[tuple[int, ...], Tensor, Tensor | None]] = {}
        super().__init__(params, {"meta_optimizer": meta_optimizer, "backend": backend})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        phi: nn.ModuleDict | Mapping[str, MetaOptimizer],
        *,
        backend: str = "auto",
    ) -> "LearnedOptimizer":
        """φ as the optimizer of a model: a group of parameters, on one vector, for each φ-group.

        Args:
            phi: {φ-group: MetaOptimizer}, such as `l2l_ref.load` returns.

        Raises:
            InputError: a φ-group of the model (`phi_groups`) that `phi` lacks.
        """
        groups = phi_groups(model)
        if missing := sorted(groups.keys() - phi.keys()):
            raise InputError(
                f"there is no φ for {', '.join(missing)} parameters, only for {', '.join(phi)}: "
                "take one that was meta-trained with such layers"
            )
        return cls(
            [
                {"params": [flatten_(own)], "meta_optimizer": phi[name]}
                for name, own in groups.items()
            ],
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:  # after a copy or load_state_dict
        super().__setstate__(state)
        self._joint = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        meta_optimizer = group["meta_optimizer"]
        if not isinstance(meta_optimizer, MetaOptimizer):
            raise InputError(
                f"parameter group {len(self.param_groups) - 1} has no φ: give LearnedOptimizer a "
                "meta_optimizer, or the group one of its own"
            )
        weight = meta_optimizer.head.weight
        for param in group["params"]:
            if (param.dtype, param.device) != (weight.dtype, weight.device):
                raise InputError(
                    f"a parameter is {param.dtype} on {param.device} but its meta-optimizer is "
                    f"{weight.dtype} on {weight.device}: move one with .to()"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """Apply φ once to every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._step_group(index, group, params)
        return loss

    def _step_group(self, index: int, group: dict[str, Any], params: list[Tensor]) -> None:
        """One call of the operator for all coordinates of a φ-group."""
        gradients = [param.grad for param in params if param.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise InputError("a gradient is sparse: LearnedOptimizer takes dense gradients only")
        meta_optimizer = group["meta_optimizer"]
        theta, gradient = joined(params), joined(gradients)
        state, moments = self._joint_state(index, meta_optimizer, params)
        meta_optimizer.step_(theta, gradient, state, moments, backend=group["backend"])
        if theta is not params[0]:
            parts = theta.split([param.numel() for param in params])
            torch._foreach_copy_(params, [t.view_as(p) for t, p in zip(parts, params, strict=True)])

    def _joint_state(
        self, index: int, meta: MetaOptimizer, params: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The states of `params` side by side, [L, 2, H, M], and the moments of the nominal term,
        [3, N], as an update wants them.

        `self.state[param]` has "lstm", [L, 2, H, signs, numel], and "moments", [3, numel], views of
        its part, so nothing is gathered again until other parameters have gradients or a state dict
        is loaded.
        """
        key = tuple(id(param) for param in params)
        if index not in self._joint or self._joint[index][0] != key:
            sizes = [param.numel() for param in params]
            fresh = {"lstm": [meta.init_state(n).unflatten(-1, (-1, n)) for n in sizes]}
            if meta.nominal:
                fresh["moments"] = [meta.init_moments(n) for n in sizes]
            joint = {name: self._join(name, params, states) for name, states in fresh.items()}
            self._joint[index] = key, joint["lstm"].flatten(3), joint.get("moments")
        return self._joint[index][1:]

    def _join(self, name: str, params: list[Tensor], fresh: list[Tensor]) -> Tensor:
        """The states called `name`, `fresh` where there is none yet, on one axis."""
        states = []
        for param, zeros in zip(params, fresh, strict=True):
            state = self.state[param].get(name, zeros)
            if state.shape != zeros.shape:
                raise InputError(
                    f"a loaded optimizer state has shape {list(state.shape)} where this "
                    f"meta-optimizer needs {list(zeros.shape)}: load the state that was saved "
                    "with it"
                )
            states.append(state)
        joint = torch.cat(states, dim=-1)
        views = joint.split([state.shape[-1] for state in states], dim=-1)
        for param, view in zip(params, views, strict=True):
            self.state[param][name] = view
        return joint

    def state_dict(self) -> dict[str, Any]:
        """The states and groups, without φ and backend: φ is saved on its own."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            del group["meta_optimizer"], group["backend"]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of a `state_dict`; φ and backend stay those of this optimizer."""
        own = [{k: g[k] for k in ("meta_optimizer", "backend")} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)  # the base class knows only what was saved


def joined(tensors: list[Tensor]) -> Tensor:
    """The tensors on one axis [N]: a copy, or the one tensor itself where that is a vector."""
    if len(tensors) == 1 and tensors[0].ndim == 1 and tensors[0].is_contiguous():
        return tensors[0]
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def flatten_(params: Iterable[Tensor]) -> Tensor:
    """Move parameters onto one vector θ [N] and their gradients onto θ.grad [N]; returns θ.

    From then on a parameter views its part of θ, and its `.grad` the same part of θ.grad, to which
    `backward` adds. So any optimizer trains the whole as one tensor: `SGD([theta], lr)`. Zero
    θ.grad in place, `zero_grad(set_to_none=False)`, for None would cut the tie. A parameter that
    the loss does not reach has a gradient of zero. θ itself takes part in no graph.
    """
    params = list(params)
    theta = torch.cat([param.detach().reshape(-1) for param in params])
    theta.grad = torch.zeros_like(theta)
    sizes = [param.numel() for param in params]
    for param, data, grad in zip(params, theta.split(sizes), theta.grad.split(sizes), strict=True):
        param.data, param.grad = data.view_as(param), grad.view_as(param)
    return theta
