"""The optimizer that applies a meta-optimizer to the parameters of a model."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.backend import resolve
from l2l_ref.errors import InputError
from l2l_ref.flatten import check_tied, flat, flatten_, is_flat, local
from l2l_ref.meta_optimizer import MetaOptimizer, with_phi

OWN = ("meta_optimizer", "backend", "flat")  # of a group, and never in a state dict
# Options of other optimizers, by which their state dicts are known.
FOREIGN = {"betas", "momentum", "dampening", "nesterov", "alpha", "rho", "eps", "etas", "lambd"}
# What PyTorch's schedulers and other libraries note down in a group.
NOTES = ("param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr")


class LearnedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update rule is a meta-optimizer.

    φ is not changed: train it with `meta_train`, or differentiate `MetaOptimizer.forward`. A
    parameter without a gradient is left alone, its state too. No graph is kept.

    `state[param]` has "lstm", [L, 2, H, signs, *param.shape], zero at the start (signs is 2 in the
    odd form), and "moments" of the nominal term, [3, *param.shape]. Nothing else is remembered: who
    writes into `state` is heard. The arithmetic is in φ's dtype, whatever that of the parameters
    (float64, float32, bfloat16, float16); θ is read and written in its own. A sharded parameter (a
    `DTensor`, as FSDP2 makes them) has a state that is sharded like it.

    Args:
        params: parameters, or groups of them; a group may bring any of the options below.
        meta_optimizer: φ of the groups that bring none.
        lr: >= 0, a number or a tensor: multiplies the update, so that 1 is what φ was meta-trained
            for. Every scheduler of PyTorch's can move it. 0 leaves θ alone while the state goes on;
            where there is none yet and the gradient is zero, it stays at its zeros.
        weight_decay: >= 0, θ ← θ - lr·weight_decay·θ beside the update. AdamW's 0.01 stands beside
            an lr of about 1e-3; with an lr of 1 the same decay is about 1e-5.
        maximize: climb: φ reads -∇.
        state_dtype: of the LSTM states; None is φ's. They take 320 bytes a parameter for two layers
            of 20 units, 640 in the odd form; half of it in `torch.bfloat16`, which puts θ off by
            about 2 % of its way in 100 steps.
        backend: "auto", "reference" or "fused".

    Raises:
        InputError: a group without φ or with an unknown option; a number out of range; parameters
            that are not real, or on another device than φ; sparse gradients; a state of another φ.

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
        own = {"meta_optimizer": meta_optimizer, "backend": backend, "flat": None}
        super().__init__(params, {**options, "state_dtype": state_dtype, **own})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        phi: nn.ModuleDict | Mapping[str, MetaOptimizer],
        *,
        flat: bool = False,
        **options: Any,
    ) -> "LearnedOptimizer":
        """φ as the optimizer of a model: a group of parameters for each φ-group (`phi_groups`).

        Args:
            phi: {φ-group: MetaOptimizer}, such as `l2l_ref.load` returns.
            flat: first move each group's parameters onto one vector, of which they become views
                (`flatten_`). One call for all of them saves time with many small parameters. Let
                this optimizer zero the gradients, which it does in place.
            options: those of the constructor.

        Raises:
            InputError: a φ-group of the model that `phi` lacks; what the constructor raises.
        """
        return cls(
            [
                {
                    "params": [flatten_(own)] if flat else own,
                    "meta_optimizer": meta,
                    "flat": own if flat else None,
                }
                for own, meta in with_phi(model, phi).values()
            ],
            **options,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        number = len(self.param_groups)
        group = {**self.defaults, **param_group}
        meta_optimizer = group["meta_optimizer"]
        if not isinstance(meta_optimizer, MetaOptimizer):
            raise InputError(
                f"parameter group {number} has no φ: give LearnedOptimizer a meta_optimizer, or "
                "the group one of its own"
            )
        if unknown := sorted(group.keys() - {"params", *self.defaults, *NOTES}):
            raise InputError(
                f"parameter group {number} has the option {', '.join(unknown)}, which is unknown: "
                f"there are {', '.join(self.defaults)}"
            )
        resolve(group["backend"])  # a wrong name is wrong now, not at the first step
        if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
            raise InputError(f"Tensor lr must be 1-element, not {list(group['lr'].shape)}")
        for name in ("lr", "weight_decay"):
            if not 0 <= float(group[name]) < math.inf:
                raise InputError(f"{name} is {group[name]}: it must be finite and at least 0")
        kinds = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if group["state_dtype"] not in kinds:
            raise InputError(f"state_dtype is {group['state_dtype']}: give a floating one, or None")
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                check_together(param, meta_optimizer)
        except InputError:
            del self.param_groups[-1]
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in PyTorch; parameters on one vector keep their gradients, which become zero."""
        super().zero_grad(set_to_none and not any(group["flat"] for group in self.param_groups))

    @torch.no_grad()
    def step(self, closure=None):
        """Apply φ once to every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all is looked at before anything moves
            if group["flat"]:
                check_tied(group["flat"], *group["params"])
            grads = [param.grad for param in group["params"] if param.grad is not None]
            if any(grad.layout != torch.strided for grad in grads):
                raise InputError("a gradient is sparse: LearnedOptimizer takes dense ones only")
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            phi = group["meta_optimizer"].phi() if params else None
            for param in params:
                self._update(param, group, phi)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any], phi: Tensor) -> None:
        """One call of the operator, on what this process holds of a parameter."""
        lr, decay = group["lr"], group["weight_decay"]
        theta, gradient = local(param), local(param.grad, like=param)
        new = "lstm" not in self.state[param]
        states = [local(state) for state in self._states(param, group)]
        if theta.numel() == 0 or (new and float(lr) == 0 and not gradient.any()):
            return  # the dummy step by which PyTorch asks an optimizer for its states
        before, gradient = flat(theta, phi.dtype), flat(gradient, phi.dtype)
        axes = (3, 1)  # of the LSTM state [L, 2, H, …], and of the moments [3, …] if there are any
        inner = [flat(s, phi.dtype, *s.shape[:k]) for s, k in zip(states, axes, strict=False)]
        as_learned = not isinstance(lr, Tensor) and lr == 1 and decay == 0
        after = before if as_learned else before.clone()
        group["meta_optimizer"].step_(
            after,
            -gradient if group["maximize"] else gradient,
            *inner,
            phi=phi,
            backend=group["backend"],
        )
        for state, value in zip(states, inner, strict=True):
            if not is_flat(state, phi.dtype):
                state.copy_(value.view(state.shape))
        if not isinstance(lr, Tensor) and lr == 0:
            return
        if not as_learned:
            moved = before * (1 - lr * decay) + (after - before) * lr
            after = torch.where(lr == 0, before, moved) if isinstance(lr, Tensor) else moved
        if not (as_learned and is_flat(theta, phi.dtype)):
            theta.copy_(after.view(theta.shape))

    def _states(self, param: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """The LSTM state of a parameter, and its moments if there is a nominal term."""
        meta, held = group["meta_optimizer"], self.state[param]
        check_together(param, meta)
        own = meta.head.weight.dtype
        kinds: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        kinds += [("lstm", meta.state_axes, group["state_dtype"] or own)]
        kinds += [("moments", (3,), own)] * meta.nominal
        for name, lead, dtype in kinds:
            if name not in held:
                zeros = torch.zeros_like(param, dtype=dtype)
                held[name] = zeros.expand(*lead, *param.shape).contiguous()
            found, needed = held[name], (*lead, *param.shape)
            if found.shape != needed or found.device != param.device:
                raise InputError(
                    f"a loaded optimizer state, '{name}', has shape {list(found.shape)} on "
                    f"{found.device} where this meta-optimizer needs {list(needed)} on "
                    f"{param.device}: load the state that was saved with it"
                )
        return [held[name] for name, _, _ in kinds]

    def state_dict(self) -> dict[str, Any]:
        """The states and groups; a fingerprint of φ in the place of φ, which is saved on its own,
        and of the backend."""

        def without_phi(_, saved: dict[str, Any]) -> None:
            for group in saved["param_groups"]:
                group["phi"] = group["meta_optimizer"].fingerprint()
                for name in OWN:
                    del group[name]

        hook = self.register_state_dict_post_hook(without_phi, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of a `state_dict`, in their own dtypes; φ and backend stay those of this
        optimizer.

        Raises:
            InputError: the state of another optimizer, or one that was saved with another φ.
        """
        groups, states = self.param_groups, {}

        def check(_, saved: dict[str, Any]) -> None:
            for number, pair in enumerate(zip(groups, saved["param_groups"], strict=False)):
                self._check_saved(number, *pair, saved["state"])
                params = zip(*(group["params"] for group in pair), strict=False)
                states.update({p: saved["state"][i] for p, i in params if i in saved["state"]})

        def complete(_) -> None:  # the base class knows what was saved, and casts it like θ
            for own, group in zip(groups, self.param_groups, strict=True):
                group.pop("phi", None)
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

    def _check_saved(
        self, number: int, own: dict[str, Any], group: dict[str, Any], states: dict[Any, Any]
    ) -> None:
        """Raise an InputError if a group of a state dict, and its states, are not of this φ."""
        foreign = group.keys() & FOREIGN
        for index in group["params"]:
            foreign |= states.get(index, {}).keys() - {"lstm", "moments"}
        if foreign:
            raise InputError(
                f"parameter group {number} of the state has {', '.join(sorted(foreign))}: it is "
                "that of another optimizer, load what a LearnedOptimizer saved"
            )
        ours = own["meta_optimizer"].fingerprint()
        if group.get("phi", ours) != ours:
            raise InputError(
                f"parameter group {number} of the state was saved with another φ ({group['phi']}, "
                f"this one is {ours}): build the optimizer with that φ"
            )


def check_together(param: Tensor, meta: MetaOptimizer) -> None:
    """Raise an InputError unless φ can update the parameter."""
    weight = meta.head.weight
    if not param.is_floating_point():
        raise InputError(f"a parameter is {param.dtype}: LearnedOptimizer takes real numbers")
    if param.device != weight.device:
        raise InputError(
            f"a parameter is on {param.device} but its meta-optimizer is on {weight.device}: move "
            "one with .to()"
        )
