"""LearnedOptimizer among PyTorch's: what `torch.optim`'s own tests ask of an optimizer, by its own
table of inputs, and what schedulers, wrappers and other libraries do to one.

Of PyTorch's tests these do not apply: sparse gradients and complex parameters (refused by name);
the flags foreach, fused, differentiable, maximize and capturable (there are none: every step may be
captured in a CUDA graph); a state "step" that is no tensor (there is none); zero gradients as a
no-op (a φ that is not odd may move θ without a gradient; the odd one is tested); several GPUs.
"""

import copy
from functools import partial
from unittest.mock import patch

import pytest
import torch
from conftest import SMALL, generator, weights
from conftest import random_phi as phi
from torch import nn
from torch.optim import lr_scheduler

from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, phi_groups
from l2l_ref.optimizer import LearnedOptimizer


def net() -> nn.Module:
    return SMALL.draw(generator())


def backward(model, seed=0):
    x = torch.rand(8, 5, generator=generator(seed)).to(next(model.parameters()).dtype)
    loss = nn.functional.cross_entropy(model(x).float(), torch.arange(8) % 3)
    loss.backward()
    return loss


def steps(model, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    return weights(model)


learned = partial(LearnedOptimizer, meta_optimizer=phi())


@pytest.fixture(scope="module")
def table():
    """PyTorch's own descriptions of optimizers under test."""
    with patch("torch.backends.disable_global_flags"):  # for all that comes after
        return pytest.importorskip("torch.testing._internal.common_optimizers")


# It begins as Adam, and so goes where the gradient says.
NOMINAL = MetaOptimizer(nominal=True, odd=True, generator=generator())
OPTIONS = [{}, {"lr": 0.3}, {"lr": torch.tensor(0.3)}, {"weight_decay": 1e-4},
           {"backend": "reference"}]  # fmt: skip


def made(params, options) -> LearnedOptimizer:
    return LearnedOptimizer(params, NOMINAL, **copy.deepcopy(options))


class TestAsPyTorchTestsItsOwn:
    def test_errors(self, table):
        for mistake in table.get_error_inputs_for_all_optims("cpu", torch.float32):
            given = mistake.optimizer_error_input
            warned = issubclass(mistake.error_type, Warning)
            expected = pytest.warns if warned else pytest.raises
            with expected(mistake.error_type, match=mistake.error_regex):
                learned(given.params or [nn.Parameter(torch.randn(1, 1))], **given.kwargs)

    @pytest.mark.parametrize("contiguous", [True, False])
    @pytest.mark.parametrize("scheduled", [False, True])
    def test_it_goes_the_right_way(self, table, contiguous, scheduled):
        about = table.OptimizerInfo(LearnedOptimizer, optim_inputs_func=list)
        for options in OPTIONS:
            for schedulers in about.scheduler_inputs if scheduled else [[]]:
                torch.manual_seed(0)
                weight = nn.Parameter(torch.randn(10, 5) if contiguous else torch.randn(5, 10).T)
                bias, x = nn.Parameter(torch.randn(10, 2)[:, 0]), torch.randn(5)
                assert weight.is_contiguous() == contiguous
                optimizer = made([{"params": weight}, {"params": [bias]}], options)
                schedules = [make(optimizer) for make in schedulers]

                def closure(weight=weight, bias=bias, x=x, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = (weight.mv(x) + bias).square().sum()
                    loss.backward()
                    return loss

                first = closure().item()
                for _ in range(30):
                    loss = optimizer.step(closure)
                    for schedule in schedules:
                        plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
                        schedule.step(*[loss.item()] * plateau)
                assert closure().item() < first, options

    def test_state_dicts(self, tmp_path):
        """Loading casts no state to the dtype of its parameter, and leaves the backend."""
        for options in OPTIONS:
            model = net().bfloat16()
            optimizer = made(model.parameters(), options)
            steps(model, optimizer, range(3))
            torch.save(optimizer.state_dict(), tmp_path / "o")
            saved = torch.load(tmp_path / "o", weights_only=True)
            twin, kept = copy.deepcopy(model), copy.deepcopy(saved)
            named = made(twin.named_parameters(), {**options, "backend": "reference"})
            named.load_state_dict(saved)
            assert named.param_groups[0]["backend"] == "reference"
            optimizer.param_groups[0]["backend"] = "reference"
            assert torch.equal(steps(model, optimizer, [3, 4]), steps(twin, named, [3, 4]))
            for state, before in zip(saved["state"].values(), kept["state"].values(), strict=True):
                assert all(torch.equal(state[name], before[name]) for name in state)
            assert {x.dtype for s in named.state.values() for x in s.values()} == {torch.float32}
            assert list(named.state_dict()["state"]) == list(optimizer.state_dict()["state"])
            assert named.param_groups[0]["param_names"][0] == "0.weight"

    def test_without_gradients_nothing_happens(self):
        for options in OPTIONS:
            model = net()
            optimizer = made(model.parameters(), options)
            optimizer.step()
            assert torch.equal(weights(model), weights(net())) and not optimizer.state
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
            decay = options.get("weight_decay", 0)  # odd: no drift
            torch.testing.assert_close(weights(model), (1 - decay) * weights(net()))


class TestRate:
    def test_zero_leaves_theta_and_lets_the_state_go_on(self):
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), phi(odd=True), lr=0.0)
        assert torch.equal(steps(model, optimizer, range(3)), weights(net()))
        assert all(s["lstm"].any() for s in optimizer.state.values())

    def test_of_a_tensor_is_that_of_a_number_and_is_read_at_each_step(self):
        model, twin = net(), net()
        number, tensor = learned(model.parameters()), learned(twin.parameters(), lr=torch.ones(1))
        for step, rate in enumerate([0.5, 2.0, 0.1]):
            number.param_groups[0]["lr"] = rate
            tensor.param_groups[0]["lr"].fill_(rate)
            torch.testing.assert_close(steps(model, number, [step]), steps(twin, tensor, [step]))

    def test_decay_is_decoupled_and_goes_with_the_rate(self):
        model, plain = net(), net()
        before = weights(model)
        full = steps(plain, learned(plain.parameters()), [0]) - before
        after = steps(model, learned(model.parameters(), lr=0.5, weight_decay=0.1), [0])
        torch.testing.assert_close(after, before - 0.5 * 0.1 * before + 0.5 * full)


