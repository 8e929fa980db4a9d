"""Meta-training: episodes of fresh optimizees, truncated unrolls, Adam on φ."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref import attacks, engine
from l2l_ref.equations import robust_loss, update_cotangents
from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint, replace_with
from l2l_ref.graphs import Graphed
from l2l_ref.optimizer import MetaOptimizer, flatten_
from l2l_ref.problems import Problem, Stacked, phi_groups

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MetaSettings:
    """How φ is meta-trained.

    Attributes:
        episodes: how many; each trains fresh optimizees.
        steps: updates an episode.
        unroll: updates a truncated unroll; one step of Adam on φ follows each.
        meta_lr: learning rate of that Adam.
        schedule: "constant", or "cosine" from meta_lr to 0 over all unrolls.
        clip: largest norm of the meta-gradient.
        read_alpha: α in Eq. 6 of the loss whose gradient φ reads.
        alpha: α in Eq. 6 of the loss that judges φ; the paper has one α for both.
        tasks: K, the optimizees that an episode trains at once.
    """

    episodes: int
    steps: int = 100
    unroll: int = 20
    meta_lr: float = 1e-3
    schedule: str = "constant"
    clip: float = 1.0
    read_alpha: float = 0.5
    alpha: float = 0.5
    tasks: int = 1

    @property
    def unrolls(self) -> int:
        """Updates of φ over all episodes."""
        return self.episodes * math.ceil(self.steps / self.unroll)

    def lr(self, unroll: int) -> float:
        """Learning rate of update number `unroll` (from 0) of φ."""
        if self.schedule == "constant":
            return self.meta_lr
        return self.meta_lr * 0.5 * (1 + math.cos(math.pi * unroll / self.unrolls))


@dataclass
class History:
    """What happened while φ was trained; one entry an unroll, but for the last two."""

    loss: list[float] = field(default_factory=list)  # meta-loss a step
    norm: list[float] = field(default_factory=list)  # of the meta-gradient, before clipping
    skipped: int = 0  # meta-gradients that were not finite
    diverged: int = 0  # episodes cut short because a θ or its loss was not finite


@dataclass
class Episode:
    """What one episode draws: its optimizee, its batches and its attack.

    Several optimizees are one `problems.Stacked`, and x and y of a batch are those of all.
    """

    model: nn.Module
    batches: Batches
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor]


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
    φ may change between unrolls; θ and the LSTM states carry on. First order, in the closed form of
    `unroll_meta_gradient`: no graph outlives the evaluation that made it.

    Of K tasks at once, θ holds all coordinates [K·N]. φ reads each one's gradient of its own loss,
    and losses and dφ are the means over the tasks.

    Args:
        capture: on a GPU, one update is a CUDA graph; False if the attack waits for the device.

    Yields:
        {φ-group: dφ [P]} and the losses [T].

    Raises:
        InputError: a model of other than `settings.tasks` tasks; an update that cannot be captured.
    """
    tasks = episode.model.tasks if isinstance(episode.model, Stacked) else 1
    if tasks != settings.tasks:
        raise InputError(
            f"the episode's model holds {tasks} optimizees but tasks is {settings.tasks}: stack as "
            "many with problems.Stacked"
        )
    groups = phi_groups(episode.model).items()
    thetas = {name: flatten_(params) for name, params in groups}
    states = {name: meta_optimizers[name].init_state(len(t)) for name, t in thetas.items()}
    ops = {name: engine.operators(backend, state) for name, state in states.items()}
    forms = {name: meta_optimizers[name].form for name in thetas}
    phis = {name: torch.empty_like(meta_optimizers[name].phi()) for name in thetas}
    # Gradients of the loss that judges and of the one that φ reads: [T+1, N], row t at θ_t.
    rows = min(settings.unroll, settings.steps) + 1
    read = {name: theta.new_empty(rows, len(theta)) for name, theta in thetas.items()}
    # θ before each update, where φ sees it: [T, N].
    seen = {name: torch.empty_like(read[name][1:]) for name in thetas if forms[name]["theta_input"]}
    judged, judging = read, {}
    if settings.read_alpha != settings.alpha:
        judged = {name: torch.empty_like(record) for name, record in read.items()}
        judging = {name: torch.empty_like(theta) for name, theta in thetas.items()}

    def differentiate(alpha: float, x: Tensor, y: Tensor) -> Tensor:
        """The loss of Eq. 6; leaves its gradient in θ.grad."""
        for theta in thetas.values():
            theta.grad.zero_()
        loss = robust_loss(problem.loss, episode.model, x, y, attack=episode.attack, alpha=alpha)
        loss.backward(torch.full_like(loss, tasks))  # the mean of K losses: K times its gradient
        return loss.detach()

    def evaluate(x: Tensor, y: Tensor) -> Tensor:
        """The judging loss; leaves its gradient in `judging`, if φ reads another, in θ.grad."""
        loss = differentiate(settings.alpha, x, y)
        if judging:
            for name, theta in thetas.items():
                judging[name].copy_(theta.grad)
            differentiate(settings.read_alpha, x, y)
        return loss

    def advance(x: Tensor, y: Tensor) -> Tensor:
        """One update of θ, which reads θ.grad; then `evaluate`. Every tensor stays in its place."""
        for name, theta in thetas.items():
            ops[name].theta_step_(theta, theta.grad, states[name], phis[name], **forms[name])
        return evaluate(x, y)

    def record(t: int) -> None:
        for name, theta in thetas.items():
            read[name][t] = theta.grad
            if judging:
                judged[name][t] = judging[name]

    step = Graphed(
        advance,
        next(iter(thetas.values())).device,
        generators=attacks.generators(episode.attack),
        capture=capture,
    )
    evaluate(*next(episode.batches))
    record(0)
    for start in range(0, settings.steps, settings.unroll):
        length = min(settings.unroll, settings.steps - start)
        first = {name: state.clone() for name, state in states.items()}
        for name, phi in phis.items():
            phi.copy_(meta_optimizers[name].phi().detach())
        losses = []
        for t in range(1, length + 1):
            for name in seen:
                seen[name][t - 1] = thetas[name]
            losses.append(step(*next(episode.batches)).clone())
            record(t)
        dphis = {}
        for name, state in first.items():
            cotangents = update_cotangents(judged[name][1 : length + 1])
            before = seen[name][:length] if name in seen else None
            dphis[name] = ops[name].unroll_meta_gradient(
                read[name][:length], state, cotangents, phis[name], before, **forms[name]
            )
            dphis[name].div_(tasks)
            read[name][0] = read[name][length]  # where the next unroll begins
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
    """Meta-train φ in place.

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
    adam = torch.optim.Adam(meta_optimizers.parameters(), lr=settings.meta_lr)
    history, done = History(), 0
    if checkpoint is not None and checkpoint.exists():
        saved = read_checkpoint(checkpoint)
        if saved.get("settings") != identity(settings, meta_optimizers):
            raise InputError(
                f"checkpoint {checkpoint} was written with other settings: resume with those, or "
                "start afresh with another --out"
            )
        meta_optimizers.load_state_dict(saved["meta_optimizers"])
        adam.load_state_dict(saved["adam"])
        history, done = History(**saved["history"]), saved["episodes"]

    for number in range(done, settings.episodes):
        loss = math.nan
        # an episode that was cut short still uses up its share of the schedule
        first = number * (settings.unrolls // settings.episodes)
        episode = draw(number)
        unrolls = truncated_unrolls(
            problem, episode, meta_optimizers, settings, backend, capture=capture
        )
        for index, (dphis, losses) in enumerate(unrolls, start=first):
            norm = apply_meta_gradient(meta_optimizers, dphis, adam, settings.lr(index), settings)
            loss = losses.mean().item()
            history.loss.append(loss)
            history.norm.append(norm)
            history.skipped += not math.isfinite(norm)
            if not math.isfinite(loss):  # θ is beyond repair: a fresh optimizee comes next
                history.diverged += 1
                break
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


def apply_meta_gradient(
    meta_optimizers: nn.ModuleDict,
    dphis: dict[str, Tensor],
    adam: torch.optim.Adam,
    lr: float,
    settings: MetaSettings,
) -> float:
    """One clipped step of Adam on φ, left out if dφ is not finite; returns the norm of dφ."""
    for name, dphi in dphis.items():
        params = list(meta_optimizers[name].parameters())
        parts = dphi.split([param.numel() for param in params])
        for param, part in zip(params, parts, strict=True):
            param.grad = part.view_as(param)
    norm = nn.utils.clip_grad_norm_(meta_optimizers.parameters(), settings.clip).item()
    if math.isfinite(norm):
        adam.param_groups[0]["lr"] = lr
        adam.step()
    return norm


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
