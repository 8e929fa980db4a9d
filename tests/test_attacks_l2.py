"""The attacks in l2: by hand, within the ball and the box, and against foolbox and cleverhans."""

import pytest
import torch
from conftest import generator
from torch import nn

from l2l_ref.attacks import LOSSES, fgsm, pgd
from l2l_ref.errors import InputError

EPS = 0.5


def images(b=16):
    return torch.rand(b, 1, 6, 6, generator=generator(1)), torch.arange(b) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 3)).eval()


def lengths(x_adv, x):
    return (x_adv - x).flatten(1).norm(dim=1)


def test_one_step_goes_along_the_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2, bias=False))
    x, y = torch.full((4, 1, 6, 6), 0.5), torch.zeros(4, dtype=torch.int64)
    up = (model[1].weight[1] - model[1].weight[0]).detach()
    x_adv = fgsm(model, x, y, eps=0.1, norm="l2")
    expected = (0.1 * up / up.norm()).view(1, 6, 6).expand_as(x)
    torch.testing.assert_close(x_adv - x, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("random_start", [False, True])
def test_within_ball_and_box(loss, random_start):
    model, (x, y) = net(), images()
    options = {"eps": EPS, "norm": "l2", "loss": loss, "random_start": random_start}
    x_adv = pgd(model, x, y, steps=20, generator=generator(), **options)
    assert (lengths(x_adv, x) <= EPS * (1 + 1e-5)).all() and lengths(x_adv, x).max() > 0.9 * EPS
    assert 0 <= x_adv.min() and x_adv.max() <= 1
    before, after = (LOSSES[loss](model(z), y).detach() for z in (x, x_adv))
    assert (after > before).all()


def test_projection_is_the_nearest_point_of_the_ball():
    """A step that is too long ends where the line from x meets the ball."""
    model, (x, y) = net(), images()
    x = 0.4 + 0.2 * x  # far from the box
    near, far = (
        pgd(model, x, y, eps=0.1, norm="l2", steps=1, step_size=size, random_start=False)
        for size in (0.1, 7.0)
    )
    torch.testing.assert_close(near, far)


def test_starts_are_uniform_in_the_ball():
    x, y = torch.full((4000, 3), 0.5), torch.zeros(4000, dtype=torch.int64)
    flat = nn.Linear(3, 2)
    nn.init.zeros_(flat.weight)  # no gradient: it stays where it starts
    start = pgd(flat, x, y, eps=0.3, norm="l2", steps=1, generator=generator()) - x
    radii = start.norm(dim=1) / 0.3
    assert radii.max() <= 1 + 1e-5
    # of uniform points in three dimensions an eighth lies within half the radius
    assert (radii < 0.5).float().mean().item() == pytest.approx(1 / 8, abs=0.02)
    assert start.mean(0).abs().max() < 0.01


def test_no_gradient_moves_nothing():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    nn.init.zeros_(flat[1].weight)
    x, y = images()
    assert torch.equal(fgsm(flat, x, y, eps=EPS, norm="l2"), x)


def test_as_foolbox_has_it():
    foolbox = pytest.importorskip("foolbox")
    model, (x, y) = net(), images()
    theirs = foolbox.PyTorchModel(model, (0, 1))
    fast = foolbox.attacks.L2FastGradientAttack().run(theirs, x, y, epsilon=EPS)
    torch.testing.assert_close(fgsm(model, x, y, eps=EPS, norm="l2"), fast)
    options = {"steps": 9, "random_start": False}
    slow = foolbox.attacks.L2PGD(abs_stepsize=0.1, **options).run(theirs, x, y, epsilon=EPS)
    ours = pgd(model, x, y, eps=EPS, step_size=0.1, norm="l2", **options)
    torch.testing.assert_close(ours, slow)


def test_as_cleverhans_has_it():
    pytest.importorskip("cleverhans")
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method

    model, (x, y) = net(), images()
    theirs = fast_gradient_method(model, x, EPS, 2, clip_min=0.0, clip_max=1.0, y=y)
    torch.testing.assert_close(fgsm(model, x, y, eps=EPS, norm="l2"), theirs)


def test_mistakes_are_named():
    model, (x, y) = net(), images()
    for attack in (fgsm, pgd):
        with pytest.raises(InputError, match="norm is 'l1', which is unknown; choose one of linf"):
            attack(model, x, y, eps=EPS, norm="l1")
        with pytest.raises(InputError, match="loss is 'hinge', which is unknown"):
            attack(model, x, y, eps=EPS, loss="hinge")
