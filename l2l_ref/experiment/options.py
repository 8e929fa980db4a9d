"""The options of a run: a table, of which command line, help and defaults are made."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from l2l_ref.backend import BACKENDS

DATASETS = ("mnist", "cifar10", "quadratic")
ATTACKS = ("fgsm", "pgd", "none")
RECIPES = ("paper", "robust", "penalty")
JUDGES = ("test", "validation")
GRID_NAMES = ("p", "meta-lr", "unroll", "output-scale", "alpha")
WHAT, META, TRANSFER, RUN = "experiment", "meta-training", "transfer and evaluation", "the run"
TITLES = {"cifar10": "CIFAR-10", "fgsm": "FGSM", "pgd": "PGD"}


def number(text: str) -> float:
    """A float, or a fraction such as 8/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number or a fraction") from None


def grid_axis(text: str) -> tuple[str, tuple[float, ...]]:
    """`name=value,value` -> (name, values)."""
    name, _, values = text.partition("=")
    if name not in GRID_NAMES or not values:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not name=value,value with a name among {', '.join(GRID_NAMES)}"
        )
    return name, tuple(number(value) for value in values.split(","))


@dataclass(frozen=True)
class Row:
    """An option.

    Attributes:
        name: of the field of `Config`.
        group: of the help; None for a setting without a flag.
        help: one sentence; what the defaults are comes after it by itself.
        default: where no exception holds.
        exceptions: {words: the value there}, of which the last that holds wins. Words are a data
            set, an attack, a recipe or "quick"; all must be those of the run. The recipe "penalty"
            is "robust" too.
        kind: int, number, str, bool, or what reads an argument.
        count: arguments, as argparse has them.
        of: "φ" for what a loaded φ brings along, "place" for what may change when a run is
            continued.
        said: of the default, in words; "" for a flag that has no opposite.
    """

    name: str
    group: str | None
    help: str
    default: Any = None
    exceptions: dict[str, Any] = field(default_factory=dict)
    kind: Callable[[str], Any] = int
    count: int | str | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    of: str = ""
    said: str | None = None

    def value(self, words: set[str]) -> Any:
        """The default of a run that these words describe."""
        value = self.default
        for needed, other in self.exceptions.items():
            if words.issuperset(needed.split()):
                value = other
        return value

    def sentence(self) -> str:
        """The help, with the defaults behind it."""
        if self.said is not None or self.default is None:
            return self.help + (f" ({self.said})" if self.said else "")
        exceptions = [(words, other) for words, other in self.exceptions.items()
                      if "quick" not in words]  # fmt: skip
        shown = [show(self.default)]
        shown += [f"{TITLES.get(words, words)}: {show(other)}" for words, other in exceptions]
        return f"{self.help} ({'; '.join(shown)})"


