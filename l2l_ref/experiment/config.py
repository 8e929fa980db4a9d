"""The configuration: one frozen dataclass, whose fields are the options, and how it is stored."""

import argparse
import os
from dataclasses import dataclass, field, fields
from fractions import Fraction
from types import NoneType
from typing import Any, get_args, get_origin

from l2l_ref.backend import BACKENDS
from l2l_ref.episode import MetaSettings
from l2l_ref.equations import MAX_P
from l2l_ref.errors import InputError

GROUPS = "experiment", "meta-training", "transfer and evaluation", "the run"  # of the help
WHAT, META, TRANSFER, RUN = GROUPS
DATASETS = ("mnist", "cifar10", "quadratic")
ATTACKS = ("fgsm", "pgd", "none")
RECIPES = ("paper", "robust", "penalty")


def number(text: str) -> float:
    """A float, or a fraction such as 8/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number or a fraction") from None


def flag(name: str) -> str:
    """The option of a field, as it is typed."""
    return "--" + name.replace("_", "-")


def show(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Option:
    """What a field's metadata say of it."""

    group: str | None = None  # of the help; None for a setting without a flag
    help: str = ""  # one sentence; what the defaults are comes after it by itself
    default: Any = None  # where no exception holds
    # {words: the value there}, of which the last that holds wins. Words are a data set, an attack,
    # a recipe or "quick"; all must be those of the run. The recipe "penalty" is "robust" too.
    exceptions: dict[str, Any] = field(default_factory=dict)
    choices: tuple[Any, ...] | None = None
    metavar: str | None = None
    of: str = ""  # "φ": a loaded φ brings it along; "place": it may change when a run is continued

    def value(self, words: set[str]) -> Any:
        """The default of a run that these words describe."""
        cases = {"": self.default} | self.exceptions
        return [value for needed, value in cases.items() if words.issuperset(needed.split())][-1]

    def sentence(self) -> str:
        """The help, with the defaults behind it."""
        if self.default in (None, ()) or isinstance(self.default, bool):
            return self.help
        cases = {"": self.default} | self.exceptions
        shown = [f"{words}: {show(value)}" if words else show(value)
                 for words, value in cases.items() if "quick" not in words]  # fmt: skip
        return f"{self.help} ({'; '.join(shown)})"

    def arguments(self, type_: Any) -> dict[str, Any]:
        """Those of `add_argument`, for a field of that type."""
        text = self.sentence().replace("%", "%%")
        if type_ is bool:
            action = argparse.BooleanOptionalAction if self.default else "store_true"
            return {"action": action, "help": text}
        inner = [one for one in get_args(type_) if one not in (NoneType, Ellipsis)] or [type_]
        kind = os.path.expanduser if self.metavar in ("DIR", "FILE") else inner[0]  # --out=~/x
        return {
            "type": number if kind is float else kind,
            "nargs": ("+", 2)[len(inner) - 1] if get_origin(type_) is tuple else None,
            "choices": self.choices,
            "metavar": self.metavar or (None if self.choices else "N" if kind is int else "X"),
            "help": text,
        }


