"""The nominal term: Adam's direction, its moments in an optimizer, and the gradient of its rate."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from l2l_ref import attacks, equations, problems
from l2l_ref.episode import Episode, MetaSettings, truncated_unrolls
from l2l_ref.equations import adam_direction
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, new_phi
from l2l_ref.meta_training import apply_meta_gradient, meta_adam
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.problems import Problem, Stacked

FORMS = [(theta_input, odd) for theta_input in (False, True) for odd in (False, True)]
EVERY_FORM = pytest.mark.parametrize("theta_input, odd", FORMS)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


SMALL = Problem("small", small, problems.cross_entropy, 3)


def test_the_direction_has_a_derivative_where_no_gradient_was_ever_seen():
    """As of pixels that are always black: a root's slope at 0 would make NaN of a second order."""
    gradient = torch.tensor([0.0, 0.25], dtype=torch.float64, requires_grad=True)
    moments = torch.zeros(3, 2, dtype=torch.float64)
    direction, following = adam_direction(gradient, moments)
    assert direction[0] == 0 and following[2].tolist() == [1, 1]
    (slope,) = torch.autograd.grad(direction.sum(), gradient)
    assert slope.isfinite().all() and slope[0] == 0

    def twice(second):
        _, seen = adam_direction(torch.tensor([0.5, -0.25], dtype=torch.float64), moments)
        return adam_direction(second, seen)[0]

    assert torch.autograd.gradcheck(twice, gradient)


@pytest.fixture(params=["reference", "fused"])
def backend(request):
    if request.param == "fused":
        request.getfixturevalue("fused")  # skips where it is not built
    return request.param


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wild(steps, n, dtype=torch.float64, seed=0):
    """Gradients from 1e-12 to 1e4 of any sign, some of them zero. [steps, n]"""
    noise = generator(seed)
    size = 10 ** (16 * torch.rand(steps, n, generator=noise, dtype=torch.float64) - 12)
    gradients = size * torch.randn(steps, n, generator=noise, dtype=torch.float64)
    return (gradients * (torch.rand(steps, n, generator=noise) > 0.1)).to(dtype)


def phi(seed=0, **settings) -> MetaOptimizer:
    """One whose head is not zero, with η far from where it begins."""
    meta = MetaOptimizer(nominal=True, generator=generator(seed), **settings)
    nn.init.normal_(meta.head.weight, generator=generator(seed))
    nn.init.constant_(meta.log_eta, math.log(0.02))
    return meta


def net() -> nn.Module:
    return problems.make("mnist").draw(generator(1))


def backward(model, seed=0):
    x = torch.rand(4, 1, 28, 28, generator=generator(seed))
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class TestDirection:
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

    def test_coordinates_count_their_own_steps(self):
        """Two histories side by side are each alone."""
        a, b = wild(6, 2), wild(3, 2, seed=1)
        moments = [torch.zeros(3, 2, dtype=torch.float64) for _ in range(2)]
        for gradient in a[:3]:
            _, moments[0] = adam_direction(gradient, moments[0])
        for late, early in zip(a[3:], b, strict=True):
            d, joint = adam_direction(torch.cat((late, early)), torch.cat(moments, dim=1))
            single = [adam_direction(g, m) for g, m in zip((late, early), moments, strict=True)]
            assert torch.equal(d, torch.cat([direction for direction, _ in single]))
            moments = [m for _, m in single]
            assert torch.equal(joint, torch.cat(moments, dim=1))

    def test_a_zero_gradient_at_the_start_is_no_step(self):
        d, moments = adam_direction(torch.zeros(2), torch.zeros(3, 2))
        assert (d == 0).all() and moments.tolist() == [[0, 0], [0, 0], [1, 1]]

    def test_is_differentiable_in_the_gradient(self):
        moments = torch.rand(3, 4, generator=generator(), dtype=torch.float64)
        moments[2] = 5
        gradient = torch.randn(4, generator=generator(), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda g: adam_direction(g, moments), gradient)


