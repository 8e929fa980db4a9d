"""The stand-ins: the same bytes everywhere, and about as hard as what they stand for."""

import hashlib
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from conftest import DRAW, SHAPE, generator
from torch import nn

from l2l_ref import problems
from l2l_ref.data import ImageSet


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_stand_ins_are_balanced_and_seeded(name):
    draw = DRAW[name]
    x, y, x_test, y_test = draw(400, 100)
    assert x.shape == (400, *SHAPE[name]) and x_test.shape == (100, *SHAPE[name])
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == y_test.dtype == torch.int64
    assert y.bincount().tolist() == [40] * 10 and y_test.bincount().tolist() == [10] * 10
    assert len(y[:100].unique()) == 10, "the labels are mixed"
    assert len(x.flatten(1).unique(dim=0)) == 400, "no picture comes twice"

    torch.manual_seed(1)
    again = draw(400, 10)
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    other = draw(400, 10, seed=1)
    assert not torch.equal(other[0], x) and not torch.equal(other[1], y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, expected", [("mnist", "8cb453e1b931"), ("cifar10", "581e306fe535")])
def test_stand_ins_are_the_same_bytes_everywhere(name, expected, dtype):
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


def accuracy_after(model: nn.Module, parts, steps: int, lr: float) -> float:
    """Test accuracy of `model` after `steps` of Adam on batches of 128."""
    train, test = ImageSet(*parts[:2]), ImageSet(*parts[2:])
    optimizer = torch.optim.Adam(model.parameters(), lr)
    stream = train.batches(128, generator())
    for x, y in islice(stream, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


def test_digits_can_be_learned_but_not_by_a_line_alone():
    torch.manual_seed(0)
    parts = DRAW["mnist"](3000, 500)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))
    assert accuracy_after(mlp, parts, steps=200, lr=1e-2) > 0.85
    linear = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    assert 0.6 < accuracy_after(linear, parts, steps=200, lr=1e-3) < 0.9


def test_coloured_digits_need_a_convolution():
    torch.manual_seed(0)
    parts = DRAW["cifar10"](3000, 300)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    assert accuracy_after(linear, parts, steps=100, lr=1e-3) < 0.25
    assert accuracy_after(problems.make("cifar10").build(), parts, steps=80, lr=3e-3) > 0.3