def show(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# fmt: off
OPTIONS = (
    Row("dataset", WHAT, "of images, or Andrychowicz et al.'s quadratics", "mnist", kind=str,
        choices=DATASETS),
    Row("attack", WHAT, "that meta-trains and judges", "fgsm", {"quadratic": "none"}, str,
        choices=ATTACKS),
    Row("eps", WHAT, "l∞ radius in pixel values [0, 1], also 8/255; several: one panel each",
        (0.1,), {"cifar10": (0.03,), "quadratic": (0.0,)}, number, "+"),
    Row("recipe", WHAT, "paper: as printed, after a curriculum; robust: φ reads clean gradients, "
        "is judged under attack, is odd, sees θ, has a nominal term; penalty: the same, reading "
        "l + eps·|dl/dx|", "paper", kind=str, choices=RECIPES, of="φ"),
    Row("optimizee", WHAT, "the network that is trained", "mlp",
        {"cifar10": "convnet", "quadratic": "quadratic"}, str,
        choices=("mlp", "convnet", "logistic")),
    Row("attack_steps", WHAT, "PGD steps", 7),
    Row("attack_step_size", WHAT, "pixel values", None, kind=number, said="2.5·eps/steps"),

    # On CIFAR-10 φ takes some 100 unrolls of clean episodes until it begins to learn, and under PGD
    # one of 100-step episodes collapses. With its lengths the robust φ holds to 3,000 steps
    # (docs/trials).
    Row("episodes", META, "each trains fresh optimizees", 70,
        {"cifar10": 50, "robust": 30, "quadratic": 100,
         "mnist quick": 15, "cifar10 quick": 1, "quadratic quick": 10}, of="φ"),
    Row("episode_steps", META, "updates of an episode, or smallest and largest", (100,),
        {"cifar10": (100, 300), "robust": (100, 1000), "quadratic": (100,),
         "mnist quick": (60,), "cifar10 quick": (10,), "quadratic quick": (40,)},
        count="+", of="φ"),
    Row("tasks", META, "optimizees an episode trains at once", 1, of="φ"),
    Row("unroll", META, "updates an unroll", 20, {"quick": 10, "cifar10 quick": 5}, of="φ"),
    Row("meta_lr", META, "Adam's on φ", 3e-3, {"cifar10": 1e-3, "robust": 3e-3, "quadratic": 1e-2},
        number, of="φ"),
    Row("meta_schedule", None, "", "cosine", of="φ"),
    Row("clip", None, "", 1.0, of="φ"),
    # The paper mixes clean and FGSM losses (4.1) and takes the PGD loss alone (4.2); under that φ
    # collapses, so some of the clean one stays.
    Row("alpha", META, "clean share of Eq. 6", 0.5, {"pgd": 0.2, "none": 1.0, "robust": 0.0,
        "robust none": 1.0}, number, of="φ"),
    Row("read_alpha", None, "", 0.5, {"pgd": 0.2, "none": 1.0, "robust": 1.0}, of="φ"),
    Row("penalty", META, "λ/eps of the loss that φ reads", 0.0, {"penalty": 1.0, "quadratic": 0.0},
        number, of="φ"),
    # Literally, φ drifts to a constant predictor unless α and ε come in slowly.
    Row("curriculum", META, "shares of the episodes: clean up to one, as set from the other on",
        (0.0, 0.5), {"cifar10": (0.5, 0.75), "robust": (0.0, 0.0), "quadratic": (0.0, 0.0)},
        number, 2, of="φ"),
    Row("p", META, "log range of Eq. 5", 10.0, kind=number, of="φ"),
    Row("nominal", META, "θ ← θ + u - η·d, Adam's direction d", False,
        {"robust": True, "quadratic": False}, bool, of="φ", said="robust"),
    # θ of a quadratic travels much farther than a network's.
    Row("output_scale", None, "", 0.01, {"robust": 0.1, "quadratic": 0.1}, of="φ"),
    Row("theta_input", None, "", False, {"robust": True}, of="φ"),
    Row("odd", None, "", False, {"robust": True}, of="φ"),
    Row("hidden_size", None, "", 20, of="φ"),
    Row("num_layers", None, "", 2, of="φ"),
    Row("meta_seeds", META, "φ meta-trained", 1),
    Row("grid", META, "search on the meta-training half, such as p=5,10 meta-lr=1e-4,1e-3", {},
        kind=grid_axis, count="+", metavar="NAME=X,X", said=", ".join(GRID_NAMES)),
    Row("load", META, "use the φ of this meta_optimizer.pt instead", kind=str, metavar="FILE"),

    Row("steps", TRANSFER, "updates of an optimizee", 100, {"cifar10": 1000,
        "mnist quick": 40, "cifar10 quick": 10, "quadratic quick": 40}),
    Row("images", TRANSFER, "that an optimizee trains on", said="all of its half"),
    Row("batch_size", TRANSFER, "samples", 128, {"cifar10 quick": 32}),
    Row("seeds", TRANSFER, "transfer runs of each method", 5,
        {"cifar10": 3, "quick": 2, "cifar10 quick": 1}),
    Row("folds", TRANSFER, "2: the halves change places too", 1),
    Row("transfer_alpha", TRANSFER, "clean share in L2L-Transfer (mixed)", 0.5, kind=number),
    Row("attacked_alpha", None, "", 0.5, {"pgd": 0.2, "none": 1.0}),
    Row("tune_seeds", None, "", 2, {"cifar10": 1, "quick": 1}),
    Row("tune_every", None, "", 1, {"quick": 2}),
    Row("eval_samples", TRANSFER, "test images for the accuracies", 2000,
        {"quick": 500, "cifar10 quick": 100}),
    Row("curve_samples", None, "", 1000, {"cifar10": 256, "quadratic": 1,
        "quick": 100, "cifar10 quick": 32}),
    Row("record_every", TRANSFER, "updates between points of a curve", said="steps/100"),
    Row("judge_steps", TRANSFER, "of the PGD that judges", 20),
    Row("restarts", TRANSFER, "of that, on each of its two losses", 2, {"quick": 1}),
    Row("judge", TRANSFER, "test, or validation: the meta half only", "test", kind=str,
        choices=JUDGES),

    Row("quick", RUN, "a miniature of all of it", False, kind=bool, said=""),
    Row("seed", RUN, "base of all randomness", 0),
    Row("device", RUN, "cpu, cuda, cuda:1, …", "auto", kind=str, metavar="D", of="place"),
    Row("backend", RUN, "who runs the LSTM", "auto", kind=str, choices=BACKENDS, of="place"),
    Row("graphs", RUN, "on a GPU, an update is a CUDA graph", True, kind=bool, of="place"),
    Row("data_dir", RUN, "where data is or is downloaded to", "data", kind=str, metavar="DIR",
        of="place"),
    Row("strict_data", RUN, "no stand-in for missing data", False, kind=bool, of="place", said=""),
    Row("out", RUN, "results", kind=str, metavar="DIR", of="place",
        said="runs/<dataset>-<attack>-<recipe>"),
    Row("resume", RUN, "continue what is in --out", False, kind=bool, of="place", said=""),
)
# fmt: on


def names_of(of: str) -> set[str]:
    """The options that a loaded φ brings along ("φ"), or that may change ("place")."""
    return {row.name for row in OPTIONS if row.of == of}


def defaults(dataset: str, attack: str | None, recipe: str, quick: bool) -> dict[str, Any]:
    """Every option's default; `attack` None is that of the data set."""
    words = {dataset, recipe}
    if recipe == "penalty":
        words.add("robust")
    if quick:
        words.add("quick")
    rows = {row.name: row for row in OPTIONS}
    words.add(attack or rows["attack"].value(words))
    return {name: row.value(words) for name, row in rows.items()}
