"""The optimizer that applies a meta-optimizer to the parameters of a model."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.backend import resolve
from l2l_ref.equations import Tensors
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, with_phi

OWN = ("meta_optimizer", "backend")  # of a group: a state dict does not change them


class LearnedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update rule is a meta-optimizer: one call of its operator for
    all parameters of a group, wherever they lie.

    φ is not changed: train it with `meta_train`, or differentiate `MetaOptimizer.forward`. A
    parameter without a gradient is left alone, its state too. No graph is kept.

    `state[param]` has "lstm", [L, 2, H, signs, *param.shape], zero at the start (signs is 2 in the
    odd form), and "moments" of the nominal term, [3, *param.shape]. There is no other copy. What
    others keep there, or in a group, is saved too.

    The arithmetic is in φ's dtype, whatever that of the parameters (float64, float32, bfloat16,
    float16), which stay in their own. A sharded parameter (a `DTensor`, as FSDP2 makes them) has a
    state that is sharded like it.

    Args:
        params: parameters, or groups of them; a group may bring any of the options below.
        meta_optimizer: φ of the groups that bring none.
        lr: >= 0, a number or a tensor: multiplies the update, so that 1 is what φ was meta-trained
            for. Every scheduler of PyTorch's can move it. 0 leaves θ alone while the state goes on;
            where there is none yet and the gradient is zero, it stays at its zeros.
        weight_decay: >= 0, θ ← θ - lr·weight_decay·θ beside the update. AdamW's 0.01 stands beside
            an lr of about 1e-3; with an lr of 1 the same decay is about 1e-5.
        maximize: climb: the input of φ is -∇.
        state_dtype: of the LSTM states; None is φ's. They take 320 bytes a parameter for two layers
            of 20 units, 640 in the odd form; half of it in `torch.bfloat16`, whose rounding
            puts θ off by under 1 % of its way in 10 steps.
        backend: "auto", "reference" or "fused".

    Raises:
        InputError: a group without φ; a number out of range; parameters that are not real, or on
            another device than φ; sparse gradients; a state of another φ.

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
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ):
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        own = {"meta_optimizer": meta_optimizer, "backend": backend}
        super().__init__(params, {**options, "state_dtype": state_dtype, **own})

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
            if not 0 <= float(group[name]) < math.inf:
                raise InputError(f"{name} is {group[name]}: it must be finite and at least 0")
        dtype = group["state_dtype"]
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"state_dtype is {dtype}: give a floating one, or None")
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
        found = [self._found(group) for group in self.param_groups]  # before anything moves
        for group, parts in zip(self.param_groups, found, strict=True):
            if parts:
                self._update(group, *zip(*parts, strict=True))
        return loss

    def _found(self, group: dict[str, Any]) -> list[tuple[Tensor, ...]]:
        """What this process holds of each parameter with a gradient: θ, gradient, states."""
        parts = []
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise InputError("a gradient is sparse: LearnedOptimizer takes dense ones only")
            theta, gradient = local(param), local(param.grad, like=param)
            new = "lstm" not in self.state[param]
            states = [local(state) for state in self._states(param, group)]
            if theta.numel() == 0 or (new and float(group["lr"]) == 0 and not gradient.any()):
                continue  # the dummy step by which PyTorch asks an optimizer for its states
            parts.append((theta, gradient, *states))
        return parts

    def _update(
        self, group: dict[str, Any], thetas: tuple, gradients: tuple, *states: tuple
    ) -> None:
        """One call of the operator, on copies of what is not in φ's dtype or not contiguous."""
        meta, decay = group["meta_optimizer"], group["weight_decay"]
        phi = meta.phi()
        tensor = isinstance(group["lr"], Tensor)
        lr = group["lr"].view(()) if tensor else group["lr"]
        as_learned = not tensor and lr == 1 and decay == 0

        def plain(tensors: Iterable[Tensor]) -> list[Tensor]:
            ours = phi.dtype  # asked first: calls that do nothing cost more
            return [
                x if x.dtype == ours and x.is_contiguous() else x.to(ours).contiguous()
                for x in tensors
            ]

        def moved(before: Tensor, after: Tensor) -> Tensor:
            x = before * (1 - lr * decay) + (after - before) * lr
            return torch.where(lr == 0, before, x) if tensor else x

        before, given, inner = plain(thetas), plain(gradients), [*map(plain, states)]
        after: Tensors = before if as_learned else [theta.clone() for theta in before]
        if group["maximize"]:
            given = [-gradient for gradient in given]
        meta.step_(after, given, *inner, phi=phi, backend=group["backend"])
        if not as_learned:
            after = thetas if not tensor and lr == 0 else [*map(moved, before, after)]
        for kept, values in zip((thetas, *states), (after, *inner), strict=True):
            for own, value in zip(kept, values, strict=True):
                if own is not value:
                    own.copy_(value)

    def _states(self, param: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """The LSTM state of a parameter, and its moments if there is a nominal term."""
        meta, held = group["meta_optimizer"], self.state[param]
        own = meta.head.weight.dtype
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]]
        kinds = {"lstm": (meta.state_axes, group["state_dtype"] or own)}
        if meta.nominal:
            kinds["moments"] = (3,), own
        for name, (lead, dtype) in kinds.items():
            if name not in held:
                zeros = torch.zeros_like(param, dtype=dtype)
                held[name] = zeros.expand(*lead, *param.shape).contiguous()
        return [held[name] for name in kinds]

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
        groups, states = self.param_groups, {}

        def check(_, saved: dict[str, Any]) -> None:
            for number, (own, group) in enumerate(zip(groups, saved["param_groups"], strict=False)):
                ours, theirs = own["meta_optimizer"].fingerprint(), group.get("meta_optimizer")
                if theirs != ours:
                    of = f"another φ ({theirs}, this one is {ours})" if theirs else "no φ"
                    raise InputError(
                        f"parameter group {number} of the state was saved with {of}: load what a "
                        "LearnedOptimizer of the same φ saved"
                    )
                params = zip(own["params"], group["params"], strict=False)
                states.update({p: saved["state"][i] for p, i in params if i in saved["state"]})

        def complete(_) -> None:  # the base class would keep the fingerprint, and cast states
            for own, group in zip(groups, self.param_groups, strict=True):
                group.update({k: v for k, v in own.items() if k in OWN or k not in group})
            for param, state in states.items():
                copies = {k: kept.to(param.device, copy=True) for k, kept in state.items()}
                self.state[param] = copies

        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(complete, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def local(tensor: Any, like: Any = None) -> Tensor:
    """What this process holds: of a `DTensor` its shard, placed as `like` is; of another all."""
    if not hasattr(tensor, "to_local"):
        return tensor
    if like is not None:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.detach().to_local()
