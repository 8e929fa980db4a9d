"""A sound attack on an unsound occasion: rounding, modes, types, batches of nothing."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from l2l_ref import attacks
from l2l_ref.attacks import fgsm, n_fgsm, none, pgd
from l2l_ref.errors import InputError
from l2l_ref.evaluate import losses, robust_accuracy
from l2l_ref.review import review

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
