"""The scripts of examples/ do what they say, on the stand-in."""

import math
from functools import partial

import pytest
import torch
from conftest import generator
from torch import nn

from examples import fair_comparison, own_loop, own_phi, paper, resnet, transformer
from l2l_ref.attacks import fgsm, none
from l2l_ref.episode import Episode
from l2l_ref.equations import cross_entropy
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.meta_settings import MetaSettings
from l2l_ref.meta_training import meta_train
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.pretrained import save
from l2l_ref.problems import make
from l2l_ref.transfer import Method, train


def test_own_loop(tmp_path, small_data, capsys):
    """With a φ that is Adam, the nominal term alone, which learns in a hundred steps."""
    phi = new_phi(make("mnist").build(), generator=generator(), hidden_size=1, nominal=True)
    save(tmp_path / "phi.pt", {"transfer": phi}, {})
    accuracy = own_loop.main(str(tmp_path / "phi.pt"))
    assert accuracy["clean"] > 0.5 > accuracy["PGD-20 at 0.1"]
    assert "of stand-in" in capsys.readouterr().out


def test_another_attack(small_data, capsys):
    pytest.importorskip("foolbox")
    from examples import another_attack

    losses = another_attack.main(episodes=2, steps=20)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert "episode 2: meta-loss" in capsys.readouterr().out


def test_own_phi():
    """Its φ trains robust models on clean batches, Adam does not; which is what it is for."""
    ours, adam = own_phi.main(episodes=25, steps=40)
    assert ours > adam + 0.1


def test_fair_comparison(small_data, capsys):
    gap, half = fair_comparison.main(seeds=3, steps=30)
    assert math.isfinite(gap) and half >= 0
    assert "difference" in capsys.readouterr().out


def test_transformer():
    assert transformer.main(steps=150) > 0.5


def test_resnet(small_data, capsys):
    """On a network that is less of a load."""
    losses = resnet.main(steps=8, build=make("cifar10").build)
    assert all(map(math.isfinite, losses)) and losses[2] != losses[1]
    assert capsys.readouterr().out.count("on stand-in: test loss") == 3


class TestThePaperOnAPage:
    """The package computes what `examples/paper.py` does, in float64."""

    ALPHA, EPS = 0.6, 0.08

    @pytest.fixture
    def page(self, monkeypatch):
        torch.set_default_dtype(torch.float64)
        yield paper
        torch.set_default_dtype(torch.float32)

    def batches(self, seed):
        g = generator(seed)
        while True:
            y = torch.randint(10, (32,), generator=g)
            yield (
                (torch.rand(32, 784, generator=g) + torch.eye(10)[y].repeat(1, 79)[:, :784]) / 2,
                y,
            )

    def problem(self, page, seed):
        """θ₀ of the page, and a model of that."""
        torch.manual_seed(seed)
        theta, model = page.new_theta(), make("mnist").build().double()
        nn.utils.vector_to_parameters(theta.clone(), model.parameters())
        return theta, model

    def twins(self, page):
        """φ of the page, and the package's of the same weights."""
        torch.manual_seed(0)
        phi, ours = page.MetaOptimizer(), new_phi(make("mnist").build()).double()
        nn.init.normal_(phi.head.weight, std=0.3)
        ours["linear"].load_state_dict(phi.state_dict())
        return phi, ours

    @pytest.mark.parametrize("backend", ["reference", "fused"])
    def test_the_same_phi_after_ten_unrolls(self, page, backend, request):
        if backend == "fused":
            request.getfixturevalue("fused")
        phi, ours = self.twins(page)
        adam = torch.optim.Adam(phi.parameters(), page.META_LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 10)
        first = [w.clone() for w in phi.parameters()]
        for number in range(2):
            theta, _ = self.problem(page, number)
            page.episode(phi, schedule, theta, self.batches(number), self.ALPHA, self.EPS)

        def draw(number):
            attack = partial(fgsm, eps=self.EPS)
            return Episode(self.problem(page, number)[1], self.batches(number), attack)

        alphas = {"alpha": self.ALPHA, "input_alpha": self.ALPHA}
        settings = MetaSettings(2, meta_lr=page.META_LR, schedule="cosine", **alphas)
        assert (settings.steps, settings.unroll) == (page.STEPS, page.UNROLL)
        meta_train(ours, settings, draw, backend=backend)
        for name, weight in phi.state_dict().items():
            torch.testing.assert_close(ours["linear"].state_dict()[name], weight, rtol=0, atol=1e-5)
        moved = [(a - b).abs().max() for a, b in zip(first, phi.parameters(), strict=True)]
        assert min(moved) > 1e-3

    def test_the_same_theta_after_a_transfer(self, page):
        phi, ours = self.twins(page)
        theta, model = self.problem(page, 0)
        expected = page.train(theta, self.batches(0), 1.0, phi)
        by_phi = partial(LearnedOptimizer.for_model, phi=ours)
        train(
            model, Method("φ", by_phi), self.batches(0), loss=cross_entropy, attack=none,
            steps=page.STEPS, record=lambda model: (torch.zeros(()), torch.zeros(())),
        )  # fmt: skip
        found = nn.utils.parameters_to_vector(model.parameters())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert (expected - theta).abs().max() > 0.05

    def test_its_attacks_are_ours(self, page):
        theta, model = self.problem(page, 0)
        x, y = next(self.batches(1))
        x = x.clamp(0, 1)
        ours = fgsm(model, x, y, eps=0.1)
        torch.testing.assert_close(page.fgsm(theta, x, y, 0.1), ours)
        assert (page.pgd(theta, x, y, 0.1) - x).abs().max() <= 0.1 + 1e-9
        assert page.loss(theta, page.pgd(theta, x, y, 0.1), y) > page.loss(theta, ours, y) - 0.01
