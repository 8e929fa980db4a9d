"""Meta-training: it resumes to the same bits, keeps the best φ, and survives what is not finite."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import generator
from torch import nn

from l2l_ref import attacks, meta_training, problems
from l2l_ref import meta_optimizer as phis
from l2l_ref.episode import Episode, MetaSettings
from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint
from l2l_ref.meta_training import apply_meta_gradient, meta_adam, meta_train

MEMORY = Path("/proc/self/statm")
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


def same(a: nn.ModuleDict, b: nn.ModuleDict) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize(
    "form, killed_at", [({}, 1), ({"nominal": True, "odd": True, "theta_input": True}, 3)]
)
def test_resumed_equals_uninterrupted(tmp_path, form, killed_at):
    """To the bit, with episodes of several lengths and a curriculum."""
    chosen = settings(curriculum=(0.25, 0.75), meta_lr=0.01)

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


@pytest.mark.skipif(not MEMORY.exists(), reason="Linux tells what memory a process has")
def test_a_thousand_updates_do_not_grow_the_process(tmp_path):
    pages = []  # of 4 kB; the LSTM's state alone is 25 of them

    def note(done, loss):
        pages.append(int(MEMORY.read_text().split()[1]))

    phi = new_phi(odd=True, theta_input=True, nominal=True)
    chosen = settings(episodes=100)
    meta_train(phi, chosen, draw, checkpoint=tmp_path / "phi.pt", on_episode=note)
    assert pages[-1] - pages[20] < 1000


def test_of_checks_that_all_failed_the_last_phi_is_kept():
    phi, seen = new_phi(), []
    check = lambda: seen.append(copy.deepcopy(phi.state_dict())) or math.inf  # noqa: E731
    meta_train(phi, settings(episodes=7), draw, check=check)
    assert all(torch.equal(seen[-1][name], value) for name, value in phi.state_dict().items())
    assert any(not torch.equal(seen[0][name], value) for name, value in seen[-1].items())


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


@pytest.mark.parametrize("changes, form", [({"penalty": 0.1}, {}), ({}, {"p": 5.0})])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, changes, form):
    path = tmp_path / "phi.pt"
    meta_train(new_phi(), settings(episodes=1), draw, checkpoint=path)
    with pytest.raises(InputError, match="other settings"):
        meta_train(new_phi(**form), settings(episodes=1, **changes), draw, checkpoint=path)


def test_a_meta_gradient_that_is_not_finite_is_skipped_counted_and_survived():
    """The second episode meets a W that is not finite after three batches."""

    def own(number):
        episode = draw(number)
        if number == 1:
            w, y = next(episode.batches)
            episode.batches = iter([(w, y)] * 3 + [(w * math.nan, y)] * 99)
        return episode

    phi = new_phi()
    history = meta_train(phi, settings(), own)
    assert history.skipped == 1 and history.diverged == 1
    assert all(p.isfinite().all() for p in phi.parameters())
    unrolls = 3  # an episode; the poisoned one ends with its first
    assert len(history.loss) == 3 * unrolls + 1


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


def test_a_cosine_falls_by_episodes_whatever_their_lengths(monkeypatch):
    """Rates of φ's weights and of log η are those of the schedule, and both norms are clipped."""
    phi = new_phi(nominal=True)
    meta = phi["quadratic"]
    rates, norms, step = [], [], torch.optim.Adam.step

    def spy(self, *args):
        rates.append([group["lr"] for group in self.param_groups])
        norms.append(torch.cat([w.grad.flatten() for w in meta.weights()]).norm())
        norms.append(meta.log_eta.grad.abs())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr(meta_training, "CLIP", 1e-3)
    chosen = settings(meta_lr=2.0)
    history = meta_train(phi, chosen, lambda number: draw(number, (7, 3, 12, 5)[number]))
    assert max(history.norm) > 1e-2 and max(norms) <= 1e-3 * 1.001
    shares = [n + i / k for n, k in enumerate((2, 1, 3, 1)) for i in range(k)]
    factors = [0.5 + 0.5 * math.cos(math.pi * share / 4) for share in shares]
    for rate, factor in zip(rates, factors, strict=True):
        assert rate == pytest.approx([2.0 * factor, 0.02 * factor])
    assert chosen.rate(3, 1) == pytest.approx(0)


@pytest.mark.parametrize("at", [0, -1])
def test_one_number_that_is_not_finite_moves_neither_log_eta_nor_the_weights(at):
    phi, chosen = new_phi(nominal=True), settings()
    adam, before = meta_adam(phi, chosen), copy.deepcopy(phi.state_dict())
    gradient = torch.ones(1 + phi["quadratic"].phi().numel())
    norm = apply_meta_gradient(phi, {"quadratic": gradient}, adam, 0.0, chosen)
    assert norm == pytest.approx(len(gradient) ** 0.5)  # of both, before they are clipped
    gradient[at] = math.nan
    assert math.isnan(apply_meta_gradient(phi, {"quadratic": gradient}, adam, 1.0, chosen))
    assert all(torch.equal(value, before[key]) for key, value in phi.state_dict().items())


@pytest.mark.parametrize(
    "name, value",
    [
        ("episodes", -1), ("steps", 0), ("unroll", 0), ("meta_lr", float("nan")), ("meta_lr", -1.0),
        ("meta_lr", float("inf")), ("input_alpha", 1.5),
        ("penalty", -0.1), ("alpha", 2.0), ("alpha", float("nan")), ("curriculum", (0.7, 0.3)),
        ("curriculum", (0.5, 1.5)), ("average", 1.0), ("average", float("nan")), ("stride", 0),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*: it must be "):
        MetaSettings(**{"episodes": 5, name: value})
    MetaSettings(5)
