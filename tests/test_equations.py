"""Eq. 3-6 against numbers worked by hand, `torch.nn.LSTM`, and autograd through everything."""

import itertools
import math

import pytest
import torch
from torch import nn

from l2l_ref import equations
from l2l_ref.equations import preprocess, theta_step, theta_step_, unroll_meta_gradient
from l2l_ref.meta_optimizer import MetaOptimizer
from l2l_ref.optimizer import flatten_

FORMS = [
    dict(theta_input=theta_input, odd=odd)
    for theta_input, odd in itertools.product((False, True), repeat=2)
]


def random_phi(seed=0, dtype=torch.float64, **settings) -> MetaOptimizer:
    """A φ whose head is not zero, so that every weight matters."""
    generator = torch.Generator().manual_seed(seed)
    meta = MetaOptimizer(generator=generator, **settings).to(dtype)
    for weight in meta.head.parameters():
        nn.init.normal_(weight, generator=generator)
    return meta


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
        ],
    )
    def test_by_hand(self, gradient, expected):
        actual = preprocess(torch.tensor(gradient, dtype=torch.float64), 10.0)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_boundary_is_on_the_log_side(self, dtype, sign):
        at = torch.tensor(math.exp(-10.0), dtype=dtype)
        below, above = (torch.nextafter(at, at + way) for way in (-1, 1))
        log, direction = preprocess(sign * torch.stack([below, at, above]), 10.0)
        tiny = 4 * torch.finfo(dtype).eps
        # On the log side the direction is exactly the sign; below it is proportional to g.
        assert direction[1] == sign and direction[2] == sign
        assert log[0] == -1 and direction[0].abs() <= 1
        torch.testing.assert_close(log, torch.full_like(log, -1.0), rtol=tiny, atol=0)
        torch.testing.assert_close(direction, torch.full_like(direction, sign), rtol=tiny, atol=0)

    def test_the_two_sides_are_told_apart(self):
        # One ulp apart: exp(10)·g is visibly below 1 only where the linear branch is taken.
        just_below = torch.tensor(math.exp(-10.0) * (1 - 1e-9), dtype=torch.float64)
        assert preprocess(just_below, 10.0)[1] < 1
        assert preprocess(just_below * (1 + 2e-9), 10.0)[1] == 1

    def test_nan_stays_nan(self):
        assert preprocess(torch.tensor([math.nan]), 10.0)[1].isnan().all()

    def test_float32_denormals_enter_linearly(self):
        g = torch.tensor([1e-44, -1e-40])
        log, direction = preprocess(g, 10.0)
        assert (log == -1).all()
        torch.testing.assert_close(direction, g * 22026.465794806718)

    def test_p_sets_threshold_and_scale(self):
        g = torch.tensor([math.exp(-3.0) * 1.01, math.exp(-3.0) * 0.99], dtype=torch.float64)
        log, direction = preprocess(g, 3.0)
        assert direction[0] == 1 and direction[1] < 1
        assert log[0] == pytest.approx((-3 + math.log(1.01)) / 3) and log[1] == -1

    @pytest.mark.parametrize("p", [1e-3, 10.0, equations.MAX_P])
    def test_zero_is_minus_one_and_zero_for_every_allowed_p(self, p):
        assert preprocess(torch.zeros(1), p).flatten().tolist() == [-1.0, 0.0]

    def test_derivative_is_finite_at_zero(self):
        g = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        preprocess(g, 10.0).sum().backward()
        assert g.grad.item() == pytest.approx(math.exp(10))


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
            theta_step_(theta, gradient, state, meta.phi(), **meta.form)
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

    @pytest.mark.parametrize("form", FORMS)
    def test_odd_means_odd(self, form):
        meta = random_phi(**form)
        theta, gradient, state = normal(6), normal(6, seed=1), meta.init_state(6)
        u, _ = equations.update(theta, gradient, state, meta.phi(), **meta.form)
        mirrored, _ = equations.update(-theta, -gradient, state, meta.phi(), **meta.form)
        assert torch.allclose(mirrored, -u) == form["odd"]

    @pytest.mark.parametrize("form", FORMS)
    def test_zeroed_head_changes_nothing(self, form):
        meta = MetaOptimizer(**form)
        theta, state = normal(9, dtype=torch.float32), meta.init_state(9)
        before = theta.clone()
        for t in range(5):
            gradient = normal(9, seed=t, dtype=torch.float32)
            theta_step_(theta, gradient, state, meta.phi(), **meta.form)
        assert torch.equal(theta, before)
        assert state.abs().sum() > 0

    @pytest.mark.parametrize("form", FORMS)
    def test_in_place_is_out_of_place(self, form):
        meta = random_phi(**form)
        theta, gradient = normal(4), normal(4, seed=1)
        state = 0.1 * normal(*meta.init_state(4).shape, seed=2)
        next_theta, next_state = theta_step(theta, gradient, state, meta.phi(), **meta.form)
        assert theta_step_(theta, gradient, state, meta.phi(), **meta.form) is None
        assert torch.equal(theta, next_theta) and torch.equal(state, next_state)
        assert not theta.requires_grad and not state.requires_grad

    @pytest.mark.parametrize("form", FORMS)
    def test_gradcheck(self, form):
        meta = random_phi(hidden_size=3, **form)
        theta, gradient = 0.1 * normal(3), normal(3, seed=1)
        state = normal(*meta.init_state(3).shape, seed=2)
        inputs = [t.detach().requires_grad_() for t in (theta, gradient, state, meta.phi())]
        assert torch.autograd.gradcheck(lambda *a: theta_step(*a, **meta.form), inputs)

    def test_nan_propagates_and_stays_in_its_coordinate(self):
        meta = random_phi(dtype=torch.float32)
        theta, state = torch.zeros(4), meta.init_state(4)
        theta_step_(theta, torch.tensor([1.0, math.nan, 0.0, -1.0]), state, meta.phi(), **meta.form)
        assert theta.isnan().tolist() == [False, True, False, False]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_keeps_the_dtype(self, dtype):
        meta = random_phi(dtype=dtype)
        theta, state = torch.zeros(4, dtype=dtype), meta.init_state(4)
        theta_step_(theta, torch.ones(4, dtype=dtype), state, meta.phi(), **meta.form)
        assert theta.dtype == state.dtype == dtype and theta.abs().sum() > 0


