"""Data: sets, halves, batches; every place they come from; what is broken is said to be broken."""

import hashlib
import os
import pickle
import shutil
import socket
import struct
import time
import urllib.error
import urllib.request
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets

from l2l_ref import data
from l2l_ref.data import ImageSet, sources, stand_in
from l2l_ref.errors import InputError

DRAW = {"mnist": stand_in.digits, "cifar10": stand_in.coloured_digits}
SHAPE = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
IDX = [f"{s}-{f}-ubyte" for s in ("train", "t10k") for f in ("images-idx3", "labels-idx1")]


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """No network, a cache of its own, and stand-ins of 50 + 20 pictures."""

    def no_network(url):
        raise OSError("no network in tests")

    monkeypatch.setattr(sources, "_knock", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stand_in, "digits", lambda: DRAW["mnist"](50, 20))
    monkeypatch.setattr(stand_in, "coloured_digits", lambda: DRAW["cifar10"](50, 20))


def pictures(name: str, n: int, seed: int) -> ImageSet:
    """Random pixels; the labels are mixed, and each of the ten appears."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, *SHAPE[name]), dtype=torch.uint8, generator=g)
    return ImageSet(images, (torch.arange(n) % 10)[torch.randperm(n, generator=g)])


def write_idx(root: Path, train: ImageSet, test: ImageSet) -> Path:
    """torchvision's layout of MNIST: big-endian sizes, then bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, name in ((train, "train"), (test, "t10k")):
        n, _, *sides = part.images.shape
        header = struct.pack(">4I", 0x803, n, *sides)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + part.images.numpy().tobytes())
        header = struct.pack(">2I", 0x801, n)
        labels = part.labels.to(torch.uint8).numpy().tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels)
    return folder


def write_folders(folder: Path, train: ImageSet, test: ImageSet, suffix: str = "png") -> Path:
    for part, name in ((train, "train"), (test, "test")):
        for i, (pixels, label) in enumerate(zip(part.images, part.labels, strict=True)):
            path = folder / name / f"class{label}" / f"{i:04}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
            Image.fromarray(array.numpy()).save(path)
    return folder


