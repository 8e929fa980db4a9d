"""torchvision's ResNet-18 on CIFAR-10, with a φ of the package, a PyTorch schedule, and Adam.

python examples/resnet.py [PHI] [DATA_DIR]     # 4.6 GB of memory: φ has 80 numbers for each weight
"""

import resource
import sys
import time

import torch
from torch import nn
from torchvision.models import resnet18

import l2l_ref
from l2l_ref import data


def train(make, images: data.Data, steps: int, build) -> float:
    """A fresh model's loss on test images after `steps` clean batches."""
    torch.manual_seed(0)
    model, batches = build(), images.train.batches(128, torch.Generator().manual_seed(0))
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begin = time.perf_counter()
    for _ in range(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    seconds = (time.perf_counter() - begin) / steps
    x, y = images.test.first(1000).all()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(x), y).item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{type(optimizer).__name__}, {steps} steps on {images.source}: test loss {loss:.3f}, "
        f"{seconds:.2f} s a step, peak {peak:.1f} GiB",
        flush=True,
    )
    return loss


def main(
    phi: str = "cifar10-fgsm-2-255",
    data_dir: str = "data",
    steps: int = 200,
    build=lambda: resnet18(num_classes=10),
) -> list[float]:
    images = data.load("cifar10", data_dir)

    def adam(model):
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def learned(model):
        return l2l_ref.LearnedOptimizer.for_model(model, l2l_ref.load(phi))

    runs = ((adam, steps // 4), (adam, steps), (learned, steps))
    return [train(make, images, count, build) for make, count in runs]


if __name__ == "__main__":
    main(*sys.argv[1:])
