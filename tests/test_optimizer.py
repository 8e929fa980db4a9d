"""LearnedOptimizer as PyTorch users know optimizers, and MetaOptimizer as a module."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import every_form, generator, weights, wild
from conftest import random_phi as phi
from torch import nn

from l2l_ref import equations
from l2l_ref.equations import adam_direction
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, phi_groups
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.problems import make as make_problem


def net() -> nn.Module:
    return make_problem("mnist").draw(generator(1))


def backward(model, seed=0):
    x = torch.rand(4, 1, 28, 28, generator=generator(seed))
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()


def test_parameters_without_a_gradient_are_skipped_with_their_state():
    meta, model = phi(nominal=True), net()
    alone = copy.deepcopy(model)
    optimizer = LearnedOptimizer(model.parameters(), meta)
    expected = LearnedOptimizer([alone[3].weight], meta)  # sees only the steps that count
    last = model[3].weight
    for t, frozen in enumerate([False, True, False, True, False]):
        optimizer.zero_grad()
        backward(model, seed=t)
        if frozen:
            last.grad = None
        else:
            alone[3].weight.grad = last.grad.clone()
            expected.step()
        optimizer.step()
        torch.testing.assert_close(last, alone[3].weight)
    assert LearnedOptimizer(net().parameters(), meta).step() is None  # no gradients at all


def test_groups_bring_their_own_phi():
    a, b = phi(1), phi(2, odd=True)
    problem = make_problem("cifar10")
    model = problem.draw(generator(0))
    groups = phi_groups(model)
    assert list(groups) == ["convolutional", "linear"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    apart = copy.deepcopy(model)
    joint = LearnedOptimizer(groups["convolutional"], a)
    joint.add_param_group({"params": groups["linear"], "meta_optimizer": b})
    separate = [*map(LearnedOptimizer, phi_groups(apart).values(), (a, b))]
    for m in (model, apart):
        torch.manual_seed(0)
        nn.functional.cross_entropy(m(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
    joint.step()
    for optimizer in separate:
        optimizer.step()
    assert torch.equal(weights(model), weights(apart))


def test_keeps_no_graph_and_runs_closures_with_gradients():
    meta, model = phi(), net()
    optimizer = LearnedOptimizer(model.parameters(), meta)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1, 28, 28)).square().sum()
        loss.backward()
        return loss

    places = [p.data_ptr() for p in model.parameters()]
    assert optimizer.step(closure).item() > 0
    assert [p.data_ptr() for p in model.parameters()] == places  # as DDP and CUDA graphs need it
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())
    assert all(p.grad is None for p in meta.parameters())
    assert not any(s["lstm"].requires_grad for s in optimizer.state.values())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: LearnedOptimizer(m.parameters()), "has no φ"),
        (lambda m: LearnedOptimizer(m.to(torch.cfloat).parameters(), phi()), "complex64"),
        (lambda m: LearnedOptimizer(m.to("meta").parameters(), phi()), "on meta but φ is on cpu"),
        (lambda m: LearnedOptimizer(m.parameters(), phi(), lr=-1.0), "lr is -1.0"),
        (lambda m: LearnedOptimizer(m.parameters(), phi(), weight_decay=math.nan), "decay is nan"),
        (
            lambda m: LearnedOptimizer(m.parameters(), nn.ModuleDict({"linear": phi()})),
            "no φ but a ModuleDict: .* LearnedOptimizer.for_model",
        ),
        (lambda m: LearnedOptimizer(m.parameters(), phi(), backend="gpu"), "'gpu' is unknown"),
        (lambda m: MetaOptimizer(p=0.0), "p is 0.0: it must be above 0 and at most 80"),
        (lambda m: MetaOptimizer(p=float("nan")), "p is nan"),
        (lambda m: MetaOptimizer(p=90.0), "p is 90.0"),
        (lambda m: MetaOptimizer(hidden_size=0), "hidden_size is 0"),
        (lambda m: MetaOptimizer(output_scale=float("inf")), "output_scale is inf"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make(net())


def test_phi_is_a_plain_state_dict():
    meta = phi()
    lstm, head = nn.LSTM(2, 20, 2), nn.Linear(20, 1)
    names = {f"lstm.{k}" for k in lstm.state_dict()} | {f"head.{k}" for k in head.state_dict()}
    assert set(meta.state_dict()) == names
    assert meta.phi().numel() == 5301  # 80·(2+20+2) + 80·(20+20+2) + 21
    nominal = phi(nominal=True)  # η is not among what is packed
    assert set(nominal.state_dict()) == names | {"log_eta"} and nominal.phi().numel() == 5301
    for saved in (meta, nominal):
        twin = MetaOptimizer(**saved.settings)
        twin.load_state_dict(saved.state_dict())
        assert twin.settings == saved.settings
        assert all(map(torch.equal, twin.parameters(), saved.parameters()))


def test_phi_is_drawn_from_the_generator():
    a, b, c = (MetaOptimizer(generator=generator(s)).phi() for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert (a[:-21].abs() <= 20**-0.5).all() and (a[-21:] == 0).all()


def test_eta_begins_at_a_thousandth():
    assert MetaOptimizer(nominal=True).log_eta.exp().item() == pytest.approx(1e-3)
    plain = MetaOptimizer()
    assert plain.log_eta is None and not plain.nominal and plain.init_moments(3) is None
    theta, state = plain(torch.zeros(3), torch.ones(3), plain.init_state(3))
    assert not theta.any() and state.any()  # an untrained φ without that term changes nothing


@every_form
def test_forward_step_and_optimizer_agree(backend, theta_input, odd):
    n, meta = 7, phi(nominal=True, theta_input=theta_input, odd=odd, hidden_size=5).double()
    theta = 0.3 * torch.randn(n, generator=generator(3), dtype=torch.float64)
    param, stepped = nn.Parameter(theta.clone()), theta.clone()
    optimizer = LearnedOptimizer([param], meta, backend=backend)
    state, moments = meta.init_state(n), meta.init_moments(n)
    own_state, own_moments = meta.init_state(n), meta.init_moments(n)
    agree = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
    for gradient in wild(5, n):
        before = theta, state, moments
        theta, state, moments = meta(theta, gradient, state, moments, backend=backend)
        (direction,) = meta.step_(
            [stepped], [gradient], [own_state], [own_moments], backend=backend
        )
        param.grad = gradient.clone()
        optimizer.step()
        agree(stepped, theta.detach())
        agree(param.detach(), theta.detach())
        agree(own_state, state.detach())
        agree(own_moments, moments.detach())
        agree(optimizer.state[param]["moments"], moments.detach())
        agree(optimizer.state[param]["lstm"].flatten(3), state.detach())
        # θ + u - η·d, by the equations
        d, _ = adam_direction(gradient, before[2])
        agree(direction, d)
        moved, _ = equations.theta_step(before[0], gradient, before[1], meta.phi(), **meta.form)
        agree(theta, moved - meta.log_eta.exp() * d)


def test_gradients_reach_eta_and_phi_and_what_it_reads(backend):
    meta = phi(nominal=True, hidden_size=4).double()
    gradient = torch.ones(3, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(3).double(), meta.init_state(3), meta.init_moments(3)
    theta, state, _ = meta(zeros[0], gradient, *zeros[1:], backend=backend)
    theta.sum().backward()
    # d is 1 / (1 + 1e-8) of a first gradient of 1: three coordinates move by -η
    assert meta.log_eta.grad.item() == pytest.approx(-3 * 0.02, rel=1e-6)
    assert all(p.grad is not None for p in meta.parameters())
    assert gradient.grad.abs().sum() > 0 and state.shape == (2, 2, 4, 3)
