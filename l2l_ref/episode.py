"""One episode of meta-training: a fresh optimizee, trained by φ in truncated unrolls, each of which
has a meta-gradient."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.attacks import Attack, generators
from l2l_ref.backend import operators
from l2l_ref.backend.cuda_graphs import Graphed
from l2l_ref.equations import Loss, cross_entropy, robust_loss, update_cotangents
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, phi_groups
from l2l_ref.optimizer import flatten_


@dataclass(frozen=True)
class MetaSettings:
    """How φ is meta-trained.

    Attributes:
        episodes: how many; each trains fresh optimizees.
        steps: updates an episode, where it does not bring its own number.
        unroll: updates a truncated unroll; one step of Adam on φ follows each.
        meta_lr: learning rate of that Adam.
        eta_lr: its learning rate on log η, of the nominal term.
        schedule: "constant", or "cosine" from those rates to 0 over all episodes.
        clip: largest norm of the meta-gradient; of that of log η likewise.
        read_alpha: α in Eq. 6 of the loss whose gradient φ reads.
        penalty: λ of that loss (`equations.penalised`).
        alpha: α in Eq. 6 of the loss that judges φ; the paper has one α for both.
        curriculum: shares of the episodes, (a, b): clean ones up to a, then both α and ε (`draw`)
            move evenly to their values, which they have from b on; (0, 0) from the start.
        tasks: K, the optimizees that an episode trains at once.
    """

    episodes: int
    steps: int = 100
    unroll: int = 20
    meta_lr: float = 1e-3
    eta_lr: float = 0.02
    schedule: str = "constant"
    clip: float = 1.0
    read_alpha: float = 0.5
    penalty: float = 0.0
    alpha: float = 0.5
    curriculum: tuple[float, float] = (0.0, 0.0)
    tasks: int = 1

    def strength(self, episode: int) -> float:
        """How far the curriculum is in an episode (from 0): 0 all clean, 1 as it is set."""
        clean, full = (share * self.episodes for share in self.curriculum)
        if episode < clean:
            return 0.0
        return 1.0 if episode >= full else (episode + 1 - clean) / (full - clean + 1)

    def rate(self, episode: int, share: float) -> float:
        """The factor of both learning rates when `share` of an episode (from 0) is done."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (episode + share) / self.episodes))


@dataclass
class Episode:
    """What one episode draws.

    Attributes:
        model: the optimizee; K at once are one `problems.Stacked`, and x and y those of all.
        batches: endless (x, y).
        attack: (model, x, y) -> x'.
        loss: of the model on a batch.
        classes: of a classifier, whose collapse `meta_train` looks out for; 0 of anything else.
        steps: updates; None for the number of the settings.
        strength: in [0, 1]; α is 1 + strength·(α - 1), of both losses (`MetaSettings.strength`).
    """

    model: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    attack: Attack
    loss: Loss = cross_entropy
    classes: int = 0
    steps: int | None = None
    strength: float = 1.0


