"""One episode of meta-training: a fresh optimizee, trained by φ in truncated unrolls, each of which
has a meta-gradient. `truncated_unrolls` is the loop of the paper."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2l_ref.attacks import Attack, generators
from l2l_ref.backend import operators
from l2l_ref.backend.cuda_graphs import Graphed
from l2l_ref.data.images import endless
from l2l_ref.equations import Loss, cross_entropy, robust_loss, update_cotangents
from l2l_ref.guard import guarded
from l2l_ref.meta_optimizer import MetaOptimizer, no_autocast, with_phi
from l2l_ref.meta_settings import MetaSettings


@dataclass
class Episode:
    """What one episode draws.

    Attributes:
        model: the optimizee.
        batches: (x, y), an iterator without end, or what is begun again, such as a DataLoader.
        attack: (model, x, y) -> x'.
        loss: of the model on a batch.
        steps: updates; None for the number of the settings.
    """

    model: nn.Module
    batches: Iterable[tuple[Tensor, Tensor]]
    attack: Attack
    loss: Loss = cross_entropy
    steps: int | None = None


def truncated_unrolls(
    episode: Episode,
    meta_optimizers: nn.ModuleDict,
    settings: MetaSettings,
    backend: str = "auto",
    *,
    number: int = 0,
    capture: bool = True,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Train an optimizee with φ; after each unroll yield its meta-gradient and its losses.

    The meta-loss of an unroll is Σ L(θ) over the θ that its updates led to, each on its own batch;
    with `settings.average` over their running averages instead. φ may change between unrolls; θ,
    the LSTM states and the moments carry on. First order: the inputs of φ are constants, and the
    closed form of `unroll_meta_gradient` needs no graph.

    Args:
        number: of the episode, from 0: how far the curriculum is, which coordinates are sampled.
        capture: on a GPU, one update is a CUDA graph; False if the attack waits for the device.

    Yields:
        {φ-group: the meta-gradient, packed in the order of the meta-optimizer's parameters} and the
        losses [T].

    Raises:
        InputError: φ-groups without φ; batches that end; an attack that returns no such thing as
            x; an update that cannot be captured.
    """
    steps, strength = episode.steps or settings.steps, settings.strength(number)
    alpha, input_alpha = (
        1 + strength * (alpha - 1) for alpha in (settings.alpha, settings.input_alpha)
    )
    two_losses = input_alpha != alpha or settings.penalty > 0 or settings.average > 0
    batches, attack = endless(episode.batches), guarded(episode.attack)
    groups = {
        name: Coordinates(params, meta, settings, two_losses, backend)
        for name, (params, meta) in with_phi(episode.model, meta_optimizers).items()
    }
    coordinates = list(groups.values())
    params = [param for group in coordinates for param in group.params]

    def differentiate(
        x: Tensor, y: Tensor, into: str, alpha: float, penalty: float = 0.0
    ) -> Tensor:
        """The loss of Eq. 6; its gradient goes `into` that vector of each group."""
        loss = robust_loss(
            episode.loss, episode.model, x, y, attack=attack, alpha=alpha, penalty=penalty
        )
        gradients = iter(torch.autograd.grad(loss, params, materialize_grads=True))
        for group in coordinates:
            own = [next(gradients).reshape(-1) for _ in group.params]
            torch.cat(own, out=getattr(group, into))
        return loss.detach()

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        """The meta-loss of a batch at θ, or at its average, and the gradient that φ gets next."""
        for group in coordinates:
            group.place(group.average)
        loss = differentiate(x, y, "loss_gradient", alpha)
        if settings.average:
            for group in coordinates:
                group.place(group.theta)
        if two_losses:
            differentiate(x, y, "gradient", input_alpha, settings.penalty)
        return loss

    def update(x: Tensor, y: Tensor) -> Tensor:
        """Eq. 3, then `evaluate`. Every tensor stays in its place."""
        for group in coordinates:
            group.step_()
        return evaluate(x, y)

    step = Graphed(update, params[0].device, generators=generators(attack), capture=capture)
    evaluate(*next(batches))
    for start in range(0, steps, settings.unroll):
        length, losses = min(settings.unroll, steps - start), []
        for group in coordinates:
            group.begin(start, number)
        for t in range(1, length + 1):
            losses.append(step(*next(batches)).clone())
            for group in coordinates:
                group.record(t)
        dphis = {name: group.meta_gradient(length) for name, group in groups.items()}
        yield dphis, torch.stack(losses)