def write_cifar(root: Path, train: ImageSet, test: ImageSet, monkeypatch) -> Path:
    """torchvision's layout of CIFAR-10, of which it shall believe that it is the official one."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents = {"batches.meta": {"label_names": list("abcdefghij")}}
    parts = {f"data_batch_{i + 1}": train.subset(torch.arange(i, 50, 5)) for i in range(5)}
    for file, part in {**parts, "test_batch": test}.items():
        pixels = part.images.flatten(1).numpy()
        contents[file] = {"data": pixels, "labels": part.labels.tolist()}
    md5 = {}
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content))
        md5[file] = hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[file, md5[file]] for file in parts])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {**datasets.CIFAR10.meta, "md5": md5["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder


def sorted_bytes(part: ImageSet) -> list[tuple[int, bytes]]:
    return sorted(
        (int(y), x.numpy().tobytes()) for x, y in zip(part.images, part.labels, strict=True)
    )


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- halves, sets, batches --------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 10, 1001, 60_000])
def test_halves_are_disjoint_equal_and_shuffled_by_the_seed(n):
    whole = ImageSet(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n))
    a, b = (half.labels for half in whole.halves(seed=3))
    assert len(a) == len(b) == n // 2
    both = torch.cat([a, b]).sort().values
    assert len(both.unique()) == n // 2 * 2 and 0 <= both[0] and both[-1] < n
    if n % 2 == 0:
        assert torch.equal(both, torch.arange(n))
    assert torch.equal(a, whole.halves(seed=3)[0].labels)
    if n > 2:
        assert not torch.equal(a, whole.halves(seed=4)[0].labels)
        assert not torch.equal(a, a.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_scales_bytes_to_the_unit_interval(dtype):
    ramp = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    x, y = ImageSet(ramp, torch.tensor([3, 1, 4, 1])).batch(torch.tensor([3, 0]), dtype)
    assert x.dtype == dtype and x.shape == (2, 1, 8, 8) and y.tolist() == [1, 3]
    expected = torch.tensor([*range(192, 256), *range(64)], dtype=torch.float64) / 255
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(x.flatten().double(), expected, **tolerance)
    assert x.min() == 0 and x.max() == 1


def test_subset_keeps_the_order_of_its_index():
    whole = pictures("mnist", 20, seed=0)
    part = whole.subset(torch.tensor([7, 3]))
    assert len(whole) == 20 and len(part) == 2 and part.images.dtype == torch.uint8
    assert torch.equal(part.images, torch.stack([whole.images[7], whole.images[3]]))
    assert part.labels.tolist() == [whole.labels[7], whole.labels[3]]


def numbered(n: int) -> ImageSet:
    """Each sample is its own label."""
    return ImageSet(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.arange(n))


@pytest.mark.parametrize("n, batch_size", [(12, 4), (11, 4), (5, 5), (7, 1)])
def test_batches_see_each_sample_once_an_epoch_and_reshuffle(n, batch_size):
    stream = numbered(n).batches(batch_size, torch.Generator().manual_seed(0))
    epochs = []
    for _ in range(6):
        labels = []
        for x, y in islice(stream, n // batch_size):
            assert x.shape == (batch_size, 1, 1, 1) and x.dtype == torch.float32
            assert torch.equal((x.flatten() * 255).round().long(), y)
            labels += y.tolist()
        assert len(set(labels)) == len(labels) == n // batch_size * batch_size
        epochs.append(tuple(labels))
    assert len(set(epochs)) > 1
    assert {label for epoch in epochs for label in epoch} == set(range(n))


def test_batches_are_a_function_of_the_generator():
    def first_labels(seed):
        stream = numbered(50).batches(8, torch.Generator().manual_seed(seed))
        return torch.stack([y for _, y in islice(stream, 20)])

    torch.manual_seed(0)
    first = first_labels(1)
    torch.manual_seed(1)  # the global stream plays no part
    assert torch.equal(first, first_labels(1))
    assert not torch.equal(first, first_labels(2))


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batches_refuse_a_size_that_no_epoch_holds(batch_size):
    with pytest.raises(InputError, match=rf"batch size {batch_size} .* 10 images"):
        numbered(10).batches(batch_size, torch.Generator())  # at the call, before next()


# ---- real data --------------------------------------------------------------------------------


def test_torchvision_layout_of_mnist(tmp_path):
    train, test = pictures("mnist", 30, 1), pictures("mnist", 20, 2)
    write_idx(tmp_path, train, test)
    loaded = data.load("mnist", tmp_path, strict=True, download=False)
    assert (loaded.name, loaded.source, loaded.stand_in) == ("mnist", "MNIST", False)
    for part, expected in ((loaded.train, train), (loaded.test, test)):
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert torch.equal(part.images, expected.images)
        assert torch.equal(part.labels, expected.labels)


def test_torchvision_layout_of_cifar10(tmp_path, monkeypatch):
    train, test = pictures("cifar10", 50, 1), pictures("cifar10", 20, 2)
    write_cifar(tmp_path, train, test, monkeypatch)
    loaded = data.load("cifar10", str(tmp_path), strict=True, download=False)
    assert loaded.source == "CIFAR-10" and not loaded.stand_in
    assert loaded.train.images.is_contiguous() and loaded.train.labels.dtype == torch.int64
    assert sorted_bytes(loaded.train) == sorted_bytes(train)
    assert torch.equal(loaded.test.images, test.images)
    assert torch.equal(loaded.test.labels, test.labels)


@pytest.mark.parametrize(
    "name, suffix, source",
    [
        ("mnist", "png", "MNIST (PNG folders)"),
        ("cifar10", "png", "CIFAR-10 (PNG folders)"),
        ("cifar10", "jpg", "CIFAR-10 (JPEG copy)"),
        ("cifar10", "JPEG", "CIFAR-10 (JPEG copy)"),
    ],
)
def test_class_folders(tmp_path, name, suffix, source):
    train, test = pictures(name, 30, 1), pictures(name, 20, 2)
    folder = write_folders(tmp_path / name, train, test, suffix)
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / "class0" / "._0000.png").write_bytes(b"left by a Mac")
    (folder / "train" / "class0" / "notes.txt").write_text("not an image")
    loaded = data.load(name, tmp_path, strict=True, download=False)
    assert loaded.source == source
    assert loaded.train.images.shape == (30, *SHAPE[name])
    assert loaded.train.images.is_contiguous()
    assert loaded.train.labels[:10].tolist() == list(range(10)), "a prefix holds every class"
    if suffix == "png":
        assert sorted_bytes(loaded.train) == sorted_bytes(train)
        assert sorted_bytes(loaded.test) == sorted_bytes(test)


def test_names_sort_into_the_official_classes_of_cifar10(tmp_path):
    official = "airplane automobile bird cat deer dog frog horse ship truck".split()
    for part in ("train", "test"):
        for label in reversed(range(10)):
            path = tmp_path / "cifar10" / part / official[label] / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label, 0, 0)).save(path)
    loaded = data.load("cifar10", tmp_path, strict=True, download=False)
    assert torch.equal(loaded.test.images[:, 0, 0, 0].long(), loaded.test.labels)
    assert len(loaded.test.labels.unique()) == 10


def test_checksum_depends_on_the_pictures_and_labels_alone(tmp_path):
    train, test = pictures("mnist", 30, 1), pictures("mnist", 20, 2)

    def checksum(folder, *parts):
        write_idx(tmp_path / folder, *parts)
        return data.load("mnist", tmp_path / folder, strict=True, download=False).checksum

    write_folders(tmp_path / "folders" / "mnist", train, test)
    original = data.load("mnist", tmp_path / "folders", strict=True, download=False).checksum
    assert len(original) == 64 and int(original, 16)
    assert checksum("idx", train, test) == original
    assert checksum("reordered", train.subset(torch.randperm(30)), test) == original
    pixels = train.images.clone()
    pixels[17, 0, 5, 5] ^= 1
    assert checksum("pixel", replace(train, images=pixels), test) != original
    assert checksum("label", replace(train, labels=train.labels.roll(1)), test) != original
    assert checksum("swapped", test, train) != original


def test_real_mnist(real_data_dir):
    loaded = data.load("mnist", real_data_dir, strict=True, download=False)
    assert loaded.train.images.shape == (60_000, 1, 28, 28) and len(loaded.test) == 10_000
    assert loaded.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert loaded.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert loaded.test.labels.bincount()[1] == 1135


# ---- cache ------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "mnist", pictures("mnist", 30, 1), pictures("mnist", 20, 2))


@pytest.fixture
def decoded(monkeypatch):
    """The paths that are decoded from now on."""
    paths, decode = [], sources._decode
    monkeypatch.setattr(
        sources, "_decode", lambda path, kind: paths.append(path) or decode(path, kind)
    )
    return paths


def load_folders(folders: Path) -> data.Data:
    return data.load("mnist", folders.parent, strict=True, download=False)


def test_the_second_time_nothing_is_decoded(folders, tmp_path, decoded, monkeypatch):
    first = load_folders(folders)
    assert len(decoded) == 50
    assert len(files_below(tmp_path / "cache" / "l2l_ref")) == 1, "one file, and no drafts"
    monkeypatch.chdir(tmp_path)
    for again in (load_folders(folders), data.load("mnist", ".", strict=True, download=False)):
        assert len(decoded) == 50
        assert torch.equal(again.train.images, first.train.images)
        assert torch.equal(again.test.labels, first.test.labels)
        assert (again.checksum, again.source) == (first.checksum, first.source)


@pytest.mark.parametrize("change", ["content", "new file", "removed file", "renamed class"])
def test_a_change_on_disk_rebuilds_the_cache(folders, tmp_path, decoded, change):
    first, path = load_folders(folders), next((folders / "train" / "class3").iterdir())
    black = Image.new("L", (28, 28))
    if change == "content":
        later = path.stat().st_mtime + 1
        black.save(path)
        os.utime(path, (later, later))
    elif change == "new file":
        black.save(path.with_name("new.png"))
    elif change == "removed file":
        path.unlink()
    else:  # class3 becomes the last class, in both parts
        for part in ("train", "test"):
            (folders / part / "class3").rename(folders / part / "zzz")
    second = load_folders(folders)
    assert len(decoded) > 50 and second.checksum != first.checksum
    assert len(files_below(tmp_path / "cache" / "l2l_ref")) == 1, "the stale one is replaced"


@pytest.mark.parametrize("damage", ["garbage", "cut short", "empty", "one pixel", "foreign"])
def test_a_broken_cache_is_rebuilt(folders, tmp_path, decoded, damage):
    first = load_folders(folders)
    [cache] = (tmp_path / "cache" / "l2l_ref").iterdir()
    content = cache.read_bytes()
    if damage == "one pixel":
        pixels = first.train.images.numpy().tobytes()
        assert content.count(pixels) == 1
        cache.write_bytes(content.replace(pixels, bytes([pixels[0] ^ 1]) + pixels[1:]))
    elif damage == "foreign":
        torch.save([1, 2, 3], cache)
    else:
        damaged = {"garbage": b"garbage", "cut short": content[:-900], "empty": b""}
        cache.write_bytes(damaged[damage])
    again = load_folders(folders)
    assert len(decoded) == 100 and torch.equal(again.train.images, first.train.images)
    load_folders(folders)
    assert len(decoded) == 100, "and is good again"


def test_a_cache_that_runs_code_does_not_run_it(folders, tmp_path, decoded):
    load_folders(folders)
    [cache] = (tmp_path / "cache" / "l2l_ref").iterdir()
    torch.save(Trap(tmp_path / "trapped"), cache)
    load_folders(folders)
    assert not (tmp_path / "trapped").exists() and len(decoded) == 100


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_cache_folder_that_cannot_be_written_is_no_error(folders, tmp_path, decoded):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert len(load_folders(folders).train) == 30
    assert len(load_folders(folders).train) == 30
    assert len(decoded) == 100


# ---- broken data ------------------------------------------------------------------------------


def must_fail(name, root, capsys, *named):
    """An InputError in one line that names `named`, and no stand-in, whatever `strict` says."""
    for strict in (False, True):
        with pytest.raises(InputError) as caught:
            data.load(name, root, strict=strict, download=True)
        message = str(caught.value)
        assert all(str(part) in message for part in named), message
        assert "\n" not in message and ": " in message, "a cause, then a remedy"
    assert "STAND-IN" not in capsys.readouterr().err


@pytest.mark.parametrize("file", IDX)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "too long", "header"])
def test_broken_mnist_files(tmp_path, capsys, file, damage):
    folder = write_idx(tmp_path, pictures("mnist", 30, 1), pictures("mnist", 20, 2))
    path, content = folder / file, (folder / file).read_bytes()
    if damage == "missing":
        path.unlink()
        must_fail("mnist", tmp_path, capsys, path, "missing")
        return
    damaged = {
        "empty": b"",
        "cut short": content[:-5],
        "too long": content + b"12345",
        "header": b"\xff" * 4 + content[4:],
    }
    path.write_bytes(damaged[damage])
    must_fail("mnist", tmp_path, capsys, folder, "train set" if "train" in file else "test set")


def test_mnist_that_is_not_mnist(tmp_path, capsys):
    good, small = pictures("mnist", 30, 1), pictures("mnist", 20, 2)
    cases = {
        "no images": (replace(good, images=good.images[:0], labels=good.labels[:0]), ""),
        "size": (replace(good, images=good.images[:, :, 4:24, 4:24].contiguous()), "[1, 20, 20]"),
        "label": (replace(good, labels=good.labels + 1), "labels from 1 to 10"),
        "count": (replace(good, labels=good.labels[:-1]), "30 images and 29 labels"),
    }
    for case, (part, words) in cases.items():
        for train, test in ((part, small), (small, part)):
            root = tmp_path / f"{case}{len(train)}"
            n = len(part.labels)
            folder = write_idx(root, train, test)
            if case == "count":  # write_idx counts images for both headers
                name = "train" if train is part else "t10k"
                labels = part.labels.to(torch.uint8).numpy().tobytes()
                path = folder / f"{name}-labels-idx1-ubyte"
                path.write_bytes(struct.pack(">2I", 0x801, n) + labels)
            must_fail("mnist", root, capsys, folder, words)


@pytest.mark.parametrize("damage", ["missing", "damaged", "no pickle", "meta"])
def test_broken_cifar10_files(tmp_path, capsys, monkeypatch, damage):
    folder = write_cifar(
        tmp_path, pictures("cifar10", 50, 1), pictures("cifar10", 20, 2), monkeypatch
    )
    if damage == "missing":
        (folder / "data_batch_4").unlink()
        must_fail("cifar10", tmp_path, capsys, folder / "data_batch_4", "missing")
    elif damage == "meta":
        (folder / "batches.meta").unlink()
        must_fail("cifar10", tmp_path, capsys, folder / "batches.meta", "missing")
    else:
        (folder / "test_batch").write_bytes(b"no pickle at all")
        if damage == "no pickle":  # even where the check of the sum lets it pass
            monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
        must_fail("cifar10", tmp_path, capsys, folder)


def test_broken_class_folders(tmp_path, capsys):
    train, test = pictures("cifar10", 20, 1), pictures("cifar10", 20, 2)
    pristine = write_folders(tmp_path / "pristine", train, test)

    def broken(case):
        root = tmp_path / case
        return root, Path(shutil.copytree(pristine, root / "cifar10"))

    root, folder = broken("no test")
    shutil.rmtree(folder / "test")
    must_fail("cifar10", root, capsys, folder / "test", "missing")

    root, folder = broken("no train")
    shutil.rmtree(folder / "train")
    must_fail("cifar10", root, capsys, folder / "train", "missing")

    root, folder = broken("nothing")
    shutil.rmtree(folder)
    folder.mkdir()
    must_fail("cifar10", root, capsys, folder, "missing")

    root, folder = broken("nine")
    shutil.rmtree(folder / "train" / "class4")
    must_fail("cifar10", root, capsys, folder / "train", "9 class folders")

    root, folder = broken("eleven")
    (folder / "test" / "extra").mkdir()
    must_fail("cifar10", root, capsys, folder / "test", "11 class folders")

    root, folder = broken("other names")
    (folder / "test" / "class4").rename(folder / "test" / "other")
    must_fail("cifar10", root, capsys, folder, "class4", "other")

    root, folder = broken("empty class")
    for path in (folder / "test" / "class4").iterdir():
        path.unlink()
    must_fail("cifar10", root, capsys, folder / "test" / "class4", "no png or jpg")

    root, folder = broken("not folders")
    shutil.rmtree(folder)
    folder.write_text("a file")
    must_fail("cifar10", root, capsys, folder)


@pytest.mark.parametrize("damage", ["empty", "text", "cut short", "size", "16 bit", "alpha"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_broken_images(tmp_path, capsys, name, damage):
    folder = write_folders(tmp_path / name, pictures(name, 20, 1), pictures(name, 20, 2))
    path = sorted((folder / "test" / "class7").iterdir())[0]
    if damage == "size":
        Image.new("RGB", (20, 30)).save(path)
        must_fail(name, tmp_path, capsys, path, "20x30")
    elif damage == "16 bit":
        Image.new("I;16", SHAPE[name][1:]).save(path)
        must_fail(name, tmp_path, capsys, path, "I;16")
    elif damage == "alpha":
        Image.new("RGBA", SHAPE[name][1:]).save(path)
        must_fail(name, tmp_path, capsys, path, "RGBA")
    else:
        content = path.read_bytes()
        damaged = {"empty": b"", "text": b"no image", "cut short": content[: len(content) // 2]}
        path.write_bytes(damaged[damage])
        must_fail(name, tmp_path, capsys, path, "cannot decode")
    assert not (tmp_path / "cache").exists(), "nothing broken is cached"


def test_bad_arguments(tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match="'cifar100'.*mnist, cifar10"):
        data.load("cifar100", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    must_fail("mnist", file, capsys, file, "is a file")

    def refuse(name, root):
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(sources, "find", refuse)
    must_fail("mnist", tmp_path, capsys, tmp_path, "Permission denied")


# ---- stand-in and download --------------------------------------------------------------------


@pytest.mark.parametrize("name, title", [("mnist", "MNIST"), ("cifar10", "CIFAR-10")])
def test_the_stand_in_says_what_it_is(tmp_path, capsys, name, title):
    loaded = data.load(name, tmp_path, download=False)
    assert (loaded.source, loaded.stand_in) == ("stand-in", True)
    assert len(loaded.train) == 50 and loaded.train.images.shape[1:] == SHAPE[name]
    assert len(loaded.test) == 20 and loaded.test.labels.dtype == torch.int64
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "STAND-IN DATA" in lines[1]
    assert lines[0] == lines[-1] == "#" * len(lines[0]) and len(lines) > 5
    assert all(len(line) == len(lines[0]) for line in lines), "a box"
    text = " ".join(line.strip("# ") for line in lines)
    assert f"NOT {title} results" in text and "switched off" in text
    assert str(tmp_path / name) in text and str(tmp_path / sources.KINDS[name].folder) in text
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("download, reason", [(False, "switched off"), (True, "no network")])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_strict_never_stands_in(tmp_path, capsys, name, download, reason):
    root = tmp_path / "data"
    with pytest.raises(InputError) as caught:
        data.load(name, root, strict=True, download=download)
    for part in (root / name, root / sources.KINDS[name].folder, reason, "download"):
        assert str(part) in str(caught.value)
    assert capsys.readouterr().err == "" and not root.exists()


@pytest.fixture
def online(monkeypatch):
    """The host answers; returns a function that sets what torchvision's download then does."""
    monkeypatch.setattr(sources, "_knock", lambda url: None)

    def behave(download):
        monkeypatch.setattr(datasets.MNIST, "download", download)

    return behave


