"""The meta-optimizer φ, and which parameters of a model share one."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from l2l_ref.backend import operators
from l2l_ref.equations import MAX_P, Form, Tensors, adam_direction
from l2l_ref.errors import InputError, must

FIRST_ETA = 1e-3  # Adam's usual learning rate


class MetaOptimizer(nn.Module):
    """φ: an `nn.LSTM` on each gradient coordinate and an `nn.Linear` head that writes its update.

    Plain PyTorch modules, so that φ is a plain state dict and `nn.LSTM` itself is an oracle for
    every backend. All coordinates share the weights; each has a state of its own. The head starts
    at zero, so an untrained φ changes nothing (paper, section 3; Andrychowicz et al. 2016).

    Args (InputError for a size below 1, or p or output_scale out of range):
        hidden_size: units of each LSTM layer.
        num_layers: LSTM layers.
        p: in (0, 80], range of the logarithm in Eq. 5.
        output_scale: > 0, multiplies the head's output.
        theta_input: θ is a third input, clamp(10·θ, ±5).
        odd: the update is m(x) - m(-x), so that u(-g) = -u(g).
        nominal: θ ← θ + u - η·d, with Adam's direction d (`equations.adam_direction`) and
            η = exp(`log_eta`), a parameter beside φ that starts at log 1e-3.
        generator: draws the weights; uniform in ±1/√hidden_size as `nn.LSTM` does.

    Attributes:
        settings: the constructor's arguments: with the state dict, all that φ is.
        form: those of them that the operators take.
        state_axes: of the state of a coordinate: [num_layers, 2, hidden_size, signs], two if odd.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        p: float = 10.0,
        output_scale: float = 0.01,
        theta_input: bool = False,
        odd: bool = False,
        nominal: bool = False,
        *,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        must(hidden_size >= 1, "hidden_size", hidden_size, "at least 1")
        must(num_layers >= 1, "num_layers", num_layers, "at least 1")
        must(0 < p <= MAX_P, "p", p, f"above 0 and at most {MAX_P} (e^p must be finite)")
        must(0 < output_scale < math.inf, "output_scale", output_scale, "positive and finite")
        self.form = Form(p=p, output_scale=output_scale, theta_input=theta_input, odd=odd)
        sizes = {"hidden_size": hidden_size, "num_layers": num_layers}
        self.settings: dict[str, Any] = {**sizes, **self.form, "nominal": nominal}
        self.state_axes = num_layers, 2, hidden_size, 1 + odd
        self.nominal = nominal
        self.lstm = nn.LSTM(3 if theta_input else 2, hidden_size, num_layers)
        self.head = nn.Linear(hidden_size, 1)
        for weight in self.lstm.parameters():
            nn.init.uniform_(weight, -(hidden_size**-0.5), hidden_size**-0.5, generator=generator)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.log_eta = nn.Parameter(torch.tensor(math.log(FIRST_ETA))) if nominal else None

    def weights(self) -> list[nn.Parameter]:
        """The weights of φ: all parameters but `log_eta`."""
        own = self.lstm._parameters, self.head._parameters  # a tenth of what `parameters()` costs
        return [weight for module in own for weight in module.values() if weight is not None]

    def phi(self) -> Tensor:
        """All weights as one vector [P], differentiable: what the operators take."""
        return torch.cat([weight.flatten() for weight in self.weights()])

    def fingerprint(self) -> str:
        """Of all that φ is: 16 hexadecimal digits, the same on every device."""
        weights = {name: weight.tolist() for name, weight in self.state_dict().items()}
        return hashlib.sha256(repr((self.settings, weights)).encode()).hexdigest()[:16]

    def init_state(self, coordinates: int) -> Tensor:
        """Zeros of shape [num_layers, 2, hidden_size, M], M = coordinates (twice that if odd)."""
        *axes, signs = self.state_axes
        return self.head.weight.new_zeros(*axes, signs * coordinates)

    def init_moments(self, coordinates: int) -> Tensor | None:
        """Zeros [3, coordinates], the moments of the nominal term; None without that term."""
        return self.head.weight.new_zeros(3, coordinates) if self.nominal else None

    def forward(
        self,
        theta: Tensor,
        gradient: Tensor,
        state: Tensor,
        moments: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, ...]:
        """One differentiable step, Eq. 3-4: θ [N], ∇ [N], state -> θ + u [N] and the next state.

        With the nominal term: moments [3, N] too -> θ + u - η·d, the next state, the next moments.
        """
        assert self.nominal == (moments is not None), "the nominal term has moments (init_moments)"
        step = operators(backend, state).theta_step
        with no_autocast(theta):
            theta, state = step(theta, gradient, state, self.phi(), **self.form)
        if moments is None or self.log_eta is None:
            return theta, state
        direction, moments = adam_direction(gradient, moments)
        return theta - self.log_eta.exp() * direction, state, moments

    @torch.no_grad()
    def step_(
        self,
        thetas: Tensors,
        gradients: Tensors,
        states: Tensors,
        moments: Tensors | None = None,
        *,
        phi: Tensor | None = None,
        backend: str = "auto",
    ) -> list[Tensor] | None:
        """The same in place, without a graph, of at least one θ: it, state and moments become the
        next ones. One call of the operator, and one pass of the nominal term.

        Args:
            thetas, gradients: of any shape S each, contiguous.
            states: [L, 2, H, M], or [L, 2, H, signs, *S] as `LearnedOptimizer` keeps them.
            moments: [3, *S].
            phi: [P], the weights, where the caller has packed them already.

        Returns:
            d of each, shaped like it; None without the nominal term.
        """
        assert self.nominal == (moments is not None), "the nominal term has moments (init_moments)"
        step = operators(backend, states[0]).theta_step_
        with no_autocast(thetas[0]):
            step(thetas, gradients, states, self.phi() if phi is None else phi, **self.form)
        if moments is None or self.log_eta is None:
            return None
        rows = [m.view(3, -1) for m in moments]
        joined = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
        direction, following = adam_direction(_flatten_dense_tensors(gradients), joined)
        torch._foreach_copy_(rows, following.split([row.shape[1] for row in rows], dim=1))
        torch._foreach_sub_(
            list(thetas), _unflatten_dense_tensors(direction * self.log_eta.exp(), thetas)
        )
        return _unflatten_dense_tensors(direction, thetas)