class TestState:
    def test_the_state_of_something_else_is_refused(self):
        model = net()
        optimizer = learned(model.parameters())
        steps(model, optimizer, [0])
        adam = torch.optim.Adam(net().parameters())
        with pytest.raises(InputError, match="group 0 of the state was saved with no φ"):
            optimizer.load_state_dict(adam.state_dict())
        other = phi()
        other.head.bias.data.fill_(1e-3)
        with pytest.raises(InputError, match="saved with another φ .* of the same φ"):
            LearnedOptimizer(model.parameters(), other).load_state_dict(optimizer.state_dict())
        assert phi(p=9.0).fingerprint() != phi().fingerprint() == phi().fingerprint()
        zeros = MetaOptimizer(hidden_size=1, num_layers=1)  # the same in every process
        for weight in zeros.parameters():
            nn.init.zeros_(weight)
        assert zeros.fingerprint() == "f7223199d3524872"

    def test_what_a_wrapper_keeps_beside_ours_goes_along(self):
        """As schedule-free and lookahead keep a tensor, SAM and timm's schedulers a number."""
        models = [net(), net()]
        one, other = (learned([{"params": m.parameters(), "rho": 0.1}]) for m in models)
        first, twin = (m[0].weight for m in models)
        one.state[first] |= {"z": first.detach().clone(), "k": 7}  # before there is one of ours
        steps(models[0], one, range(2))
        one.param_groups[0]["rho"] = 0.3
        other.load_state_dict(one.state_dict())
        assert torch.equal(other.state[twin]["z"], weights(net())[:20].view(4, 5))
        assert other.param_groups[0]["rho"] == 0.3 and other.state[twin]["k"] == 7
        assert torch.equal(other.state[twin]["lstm"], one.state[first]["lstm"])


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("nominal", [False, True])
    def test_theta_in_its_own_phi_in_its_own(self, dtype, nominal):
        meta = phi(theta_input=True, odd=True, nominal=nominal)
        model, twin = net().to(dtype), net().to(dtype).float()
        optimizer = LearnedOptimizer(model.parameters(), meta)
        reference = LearnedOptimizer(twin.parameters(), meta)
        for seed in range(3):
            backward(model, seed)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.float()
            optimizer.step()
            reference.step()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert p.dtype == dtype
                assert torch.equal(p, q.to(dtype))
                assert optimizer.state[p]["lstm"].dtype == torch.float32
                torch.testing.assert_close(optimizer.state[p]["lstm"], reference.state[q]["lstm"])
                q.data.copy_(p.detach())  # what was rounded away is away

    def test_autocast_does_not_reach_phi(self, backend):
        def trained(autocast):
            model = net()
            optimizer = LearnedOptimizer(
                model.parameters(), phi(odd=True, nominal=True), backend=backend
            )
            for seed in range(3):
                optimizer.zero_grad()
                backward(model, seed)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    optimizer.step()
            return weights(model)

        assert torch.equal(trained(True), trained(False))


