"""Attacks: closed forms on linear models, no trace left in a model, another library's bits."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import generator, snapshot
from torch import Tensor, nn

from l2l_ref import attacks
from l2l_ref.attacks import fgsm, make, n_fgsm, pgd
from l2l_ref.errors import InputError
from l2l_ref.guard import guarded

EVERY = {"fgsm": fgsm, "pgd": pgd}
every_attack = pytest.mark.parametrize("attack", EVERY.values(), ids=EVERY)


def linear(weight: list, bias: list) -> nn.Linear:
    model = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
        model.bias.copy_(torch.tensor(bias))
    return model


def norms_net() -> nn.Module:
    """Every kind of module that changes itself in a forward pass."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 8, 8, generator=generator(1)), torch.arange(n) % 5


@pytest.fixture(scope="module")
def trained():
    """A small network, fitted until it has something to lose, and its data."""
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    x = (torch.rand(3, 1, 6, 6)[y] * 0.6 + 0.4 * torch.rand(300, 1, 6, 6)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model, x, y


# --- What an attack computes ----------------------------------------------------------------------


@every_attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-3, 0.3, 1.7])
def test_stays_in_the_ball_and_the_box(attack, dtype, eps):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    x = torch.cat([torch.rand(20, 9), torch.zeros(3, 9), torch.ones(3, 9)]).to(dtype)

    def model(x_adv):  # checks the points on the way as well
        assert 0 <= x_adv.min() and x_adv.max() <= 1
        assert (x_adv - x).abs().max() <= eps + torch.finfo(dtype).eps
        return net(x_adv)

    x_adv = attack(model, x, torch.arange(26) % 4, eps=eps)
    assert (x_adv.shape, x_adv.dtype) == (x.shape, dtype)
    model(x_adv)
    assert (x_adv - x).abs().amax(1).min() >= 0.5 * min(eps, 0.5)  # and no sample stays put


@pytest.mark.parametrize(
    "attack", [fgsm, partial(pgd, random_start=False), pgd, partial(pgd, steps=1, step_size=9.0)]
)
def test_finds_the_worst_corner_of_a_linear_model(attack):
    # Logits (3a - 1.5, 3b - 1.5, 0). The loss gradient is (3 p0, 3 p1) less row y of the weights:
    # (3 p0 - 3, 3 p1), (3 p0, 3 p1 - 3), (3 p0, 3 p1): its signs are the same on the whole plane.
    model = linear([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]], [-1.5, -1.5, 0.0])
    x = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    x_adv = attack(model, x, torch.tensor([0, 1, 2, 0]), eps=0.25)
    expected = torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.75, 0.75], [0.0, 1.0]])
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-6)


@every_attack
def test_eps_zero_is_the_identity(attack):
    x = torch.tensor([[0.0, -0.0, 1.0, 0.1, 1e-42]])
    x_adv = attack(nn.Linear(5, 2), x, torch.tensor([0]), eps=0.0)
    assert torch.equal(x_adv, x) and torch.equal(x_adv.signbit(), x.signbit())


def test_generators_are_found_wherever_they_are_bound():
    bound = partial(pgd, eps=0.1, generator=(own := generator()))
    for function in (bound, guarded(bound, eps=0.1), partial(guarded(bound, eps=0.1), None),
                     partial(print, attack=bound)):  # fmt: skip
        assert attacks.generators(function) == [own]
    assert attacks.generators(fgsm) == []


@every_attack
def test_a_samples_result_does_not_depend_on_the_batch_size(attack):
    # p1 = e^-10 is a float16; divided by 8192 it would be 0, and so would the gradient's sign.
    model = linear([[0.0], [1.0]], [10.0, 0.0]).half()
    x, y = torch.full((8192, 1), 0.5, dtype=torch.half), torch.zeros(8192, dtype=torch.int64)
    assert (attack(model, x, y, eps=0.25) == 0.75).all()


