"""A trained model made robust by some more steps, the paper's future work: by φ on clean batches,
or by Adam on clean or attacked ones, at the best of its settings on validation images.

python examples/refine.py [PHI] [DATA_DIR]
"""

import copy
import sys
from functools import partial
from statistics import fmean, stdev

import torch
from torch import nn

import l2l_ref
from l2l_ref import data, problems
from l2l_ref.attacks import LOSSES, none
from l2l_ref.equations import cross_entropy
from l2l_ref.transfer import Method, running_average, train

EPS, TRAINED, LENGTHS = 0.1, 1000, (30, 100)
RATES, SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), 5


def go_on(
    model: nn.Module, method: Method, images: data.ImageSet, seed: int, steps: int
) -> tuple[nn.Module, float]:
    """A copy of `model` after so many steps more, averaged over the last tenth, and the seconds."""
    model = copy.deepcopy(model)
    average = running_average(model, 1 - 10 / steps)
    curve = train(
        model, method, images.batches(128, torch.Generator().manual_seed(seed)),
        loss=cross_entropy, attack=partial(l2l_ref.fgsm, eps=EPS), steps=steps,
        record=lambda model: (torch.zeros(()), torch.zeros(())), every=steps, average=average,
    )  # fmt: skip
    return average.module, curve.ms_per_step * steps / 1e3


def accuracies(model: nn.Module, images: data.ImageSet) -> tuple[float, float]:
    """Clean, and under PGD-20 on both losses."""
    strong = [partial(l2l_ref.pgd, eps=EPS, steps=20, loss=loss) for loss in LOSSES]
    accuracy = partial(l2l_ref.robust_accuracy, model, images)
    return accuracy(none), accuracy(strong)


def main(
    phi: str = "mnist-fgsm-0.1-robust", data_dir: str = "data", trained: int = TRAINED
) -> dict[str, float]:
    """Prints a table; returns the accuracies under PGD-20."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mnist = data.load("mnist", data_dir)
    meta, images = mnist.train.halves(0)
    count = min(2000, len(meta) // 6)
    tuning, held_out, test = meta.rest(count), meta.first(count), mnist.test.first(2000)

    def adam(lr: float, **options: float) -> Method:
        return Method("Adam", lambda model: torch.optim.Adam(model.parameters(), lr=lr), **options)

    by_phi = partial(l2l_ref.LearnedOptimizer.for_model, phi=l2l_ref.load(phi))
    rows = {
        "φ, clean batches": [Method("φ", by_phi)],
        "Adam, clean": [adam(lr) for lr in RATES],
        "Adam + L1, clean": [adam(lr, l1=l1) for lr in RATES for l1 in (1e-3, 3e-3, 1e-2)],
        "Adam + penalty, clean": [adam(lr, penalty=1.5 * EPS) for lr in RATES],
        "Adam, half attacked": [adam(lr, alpha=0.5) for lr in RATES],
    }
    models = [problems.make("mnist").draw(torch.Generator().manual_seed(n)) for n in range(SEEDS)]
    models = [go_on(m, adam(1e-3), images, seed, trained)[0] for seed, m in enumerate(models)]
    result = {}

    def show(name: str, found: list[tuple[float, ...]]) -> None:
        columns = list(zip(*found, strict=True))
        cells = [f"{100 * fmean(c):.1f} ± {100 * stdev(c):.1f}" for c in columns[:2]]
        print(f"| {name} | {' | '.join(cells)} | {fmean(columns[2]):.2f} |", flush=True)
        result[name] = fmean(columns[1])

    print(
        f"{mnist.source}, ε {EPS}, {SEEDS} models, {trained} clean steps of Adam at 0.001 first\n"
    )
    print("| refined by | clean % | PGD-20 % | s |\n|---|---|---|---|")
    show("nothing", [(*accuracies(m, test), 0.0) for m in models])
    for steps in LENGTHS:
        for name, methods in rows.items():
            tries = [go_on(models[0], method, tuning, SEEDS, steps)[0] for method in methods]
            robust = [accuracies(one, held_out)[1] for one in tries]
            best = methods[robust.index(max(robust))]
            found = []
            for seed, model in enumerate(models):
                better, seconds = go_on(model, best, images, SEEDS + seed, steps)
                found.append((*accuracies(better, test), seconds))
            show(f"{name}, {steps} steps", found)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
