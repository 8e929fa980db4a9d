"""The configuration: one frozen dataclass, and how it is stored."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

from l2l_ref.equations import MAX_P
from l2l_ref.errors import InputError
from l2l_ref.experiment.options import JUDGES, defaults


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The comments give units; `complete` fills in the defaults.

    Raises:
        InputError: a value outside its range.
    """

    # what
    dataset: str
    attack: str
    eps: tuple[float, ...]  # l∞ radius in pixel values [0, 1]; one panel each
    recipe: str
    optimizee: str
    attack_steps: int  # of PGD
    attack_step_size: float | None  # pixel values; None: 2.5·eps/steps
    # φ
    p: float
    output_scale: float
    theta_input: bool
    odd: bool
    nominal: bool  # θ ← θ + u - η·d, with Adam's direction d
    hidden_size: int
    num_layers: int
    # meta-training
    alpha: float  # Eq. 6 of the loss that judges φ
    read_alpha: float  # Eq. 6 of the loss whose gradient φ reads
    penalty: float  # λ/ε of that loss
    curriculum: tuple[float, float]  # shares of the episodes: clean up to one, full from the other
    episodes: int
    episode_steps: tuple[int, ...]  # updates of an episode; log-uniform from the first to the last
    tasks: int  # optimizees that an episode trains at once
    unroll: int  # updates
    meta_lr: float
    meta_schedule: str
    clip: float
    meta_seeds: int  # how many φ
    grid: dict[str, tuple[float, ...]]  # candidates by name; empty: no search
    # transfer
    steps: int  # updates of an optimizee
    images: int | None  # that an optimizee trains on; None: all of its half
    batch_size: int
    seeds: int  # how many runs of each method
    folds: int  # 1, or 2: the halves change places
    transfer_alpha: float  # Eq. 6 of L2L-Transfer (mixed)
    attacked_alpha: float  # Eq. 6 of Adam on attacked batches
    tune_seeds: int  # runs of each candidate of a baseline's grid
    tune_every: int  # take every k-th candidate of the baselines' grids
    # evaluation
    eval_samples: int  # test images for accuracies
    curve_samples: int  # test images for the curves
    record_every: int  # updates between two points of a curve
    judge_steps: int  # of the PGD of the accuracies, each 2.5·eps/steps long
    restarts: int  # of that PGD, on each of its losses
    judge: str  # "test", or "validation": the meta-training half alone
    # the run
    seed: int
    device: str
    backend: str
    graphs: bool  # on a GPU, updates are CUDA graphs
    data_dir: str
    strict_data: bool
    out: str | None
    resume: bool
    load: str | None
    quick: bool

    def __post_init__(self):
        for name in ("attack_steps", "hidden_size", "num_layers", "episodes", "tasks", "unroll",
                     "steps", "batch_size", "seeds", "meta_seeds", "tune_seeds", "tune_every",
                     "eval_samples", "curve_samples", "record_every", "judge_steps",
                     "restarts"):  # fmt: skip
            require(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
        few = self.images is not None and self.images < self.batch_size
        require("images", not few, self.images, f"at least --batch-size, {self.batch_size}")
        for name in ("alpha", "read_alpha", "transfer_alpha", "attacked_alpha"):
            require(name, 0 <= getattr(self, name) <= 1, getattr(self, name), "between 0 and 1")
        penalty, shares, lengths = self.penalty, self.curriculum, self.episode_steps
        require("penalty", 0 <= penalty < math.inf, penalty, "at least 0, in units of eps")
        ordered = len(shares) == 2 and 0 <= shares[0] <= shares[1] <= 1
        require("curriculum", ordered, list(shares), "two shares from 0 to 1, the smaller first")
        ordered = len(lengths) in (1, 2) and 1 <= lengths[0] <= lengths[-1]
        require("episode_steps", ordered, list(lengths), "a length, or smallest and largest")
        require("judge", self.judge in JUDGES, self.judge, f"one of {', '.join(JUDGES)}")
        require("p", 0 < self.p <= MAX_P, self.p, f"above 0 and at most {MAX_P}")
        for name in ("output_scale", "meta_lr", "clip"):
            value = getattr(self, name)
            require(name, 0 < value < math.inf, value, "positive and finite")
        size = self.attack_step_size
        require("attack_step_size", size is None or 0 < size < math.inf, size, "positive")
        for eps in self.eps:
            require("eps", 0 <= eps <= 1, eps, "between 0 and 1 (pixel values are in [0, 1])")
        require("eps", len(set(self.eps)) == len(self.eps), list(self.eps), "free of repeats")
        require("folds", self.folds in (1, 2), self.folds, "1 or 2")
        require("seed", 0 <= self.seed < 2**63, self.seed, "at least 0 and below 2^63")
        if self.penalty and self.read_alpha == 0:
            raise InputError(
                f"--penalty is {self.penalty} but --alpha 0 reads no clean loss that it could be "
                "added to: leave one of them out"
            )
        if self.dataset == "quadratic" and self.images:
            raise InputError(f"--images is {self.images} but quadratics have none: leave it out")
        if self.dataset == "quadratic" and self.attack != "none":
            raise InputError(
                f"--attack {self.attack} does not go with --dataset quadratic, which has no "
                "pixels to attack: use --attack none"
            )


def require(name: str, ok: bool, value: Any, allowed: str) -> None:
    """InputError unless `ok`, in the words of the command line."""
    if not ok:
        raise InputError(f"--{name.replace('_', '-')} is {value}: it must be {allowed}")


POINTS = 100  # of a curve


def complete(given: dict[str, Any]) -> Config:
    """A Config from the settings that are given; the rest from recipe, data set and --quick."""
    recipe = given.get("recipe", "paper")
    settings = defaults(
        given.get("dataset", "mnist"), given.get("attack"), recipe, given.get("quick", False)
    )
    if recipe == "paper" and "alpha" in given:  # the paper has one α for all
        settings |= {"read_alpha": given["alpha"], "attacked_alpha": given["alpha"]}
    settings |= given
    if settings["record_every"] is None:
        settings["record_every"] = math.ceil(settings["steps"] / POINTS)
    return Config(**settings)


def grid_points(config: Config) -> list[dict[str, float]]:
    """Every combination of `--grid`, {name: value}."""
    combinations = itertools.product(*config.grid.values())
    return [dict(zip(config.grid, values, strict=True)) for values in combinations]


def with_grid(config: Config, chosen: dict[str, float]) -> Config:
    """The configuration with a point of its grid in place.

    φ reads and is judged by one α, so both move, unless the recipe separates them.

    Raises:
        InputError: a candidate out of range.
    """
    changes: dict[str, Any] = dict(chosen)
    if "unroll" in changes:
        whole = float(changes["unroll"]).is_integer()
        require("unroll", whole, changes["unroll"], "a whole number")
        changes["unroll"] = int(changes["unroll"])
    if "alpha" in changes and config.read_alpha == config.alpha:
        changes["read_alpha"] = changes["alpha"]
    return replace(config, **changes)


# What settings that came later were before, for runs and φ that do not name them.
BEFORE: dict[str, Any] = {
    "tasks": 1, "nominal": False, "penalty": 0.0, "record_every": 1, "judge": "test",
    "images": None, "curriculum": [0.0, 0.0], "judge_steps": 20,
}  # fmt: skip


def as_saved(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json or a φ file, those that came later filled in."""
    return {**BEFORE, "episode_steps": [settings.get("steps")], **settings}
