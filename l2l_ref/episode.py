"""One episode of meta-training: a fresh optimizee, trained by φ in truncated unrolls, each of which
has a meta-gradient."""

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
        classes: of a classifier, whose collapse `meta_train` looks out for; 0 of anything else.
        steps: updates; None for the number of the settings.
        strength: in [0, 1]; α is 1 + strength·(α - 1), of both losses (`MetaSettings.strength`).
        number: of the episode, from 0; which coordinates an unroll samples goes by it.
    """

    model: nn.Module
    batches: Iterable[tuple[Tensor, Tensor]]
    attack: Attack
    loss: Loss = cross_entropy
    classes: int = 0
    steps: int | None = None
    strength: float = 1.0
    number: int = 0


class Coordinates:
    """The coordinates of an optimizee that share one φ, through an episode.

    `theta` [N] is all of them as one vector, `average` [N] its running average (`theta` itself
    without one), and `gradient` [N] what φ reads next. What an unroll has seen of its sample, n
    coordinates, is recorded, row t at θ_t: `read`, the gradient that φ reads, and `judged`, that of
    the loss that judges (the same tensor where one loss does both), [T+1, n]; `thetas` [T+1, n] if
    φ sees θ; d of the nominal term, `directions` [T+1, n], row t of the update that led to θ_t;
    `weights` [T+1], of θ_t in the average.

    Args:
        params: parameters of the optimizee.
        separate: φ reads another gradient than that of the loss that judges.
        settings: `unroll`, `average` and `stride` matter here.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        meta_optimizer: MetaOptimizer,
        settings: MetaSettings,
        *,
        separate: bool,
        backend: str,
    ):
        self.meta_optimizer, self.settings, self.backend = meta_optimizer, settings, backend
        self.params = list(params)
        self.theta = torch.cat([param.detach().reshape(-1) for param in self.params])
        self.average = self.theta.clone() if settings.average else self.theta
        self.theta_views, self.average_views = self.shaped(self.theta), self.shaped(self.average)
        self.weight = torch.zeros_like(self.theta[0])
        self.updates = torch.zeros_like(self.weight)
        n = len(self.theta)
        self.state, self.moments = meta_optimizer.init_state(n), meta_optimizer.init_moments(n)
        self.phi = torch.empty_like(meta_optimizer.phi())
        self.gradient, self.direction = torch.empty_like(self.theta), torch.empty_like(self.theta)
        self.judging = torch.empty_like(self.theta) if separate else self.gradient

    def begin(self, turn: int) -> None:
        """An unroll starts, with φ as it is now; its turn says which coordinates it samples."""
        meta, stride = self.meta_optimizer, min(self.settings.stride, len(self.theta))
        self.sample = slice(turn % stride, None, stride)
        self.phi.copy_(meta.phi().detach())
        signs = self.state.unflatten(3, (-1, len(self.theta)))
        self.first_state = (
            signs[..., self.sample].clone(memory_format=torch.contiguous_format).flatten(3)
        )
        rows = self.settings.unroll + 1
        self.read = self.theta.new_empty(rows, self.first_state.shape[3] // signs.shape[3])
        separate = self.judging is not self.gradient
        self.judged = torch.empty_like(self.read) if separate else self.read
        self.thetas = torch.empty_like(self.read) if meta.form["theta_input"] else None
        self.directions = torch.empty_like(self.read) if meta.nominal else None
        self.weights = self.theta.new_empty(rows)
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
            self.weight.copy_(self.updates.reciprocal().clamp(min=1 - self.settings.average))
            self.average.lerp_(self.theta, self.weight)

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """A vector [N] as views shaped like the parameters."""
        parts = vector.split([param.numel() for param in self.params])
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    @torch.no_grad()
    def place(self, views: list[Tensor]) -> None:
        """Copy `theta_views` or `average_views` into the parameters."""
        torch._foreach_copy_(self.params, views)

    def record(self, t: int) -> None:
        """Row t of all records."""
        self.read[t] = self.gradient[self.sample]
        if self.judged is not self.read:
            self.judged[t] = self.judging[self.sample]
        if self.thetas is not None:
            self.thetas[t] = self.theta[self.sample]
        if self.directions is not None:
            self.directions[t] = self.direction[self.sample]
        if self.settings.average:
            self.weights[t] = self.weight

    def meta_gradient(self, length: int) -> Tensor:
        """Derivative of the unroll's meta-loss by every parameter of the meta-optimizer, packed.

        dφ is that of `unroll_meta_gradient`. The updates -η·d have the same cotangents as φ's, so
        d log η = -η Σ_s ⟨d_s, cotangent_s⟩. Both are sums over coordinates, estimated from the
        sample.
        """
        rows = slice(1, length + 1)
        weights = self.weights[rows] if self.settings.average else None
        cotangents = update_cotangents(self.judged[rows], weights)
        cotangents *= len(self.theta) / cotangents.shape[1]
        meta, dphi = self.meta_optimizer, torch.zeros_like(self.phi)
        if any(weight.requires_grad for weight in meta.weights()):
            gradient_of = operators(self.backend, self.state).unroll_meta_gradient
            thetas = None if self.thetas is None else self.thetas[:length]
            with no_autocast(self.theta):
                dphi = gradient_of(
                    self.read[:length], self.first_state, cotangents, self.phi, thetas, **meta.form
                )
        if self.directions is None or meta.log_eta is None:
            return dphi
        slope = (self.directions[rows] * cotangents).sum()
        return torch.cat((-meta.log_eta.detach().exp() * slope[None], dphi))


def truncated_unrolls(
    episode: Episode,
    meta_optimizers: nn.ModuleDict,
    settings: MetaSettings,
    backend: str = "auto",
    *,
    capture: bool = True,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Train an optimizee with φ; after each unroll yield its meta-gradient and its losses.

    The meta-loss of an unroll is Σ L(θ) over the θ that its updates led to, each on its own batch;
    with `settings.average` over their running averages instead. φ may change between unrolls; θ,
    the LSTM states and the moments carry on. First order: what the updates read enters as a
    constant, and the closed form of `unroll_meta_gradient` needs no graph.

    Args:
        capture: on a GPU, one update is a CUDA graph; False if the attack waits for the device.

    Yields:
        {φ-group: the meta-gradient, packed in the order of the meta-optimizer's parameters} and the
        losses [T].

    Raises:
        InputError: φ-groups without φ; batches that end; an attack that returns no such thing as
            x; an update that cannot be captured.
    """
    steps = episode.steps or settings.steps
    alpha, read_alpha = (
        1 + episode.strength * (alpha - 1) for alpha in (settings.alpha, settings.read_alpha)
    )
    separate = read_alpha != alpha or settings.penalty > 0 or settings.average > 0
    batches, attack = endless(episode.batches), guarded(episode.attack)
    groups = {
        name: Coordinates(params, meta, settings, separate=separate, backend=backend)
        for name, (params, meta) in with_phi(episode.model, meta_optimizers).items()
    }
    coordinates = groups.values()

    def differentiate(
        x: Tensor, y: Tensor, into: str, alpha: float, penalty: float = 0.0
    ) -> Tensor:
        """The loss of Eq. 6; its gradient goes `into` that vector of each group."""
        loss = robust_loss(
            episode.loss, episode.model, x, y, attack=attack, alpha=alpha, penalty=penalty
        )
        params = [param for group in coordinates for param in group.params]
        grads = iter(torch.autograd.grad(loss, params, materialize_grads=True))
        for group in coordinates:
            own = [next(grads).reshape(-1) for _ in group.params]
            torch.cat(own, out=getattr(group, into))
        return loss.detach()

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        """The judging loss; leaves its gradient in `judging`, that which φ reads in `gradient`."""
        for group in coordinates:
            group.place(group.average_views)
        loss = differentiate(x, y, "judging", alpha)
        if settings.average:
            for group in coordinates:
                group.place(group.theta_views)
        if separate:
            differentiate(x, y, "gradient", read_alpha, settings.penalty)
        return loss

    def advance(x: Tensor, y: Tensor) -> Tensor:
        """One update of θ, then `evaluate`. Every tensor stays in its place."""
        for group in coordinates:
            group.step_()
        return evaluate(x, y)

    step = Graphed(
        advance,
        next(iter(coordinates)).theta.device,
        generators=generators(attack),
        capture=capture,
    )
    evaluate(*next(batches))
    for start in range(0, steps, settings.unroll):
        length, losses = min(settings.unroll, steps - start), []
        for group in coordinates:
            group.begin(episode.number + start // settings.unroll)
        for t in range(1, length + 1):
            losses.append(step(*next(batches)).clone())
            for group in coordinates:
                group.record(t)
        dphis = {name: group.meta_gradient(length) for name, group in groups.items()}
        yield dphis, torch.stack(losses)