class Coordinates:
    """The coordinates of an optimizee that share one φ, through an episode.

    θ.grad is the gradient that φ reads next. What an unroll has seen is recorded, row t at θ_t:
    `read`, the gradient that φ reads, and `judged`, that of the loss that judges (the same tensor
    where one loss does both), [T+1, N]; `thetas` [T+1, N] if φ sees θ; d of the nominal term,
    `directions` [T+1, N], row t of the update that led to θ_t.

    Args:
        params: parameters of the optimizee; they become views of `theta` (`flatten_`).
        rows: T+1 of the longest unroll.
        separate: φ reads another gradient than that of the loss that judges.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        meta_optimizer: MetaOptimizer,
        rows: int,
        *,
        separate: bool,
        backend: str,
    ):
        self.meta_optimizer, self.backend = meta_optimizer, backend
        self.theta = flatten_(params)
        assert self.theta.grad is not None  # `flatten_` made it
        self.gradient = self.theta.grad
        n = len(self.theta)
        self.state, self.moments = meta_optimizer.init_state(n), meta_optimizer.init_moments(n)
        self.phi = torch.empty_like(meta_optimizer.phi())
        self.read = self.theta.new_empty(rows, n)
        self.judged = torch.empty_like(self.read) if separate else self.read
        self.judging = torch.empty_like(self.theta) if separate else self.gradient
        self.thetas = torch.empty_like(self.read) if meta_optimizer.form["theta_input"] else None
        self.directions = torch.empty_like(self.read) if meta_optimizer.nominal else None
        self.direction = torch.empty_like(self.theta)

    def begin(self) -> None:
        """An unroll starts here, with φ as it is now."""
        self.phi.copy_(self.meta_optimizer.phi().detach())
        self.first_state = self.state.clone()
        self.record(0)

    def step_(self) -> None:
        """One update of θ; every tensor stays in its place."""
        direction = self.meta_optimizer.step_(
            self.theta, self.gradient, self.state, self.moments, phi=self.phi,
            backend=self.backend,
        )  # fmt: skip
        if direction is not None:
            self.direction.copy_(direction)

    def keep_judging(self) -> None:
        """θ.grad is that of the loss that judges; the one that φ reads comes next."""
        self.judging.copy_(self.gradient)

    def record(self, t: int) -> None:
        """Row t of all records."""
        self.read[t] = self.gradient
        if self.judged is not self.read:
            self.judged[t] = self.judging
        if self.thetas is not None:
            self.thetas[t] = self.theta
        if self.directions is not None:
            self.directions[t] = self.direction

    def meta_gradient(self, length: int) -> Tensor:
        """Derivative of the unroll's meta-loss by every parameter of the meta-optimizer, packed.

        dφ is that of `unroll_meta_gradient`. The updates -η·d have the same cotangents as φ's, so
        d log η = -η Σ_s ⟨d_s, cotangent_s⟩.
        """
        cotangents = update_cotangents(self.judged[1 : length + 1])
        meta, dphi = self.meta_optimizer, torch.zeros_like(self.phi)
        if any(weight.requires_grad for weight in meta.weights()):
            dphi = operators(self.backend, self.state).unroll_meta_gradient(
                self.read[:length],
                self.first_state,
                cotangents,
                self.phi,
                None if self.thetas is None else self.thetas[:length],
                **meta.form,
            )
        if self.directions is None or meta.log_eta is None:
            return dphi
        slope = (self.directions[1 : length + 1] * cotangents).sum()
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

    The meta-loss of an unroll is Σ L(θ) over the θ that its updates led to, each on its own batch.
    φ may change between unrolls; θ, the LSTM states and the moments carry on. First order: what the
    updates read enters as a constant, and the closed form of `unroll_meta_gradient` needs no graph.

    Of K tasks at once, θ holds all coordinates [K·N]. φ reads each one's gradient of its own loss,
    and losses and meta-gradients are the means over the tasks.

    Args:
        capture: on a GPU, one update is a CUDA graph; False if the attack waits for the device.

    Yields:
        {φ-group: the meta-gradient, packed in the order of the meta-optimizer's parameters} and the
        losses [T].

    Raises:
        InputError: a model of other than `settings.tasks` tasks; an update that cannot be captured.
    """
    tasks = getattr(episode.model, "tasks", 1)
    if tasks != settings.tasks:
        raise InputError(
            f"the episode's model holds {tasks} optimizees but tasks is {settings.tasks}: stack as "
            "many with problems.Stacked"
        )
    steps = episode.steps or settings.steps
    alpha, read_alpha = (
        1 + episode.strength * (alpha - 1) for alpha in (settings.alpha, settings.read_alpha)
    )
    separate = read_alpha != alpha or settings.penalty > 0
    by_group: dict[str, Any] = dict(meta_optimizers.items())
    groups = {
        name: Coordinates(
            params,
            by_group[name],
            min(settings.unroll, steps) + 1,
            separate=separate,
            backend=backend,
        )
        for name, params in phi_groups(episode.model).items()
    }
    coordinates = groups.values()

    def differentiate(x: Tensor, y: Tensor, alpha: float, penalty: float = 0.0) -> Tensor:
        """The loss of Eq. 6; leaves its gradient in θ.grad."""
        for group in coordinates:
            group.gradient.zero_()
        loss = robust_loss(
            episode.loss, episode.model, x, y, attack=episode.attack, alpha=alpha, penalty=penalty
        )
        loss.backward(torch.full_like(loss, tasks))  # the mean of K losses: K times its gradient
        return loss.detach()

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        """The judging loss; leaves the gradient that φ reads in θ.grad."""
        loss = differentiate(x, y, alpha)
        if separate:
            for group in coordinates:
                group.keep_judging()
            differentiate(x, y, read_alpha, settings.penalty)
        return loss

    def advance(x: Tensor, y: Tensor) -> Tensor:
        """One update of θ, then `evaluate`. Every tensor stays in its place."""
        for group in coordinates:
            group.step_()
        return evaluate(x, y)

    step = Graphed(
        advance,
        next(iter(coordinates)).theta.device,
        generators=generators(episode.attack),
        capture=capture,
    )
    evaluate(*next(episode.batches))
    for start in range(0, steps, settings.unroll):
        length, losses = min(settings.unroll, steps - start), []
        for group in coordinates:
            group.begin()
        for t in range(1, length + 1):
            losses.append(step(*next(episode.batches)).clone())
            for group in coordinates:
                group.record(t)
        dphis = {name: group.meta_gradient(length).div_(tasks) for name, group in groups.items()}
        yield dphis, torch.stack(losses)
