"""Optimizees that φ has not been trained on: a wider MLP, a deeper one, one with tanh.

python -m bench.unseen runs/mnist-fgsm-robust/meta_optimizer.pt --steps 1000

All other options are those of run.py, but for --resume. Of each network: φ on clean batches
(L2L-Transfer) beside Adam + L1 tuned on that very network.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from l2l_ref.errors import InputError
from l2l_ref.experiment import cli, folder, machine, report
from l2l_ref.experiment.phis import load_phis
from l2l_ref.experiment.progress import Display
from l2l_ref.experiment.protocol import Experiment, Results
from l2l_ref.experiment.queue import compute_all
from l2l_ref.experiment.setting import Setting, prepare
from l2l_ref.experiment.summary import summarise

METHODS = ("Adam + L1", "L2L-Transfer (clean)")


def perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """784-…-10 with hidden layers of `widths`."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((28 * 28, *widths), widths, strict=False):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


NETWORKS = {
    "784-20-10, ReLU (as meta-trained)": lambda: perceptron(20),
    "784-40-10, ReLU": lambda: perceptron(40),
    "784-20-20-10, ReLU": lambda: perceptron(20, 20),
    "784-20-10, tanh": lambda: perceptron(20, activation=nn.Tanh),
}


def compare(setting: Setting, out: Path, phis: dict[str, nn.ModuleDict]) -> Results:
    """Only the runs of `METHODS`, and the candidates that they need."""
    display = Display()
    experiment = Experiment(setting, out, display.progress(), phis)
    runs = [(key, piece) for key, piece in experiment.runs() if key["method"] in METHODS]
    needed = {name for _, piece in runs for name in piece.needs}
    pieces = [piece for piece in experiment.pieces() if piece.name in needed]
    pieces += [piece for _, piece in runs]
    with display.of(pieces, experiment.parts):
        compute_all(pieces, experiment.parts, display.progress())
    return Results([{**key, **experiment.parts[p.name]} for key, p in runs], {}, [], {})


def main(arguments: list[str]) -> None:
    """Train and judge each network, print its table."""
    if "--help" in arguments:
        print(__doc__)
        return
    if not arguments or arguments[0].startswith("-"):
        raise InputError(
            "name the meta_optimizer.pt of a run first (python -m bench.unseen FILE ...)"
        )
    config = cli.parse(["--out", "runs/unseen", *arguments[1:], "--load", arguments[0]])
    if config.dataset != "mnist":
        raise InputError(f"--dataset is {config.dataset}: the networks here are for mnist")
    if config.resume:
        raise InputError("--resume is of run.py: name another --out")
    if machine.torchrun():
        raise InputError("bench.unseen is one process: start it without torchrun")
    machine.keep_freed_memory()
    folder.choose(config)  # results of another φ are never found there
    setting, phis = load_phis(Path(config.load), prepare(config))
    for name, build in NETWORKS.items():
        own = replace(setting, problem=replace(setting.problem, build=build))
        part = Path(config.out) / name.replace(", ", "-").replace(" ", "-")
        results = compare(own, part, phis)
        footer = f"{name}; Adam + L1 tuned on it; {config.steps} steps"
        print("\n" + report.table(summarise(results), config, report.title(own), footer))


if __name__ == "__main__":
    cli.run_as_script("unseen.py", main)
