#!/usr/bin/env python
"""What a step of clean transfer costs, beside a step of adversarial training with Adam.

python -m bench.transfer_step

Clocks calls of `transfer.train` without recordings, batches and attack included, for the MNIST MLP
(the paper's form of φ, and the robust one: odd, sees θ) and the CIFAR-10 convnet. The opponents
train the same model with Adam, on clean batches and on batches under PGD-7. An untrained φ does the
work of a trained one. Writes transfer_step.json into --out.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.output import command, count, machine, write_json
from bench.timing import interleave, summary
from l2l_ref import attacks, data, problems
from l2l_ref.backend import BACKENDS, resolve
from l2l_ref.data import stand_in
from l2l_ref.errors import InputError
from l2l_ref.experiment import folder
from l2l_ref.experiment.cli import Parser, run_as_script
from l2l_ref.experiment.config import RECIPES, complete
from l2l_ref.experiment.machine import keep_freed_memory
from l2l_ref.experiment.tuning import adam
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method, train

EPS = {"mnist": 0.1, "cifar10": 0.03}
STAND_INS = {"mnist": stand_in.digits, "cifar10": stand_in.coloured_digits}
FORM = ("output_scale", "theta_input", "odd", "nominal")  # of φ, in a recipe
OPPONENT = "Adam (PGD-7)"  # the ratios are over its time


def parse(arguments: list[str]) -> Any:
    """The options; raises InputError for any that are wrong."""
    top = Parser(prog="transfer_step.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    top.add_argument("--dataset", choices=tuple(EPS), nargs="+", default=list(EPS))
    top.add_argument("--threads", type=count, default=1, metavar="K", help="threads (1)")
    top.add_argument("--backend", choices=BACKENDS, default="auto", help="φ's (auto)")
    top.add_argument("--steps", type=count, metavar="N", help="a call of `train` (100)")
    top.add_argument("--batch-size", type=count, default=128, metavar="N", help="samples (128)")
    top.add_argument("--seconds", type=float, metavar="S", help="clocked for each model (20)")
    top.add_argument("--quick", action="store_true", help="few steps, few rounds")
    top.add_argument("--data-dir", metavar="DIR", help="real images; without it, the stand-in")
    top.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    options = top.parse_args(arguments)
    options.steps = options.steps or (3 if options.quick else 100)
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else 20.0
    if not 0 <= options.seconds < float("inf"):
        raise InputError(f"--seconds is {options.seconds}: it must be at least 0 and finite")
    resolve(options.backend)
    return options


def images(dataset: str, options: Any) -> tuple[data.ImageSet, str]:
    """Training images and where they are from."""
    if options.data_dir:
        found = data.load(dataset, options.data_dir, strict=True, download=False)
        return found.train, found.source
    x, y, *_ = STAND_INS[dataset](20 * options.batch_size, options.batch_size)
    return data.ImageSet(x, y), "stand-in"


def methods(problem: problems.Problem, backend: str, eps: float) -> dict[str, Method]:
    """Label -> method: φ in the form of each recipe, and Adam with and without an attack."""
    result = {}
    for recipe in RECIPES:
        settings = complete({"recipe": recipe})
        form = {name: getattr(settings, name) for name in FORM}
        phi = new_phi(problem.build(), generator=torch.Generator().manual_seed(0), **form)
        label = f"L2L-Transfer ({recipe})"
        penalty = settings.penalty * eps
        result[label] = Method(
            label, partial(LearnedOptimizer.for_model, phi=phi, backend=backend), penalty=penalty
        )
    result["Adam (clean)"] = Method("Adam (clean)", partial(adam, 1e-3))
    result[OPPONENT] = Method(OPPONENT, partial(adam, 1e-3), alpha=0.0)
    return result


def runner(
    problem: problems.Problem, method: Method, batches: Any, eps: float, steps: int
) -> Callable[[], Any]:
    """A call of `transfer.train` of `steps` steps, always from the same θ₀.

    A model that went on from call to call would fit its few images, and gradients that underflow
    would slow it down. Giving θ₀ back is clocked too, and takes microseconds.
    """
    model = problem.draw(torch.Generator().manual_seed(0))
    attack = attacks.make("pgd", eps=eps, steps=7, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(()), torch.zeros(())
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def run() -> None:
        model.load_state_dict(start)
        train(model, method, batches, loss=problem.loss, attack=attack, steps=steps,
              record=lambda model: nothing, every=steps)  # fmt: skip

    return run


def measure(dataset: str, options: Any) -> dict[str, Any]:
    """One model: milliseconds a step of every method, and OPPONENT's time over each."""
    problem = problems.make(dataset)
    train_set, source = images(dataset, options)
    runs = {}
    for name, method in methods(problem, options.backend, EPS[dataset]).items():
        generator = torch.Generator().manual_seed(0)
        batches = data.batches(train_set, options.batch_size, generator)
        runs[name] = runner(problem, method, batches, EPS[dataset], options.steps)
        runs[name]()
    samples = interleave(runs, options.seconds)
    times = {name: summary(values, 1e3 / options.steps) for name, values in samples.items()}
    opponent = times[OPPONENT]["median"]
    return {
        "dataset": dataset,
        "data": source,
        "optimizee": problem.name,
        "parameters": sum(p.numel() for p in problem.build().parameters()),
        "methods": times,
        "ratios": {name: opponent / row["median"] for name, row in times.items()},
    }


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    options = parse(arguments)
    folder.make(options.out)
    keep_freed_memory()  # as run.py does
    torch.set_num_threads(options.threads)
    about = machine(options.backend)
    print(f"{about['cpu']}, torch {about['torch']}, {about['backend']} backend, threads: "
          f"{options.threads}, batches of {options.batch_size}\n")  # fmt: skip
    print(f"{'model':<20}{'method':<24}{f'{OPPONENT} / it':>18}   ms per step [quartiles]")
    rows = []
    for dataset in options.dataset:
        row = measure(dataset, options)
        rows.append(row)
        model = f"{dataset} {row['optimizee']}"
        for name, found in row["methods"].items():
            low, high = found["quartiles"]
            times = f"{found['median']:.3g} [{low:.3g}, {high:.3g}]"
            print(f"{model:<20}{name:<24}{row['ratios'][name]:>17.2f}×   {times}", flush=True)
    settings = {name: getattr(options, name) for name in ("threads", "steps", "batch_size")}
    about["command"] = command("transfer_step.py", arguments)
    write_json(options.out / "transfer_step.json", {**about, **settings, "eps": EPS, "rows": rows})
    print(f"\n{options.out}: transfer_step.json")


if __name__ == "__main__":
    run_as_script("transfer_step.py", main)
