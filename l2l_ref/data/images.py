"""Sets of labelled images: what an experiment cuts, trains on and evaluates on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from l2l_ref.errors import InputError


@dataclass(frozen=True)
class ImageSet:
    """A whole set of labelled images on one device, and indexed there: no loader, no workers."""

    images: Tensor  # uint8 [n, channels, height, width]
    labels: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64 [b]): x float32 [b, c, h, w] in [0, 1], y int64 [b]."""
        index = index.to(self.labels.device)
        x = self.images.index_select(0, index).float().div_(255)  # bytes travel, floats stay
        return x, self.labels.index_select(0, index)

    def halves(self, seed: int) -> tuple["ImageSet", "ImageSet"]:
        """Two halves, disjoint, in the random order of `seed`; of an odd number one is left out."""
        whole, size = self.shuffled(torch.Generator().manual_seed(seed)), len(self) // 2
        return whole.first(size), whole.rest(size).first(size)

    def shuffled(self, generator: torch.Generator) -> "ImageSet":
        """A copy of all, in an order drawn on the CPU."""
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        return ImageSet(self.images[order], self.labels[order])

    def first(self, count: int | None) -> "ImageSet":
        """The first `count`, or as many as there are (None: all), without a copy."""
        return ImageSet(self.images[:count], self.labels[:count])

    def rest(self, count: int) -> "ImageSet":
        """All but the first `count`, without a copy."""
        return ImageSet(self.images[count:], self.labels[count:])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Each a `batch`, without end: an epoch has a new order, drawn from `generator` on the CPU.

        The ragged last batch of an epoch is dropped, so that all have the same size. The device
        waits for the host once an epoch, when it gets the order. InputError, at the call, unless
        1 <= size <= len(self).
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
    """A training and a test set."""

    source: str  # what the pixels really are, such as "CIFAR-10 (JPEG copy)" or "stand-in"
    train: ImageSet
    test: ImageSet
    checksum: str  # sha256 of labels and decoded pixels, whatever their layout and order on disk


def endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, begun again whenever they end, as a DataLoader can be; while it is read, an
    InputError for batches that end and cannot be begun again, or none at all."""
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
