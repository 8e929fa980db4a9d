"""A φ for your own model and your own data, meta-trained under PGD. `main` has all that it takes.

python examples/own_phi.py
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from statistics import fmean

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import l2l_ref
from l2l_ref.data.images import endless


def blobs(seed: int, count: int = 2048) -> Dataset:
    """Your data: points in [0, 1]^64 around one of four centres.

    The centres are far apart in 8 features. In the other 56 they are so close that the attack moves
    a point from one to another. Adam relies on those too.
    """
    fixed, noise = (torch.Generator().manual_seed(number) for number in (0, seed))
    far, close = torch.rand(4, 8, generator=fixed), 0.5 + 0.1 * torch.randn(4, 56, generator=fixed)
    centres = torch.cat([far, close], dim=1)
    y = torch.randint(4, (count,), generator=noise)
    x = centres[y] + 0.1 * torch.randn(count, 64, generator=noise)
    return TensorDataset(x.clamp(0, 1), y)


def build() -> nn.Module:
    """Your model."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def main(episodes: int = 100, steps: int = 100) -> tuple[float, float]:
    torch.manual_seed(0)
    attack = partial(l2l_ref.pgd, eps=0.1, steps=5)
    loader = DataLoader(blobs(1), batch_size=64, shuffle=True)

    def draw(number: int) -> l2l_ref.Episode:
        torch.manual_seed(number)
        return l2l_ref.Episode(build(), loader, attack)

    phi = l2l_ref.new_phi(build(), odd=True, theta_input=True, output_scale=0.1)
    settings = l2l_ref.MetaSettings(episodes, steps=steps, meta_lr=5e-3, input_alpha=1.0, alpha=0.0)
    l2l_ref.meta_train(phi, settings, draw)

    def accuracy(make: Callable[[nn.Module], torch.optim.Optimizer], seed: int) -> float:
        """Under PGD, of a new model trained on clean batches."""
        torch.manual_seed(seed)
        model = build()
        optimizer = make(model)
        for x, y in islice(endless(loader), steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return l2l_ref.robust_accuracy(model, blobs(2), attack)

    by_phi = partial(l2l_ref.LearnedOptimizer.for_model, phi=phi)
    ours, adams = (
        fmean(accuracy(make, seed) for seed in range(1000, 1005))
        for make in (by_phi, lambda model: torch.optim.Adam(model.parameters(), lr=1e-2))
    )
    print(f"accuracy under PGD of five models, after clean batches: φ {ours:.3f}, Adam {adams:.3f}")
    return ours, adams


if __name__ == "__main__":
    main()
