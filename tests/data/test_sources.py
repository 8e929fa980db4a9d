"""Every place that data comes from, and what is broken, which is said to be broken."""

import os
import pickle
import shutil
import socket
import struct
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import SHAPE, drawn, generator
from PIL import Image
from torchvision import datasets

from l2l_ref import data
from l2l_ref.data import ImageSet, sources
from l2l_ref.errors import InputError

IDX = "MNIST/raw"
PICKLES = "cifar-10-batches-py"


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """No network, and stand-ins of 50 + 20 pictures."""

    def no_network(self):
        raise OSError("no network in tests")

    for dataset in (datasets.MNIST, datasets.CIFAR10):
        monkeypatch.setattr(dataset, "download", no_network)
    monkeypatch.setattr(sources, "stand_in", lambda name, seed: drawn(name, 50, 20))


def sets(name: str) -> list[ImageSet]:
    """Random pixels to train on and to test on; image i is of class i mod 10."""
    g = generator()
    return [
        ImageSet(torch.randint(256, (count, *SHAPE[name]), dtype=torch.uint8, generator=g),
                 torch.arange(count) % 10)
        for count in (50, 20)
    ]  # fmt: skip


def find(name: str, root: Path) -> data.Data:
    """What is there, never a stand-in."""
    return data.load(name, root, strict=True)


def write_idx(root: Path, train: ImageSet, test: ImageSet) -> Path:
    """torchvision's layout of MNIST: big-endian sizes, then bytes."""
    folder = root / IDX
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in ((train, "train"), (test, "t10k")):
        n, _, *sides = part.images.shape
        header = struct.pack(">4I", 0x803, n, *sides)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + part.images.numpy().tobytes())
        labels = bytes(part.labels.tolist())
        header = struct.pack(">2I", 0x801, len(labels))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels)
    return folder


def write_folders(root: Path, name: str, sets: list[ImageSet], suffix: str = "png") -> Path:
    for part, of in zip(("train", "test"), sets, strict=True):
        for i, (pixels, label) in enumerate(zip(of.images, of.labels, strict=True)):
            path = root / name / part / f"class{label}" / f"{i:04}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
            Image.fromarray(array.numpy()).save(path)
    return root / name