def no_autocast(theta: Tensor) -> AbstractContextManager:
    """φ computes in its own dtype, also where autocast is on; asked at every step, so cheap."""
    device = theta.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def phi_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of a model by the φ that they share.

    Those of an `nn.Linear` are "linear", all others "convolutional" (batch-norm too), unless the
    module says otherwise in an attribute `phi_group`, which may be set on any module:
    `model.embedding.phi_group = "linear"`. The paper gives convolutional and linear layers a φ each
    (section 4.2); groups named by the kind of layer let a φ move to any optimizee that has layers
    of its kind. A frozen parameter is in no group, one that several modules share in the first's,
    and what parametrizes a layer (weight norm) in that of the layer. InputError for a model without
    trainable parameters.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        layer = model.get_submodule(name.partition("parametrizations")[0].rstrip("."))
        kind = "linear" if isinstance(layer, nn.Linear) else "convolutional"
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                groups.setdefault(getattr(layer, "phi_group", kind), []).append(parameter)
    if not groups:
        raise InputError("the model has no parameter that requires a gradient: unfreeze some")
    return groups


def with_phi(
    model: nn.Module, phi: Mapping[str, MetaOptimizer] | nn.ModuleDict
) -> dict[str, tuple[list[nn.Parameter], Any]]:
    """The parameters of each φ-group of a model, and their φ; InputError for one without."""
    groups = phi_groups(model)
    if missing := sorted(groups.keys() - phi.keys()):
        names = {param: name for name, param in model.named_parameters()}
        raise InputError(
            f"there is no φ for {', '.join(missing)} parameters such as "
            f"{names[groups[missing[0]][0]]}, only for {', '.join(phi)}: take one that was "
            "meta-trained with such layers (batch-norm counts as convolutional; `new_phi` makes "
            "those of a model), or name its group in an attribute `phi_group` of the layer"
        )
    return {name: (params, phi[name]) for name, params in groups.items()}


def new_phi(
    model: nn.Module, *, generator: torch.Generator | None = None, **settings: Any
) -> nn.ModuleDict:
    """An untrained φ for the parameters of a model: {φ-group: MetaOptimizer}, on its device.

    Args:
        generator: draws the weights, on the CPU.
        settings: those of `MetaOptimizer`, the same for each.
    """
    metas = {name: MetaOptimizer(**settings, generator=generator) for name in phi_groups(model)}
    return nn.ModuleDict(metas).to(next(model.parameters()).device)