class TestOptimizer:
    @pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
    def test_with_the_head_at_zero_it_is_adam(self, backend, dtype, rtol):
        eta = 3e-3
        meta = MetaOptimizer(nominal=True, odd=True, theta_input=True).to(dtype)
        nn.init.constant_(meta.log_eta, math.log(eta))
        ours, theirs = (SMALL.draw(generator()).to(dtype) for _ in range(2))
        start = weights(ours)
        learned = LearnedOptimizer(ours.parameters(), meta, backend=backend)
        adam = torch.optim.Adam(theirs.parameters(), lr=meta.log_eta.exp().item())
        rows = wild(100, len(weights(ours)), dtype)
        for row in rows:
            for model, optimizer in ((ours, learned), (theirs, adam)):
                parts = row.split([p.numel() for p in model.parameters()])
                for p, part in zip(model.parameters(), parts, strict=True):
                    p.grad = part.view_as(p).clone()
                optimizer.step()
        assert (weights(theirs) - start).abs().max() > 10 * eta
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=rtol, atol=rtol * eta)

    def test_eta_begins_at_a_thousandth(self):
        assert MetaOptimizer(nominal=True).log_eta.exp().item() == pytest.approx(1e-3)
        plain = MetaOptimizer()
        assert plain.log_eta is None and not plain.nominal and plain.init_moments(3) is None
        assert "log_eta" not in plain.state_dict() and "log_eta" in phi().state_dict()
        assert phi().phi().numel() == plain.phi().numel() == 5301  # η is not among what is packed
        twin = MetaOptimizer(**phi().settings)
        twin.load_state_dict(phi().state_dict())
        assert twin.nominal and twin.log_eta == phi().log_eta

    def test_state_dict_round_trip_continues_to_the_same_bits(self, tmp_path):
        meta, model = phi(odd=True), net()
        optimizer = LearnedOptimizer(model.parameters(), meta)
        for t in range(3):
            optimizer.zero_grad()
            backward(model, seed=t)
            optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                   tmp_path / "c")  # fmt: skip
        saved = torch.load(tmp_path / "c", weights_only=True)
        shapes = {tuple(state["moments"].shape) for state in saved["optimizer"]["state"].values()}
        assert shapes == {(3, p.numel()) for p in model.parameters()}

        def resume(change):
            resumed, state = net(), copy.deepcopy(saved["optimizer"])
            resumed.load_state_dict(saved["model"])
            change(state["state"])
            other = LearnedOptimizer(resumed.parameters(), meta)
            other.load_state_dict(state)
            for t in range(3, 6):
                other.zero_grad()
                backward(resumed, seed=t)
                other.step()
            return weights(resumed)

        for t in range(3, 6):
            optimizer.zero_grad()
            backward(model, seed=t)
            optimizer.step()
        assert torch.equal(resume(lambda state: None), weights(model))

        def forget(state):
            for of in state.values():
                del of["moments"]

        assert not torch.equal(resume(forget), weights(model))  # the moments do matter

    def test_moments_of_another_shape_are_refused(self):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), phi())
        backward(model)
        optimizer.step()
        saved = optimizer.state_dict()
        saved["state"][0]["moments"] = saved["state"][0]["moments"][:2]
        other = LearnedOptimizer(model.parameters(), phi())
        other.load_state_dict(saved)
        with pytest.raises(InputError, match=r"shape \[2, 15680\] where .* needs \[3, 15680\]"):
            other.step()

    def test_a_parameter_without_a_gradient_keeps_its_moments(self):
        meta, model = phi(), net()
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
            before = {key: value.clone() for key, value in optimizer.state[last].items()}
            value = last.detach().clone()
            optimizer.step()
            if frozen:
                assert torch.equal(last, value)
                assert before.keys() == {"lstm", "moments"}
                for key, kept in before.items():
                    assert torch.equal(optimizer.state[last][key], kept)
            else:
                expected.step()
                torch.testing.assert_close(last, alone[3].weight)
        counts = [optimizer.state[p]["moments"][2].unique().tolist() for p in model.parameters()]
        assert counts == [[5], [5], [3], [5]]


class TestForwardAndStep:
    def test_moments_that_are_missing_or_not_wanted_are_refused(self):
        theta, gradient = torch.zeros(3), torch.ones(3)
        for meta, moments, words in (
            (phi(), None, "no moments are given to a meta-optimizer with nominal=True"),
            (MetaOptimizer(), torch.zeros(3, 3), "moments are given .* with nominal=False"),
        ):
            state = meta.init_state(3)
            for call in (meta, meta.step_):
                with pytest.raises(InputError, match=words):
                    call(theta, gradient, state, moments)
            assert not theta.any() and not state.any()

    @EVERY_FORM
    def test_forward_step_and_optimizer_agree(self, backend, theta_input, odd):
        n, meta = 7, phi(theta_input=theta_input, odd=odd, hidden_size=5).double()
        theta = 0.3 * torch.randn(n, generator=generator(3), dtype=torch.float64)
        param, stepped = nn.Parameter(theta.clone()), theta.clone()
        optimizer = LearnedOptimizer([param], meta, backend=backend)
        state, moments = meta.init_state(n), meta.init_moments(n)
        own_state, own_moments = meta.init_state(n), meta.init_moments(n)
        agree = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
        for gradient in wild(5, n):
            before = theta, state, moments
            theta, state, moments = meta(theta, gradient, state, moments, backend=backend)
            direction = meta.step_(stepped, gradient, own_state, own_moments, backend=backend)
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

    def test_gradients_reach_eta_and_phi(self):
        meta = phi(hidden_size=4).double()
        theta, _, _ = meta(
            torch.zeros(3).double(), torch.ones(3).double(), meta.init_state(3),
            meta.init_moments(3),
        )  # fmt: skip
        theta.sum().backward()
        # d is 1 / (1 + 1e-8) of a first gradient of 1: three coordinates move by -η
        assert meta.log_eta.grad.item() == pytest.approx(-3 * 0.02, rel=1e-6)
        assert all(p.grad is not None for p in meta.parameters())


