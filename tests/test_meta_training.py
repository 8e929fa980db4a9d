"""Meta-training: it resumes to the same bits, keeps the best φ, and survives what is not finite."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import generator
from torch import nn

from l2l_ref import attacks, problems
from l2l_ref import meta_optimizer as phis
from l2l_ref.episode import Episode
from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint
from l2l_ref.meta_settings import MetaSettings
from l2l_ref.meta_training import (
    apply_meta_gradient,
    meta_adam,
    meta_train,
)

BATCH = 16
PROBLEM = problems.make("quadratic", batch_size=BATCH)


def draw(number: int, steps: int | None = None) -> Episode:
    model = PROBLEM.draw(generator(number))
    batches = problems.Quadratics(BATCH).batches(BATCH, generator(10_000 + number))
    return Episode(model, batches, attacks.none, PROBLEM.loss, steps=steps)


def new_phi(**settings) -> nn.ModuleDict:
    return phis.new_phi(PROBLEM.build(), generator=generator(1), **settings)


def settings(**changes) -> MetaSettings:
    clean = {"input_alpha": 1.0, "alpha": 1.0}
    return MetaSettings(**{"episodes": 4, "steps": 12, "unroll": 5, **clean, **changes})


def killed_after(episodes, phi, chosen, draw, path, **options) -> None:
    """Meta-trains φ, with a checkpoint, for so many episodes."""

    def stop(number, loss):
        if number == episodes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meta_train(phi, chosen, draw, checkpoint=path, on_episode=stop, **options)
    assert read_checkpoint(path)["episodes"] == episodes


def poisoned_from(first: int, last: int = 10**9):
    """`draw`, but those episodes meet a W that is not finite after three batches."""

    def poisoned(number):
        episode = draw(number)
        if first <= number <= last:
            w, y = next(episode.batches)
            episode.batches = iter([(w, y)] * 3 + [(w * math.nan, y)] * 99)
        return episode

    return poisoned


def same(a: nn.ModuleDict, b: nn.ModuleDict) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


FORMS = [{}, {"odd": True}, {"nominal": True, "odd": True, "theta_input": True}]


@pytest.mark.parametrize(
    "form, schedule, killed_at",
    [(FORMS[0], "constant", 1), (FORMS[1], "cosine", 2), (FORMS[2], "cosine", 3)],
)
def test_resumed_equals_uninterrupted(tmp_path, form, schedule, killed_at):
    """To the bit, with episodes of several lengths and a curriculum."""
    chosen = settings(schedule=schedule, curriculum=(0.25, 0.75), meta_lr=0.01)

    def own(number):
        return draw(number, steps=(7, 3, 12, 5)[number])

    whole, again, path = new_phi(**form), new_phi(**form), tmp_path / "phi.pt"
    expected = meta_train(whole, chosen, own)
    assert len(expected.loss) == 2 + 1 + 3 + 1
    assert meta_train(again, chosen, own) == expected and same(again, whole)
    fresh = new_phi(**form)
    assert not any(map(torch.equal, whole.parameters(), fresh.parameters()))  # all have learned
    killed_after(killed_at, new_phi(**form), chosen, own, path)
    for _ in range(2):  # a finished one is not trained further
        resumed = new_phi(**form)
        assert meta_train(resumed, chosen, own, checkpoint=path) == expected
        assert same(resumed, whole)


@pytest.mark.parametrize("killed_at", [None, 4, 6])
def test_phi_is_left_at_the_best_of_its_checks(tmp_path, killed_at):
    """Seven episodes, the first two of a curriculum: checked after each of the other five."""
    path, chosen = tmp_path / "phi.pt", settings(episodes=7, curriculum=(0.0, 2 / 7))
    said = dict(zip(range(3, 8), [9.0, 4.0, 4.0, math.inf, 7.0], strict=True))
    seen: dict[int, Any] = {}

    def check():
        number = len(seen) + 3
        seen[number] = copy.deepcopy(phi.state_dict())
        return said[number]

    phi = new_phi()
    if killed_at:
        killed_after(killed_at, phi, chosen, draw, path, check=check)
        phi = new_phi()
    history = meta_train(phi, chosen, draw, checkpoint=path, check=check)
    assert list(seen) == list(said) and history.checks == [[n, value] for n, value in said.items()]
    for weights in (phi.state_dict(), read_checkpoint(path)["meta_optimizers"]):
        assert all(torch.equal(weights[name], value) for name, value in seen[4].items())
    assert any(not torch.equal(seen[4][name], value) for name, value in seen[7].items())


@pytest.mark.parametrize(
    "changes, form",
    [({name: value}, {}) for name, value in (("meta_lr", 0.1), ("penalty", 0.1),
                                             ("curriculum", (0.0, 0.5)), ("average", 0.5))]
    + [({}, {"p": 5.0}), ({}, {"nominal": False})],
)  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, changes, form):
    path = tmp_path / "phi.pt"
    meta_train(new_phi(nominal=True), settings(episodes=1), draw, checkpoint=path)
    with pytest.raises(InputError, match="other settings"):
        other = new_phi(**{"nominal": True, **form})
        meta_train(other, settings(episodes=1, **changes), draw, checkpoint=path)


def test_a_meta_gradient_that_is_not_finite_is_skipped_counted_and_survived():
    phi = new_phi()
    history = meta_train(phi, settings(), poisoned_from(1, 1))
    assert history.skipped == 1 and history.diverged == 1
    assert all(p.isfinite().all() for p in phi.parameters())
    unrolls = 3  # an episode; the poisoned one ends with its first
    assert len(history.loss) == 3 * unrolls + 1


@pytest.mark.parametrize(
    "curriculum, expected",
    [
        ((0.0, 0.0), [1, 1, 1, 1, 1, 1]),
        ((1 / 3, 2 / 3), [0, 0, 1 / 3, 2 / 3, 1, 1]),
        ((0.0, 0.5), [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ((0.5, 0.5), [0, 0, 0, 1, 1, 1]),
        ((1.0, 1.0), [0, 0, 0, 0, 0, 0]),
        ((0.25, 0.45), [0, 0, 1.5 / 2.2, 1, 1, 1]),  # 1.5 and 2.7 episodes
    ],
)
def test_strength_of_a_curriculum_by_hand(curriculum, expected):
    chosen = MetaSettings(6, curriculum=curriculum)
    assert [chosen.strength(number) for number in range(6)] == pytest.approx(expected)


def test_the_curriculum_goes_by_the_number_of_the_episode():
    """Of two episodes the first is clean, and the second under attack."""
    drawn, attacked = [], set()

    def attack(model, x, y):
        attacked.add(drawn[-1])
        return x

    def own(number):
        drawn.append(number)
        return replace(draw(number), attack=attack)

    chosen = settings(episodes=2, alpha=0.0, input_alpha=0.0, curriculum=(0.5, 0.5))
    meta_train(new_phi(), chosen, own)
    assert drawn == [0, 1] and attacked == {1}


class TestMetaAdam:
    """Adam on φ's weights and on log η: rates, clips, and what is left out."""

    def test_a_cosine_falls_by_episodes_whatever_their_lengths(self, monkeypatch):
        """The norm is clipped, the rates are those of the schedule, both of them."""
        phi = new_phi(nominal=True)
        rates, norms, step = [], [], torch.optim.Adam.step

        def spy(self, *args):
            rates.append([group["lr"] for group in self.param_groups])
            norms.append(torch.cat([w.grad.flatten() for w in phi["quadratic"].weights()]).norm())
            return step(self, *args)

        monkeypatch.setattr(torch.optim.Adam, "step", spy)
        chosen = settings(schedule="cosine", meta_lr=2.0, clip=1e-3)
        history = meta_train(phi, chosen, lambda number: draw(number, (7, 3, 12, 5)[number]))
        assert max(history.norm) > 1e-2 and max(norms) <= 1e-3 * 1.001
        shares = [n + i / k for n, k in enumerate((2, 1, 3, 1)) for i in range(k)]
        factors = [0.5 + 0.5 * math.cos(math.pi * share / 4) for share in shares]
        for rate, factor in zip(rates, factors, strict=True):
            assert rate == pytest.approx([2.0 * factor, 0.02 * factor])
        assert settings().rate(3, 1) == 1 and chosen.rate(3, 1) == pytest.approx(0)

    @pytest.fixture
    def phi(self):
        phi = new_phi(nominal=True, hidden_size=4).double()
        nn.init.normal_(phi["quadratic"].head.weight, generator=generator(2))
        return phi

    def gradient(self, phi, at, value):
        """Ones, but for one."""
        ones = torch.ones(1 + phi["quadratic"].phi().numel(), dtype=torch.float64)
        ones[at] = value
        return ones

    def test_log_eta_has_a_rate_and_a_clip_of_its_own(self, phi):
        meta = phi["quadratic"]
        settings = MetaSettings(1, meta_lr=1e-3, clip=0.5)
        adam = meta_adam(phi, settings)
        before = [p.detach().clone() for p in meta.parameters()]
        gradient = self.gradient(phi, 0, -3.0)
        norm = apply_meta_gradient(phi, {"quadratic": gradient}, adam, 0.5, settings)
        assert norm == pytest.approx(math.hypot(3.0, meta.phi().numel() ** 0.5))
        assert meta.log_eta.grad.item() == pytest.approx(-0.5, rel=1e-5)
        weights = torch.cat([w.grad.flatten() for w in meta.weights()])
        assert weights.norm().item() == pytest.approx(0.5, rel=1e-5)
        # Adam's first step has the length of its rate, here half of each
        after = list(meta.parameters())
        moved = [(a - b).detach() for a, b in zip(after, before, strict=True)]
        assert after[0] is meta.log_eta and moved[0].item() == pytest.approx(0.01, rel=1e-4)
        for change in moved[1:]:
            torch.testing.assert_close(change, torch.full_like(change, -5e-4), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("where", [0, -1])
    def test_one_that_is_not_finite_moves_neither(self, phi, where):
        settings = MetaSettings(1)
        adam, before = meta_adam(phi, settings), copy.deepcopy(phi.state_dict())
        gradient = self.gradient(phi, where, math.nan)
        assert math.isnan(apply_meta_gradient(phi, {"quadratic": gradient}, adam, 1.0, settings))
        assert all(torch.equal(value, before[key]) for key, value in phi.state_dict().items())
