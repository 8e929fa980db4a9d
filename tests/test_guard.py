"""An attack of any library trains, meta-trains and judges as ours does, or is refused by name."""

import copy
from functools import partial

import pytest
import torch
from conftest import SMALL, generator, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from l2l_ref.attacks import fgsm, none, pgd
from l2l_ref.episode import Episode
from l2l_ref.errors import InputError
from l2l_ref.evaluate import losses, robust_accuracy
from l2l_ref.guard import leaves_no_trace
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.meta_settings import MetaSettings
from l2l_ref.meta_training import meta_train
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method, train

EPS = 0.1
ours = partial(fgsm, eps=EPS)


def images(seed=0, b=16):
    return torch.rand(b, 5, generator=generator(seed)), torch.arange(b) % 3


def by_backward(model, x, y):
    """FGSM as most libraries have it: `backward` adds to every gradient that there is."""
    model.eval()
    x = x.requires_grad_()
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    return (x + EPS * x.grad.sign()).clamp(0, 1)  # with a graph


def that_sets_gradients_to_none(model, x, y):
    x_adv = by_backward(model, x, y)
    model.zero_grad()
    for param in model.parameters():
        param.grad = None
    return x_adv


def that_writes_into_x(model, x, y):
    x_adv = by_backward(model, x.clone(), y)
    x.data.copy_(x_adv)
    y.fill_(0)
    return x


def that_freezes(model, x, y):
    x_adv = by_backward(model, x, y)
    return x_adv if model.requires_grad_(False) else None


RUDE = [by_backward, that_sets_gradients_to_none, that_writes_into_x, that_freezes]
rude = pytest.mark.parametrize("attack", RUDE)


def endless_images():
    return iter([images(seed) for seed in range(1000)])


@rude
@pytest.mark.parametrize("alphas", [(0.5, 0.5), (1.0, 0.0)])
def test_meta_training_computes_the_same_bits_under_any_attack(attack, alphas):
    def trained(attack):
        phi = new_phi(SMALL.build(), generator=generator(), odd=True, nominal=True)
        settings = MetaSettings(3, steps=6, unroll=3, read_alpha=alphas[0], alpha=alphas[1])
        history = meta_train(
            phi, settings, lambda n: Episode(SMALL.draw(generator(n)), endless_images(), attack)
        )
        return history.loss, history.norm, weights(phi)

    (loss, norm, phi), (own_loss, own_norm, own_phi) = trained(attack), trained(ours)
    assert loss == own_loss and norm == own_norm and torch.equal(phi, own_phi)
    assert loss != trained(none)[0]


@rude
def test_transfer_computes_the_same_bits_under_any_attack(attack):
    phi = new_phi(SMALL.build(), generator=generator(), nominal=True)
    x, y = images(99)

    def trained(attack, optimizer):
        model = SMALL.draw(generator(1))
        train(
            model, Method("", optimizer, alpha=0.5), endless_images(), loss=SMALL.loss,
            attack=attack, steps=6, record=partial(losses, x=x, y=y, attack=attack),
        )  # fmt: skip
        return weights(model)

    for optimizer in (
        partial(LearnedOptimizer.for_model, phi=phi),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    ):
        assert torch.equal(trained(attack, optimizer), trained(ours, optimizer))


def test_x_and_y_are_what_they_were():
    x, y = images()
    kept = x.clone(), y.clone()
    x_adv = leaves_no_trace(that_writes_into_x)(SMALL.draw(generator()), x, y)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1]) and not torch.equal(x_adv, x)
    assert x_adv.grad_fn is None and not x_adv.requires_grad


def moved(model, x, y, by=0.3):
    return (x + by).clamp(0, 1)


@pytest.mark.parametrize(
    "attack, eps, words",
    [
        (lambda m, x, y: (x, x, y), None, "'<lambda>' returned a tuple: it must return x_adv"),
        (lambda m, x, y: x.numpy(), None, "returned a ndarray"),
        (lambda m, x, y: x[:3], None, r"returned torch.float32 \[3, 5\] on cpu for .* \[16, 5\]"),
        (lambda m, x, y: x.double(), None, r"returned torch.float64 \[16, 5\]"),
        (lambda m, x, y: x.log().log(), None, "returned NaN or infinity where x is finite"),
        (moved, 0.1, r"'moved' moved a pixel by 0.3 but eps is 0.1"),
        (partial(moved, by=0.2), 0.1, r"'moved' moved a pixel by 0.2 but eps is 0.1"),
    ],
)
def test_what_is_no_adversarial_image_is_named(attack, eps, words):
    x, y = images()
    model = SMALL.draw(generator())
    with pytest.raises(InputError, match=words):
        leaves_no_trace(attack, eps=eps)(model, x, y)
    if eps is None:
        phi = new_phi(model, generator=generator())
        settings = MetaSettings(1, steps=2, alpha=0.5)
        with pytest.raises(InputError, match=words):
            meta_train(phi, settings, lambda n: Episode(model, endless_images(), attack))
        with pytest.raises(InputError, match=words):
            losses(model, x, y, attack)


