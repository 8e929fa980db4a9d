"""Eq. 3-6, the nominal term and the penalty: by hand, against PyTorch's own, and autograd."""

import math
from functools import partial

import conftest
import pytest
import torch
from conftest import FORMS, generator, wild
from torch import nn

from l2l_ref import equations
from l2l_ref.equations import (
    adam_direction,
    preprocess,
    robust_loss,
    theta_step_,
    unroll_meta_gradient,
)

FORMS = [dict(theta_input=theta_input, odd=odd) for theta_input, odd in FORMS]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)


random_phi = partial(conftest.random_phi, dtype=torch.float64)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


class TestPreprocess:
    """Eq. 5 with p = 10: e^-10 = 4.5399929762484854e-05."""

    def test_by_hand(self):
        gradient, *expected = torch.tensor(
            [
                (0.0, -1.0, 0.0),
                (math.e, 0.1, 1.0),
                (-math.exp(-5), -0.5, -1.0),
                (math.exp(-11), -1.0, math.exp(-1)),
                (-math.exp(-12), -1.0, -math.exp(-2)),
                (-math.inf, math.inf, -1.0),
                (1e-310, -1.0, 2.2026465794806717e-306),  # denormal in float64
                (math.nan, -1.0, math.nan),
            ],
            dtype=torch.float64,
        ).T
        found = preprocess(gradient, 10.0)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=0, equal_nan=True)

    @pytest.mark.parametrize("p, apart", [(3.0, 0.01), (10.0, 1e-9)])
    def test_p_sets_threshold_and_scale(self, p, apart):
        """However near, exp(p)·g is visibly below 1 only where the linear branch is taken."""
        above, below = (math.exp(-p) * (1 + way * apart) for way in (1, -1))
        log, direction = preprocess(torch.tensor([above, below], dtype=torch.float64), p)
        assert direction[0] == 1 and direction[1] < 1
        assert log[0].item() == pytest.approx((math.log1p(apart) - p) / p) and log[1] == -1

    @pytest.mark.parametrize("p", [1e-3, 10.0, equations.MAX_P])
    def test_zero_is_minus_one_and_zero_for_every_allowed_p_with_a_derivative(self, p):
        g = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        found = preprocess(g, p)
        assert found.flatten().tolist() == [-1.0, 0.0] and preprocess(g.float(), p)[1] == 0
        found.sum().backward()
        assert g.grad.item() == pytest.approx(math.exp(p))


class TestStep:
    @pytest.mark.parametrize("num_layers", [1, 2, 3])
    @pytest.mark.parametrize("theta_input", [False, True])
    def test_equals_nn_lstm_along_a_trajectory(self, num_layers, theta_input):
        n, steps = 7, 100
        meta = random_phi(num_layers=num_layers, theta_input=theta_input)
        theta, state = normal(n), meta.init_state(n)
        expected, hidden = theta.clone(), None
        for t in range(steps):
            gradient = 10.0 ** (t % 9 - 6) * normal(n, seed=t)
            theta_step_([theta], [gradient], [state], meta.phi(), **meta.form)
            with torch.no_grad():  # the oracle: PyTorch's own modules, [sequence, batch, input]
                inputs = [*preprocess(gradient, 10.0)]
                inputs += [(10 * expected).clamp(-5, 5)] if theta_input else []
                out, hidden = meta.lstm(torch.stack(inputs, dim=-1)[None], hidden)
                expected += 0.01 * meta.head(out)[0, :, 0]
            torch.testing.assert_close(theta, expected, rtol=1e-12, atol=1e-12)
        for layer, (h, c) in enumerate(zip(*hidden, strict=True)):
            torch.testing.assert_close(state[layer, 0], h.T)
            torch.testing.assert_close(state[layer, 1], c.T)

    @pytest.mark.parametrize("theta_input", [False, True])
    def test_odd_form_is_the_difference_of_two_plain_ones(self, theta_input):
        n = 5
        meta = random_phi(theta_input=theta_input, odd=True)
        plain = {**meta.form, "odd": False}
        theta, gradient = normal(n), 1e-4 * normal(n, seed=1)
        state = normal(2, 2, 20, 2 * n, seed=2)
        u, after = equations.update(theta, gradient, state, meta.phi(), **meta.form)
        up, after_plus = equations.update(theta, gradient, state[..., :n], meta.phi(), **plain)
        um, after_minus = equations.update(-theta, -gradient, state[..., n:], meta.phi(), **plain)
        torch.testing.assert_close(u, up - um)
        torch.testing.assert_close(after, torch.cat((after_plus, after_minus), dim=-1))

    def test_bfloat16(self):
        meta = random_phi(dtype=torch.bfloat16)
        theta, state = torch.zeros(4, dtype=torch.bfloat16), meta.init_state(4)
        theta_step_([theta], [torch.ones_like(theta)], [state], meta.phi(), **meta.form)
        assert theta.all() and state.any()


