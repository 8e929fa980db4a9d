"""Eq. 3-6, the nominal term and the penalty: by hand, against PyTorch's own, and autograd."""

import math
from functools import partial

import conftest
import pytest
import torch
from conftest import FORMS, SMALL, generator, wild
from torch import nn

from l2l_ref import equations
from l2l_ref.equations import (
    adam_direction,
    penalised,
    preprocess,
    robust_loss,
    theta_step_,
    unroll_meta_gradient,
)

FORMS = [dict(theta_input=theta_input, odd=odd) for theta_input, odd in FORMS]
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)


random_phi = partial(conftest.random_phi, dtype=torch.float64)


def small_batch():
    """Four samples for `SMALL`, in float64."""
    noise = generator(100)
    x = torch.rand(4, 5, generator=noise, dtype=torch.float64)
    return x, torch.randint(3, (4,), generator=noise)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


class TestPreprocess:
    """Eq. 5 with p = 10: e^-10 = 4.5399929762484854e-05."""

    @pytest.mark.parametrize(
        "gradient, expected",
        [
            (0.0, (-1.0, 0.0)),
            (1.0, (0.0, 1.0)),
            (-1.0, (0.0, -1.0)),
            (math.e, (0.1, 1.0)),
            (-math.exp(-5), (-0.5, -1.0)),
            (math.exp(-11), (-1.0, math.exp(-1))),
            (-math.exp(-12), (-1.0, -math.exp(-2))),
            (math.inf, (math.inf, 1.0)),
            (-math.inf, (math.inf, -1.0)),
            (1e-310, (-1.0, 2.2026465794806717e-306)),  # denormal in float64
            (math.nan, (-1.0, math.nan)),
        ],
    )
    def test_by_hand(self, gradient, expected):
        actual = preprocess(torch.tensor(gradient, dtype=torch.float64), 10.0)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, equal_nan=True)

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

    def test_nan_stays_in_its_coordinate(self):
        meta = random_phi()
        theta, gradient = torch.zeros(3).double(), torch.tensor([1.0, math.nan, -1.0]).double()
        theta_step_([theta], [gradient], [meta.init_state(3)], meta.phi(), **meta.form)
        assert theta.isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keeps_the_dtype(self, dtype):
        meta = random_phi(dtype=dtype)
        theta, state = torch.zeros(4, dtype=dtype), meta.init_state(4)
        theta_step_([theta], [torch.ones(4, dtype=dtype)], [state], meta.phi(), **meta.form)
        assert theta.dtype == state.dtype == dtype and theta.abs().sum() > 0


class TestMetaGradient:
    """The closed form; tests/test_episode.py has it through a whole unroll, optimizee included."""

    @pytest.mark.parametrize("block", [2048, 3])
    @pytest.mark.parametrize("form", FORMS)
    def test_is_autograd_through_the_updates(self, form, block, monkeypatch):
        """From any state, and whatever moved θ from one update to the next."""
        monkeypatch.setattr(equations, "BLOCK", block)
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

    def test_cotangents_are_suffix_sums(self):
        rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
        expected = torch.tensor([[7.0, 70.0], [6.0, 60.0], [4.0, 40.0]])
        assert torch.equal(equations.update_cotangents(rows), expected)

    def test_keeps_no_graph_and_touches_nothing(self):
        meta = random_phi(hidden_size=5, theta_input=True)
        inputs = normal(3, 4), meta.init_state(4), normal(3, 4), meta.phi(), normal(3, 4)
        before = [t.detach().clone() for t in inputs]
        assert not unroll_meta_gradient(*inputs, **meta.form).requires_grad
        assert all(map(torch.equal, inputs, before))


class TestRobustLoss:
    """Eq. 6 with a loss that is just x, and an attack that adds 100."""

    @pytest.mark.parametrize("alpha, value", [(0.25, 0.25 * 4 + 0.75 * 104), (0, 104), (1, 4)])
    def test_weights_the_clean_loss_by_alpha(self, alpha, value):
        """For α = 1 nothing is crafted."""
        calls = []

        def attack(model, x, y):
            calls.append(x)
            return x + 100

        args = lambda model, x, y: x, None, torch.tensor(4.0), None
        assert robust_loss(*args, attack=attack, alpha=alpha).item() == value
        assert len(calls) == (alpha < 1)


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


class TestPenalty:
    """l + λ·Σ|∂l/∂x|."""

    def test_of_a_linear_model_by_hand(self):
        """Logits wx and 0, label 0: l = log(1 + e^-wx), ∂l/∂x = -w·σ(-wx); a batch has the mean."""
        w = torch.tensor([1.5, -2.0], dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[0.2, 0.5], [0.9, 0.1]], dtype=torch.float64)
        logits = lambda x: torch.stack((x @ w, torch.zeros(len(x))), dim=1)  # noqa: E731
        value = penalised(equations.cross_entropy, logits, x, torch.zeros(2, dtype=torch.long), 0.7)
        at = x @ w
        slopes = torch.sigmoid(-at)[:, None] * w.abs() / 2  # |∂l/∂x|, l being a mean of two
        by_hand = torch.log1p(torch.exp(-at)).mean() + 0.7 * slopes.sum()
        close(value, by_hand)
        close(torch.autograd.grad(value, w)[0], torch.autograd.grad(by_hand, w)[0])
        assert x.grad is None and not x.requires_grad

    def test_in_the_loss_of_eq_6_it_takes_the_place_of_the_clean_one(self):
        model, (x, y) = SMALL.draw(generator()).double(), small_batch()
        shift = lambda model, x, y: 1 - x  # noqa: E731
        pure, other = penalised(SMALL.loss, model, x, y, 0.7), SMALL.loss(model, 1 - x, y)
        loss = partial(robust_loss, SMALL.loss, model, x, y, attack=shift)
        close(loss(alpha=1.0, penalty=0.7), pure)
        close(loss(alpha=0.25, penalty=0.7), 0.25 * pure + 0.75 * other)
        close(loss(alpha=0.0, penalty=0.7), other)
        close(loss(alpha=1.0), SMALL.loss(model, x, y))
