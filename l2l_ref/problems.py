"""Optimizees: what the meta-optimizer trains.

A problem says how to draw a fresh optimizee and what its loss is. No optimizer appears here, and a
problem knows nothing of the one that trains it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.equations import Loss, cross_entropy
from l2l_ref.errors import InputError
from l2l_ref.foreign import imported


@dataclass(frozen=True)
class Problem:
    """A family of optimizees."""

    name: str  # as on the command line
    build: Callable[[], nn.Module]  # -> an untrained module, whose θ₀ is that of its constructors
    loss: Loss  # (model, x, y) -> 0-dim loss, averaged over the batch
    classes: int  # how many, or 0 where there is nothing to classify

    def draw(self, generator: torch.Generator, device: torch.device | str = "cpu") -> nn.Module:
        """A fresh optimizee in training mode, its θ₀ from `generator` (a CPU one).

        The generator stands in for torch's global one while the module is built, which is then as
        it was: any module, whatever it draws, is the same for the same generator.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())
            model = self.build()
            generator.set_state(torch.get_rng_state())
        return model.to(device)


def mlp() -> nn.Module:
    """784-20-10 with ReLU (paper, section 4.1): 15,910 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 20), nn.ReLU(), nn.Linear(20, 10))


class ChannelsLast(nn.Sequential):
    """A sequence that lays out its images with the channels innermost, where it runs on a CPU.

    The same function up to rounding; convolution and pooling are faster in this layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def convnet() -> nn.Module:
    """Three 3×3 convolutions with batch-norm, then 32 linear units (paper, section 4.2).

    16 channels and a 2×2 max-pool each, as in Andrychowicz et al. 2016; 13,802 parameters. A ReLU
    of a maximum is the maximum of the ReLUs, to the bit and in its gradient too, and of the two the
    one on a quarter of the numbers takes a tenth less of a step's time.
    """
    layers: list[nn.Module] = []
    for channels in (3, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16)]
        layers += [nn.MaxPool2d(2), nn.ReLU()]
    return ChannelsLast(
        *layers, nn.Flatten(), nn.Linear(16 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def logistic(pixels: int) -> nn.Module:
    """Multinomial logistic regression, the paper's "other functions" (section 4)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 10))


class Quadratic(nn.Module):
    """θ of `batch` independent problems f(θ) = ||Wθ - y||² in 10 dimensions: x = W, forward = Wθ.

    Source: Andrychowicz et al. 2016, section 3.1.
    """

    dimension = 10
    phi_group = "quadratic"

    def __init__(self, batch: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(batch, self.dimension))
        nn.init.normal_(self.theta, std=0.01)

    def forward(self, x: Tensor) -> Tensor:  # [batch, 10, 10] -> [batch, 10]
        return (x @ self.theta[..., None]).squeeze(-1)


def squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||model(x) - y||², averaged over the problems of a batch."""
    return (model(x) - y).square().sum(-1).mean()


@dataclass(frozen=True)
class Quadratics:
    """Functions that are drawn and cut as `data.ImageSet` is: every part is the whole, and a curve
    is recorded on those that are trained on."""

    size: int  # functions of an optimizee
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return self.size

    def halves(self, seed: int) -> tuple["Quadratics", "Quadratics"]:
        return self, self

    def first(self, _: Any) -> "Quadratics":
        return self

    rest = shuffled = first

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The same (W, y) without end, as one optimizee has the same functions (Andrychowicz et al.
        2016): [self.size, 10, 10] and [self.size, 10], whatever `size` is, standard normal entries
        from `generator` (on the CPU)."""
        n = Quadratic.dimension
        w = torch.randn(self.size, n, n, generator=generator).to(self.device)
        y = torch.randn(self.size, n, generator=generator).to(self.device)
        return repeat((w, y))

    def probe(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return next(self.batches(self.size, generator))


OPTIMIZEES: dict[str, dict[str, Callable[..., nn.Module]]] = {  # the first is the default
    "mnist": {"mlp": mlp, "logistic": partial(logistic, 28 * 28)},
    "cifar10": {"convnet": convnet, "logistic": partial(logistic, 3 * 32 * 32)},
    "quadratic": {"quadratic": Quadratic},  # of as many functions as a batch has samples
}


def make(dataset: str, optimizee: str | None = None, batch_size: int = 128) -> Problem:
    """The problem of a data set ("mnist", "cifar10" or "quadratic"); a quadratic one holds as many
    functions as a batch has samples. InputError for an unknown one, or a wrong optimizee.

    Args:
        optimizee: "mlp" (MNIST), "convnet" (CIFAR-10), "logistic" (either), or MODULE:FUNCTION, a
            function () -> a module that takes the images to ten logits; None is the first.
    """
    if dataset not in OPTIMIZEES:
        raise InputError(f"dataset '{dataset}' is unknown: choose one of {', '.join(OPTIMIZEES)}")
    builds = OPTIMIZEES[dataset]
    name = optimizee or next(iter(builds))
    if ":" in name and dataset != "quadratic":
        build = imported(name)
    elif name in builds:
        build = builds[name]
    else:
        raise InputError(
            f"optimizee '{name}' does not go with {dataset}: choose one of {', '.join(builds)}"
        )
    if dataset == "quadratic":
        return Problem(name, partial(Quadratic, batch_size), squared_error, classes=0)
    return Problem(name, build, cross_entropy, classes=10)
