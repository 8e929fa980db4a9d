"""The scripts of examples/ do what they say, on the stand-in."""

import math
from functools import partial

import pytest
import torch
from conftest import TINY, generator
from torch import nn

from examples import (
    fair_comparison,
    grid,
    networks,
    own_loop,
    own_phi,
    paper,
    perturbations,
    refine,
    resnet,
    second_order,
    transformer,
)
from l2l_ref import attacks
from l2l_ref.attacks import fgsm, none
from l2l_ref.episode import Episode, MetaSettings
from l2l_ref.equations import cross_entropy
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, new_phi
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


def test_perturbations_leave_the_ball_and_stay_in_the_box():
    """`attacks.make` takes them as they are, and what they draw is of the generator."""
    model, x, y = make("mnist").build(), torch.rand(8, 1, 28, 28), torch.arange(8)

    def perturbed(name, seed=0):
        made = attacks.make(f"examples.perturbations:{name}", eps=0.1, generator=generator(seed))
        return made(model, x, y)

    for name in ("l2", "l2_step", "noise", "blur", "brightness"):
        change = perturbed(name) - x
        assert change.abs().max() > 0.11
        assert 0 <= perturbed(name).min() <= perturbed(name).max() <= 1
        if "l2" in name:
            assert change.flatten(1).norm(dim=1).max() < 1 + 1e-5  # 10·eps
    kinds = {perturbed("norms", seed).sub(x).abs().max().item() < 0.11 for seed in range(8)}
    assert kinds == {True, False}  # FGSM, and a step in l2
    assert torch.equal(perturbed("natural", 3), perturbed("natural", 3))
    with pytest.raises(InputError, match="moved a pixel"):  # one that does not say so is held to it
        perturbations.noise.norm = "linf"
        perturbed("noise")


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "resnet18"])
def test_networks(name):
    x = torch.rand(2, *((3, 32, 32) if name == "resnet18" else (1, 28, 28)))
    assert getattr(networks, name)()(x).shape == (2, 10)


def test_refine(small_data, capsys, monkeypatch):
    """Half attacked batches make a model that clean ones trained more robust."""
    monkeypatch.setattr(refine, "LENGTHS", (30,))
    monkeypatch.setattr(refine, "SEEDS", 2)
    robust = refine.main(data_dir=small_data, trained=60)
    for row in ("Adam, half attacked, 30 steps", "Adam + penalty, clean, 30 steps"):
        assert robust[row] > robust["nothing"] + 0.02  # by more than PGD's random starts
    assert "| φ, clean batches, 30 steps |" in capsys.readouterr().out


def test_second_order(small_data, capsys, monkeypatch):
    monkeypatch.setattr(paper, "STEPS", 4)
    monkeypatch.setattr(paper, "UNROLL", 2)
    monkeypatch.setattr(second_order, "SEEDS", 2)
    monkeypatch.setattr(second_order, "EVERY", 1)
    losses = second_order.main(small_data, 2)
    assert set(losses) == {1, 2} and all(map(math.isfinite, losses[1] + losses[2]))
    assert "cosine of both dφ: median" in capsys.readouterr().out


def test_the_grid_of_p(small_data, tmp_path, capsys, monkeypatch):
    """A row for each setting, of other φ; what is there is not computed again."""
    monkeypatch.setattr(grid, "GRID", [(0.1, 2, 3e-3), (0.1, 10, 3e-3)])
    options = "data", *TINY, "--eval-on", "test"
    first, other = grid.main(*options, root=tmp_path).values()
    assert [run["pgd_loss"] for run in first] != [run["pgd_loss"] for run in other]
    monkeypatch.setattr(grid.Experiment, "train_phi", lambda: None)
    assert list(grid.main(*options, root=tmp_path).values()) == [first, other]
    assert capsys.readouterr().out.count("| 0.1 | 10 | 0.003 |") == 2


def test_the_second_order_is_the_whole_derivative():
    """That of the meta-loss along a direction in φ, by differences; the first order is not."""
    phi = MetaOptimizer(output_scale=0.1, generator=generator()).double()
    torch.nn.init.normal_(phi.head.weight, generator=generator(1))
    theta = torch.randn(15_910, generator=generator(2)).double().mul_(0.05).requires_grad_()
    x = torch.rand(16, 784, generator=generator(3)).double()
    batches = [(x, torch.arange(16) % 10)] * 3
    gradient = torch.randn(15_910, generator=generator(4)).double()

    def inputs():
        return phi, theta, gradient, phi.init_state(15_910), batches, 1.0, 0.0

    first, second = (second_order.meta_gradient(*inputs(), order=n)[0] for n in (1, 2))
    way, values = torch.randn(len(first), generator=generator(5)).double(), []
    start = nn.utils.parameters_to_vector(phi.parameters())
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * 1e-6 * way, phi.parameters())
        values.append(second_order.unrolled(*inputs(), 1)[0].item())
    slope = (values[0] - values[1]) / 2e-6
    assert abs(second @ way - slope) < 1e-4 * abs(slope)
    assert abs(first @ way - slope) > 1e-2 * abs(slope)


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
            stripes = torch.eye(10)[y].repeat(1, 79)[:, :784]
            yield (torch.rand(32, 784, generator=g) + stripes) / 2, y

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

    def test_the_same_phi_after_ten_unrolls(self, page, backend):
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
        settings = MetaSettings(2, meta_lr=page.META_LR, **alphas)
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

    def test_its_pgd_is_no_weaker_than_its_fgsm(self, page):
        theta, _ = self.problem(page, 0)
        x, y = next(self.batches(1))
        attacked = page.pgd(theta, x, y, 0.1)
        assert (attacked - x).abs().max() <= 0.1 + 1e-9
        fgsm_loss = page.loss(theta, page.fgsm(theta, x, y, 0.1), y)
        assert page.loss(theta, attacked, y) > fgsm_loss - 0.01
