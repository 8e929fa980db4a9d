"""Meta-training: episodes of fresh optimizees, truncated unrolls, Adam on φ."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref import attacks
from l2l_ref.backend import operators
from l2l_ref.backend.cuda_graphs import Graphed
from l2l_ref.equations import robust_loss, update_cotangents
from l2l_ref.errors import InputError
from l2l_ref.evaluate import is_chance
from l2l_ref.files import read_checkpoint, replace_with
from l2l_ref.optimizer import MetaOptimizer, flatten_, phi_groups
from l2l_ref.problems import Problem, Stacked

Batches = Iterator[tuple[Tensor, Tensor]]


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
class History:
    """What happened while φ was trained; `loss` and `norm` have one entry an unroll."""

    loss: list[float] = field(default_factory=list)  # meta-loss a step
    norm: list[float] = field(default_factory=list)  # of the meta-gradient, before clipping
    skipped: int = 0  # meta-gradients that were not finite
    diverged: int = 0  # episodes cut short because a θ or its loss was not finite
    bad: dict[str, int] = field(default_factory=dict)  # how many of the last episodes ended so
    ended: str | None = None  # "collapsed" or "diverged": why the training was given up


# The watch: after the first fifth of the episodes, and after the clean ones of the curriculum, in
# which a φ that does not move yet looks the same, so many in a row that end so end the training.
WATCH_AFTER = 0.2
PATIENCE = {"collapsed": 5, "diverged": 3}


@dataclass
class Episode:
    """What one episode draws: its optimizee, its batches and its attack.

    Several optimizees are one `problems.Stacked`, and x and y of a batch are those of all.

    Attributes:
        steps: updates; None for the number of the settings.
        strength: in [0, 1]; α is 1 + strength·(α - 1), of both losses (`MetaSettings.strength`).
    """

    model: nn.Module
    batches: Batches
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor]
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
        n = len(self.theta)
        self.state, self.moments = meta_optimizer.init_state(n), meta_optimizer.init_moments(n)
        self.phi = torch.empty_like(meta_optimizer.phi())
        self.read = self.theta.new_empty(rows, n)
        self.judged = torch.empty_like(self.read) if separate else self.read
        self.judging = torch.empty_like(self.theta) if separate else None
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
            self.theta, self.theta.grad, self.state, self.moments, phi=self.phi,
            backend=self.backend,
        )  # fmt: skip
        if direction is not None:
            self.direction.copy_(direction)

    def keep_judging(self) -> None:
        """θ.grad is that of the loss that judges; the one that φ reads comes next."""
        self.judging.copy_(self.theta.grad)

    def record(self, t: int) -> None:
        """Row t of all records."""
        self.read[t] = self.theta.grad
        if self.judging is not None:
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
        if self.directions is None:
            return dphi
        slope = (self.directions[1 : length + 1] * cotangents).sum()
        return torch.cat((-meta.log_eta.detach().exp() * slope[None], dphi))


def truncated_unrolls(
    problem: Problem,
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
    tasks = episode.model.tasks if isinstance(episode.model, Stacked) else 1
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
    groups = {
        name: Coordinates(
            params,
            meta_optimizers[name],
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
            group.theta.grad.zero_()
        loss = robust_loss(
            problem.loss, episode.model, x, y, attack=episode.attack, alpha=alpha, penalty=penalty
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
        generators=attacks.generators(episode.attack),
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


def meta_train(
    problem: Problem,
    meta_optimizers: nn.ModuleDict,
    settings: MetaSettings,
    draw: Callable[[int], Episode],
    *,
    backend: str = "auto",
    capture: bool = True,
    checkpoint: Path | None = None,
    on_episode: Callable[[int, float], None] = lambda episode, loss: None,
) -> History:
    """Meta-train φ in place. Parameters that do not require gradients stay as they are.

    A φ whose optimizees keep ending as a constant predictor, or not finite, is given up: `History`
    says so in `ended`.

    Args:
        meta_optimizers: {φ-group: MetaOptimizer}, all on the device of the optimizees.
        draw: episode number -> its Episode. An episode's randomness depends on its number alone,
            so a resumed run computes the same bits as an uninterrupted one.
        capture: as in `truncated_unrolls`.
        checkpoint: a file written whole after every episode; training continues from it if it is
            there.
        on_episode: called with the number of episodes done and the last unroll's mean loss.

    Raises:
        InputError: a checkpoint that cannot be read or belongs to other settings; what
            `truncated_unrolls` raises.
    """
    adam = meta_adam(meta_optimizers, settings)
    history, done = History(), 0
    if checkpoint is not None and checkpoint.exists():
        saved = read_checkpoint(checkpoint)
        if not same_identity(saved.get("settings"), identity(settings, meta_optimizers)):
            raise InputError(
                f"checkpoint {checkpoint} was written with other settings: resume with those, or "
                "start afresh with another --out"
            )
        meta_optimizers.load_state_dict(saved["meta_optimizers"])
        adam.load_state_dict(saved["adam"])
        history, done = History(**saved["history"]), saved["episodes"]

    for number in range(done, settings.episodes):
        if history.ended:
            break
        loss = math.nan
        episode = draw(number)
        unrolls = truncated_unrolls(
            problem, episode, meta_optimizers, settings, backend, capture=capture
        )
        count = math.ceil((episode.steps or settings.steps) / settings.unroll)
        for index, (dphis, losses) in enumerate(unrolls):
            rate = settings.rate(number, index / count)
            norm = apply_meta_gradient(meta_optimizers, dphis, adam, rate, settings)
            loss = losses.mean().item()
            history.loss.append(loss)
            history.norm.append(norm)
            history.skipped += not math.isfinite(norm)
            if not math.isfinite(loss):  # θ is beyond repair: a fresh optimizee comes next
                history.diverged += 1
                break
        watch(history, settings, number, how_it_ended(problem, episode, loss))
        if checkpoint is not None:
            state = {
                "settings": identity(settings, meta_optimizers),
                "episodes": number + 1,
                "meta_optimizers": meta_optimizers.state_dict(),
                "adam": adam.state_dict(),
                "history": asdict(history),
            }
            replace_with(checkpoint, partial(torch.save, state))
        on_episode(number + 1, loss)
    return history


def how_it_ended(problem: Problem, episode: Episode, loss: float) -> str:
    """An episode's last mean loss -> "ok", "diverged", or "collapsed": within 1 % of that of the
    uniform prediction, and each optimizee predicts one class for all of a batch."""
    if not math.isfinite(loss):
        return "diverged"
    if not problem.classes or not is_chance(loss, problem.classes):
        return "ok"
    with torch.no_grad(), attacks.untouched(episode.model):
        x, _ = next(episode.batches)
        predicted = episode.model(x).argmax(-1).view(getattr(episode.model, "tasks", 1), -1)
    return "collapsed" if (predicted == predicted[:, :1]).all() else "ok"


def watch(history: History, settings: MetaSettings, number: int, end: str) -> None:
    """Count how the last episodes ended, of which this is `number`, and give up if need be."""
    if number < max(WATCH_AFTER, settings.curriculum[0]) * settings.episodes:
        return
    history.bad = {end: history.bad.get(end, 0) + 1} if end in PATIENCE else {}
    if history.bad.get(end, 0) >= PATIENCE.get(end, math.inf):
        history.ended = end


def meta_adam(meta_optimizers: nn.ModuleDict, settings: MetaSettings) -> torch.optim.Adam:
    """Adam on φ, and in a group of its own on log η where there is one."""
    weights, etas = parameter_groups(meta_optimizers)
    groups = [{"params": weights, "lr": settings.meta_lr}]
    groups += [{"params": etas, "lr": settings.eta_lr}] * bool(etas)
    return torch.optim.Adam(groups)


def parameter_groups(meta_optimizers: nn.ModuleDict) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of all φ, and the log η of those that have a nominal term."""
    metas = list(meta_optimizers.values())
    weights = [weight for meta in metas for weight in meta.weights()]
    return weights, [meta.log_eta for meta in metas if meta.nominal]