class TestMetaGradient:
    """The closed form; tests/test_episode.py has it through a whole unroll, optimizee included."""

    @pytest.mark.parametrize("form", FORMS)
    def test_is_autograd_through_the_updates(self, form, monkeypatch):
        """In blocks, from any state, and whatever moved θ from one update to the next."""
        monkeypatch.setattr(equations, "BLOCK", 3)
        meta = random_phi(hidden_size=5, **form)
        gradients, cotangents, thetas = (normal(4, 7, seed=seed) for seed in range(3))
        seen = thetas if form["theta_input"] else None
        state = normal(*meta.init_state(7).shape, seed=3)
        phi = meta.phi().detach().requires_grad_()
        updates, after = [], state
        for theta, gradient in zip(thetas, gradients, strict=True):
            u, after = equations.update(theta, gradient, after, phi, **meta.form)
            updates.append(u)
        (expected,) = torch.autograd.grad((torch.stack(updates) * cotangents).sum(), phi)
        close(unroll_meta_gradient(gradients, state, cotangents, phi, seen, **meta.form), expected)

    def test_keeps_no_graph_and_touches_nothing(self):
        meta = random_phi(hidden_size=5, theta_input=True)
        inputs = normal(3, 4), meta.init_state(4), normal(3, 4), meta.phi(), normal(3, 4)
        before = [t.detach().clone() for t in inputs]
        assert not unroll_meta_gradient(*inputs, **meta.form).requires_grad
        assert all(map(torch.equal, inputs, before))


class TestDirection:
    """Adam's, of the nominal term."""

    def test_is_adams_over_200_steps_of_wild_gradients(self):
        n = 50
        gradients = wild(200, n)
        theta = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        adam = torch.optim.Adam([theta], lr=1.0)
        moments = torch.zeros(3, n, dtype=torch.float64)
        for t, gradient in enumerate(gradients):
            with torch.no_grad():
                theta.zero_()  # Adam reads no θ, so -θ is its direction
            theta.grad = gradient.clone()
            adam.step()
            before = moments.clone()
            d, following = adam_direction(gradient, moments)
            assert torch.equal(moments, before)  # nothing in place
            moments = following
            torch.testing.assert_close(d, -theta.detach(), rtol=1e-12, atol=0)
            assert (moments[2] == t + 1).all()

    def test_has_a_derivative_where_no_gradient_was_ever_seen(self):
        """As of pixels that are always black: a root's slope at 0 would make a second order NaN."""
        gradient = torch.tensor([0.0, 0.25], dtype=torch.float64, requires_grad=True)
        moments = torch.zeros(3, 2, dtype=torch.float64)
        direction, following = adam_direction(gradient, moments)
        assert direction[0] == 0 and following[:, 0].tolist() == [0, 0, 1]
        (slope,) = torch.autograd.grad(direction.sum(), gradient)
        assert slope.isfinite().all() and slope[0] == 0

        def twice(second):
            _, seen = adam_direction(torch.tensor([0.5, -0.25], dtype=torch.float64), moments)
            return adam_direction(second, seen)[0]

        assert torch.autograd.gradcheck(twice, gradient)


class TestRobustLoss:
    """Eq. 6, whose clean loss may be penalised; tests/test_episode.py has its derivatives."""

    @pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
    @pytest.mark.parametrize("penalty", [0.0, 0.7])
    def test_weighs_by_alpha_and_computes_what_counts(self, alpha, penalty):
        """Of the losses x², whose slope is 2x, and of an attack that adds 100."""
        seen, crafted = [], []

        def loss(model, x, y):
            seen.append(x.item())
            return x.square()

        def attack(model, x, y):
            crafted.append(x.item())
            return x + 100

        x = torch.tensor(-4.0)
        found = robust_loss(loss, None, x, None, attack=attack, alpha=alpha, penalty=penalty)
        assert found.item() == pytest.approx(alpha * (16 + penalty * 8) + (1 - alpha) * 96**2)
        assert crafted == [-4] * (alpha < 1)
        assert seen == [96] * (alpha < 1) + [-4] * (alpha > 0)
        assert not x.requires_grad
