"""One episode of meta-training: a fresh optimizee, trained by φ in truncated unrolls, each of which
has a meta-gradient. `truncated_unrolls` is the loop of the paper."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from l2l_ref.attacks import Attack, generators
from l2l_ref.backend import operators
from l2l_ref.backend.cuda_graphs import Graphed
from l2l_ref.data.images import endless
from l2l_ref.equations import Loss, cross_entropy, robust_loss, update_cotangents
from l2l_ref.errors import must
from l2l_ref.guard import guarded
from l2l_ref.meta_optimizer import MetaOptimizer, no_autocast, with_phi


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


@dataclass(frozen=True)
class MetaSettings:
    """The settings of `meta_train`; an InputError for a number out of its range.

    Attributes:
        episodes: how many; each trains fresh optimizees.
        steps: updates an episode, where it does not bring its own number.
        unroll: updates a truncated unroll; one step of Adam on φ follows each.
        meta_lr: learning rate of that Adam; on log η, of the nominal term, it is `ETA_LR`. Both
            fall to 0 as a cosine over all episodes.
        input_alpha: α in Eq. 6 of the loss whose gradient is the input of φ.
        penalty: λ of that loss (`equations.penalised`).
        alpha: α in Eq. 6 of the meta-loss; the paper has one α for both.
        curriculum: shares of the episodes, (a, b): clean ones up to a, then α moves evenly from 1
            to its value, which it has from b on; (0, 0) from the start. `draw` does so with ε.
        average: d in [0, 1), 0 for none: the meta-loss is taken at the running average of θ,
            θ̄_t = (1 - w_t)·θ̄_{t-1} + w_t·θ_t with w_t = max(1 - d, 1/t).
        stride: an unroll's meta-gradient is estimated from one coordinate in so many, which take
            turns.
    """

    episodes: int
    steps: int = 100
    unroll: int = 20
    meta_lr: float = 1e-3
    input_alpha: float = 0.5
    penalty: float = 0.0
    alpha: float = 0.5
    curriculum: tuple[float, float] = (0.0, 0.0)
    average: float = 0.0
    stride: int = 1

    def __post_init__(self) -> None:
        a, b = self.curriculum
        for name, right, allowed in (
            ("episodes", self.episodes >= 0, "at least 0"),
            ("steps", self.steps >= 1, "at least 1"),
            ("unroll", self.unroll >= 1, "at least 1"),
            ("meta_lr", 0 <= self.meta_lr < math.inf, "finite and at least 0"),
            ("alpha", 0 <= self.alpha <= 1, "in [0, 1]"),
            ("input_alpha", 0 <= self.input_alpha <= 1, "in [0, 1]"),
            ("penalty", 0 <= self.penalty < math.inf, "finite and at least 0"),
            ("curriculum", 0 <= a <= b <= 1, "two shares of the episodes, 0 <= a <= b <= 1"),
            ("average", 0 <= self.average < 1, "at least 0 and below 1"),
            ("stride", self.stride >= 1, "at least 1"),
        ):
            must(right, name, getattr(self, name), allowed)

    def strength(self, episode: int) -> float:
        """How far the curriculum is in an episode (from 0): 0 all clean, 1 at α and ε as set."""
        clean, full = (share * self.episodes for share in self.curriculum)
        if episode < clean:
            return 0.0
        return 1.0 if episode >= full else (episode + 1 - clean) / (full - clean + 1)

    def rate(self, episode: int, share: float) -> float:
        """The factor of both learning rates when `share` of an episode (from 0) is done."""
        return 0.5 * (1 + math.cos(math.pi * (episode + share) / self.episodes))


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


@dataclass
class Coordinates:
    """The coordinates of an optimizee that share one φ, through an episode.

    `theta` [N] is all of them as one vector, `average` [N] its running average (`theta` itself
    without one), `gradient` [N] the input of φ, `loss_gradient` [N] that of the meta-loss (the same
    tensor where one loss does both), and `direction` [N] the d of the nominal term. What the
    meta-gradient needs of them is recorded of a sample of n coordinates: {name: [T+1, n]}, row t
    at θ_t.
    """

    params: Sequence[Tensor]
    meta_optimizer: MetaOptimizer
    settings: MetaSettings
    two_losses: bool  # the input of φ is not the gradient of the meta-loss
    backend: str

    def __post_init__(self) -> None:
        meta = self.meta_optimizer
        self.theta = torch.cat([param.detach().reshape(-1) for param in self.params])
        self.average = self.theta.clone() if self.settings.average else self.theta
        self.gradient, self.direction = torch.empty_like(self.theta), torch.empty_like(self.theta)
        self.loss_gradient = torch.empty_like(self.theta) if self.two_losses else self.gradient
        self.phi = torch.empty_like(meta.phi())
        n = len(self.theta)
        self.state, self.moments = meta.init_state(n), meta.init_moments(n)
        self.updates = torch.zeros_like(self.theta[0])  # their number, where a CUDA graph counts
        needed = {
            "gradient": True,
            "loss_gradient": self.two_losses,
            "theta": meta.form["theta_input"],
            "direction": meta.nominal,
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
        torch._foreach_copy_(list(self.params), _unflatten_dense_tensors(vector, self.params))

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