BATCH, STEPS, UNROLL = 6, 7, 4
WAYS = {  # α that φ reads, α that judges it, λ
    "one loss": (0.5, 0.5, 0.0),
    "judged by another": (1.0, 0.25, 0.0),
    "penalised": (1.0, 0.0, 0.3),
}


def shift(model, x, y):
    """An attack that is easy to follow."""
    return (0.8 * x + 0.1).flip(-1)


class TestMetaGradient:
    """The closed form against autograd through the unroll, written out with `torch.func`."""

    def episode(self, tasks):
        models = [SMALL.draw(generator(k)).double() for k in range(tasks)]
        noise = generator(50)
        shape = (tasks, BATCH, 5) if tasks > 1 else (BATCH, 5)
        batches = [(torch.rand(shape, generator=noise, dtype=torch.float64),
                    torch.randint(3, (tasks * BATCH,), generator=noise))
                   for _ in range(STEPS + 1)]  # fmt: skip
        return models, batches

    def phis(self, theta_input, odd):
        phis = new_phi(
            SMALL.build(), generator=generator(1),
            hidden_size=4, output_scale=0.1, theta_input=theta_input,
            odd=odd, nominal=True,
        ).double()  # fmt: skip
        for meta in phis.values():
            nn.init.normal_(meta.head.weight, generator=generator(2))
            nn.init.constant_(meta.log_eta, math.log(0.05))
        return phis

    def settings(self, way, tasks):
        read_alpha, alpha, penalty = WAYS[way]
        return MetaSettings(1, steps=STEPS, unroll=UNROLL, read_alpha=read_alpha, alpha=alpha,
                            penalty=penalty, tasks=tasks)  # fmt: skip

    def expected(self, meta, models, batches, way):
        """Each unroll's losses and derivatives by all parameters of φ: means over the tasks."""
        read_alpha, judged_alpha, penalty = WAYS[way]
        names = [name for name, _ in models[0].named_parameters()]
        shapes = [p.shape for p in models[0].parameters()]
        sizes = [p.numel() for p in models[0].parameters()]
        network = small().double()

        def logits(theta, x):
            parts = zip(names, theta.split(sizes), shapes, strict=True)
            tensors = {name: part.view(shape) for name, part, shape in parts}
            return torch.func.functional_call(network, tensors, (x,))

        def loss(theta, x, y, alpha, penalty=0.0):
            x = x.clone().requires_grad_()
            clean = nn.functional.cross_entropy(logits(theta, x), y)
            attacked = nn.functional.cross_entropy(logits(theta, shift(None, x.detach(), y)), y)
            if penalty:
                (slope,) = torch.autograd.grad(clean, x, create_graph=True)
                clean = clean + penalty * slope.abs().sum()
            return alpha * clean + (1 - alpha) * attacked

        def read(theta, x, y):
            theta = theta.detach().requires_grad_()
            return torch.autograd.grad(loss(theta, x, y, read_alpha, penalty), theta)[0]

        tasks = len(models)
        split = [
            [(xs, ys) for xs, ys in zip(x.view(tasks, BATCH, 5), y.view(tasks, BATCH), strict=True)]
            for x, y in batches
        ]
        thetas = [weights(model) for model in models]
        states = [meta.init_state(len(theta)) for theta in thetas]
        moments = [meta.init_moments(len(theta)) for theta in thetas]
        unrolls = []
        for start in range(0, STEPS, UNROLL):
            total, losses = 0.0, []
            packed, eta = meta.phi(), meta.log_eta.exp()
            for t in range(start, min(start + UNROLL, STEPS)):
                at = []
                for k in range(tasks):
                    gradient = read(thetas[k], *split[t][k])
                    seen = thetas[k].detach()  # what φ sees enters as a constant
                    u, states[k] = equations.update(seen, gradient, states[k], packed, **meta.form)
                    d, moments[k] = adam_direction(gradient, moments[k])
                    thetas[k] = thetas[k] + u - eta * d
                    at.append(loss(thetas[k], *split[t + 1][k], judged_alpha))
                losses.append(torch.stack(at).mean())
                total = total + losses[-1]
            derivative = torch.autograd.grad(total, list(meta.parameters()))
            unrolls.append((torch.cat([d.flatten() for d in derivative]), torch.stack(losses)))
            thetas, states = ([tensor.detach() for tensor in of] for of in (thetas, states))
        return unrolls

    @EVERY_FORM
    @pytest.mark.parametrize("way, tasks", [("one loss", 1), ("judged by another", 1),
                                            ("judged by another", 3), ("penalised", 1),
                                            ("penalised", 3)])  # fmt: skip
    def test_is_autograd_through_the_unroll(self, backend, theta_input, odd, way, tasks):
        """To first order: gradients, d and the θ that φ saw are constants. Two unrolls, the states
        and moments of the first carried on."""
        phis = self.phis(theta_input, odd)
        meta = phis["linear"]
        models, batches = self.episode(tasks)
        expected = self.expected(meta, models, batches, way)
        model = models[0] if tasks == 1 else Stacked(models)
        episode = Episode(model, iter(batches), shift)
        found = truncated_unrolls(episode, phis, self.settings(way, tasks), backend)
        lengths = []
        for (dphis, losses), (derivative, expected_losses) in zip(found, expected, strict=True):
            torch.testing.assert_close(losses, expected_losses.detach(), rtol=1e-9, atol=1e-12)
            dphi = dphis["linear"]
            assert dphi.shape == derivative.shape == (1 + meta.phi().numel(),)
            slope = derivative[0].abs()
            assert slope > 1e-4 and derivative[1:].norm() > 1e-3
            error = (dphi - derivative).abs()
            assert error[0] <= 1e-9 * slope  # log η, first in order
            assert error[1:].max() <= 1e-9 * derivative[1:].abs().max()
            lengths.append(len(losses))
        assert lengths == [4, 3]

    def test_log_eta_has_a_rate_and_a_clip_of_its_own(self):
        phis = self.phis(False, False)
        meta = phis["linear"]
        settings = MetaSettings(1, meta_lr=1e-3, eta_lr=0.02, clip=0.5)
        adam = meta_adam(phis, settings)
        before = [p.detach().clone() for p in meta.parameters()]
        gradient = torch.ones(1 + meta.phi().numel(), dtype=torch.float64)
        gradient[0] = -3.0
        norm = apply_meta_gradient(phis, {"linear": gradient}, adam, 0.5, settings)
        assert norm == pytest.approx(math.hypot(3.0, meta.phi().numel() ** 0.5))
        assert meta.log_eta.grad.item() == pytest.approx(-0.5, rel=1e-5)
        weights = torch.cat([w.grad.flatten() for w in meta.weights()])
        assert weights.norm().item() == pytest.approx(0.5, rel=1e-5)
        # Adam's first step has the length of its rate, here half of each
        after = list(meta.parameters())
        moved = [(a - b).detach() for a, b in zip(after, before, strict=True)]
        assert after[0] is meta.log_eta and moved[0].item() == pytest.approx(0.01, rel=1e-4)
        for change in moved[1:]:
            torch.testing.assert_close(change, torch.full_like(change, -5e-4), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("where", [0, -1])
    def test_one_that_is_not_finite_moves_neither(self, where):
        phis = self.phis(False, False)
        settings = MetaSettings(1)
        adam = meta_adam(phis, settings)
        before = copy.deepcopy(phis.state_dict())
        gradient = torch.ones(1 + phis["linear"].phi().numel(), dtype=torch.float64)
        gradient[where] = math.nan
        assert math.isnan(apply_meta_gradient(phis, {"linear": gradient}, adam, 1.0, settings))
        assert all(torch.equal(value, before[key]) for key, value in phis.state_dict().items())

    def test_eta_learns_on_quadratics(self):
        """A rate far too low grows, one far too high falls; without φ's weights."""
        problem = problems.make("quadratic", batch_size=BATCH)
        found = {}
        for eta in (1e-3, 2.0):
            phis = new_phi(problem.build(), generator=generator(1), hidden_size=1, nominal=True)
            meta = phis["quadratic"]
            nn.init.constant_(meta.log_eta, math.log(eta))
            for weight in meta.weights():
                weight.requires_grad_(False)
            settings = MetaSettings(1, steps=20, unroll=10, read_alpha=1.0, alpha=1.0, eta_lr=0.1)
            adam = meta_adam(phis, settings)
            for number in range(3):
                model = problem.draw(generator(number))
                batches = problems.quadratics(BATCH, generator(10 + number))
                episode = Episode(model, batches, attacks.none, problem.loss)
                for dphis, _ in truncated_unrolls(episode, phis, settings):
                    apply_meta_gradient(phis, dphis, adam, 1.0, settings)
            found[eta] = meta.log_eta.exp().item()
        assert found[1e-3] > 1.5e-3 and found[2.0] < 1.6
