"""Evaluation: counts by hand, the margins of a linear model, and nothing left behind."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import snapshot
from torch import Tensor, nn

from l2l_ref.attacks import fgsm, none, pgd
from l2l_ref.errors import InputError
from l2l_ref.evaluate import is_collapsed, losses, robust_accuracy


def threshold(x: Tensor) -> Tensor:
    """Class 1 where the only pixel is above a half."""
    return torch.cat([0.5 - x, x - 0.5], 1)


SEVEN = (
    torch.tensor([[0.1], [0.2], [0.4], [0.6], [0.8], [0.9], [0.7]]),
    torch.tensor([0, 0, 0, 1, 1, 1, 0]),  # the last one is wrong already
)


def batch_norm_net() -> tuple[nn.Module, Tensor, Tensor]:
    """A network whose predictions differ between its modes, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.rand(30, 4), torch.arange(30) % 3
    with torch.no_grad():
        model[1](10 * torch.randn(50, 8) + 5)
        assert (model(x).argmax(1) != model.eval()(x).argmax(1)).any()
    return model.train(), x, y


def rude(model, x, y):
    """A foreign attack that changes the mode and runs backward, and would fail under no_grad."""
    model.train()
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    return (x + 0.1 * x.grad.sign()).clamp(0, 1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 500])
def test_counts_by_hand(batch_size):
    accuracy = partial(robust_accuracy, threshold, SEVEN, batch_size=batch_size)
    assert accuracy(none) == 6 / 7
    assert accuracy(partial(fgsm, eps=0.15)) == 4 / 7  # 0.4 and 0.6 cross the threshold
    assert accuracy(partial(pgd, eps=0.35)) == 2 / 7  # so do 0.2 and 0.8
    assert accuracy(partial(pgd, eps=0.45)) == 0


def test_of_two_attacks_the_survivors_of_both_count():
    """Each breaks another part; what the first broke the second does not meet."""
    met = []

    def breaks(which):
        def attack(model, x, y):
            met.append((which, x.flatten().tolist()))
            hit = (x > 0.5) if which == "high" else (x < 0.15)
            return torch.where(hit, 1 - x, x)

        return attack

    images = SEVEN[0][:6], SEVEN[1][:6]  # 0.1, 0.2, 0.4, 0.6, 0.8, 0.9; all right
    low, high = breaks("low"), breaks("high")
    for attacks in ([low, high], [high, low], (low, high, none)):
        assert robust_accuracy(threshold, images, attacks, batch_size=4) == 2 / 6
    assert met[:3] == [("low", pytest.approx([0.1, 0.2, 0.4, 0.6])),
                       ("high", pytest.approx([0.2, 0.4, 0.6])),
                       ("low", pytest.approx([0.8, 0.9]))]  # fmt: skip
    met.clear()
    assert robust_accuracy(threshold, images, [low, high], restarts=2) == 2 / 6
    assert [(which, len(x)) for which, x in met] == [
        ("low", 6), ("low", 5), ("high", 5), ("high", 2)]  # fmt: skip


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [0.0, math.nan], [math.nan, math.nan]])
def test_nan_logits_are_wrong(logits):
    for y in (0, 1):
        images = torch.rand(3, 1), torch.full((3,), y)
        assert robust_accuracy(lambda x: torch.tensor(logits).expand(len(x), 2), images, none) == 0


@pytest.mark.parametrize("attack", [none, partial(fgsm, eps=0.0), rude], ids=["none", "0", "rude"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluates_in_eval_mode_and_leaves_nothing_behind(attack, training):
    model, x, y = batch_norm_net()
    x_adv = attack(copy.deepcopy(model), x, y).detach()
    model.eval()
    with torch.no_grad():
        expected = (model(x_adv).argmax(1) == y).float().mean().item()
        expected_losses = F.cross_entropy(model(x), y), F.cross_entropy(model(x_adv), y)
    model.train(training)
    model[0].eval()
    before = snapshot(model)
    with torch.no_grad():  # as an evaluation is often called
        assert robust_accuracy(model, (x, y), attack) == pytest.approx(expected)
        torch.testing.assert_close(losses(model, x, y, attack), expected_losses)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("loss", "accuracy", "classes", "collapsed"),
    [
        (math.log(10), 0.1, 10, True),
        (1.0099 * math.log(10), 0.1, 10, True),
        (0.9901 * math.log(10), 0.15, 10, True),
        (1.0101 * math.log(10), 0.1, 10, False),
        (0.9899 * math.log(10), 0.1, 10, False),
        (math.log(10), 0.16, 10, False),  # as uncertain, but it has learned
        (math.log(10), 0.0, 10, True),
        (math.log(2), 0.5, 2, True),
        (math.log(2), 0.5, 10, False),
        (math.nan, 0.1, 10, False),
    ],
)
def test_is_collapsed(loss, accuracy, classes, collapsed):
    assert is_collapsed(loss, accuracy, classes) is collapsed


def test_numbers_out_of_range_are_named():
    empty = torch.rand(0, 1), torch.arange(0)
    for images, attack, options, words in (
        (SEVEN, none, {"restarts": 0}, "restarts is 0"),
        (SEVEN, none, {"batch_size": -1}, "batch_size is -1"),
        (SEVEN, none, {"restarts": 1.5}, "restarts is 1.5, but must be a whole number"),
        (SEVEN, [], {}, "attack is an empty list"),
        (empty, none, {}, "0 samples"),
    ):
        with pytest.raises(InputError, match=words):
            robust_accuracy(threshold, images, attack, **options)