class TestMetaGradient:
    """The closed form against autograd through the whole unroll, optimizee included."""

    steps, hidden = 6, 5

    def whole_unroll(self, meta, model, data, also):
        """Σ_t L_t(θ_t) with its graph kept: gradients, and θ where φ sees it, enter detached."""
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        state = meta.init_state(len(theta))
        shapes = [p.shape for p in model.parameters()]

        def loss(theta, x, y):
            parts = theta.split([s.numel() for s in shapes])
            weights = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
            names = [name for name, _ in model.named_parameters()]
            logits = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), x)
            return nn.functional.cross_entropy(logits, y)

        def gradient(theta, x, y):
            theta = theta.detach().requires_grad_()
            return torch.autograd.grad(loss(theta, x, y), theta)[0]

        total, seen, reads, judged = 0.0, [], [], []
        for t in range(self.steps):
            seen.append(theta.detach())
            reads.append(gradient(theta, *data[t]))
            u, state = equations.update(theta.detach(), reads[-1], state, meta.phi(), **meta.form)
            theta = theta + u + also
            total = total + loss(theta, *data[t + 1])
            judged.append(gradient(theta, *data[t + 1]))
        expected = torch.autograd.grad(total, list(meta.parameters()))
        rows = [torch.stack(each) for each in (seen, reads, judged)]
        return *rows, torch.cat([g.reshape(-1) for g in expected])

    @pytest.mark.parametrize("block", [2048, 7])
    @pytest.mark.parametrize("also", [0.0, 0.05])
    @pytest.mark.parametrize("form", FORMS)
    def test_equals_autograd_through_everything(self, form, also, block, monkeypatch):
        """Even where θ moves by more than φ's update: by `also` in every step."""
        monkeypatch.setattr(equations, "BLOCK", block)
        meta = random_phi(hidden_size=self.hidden, output_scale=0.3, **form)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        data = [(normal(8, 4, seed=t), torch.arange(8) % 3) for t in range(self.steps + 1)]
        seen, reads, judged, expected = self.whole_unroll(meta, model, data, also)
        actual = unroll_meta_gradient(
            reads,
            meta.init_state(seen.shape[1]),
            equations.update_cotangents(judged),
            meta.phi(),
            seen if meta.form["theta_input"] else None,
            **meta.form,
        )
        assert expected.abs().max() > 1e-6
        assert (actual - expected).norm() <= 1e-9 * expected.norm()

    def test_starts_from_the_given_state(self):
        meta = random_phi(hidden_size=self.hidden, odd=True)
        gradients, cotangents = normal(3, 4), normal(3, 4, seed=1)
        state = normal(*meta.init_state(4).shape, seed=2)
        phi = meta.phi().detach().requires_grad_()
        updates, _ = equations.unroll(gradients, state, phi, **meta.form)
        (expected,) = torch.autograd.grad((updates * cotangents).sum(), phi)
        actual = unroll_meta_gradient(gradients, state, cotangents, phi, **meta.form)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)

    def test_cotangents_are_suffix_sums(self):
        rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
        expected = torch.tensor([[7.0, 70.0], [6.0, 60.0], [4.0, 40.0]])
        assert torch.equal(equations.update_cotangents(rows), expected)

    def test_keeps_no_graph_and_touches_nothing(self):
        meta = random_phi(hidden_size=self.hidden, theta_input=True)
        inputs = normal(3, 4), meta.init_state(4), normal(3, 4), meta.phi(), normal(3, 4)
        before = [t.detach().clone() for t in inputs]
        assert not unroll_meta_gradient(*inputs, **meta.form).requires_grad
        assert all(map(torch.equal, inputs, before))


class TestRobustLoss:
    """Eq. 6 with a loss that is just x, and an attack that adds 100."""

    def at(self, alpha):
        calls = []

        def attack(model, x, y):
            calls.append(x)
            return x + 100

        value = equations.robust_loss(
            lambda model, x, y: x, None, torch.tensor(4.0), None, attack=attack, alpha=alpha
        )
        return value.item(), len(calls)

    def test_weights_the_clean_loss_by_alpha(self):
        assert self.at(0.25) == (0.25 * 4 + 0.75 * 104, 1)

    def test_alpha_one_is_clean_and_crafts_nothing(self):
        assert self.at(1) == (4.0, 0)

    def test_alpha_zero_is_adversarial_alone(self):
        assert self.at(0) == (104.0, 1)


def test_flatten_makes_parameters_views_of_one_vector():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = [p.detach().clone() for p in model.parameters()]
    theta = flatten_(model.parameters())
    assert all(map(torch.equal, model.parameters(), before))
    theta += 1
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, old + 1)