def apply_meta_gradient(
    meta_optimizers: nn.ModuleDict,
    gradients: dict[str, Tensor],
    adam: torch.optim.Adam,
    rate: float,
    settings: MetaSettings,
) -> float:
    """One step of Adam, weights and log η clipped apart; left out if a gradient is not finite.

    Returns the norm of dφ and d log η before clipping.
    """
    for name, gradient in gradients.items():
        params = list(meta_optimizers[name].parameters())
        parts = gradient.split([param.numel() for param in params])
        for param, part in zip(params, parts, strict=True):
            param.grad = part.view_as(param) if param.requires_grad else None
    groups = parameter_groups(meta_optimizers)
    norms = [nn.utils.clip_grad_norm_(group, settings.clip).item() for group in groups]
    if all(map(math.isfinite, norms)):
        rates = settings.meta_lr, settings.eta_lr
        for group, lr in zip(adam.param_groups, rates, strict=False):
            group["lr"] = lr * rate
        adam.step()
    return math.hypot(*norms)


def new_meta_optimizers(
    problem: Problem, generator: torch.Generator, device: torch.device | str, **settings: Any
) -> nn.ModuleDict:
    """An untrained φ for each φ-group of a problem; `settings` are MetaOptimizer's."""
    return nn.ModuleDict(
        {
            name: MetaOptimizer(**settings, generator=generator)
            for name in phi_groups(problem.build())
        }
    ).to(device)


def identity(settings: MetaSettings, meta_optimizers: nn.ModuleDict) -> dict[str, Any]:
    """What must agree before a checkpoint may be continued, beside what `draw` draws."""
    forms = {name: meta.settings for name, meta in meta_optimizers.items()}
    return {**asdict(settings), "meta_optimizers": forms}


def same_identity(before: Any, now: dict[str, Any]) -> bool:
    """Whether a checkpoint's `identity` is `now`; fields that came later had the values below."""
    if not isinstance(before, dict):
        return False
    later = {"penalty": 0.0, "curriculum": (0.0, 0.0), "eta_lr": now["eta_lr"], "tasks": 1}
    forms = {
        name: {"nominal": False, **form} for name, form in before.get("meta_optimizers", {}).items()
    }
    return {**later, **before, "meta_optimizers": forms} == now