def option(*positional: Any, **more: Any) -> Any:
    """The field of an `Option`; it has no default of its own, as that depends on the run."""
    return field(metadata={"option": Option(*positional, **more)})


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of a run, lists as tuples; InputError if out of range; defaults: `complete`."""

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

    # On CIFAR-10 φ takes some 100 unrolls of clean episodes until it begins to learn. Under FGSM
    # 50 episodes are too few (docs/answers), under PGD one of 100-step episodes collapses. With
    # its lengths the robust φ holds to 3,000 steps; that of the penalty holds anyway, and with
    # long ones is slower (docs/trials).
    episodes: int = option(META, "each trains a fresh optimizee", 140,
        {"cifar10": 50, "cifar10 fgsm paper": 100, "robust": 90, "penalty": 60,
         "cifar10 robust": 30, "quadratic": 100, "mnist quick": 15, "cifar10 quick": 1,
         "quadratic quick": 10}, of="φ")
    episode_steps: tuple[int, ...] = option(META, "updates of an episode, or smallest and largest",
        (100,), {"cifar10": (100, 300), "robust": (100, 1000), "penalty": (100, 300),
         "quadratic": (100,), "mnist quick": (60,), "cifar10 quick": (10,),
         "quadratic quick": (40,)}, of="φ")
    average: float = option(META, "decay d of the average θ̄ at which the meta-loss is taken", 0.0,
        {"robust": 0.95, "quadratic": 0.0}, of="φ")
    # A meta-gradient is of one coordinate in so many (docs/trials).
    stride: int = option(default=1, exceptions={"mnist paper": 4, "robust": 4, "quadratic": 1},
        of="φ")
    unroll: int = option(META, "updates an unroll", 20, {"quick": 10, "cifar10 quick": 5}, of="φ")
    meta_lr: float = option(META, "learning rate of Adam on φ", 3e-3,
        {"cifar10": 1e-3, "robust": 3e-3, "quadratic": 1e-2}, of="φ")
    # The paper mixes clean and FGSM losses (4.1) and takes the PGD loss alone (4.2); under that φ
    # collapses, so some of the clean one stays.
    alpha: float = option(META, "α of Eq. 6, the share of the clean loss", 0.5,
        {"pgd": 0.2, "none": 1.0, "robust": 0.0, "robust none": 1.0}, of="φ")
    input_alpha: float = option(  # that of the loss whose gradient is the input of φ
        default=0.5, exceptions={"pgd": 0.2, "none": 1.0, "robust": 1.0}, of="φ")
    penalty: float = option(META, "λ/eps of the loss whose gradient φ takes as input", 0.0,
        {"penalty": 1.5, "cifar10 penalty": 1.0, "quadratic": 0.0}, of="φ")
    # Literally, φ drifts to a constant predictor unless α and ε come in slowly.
    curriculum: tuple[float, float] = option(META, "fractions of the episodes at which attacks "
        "begin and are at full strength", (0.0, 0.5),
        {"cifar10": (0.5, 0.75), "robust": (0.0, 0.0), "quadratic": (0.0, 0.0)}, of="φ")
    # On MNIST five φ with the paper's 10 disagree, whatever their episodes (docs/answers).
    p: float = option(META, "log range of Eq. 5", 10.0, {"mnist paper": 5.0}, of="φ")
    # θ ← θ + u - η·d with Adam's direction d.
    nominal: bool = option(default=False, exceptions={"robust": True, "quadratic": False}, of="φ")
    # θ of a quadratic travels much farther than a network's.
    output_scale: float = option(default=0.01, exceptions={"robust": 0.1, "quadratic": 0.1}, of="φ")
    theta_input: bool = option(default=False, exceptions={"robust": True}, of="φ")
    odd: bool = option(default=False, exceptions={"robust": True}, of="φ")
    meta_seeds: int = option(META, "φ meta-trained", 1)
    # A miniature of CIFAR-10's meta-training learns nothing.
    load: str | None = option(META, "use the φ of this meta_optimizer.pt, or of the package by its "
        "name (l2l_ref.list_pretrained())",
        exceptions={"cifar10 quick paper fgsm": "cifar10-fgsm-2-255",
         "cifar10 quick paper pgd": "cifar10-pgd-0.03"}, metavar="FILE")

    steps: int = option(TRANSFER, "updates of an optimizee", 100,
        {"cifar10": 1000, "quick": 40})
    images: int | None = option(TRANSFER, "training images of an optimizee (all of its half)")
    batch_size: int = option(TRANSFER, "samples", 128, {"cifar10 quick": 64})
    seeds: int = option(TRANSFER, "transfer runs of each method", 5,
        {"cifar10": 3, "quick": 2, "cifar10 quick": 1})
    folds: int = option(TRANSFER, "2: the halves change places too", 1, choices=(1, 2))
    attacked_alpha: float = option(  # that of Adam on attacked batches
        default=0.5, exceptions={"pgd": 0.2, "none": 1.0})
    compare: tuple[str, ...] = option(TRANSFER, "more baselines: MODULE:FUNCTION, model[, lr] -> "
        "optimizer", (), metavar="NAME")
    tune_seeds: int = option(default=2, exceptions={"cifar10": 1, "quick": 1})
    tune_every: int = option(default=1, exceptions={"quick": 2, "cifar10 quick": 3})  # of a grid
    eval_samples: int = option(TRANSFER, "test images for the accuracies", 2000,
        {"quick": 500, "cifar10 quick": 100})
    curve_samples: int = option(default=1000, exceptions={"cifar10": 256, "quadratic": 1,
        "quick": 100})  # for the losses
    # Updates between points of a curve; None is a fiftieth of them.
    record_every: int | None = option(exceptions={"cifar10 quick": 4})
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
    jobs: int | None = option(RUN, "processes, a core or a GPU each (all that help)", of="place")
    graphs: bool = option(RUN, "on a GPU, an update is a CUDA graph", True, of="place")
    data_dir: str = option(RUN, "where data is or is downloaded to", "data", metavar="DIR",
        of="place")
    strict_data: bool = option(RUN, "no stand-in for missing data", False, of="place")
    out: str | None = option(RUN, "results (runs/<dataset>-<attack>-<recipe>)", metavar="DIR",
        of="place")
    resume: bool = option(RUN, "continue or join the run in --out, or begin it", False, of="place")
    # fmt: on

    def __post_init__(self):
        lengths, radii, n, own = self.episode_steps, self.eps, self.batch_size, vars(self)
        own |= {name: tuple(one) for name, one in own.items() if isinstance(one, list)}
        rules = {name: (one != "", "given a name, or left out") for name, one in own.items()}
        counts = [one.name for one in fields(self) if one.type in (int, int | None)]
        rules |= {name: (own[name] is None or own[name] >= 1, "at least 1") for name in counts}
        ascending = len(lengths) in (1, 2) and 1 <= lengths[0] <= lengths[-1]
        distinct = all(0 <= eps <= 1 for eps in radii) and len(set(radii)) == len(radii)
        rules |= {
            "images": (self.images is None or self.images >= n, f"at least --batch-size, {n}"),
            "episode_steps": (ascending, "a length, or smallest and largest"),
            "p": (0 < self.p <= MAX_P, f"above 0 and at most {MAX_P}"),
            "eps": (distinct, "between 0 and 1 (pixel values are in [0, 1]) and free of repeats"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            "penalty": (not (self.penalty and self.input_alpha == 0), "left out with --alpha 0"),
        }
        for name, known in (("attack", ATTACKS), ("eval_attack", ("pgd",))):
            right = own[name] in known or ":" in own[name]
            rules[name] = right, f"{', '.join(known)}, or MODULE:FUNCTION"
        if self.dataset == "quadratic":
            rules |= {
                "attack": (self.attack == "none", "none: quadratics have no pixels to attack"),
                "images": (self.images is None, "left out: quadratics have none"),
                "compare": (not self.compare, "left out with --dataset quadratic"),
            }
        for name, (right, allowed) in rules.items():
            if not right:
                value = show(own[name]) or "empty"
                raise InputError(f"{flag(name)} is {value}: it must be {allowed}")
        try:
            self.meta_settings()
        except InputError as error:  # its first word is the name of a field
            raise InputError(flag(str(error))) from None

    def meta_settings(self, eps: float = 1.0, *, clean: bool = False) -> MetaSettings:
        """How a φ is meta-trained; `clean`: on clean batches alone, and for them."""
        own = {one.name: getattr(self, one.name) for one in fields(MetaSettings)}
        own |= {"steps": self.episode_steps[-1], "penalty": self.penalty * eps}
        if clean:
            own |= {"input_alpha": 1.0, "alpha": 1.0, "penalty": 0.0}
        return MetaSettings(**own)


OPTIONS: dict[str, Option] = {one.name: one.metadata["option"] for one in fields(Config)}


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
    return Config(**settings | given)