def test_pgd_takes_as_many_steps_as_it_says_of_the_size_it_says():
    seen = []

    def model(x):
        seen.append(x.detach().clone())
        return torch.cat([torch.zeros_like(x), x], 1)

    x, y = torch.full((1, 1), 0.25), torch.tensor([0])
    x_adv = pgd(model, x, y, eps=0.5, steps=5, random_start=False)  # steps of 2.5 * 0.5 / 5
    assert torch.stack([*seen, x_adv]).flatten().tolist() == [0.25, 0.5, 0.75, 0.75, 0.75, 0.75]
    seen.clear()
    x_adv = pgd(model, x, y, eps=0.5, steps=3, step_size=0.125, random_start=False)
    assert torch.stack([*seen, x_adv]).flatten().tolist() == [0.25, 0.375, 0.5, 0.625]


def test_random_start_is_uniform_in_the_ball_and_the_box():
    x, y = torch.full((20000, 2), 0.5), torch.zeros(20000, dtype=torch.int64)
    x[:, 1] = 0.0
    start = generator()
    flat = linear([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0])  # no gradient, so PGD ends where it starts
    inner, edge = (pgd(flat, x, y, eps=0.2, steps=1, generator=start) - x).T
    assert inner.histc(4, -0.2, 0.2).div(20000).sub(0.25).abs().max() < 0.02
    assert (edge == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert edge.min() == 0 and edge.max() > 0.19
    assert torch.equal(pgd(flat, x, y, eps=0.2, steps=1, random_start=False), x)


def test_n_fgsm_is_a_step_from_noise_of_twice_eps_clipped_to_pixels():
    """Of a linear model the gradient is the same everywhere, of a valley not."""
    model, x, y = nn.Linear(50, 2).double(), torch.rand(4, 50).double(), torch.tensor([0, 1, 0, 1])
    x[:, :25] = 0.5
    found = n_fgsm(model, x, y, eps=0.05, generator=generator(3))
    sign = (model.weight[1 - y] - model.weight[y]).sign()
    noise = torch.empty_like(x).uniform_(-0.1, 0.1, generator=generator(3))
    torch.testing.assert_close(found, (x + noise + 0.05 * sign).clamp(0, 1))
    assert (found - x).abs().max() > 0.14 and (found[:, 25:] == 1).any()
    valley = lambda x: torch.stack((-(x - 0.5).square().sum(1), 0 * x[:, 0]), 1)  # noqa: E731
    found = n_fgsm(valley, torch.full_like(x, 0.5), 0 * y, eps=0.05, generator=generator(3))
    torch.testing.assert_close(found, 0.5 + noise + 0.05 * noise.sign())


def test_generator_may_live_on_another_device_than_x():
    x, y = torch.rand(4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    start = generator()
    before = start.get_state()
    x_adv = pgd(nn.Linear(3, 2, device="meta"), x, y, eps=0.1, generator=start)
    assert x_adv.device.type == "meta" and x_adv.shape == x.shape
    assert not torch.equal(start.get_state(), before)  # drawn where the generator is


def test_margin_by_hand():
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, 5.0, 2.0], [4.0, -1.0, 3.5], [0.0, 0.0, 0.0]])
    y = torch.tensor([1, 0, 1, 2])
    assert attacks.margin(logits, y).tolist() == [-3.0, 4.0, 5.0, 0.0]
    assert attacks.margin(logits * math.nan, y).isnan().all()


def test_the_margin_climbs_where_the_cross_entropy_is_flat():
    """A logit of 100 leaves a cross-entropy of 0, whose gradient is 0 to the bit."""

    def model(x):
        return torch.cat([torch.zeros_like(x), 1000 * (x - 0.4)], 1)

    x, y = torch.tensor([[0.5]]), torch.tensor([1])
    options = {"eps": 0.2, "steps": 4}
    assert pgd(model, x, y, **options, random_start=False).item() == 0.5
    made = make("pgd", **options, loss="margin")
    assert made(model, x, y).item() == pytest.approx(0.3)  # from any start


def rude(model, x, y, *, eps):
    """What an attack of another library may do; it pays for the input's gradient alone."""
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    model.eval()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    x_adv = x + eps * x.grad.sign()
    model.zero_grad(set_to_none=False)
    model.train()
    model(x_adv)
    torch.set_grad_enabled(False)
    return x_adv


def failing(model, x, y, *, eps):
    rude(model, x, y, eps=eps)
    raise KeyError("half way")


