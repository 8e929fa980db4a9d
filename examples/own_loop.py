"""Your own model and your own loop, on clean batches, with a φ of the package.

`fair_comparison.py` has Adam beside it.

python examples/own_loop.py [PHI] [DATA_DIR]
"""

import sys
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import l2l_ref
from l2l_ref import data
from l2l_ref.attacks import none


def main(
    phi: str = "mnist-fgsm-0.1-robust", data_dir: str = "data", steps: int = 100
) -> dict[str, float]:
    torch.manual_seed(0)
    mnist = data.load("mnist", data_dir)
    batches = mnist.train.batches(128, torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 40), nn.ReLU(), nn.Linear(40, 10))

    optimizer = l2l_ref.LearnedOptimizer.for_model(model, l2l_ref.load(phi))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # the last tenth
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)

    test = mnist.test.first(1000)
    attacks = {"clean": none, "PGD-20 at 0.1": partial(l2l_ref.pgd, eps=0.1, steps=20)}
    accuracy = {
        name: l2l_ref.robust_accuracy(average, test, attack) for name, attack in attacks.items()
    }
    for name, value in accuracy.items():
        print(f"{name}: accuracy {value:.3f} (1,000 test images of {mnist.source})")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])
