"""An attack of any library trains, meta-trains and judges as ours does, or is refused by name."""

import copy
from functools import partial

import pytest
import torch
from conftest import SMALL, generator, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from l2l_ref.attacks import fgsm, n_fgsm, none, pgd
from l2l_ref.episode import Episode, MetaSettings
from l2l_ref.errors import InputError
from l2l_ref.evaluate import losses, robust_accuracy
from l2l_ref.guard import guarded
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.meta_training import meta_train
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


def that_is_rude(model, x, y):
    """Writes into x and y, takes the gradients away, and freezes the model."""
    x_adv = by_backward(model, x.clone(), y)
    x.data.copy_(x_adv)
    y.fill_(0)
    for param in model.parameters():
        param.grad = None
    model.requires_grad_(False)
    return x


RUDE = [by_backward, that_is_rude]
rude = pytest.mark.parametrize("attack", RUDE)


def endless_images():
    return iter([images(seed) for seed in range(1000)])


@rude
@pytest.mark.parametrize("alphas", [(0.5, 0.5), (1.0, 0.0)])
def test_meta_training_computes_the_same_bits_under_any_attack(attack, alphas):
    def trained(attack):
        phi = new_phi(SMALL.build(), generator=generator(), odd=True, nominal=True)
        settings = MetaSettings(3, steps=6, unroll=3, input_alpha=alphas[0], alpha=alphas[1])
        history = meta_train(
            phi, settings, lambda n: Episode(SMALL.draw(generator(n)), endless_images(), attack)
        )
        return history.loss, history.norm, weights(phi)

    (loss, norm, phi), (own_loss, own_norm, own_phi) = trained(attack), trained(ours)
    assert loss == own_loss and norm == own_norm and torch.equal(phi, own_phi)
    assert loss != trained(none)[0]


@rude
def test_transfer_computes_the_same_bits_under_any_attack(attack):
    x, y = images(99)

    def trained(attack):
        model = SMALL.draw(generator(1))
        adam = Method("", lambda model: torch.optim.Adam(model.parameters(), lr=0.01), alpha=0.5)
        train(
            model, adam, endless_images(), loss=SMALL.loss, attack=attack, steps=6,
            record=partial(losses, x=x, y=y, attack=attack),
        )  # fmt: skip
        return weights(model)

    assert torch.equal(trained(attack), trained(ours))


def moved(model, x, y, by=0.3):
    return (x + by).clamp(0, 1)


@pytest.mark.parametrize(
    "attack, eps, words",
    [
        (lambda m, x, y: (x, x, y), None, "'<lambda>' returned a tuple .* must return x_adv"),
        (lambda m, x, y: x[:3], None, r"returned torch.float32 \[3, 5\] on cpu for .* \[16, 5\]"),
        (lambda m, x, y: x.double(), None, r"returned torch.float64 \[16, 5\]"),
        (lambda m, x, y: x.log().log(), None, "returned NaN or infinity where logits are finite"),
        (moved, 0.1, r"'moved' moved a pixel by 0.3 but eps is 0.1"),
        (partial(moved, by=0.2), 0.1, r"'moved' moved a pixel by 0.2 but eps is 0.1"),
        (partial(ours, eps=0.2), 0.1, r"'fgsm' moved a pixel by 0.2 but eps is 0.1"),
    ],
)
def test_what_is_no_adversarial_image_is_named(attack, eps, words):
    x, y = images()
    model = SMALL.draw(generator())
    with pytest.raises(InputError, match=words):
        guarded(attack, eps=eps)(model, x, y)
    if eps is None:
        settings = MetaSettings(1, steps=2, alpha=0.5)
        episode = Episode(model, endless_images(), attack)
        with pytest.raises(InputError, match=words):
            meta_train(new_phi(model, generator=generator()), settings, lambda n: episode)
        with pytest.raises(InputError, match=words):
            losses(model, x, y, attack)


def test_a_ball_is_closed_and_a_guard_is_enough():
    x, y = images()
    model = SMALL.draw(generator())
    assert torch.equal(guarded(by_backward, eps=EPS)(model, x, y), ours(model, x, y))
    assert guarded(ours) is ours
    once = partial(guarded(by_backward))
    assert guarded(once) is once


def test_a_model_that_diverged_is_not_the_attacks_fault():
    model = SMALL.draw(generator())
    nn.init.constant_(model[2].bias, torch.nan)
    assert guarded(lambda m, x, y: x * m(x).sum())(model, *images()).isnan().all()


@pytest.mark.parametrize("attack", [ours, partial(pgd, eps=EPS), *RUDE])
def test_in_inference_mode(attack):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    torch.manual_seed(0)
    expected = guarded(attack)(model.eval(), *images())
    with torch.inference_mode():
        torch.manual_seed(0)
        assert torch.equal(guarded(attack)(model, *images()), expected)
        clean, attacked = losses(model, *images(), attack)
        assert attacked > clean
        assert robust_accuracy(model, images(), attack) <= 1


@pytest.mark.parametrize("attack", [fgsm, n_fgsm, pgd])
def test_images_that_are_no_pixels_are_refused(attack):
    model, (x, y) = SMALL.draw(generator()), images()
    for least in (-0.5, 0.5):
        words = rf"{least}\d* to .*, but pixels are in .*normalise"
        with pytest.raises(InputError, match=words):
            attack(model, least + x - x.min(), y, eps=0.1)
    with pytest.raises(InputError, match="nan"):
        attack(model, x.log().log(), y, eps=0.1)
    x[0, :2] = torch.tensor([-1e-7, 1 + 1e-7])  # what is rounded is let in
    assert attack(model, x, y, eps=0.1).isfinite().all()


def test_batches_that_end():
    phi = new_phi(SMALL.build(), generator=generator())
    loader = DataLoader(TensorDataset(*images(b=40)), batch_size=16, drop_last=True)  # two batches

    def meta_trained(batches):
        trained = copy.deepcopy(phi)
        episode = Episode(SMALL.draw(generator()), batches, ours)
        meta_train(trained, MetaSettings(1, steps=20, unroll=5), lambda n: episode)
        return weights(trained)

    looped = (batch for _ in range(100) for batch in loader)
    assert torch.equal(meta_trained(loader), meta_trained(looped))
    for ended, count in ((iter(loader), 2), ([], 0)):
        with pytest.raises(InputError, match=f"the batches ended after {count}: give an iterator"):
            meta_trained(ended)
