"""Meta-training: Adam on φ, an episode after the other; the best of some checkpoints is kept."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.episode import Episode, MetaSettings, truncated_unrolls
from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint, write_checkpoint


@dataclass
class History:
    """What happened while φ was trained; `loss` and `norm` have one entry an unroll."""

    episodes: list[float] = field(default_factory=list)  # `loss` of the last unroll of each
    loss: list[float] = field(default_factory=list)  # meta-loss a step
    norm: list[float] = field(default_factory=list)  # of the meta-gradient, before clipping
    skipped: int = 0  # meta-gradients that were not finite
    diverged: int = 0  # episodes cut short because a θ or its loss was not finite
    checks: list[list[float]] = field(default_factory=list)  # [episodes done, its loss]


ETA_LR = 0.02  # of Adam on log η
CLIP = 1.0  # largest norm of the meta-gradient, and of that of log η
CHECKS = 5  # at most, evenly over the episodes after the curriculum


def meta_train(
    meta_optimizers: nn.ModuleDict,
    settings: MetaSettings,
    draw: Callable[[int], Episode],
    *,
    backend: str = "auto",
    capture: bool = True,
    checkpoint: Path | None = None,
    on_episode: Callable[[int, float], None] = lambda episode, loss: None,
    check: Callable[[], float] | None = None,
) -> History:
    """Meta-train φ in place, and leave it as it was at the best of its checks.

    Parameters that do not require gradients stay as they are.

    Args:
        meta_optimizers: {φ-group: MetaOptimizer}, all on the device of the optimizees.
        draw: episode number -> its Episode. An episode's randomness depends on its number alone,
            so a resumed run computes the same bits as an uninterrupted one.
        capture: as in `truncated_unrolls`.
        checkpoint: a file written whole after every episode, with all that training goes on from;
            it continues from that if it is there.
        on_episode: called with the number of episodes done and the last unroll's mean loss.
        check: the loss of φ as it is now, on data that stays the same; None keeps the last φ.

    Raises:
        InputError: a checkpoint that cannot be read or belongs to other settings; what
            `truncated_unrolls` raises.
    """
    adam = meta_adam(meta_optimizers, settings)
    forms = {name: meta.settings for name, meta in meta_optimizers.items()}
    identity = {**asdict(settings), "meta_optimizers": forms}  # of a checkpoint
    history, done, best = History(), 0, None
    if checkpoint is not None and checkpoint.exists():
        saved = read_checkpoint(checkpoint)
        if saved["settings"] != identity:
            raise InputError(
                f"checkpoint {checkpoint} was written with other settings: resume with those, or "
                "start afresh with another --out"
            )
        meta_optimizers.load_state_dict(saved["meta_optimizers"])
        adam.load_state_dict(saved["adam"])
        history, done, best = History(**saved["history"]), saved["episodes"], saved["best"]

    def keep(episodes: int) -> None:
        if checkpoint is not None:
            state = {"settings": identity, "episodes": episodes, "best": best}
            state |= {"meta_optimizers": meta_optimizers.state_dict(), "adam": adam.state_dict()}
            write_checkpoint(checkpoint, {**state, "history": asdict(history)})

    begin = settings.curriculum[1] * settings.episodes
    step = (settings.episodes - begin) / CHECKS
    due = {round(begin + step * k) for k in range(1, CHECKS + 1)}  # the last one too
    for number in range(done, settings.episodes):
        loss = math.nan
        episode = draw(number)
        unrolls = truncated_unrolls(
            episode, meta_optimizers, settings, backend, number=number, capture=capture
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
        history.episodes.append(loss)
        if check is not None and number + 1 in due:
            value, lowest = check(), min((one for _, one in history.checks), default=math.inf)
            if value < lowest:  # if none is finite, the last φ stays
                best = copy.deepcopy(meta_optimizers.state_dict())
            history.checks.append([number + 1, value])
        keep(number + 1)
        on_episode(number + 1, loss)
    if best is not None:
        meta_optimizers.load_state_dict(best)
        keep(settings.episodes)
    return history


def meta_adam(meta_optimizers: nn.ModuleDict, settings: MetaSettings) -> torch.optim.Adam:
    """Adam on φ, and in a group of its own on log η where there is one."""
    metas: list[Any] = list(meta_optimizers.values())
    etas = [meta.log_eta for meta in metas if meta.nominal]
    weights = [weight for meta in metas for weight in meta.weights()]
    groups = [{"params": weights, "lr": settings.meta_lr}]
    groups += [{"params": etas, "lr": ETA_LR}] * bool(etas)
    return torch.optim.Adam(groups)


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
    groups, rates = adam.param_groups, (settings.meta_lr, ETA_LR)
    norms = [nn.utils.clip_grad_norm_(group["params"], CLIP).item() for group in groups]
    if all(map(math.isfinite, norms)):
        for group, lr in zip(groups, rates, strict=False):
            group["lr"] = lr * rate
        adam.step()
    return math.hypot(*norms)
