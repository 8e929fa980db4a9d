"""The optimizer that applies a meta-optimizer to the parameters of a model."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.backend import resolve
from l2l_ref.errors import InputError, must
from l2l_ref.meta_optimizer import MetaOptimizer, with_phi

OWN = ("meta_optimizer", "backend")  # of a group: a state dict does not change them


class LearnedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update rule is a meta-optimizer: one call of its operator for
    all parameters of a group, wherever they lie.

    φ is not changed: train it with `meta_train`, or differentiate `MetaOptimizer.forward`. A
    parameter without a gradient is left alone, its state too. No graph is kept.

    `state[param]` has "lstm", [L, 2, H, signs, *param.shape], zero at the start (signs is 2 in the
    odd form), and "moments" of the nominal term, [3, *param.shape], both in φ's dtype: 320 bytes a
    parameter for two layers of 20 units in float32, 640 in the odd form. What others keep there, or
    in a group, is saved too.

    The arithmetic is in φ's dtype, whatever that of the parameters (float64, float32, bfloat16,
    float16), which stay in their own.

    Args:
        params: parameters, or groups of them; a group may bring any of the options below.
        meta_optimizer: φ of the groups that bring none.
        lr: >= 0, a number or a tensor: multiplies the update, so that 1 is what φ was meta-trained
            for. Every scheduler of PyTorch's can move it. 0 leaves θ alone while the state goes on.
        weight_decay: >= 0, θ ← θ - lr·weight_decay·θ beside the update. AdamW's 0.01 stands beside
            an lr of about 1e-3; with an lr of 1 the same decay is about 1e-5.
        backend: "auto", "reference" or "fused".

    Raises:
        InputError: a group without φ; a number out of range; parameters that are not real, or on
            another device than φ; sparse gradients; a state of another φ.
    """

    def __init__(
        self,
        params: Iterable,
        meta_optimizer: MetaOptimizer | None = None,
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        backend: str = "auto",
    ):
        own = {"meta_optimizer": meta_optimizer, "backend": backend}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own})

    @classmethod
    def for_model(
        cls, model: nn.Module, phi: nn.ModuleDict | Mapping[str, MetaOptimizer], **options: Any
    ) -> "LearnedOptimizer":
        """φ as the optimizer of a model: a group of parameters for each φ-group (`phi_groups`).

        Args:
            phi: {φ-group: MetaOptimizer}, such as `l2l_ref.load` returns.
            options: those of the constructor.

        Raises:
            InputError: a φ-group of the model that `phi` lacks; what the constructor raises.
        """
        return cls(
            [{"params": p, "meta_optimizer": meta} for p, meta in with_phi(model, phi).values()],
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        number = len(self.param_groups)
        group = {**self.defaults, **param_group}
        meta_optimizer = group["meta_optimizer"]
        if not isinstance(meta_optimizer, MetaOptimizer):
            raise InputError(
                f"parameter group {number} has no φ but a {type(meta_optimizer).__name__}: give a "
                "MetaOptimizer, or what holds one for each φ-group to LearnedOptimizer.for_model"
            )
        resolve(group["backend"])  # a wrong name is wrong now, not at the first step
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise InputError(f"Tensor lr must be 1-element, not {list(group['lr'].shape)}")
        for name in ("lr", "weight_decay"):
            value = float(group[name])
            must(0 <= value < math.inf, name, value, "finite and at least 0")
        super().add_param_group(param_group)
        own = meta_optimizer.head.weight.device
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                raise InputError(f"a parameter is {param.dtype}: it must be of real numbers")
            if param.device != own:
                raise InputError(f"a parameter is on {param.device} but φ is on {own}: move one")

    @torch.no_grad()
    def step(self, closure=None):
        """Apply φ once to every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if any(p.grad.layout != torch.strided for params in found for p in params):
            raise InputError("a gradient is sparse: LearnedOptimizer takes dense ones only")
        for group, params in zip(self.param_groups, found, strict=True):
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One call of the operator, on copies of what is not in φ's dtype or not contiguous."""
        meta, lr, decay = group["meta_optimizer"], group["lr"], group["weight_decay"]
        phi = meta.phi()

        def plain(tensors: Iterable[Tensor]) -> list[Tensor]:
            ours = phi.dtype  # asked first: calls that do nothing cost more
            return [
                x if x.dtype == ours and x.is_contiguous() else x.to(ours).contiguous()
                for x in tensors
            ]

        before = plain(params)
        gradients = plain(p.grad for p in params if p.grad is not None)
        states = zip(*[self._states(param, meta) for param in params], strict=True)
        as_learned = not isinstance(lr, Tensor) and lr == 1 and decay == 0
        after = before if as_learned else [theta.clone() for theta in before]
        meta.step_(after, gradients, *states, phi=phi, backend=group["backend"])
        if not as_learned:
            rate = lr.view(()) if isinstance(lr, Tensor) else lr
            after = [
                theta * (1 - rate * decay) + (moved - theta) * rate
                for theta, moved in zip(before, after, strict=True)
            ]
        for param, theta in zip(params, after, strict=True):
            if param is not theta:
                param.copy_(theta)

    def _states(self, param: Tensor, meta: MetaOptimizer) -> list[Tensor]:
        """The LSTM state of a parameter, and its moments if there is a nominal term."""
        held = self.state[param]
        axes: dict[str, tuple[int, ...]] = {"lstm": meta.state_axes}
        if meta.nominal:
            axes["moments"] = (3,)
        for name, first in axes.items():
            if name not in held:
                held[name] = meta.head.weight.new_zeros(*first, *param.shape)
        return [held[name] for name in axes]

    def state_dict(self) -> dict[str, Any]:
        """The states and groups; a fingerprint in the place of φ, which is saved on its own."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group["meta_optimizer"] = group["meta_optimizer"].fingerprint()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of a `state_dict`, in their own dtypes; φ and backend stay those of this
        optimizer.

        Raises:
            InputError: the state of another optimizer, or one that was saved with another φ.
        """
        own = [{name: group[name] for name in OWN} for group in self.param_groups]
        groups, states = state_dict["param_groups"], state_dict["state"]
        for number, (mine, group) in enumerate(zip(own, groups, strict=False)):
            ours, theirs = mine["meta_optimizer"].fingerprint(), group.get("meta_optimizer")
            if theirs != ours:
                of = f"another φ ({theirs}, this one is {ours})" if theirs else "no φ"
                raise InputError(
                    f"parameter group {number} of the state was saved with {of}: load what a "
                    "LearnedOptimizer of the same φ saved"
                )
        super().load_state_dict(state_dict)
        for group, mine, saved in zip(self.param_groups, own, groups, strict=True):
            group.update(mine)
            for param, index in zip(group["params"], saved["params"], strict=True):
                if index in states:  # which the base class casts to the parameter's dtype
                    self.state[param] = {
                        name: x.to(param.device, copy=True) if isinstance(x, Tensor) else x
                        for name, x in states[index].items()
                    }
