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
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
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


@dataclass(frozen=True)
class Kind:
    title: str
    dataset: str  # class in torchvision.datasets
    folder: str  # where it keeps its files, which are
    files: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width


KINDS = {
    "mnist": Kind(
        "MNIST", "MNIST",
        "MNIST/raw",
        tuple(f"{s}-{f}-ubyte" for s in ("train", "t10k") for f in ("images-idx3", "labels-idx1")),
        (1, 28, 28),
    ),
    "cifar10": Kind(
        "CIFAR-10", "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        (3, 32, 32),
    ),
}  # fmt: skip


def find(name: str, root: Path) -> Found | None:
    """The data set `name` below `root`, in the first layout that is there.

    Raises:
        InputError: it is there but broken.
    """
    folder = Path(KINDS[name].folder)
    if (root / folder).exists():
        return _from_torchvision(name, root)
    if os.path.lexists(root / name):
        return _from_folders(name, root / name)
    if os.path.lexists(root / folder.parts[0]):  # a file, a folder without raw, a link to nowhere
        return _from_torchvision(name, root)
    return None


def checked(name: str, source: str, where: object, tensors: tuple[Tensor, ...]) -> Found:
    """Check (train images, train labels, test images, test labels) and sum them up.

    Raises:
        InputError: a wrong shape, dtype, count or label; it names `where`.
    """
    shape, checksum = KINDS[name].shape, hashlib.sha256()
    for images, labels in (tensors[:2], tensors[2:]):
        fault = None
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            fault = f"images {images.dtype} {list(images.shape[1:])}, not uint8 {list(shape)}"
        elif len(images) != len(labels):
            fault = f"{len(images)} images and {len(labels)} labels"
        elif labels.min() < 0 or labels.max() >= CLASSES:
            fault = f"labels from {labels.min()} to {labels.max()}, not from 0 to 9"
        if fault:
            raise InputError(f"{where} is broken ({fault}): replace or remove it")
        # A digest for each sample, sorted, since each layout keeps the samples in its own order.
        rows = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], 1).numpy()
        checksum.update(b"".join(sorted(hashlib.sha256(row).digest() for row in rows)))
    return Found(source, tensors, checksum.hexdigest())


def _from_torchvision(name: str, root: Path) -> Found:
    kind, tensors = KINDS[name], []
    folder = root / kind.folder
    remedy = f"replace it, or remove {folder} to download the data again"
    for file in kind.files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing: {remedy}")
    datasets = _torchvision(folder)
    for part in ("train", "test"):
        try:
            loaded = getattr(datasets, kind.dataset)(root, train=part == "train")
        except Exception as error:  # broken files raise anything here, even assertions
            raise InputError(
                f"cannot read the {part} set in {folder} ({brief(error)}): {remedy}"
            ) from None
        images, labels = torch.as_tensor(loaded.data), torch.as_tensor(loaded.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        tensors += [images, labels]
    found = checked(name, kind.title, folder, tuple(tensors))
    if name == "mnist" and found.checksum != MNIST:  # torchvision checks CIFAR-10 itself
        return found._replace(source="other images in MNIST's layout")
    return found


def _from_folders(name: str, folder: Path) -> Found:
    """Class folders, as torchvision's `ImageFolder` has them.

    The first image of every class, then the second of every class, and so on: class by class, the
    first thousand test images would be a thousand airplanes.
    """
    kind, tensors, classes, lossy = KINDS[name], [], [], False
    for part in ("train", "test"):
        try:
            found = _torchvision(folder).ImageFolder(folder / part, is_valid_file=is_picture)
        except OSError as error:
            raise InputError(
                f"{folder / part} is not a folder of class folders with png or jpg images "
                f"({brief(error)}): put the ten of {kind.title} there"
            ) from None
        ranks: Counter[int] = Counter()
        ranked = []
        for path, label in found.samples:
            ranked.append((ranks[label], label, path))
            ranks[label] += 1
            lossy |= not path.lower().endswith(".png")
        ranked.sort()
        pixels = np.stack([_decode(path, kind) for *_, path in ranked])
        labels = torch.tensor([label for _, label, _ in ranked])
        tensors += [torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels]
        classes.append(found.classes)
    if classes[0] != classes[1] or len(classes[0]) != CLASSES:
        raise InputError(
            f"train and test in {folder} have {len(classes[0])} and {len(classes[1])} class "
            "folders: give both the same ten"
        )
    source = kind.title + (" (JPEG copy)" if lossy else " (PNG folders)")
    return checked(name, source, folder, tuple(tensors))


def is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURES) and not os.path.basename(path).startswith(".")


def _decode(path: str, kind: Kind) -> np.ndarray:
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


def _torchvision(folder: Path) -> Any:
    """torchvision.datasets, which reads `folder`."""
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch raises what it likes
        raise InputError(
            f"torchvision, which reads {folder}, cannot be imported ({brief(error)}): install the "
            "one that goes with this torch"
        ) from None
    return datasets


# ---- when there is nothing to read ------------------------------------------------------------


def download(kind: Kind, root: Path) -> str:
    """Let torchvision fetch the data, in whole or not at all; returns why not, if not.

    It grows in a hidden folder of `root` and moves into place when it is complete.
    """
    timeout, fresh = socket.getdefaulttimeout(), not root.exists()
    try:
        from torchvision import datasets

        where = f"{kind.title} to {shortened(root)}"
        print(f"downloading {where}, which can take minutes", file=sys.stderr)
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(PATIENCE)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as draft:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                getattr(datasets, kind.dataset)(draft, download=True)
            (root / kind.folder).parent.mkdir(exist_ok=True)
            os.replace(Path(draft) / kind.folder, root / kind.folder)
        return ""
    except Exception as error:  # no network, no room, no torchvision: there is still the stand-in
        if fresh and root.exists():
            root.rmdir()
        return f"the download failed: {brief(error)}"
    finally:
        socket.setdefaulttimeout(timeout)


def brief(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200)