@pytest.mark.parametrize("error", [RuntimeError("no mirror"), OSError("disk full"), EOFError()])
def test_a_failed_download_leaves_nothing_behind(tmp_path, capsys, online, error):
    def half(self):
        assert socket.getdefaulttimeout() == sources.PATIENCE
        print("chatter")
        os.makedirs(self.raw_folder)
        Path(self.raw_folder, IDX[0]).write_bytes(b"half of it")
        raise error

    online(half)
    (tmp_path / "mine").write_text("")
    before = socket.getdefaulttimeout()
    assert data.load("mnist", tmp_path).stand_in
    out, err = capsys.readouterr()
    assert files_below(tmp_path) == ["mine"] and socket.getdefaulttimeout() == before
    assert "chatter" not in out + err and (str(error) or "EOFError") in err
    with pytest.raises(InputError, match="download failed"):
        data.load("mnist", tmp_path, strict=True)


def test_an_interrupted_download_leaves_nothing_behind(tmp_path, online):
    def interrupted(self):
        os.makedirs(self.raw_folder)
        raise KeyboardInterrupt

    online(interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist", tmp_path)
    assert files_below(tmp_path) == [] and socket.getdefaulttimeout() is None


def test_a_download_is_found_the_next_time(tmp_path, capsys, online):
    train, test = pictures("mnist", 30, 1), pictures("mnist", 20, 2)
    calls = []

    def complete(self):
        calls.append(self.root)
        write_idx(Path(self.root), train, test)
        assert not (tmp_path / "new" / "MNIST").exists(), "in place only when it is complete"

    online(complete)
    first = data.load("mnist", tmp_path / "new", strict=True)
    second = data.load("mnist", tmp_path / "new", strict=True)
    assert len(calls) == 1 and first.source == second.source == "MNIST"
    assert torch.equal(first.train.images, train.images) and first.checksum == second.checksum
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"MNIST"}
    assert "STAND-IN" not in capsys.readouterr().err


