"""Samples: what an experiment cuts, trains on and evaluates on. Labelled images are such."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from l2l_ref.errors import InputError


class Samples(Protocol):
    """What may be cut into parts and drawn from in batches, as `ImageSet` is."""

    def __len__(self) -> int: ...
    def halves(self, seed: int) -> tuple["Samples", "Samples"]: ...
    def shuffled(self, generator: torch.Generator, /) -> "Samples": ...
    def first(self, count: int | None, /) -> "Samples": ...
    def rest(self, count: int, /) -> "Samples": ...
    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]: ...
    def probe(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...


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

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64 [b]): x float32 [b, c, h, w] in [0, 1], y int64 [b]."""
        index = index.to(self.labels.device)
        x = self.images.index_select(0, index).float().div_(255)  # bytes travel, floats stay
        return x, self.labels.index_select(0, index)

    def subset(self, index: Tensor) -> "ImageSet":
        """A copy of the samples at `index` (int64 [b]), in that order."""
        return ImageSet(self.images[index], self.labels[index])

    def halves(self, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Two halves, disjoint, in the random order of `seed`; of an odd number one is left out."""
        whole, size = self.shuffled(torch.Generator().manual_seed(seed)), len(self) // 2
        return whole.first(size), whole.rest(size).first(size)

    def shuffled(self, generator: torch.Generator) -> "ImageSet":
        """A copy of all, in an order drawn on the CPU."""
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order.to(self.labels.device))

    def first(self, count: int | None) -> "ImageSet":
        """The first `count`, or as many as there are (None: all), without a copy."""
        return ImageSet(self.images[:count], self.labels[:count])

    def rest(self, count: int) -> "ImageSet":
        """All but the first `count`, without a copy."""
        return ImageSet(self.images[count:], self.labels[count:])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Each a `batch`, without end: an epoch has a new order, drawn from `generator` on the CPU.

        The ragged last batch of an epoch is dropped, so that all have the same size. The device
        waits for the host once an epoch, when it gets the order.

        Raises:
            InputError: at the call, unless 1 <= size <= len(self).
        """
        if not 1 <= size <= len(self):
            raise InputError(
                f"batch size {size} does not go with {len(self)} images: "
                f"choose one from 1 to {len(self)}, or give more data"
            )

        orders = (torch.randperm(len(self), generator=generator) for _ in repeat(None))
        epochs = (order.to(self.labels.device).split(size) for order in orders)
        return (self.batch(index) for epoch in epochs for index in epoch[: len(self) // size])

    def probe(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The first `count`: (x, y) by which a curve is recorded."""
        return self.first(count).all()

    def all(self) -> tuple[Tensor, Tensor]:
        """The whole set as a batch."""
        return self.batch(torch.arange(len(self)))


@dataclass(frozen=True)
class Data:
    """A training and a test set.

    Attributes:
        source: what the pixels really are, such as "CIFAR-10 (JPEG copy)" or "stand-in".
        checksum: sha256 in hex over all labels and decoded pixels. It depends neither on the
            layout on disk nor on the order of the samples.
    """

    source: str
    train: ImageSet
    test: ImageSet
    checksum: str


def endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, begun again whenever they end, as a DataLoader can be.

    Raises:
        InputError: while it is read: batches that end and cannot be begun again, or none at all.
    """
    while True:
        count = 0
        for batch in batches:
            yield batch
            count += 1
        if not count or isinstance(batches, Iterator):
            raise InputError(
                f"the batches ended after {count}: give an iterator without end, or one that can "
                "be begun again, such as a DataLoader"
            )
