"""Attacks of other libraries, foolbox, torchattacks and cleverhans; and attacks by name."""

import math
import sys
from functools import partial

import pytest
import torch
from conftest import TINY, generator, weights
from torch.utils.data import DataLoader, TensorDataset

import run
from examples import another_attack
from l2l_ref import attacks, problems
from l2l_ref.episode import Episode, MetaSettings
from l2l_ref.errors import InputError
from l2l_ref.evaluate import robust_accuracy
from l2l_ref.guard import guarded
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.meta_training import meta_train

EPS = 0.1
PROBLEM = problems.make("mnist")


def foolbox_fgsm(model, x, y, eps):
    lib = pytest.importorskip("foolbox")
    bounded = lib.PyTorchModel(model, bounds=(0, 1))
    return lib.attacks.LinfFastGradientAttack()(bounded, x, y, epsilons=eps)[1]


def cleverhans_fgsm(model, x, y, eps):
    pytest.importorskip("cleverhans")
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method as fast

    return fast(model, x, eps, math.inf, clip_min=0.0, clip_max=1.0, y=y)


def foolbox_pgd(*batch, eps):
    pytest.importorskip("foolbox")
    return another_attack.foolbox_pgd(*batch, eps)


def auto_attack(*batch, eps):
    pytest.importorskip("torchattacks")
    return another_attack.auto_attack(*batch, eps)


@pytest.fixture(scope="module")
def trained(small_digits):
    """The nearest mean of a class, as a linear model."""
    x, y = small_digits.train.all()
    means = torch.stack([x[y == k].mean(0).flatten() for k in range(10)])
    model = problems.make("mnist", "logistic").build()
    model[1].load_state_dict({"weight": means, "bias": -means.square().sum(1) / 2})
    return model


@pytest.mark.parametrize("attack", [foolbox_fgsm, foolbox_pgd, auto_attack, cleverhans_fgsm])
def test_it_evaluates(attack, trained, small_digits):
    attack, images = guarded(partial(attack, eps=EPS), eps=EPS), small_digits.test.first(40)
    before = weights(trained), trained.training
    clean = robust_accuracy(trained, images, attacks.none)
    assert robust_accuracy(trained, images, attack) < clean - 0.1 and clean > 0.5
    assert torch.equal(weights(trained), before[0]) and trained.training == before[1]
    assert all(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize("attack", [foolbox_fgsm, cleverhans_fgsm])
def test_it_meta_trains_to_the_bits_of_ours(attack, small_digits):
    """The paper's own experiment ran cleverhans."""

    def trained(attack):
        def draw(number):
            noise = generator(number)
            batches = small_digits.train.batches(32, noise)
            return Episode(PROBLEM.draw(noise), batches, partial(attack, eps=EPS))

        phi = new_phi(PROBLEM.build(), generator=generator(1))
        settings = MetaSettings(2, steps=8, unroll=4, meta_lr=3e-3, alpha=0.5, input_alpha=0.5)
        return meta_train(phi, settings, draw).norm, weights(phi)

    norm, phi = trained(attack)
    own_norm, own_phi = trained(attacks.fgsm)
    assert norm == pytest.approx(own_norm, rel=1e-4) and min(norm) > 0
    torch.testing.assert_close(phi, own_phi, rtol=1e-3, atol=1e-5)


def test_whatever_holds_images_is_evaluated(trained, small_digits):
    images = small_digits.test.first(120)
    x, y = images.all()
    attack = partial(attacks.fgsm, eps=0.07)
    expected = robust_accuracy(trained, images, attack)
    assert 0.1 < expected < 0.9
    dataset = TensorDataset(x, y)
    loader = DataLoader(dataset, batch_size=50, shuffle=True)

    for given in ((x, y), [x, y], dataset, loader, list(loader), iter(loader)):
        assert robust_accuracy(trained, given, attack, batch_size=50) == expected
    for empty in ((x[:0], y[:0]), [], images.first(0)):
        with pytest.raises(InputError, match="images has 0 samples"):
            robust_accuracy(trained, empty, attack)


def own_attack(model, x, y, eps):
    """By name: this module's."""
    return (x + eps * torch.rand(x.shape).mul(2).sub(1).sign()).clamp(0, 1)


def without_eps(model, x, y):
    return x


def far_attack(model, x, y, eps):
    return (x + 3 * eps).clamp(0, 1)


class TestByName:
    @pytest.fixture(autouse=True)
    def importable(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])

    @pytest.mark.parametrize(
        "name, words",
        [
            ("nowhere.at_all:attack", "^nowhere.at_all:attack cannot .* PYTHONPATH"),
            ("mine:gone", "no attribute 'gone'"),
            ("mine:EPS", "^mine:EPS is no function"),
            (".mine:attack", "^.mine:attack cannot be imported"),
            (":attack", "^:attack cannot be imported"),
            ("mine:without_eps", "has no argument eps: give a function"),
            ("builtins:dict", "has no argument eps"),
            ("fgms", "--attack is fgms: it must be fgsm, pgd, none, or MODULE:FUNCTION"),
        ],
    )
    def test_a_name_that_is_nowhere(self, name, words, small_data, workdir):
        with pytest.raises(InputError, match=words):
            run.main(["--attack", name, *TINY])
        assert not list(workdir.iterdir())

    def test_what_it_draws_depends_on_its_generator_alone(self):
        def x_adv(seed, before):
            torch.manual_seed(before)
            x = torch.full((2, 9), 0.5)
            moved = attacks.make("mine:own_attack", eps=EPS, generator=generator(seed))(None, x, x)
            return moved.tolist(), torch.rand(1).item()

        (first, drawn), (again, _), (other, _) = x_adv(1, 0), x_adv(1, 1), x_adv(2, 0)
        assert first == again != other
        torch.manual_seed(0)
        assert drawn == torch.rand(1).item()  # the caller's stream goes on as if it were not there

    def test_one_that_leaves_its_ball(self):
        attack = attacks.make("mine:far_attack", eps=EPS, generator=generator())
        with pytest.raises(InputError, match="'far_attack' moved a pixel by 0.3 but eps is 0.1"):
            attack(PROBLEM.build(), torch.zeros(1, 1, 28, 28), torch.tensor([0]))

    def test_a_run_by_name(self, small_data, workdir, few_candidates):
        pytest.importorskip("foolbox")
        run.main(["--attack", "mine:foolbox_fgsm", *TINY])
        run.main(["--attack", "fgsm", *TINY, "--out", "b"])
        named = "runs/mnist-mine.foolbox_fgsm-paper-quick"  # without a colon
        theirs, ours = ((workdir / out / "metrics.csv").read_text() for out in (named, "b"))
        assert theirs.splitlines()[1:] == ours.splitlines()[1:]  # the same bits
