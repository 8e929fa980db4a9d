"""LearnedOptimizer as PyTorch users know optimizers, and MetaOptimizer as a module."""

import copy

import pytest
import torch
from torch import nn

from l2l_ref import equations
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import MetaOptimizer, phi_groups
from l2l_ref.optimizer import LearnedOptimizer, flatten_
from l2l_ref.problems import make as make_problem


def phi(seed=0, **settings) -> MetaOptimizer:
    generator = torch.Generator().manual_seed(seed)
    meta = MetaOptimizer(generator=generator, **settings)
    nn.init.normal_(meta.head.weight, generator=generator)
    return meta


def net() -> nn.Module:
    return make_problem("mnist").draw(torch.Generator().manual_seed(1))


def backward(model, seed=0):
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("odd", [False, True])
def test_step_is_the_equation_on_one_flat_axis(odd):
    meta, model = phi(odd=odd, theta_input=True), net()
    optimizer = LearnedOptimizer(model.parameters(), meta, backend="reference")
    theta = weights(model)
    state = meta.init_state(len(theta))
    for t in range(3):
        optimizer.zero_grad()
        backward(model, seed=t)
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        equations.theta_step_(theta, gradient, state, meta.phi(), **meta.form)
        optimizer.step()
        assert torch.equal(weights(model), theta)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.Adam(params, lr=0.01),
        lambda params: LearnedOptimizer(params, phi(odd=True, theta_input=True)),
    ],
    ids=["sgd", "adam", "learned"],
)
def test_one_vector_trains_like_the_parameters(make):
    model, flat = net(), net()
    theta = flatten_(flat.parameters())
    optimizer, flat_optimizer = make(model.parameters()), make([theta])
    start = weights(model)
    for t in range(5):
        for m, o in ((model, optimizer), (flat, flat_optimizer)):
            o.zero_grad(set_to_none=False)
            backward(m, seed=t)
            o.step()
        for p, q in zip(model.parameters(), flat.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert not torch.equal(start, weights(model))
    torch.testing.assert_close(weights(flat), weights(model))
    assert torch.equal(theta, weights(flat))
    assert torch.equal(theta.grad, torch.cat([p.grad.flatten() for p in flat.parameters()]))


def test_phi_zeroed_leaves_theta_unchanged():
    model = net()
    before = weights(model)
    optimizer = LearnedOptimizer(model.parameters(), MetaOptimizer())
    backward(model)
    optimizer.step()
    assert torch.equal(weights(model), before)


def test_parameters_without_a_gradient_are_skipped_with_their_state():
    meta, model = phi(), net()
    alone = copy.deepcopy(model)
    optimizer = LearnedOptimizer(model.parameters(), meta)
    expected = LearnedOptimizer([alone[3].weight], meta)  # sees only the steps that count
    for t, frozen in enumerate([False, True, False, True]):
        optimizer.zero_grad()
        backward(model, seed=t)
        before, state = model[3].weight.detach().clone(), optimizer.state[model[3].weight]
        state = state.get("lstm", torch.zeros(1)).clone()
        if frozen:
            model[3].weight.grad = None
        else:
            alone[3].weight.grad = model[3].weight.grad.clone()
        optimizer.step()
        if frozen:
            assert torch.equal(model[3].weight, before)
            assert torch.equal(optimizer.state[model[3].weight]["lstm"], state)
        else:
            expected.step()
            torch.testing.assert_close(model[3].weight, alone[3].weight)
    assert LearnedOptimizer(net().parameters(), meta).step() is None  # no gradients at all


def test_groups_bring_their_own_phi():
    a, b = phi(1), phi(2, odd=True)
    problem = make_problem("cifar10")
    model = problem.draw(torch.Generator().manual_seed(0))
    groups = phi_groups(model)
    assert list(groups) == ["convolutional", "linear"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    apart = copy.deepcopy(model)
    joint = LearnedOptimizer(
        [{"params": groups["convolutional"]}, {"params": groups["linear"], "meta_optimizer": b}], a
    )
    separate = [
        LearnedOptimizer(params, meta)
        for params, meta in zip(phi_groups(apart).values(), (a, b), strict=True)
    ]
    for m in (model, apart):
        torch.manual_seed(0)
        nn.functional.cross_entropy(m(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
    joint.step()
    for optimizer in separate:
        optimizer.step()
    assert torch.equal(weights(model), weights(apart))


def test_state_dict_round_trip_continues_to_the_same_bits(tmp_path):
    meta, model = phi(odd=True), net()
    optimizer = LearnedOptimizer(model.parameters(), meta)
    for t in range(2):
        optimizer.zero_grad()
        backward(model, seed=t)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c")
    saved = torch.load(tmp_path / "c", weights_only=True)
    resumed = net()
    resumed.load_state_dict(saved["model"])
    other = LearnedOptimizer(resumed.parameters(), meta)
    other.load_state_dict(saved["optimizer"])
    for m, o in ((model, optimizer), (resumed, other)):
        o.zero_grad()
        backward(m, seed=9)
        o.step()
    assert torch.equal(weights(model), weights(resumed))
    fresh = LearnedOptimizer(resumed.parameters(), meta)  # the state does matter
    resumed.load_state_dict(saved["model"])
    fresh.step()
    assert not torch.equal(weights(model), weights(resumed))


def test_a_loaded_state_is_not_shared_with_the_file():
    meta, model = phi(), net()
    optimizer = LearnedOptimizer(model.parameters(), meta)
    backward(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.param_groups[0]["meta_optimizer"] is meta  # not a copy of φ
    for index, state in saved["state"].items():
        assert torch.equal(state["lstm"], kept["state"][index]["lstm"])


def test_state_of_another_phi_is_refused():
    model = net()
    optimizer = LearnedOptimizer(model.parameters(), phi())
    backward(model)
    optimizer.step()
    other = LearnedOptimizer(model.parameters(), phi(hidden_size=8))
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(InputError, match="shape"):
        other.step()


def test_a_copy_steps_on_its_own():
    meta, model = phi(), net()
    optimizer = LearnedOptimizer(model.parameters(), meta)
    backward(model)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        o.zero_grad()
        backward(m, seed=1)
        o.step()
    assert torch.equal(weights(model), weights(twin))


def test_keeps_no_graph_and_runs_closures_with_gradients():
    meta, model = phi(), net()
    optimizer = LearnedOptimizer(model.parameters(), meta)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1, 28, 28)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())
    assert all(p.grad is None for p in meta.parameters())
    assert not any(s["lstm"].requires_grad for s in optimizer.state.values())


def test_channels_last_parameters_keep_their_layout():
    meta = phi()
    plain = nn.Conv2d(3, 4, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for conv in (plain, last):
        conv(torch.ones(1, 3, 8, 8)).square().sum().backward()
        LearnedOptimizer(conv.parameters(), meta).step()
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.weight, last.weight)


def test_works_with_a_learning_rate_free_torch_loop():
    """zero_grad, add_param_group and repr behave as for any optimizer."""
    meta, model = phi(), net()
    optimizer = LearnedOptimizer(model[1].parameters(), meta)
    optimizer.add_param_group({"params": list(model[3].parameters())})
    backward(model)
    before = weights(model)
    optimizer.step()
    assert (weights(model) != before).any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert "LearnedOptimizer" in repr(optimizer)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: LearnedOptimizer(m.parameters()), "has no φ"),
        (lambda m: LearnedOptimizer(m.double().parameters(), phi()), "float64"),
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


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        LearnedOptimizer(embedding.parameters(), phi()).step()


def test_meta_optimizer_is_a_differentiable_module():
    meta = phi(hidden_size=4).double()
    gradient = torch.randn(3, dtype=torch.float64, requires_grad=True)
    theta, state = meta(torch.zeros(3).double(), gradient, meta.init_state(3))
    theta.square().sum().backward()
    assert all(p.grad is not None for p in meta.parameters())
    assert gradient.grad.abs().sum() > 0 and state.shape == (2, 2, 4, 3)


def test_phi_is_a_plain_state_dict():
    meta = phi()
    lstm, head = nn.LSTM(2, 20, 2), nn.Linear(20, 1)
    names = {f"lstm.{k}" for k in lstm.state_dict()} | {f"head.{k}" for k in head.state_dict()}
    assert set(meta.state_dict()) == names
    assert meta.phi().numel() == 5301  # 80·(2+20+2) + 80·(20+20+2) + 21
    twin = MetaOptimizer(**meta.settings)
    twin.load_state_dict(meta.state_dict())
    assert torch.equal(twin.phi(), meta.phi())


def test_phi_is_drawn_from_the_generator():
    a, b, c = (MetaOptimizer(generator=torch.Generator().manual_seed(s)).phi() for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert (a[:-21].abs() <= 20**-0.5).all() and (a[-21:] == 0).all()