def test_a_ball_is_closed():
    x, y = images()
    model = SMALL.draw(generator())
    assert torch.equal(leaves_no_trace(by_backward, eps=EPS)(model, x, y), ours(model, x, y))
    assert torch.equal(leaves_no_trace(ours)(model, x, y), ours(model, x, y))


def test_a_model_that_diverged_is_not_the_attacks_fault():
    model = SMALL.draw(generator())
    nn.init.constant_(model[2].bias, torch.nan)
    x, y = images()
    lost = leaves_no_trace(lambda m, x, y: x * m(x).sum())(model, x, y)
    assert lost.isnan().all()


@pytest.mark.parametrize("attack", [ours, partial(pgd, eps=EPS), *RUDE])
def test_in_inference_mode(attack):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    torch.manual_seed(0)
    expected = leaves_no_trace(attack)(model.eval(), *images())
    with torch.inference_mode():
        torch.manual_seed(0)
        assert torch.equal(leaves_no_trace(attack)(model, *images()), expected)
        clean, attacked = losses(model, *images(), attack)
        assert attacked > clean

        class Everything:
            def __len__(self):
                return 16

            def batch(self, index):
                x, y = images()
                return x[index], y[index]

        assert robust_accuracy(model, Everything(), attack) <= 1


def test_bounds_that_are_rounded_are_bounds():
    model, (x, y) = SMALL.draw(generator()), images()
    mean, std = 0.1307, 0.3081
    x[0, 0], x[0, 1] = 0, 1
    bounds = (0 - mean) / std, (1 - mean) / std
    assert fgsm(model, (x - mean) / std, y, eps=0.1, bounds=bounds).isfinite().all()


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_images_out_of_the_bounds_are_refused(attack):
    model, (x, y) = SMALL.draw(generator()), images()
    normalised = (x - 0.5) / 0.25
    with pytest.raises(InputError, match=r"-1.\d+ to 1.\d+, but the bounds are \(0.0, 1.0\).*norm"):
        attack(model, normalised, y, eps=0.1)
    with pytest.raises(InputError, match="nan"):
        attack(model, x.log().log(), y, eps=0.1)
    x_adv = attack(model, normalised, y, eps=0.1, bounds=(-2, 2))
    assert 0 < (x_adv - normalised).abs().max() <= 0.1 + 1e-6
    assert attack(model, normalised, y, eps=5.0, bounds=(-2, 2)).abs().max() == 2
    assert torch.equal(attack(model, normalised, y, eps=0.0), normalised)


def test_batches_that_end():
    data = TensorDataset(*images(b=40))
    phi = new_phi(SMALL.build(), generator=generator())

    def episode(batches):
        return Episode(SMALL.draw(generator()), batches, ours, classes=3)

    settings = MetaSettings(1, steps=20, unroll=5)
    loader = DataLoader(data, batch_size=16, drop_last=True)  # two batches an epoch
    looped = (batch for _ in range(100) for batch in loader)
    phis = [copy.deepcopy(phi) for _ in range(2)]
    for own, batches in zip(phis, (loader, looped), strict=True):
        meta_train(own, settings, lambda n, batches=batches: episode(batches))
    assert torch.equal(*map(weights, phis))
    assert not torch.equal(weights(phis[0]), weights(phi))

    for ended, count in ((iter(loader), 2), ([], 0)):
        with pytest.raises(InputError, match=f"the batches ended after {count}: give an iterator"):
            meta_train(phi, settings, lambda n, ended=ended: episode(ended))
    adam = Method("", lambda model: torch.optim.Adam(model.parameters()))
    with pytest.raises(InputError, match="the batches ended after 2"):
        train(
            SMALL.draw(generator()), adam, iter(loader), loss=SMALL.loss, attack=ours, steps=9,
            record=partial(losses, x=images()[0], y=images()[1], attack=ours),
        )  # fmt: skip


def test_a_loss_may_do_what_it_likes_to_gradients():
    def cutting(model, x, y):
        model.zero_grad()  # sets them to None
        return SMALL.loss(model, x, y)

    ends = []
    for loss in (cutting, SMALL.loss):
        phi = new_phi(SMALL.build(), generator=generator())
        meta_train(
            phi,
            MetaSettings(1, steps=2),
            lambda n, loss=loss: Episode(SMALL.draw(generator()), endless_images(), ours, loss),
        )
        ends.append(weights(phi))
    assert torch.equal(*ends)
