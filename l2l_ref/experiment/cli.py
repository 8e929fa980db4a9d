"""The command line: its options, the Config they make, a run's folder, how a program ends."""

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction

from l2l_ref.backend import BACKENDS
from l2l_ref.errors import InputError
from l2l_ref.experiment.config import (
    ATTACKS,
    DATASETS,
    GRID_NAMES,
    JUDGES,
    RECIPES,
    Config,
    complete,
    grid_points,
    require,
    with_grid,
)

# What a loaded φ has settled already.
SETTLED_BY_LOAD = {"recipe", "alpha", "p", "episodes", "tasks", "unroll", "meta_lr",
                   "curriculum", "episode_steps", "nominal", "penalty", "grid"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, so that there is one way to fail."""

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


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


def parser() -> Parser:
    """The command line. The defaults are the tables of `config`; the help says them in words."""
    top = Parser(
        prog="run.py",
        usage="run.py [options]",
        description="Meta-train an LSTM optimizer under attack, transfer it to new models that\n"
        "see clean data only, and judge those under attack.",
        epilog="Figure 1 of the paper:\n"
        "  run.py --dataset mnist --attack fgsm --eps 0.05 0.1 0.2 0.3",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )

    def count(group, flag: str, text: str) -> None:
        group.add_argument(flag, type=int, metavar="N", help=text)

    def real(group, flag: str, text: str) -> None:
        group.add_argument(flag, type=number, metavar="X", help=text)

    what = top.add_argument_group("experiment")
    what.add_argument("--dataset", choices=DATASETS, help="default mnist")
    what.add_argument("--attack", choices=ATTACKS, help="default fgsm (quadratic: none)")
    what.add_argument(
        "--eps",
        type=number,
        nargs="+",
        metavar="X",
        help="l-inf radius in pixel values [0, 1], also 8/255;\n"
        "several: one panel each (0.1; CIFAR-10: 0.03)",
    )
    what.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="paper: as printed, after a curriculum (default);\n"
        "robust: φ reads clean gradients, is judged under\n"
        "attack, is odd, sees θ, has a nominal term;\n"
        "penalty: the same, reading l + eps·|dl/dx|",
    )
    what.add_argument(
        "--optimizee",
        choices=("mlp", "convnet", "logistic"),
        help="default mlp (CIFAR-10: convnet)",
    )
    count(what, "--attack-steps", "PGD steps (7)")
    real(what, "--attack-step-size", "pixel values (2.5·eps/steps)")

    meta = top.add_argument_group("meta-training")
    count(
        meta,
        "--episodes",
        "each trains fresh optimizees (70; robust: 30;\nCIFAR-10: 40, quadratic: 100)",
    )
    meta.add_argument(
        "--episode-steps",
        type=int,
        nargs="+",
        metavar="N",
        help="updates of an episode, or smallest and largest\n"
        "(100; CIFAR-10: 100 300; robust: 100 1000)",
    )
    count(meta, "--tasks", "optimizees an episode trains at once (1)")
    count(meta, "--unroll", "updates an unroll (20)")
    real(meta, "--meta-lr", "Adam's on φ (3e-3; CIFAR-10: 1e-3; quadratic: 1e-2)")
    real(meta, "--alpha", "clean share of Eq. 6 (FGSM 0.5, PGD 0.2; robust: 0)")
    real(meta, "--p", "log range of Eq. 5 (10)")
    real(meta, "--penalty", "λ/eps of the loss that φ reads (0; penalty: 1)")
    meta.add_argument(
        "--curriculum",
        type=number,
        nargs=2,
        metavar="X",
        help="shares of the episodes: clean up to one, as set\n"
        "from the other on (0 1/2; CIFAR: 1/2 3/4; robust: 0 0)",
    )
    meta.add_argument(
        "--nominal",
        action=argparse.BooleanOptionalAction,
        help="θ ← θ + u - η·d, Adam's direction d (robust)",
    )
    count(meta, "--meta-seeds", "φ meta-trained (1)")
    meta.add_argument(
        "--grid",
        type=grid_axis,
        nargs="+",
        metavar="NAME=X,X",
        help="search on the meta-training half, for example\n"
        f"p=5,10 meta-lr=1e-4,1e-3 ({', '.join(GRID_NAMES)})",
    )
    meta.add_argument("--load", metavar="FILE", help="use the φ of this meta_optimizer.pt instead")

    transfer = top.add_argument_group("transfer and evaluation")
    count(transfer, "--steps", "updates of an optimizee (100; CIFAR-10: 1000)")
    count(transfer, "--images", "that an optimizee trains on (all of its half)")
    count(transfer, "--batch-size", "samples (128)")
    count(transfer, "--seeds", "transfer runs of each method (5; CIFAR-10: 3)")
    count(transfer, "--folds", "2: the halves change places too (1)")
    real(transfer, "--transfer-alpha", "clean share in L2L-Transfer (mixed) (0.5)")
    count(transfer, "--eval-samples", "test images for the accuracies (2000)")
    count(transfer, "--record-every", "updates between points of a curve (steps/100)")
    count(transfer, "--restarts", "of PGD-20 (2)")
    transfer.add_argument(
        "--judge",
        choices=JUDGES,
        help="test (default), or validation: the meta half only",
    )

    run = top.add_argument_group("the run")
    run.add_argument("--quick", action="store_true", help="a miniature of all of it")
    count(run, "--seed", "base of all randomness (0)")
    run.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (cuda where there is one)")
    run.add_argument("--backend", choices=BACKENDS, help="who runs the LSTM (auto)")
    run.add_argument(
        "--no-graphs",
        dest="graphs",
        action="store_false",
        help="on a GPU, launch every kernel on its own,\nnot an update as a CUDA graph",
    )
    run.add_argument("--data-dir", metavar="DIR", help="where data is or is downloaded to (data)")
    run.add_argument("--strict-data", action="store_true", help="no stand-in for missing data")
    run.add_argument("--out", metavar="DIR", help="results (runs/<dataset>-<attack>-<recipe>)")
    run.add_argument("--resume", action="store_true", help="continue what is in --out")
    return top


def parse(arguments: list[str]) -> Config:
    """The Config of a command line.

    Raises:
        InputError: anything the user can mend.
    """
    given = vars(parser().parse_args(arguments))
    clash = sorted(given.keys() & SETTLED_BY_LOAD) if "load" in given else []
    if clash:
        names = ", ".join("--" + name.replace("_", "-") for name in clash)
        raise InputError(f"--load takes φ as it was meta-trained: leave out {names}")
    for name in ("eps", "episode_steps", "curriculum"):
        if name in given:
            given[name] = tuple(given[name])
    if "grid" in given:
        axes = [(name.replace("-", "_"), values) for name, values in given["grid"]]
        given["grid"] = dict(axes)
        require("grid", len(given["grid"]) == len(axes), axes, "given once for each name")
    config = complete(given)
    for chosen in grid_points(config):
        with_grid(config, chosen)  # raises where a candidate is out of range
    return config


def run_as_script(
    name: str, main: Callable[[list[str]], None], interrupted: str = "stopped"
) -> None:
    """Run `main` on the command line; an InputError is one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # φ and ε on a terminal that has no Greek
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"\n{interrupted}")
