"""Where images come from: torchvision's layout, class folders, a download.

Data that is there but broken is an `InputError` that names the file or folder; data that is not
there is None.
"""

import hashlib
import os
import socket
import sys
import tempfile
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2l_ref.errors import InputError, shortened

CLASSES = 10
MNIST = "6019fe9bf4c2c256d446828213e33f053c0e4bb68978d9cf2b5efa0cc8dc5753"  # checksum of the real
PICTURES = ".png", ".jpg", ".jpeg"
PATIENCE = 10  # seconds that a silent network may take


class Found(NamedTuple):
    """A data set as it was found."""

    source: str  # what the pixels really are
    tensors: tuple[Tensor, ...]  # train images, train labels, test images, test labels
    checksum: str  # of labels and pixels, whatever their order


class Kind(NamedTuple):
    title: str
    dataset: str  # class in torchvision.datasets
    folder: str  # where it keeps its files
    shape: tuple[int, int, int]  # channels, height, width


KINDS = {
    "mnist": Kind("MNIST", "MNIST", "MNIST/raw", (1, 28, 28)),
    "cifar10": Kind("CIFAR-10", "CIFAR10", "cifar-10-batches-py", (3, 32, 32)),
}


def find(name: str, root: Path) -> Found | None:
    """The data set `name` below `root`, in the first layout that is there.

    Raises:
        InputError: it is there but broken.
    """
    kind = KINDS[name]
    folder = Path(kind.folder)
    if (root / folder).exists():
        return from_torchvision(kind, root)
    if os.path.lexists(root / name):
        return from_folders(kind, root / name)
    if os.path.lexists(root / folder.parts[0]):  # a file, a folder without raw, a link to nowhere
        return from_torchvision(kind, root)
    return None


def from_torchvision(kind: Kind, root: Path) -> Found:
    """torchvision's own layout."""
    dataset, folder, tensors = getattr(torchvision(), kind.dataset), root / kind.folder, []
    for part in ("train", "test"):
        try:
            loaded = dataset(root, train=part == "train")
        except Exception as error:  # broken files raise anything here, even assertions
            raise InputError(
                f"cannot read the {part} set in {folder} (torchvision: {brief(error)}): replace "
                "it, or remove that folder to download the data again"
            ) from None
        images, labels = torch.as_tensor(loaded.data), torch.as_tensor(loaded.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        classes = int(labels.max()) + 1
        if images.shape != (len(labels), *kind.shape) or classes > CLASSES:
            raise InputError(
                f"the {part} set in {folder} has images {list(images.shape)} and {len(labels)} "
                f"labels of {classes} classes, not {list(kind.shape)} and {CLASSES}: replace it"
            )
        tensors += [images, labels]
    found = with_checksum(kind.title, tuple(tensors))
    if kind.dataset == "MNIST" and found.checksum != MNIST:  # torchvision checks CIFAR-10 itself
        return found._replace(source="other images in MNIST's layout")
    return found


def from_folders(kind: Kind, folder: Path) -> Found:
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
                f"({brief(error)}): put the ten of {kind.title} there"
            ) from None
    train, test = (part.classes for part in parts)
    if train != test or len(train) != CLASSES:
        raise InputError(
            f"train and test in {folder} have {len(train)} and {len(test)} class folders: give "
            "both the same ten"
        )
    tensors = []
    for part in parts:
        labels = torch.tensor(part.targets)  # ascending
        ranks = torch.arange(len(labels)) - torch.searchsorted(labels, labels)  # in its class
        order = ranks.argsort(stable=True)
        pixels = np.stack([decoded(part.imgs[i][0], kind) for i in order.tolist()])
        tensors += [torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels[order]]
    lossless = all(path.lower().endswith(".png") for part in parts for path, _ in part.imgs)
    source = kind.title + (" (PNG folders)" if lossless else " (JPEG copy)")
    return with_checksum(source, tuple(tensors))


def is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURES) and not os.path.basename(path).startswith(".")


def decoded(path: str, kind: Kind) -> np.ndarray:
    """The pixels of an image file: uint8 [height, width, channels]."""
    from PIL import Image

    channels, height, width = kind.shape
    wanted = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path) as image:
            if image.size != (width, height) or image.mode not in ("1", "L", "P", "RGB"):
                found = f"it is {image.width}x{image.height} in mode {image.mode}"
                raise ValueError(f"{found}, not {width}x{height} in {wanted}")  # that would lose
            pixels = np.asarray(image.convert(wanted))
    except Exception as error:  # PIL has many ways to say that a file is no image
        raise InputError(f"cannot decode {path} ({brief(error)}): replace or remove it") from None
    return pixels.reshape(height, width, channels)


def with_checksum(source: str, tensors: tuple[Tensor, ...]) -> Found:
    """Of (train images, train labels, test images, test labels)."""
    checksum = hashlib.sha256()
    for images, labels in (tensors[:2], tensors[2:]):
        # A digest for each sample, sorted, since each layout keeps the samples in its own order.
        rows = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], 1).numpy()
        checksum.update(b"".join(sorted(hashlib.sha256(row).digest() for row in rows)))
    return Found(source, tensors, checksum.hexdigest())


def torchvision() -> Any:
    """torchvision.datasets."""
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch raises what it likes
        raise InputError(
            f"torchvision, which reads images, cannot be imported ({brief(error)}): install the "
            "one that goes with this torch"
        ) from None
    return datasets


def download(kind: Kind, root: Path) -> str:
    """Let torchvision fetch the data, in whole or not at all; returns why not, if not.

    It grows in a hidden folder of `root` and moves into place when it is complete.
    """
    timeout, fresh = socket.getdefaulttimeout(), not root.exists()
    where = f"{kind.title} to {shortened(root)}"
    print(f"downloading {where}, which can take minutes", file=sys.stderr)
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
        return f"the download failed: {brief(error)}"
    finally:
        socket.setdefaulttimeout(timeout)


def brief(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200)
