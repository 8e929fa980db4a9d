"""How φ is meta-trained."""

import math
from dataclasses import dataclass

from l2l_ref.errors import InputError


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
        finite, share = "finite and at least 0", "in [0, 1]"
        rules = {
            "episodes": (self.episodes >= 0, "at least 0"),
            "steps": (self.steps >= 1, "at least 1"),
            "unroll": (self.unroll >= 1, "at least 1"),
            "meta_lr": (0 <= self.meta_lr < math.inf, finite),
            "input_alpha": (0 <= self.input_alpha <= 1, share),
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
        """How far the curriculum is in an episode (from 0): 0 all clean, 1 at α and ε as set."""
        clean, full = (share * self.episodes for share in self.curriculum)
        if episode < clean:
            return 0.0
        return 1.0 if episode >= full else (episode + 1 - clean) / (full - clean + 1)

    def rate(self, episode: int, share: float) -> float:
        """The factor of both learning rates when `share` of an episode (from 0) is done."""
        return 0.5 * (1 + math.cos(math.pi * (episode + share) / self.episodes))
