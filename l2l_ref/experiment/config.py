"""The configuration: one frozen dataclass, whose fields are the options, and how it is stored."""

import math
from dataclasses import dataclass, fields
from typing import Any

from l2l_ref.backend import BACKENDS
from l2l_ref.equations import MAX_P
from l2l_ref.errors import InputError
from l2l_ref.experiment.options import META, RUN, TRANSFER, WHAT, Option, option, path
from l2l_ref.meta_settings import MetaSettings

DATASETS = ("mnist", "cifar10", "quadratic")
ATTACKS = ("fgsm", "pgd", "none")
RECIPES = ("paper", "robust", "penalty")


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run; `complete` fills in the defaults.

    Raises:
        InputError: a value outside its range.
    """

    dataset: str = option(WHAT, "of images, or Andrychowicz et al.'s quadratics", "mnist",
        choices=DATASETS)
    attack: str = option(WHAT, "fgsm, pgd, none or MODULE:FUNCTION",
        "fgsm", {"quadratic": "none"}, metavar="NAME")
    eps: tuple[float, ...] = option(WHAT, "l∞ radius in pixel values [0, 1], also 8/255; several: "
        "one panel each", (0.1,), {"cifar10": (0.03,), "cifar10 quick fgsm": (2 / 255,),
         "quadratic": (0.0,)})
    recipe: str = option(WHAT, "paper: as printed, after a curriculum; robust: φ takes clean "
        "gradients and θ as input, its loss is attacked, it is odd, with a nominal term; penalty: "
        "that term alone, on l + eps·|dl/dx|", "paper", choices=RECIPES, of="φ")
    optimizee: str = option(WHAT, "mlp, convnet, logistic or MODULE:FUNCTION",
        "mlp", {"cifar10": "convnet", "quadratic": "quadratic"}, metavar="NAME")
    attack_steps: int = option(WHAT, "PGD steps", 7)
    attack_step_size: float | None = option(WHAT, "pixel values", said="2.5·eps/steps")

    # On CIFAR-10 φ takes some 100 unrolls of clean episodes until it begins to learn. Under FGSM
    # 50 episodes are too few (docs/answers), under PGD one of 100-step episodes collapses. With
    # its lengths the robust φ holds to 3,000 steps; that of the penalty holds anyway, and with
    # long ones is slower (docs/trials).
    episodes: int = option(META, "each trains a fresh optimizee", 280,
        {"cifar10": 50, "cifar10 fgsm paper": 100, "robust": 90, "penalty": 60,
         "cifar10 robust": 30, "quadratic": 100, "mnist quick": 15, "cifar10 quick": 1,
         "quadratic quick": 10}, of="φ")
    episode_steps: tuple[int, ...] = option(META, "updates of an episode, or smallest and largest",
        (100,), {"cifar10": (100, 300), "robust": (100, 1000), "penalty": (100, 300),
         "quadratic": (100,), "mnist quick": (60,), "cifar10 quick": (10,),
         "quadratic quick": (40,)}, of="φ")
    average: float = option(META, "decay d of the average θ̄ that the meta-loss is of", 0.0,
        {"robust": 0.95, "quadratic": 0.0}, of="φ", said="robust: 0.95")
    # A meta-gradient is of one coordinate in so many (docs/trials).
    stride: int = option(default=1, exceptions={"mnist paper": 4, "robust": 4, "quadratic": 1},
        of="φ")
    unroll: int = option(META, "updates an unroll", 20, {"quick": 10, "cifar10 quick": 5}, of="φ")
    meta_lr: float = option(META, "Adam's on φ", 3e-3,
        {"cifar10": 1e-3, "robust": 3e-3, "quadratic": 1e-2}, of="φ")
    meta_schedule: str = option(default="cosine", of="φ")
    clip: float = option(default=1.0, of="φ")  # of the meta-gradient's norm
    # The paper mixes clean and FGSM losses (4.1) and takes the PGD loss alone (4.2); under that φ
    # collapses, so some of the clean one stays.
    alpha: float = option(META, "α of Eq. 6, the share of the clean loss", 0.5,
        {"pgd": 0.2, "none": 1.0, "robust": 0.0, "robust none": 1.0}, of="φ")
    input_alpha: float = option(  # that of the loss whose gradient is the input of φ
        default=0.5, exceptions={"pgd": 0.2, "none": 1.0, "robust": 1.0}, of="φ")
    penalty: float = option(META, "λ/eps of the loss whose gradient φ takes as input", 0.0,
        {"penalty": 1.5, "cifar10 penalty": 1.0, "quadratic": 0.0}, of="φ",
        said="penalty: 1.5, on CIFAR-10 1")
    # Literally, φ drifts to a constant predictor unless α and ε come in slowly.
    curriculum: tuple[float, float] = option(META, "fractions of the episodes at which attacks "
        "begin and are at full strength", (0.0, 0.5),
        {"cifar10": (0.5, 0.75), "robust": (0.0, 0.0), "quadratic": (0.0, 0.0)}, of="φ")
    p: float = option(META, "log range of Eq. 5", 10.0, of="φ")
    nominal: bool = option(META, "θ ← θ + u - η·d, Adam's direction d", False,
        {"robust": True, "quadratic": False}, of="φ", said="robust", opposite=True)
    # θ of a quadratic travels much farther than a network's.
    output_scale: float = option(default=0.01, exceptions={"robust": 0.1, "quadratic": 0.1}, of="φ")
    theta_input: bool = option(default=False, exceptions={"robust": True}, of="φ")
    odd: bool = option(default=False, exceptions={"robust": True}, of="φ")
    hidden_size: int = option(default=20, of="φ")
    num_layers: int = option(default=2, of="φ")
    meta_seeds: int = option(META, "φ meta-trained", 1)
    # A miniature of CIFAR-10's meta-training learns nothing.
    load: str | None = option(META, "use the φ of this meta_optimizer.pt, or of the package by its "
        "name (l2l_ref.list_pretrained())",
        exceptions={"cifar10 quick paper fgsm": "cifar10-fgsm-2-255",
         "cifar10 quick paper pgd": "cifar10-pgd-0.03"}, metavar="FILE", kind=path)

    steps: int = option(TRANSFER, "updates of an optimizee", 100,
        {"cifar10": 1000, "quick": 40})
    average_over: float = option(default=0.1)  # share of the steps in the average that is evaluated
    images: int | None = option(TRANSFER, "that an optimizee trains on", said="all of its half")
    batch_size: int = option(TRANSFER, "samples", 128, {"cifar10 quick": 64})
    seeds: int = option(TRANSFER, "transfer runs of each method", 5,
        {"cifar10": 3, "quick": 2, "cifar10 quick": 1})
    folds: int = option(TRANSFER, "2: the halves change places too", 1)
    transfer_alpha: float = option(default=0.5)  # the clean share in L2L-Transfer (mixed)
    attacked_alpha: float = option(  # that of Adam on attacked batches
        default=0.5, exceptions={"pgd": 0.2, "none": 1.0})
    compare: tuple[str, ...] = option(TRANSFER, "more baselines: MODULE:FUNCTION, model[, lr] -> "
        "optimizer", (), metavar="NAME", said="none")
    tune_seeds: int = option(default=2, exceptions={"cifar10": 1, "quick": 1})
    tune_every: int = option(default=1, exceptions={"quick": 2, "cifar10 quick": 3})  # of a grid
    eval_samples: int = option(TRANSFER, "test images for the accuracies", 2000,
        {"quick": 500, "cifar10 quick": 100})
    curve_samples: int = option(default=1000, exceptions={"cifar10": 256, "quadratic": 1,
        "quick": 100})  # for the losses
    record_every: int = option(TRANSFER, "updates between points of a curve",
        exceptions={"cifar10 quick": 4}, said="steps/50")
    eval_attack: str = option(TRANSFER, "attack of the evaluation: pgd or MODULE:FUNCTION",
        "pgd", metavar="NAME")
    eval_steps: int = option(TRANSFER, "steps of that PGD", 20)
    restarts: int = option(TRANSFER, "of that PGD, per loss", 2, {"quick": 1})
    eval_on: str = option(TRANSFER, "test images, or validation: the meta half only", "test",
        choices=("test", "validation"), metavar="SET")

    quick: bool = option(RUN, "a miniature of all of it", False)
    seed: int = option(RUN, "base of all randomness", 0)
    device: str = option(RUN, "cpu, cuda, cuda:1, …", "auto", metavar="D", of="place")
    backend: str = option(RUN, "who runs the LSTM", "auto", choices=BACKENDS, of="place")
    jobs: int | None = option(RUN, "processes, of a core or a GPU each", of="place",
        said="all that pay")
    graphs: bool = option(RUN, "on a GPU, an update is a CUDA graph", True, of="place",
        opposite=True)
    data_dir: str = option(RUN, "where data is or is downloaded to", "data", metavar="DIR",
        of="place", kind=path)
    strict_data: bool = option(RUN, "no stand-in for missing data", False, of="place")
    out: str | None = option(RUN, "results", metavar="DIR", of="place", kind=path,
        said="runs/<dataset>-<attack>-<recipe>")
    resume: bool = option(RUN, "continue or join the run in --out, or begin it", False, of="place")
    # fmt: on

    def __post_init__(self):
        require("folds", self.folds in (1, 2), self.folds, "1 or 2")
        for name in [one.name for one in fields(self) if one.type is int and one.name != "seed"]:
            require(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
        require("jobs", self.jobs is None or self.jobs >= 1, self.jobs, "at least 1")
        few = self.images is not None and self.images < self.batch_size
        require("images", not few, self.images, f"at least --batch-size, {self.batch_size}")
        lengths = self.episode_steps
        ordered = len(lengths) in (1, 2) and 1 <= lengths[0] <= lengths[-1]
        require("episode_steps", ordered, list(lengths), "a length, or smallest and largest")
        require("p", 0 < self.p <= MAX_P, self.p, f"above 0 and at most {MAX_P}")
        require("meta_lr", 0 < self.meta_lr <= 1, self.meta_lr, "above 0 and at most 1")
        require("alpha", 0 <= self.alpha <= 1, self.alpha, "between 0 and 1")
        try:
            self.meta_settings()
        except InputError as error:  # names one of the others of meta-training
            raise InputError(f"--{error}") from None
        size = self.attack_step_size
        require("attack_step_size", size is None or 0 < size <= 1, size, "above 0 and at most 1")
        known = self.attack in ATTACKS or ":" in self.attack
        require("attack", known, self.attack, f"{', '.join(ATTACKS)}, or MODULE:FUNCTION")
        known = self.eval_attack == "pgd" or ":" in self.eval_attack
        require("eval_attack", known, self.eval_attack, "pgd, or MODULE:FUNCTION")
        for eps in self.eps:
            require("eps", 0 <= eps <= 1, eps, "between 0 and 1 (pixel values are in [0, 1])")
        require("eps", len(set(self.eps)) == len(self.eps), list(self.eps), "free of repeats")
        require("seed", 0 <= self.seed < 2**63, self.seed, "at least 0 and below 2^63")
        if self.penalty and self.input_alpha == 0:
            raise InputError(
                f"--penalty is {self.penalty} but --alpha 0 has no clean loss that it could be "
                "added to: leave one of them out"
            )
        if self.dataset == "quadratic" and self.images:
            raise InputError(f"--images is {self.images} but quadratics have none: leave it out")
        if self.dataset == "quadratic" and self.attack != "none":
            raise InputError(
                f"--attack {self.attack} does not go with --dataset quadratic, which has no "
                "pixels to attack: use --attack none"
            )

    def meta_settings(self, eps: float = 1.0, *, clean: bool = False) -> MetaSettings:
        """How a φ is meta-trained; `clean`: on clean batches alone, and for them."""
        return MetaSettings(
            episodes=self.episodes,
            steps=self.episode_steps[-1],
            unroll=self.unroll,
            meta_lr=self.meta_lr,
            schedule=self.meta_schedule,
            clip=self.clip,
            input_alpha=1.0 if clean else self.input_alpha,
            penalty=0.0 if clean else self.penalty * eps,
            alpha=1.0 if clean else self.alpha,
            curriculum=self.curriculum,
            average=self.average,
            stride=self.stride,
        )


def require(name: str, ok: bool, value: Any, allowed: str) -> None:
    """InputError unless `ok`, in the words of the command line."""
    if not ok:
        raise InputError(f"--{name.replace('_', '-')} is {value}: it must be {allowed}")


OPTIONS: dict[str, Option] = {one.name: one.metadata["option"] for one in fields(Config)}
POINTS = 50  # of a curve


def names_of(of: str) -> set[str]:
    """The options that a loaded φ brings along ("φ"), or that may change ("place")."""
    return {name for name, option in OPTIONS.items() if option.of == of}


def complete(given: dict[str, Any]) -> Config:
    """A Config from the settings that are given; the rest from recipe, data set and --quick."""
    recipe = given.get("recipe", "paper")
    words = {given.get("dataset", "mnist"), recipe}
    if recipe == "penalty":
        words.add("robust")
    if given.get("quick"):
        words.add("quick")
    words.add(given.get("attack") or OPTIONS["attack"].value(words))
    settings = {name: option.value(words) for name, option in OPTIONS.items()}
    if recipe == "paper" and "alpha" in given:  # the paper has one α for all
        settings |= {"input_alpha": given["alpha"], "attacked_alpha": given["alpha"]}
    if given.keys() & (names_of("φ") | {"meta_seeds", "folds", "eval_on"}):
        settings["load"] = None  # what comes with the package is not that φ
    settings |= given
    if settings["record_every"] is None:
        settings["record_every"] = math.ceil(settings["steps"] / POINTS)
    return Config(**settings)


def tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with tuples, as `Config` has them, for the lists of argparse and JSON."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
