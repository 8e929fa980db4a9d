"""Long runs, in which nothing grows: `make soak`."""

import gc
import os
import resource

import pytest
import torch
from conftest import SMALL, generator

from l2l_ref import Episode, LearnedOptimizer, MetaSettings, attacks, meta_train
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.problems import cross_entropy
from l2l_ref.transfer import Method, train


class Watch:
    """Memory and handles of this process at each tenth, after a warm-up of two."""

    def __init__(self, total: int):
        self.total, self.rows = total, []

    def __call__(self, done: int) -> None:
        if done % (self.total // 10) == 0:
            gc.collect()
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * resource.getpagesize()
            self.rows.append((resident, len(os.listdir("/proc/self/fd"))))

    def check(self) -> None:
        resident, handles = zip(*self.rows, strict=True)
        assert len(self.rows) == 10
        assert resident[-1] - resident[1] < 4 << 20
        assert handles[-1] <= handles[1]


def batches():
    noise = generator(1)
    x, y = torch.rand(64, 5, generator=noise), torch.randint(3, (64,), generator=noise)
    while True:
        yield x, y


@pytest.fixture
def attack():
    return attacks.make("pgd", eps=0.1, steps=3, generator=generator(2))


def test_10_000_steps_of_a_transfer(backend, attack):
    model = SMALL.draw(generator(0), "cpu")
    phi = new_phi(model, generator=generator(3), odd=True, theta_input=True, nominal=True)
    watch, seen = Watch(10_000), iter(range(1, 10**9))

    def by_phi(model):
        optimizer = LearnedOptimizer.for_model(model, phi, backend=backend)
        optimizer.register_step_post_hook(lambda *_: watch(next(seen)))
        return optimizer

    def record(model):
        loss = cross_entropy(model, *next(batches()))
        return loss.detach(), loss.detach()

    curve = train(
        model, Method("L2L", by_phi, alpha=0.5), batches(), loss=cross_entropy, attack=attack,
        steps=10_000, record=record, every=1000,
    )  # fmt: skip
    assert not curve.diverged
    watch.check()


def test_500_episodes(backend, attack, tmp_path):
    phi = new_phi(SMALL.build(), generator=generator(3), odd=True, theta_input=True, nominal=True)
    settings, watch = MetaSettings(episodes=500, steps=20, unroll=10, meta_lr=1e-3), Watch(500)

    def draw(number):
        return Episode(SMALL.draw(generator(number), "cpu"), batches(), attack, cross_entropy, 3)

    history = meta_train(
        phi, settings, draw, backend=backend, checkpoint=tmp_path / "phi.pt",
        on_episode=lambda done, loss: watch(done),
    )  # fmt: skip
    assert not history.skipped and not history.diverged
    watch.check()
