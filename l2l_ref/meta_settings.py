"""How φ is meta-trained."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from l2l_ref.errors import InputError


@dataclass(frozen=True)
class MetaSettings:
    """The settings of `meta_train`; an InputError for a number out of its range.

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
        average: d in [0, 1), 0 for none: the loss that judges is taken at the running average of θ,
            θ̄_t = (1 - w_t)·θ̄_{t-1} + w_t·θ_t with w_t = max(1 - d, 1/t).
        stride: an unroll's meta-gradient is estimated from one coordinate in so many, which take
            turns.
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
    average: float = 0.0
    stride: int = 1

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            value, number = getattr(self, name), Integral if kind is int else Real
            values = (value,) if kind in (int, float) else value
            if kind is not str and not (isinstance(values, tuple) and all(
                isinstance(v, number) and not isinstance(v, bool) for v in values
            )):  # fmt: skip
                what = {int: "a whole number", float: "a number"}.get(kind, "of numbers")
                raise InputError(f"{name} is {value!r}: it must be {what}")
        finite, share = "finite and at least 0", "in [0, 1]"
        rules = {
            "episodes": (self.episodes >= 0, "at least 0"),
            "steps": (self.steps >= 1, "at least 1"),
            "unroll": (self.unroll >= 1, "at least 1"),
            "meta_lr": (0 <= self.meta_lr < math.inf, finite),
            "eta_lr": (0 <= self.eta_lr < math.inf, finite),
            "schedule": (self.schedule in ("constant", "cosine"), "'constant' or 'cosine'"),
            "clip": (self.clip > 0, "above 0"),
            "read_alpha": (0 <= self.read_alpha <= 1, share),
            "penalty": (0 <= self.penalty < math.inf, finite),
            "alpha": (0 <= self.alpha <= 1, share),
            "curriculum": (
                0 <= self.curriculum[0] <= self.curriculum[1] <= 1,
                "two shares of the episodes, 0 <= a <= b <= 1",
            ),
            "average": (0 <= self.average < 1, "at least 0 and below 1"),
            "stride": (self.stride >= 1, "at least 1"),
        }
        for name, (right, allowed) in rules.items():
            if not right:
                raise InputError(f"{name} is {getattr(self, name)!r}: it must be {allowed}")

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
