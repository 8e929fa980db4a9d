"""What a step of clean transfer costs, beside a step of adversarial training with Adam.

python -m bench.transfer_step

Clocks calls of `transfer.train` without recordings, batches of noise and attack included,
for the MNIST MLP and the CIFAR-10 convnet, with φ in the form of each recipe (the robust one is
odd and sees θ). The baselines train the same model with Adam, on clean batches and on batches under
PGD-7. An untrained φ does the work of a trained one. Writes transfer_step.json into --out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import limits, measure
from l2l_ref import attacks, data, problems
from l2l_ref.data import sources
from l2l_ref.experiment.cli import run_as_script
from l2l_ref.experiment.config import RECIPES, complete
from l2l_ref.experiment.machine import keep_freed_memory
from l2l_ref.experiment.tuning import adam
from l2l_ref.files import write_json
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method, train

EPS = {"mnist": 0.1, "cifar10": 0.03}
BASELINE = "Adam (PGD-7)"  # the ratios are over its time
BATCH = 128  # samples
FORM = ("output_scale", "theta_input", "odd", "nominal")  # what recipes set of `MetaOptimizer`


def learned(problem: problems.Problem, recipe: str, backend: str, eps: float) -> Method:
    """Clean transfer of φ in the form of a recipe."""
    config = complete({"recipe": recipe})
    form = {name: getattr(config, name) for name in FORM}
    phi = new_phi(problem.build(), generator=torch.Generator().manual_seed(0), **form)
    optimizer = partial(LearnedOptimizer.for_model, phi=phi, backend=backend)
    return Method(f"L2L-Transfer ({recipe})", optimizer, penalty=config.penalty * eps)


def runner(
    problem: problems.Problem, method: Method, images: data.ImageSet, eps: float, steps: int
) -> Callable[[], None]:
    """A call of `transfer.train`, always from the same θ₀.

    A model that went on from call to call would fit its few images, and gradients that underflow
    would slow it down. Giving θ₀ back is clocked too, and takes microseconds.
    """
    model = problem.draw(torch.Generator().manual_seed(0))
    batches = images.batches(BATCH, torch.Generator().manual_seed(0))
    attack = attacks.make("pgd", eps=eps, steps=7, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(()), torch.zeros(())
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def run() -> None:
        model.load_state_dict(start)
        train(model, method, batches, loss=problem.loss, attack=attack, steps=steps,
              record=lambda model: nothing, every=steps)  # fmt: skip

    return run


def measured(dataset: str, options: Any) -> dict[str, Any]:
    """One model: milliseconds a step of every method, and BASELINE's time over each."""
    problem, eps, samples = problems.make(dataset), EPS[dataset], 20 * BATCH
    pixels = torch.randint(256, (samples, *sources.KINDS[dataset].shape), dtype=torch.uint8)
    images = data.ImageSet(pixels, torch.arange(samples) % problem.classes)
    methods = [learned(problem, recipe, options.backend, eps) for recipe in RECIPES]
    methods.append(Method("Adam (clean)", partial(adam, lr=1e-3)))
    methods.append(Method(BASELINE, partial(adam, lr=1e-3), alpha=0.0))
    runs = {m.label: runner(problem, m, images, eps, options.steps) for m in methods}
    for run in runs.values():
        run()
    clocked = measure.interleave(runs, options.seconds)
    times = {name: measure.summary(s, 1e3 / options.steps) for name, s in clocked.items()}
    baseline = times[BASELINE]["median"]
    return {
        "dataset": dataset,
        "optimizee": problem.name,
        "eps": eps,
        "methods": times,
        "ratios": {name: baseline / row["median"] for name, row in times.items()},
    }


def main(arguments: list[str]) -> None:
    """Parse, measure, print, write."""
    top = measure.parser("transfer_step", __doc__, seconds=20.0)
    top.add_argument("--threads", type=measure.count, default=1, metavar="K", help="(1)")
    top.add_argument("--steps", type=measure.count, default=100, metavar="N",
                     help="a call of `train` (100)")  # fmt: skip
    options = measure.parse(top, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as run.py does
    torch.set_num_threads(options.threads)
    report = limits.machine("transfer_step", arguments, options.backend)
    report |= {"steps": options.steps, "batch_size": BATCH, "rows": []}
    print(f"{limits.where(report)}, threads: {options.threads}, batches of {BATCH}\n")
    print(f"{'model':<20}{'method':<24}{f'{BASELINE} / it':>18}   ms per step [quartiles]")
    for dataset in EPS:
        row = measured(dataset, options)
        report["rows"].append(row)
        model = f"{dataset} {row['optimizee']}"
        for name, found in row["methods"].items():
            times = f"{row['ratios'][name]:>17.2f}×   {measure.spread(found)}"
            print(f"{model:<20}{name:<24}{times}", flush=True)
    write_json(options.out / "transfer_step.json", report)
    print(f"\n{options.out}: transfer_step.json")


if __name__ == "__main__":
    run_as_script("transfer_step.py", main)
