"""A fair comparison of φ and Adam. Adam's rate is tuned on validation images. For each of several
seeds both start from the same θ₀ and see the same batches. The difference has an interval.

python examples/fair_comparison.py [PHI] [DATA_DIR]
"""

import statistics
import sys
from functools import partial

import torch

import l2l_ref
from l2l_ref import data, evaluate, problems
from l2l_ref.attacks import none
from l2l_ref.experiment.report import interval, signed
from l2l_ref.transfer import Method, train

ATTACK = partial(l2l_ref.pgd, eps=0.1)


def ends(
    method: Method, images: data.ImageSet, held_out: data.ImageSet, seed: int, steps: int
) -> float:
    """The loss under attack after training on clean images."""
    noise = torch.Generator().manual_seed(seed)
    problem = problems.make("mnist")
    model = problem.draw(noise)
    x, y = held_out.all()
    curve = train(
        model, method, images.batches(128, noise), loss=problem.loss, attack=none, steps=steps,
        record=partial(evaluate.losses, x=x, y=y, attack=ATTACK), every=steps,
    )  # fmt: skip
    return curve.attacked[-1]


def main(
    phi: str = "mnist-fgsm-0.1-robust", data_dir: str = "data", seeds: int = 5, steps: int = 100
) -> tuple[float, float]:
    mnist = data.load("mnist", data_dir)
    images, validation = mnist.train.rest(1000), mnist.train.first(1000)

    def adam(lr: float) -> Method:
        return Method(f"Adam {lr:g}", lambda model: torch.optim.Adam(model.parameters(), lr=lr))

    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    best = min(rates, key=lambda lr: ends(adam(lr), images, validation, 1000, steps))
    learned = Method("φ", partial(l2l_ref.LearnedOptimizer.for_model, phi=l2l_ref.load(phi)))
    methods, test = (learned, adam(best)), mnist.test.first(1000)
    pairs = [
        [ends(method, images, test, seed, steps) for method in methods] for seed in range(seeds)
    ]
    gaps = [ours - theirs for ours, theirs in pairs]
    difference = interval(gaps)  # 95 %, Student's t
    print(
        f"loss under PGD-7, {mnist.source}: φ {statistics.mean(p[0] for p in pairs):.3f}, "
        f"Adam at {best:g} {statistics.mean(p[1] for p in pairs):.3f}, "
        f"difference {signed(difference)}"
    )
    return difference["mean"], difference["half_width"]


if __name__ == "__main__":
    main(*sys.argv[1:])
