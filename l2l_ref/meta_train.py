"""Meta-training: episodes of fresh optimizees, truncated unrolls, Adam on φ."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref import engine
from l2l_ref.equations import robust_loss, update_cotangents
from l2l_ref.errors import InputError
from l2l_ref.files import replace_with
from l2l_ref.optimizer import MetaOptimizer, flatten_
from l2l_ref.problems import Problem, phi_groups

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MetaSettings:
    """How φ is meta-trained.

    Attributes:
        episodes: optimizees trained, each from a fresh θ₀.
        steps: updates an episode.
        unroll: updates a truncated unroll; one step of Adam on φ follows each.
        meta_lr: learning rate of that Adam.
        schedule: "constant", or "cosine" from meta_lr to 0 over all unrolls.
        clip: largest norm of the meta-gradient.
        read_alpha: α in Eq. 6 of the loss whose gradient φ reads.
        alpha: α in Eq. 6 of the loss that judges φ; the paper has one α for both.
    """

    episodes: int
    steps: int = 100
    unroll: int = 20
    meta_lr: float = 1e-3
    schedule: str = "constant"
    clip: float = 1.0
    read_alpha: float = 0.5
    alpha: float = 0.5

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
    diverged: int = 0  # episodes cut short because θ or its loss was not finite


@dataclass
class Episode:
    """What one episode draws: its optimizee, its batches and its attack."""

    model: nn.Module
    batches: Batches
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor]


def truncated_unrolls(
    problem: Problem,
    episode: Episode,
    meta_optimizers: nn.ModuleDict,
    settings: MetaSettings,
    backend: str = "auto",
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Train one optimizee with φ; after each unroll yield its meta-gradient and its losses.

    The meta-loss of an unroll is Σ L(θ) over the θ that its updates led to, each on its own batch.
    φ may change between unrolls; θ and the LSTM states carry on. First order, in the closed form of
    `unroll_meta_gradient`: no graph outlives the evaluation that made it.

    Yields:
        {φ-group: dφ [P]} and the losses [T].
    """
    groups = phi_groups(episode.model)
    thetas = {name: flatten_(params) for name, params in groups.items()}
    states = {name: meta_optimizers[name].init_state(len(t)) for name, t in thetas.items()}
    ops = {name: engine.operators(backend, state) for name, state in states.items()}
    flat_params = [param for params in groups.values() for param in params]
    counts = [len(params) for params in groups.values()]

    def gradient(alpha: float, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = robust_loss(problem.loss, episode.model, x, y, attack=episode.attack, alpha=alpha)
        grads = iter(torch.autograd.grad(loss, flat_params))
        parts = ([next(grads).reshape(-1) for _ in range(count)] for count in counts)
        return loss.detach(), dict(zip(groups, map(torch.cat, parts), strict=True))

    def evaluate() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The judging loss on the next batch, the gradient that φ reads, and that loss's own."""
        x, y = next(episode.batches)
        loss, judged = gradient(settings.alpha, x, y)
        if settings.read_alpha == settings.alpha:
            return loss, judged, judged
        return loss, gradient(settings.read_alpha, x, y)[1], judged

    _, read, _ = evaluate()
    for start in range(0, settings.steps, settings.unroll):
        length = min(settings.unroll, settings.steps - start)
        first = {name: (thetas[name].clone(), states[name].clone()) for name in groups}
        phis = {name: meta_optimizers[name].phi().detach() for name in groups}
        reads = {name: theta.new_empty(length, len(theta)) for name, theta in thetas.items()}
        judgements = {name: torch.empty_like(rows) for name, rows in reads.items()}
        losses = []
        for t in range(length):
            for name, theta in thetas.items():
                reads[name][t] = read[name]
                form = meta_optimizers[name].form
                ops[name].theta_step_(theta, read[name], states[name], phis[name], **form)
            loss, read, judged = evaluate()
            losses.append(loss)
            for name in groups:
                judgements[name][t] = judged[name]
        dphis = {}
        for name, (theta, state) in first.items():
            cotangents = update_cotangents(judgements[name])
            form = meta_optimizers[name].form
            dphis[name] = ops[name].unroll_meta_gradient(
                theta, reads[name], state, cotangents, phis[name], **form
            )
        yield dphis, torch.stack(losses)


def meta_train(
    problem: Problem,
    meta_optimizers: nn.ModuleDict,
    settings: MetaSettings,
    draw: Callable[[int], Episode],
    *,
    backend: str = "auto",
    checkpoint: Path | None = None,
    on_episode: Callable[[int, float], None] = lambda episode, loss: None,
) -> History:
    """Meta-train φ in place.

    Args:
        meta_optimizers: {φ-group: MetaOptimizer}, all on the device of the optimizees.
        draw: episode number -> its Episode. An episode's randomness depends on its number alone,
            so a resumed run computes the same bits as an uninterrupted one.
        checkpoint: a file written whole after every episode; training continues from it if it is
            there.
        on_episode: called with the number of episodes done and the last unroll's mean loss.

    Raises:
        InputError: a checkpoint that cannot be read or belongs to other settings.
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
        unrolls = truncated_unrolls(problem, episode, meta_optimizers, settings, backend)
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


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A dict that `torch.save` wrote; loading it never executes code.

    Raises:
        InputError: no such file, or one that is not a checkpoint.
    """
    try:
        value = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist: check the path") from None
    except Exception as error:  # torch raises many kinds for broken or unsafe files
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is broken or was not "
            "written by l2l_ref; delete it, or name another"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"checkpoint {path} does not hold what l2l_ref writes: name another")
    return value