def write_pickles(root: Path, train: ImageSet, test: ImageSet, monkeypatch) -> Path:
    """torchvision's layout of CIFAR-10, of which it shall believe that it is the official one."""
    folder = root / PICKLES
    folder.mkdir(parents=True)
    batches = zip(train.images.chunk(5), train.labels.chunk(5), strict=True)
    parts = {f"data_batch_{i}": ImageSet(*batch) for i, batch in enumerate(batches, 1)}
    for name, part in {**parts, "test_batch": test}.items():
        content = {"data": part.images.flatten(1).numpy(), "labels": part.labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    return folder


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes sets in a layout below tmp_path; returns the folder."""

    def written(layout: str, sets: list[ImageSet], suffix: str = "png") -> Path:
        if layout == IDX:
            return write_idx(tmp_path, *sets)
        if layout == PICKLES:
            return write_pickles(tmp_path, *sets, monkeypatch)
        return write_folders(tmp_path, layout, sets, suffix)

    return written


# ---- whole data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, layout, suffix, source",
    [
        ("mnist", IDX, "", "other images in MNIST's layout"),
        ("cifar10", PICKLES, "", "CIFAR-10"),
        ("mnist", "mnist", "png", "MNIST (PNG folders)"),
        ("cifar10", "cifar10", "JPEG", "CIFAR-10 (JPEG copy)"),
    ],
)
def test_layouts(tmp_path, write, name, layout, suffix, source):
    """Of class folders too a prefix holds every class."""
    folder = write(layout, written := sets(name), suffix)
    if suffix:
        (folder / "train" / "class0" / "._0000.png").write_bytes(b"left by a Mac")
        (folder / "train" / "class0" / "notes.txt").write_text("not an image")
    loaded = find(name, tmp_path)
    assert loaded.source == source
    for part, expected in zip((loaded.train, loaded.test), written, strict=True):
        assert part.images.is_contiguous() and part.images.shape == expected.images.shape
        assert torch.equal(part.images, expected.images) or suffix == "JPEG"
        assert torch.equal(part.labels, expected.labels) and part.labels.dtype == torch.int64


def test_the_checksum_is_that_of_pictures_and_labels_alone(tmp_path):
    train, test = sets("mnist")
    pixels = train.images.clone()
    pixels[17, 0, 5, 5] ^= 1
    write_folders(tmp_path / "folders", "mnist", [train, test])
    several = {
        "idx": (train, test),
        "reordered": (train.shuffled(generator()), test),
        "pixel": (ImageSet(pixels, train.labels), test),
        "label": (ImageSet(train.images, train.labels.roll(1)), test),
        "swapped": (test, train),
    }
    for name, parts in several.items():
        write_idx(tmp_path / name, *parts)
    found = {name: find("mnist", tmp_path / name).checksum for name in ("folders", *several)}
    assert len(found["idx"]) == 64 and found["idx"] == found["folders"] == found["reordered"]
    assert len(set(found.values())) == 4


def test_real_mnist():
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("L2L_DATA_DIR", shared))
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip("no real MNIST: set L2L_DATA_DIR to a folder that torchvision can read")
    loaded = find("mnist", folder)
    assert loaded.source == "MNIST"  # its checksum is that of the real one
    assert len(loaded.train) == 60_000 and loaded.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


# ---- broken data ------------------------------------------------------------------------------


@pytest.fixture
def must_fail(tmp_path, capsys):
    """name, words: an InputError in one line that has them, and no stand-in, strict or not."""

    def check(name, *words, root=tmp_path):
        for strict in (False, True):
            with pytest.raises(InputError) as caught:
                data.load(name, root, strict=strict)
            message = str(caught.value)
            assert all(str(part) in message for part in words), message
            assert "\n" not in message and ": " in message, "a cause, then a remedy"
        assert "stand for it" not in capsys.readouterr().err

    return check


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def picture(mode, size):
    return lambda folder: Image.new(mode, size).save(folder / "train/class0/0000.png")


def with_test(change):
    """MNIST whose test set is not MNIST's."""

    def damage(folder):
        train, test = sets("mnist")
        write_idx(folder.parents[1], train, ImageSet(*change(test.images, test.labels)))

    return damage


@pytest.mark.parametrize(
    "layout, damage, where, words",
    [
        (IDX, lambda f: (f / "train-images-idx3-ubyte").unlink(), "", "train set"),
        (IDX, lambda f: cut_short(f / "t10k-labels-idx1-ubyte"), "", "test set"),
        (IDX, lambda f: (shutil.rmtree(f.parent), f.parent.touch()), "", "train set"),
        (IDX, with_test(lambda x, y: (x[..., 4:].contiguous(), y)), "", "[20, 1, 28, 24]"),
        (IDX, with_test(lambda x, y: (x, y + 1)), "", "20 labels of 11 classes"),
        (IDX, with_test(lambda x, y: (x, y[:-1])), "", "[20, 1, 28, 28] and 19"),
        (PICKLES, lambda f: (f / "test_batch").write_bytes(b"no pickle"), "", "test set"),
        ("cifar10", lambda f: shutil.rmtree(f / "test"), "test", "No such file"),
        ("cifar10", lambda f: shutil.rmtree(f / "train/class4"), "", "9 and 10 class folders"),
        ("cifar10", lambda f: (f / "test/class4").rename(f / "test/other"), "", "the same ten"),
        ("cifar10", lambda f: [x.unlink() for x in (f / "test/class4").iterdir()], "test",
         "no valid file"),
        ("cifar10", lambda f: (shutil.rmtree(f), f.symlink_to("nowhere")), "", ""),
        ("cifar10", picture("RGB", (20, 30)), "train/class0/0000.png", "it is 20x30"),
        ("cifar10", picture("RGBA", (32, 32)), "train/class0/0000.png", "in mode RGBA"),
        ("cifar10", lambda f: cut_short(f / "test/class3/0003.png"), "test/class3/0003.png", ""),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(write, must_fail, monkeypatch, layout, damage, where, words):
    name = "mnist" if layout == IDX else "cifar10"
    folder = write(layout, sets(name))
    damage(folder)
    if words:  # seen before anything is decoded
        monkeypatch.setattr(Image.Image, "convert", None)
    must_fail(name, folder / where, words)


def test_bad_arguments(tmp_path, must_fail, monkeypatch):
    with pytest.raises(InputError, match="'cifar100'.*mnist, cifar10"):
        data.load("cifar100", tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    must_fail("mnist", tmp_path / "loop", "is no folder", root=tmp_path / "loop")

    def refuse(kind, root):
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(sources, "find", refuse)
    must_fail("mnist", tmp_path, "Permission denied")


def test_a_broken_torchvision_is_not_the_datas_fault(write, must_fail, monkeypatch):
    class Broken(ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    write(IDX, sets("mnist"))
    monkeypatch.setitem(sys.modules, "torchvision", Broken("torchvision"))
    must_fail("mnist", "torchvision, which reads images, cannot be imported (operator torchvision")


# ---- stand-in and download --------------------------------------------------------------------


@pytest.mark.parametrize("name, title", [("mnist", "MNIST"), ("cifar10", "CIFAR-10")])
def test_the_stand_in_says_what_it_is(tmp_path, capsys, name, title):
    root = tmp_path / "data"
    loaded = data.load(name, root)
    assert loaded.source == "stand-in" and (len(loaded.train), len(loaded.test)) == (50, 20)
    out, err = capsys.readouterr()
    assert out == "" and f"NOT {title} results" in err
    with pytest.raises(InputError) as caught:
        data.load(name, root, strict=True)
    for said in (err, str(caught.value)):
        for part in (root, f"{name}/{{train", sources.KINDS[name].folder, "no network"):
            assert str(part) in said
    assert "results" not in capsys.readouterr().err and not root.exists()


@pytest.mark.parametrize("error", [OSError("disk full"), EOFError(), KeyboardInterrupt()])
def test_a_download_that_fails_leaves_nothing_behind(tmp_path, capsys, monkeypatch, error):
    """But what another process puts into the new folder meanwhile."""
    root = tmp_path / "data"

    def half(self):
        assert socket.getdefaulttimeout() == sources.PATIENCE
        Path(self.raw_folder).mkdir(parents=True)
        (root / "of another").touch()
        raise error

    monkeypatch.setattr(datasets.MNIST, "download", half)
    interrupted = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        assert data.load("mnist", root).source == "stand-in"
        assert f"download failed: {str(error) or 'EOFError'}" in capsys.readouterr().err
    assert [path.name for path in root.iterdir()] == ["of another"]
    assert socket.getdefaulttimeout() is None


def test_what_another_process_has_downloaded_meanwhile_is_found(tmp_path, monkeypatch):
    def too_late(self):
        write_idx(Path(self.root), *sets("mnist"))
        write_idx(tmp_path, *sets("mnist"))

    monkeypatch.setattr(datasets.MNIST, "download", too_late)
    assert len(find("mnist", tmp_path).train) == len(sets("mnist")[0])


def test_a_download_is_found_the_next_time(tmp_path, monkeypatch):
    written, calls, root = sets("mnist"), [], tmp_path / "new"

    def complete(self):
        calls.append(self.root)
        write_idx(Path(self.root), *written)
        assert not (root / "MNIST").exists(), "in place only when it is complete"

    monkeypatch.setattr(datasets.MNIST, "download", complete)
    first, second = find("mnist", root), find("mnist", root)
    assert len(calls) == 1 and torch.equal(first.train.images, written[0].images)
    assert first.checksum == second.checksum
    assert [path.name for path in root.iterdir()] == ["MNIST"]