class Coordinates:
    """The coordinates of an optimizee that share one φ, through an episode.

    `theta` [N] is all of them as one vector, `average` [N] its running average (`theta` itself
    without one), `gradient` [N] the input of φ, `loss_gradient` [N] that of the meta-loss (the same
    tensor where one loss does both), and `direction` [N] the d of the nominal term. What the
    meta-gradient needs of them is recorded of a sample of n coordinates: {name: [T+1, n]}, row t
    at θ_t.

    Args:
        params: parameters of the optimizee.
        two_losses: the input of φ is not the gradient of the meta-loss.
        settings: `unroll`, `average` and `stride` matter here.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        meta_optimizer: MetaOptimizer,
        settings: MetaSettings,
        two_losses: bool,
        backend: str,
    ):
        self.meta_optimizer, self.settings, self.backend = meta_optimizer, settings, backend
        self.params = list(params)
        self.theta = torch.cat([param.detach().reshape(-1) for param in self.params])
        self.average = self.theta.clone() if settings.average else self.theta
        self.gradient, self.direction = torch.empty_like(self.theta), torch.empty_like(self.theta)
        self.loss_gradient = torch.empty_like(self.theta) if two_losses else self.gradient
        self.phi = torch.empty_like(meta_optimizer.phi())
        n = len(self.theta)
        self.state, self.moments = meta_optimizer.init_state(n), meta_optimizer.init_moments(n)
        self.updates = torch.zeros_like(self.theta[0])  # their number, where a CUDA graph counts
        needed = {
            "gradient": True,
            "loss_gradient": two_losses,
            "theta": meta_optimizer.form["theta_input"],
            "direction": meta_optimizer.nominal,
        }
        self.recorded = {name: getattr(self, name) for name, wanted in needed.items() if wanted}

    def begin(self, start: int, number: int) -> None:
        """An unroll begins after `start` updates, with φ as it is now and the next sample."""
        meta, stride = self.meta_optimizer, min(self.settings.stride, len(self.theta))
        self.sample = slice((number + start // self.settings.unroll) % stride, None, stride)
        self.start = start
        self.phi.copy_(meta.phi().detach())
        signs = self.state.unflatten(3, (-1, len(self.theta)))[..., self.sample]
        self.first_state = signs.clone(memory_format=torch.contiguous_format).flatten(3)
        shape = self.settings.unroll + 1, signs.shape[-1]
        self.rows = {name: vector.new_empty(shape) for name, vector in self.recorded.items()}
        self.record(0)

    def step_(self) -> None:
        """One update of θ and its average; every tensor stays in its place."""
        directions = self.meta_optimizer.step_(
            [self.theta], [self.gradient], [self.state],
            None if self.moments is None else [self.moments], phi=self.phi, backend=self.backend,
        )  # fmt: skip
        if directions is not None:
            self.direction.copy_(directions[0])
        if self.settings.average:
            self.updates += 1
            self.average.lerp_(self.theta, self.weight(self.updates))

    def weight(self, updates: Tensor) -> Tensor:
        """w_t of θ in its average after t updates."""
        return updates.reciprocal().clamp(min=1 - self.settings.average)

    @torch.no_grad()
    def place(self, vector: Tensor) -> None:
        """Copy `theta` or `average` into the parameters."""
        parts = vector.split([param.numel() for param in self.params])
        views = [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]
        torch._foreach_copy_(self.params, views)

    def record(self, t: int) -> None:
        """Row t of all records."""
        for name, vector in self.recorded.items():
            self.rows[name][t] = vector[self.sample]

    def meta_gradient(self, length: int) -> Tensor:
        """Derivative of the unroll's meta-loss by every parameter of the meta-optimizer, packed.

        dφ is that of `unroll_meta_gradient`. The updates -η·d have the same cotangents as φ's, so
        d log η = -η Σ_s ⟨d_s, cotangent_s⟩. Both are sums over coordinates, estimated from the
        sample.
        """
        meta, rows, after, weights = self.meta_optimizer, self.rows, slice(1, length + 1), None
        if self.settings.average:
            weights = self.weight(torch.arange(length).to(self.theta) + (self.start + 1))
        cotangents = update_cotangents(rows.get("loss_gradient", rows["gradient"])[after], weights)
        cotangents *= len(self.theta) / cotangents.shape[1]
        dphi = torch.zeros_like(self.phi)
        if any(weight.requires_grad for weight in meta.weights()):
            thetas = rows["theta"][:length] if "theta" in rows else None
            with no_autocast(self.theta):
                dphi = operators(self.backend, self.state).unroll_meta_gradient(
                    rows["gradient"][:length], self.first_state, cotangents, self.phi, thetas,
                    **meta.form,
                )  # fmt: skip
        if meta.log_eta is None:
            return dphi
        slope = (rows["direction"][after] * cotangents).sum()
        return torch.cat((-meta.log_eta.detach().exp() * slope[None], dphi))
