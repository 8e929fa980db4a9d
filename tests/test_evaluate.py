"""Evaluation: counts by hand, the margins of a linear model, and nothing left behind."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import snapshot
from torch import Tensor, nn

from l2l_ref import attacks
from l2l_ref.attacks import fgsm, n_fgsm, none, pgd
from l2l_ref.errors import InputError
from l2l_ref.evaluate import is_collapsed, losses, robust_accuracy
from l2l_ref.review import review


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
    for several in ([low, high], [high, low], (low, high, none)):
        assert robust_accuracy(threshold, images, several, batch_size=4) == 2 / 6
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
        (SEVEN, none, {"restarts": 1.5}, "restarts is 1.5: it must be a whole number"),
        (SEVEN, [], {}, "attack is an empty list"),
        (empty, none, {}, "0 samples"),
    ):
        with pytest.raises(InputError, match=words):
            robust_accuracy(threshold, images, attack, **options)


# ---- a sound attack on an unsound occasion: rounding, types, batches of nothing -----------------


ONE = partial(pgd, eps=0.1, steps=1)


def net(*more: nn.Module, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *more, nn.ReLU(), nn.Linear(8, classes))


def batch(b: int = 8, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(b, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(b) % classes


class Rounded(nn.Module):
    """Right on class k at x = k/2, and without a gradient anywhere."""

    def forward(self, x):
        return -(x[:, :1].round(decimals=1) - torch.arange(3) / 2).abs()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", list(attacks.LOSSES))
def test_a_sure_network_in_float16_is_attacked_as_in_float32(norm, loss):
    model, (x, _) = net(), batch()
    with torch.no_grad():
        model[-1].weight *= 100  # the cross-entropy's gradient is below 6e-8, float16's least
        model[-1].bias += torch.tensor([30.0, 0.0, 0.0])
    y = torch.zeros(len(x), dtype=torch.int64)
    attack = partial(pgd, eps=0.1, steps=2, random_start=False, norm=norm, loss=loss)
    expected = attack(model, x, y)
    with torch.autocast("cpu", dtype=torch.float16):
        found = attack(model, x, y)
    moved = (expected - x).flatten(1)
    assert moved.abs().amax(1).min() > 0.01
    assert nn.functional.cosine_similarity(moved, (found - x).flatten(1)).min() > 0.95


def test_who_has_no_gradient_is_counted():
    x = torch.tensor([[0.0], [0.5], [1.0], [0.4]])
    y = torch.tensor([0, 1, 2, 0])  # the last one is wrong
    with pytest.warns(UserWarning, match="3 of the 3 samples that count as robust have a gradient"):
        assert robust_accuracy(Rounded(), (x, y), [none, partial(fgsm, eps=0.01)]) == 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        robust_accuracy(Rounded(), (x, y), none)
        k = torch.arange(3.0)  # right where `Rounded` is; of two pixels one has no gradient
        idle = lambda x: x[:, :1] * k - k**2 / 4 + 0 * x[:, 1:]  # noqa: E731
        assert robust_accuracy(idle, (x.expand(4, 2), y), partial(fgsm, eps=0.01)) == 0.75
        robust_accuracy(lambda x: 0 * x + torch.eye(3)[0], (x, y), partial(fgsm, eps=0.01))
    found = review(Rounded(), (x, y), eps=0.01, steps=1)
    assert "some that survive have a gradient of exactly zero" in found.alarms


class Standardised(nn.Linear):
    """Divides by each sample's deviation, whose gradient at 0 is NaN."""

    def forward(self, x):
        x = x.flatten(1)
        deviation = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
        return super().forward(x / (0.1 + deviation))


STILL = partial(pgd, eps=1e-9, random_start=False)


@pytest.mark.parametrize(
    "attack",
    [partial(fgsm, eps=1e-9), partial(n_fgsm, eps=0.0), STILL, partial(STILL, norm="l2")],
)
def test_a_gradient_that_is_nan_is_no_robustness(attack):
    model, (x, y) = Standardised(16, 3), batch()
    x[[2, 5]] = 0
    for use in (lambda: attack(model, x, y), lambda: robust_accuracy(model, (x, y), attack)):
        with pytest.raises(InputError, match="gradient of 2 of 8 samples is NaN"):
            use()


@pytest.mark.parametrize("norm", attacks.NORMS)
@pytest.mark.parametrize("b, classes", [(0, 3), (1, 3), (1, 1), (5, 1), (5, 2), (5, 100)])
def test_any_number_of_samples_and_classes(norm, b, classes):
    model, (x, y) = net(classes=classes), batch(b, classes)
    for loss in attacks.LOSSES:
        for attack in (fgsm, pgd):
            x_adv = attack(model, x, y, eps=0.1, norm=norm, loss=loss)
            assert x_adv.shape == x.shape and x_adv.isfinite().all()
    assert n_fgsm(model, x, y, eps=0.1).shape == x.shape
    if b:
        assert 0 <= robust_accuracy(model, (x, y), ONE) <= 1
        return
    for use in (robust_accuracy, partial(review, eps=0.1)):
        with pytest.raises(InputError, match="0 samples"):
            use(model, (x, y), *[ONE] * (use is robust_accuracy))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda x, y: ((x * 255).byte(), y), "x is torch.uint8: give floats"),
        (lambda x, y: (x, y.int()), r"y is torch.int32 \[8\] .*y.long"),
        (lambda x, y: (x, nn.functional.one_hot(y)), r"y is torch.int64 \[8, 3\] .*argmax"),
        (lambda x, y: (x, y[:5]), r"y is torch.int64 \[5\] for 8 samples"),
    ],
)
def test_what_are_no_samples_is_one_sentence(spoil, words):
    model, (x, y) = net(), spoil(*batch())
    for use in (
        lambda: fgsm(model, x, y, eps=0.1), lambda: n_fgsm(model, x, y, eps=0.1),
        lambda: pgd(model, x, y, eps=0.1, norm="l2"), lambda: losses(model, x, y, ONE),
        lambda: robust_accuracy(model, (x, y), none), lambda: review(model, [(x, y)], eps=0.1),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            use()