def mixed_modes(model: nn.Module) -> None:
    model.eval()
    model[1].train()


STATES = {"train": nn.Module.train, "eval": nn.Module.eval, "mixed": mixed_modes}


@pytest.mark.parametrize("attack", [*EVERY.values(), guarded(rude)], ids=[*EVERY, "rude"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_guarded(attack, state, grads, enabled):
    """Under `no_grad` too."""
    model, (x, y) = norms_net(), images()
    state(model)
    model[3].bias.requires_grad_(False)
    if grads:
        F.cross_entropy(model(x), y).backward()
    x.requires_grad_()
    before, calm = snapshot(model), x.detach().clone()
    with torch.set_grad_enabled(enabled):
        x_adv = attack(model, x, y, eps=0.1)
        assert torch.is_grad_enabled() == enabled
    assert snapshot(model) == before
    assert torch.equal(x, calm) and x.requires_grad and x.grad is None
    assert not x_adv.requires_grad and x_adv.grad_fn is None and not torch.equal(x_adv, x)


def test_guarded_when_it_raises():
    model, (x, y) = norms_net(), images()
    F.cross_entropy(model(x), y).backward()
    before = snapshot(model)
    with pytest.raises(KeyError, match="half way"):
        guarded(failing)(model, x, y, eps=0.1)
    with pytest.raises(IndexError):
        fgsm(model, x, y + 99, eps=0.1)
    assert snapshot(model) == before and torch.is_grad_enabled()


def test_parameters_that_are_computed_need_no_freezing():
    """As in meta-learning, where a layer's weight may be the output of something else."""
    model, source = nn.Linear(3, 2), torch.rand(2, 3, requires_grad=True)
    del model.weight
    model._parameters["weight"] = source * 2
    x, y = torch.rand(4, 3), torch.arange(4) % 2
    plain = nn.Linear(3, 2)
    plain.load_state_dict({"weight": 2 * source.detach(), "bias": model.bias.detach()})
    assert torch.equal(fgsm(model, x, y, eps=0.1), fgsm(plain, x, y, eps=0.1))
    F.cross_entropy(model(x), y).backward()
    assert source.grad.abs().sum() > 0


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_crafts_against_the_models_current_mode(state):
    model, (x, y) = norms_net(), images()
    for _ in range(3):
        model(x)  # running statistics unlike those of the batch
    state(model)
    leaf, copied = x.clone().requires_grad_(), copy.deepcopy(model)
    F.cross_entropy(copied(leaf), y, reduction="sum").backward()
    expected = (x + 0.1 * leaf.grad.sign()).clamp(0, 1)
    x_adv = fgsm(model, x, y, eps=0.1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_graph_that_waits_for_backward_survives(state):
    model, (x, y) = norms_net(), images()
    state(model)
    loss = F.cross_entropy(model(x), y)
    expected = torch.autograd.grad(loss, model[0].bias, retain_graph=True)
    fgsm(model, x, y, eps=0.1)
    assert torch.equal(torch.autograd.grad(loss, model[0].bias)[0], expected[0])


# --- How it is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eps": -0.1}, "eps is -0.1"),
        ({"eps": math.nan}, "eps is nan"),
        ({"eps": math.inf}, "eps is inf"),
        ({"eps": 0.1, "steps": 0}, "steps is 0"),
        ({"eps": 0.1, "step_size": 0.0}, "step_size is 0.0"),
        ({"eps": 0.1, "step_size": math.nan}, "step_size is nan"),
        ({"eps": 0.0, "loss": "hinge"}, "loss is 'hinge'.*cross_entropy, margin"),
        ({"eps": 0.0, "norm": "l1"}, "norm is 'l1'.*linf, l2"),
    ],
)
def test_numbers_out_of_range_are_named(options, named):
    for attack in [pgd] + [fgsm] * (not options.keys() & {"steps", "step_size"}):
        with pytest.raises(InputError, match=named):
            attack(nn.Linear(2, 2), torch.rand(1, 2), torch.tensor([0]), **options)


def test_make(trained):
    """What is drawn is of the generator alone."""
    (model, x, y), before = trained, torch.get_rng_state()

    def made(name):
        return make(name, eps=0.2, steps=2, loss="margin", generator=generator())(model, x, y)

    for name, expected in {
        "none": x,
        "fgsm": fgsm(model, x, y, eps=0.2, loss="margin"),
        "n-fgsm": n_fgsm(model, x, y, eps=0.2, generator=generator()),
        "pgd": pgd(model, x, y, eps=0.2, steps=2, loss="margin", generator=generator()),
    }.items():
        assert torch.equal(made(name), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="'cw'.*none, fgsm, n-fgsm, pgd"):
        made("cw")


# --- In l2 ----------------------------------------------------------------------------------------


class TestL2:
    EPS = 0.5

    @pytest.fixture
    def batch(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 5)).eval()
        return model, *images(16)

    def test_one_step_goes_along_the_gradient(self):
        model = nn.Linear(36, 2, bias=False)
        x, y = torch.full((4, 36), 0.5), torch.zeros(4, dtype=torch.int64)
        up = (model.weight[1] - model.weight[0]).detach()
        x_adv = fgsm(model, x, y, eps=0.1, norm="l2")
        torch.testing.assert_close(x_adv - x, (0.1 * up / up.norm()).expand_as(x))
        nn.init.zeros_(model.weight)  # no gradient moves nothing
        assert torch.equal(fgsm(model, x, y, eps=0.1, norm="l2"), x)

    @pytest.mark.parametrize("loss", attacks.LOSSES)
    @pytest.mark.parametrize("random_start", [False, True])
    def test_within_ball_and_box(self, batch, loss, random_start):
        model, x, y = batch
        options = {"eps": self.EPS, "norm": "l2", "loss": loss, "random_start": random_start}
        x_adv = pgd(model, x, y, steps=20, generator=generator(), **options)
        lengths = (x_adv - x).flatten(1).norm(dim=1)
        assert (lengths <= self.EPS * (1 + 1e-5)).all() and lengths.max() > 0.9 * self.EPS
        assert 0 <= x_adv.min() and x_adv.max() <= 1
        before, after = (attacks.LOSSES[loss](model(z), y).detach() for z in (x, x_adv))
        assert (after > before).all()

    def test_projection_is_the_nearest_point_of_the_ball(self, batch):
        """A step that is too long ends where the line from x meets the ball."""
        model, x, y = batch
        x = 0.4 + 0.2 * x  # far from the box
        near, far = (
            pgd(model, x, y, eps=0.1, norm="l2", steps=1, step_size=size, random_start=False)
            for size in (0.1, 7.0)
        )
        torch.testing.assert_close(near, far)

    def test_starts_are_uniform_in_the_ball(self):
        x, y = torch.full((4000, 3), 0.5), torch.zeros(4000, dtype=torch.int64)
        flat = linear([[0.0] * 3] * 2, [0.0] * 2)  # no gradient: it stays where it starts
        start = pgd(flat, x, y, eps=0.3, norm="l2", steps=1, generator=generator()) - x
        radii = start.norm(dim=1) / 0.3
        assert radii.max() <= 1 + 1e-5
        # of uniform points in three dimensions an eighth lies within half the radius
        assert (radii < 0.5).float().mean().item() == pytest.approx(1 / 8, abs=0.02)
        assert start.mean(0).abs().max() < 0.01


# --- The same bits as another library -------------------------------------------------------------


@pytest.mark.parametrize(
    "eps, steps, step_size", [(0.1, 7, 0.04), (8 / 255, 10, 2 / 255), (0.3, 3, 1.0)]
)
def test_same_bits_as_torchattacks(trained, eps, steps, step_size):
    lib = pytest.importorskip("torchattacks")
    model, *batch = trained
    assert torch.equal(lib.FGSM(model, eps)(*batch), fgsm(model, *batch, eps=eps))
    for start in (False, True):
        torch.manual_seed(0)
        theirs = lib.PGD(model, eps, step_size, steps, random_start=start)(*batch)
        torch.manual_seed(0)
        options = {"eps": eps, "steps": steps, "step_size": step_size, "random_start": start}
        assert torch.equal(pgd(model, *batch, **options), theirs)