class TestParameters:
    def test_frozen_and_tied_ones(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
        model[2].weight = model[0].weight
        model[3].requires_grad_(False)
        groups = phi_groups(model)
        assert [id(p) for p in groups["linear"]] == [
            id(p) for p in (model[0].weight, model[0].bias, model[2].bias)
        ]
        with pytest.raises(InputError, match="no parameter that requires a gradient"):
            LearnedOptimizer.for_model(model.requires_grad_(False), {"linear": phi()})

    def test_kinds_of_layers_may_be_named(self):
        model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "head": nn.Linear(4, 2)})
        model["embed"].phi_group = "linear"
        optimizer = LearnedOptimizer.for_model(model, {"linear": phi()})
        assert len(optimizer.param_groups[0]["params"]) == 3
        model["embed"].phi_group = "embedding"
        with pytest.raises(InputError, match="no φ for embedding parameters.*phi_group"):
            LearnedOptimizer.for_model(model, {"linear": phi()})

    def test_one_call_of_the_operator_for_a_group(self, fused):
        """Whatever the dtypes, layouts and shapes of its parameters."""
        meta = phi(nominal=True)
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        params = [
            *net().parameters(), *net().bfloat16().parameters(), *conv.parameters(),
            nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.rand(4, 3).t()),
            nn.Parameter(torch.zeros(0, 2)),
        ]  # fmt: skip
        twins = copy.deepcopy(params)
        for param in (*params, *twins):
            param.grad = torch.ones_like(param)
        with patch.object(fused, "theta_step_", wraps=fused.theta_step_) as call:
            LearnedOptimizer(params, meta).step()
        assert call.call_count == 1 and len(call.call_args.args[0]) == len(params)
        for twin in twins:
            LearnedOptimizer([twin], meta).step()
        assert all(map(torch.equal, params, twins))
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)

    def test_what_parametrizes_a_layer_goes_with_it(self):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        assert list(phi_groups(nn.Sequential(layer))) == ["linear"]
        layer.phi_group = "mine"
        assert {name: len(own) for name, own in phi_groups(layer).items()} == {"mine": 3}

    def test_a_sparse_gradient_moves_nothing(self):
        model = nn.ModuleList([nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)])
        before = weights(model)
        model[0](model[1](torch.tensor([1]))).sum().backward()
        with pytest.raises(InputError, match="sparse"):
            learned(model.parameters()).step()
        assert torch.equal(weights(model), before)


def test_compiled(fused):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not support this Python")
    ends = []
    for wrap in (lambda f: f, partial(torch.compile, backend="aot_eager")):
        torch._dynamo.reset()
        model = net()
        optimizer = LearnedOptimizer(model.parameters(), phi(odd=True, nominal=True))
        forward, step = wrap(model), wrap(optimizer.step)
        for seed in range(3):
            optimizer.zero_grad()
            x = torch.rand(8, 5, generator=generator(seed))
            nn.functional.cross_entropy(forward(x), torch.arange(8) % 3).backward()
            step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    assert not torch.equal(ends[0], weights(net()))