KNOCK = sources._knock  # as it was before `apart` took its place


def test_knocking_is_bounded_in_time(monkeypatch):
    def answer(action):
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: action())

    def refuse():
        raise urllib.error.HTTPError("http://h", 403, "Forbidden", None, None)

    def no_route():
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sources, "PATIENCE", 0.2)
    answer(lambda: open(os.devnull))
    KNOCK("http://h")
    answer(refuse)
    KNOCK("http://h")  # who refuses is there
    answer(no_route)
    with pytest.raises(OSError, match="no route"):
        KNOCK("http://h")
    answer(lambda: time.sleep(3) or open(os.devnull))
    start = time.monotonic()
    with pytest.raises(OSError, match="does not answer"):
        KNOCK("http://h")
    assert time.monotonic() - start < 2


# ---- the stand-ins themselves -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_stand_ins_are_balanced_and_seeded(name):
    draw = DRAW[name]
    x, y, x_test, y_test = draw(1200, 300)
    assert x.shape == (1200, *SHAPE[name]) and x_test.shape == (300, *SHAPE[name])
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == y_test.dtype == torch.int64
    assert y.bincount().tolist() == [120] * 10 and y_test.bincount().tolist() == [30] * 10
    assert len(y[:100].unique()) == 10, "the labels are mixed"
    assert len(x.flatten(1).unique(dim=0)) == 1200, "no picture comes twice"

    torch.manual_seed(1)
    again = draw(1200, 10)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    other = draw(1200, 10, seed=1)
    assert not torch.equal(other[0], x) and not torch.equal(other[1], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, expected", [("mnist", "ee0bb8ab4472"), ("cifar10", "349beac21ed8")])
def test_stand_ins_are_the_same_bytes_everywhere(name, expected, dtype):
    stand_in._distance_table.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_default_dtype(dtype)  # must not matter
    try:
        tensors = DRAW[name](700, 100, seed=3)
        assert torch.get_num_threads() == 2, "the caller's threads are given back"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    assert digest.startswith(expected)


def test_digits_have_a_black_border_and_ink_within():
    x = DRAW["mnist"](2000, 0)[0][:, 0]
    border = torch.ones(28, 28, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (x[:, border] > 0).float().mean() < 0.02
    assert 0.7 < (x == 0).float().mean() < 0.9
    assert (x.amax((1, 2)) > 120).all(), "each has a visible stroke"


def accuracy_after(model: nn.Module, parts, steps: int, lr: float) -> float:
    """Test accuracy of `model` after `steps` of Adam on batches of 128."""
    train, test = ImageSet(*parts[:2]), ImageSet(*parts[2:])
    optimizer = torch.optim.Adam(model.parameters(), lr)
    stream = train.batches(128, torch.Generator().manual_seed(0))
    for x, y in islice(stream, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


def test_digits_can_be_learned_but_not_by_a_line_alone():
    torch.manual_seed(0)
    parts = DRAW["mnist"](10_000, 2000)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))
    assert accuracy_after(mlp, parts, steps=200, lr=1e-2) > 0.85
    linear = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    assert 0.6 < accuracy_after(linear, parts, steps=200, lr=1e-3) < 0.9


def test_coloured_digits_need_a_convolution():
    torch.manual_seed(0)
    parts = DRAW["cifar10"](10_000, 1000)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    assert accuracy_after(linear, parts, steps=100, lr=1e-3) < 0.25
    blocks = [
        layer
        for channels in (3, 16, 16)
        for layer in (
            nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        )
    ]  # fmt: skip
    head = [nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)]
    assert accuracy_after(nn.Sequential(*blocks, *head), parts, steps=100, lr=3e-3) > 0.5
