"""The reviewer's questions: an honest model raises no alarm, and planted fake defences do."""

from functools import partial

import pytest
import torch
from conftest import generator, weights
from torch import nn

from bench.review import draw
from l2l_ref import attacks, problems
from l2l_ref.errors import InputError
from l2l_ref.evaluate import losses
from l2l_ref.review import STEPS, Review, find_alarms, review
from l2l_ref.transfer import Method, train

EPS = 0.1


def trained(digits, seed=0, alpha=1.0):
    model, problem = problems.make("mnist").draw(generator(seed)), problems.make("mnist")
    adam = Method("", lambda model: torch.optim.Adam(model.parameters(), lr=3e-3), alpha=alpha)
    x, y = digits.test.all()
    train(
        model, adam, digits.train.batches(64, generator(seed)), loss=problem.loss,
        attack=partial(attacks.fgsm, eps=EPS), steps=400, every=400,
        record=partial(losses, x=x, y=y, attack=attacks.none),
    )  # fmt: skip
    return model


@pytest.fixture(scope="module")
def models(small_digits):
    """Trained on clean images, under attack, and on clean ones from another seed."""
    return [trained(small_digits, *more) for more in ((0,), (0, 0.5), (1,))]


class Rounded(nn.Module):
    """Inputs to 8 levels: nothing of a gradient comes through."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x * 7).round() / 7)


class Saturated(Rounded):
    """Logits so large that the softmax, where it is right, is exactly 1: its gradient is 0."""

    def forward(self, x):
        return 1e4 * self.inner(x)


def asked(model, digits, **options):
    return review(
        model, digits.test.first(200), eps=EPS, steps=10, generator=generator(), **options
    )


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr("l2l_ref.review.RESTARTS", (1, 2))
    monkeypatch.setattr("l2l_ref.review.CORNERS", 10)


def test_honest_models_raise_no_alarm(models, small_digits):
    """And training under attack is seen."""
    before = weights(models[0])
    found, robust = (asked(m.train(), small_digits, surrogate=models[2]) for m in models[:2])
    assert found.alarms == robust.alarms == []
    assert robust.by_attack["worst case"] > found.by_attack["worst case"] + 0.05
    assert torch.equal(weights(models[0]), before) and models[0].training
    accuracies = list(found.by_eps.values())
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] < 0.02
    assert accuracies[0] == found.by_attack["none"]
    restarts = list(found.by_restarts.values())
    assert restarts == sorted(restarts, reverse=True)
    assert list(found.by_steps) == list(STEPS) and found.samples == 200
    rest = {name: value for name, value in found.by_attack.items() if name != "worst case"}
    assert found.by_attack["worst case"] <= min(rest.values(), default=0)
    assert found.by_attack["none"] > found.by_attack["noise"] > found.by_attack["PGD, margin"]


@pytest.mark.parametrize(
    "fake, words",
    [
        (Rounded, {"some images survive PGD", "another model's images break more"}),
        (Saturated, {"PGD on one loss breaks far more than on the other"}),
    ],
)
def test_a_fake_defence_sets_it_off(fake, words, models, small_digits):
    found = asked(fake(models[0]), small_digits, surrogate=models[2])
    for sentence in words:
        assert any(alarm.startswith(sentence) for alarm in found.alarms), found.alarms
    assert found.by_attack["worst case"] < found.by_attack["PGD, cross-entropy"] - 0.1


def test_the_page(tmp_path):
    found = Review(EPS, 9, {0.0: 1.0, 1.0: 0.0}, {1: 0.1, 9: 0.2}, {1: 0.5}, {"none": 1.0}, ["$"])
    draw(tmp_path / "page.png", found, "MNIST")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_surrogate_is_attacked_as_it_would_be_used(models, small_digits, monkeypatch):
    monkeypatch.setattr("l2l_ref.review.FRACTIONS", ())
    surrogate = nn.Sequential(nn.Dropout(0.9), models[2])
    used, in_training = (
        asked(models[1], small_digits, surrogate=surrogate.train(mode)) for mode in (False, True)
    )
    assert in_training.by_attack == used.by_attack and surrogate.training


def test_who_is_wrong_already_needs_no_gradient():
    constant = lambda x: 0 * x.flatten(1)[:, :2] + torch.tensor([1.0, 0.0])  # noqa: E731
    images = torch.rand(9, 4, generator=generator()), torch.ones(9, dtype=torch.int64)
    assert review(constant, images, eps=EPS, steps=1).alarms == []


def test_mistakes_are_named(models, small_digits):
    with pytest.raises(InputError, match="eps is 2"):
        review(models[0], small_digits.test, eps=2)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({}, None),
        ({"noise": 0.3}, "random noise breaks more than PGD"),
        ({"FGSM": 0.3}, "one step breaks more than PGD"),
        ({"transfer": 0.3}, "another model's images break more than PGD"),
        ({"PGD, margin": 0.2, "FGSM": 0.3}, "PGD on one loss breaks far more than on the other"),
        ({"left": 0.2}, "some images survive PGD at ε = 1"),
        ({"unseen": 0.2}, "some that survive have a gradient of exactly zero"),
        ({"loss": 1.5}, "the loss falls with more steps"),
    ],
)
def test_each_alarm_is_set_off_by_what_it_names(changes, sentence):
    names = {"noise": 0.8, "FGSM": 0.5, "PGD, cross-entropy": 0.45, "PGD, margin": 0.42}
    by_attack = {name: changes.get(name, value) for name, value in names.items()}
    by_attack["transfer"] = changes.get("transfer", 0.7)
    by_steps = {10: 2.0, 20: 2.1, 100: changes.get("loss", 2.1)}
    by_eps, unseen = {0.1: 0.4, 1.0: changes.get("left", 0.0)}, changes.get("unseen", 0.0)
    found = find_alarms(by_eps, by_steps, by_attack, unseen, 1000)
    assert found == ([sentence] if sentence else [])
