"""Attacks of other libraries as they are: foolbox, torchattacks, cleverhans; and by name."""

import math
import sys
from functools import partial

import pytest
import torch
from conftest import TINY, generator, weights
from torch.utils.data import DataLoader, TensorDataset

import run
from l2l_ref import attacks, foreign, problems
from l2l_ref.episode import Episode
from l2l_ref.errors import InputError
from l2l_ref.evaluate import robust_accuracy
from l2l_ref.guard import guarded
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.meta_settings import MetaSettings
from l2l_ref.meta_training import meta_train

EPS = 0.1
PROBLEM = problems.make("mnist")


def of_foolbox():
    attack = pytest.importorskip("foolbox").attacks.LinfPGD(rel_stepsize=0.5, steps=3)
    return foreign.adapted(attack, eps=EPS)


def of_foolbox_by_class():
    return foreign.adapted(pytest.importorskip("foolbox").attacks.LinfFastGradientAttack, eps=EPS)


def of_torchattacks():
    return foreign.adapted(pytest.importorskip("torchattacks").PGD, eps=EPS)


def of_cleverhans():
    pytest.importorskip("cleverhans")
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method as fast

    return lambda model, x, y: fast(model, x, EPS, math.inf, clip_min=0.0, clip_max=1.0, y=y)


LIBRARIES = [of_foolbox, of_foolbox_by_class, of_torchattacks, of_cleverhans]


@pytest.fixture(scope="module")
def trained(small_digits):
    """The nearest mean of a class, as a linear model."""
    x, y = small_digits.train.all()
    means = torch.stack([x[y == k].mean(0).flatten() for k in range(10)])
    model = problems.make("mnist", "logistic").build()
    model[1].load_state_dict({"weight": means, "bias": -means.square().sum(1) / 2})
    return model


@pytest.mark.parametrize("library", LIBRARIES)
def test_it_judges(library, trained, small_digits):
    attack, images = guarded(library(), eps=EPS), small_digits.test.first(100)
    before = weights(trained), trained.training
    clean = robust_accuracy(trained, images, attacks.none)
    assert robust_accuracy(trained, images, attack) < clean - 0.1 and clean > 0.5
    assert torch.equal(weights(trained), before[0]) and trained.training == before[1]
    assert all(p.requires_grad for p in trained.parameters())


def test_torchattacks_aims_at_the_classes_that_there_are():
    lib, met = pytest.importorskip("torchattacks"), []

    class Aiming(lib.PGD):
        def __init__(self, model, eps, n_classes=10):
            met.append((eps, n_classes))
            super().__init__(model, eps=eps, steps=1)

    x, y = torch.rand(12, 1, 8, 8, generator=generator()), torch.arange(12) % 4
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).eval()
    for attack in (Aiming, lib.AutoAttack):
        assert foreign.adapted(attack, eps=0.01)(model, x, y).shape == x.shape
    assert met == [(0.01, 4)]


@pytest.mark.parametrize("library", [of_foolbox_by_class, of_cleverhans])
def test_it_meta_trains_to_the_bits_of_ours(library, small_digits):
    """The paper's own experiment ran cleverhans."""

    def trained(attack):
        def draw(number):
            noise = generator(number)
            batches = small_digits.train.batches(32, noise)
            return Episode(PROBLEM.draw(noise), batches, attack)

        phi = new_phi(PROBLEM.build(), generator=generator(1))
        settings = MetaSettings(2, steps=8, unroll=4, meta_lr=3e-3, alpha=0.5, input_alpha=0.5)
        return meta_train(phi, settings, draw).norm, weights(phi)

    norm, phi = trained(library())
    own_norm, own_phi = trained(partial(attacks.fgsm, eps=EPS))
    assert norm == pytest.approx(own_norm, rel=1e-4) and min(norm) > 0
    torch.testing.assert_close(phi, own_phi, rtol=1e-3, atol=1e-5)


def test_it_judges_whatever_holds_images(trained, small_digits):
    images = small_digits.test.first(120)
    x, y = images.all()
    attack = partial(attacks.fgsm, eps=0.07)
    expected = robust_accuracy(trained, images, attack)
    assert 0.1 < expected < 0.9
    dataset = TensorDataset(x, y)
    as_numbers = [(image, int(label)) for image, label in dataset]
    loader = DataLoader(dataset, batch_size=50, shuffle=True)

    class Mapped(torch.utils.data.Dataset):
        def __len__(self):
            return len(as_numbers)

        def __getitem__(self, index):
            return as_numbers[index]

    for given in ((x, y), [x, y], dataset, Mapped(), loader, list(loader), iter(loader)):
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
            ("nowhere.at_all:attack", "--attack nowhere.at_all:attack cannot .* PYTHONPATH"),
            ("mine:gone", "no attribute 'gone'"),
            ("mine:EPS", "--attack mine:EPS is no function"),
            (".mine:attack", "--attack .mine:attack cannot be imported"),
            (":attack", "--attack :attack cannot be imported"),
            ("mine:without_eps", "has no argument eps: give a function"),
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
        with pytest.raises(InputError, match="'mine:far_attack' moved a pixel by 0.3 but"):
            attack(PROBLEM.build(), torch.zeros(1, 1, 28, 28), torch.tensor([0]))

    def test_a_run_by_name(self, small_data, workdir, few_candidates):
        pytest.importorskip("foolbox")
        run.main(["--attack", "foolbox.attacks:LinfFastGradientAttack", *TINY])
        run.main(["--attack", "fgsm", *TINY, "--out", "b"])
        named = "runs/mnist-foolbox.attacks.LinfFastGradientAttack-paper-quick"  # without a colon
        theirs, ours = ((workdir / out / "metrics.csv").read_text() for out in (named, "b"))
        assert theirs.splitlines()[1:] == ours.splitlines()[1:]  # the same bits


def test_attacks_without_a_radius_are_named():
    lib = pytest.importorskip("torchattacks")
    for attack in (lib.CW, lib.PGD(PROBLEM.build())):
        with pytest.raises(InputError, match="has no argument eps"):
            foreign.adapted(attack, eps=EPS)
