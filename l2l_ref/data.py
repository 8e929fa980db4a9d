"""MNIST and CIFAR-10 as tensors: found on disk, downloaded, or replaced by a stand-in that says so.

`load` takes the first of these that is there, below `data_dir`:

    MNIST/raw/...  or  cifar-10-batches-py/...            torchvision's own layout
    <name>/{train,test}/<class>/*.{png,jpg,jpeg}          class folders, decoded once and cached
    a download with torchvision into the first layout
    the stand-in of `l2l_ref.stand_in`, with a banner on stderr

Data that is there but broken is an `InputError`: it never falls through to the next line.
"""

import hashlib
import os
import socket
import sys
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from torch import Tensor

from l2l_ref import stand_in
from l2l_ref.errors import InputError

CLASSES = 10
PATIENCE = 10  # seconds that a silent network may take


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
        return self.images[index].to(dtype) / 255, self.labels[index]

    def subset(self, index: Tensor) -> "ImageSet":
        """A copy of the samples at `index` (int64 [b]), in that order."""
        return ImageSet(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """A training and a test set.

    Attributes:
        name: "mnist" or "cifar10".
        source: what the pixels really are, such as "CIFAR-10 (JPEG copy)" or "stand-in".
        checksum: sha256 in hex over all labels and decoded pixels. It depends neither on the
            layout on disk nor on the order of the samples.
    """

    name: str
    source: str
    train: ImageSet
    test: ImageSet
    checksum: str

    @property
    def stand_in(self) -> bool:
        return self.source == "stand-in"


@dataclass(frozen=True)
class _Kind:
    title: str
    dataset: str  # class in torchvision.datasets
    url: str  # a file that it downloads
    folder: str  # where it keeps its files, which are
    files: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width


_KINDS = {
    "mnist": _Kind(
        "MNIST", "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/train-labels-idx1-ubyte.gz", "MNIST/raw",
        tuple(f"{s}-{f}-ubyte" for s in ("train", "t10k") for f in ("images-idx3", "labels-idx1")),
        (1, 28, 28),
    ),
    "cifar10": _Kind(
        "CIFAR-10", "CIFAR10",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        (3, 32, 32),
    ),
}  # fmt: skip


def load(
    name: str,
    data_dir: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    strict: bool = False,
    download: bool = True,
) -> Data:
    """Find a data set, fetch it, or stand in for it, in the order given at the top of this module.

    Args:
        name: "mnist" (images [n, 1, 28, 28]) or "cifar10" ([n, 3, 32, 32]).
        data_dir: folder that holds the data; a download makes it.
        device: where the tensors will be.
        strict: raise instead of using the stand-in.
        download: whether to try the network when the data is not there.

    Raises:
        InputError: an unknown name; a `data_dir` that is a file; data that is there but broken,
            incomplete or unreadable; no real data when `strict`.
    """
    if name not in _KINDS:
        raise InputError(f"there is no data set {name!r}: choose one of {', '.join(_KINDS)}")
    kind, root, reason = _KINDS[name], Path(data_dir).expanduser(), "downloading is switched off"
    try:
        if root.exists() and not root.is_dir():
            raise InputError(f"data_dir {root} is a file: name the folder that holds the data")
        data = _find(name, root)
        if data is None and download:
            reason = _download(kind, root)
            data = _find(name, root)
    except OSError as error:
        raise InputError(f"cannot read data_dir {root} ({error}): make it readable") from None
    if data is None:
        missing = f"there is no {kind.title} in data_dir {root} ({reason})"
        remedy = (
            f"put it there as {root / kind.folder}/ or as "
            f"{root / name}/{{train,test}}/<class>/*.png, or run once with a network to download it"
        )
        if strict:
            raise InputError(f"{missing}: {remedy}")
        _warn(kind.title, f"Because {missing}.", f"For the real ones, {remedy}.")
        draw = stand_in.digits if name == "mnist" else stand_in.textures
        data = _data(name, "stand-in", "the stand-in", draw())
    train, test = (
        ImageSet(part.images.to(device), part.labels.to(device)) for part in (data.train, data.test)
    )
    return replace(data, train=train, test=test)


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut range(n), shuffled by `seed`, into two disjoint halves: int64 [n // 2] each.

    An odd `n` loses the last of the shuffled order.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2], order[n // 2 : n // 2 * 2]


def batches(
    images: ImageSet, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: every epoch in a new order, drawn from `generator` (a CPU one).

    The ragged last batch of an epoch is dropped, so that all have the same size.

    Yields:
        x: float32 [batch_size, c, h, w] in [0, 1]; y: int64 [batch_size].

    Raises:
        InputError: at the call, unless 1 <= batch_size <= len(images).
    """
    if not 1 <= batch_size <= len(images):
        raise InputError(
            f"batch size {batch_size} does not go with {len(images)} images: "
            f"choose one from 1 to {len(images)}, or give more data"
        )

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(images), generator=generator).to(images.labels.device)
            for index in order.split(batch_size)[: len(images) // batch_size]:
                yield images.batch(index)

    return endless()


# ---- reading ----------------------------------------------------------------------------------


def _find(name: str, root: Path) -> Data | None:
    if (root / _KINDS[name].folder).exists():
        return _from_torchvision(name, root)
    if (root / name).exists():
        return _from_folders(name, root / name)
    return None


def _data(name: str, source: str, where: object, tensors: tuple[Tensor, ...]) -> Data:
    """Check (train images, train labels, test images, test labels) and sum them up."""
    shape, checksum = _KINDS[name].shape, hashlib.sha256()
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
    train, test = ImageSet(*tensors[:2]), ImageSet(*tensors[2:])
    return Data(name, source, train, test, checksum.hexdigest())


def _from_torchvision(name: str, root: Path) -> Data:
    kind, tensors = _KINDS[name], []
    folder = root / kind.folder
    remedy = f"replace it, or remove {folder} to download the data again"
    for file in kind.files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing: {remedy}")
    for part in ("train", "test"):
        try:
            from torchvision import datasets

            loaded = getattr(datasets, kind.dataset)(root, train=part == "train")
        except Exception as error:  # broken files raise anything here, even assertions
            raise InputError(
                f"cannot read the {part} set in {folder} ({_brief(error)}): {remedy}"
            ) from None
        images, labels = torch.as_tensor(loaded.data), torch.as_tensor(loaded.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        tensors += [images, labels]
    return _data(name, kind.title, folder, tuple(tensors))


def _from_folders(name: str, folder: Path) -> Data:
    listing = [_list_classes(folder / part) for part in ("train", "test")]
    train, test = ({path.parent.name for path, *_ in part} for part in listing)
    if train != test:
        raise InputError(
            f"train and test in {folder} differ in {', '.join(sorted(train ^ test))}: "
            "give both the same ten class folders"
        )
    lossy = any(path.suffix.lower() != ".png" for part in listing for path, *_ in part)
    source = _KINDS[name].title + (" (JPEG copy)" if lossy else " (PNG folders)")

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = Path(home) / "l2l_ref" / f"{name}-{place}.pt"
    names = [[(path.parent.name, path.name, *rest) for path, *rest in part] for part in listing]
    key = hashlib.sha256(repr(names).encode()).hexdigest()
    with suppress(Exception):  # a cache that is absent, stale, torn or not ours is built anew
        saved = torch.load(cache, weights_only=True)
        data = _data(name, source, cache, saved["tensors"])
        if (saved["key"], saved["checksum"]) == (key, data.checksum):
            return data

    if sum(map(len, listing)) > 5000:
        print(f"decoding the images in {folder}, once: they are cached", file=sys.stderr)
    tensors = []
    for part in listing:
        pixels = np.stack([_decode(path, _KINDS[name]) for path, *_ in part])
        labels = torch.tensor([label for _, label, *_ in part])
        tensors += [torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels]
    data = _data(name, source, folder, tuple(tensors))
    saved = {"key": key, "checksum": data.checksum, "tensors": tuple(tensors)}
    with suppress(OSError, RuntimeError):  # no room or no right to write: decode again next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as draft:
            torch.save(saved, f"{draft}/{cache.name}")
            os.replace(f"{draft}/{cache.name}", cache)
    return data


def _list_classes(folder: Path) -> list[tuple[Path, int, int, int]]:
    """(path, label, bytes, mtime) of each image in the ten class folders of `folder`.

    The first image of every class, then the second of every class, and so on: class by class, the
    first thousand test images would be a thousand airplanes.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: put its ten class folders there")
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) != CLASSES:
        raise InputError(f"{folder} has {len(classes)} class folders: give it ten")
    ranked = []
    for label, directory in enumerate(classes):
        files = [p for p in directory.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg")]
        files = sorted(p for p in files if not p.name.startswith("."))
        if not files:
            raise InputError(f"{directory} has no png or jpg images: add some")
        ranked += [(rank, label, path, path.stat()) for rank, path in enumerate(files)]
    ranked.sort(key=lambda entry: entry[:2])
    return [(path, label, stat.st_size, stat.st_mtime_ns) for _, label, path, stat in ranked]


def _decode(path: Path, kind: _Kind) -> np.ndarray:
    """The pixels of one image file: uint8 [height, width, channels]."""
    from PIL import Image

    channels, height, width = kind.shape
    wanted = "L" if channels == 1 else "RGB"
    try:
        with Image.open(path) as image:
            size, mode = image.size, image.mode
            pixels = np.asarray(image.convert(wanted))
    except Exception as error:  # PIL has many ways to say that a file is no image
        raise InputError(f"cannot decode {path} ({_brief(error)}): replace or remove it") from None
    if size != (width, height) or mode not in ("1", "L", "P", "RGB"):  # others convert with loss
        raise InputError(
            f"{path} is {size[0]}x{size[1]} in mode {mode}: make it {width}x{height} in {wanted}"
        )
    return pixels.reshape(height, width, channels)


# ---- when there is nothing to read ------------------------------------------------------------


def _download(kind: _Kind, root: Path) -> str:
    """Let torchvision fetch the data, in whole or not at all; returns why not, if not.

    It grows in a hidden folder of `root` and moves into place when it is complete.
    """
    timeout = socket.getdefaulttimeout()
    try:
        _knock(kind.url)
        from torchvision import datasets

        print(f"downloading {kind.title} to {root}, which can take minutes", file=sys.stderr)
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(PATIENCE)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as draft:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                getattr(datasets, kind.dataset)(draft, download=True)
            (root / kind.folder).parent.mkdir(exist_ok=True)
            os.replace(Path(draft) / kind.folder, root / kind.folder)
        return ""
    except Exception as error:  # no network, no room, no torchvision: there is still the stand-in
        return f"the download failed: {_brief(error)}"
    finally:
        socket.setdefaulttimeout(timeout)


def _knock(url: str) -> None:
    """Raise an OSError unless `url` answers, be it with a refusal, within PATIENCE seconds.

    A socket's timeout bounds neither the look-up of a name nor how many of its addresses are tried
    in turn; a thread that may be left behind bounds both.
    """
    outcome = [OSError(f"{url} does not answer")]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=PATIENCE).close()
            outcome.clear()
        except urllib.error.HTTPError:
            outcome.clear()
        except OSError as error:
            outcome[0] = error

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if outcome:
        raise outcome[0]


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def _warn(title: str, *paragraphs: str) -> None:
    """A box on stderr that nobody overlooks."""
    made_up = f"These images are made up. Results of this run are NOT {title} results."
    lines = ["STAND-IN DATA", made_up]
    for text in paragraphs:  # paths stay whole, to be copied
        lines += textwrap.wrap(text, 76, break_long_words=False, break_on_hyphens=False)
    width = max(map(len, lines))
    edge = "#" * (width + 4)
    print("\n".join([edge, *(f"# {line:<{width}} #" for line in lines), edge]), file=sys.stderr)
