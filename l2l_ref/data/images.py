"""Samples: what an experiment cuts, trains on and judges by. Labelled images are such."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from l2l_ref.errors import InputError


class Samples(Protocol):
    """What may be cut into parts and drawn from in batches."""

    def __len__(self) -> int: ...

    def halves(self, seed: int) -> tuple["Samples", "Samples"]:
        """Two disjoint halves in the random order of `seed`."""
        ...

    def shuffled(self, generator: torch.Generator) -> "Samples":
        """All, in an order drawn on the CPU."""
        ...

    def first(self, count: int | None) -> "Samples":
        """The first `count`, or as many as there are; None is all."""
        ...

    def rest(self, count: int) -> "Samples":
        """All but the first `count`."""
        ...

    def batches(self, size: int, *generators: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (x, y) of `size`; with K > 1 generators, of K tasks as `problems.Stacked` takes
        them."""
        ...

    def probe(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x, y) by which a curve is recorded; `generator` is that of the batches, at its start."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """A whole set of labelled images on one device, and indexed there: no loader, no workers.

    Attributes:
        images: uint8 [n, channels, height, width].
        labels: int64 [n].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64 [b]): x of `dtype` [b, c, h, w] in [0, 1], y int64 [b]."""
        index = index.to(self.labels.device)
        x = self.images.index_select(0, index).to(dtype).div_(255)  # bytes travel, floats stay
        return x, self.labels.index_select(0, index)

    def subset(self, index: Tensor) -> "ImageSet":
        """A copy of the samples at `index` (int64 [b]), in that order."""
        return ImageSet(self.images[index], self.labels[index])

    def halves(self, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Disjoint; an odd number loses the last of the shuffled order."""
        first, second = halves(len(self), seed)
        return self.subset(first), self.subset(second)

    def shuffled(self, generator: torch.Generator) -> "ImageSet":
        """A copy in random order."""
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order.to(self.labels.device))

    def first(self, count: int | None) -> "ImageSet":
        """The first `count` (None: all), without a copy."""
        return ImageSet(self.images[:count], self.labels[:count])

    def rest(self, count: int) -> "ImageSet":
        """All but the first `count`, without a copy."""
        return ImageSet(self.images[count:], self.labels[count:])

    def batches(self, size: int, *generators: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """As `batches`."""
        return batches(self, size, *generators)

    def probe(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The first `count`, or as many as there are."""
        return self.first(count).all()

    def all(self) -> tuple[Tensor, Tensor]:
        """The whole set as a batch."""
        return self.batch(torch.arange(len(self)))


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut range(n), shuffled by `seed`, into two disjoint halves: int64 [n // 2] each.

    An odd `n` loses the last of the shuffled order.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2], order[n // 2 : n // 2 * 2]


def batches(
    images: ImageSet, batch_size: int, *generators: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: every epoch in a new order, drawn from each of K `generators`.

    The ragged last batch of an epoch is dropped, so that all have the same size. The device waits
    for the host once an epoch, when it gets the orders.

    Args:
        generators: on the CPU, one for each optimizee that trains at the same time.

    Yields:
        x: float32 [batch_size, c, h, w] in [0, 1]; y: int64 [batch_size]. For K > 1, as
        `problems.Stacked` takes them, x: [K, batch_size, c, h, w] and y: [K·batch_size].

    Raises:
        InputError: at the call, unless 1 <= batch_size <= len(images).
    """
    if not 1 <= batch_size <= len(images):
        raise InputError(
            f"batch size {batch_size} does not go with {len(images)} images: "
            f"choose one from 1 to {len(images)}, or give more data"
        )
    tasks = len(generators)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            orders = [torch.randperm(len(images), generator=generator) for generator in generators]
            indices = torch.stack(orders).to(images.labels.device).split(batch_size, dim=1)
            for index in indices[: len(images) // batch_size]:  # [K, batch_size]
                x, y = images.batch(index.flatten())
                yield x.unflatten(0, (tasks, -1)) if tasks > 1 else x, y

    return endless()
