"""The optimizees: their sizes, their θ₀, and the quadratics against their definition."""

import copy

import pytest
import torch
from conftest import generator
from torch import nn

from l2l_ref import problems
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import phi_groups


@pytest.mark.parametrize(
    "dataset, optimizee, parameters, shape",
    [
        ("mnist", None, 784 * 20 + 20 + 20 * 10 + 10, (1, 28, 28)),
        ("mnist", "logistic", 784 * 10 + 10, (1, 28, 28)),
        ("mnist", "examples.networks:deep", 784 * 20 + 20 + 20 * 20 + 20 + 210, (1, 28, 28)),
        ("mnist", "examples.networks:wide", 784 * 40 + 40 + 40 * 10 + 10, (1, 28, 28)),
        # three convolutions, three batch-norms, two linear layers
        ("cifar10", None, 448 + 2320 + 2320 + 3 * 32 + 8224 + 330, (3, 32, 32)),
        ("cifar10", "logistic", 3072 * 10 + 10, (3, 32, 32)),
    ],
)
def test_sizes(dataset, optimizee, parameters, shape):
    model = problems.make(dataset, optimizee).draw(generator())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.rand(5, *shape)).shape == (5, 10) and model.training


def made_on_purpose() -> nn.Module:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, 7.0)
    return nn.Sequential(nn.Linear(4, 3), layer)


@pytest.mark.parametrize(
    "build",
    [
        problems.convnet,
        problems.make("quadratic").build,
        made_on_purpose,
    ],
)
def test_theta0_of_any_module(build):
    """It is what the constructors draw, from the generator and nothing else."""
    problem = problems.Problem("own", build, problems.cross_entropy, 2)
    torch.manual_seed(5)
    before, noise = torch.get_rng_state(), generator(3)
    model = problem.draw(noise)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    expected = build()
    assert torch.equal(noise.get_state(), torch.get_rng_state())  # it moved by what was drawn
    torch.manual_seed(6)
    for twin in (expected, problem.draw(generator(3))):
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)
    another = problem.draw(noise)
    if build is made_on_purpose:
        assert (model[1].weight == 7).all() and not torch.equal(another[0].weight, model[0].weight)


def test_the_layout_of_images_changes_nothing_but_speed():
    model = problems.make("cifar10").draw(generator()).double()
    plain = torch.nn.Sequential(*copy.deepcopy(model))
    x, y = torch.rand(8, 3, 32, 32, generator=generator(1)).double(), torch.arange(8)
    results = []
    for m in (model, plain):
        leaf = x.clone().requires_grad_()
        loss = problems.cross_entropy(m, leaf, y)
        results.append((loss, *torch.autograd.grad(loss, [leaf, *m.parameters()]), *m.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert model.state_dict().keys() == plain.state_dict().keys()
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_quadratic_is_its_definition():
    problem = problems.make("quadratic", batch_size=3)
    model = problem.draw(generator())
    batches = problems.Quadratics(3).batches(3, generator(5))
    w, y = next(batches)
    again = next(batches)
    assert torch.equal(again[0], w) and torch.equal(again[1], y)  # one function while one θ trains
    by_hand = [(w[i] @ model.theta[i] - y[i]).pow(2).sum() for i in range(3)]
    torch.testing.assert_close(problem.loss(model, w, y), sum(by_hand) / 3)
    other, _ = next(problems.Quadratics(3).batches(3, generator(6)))
    assert not torch.equal(other, w)


def test_groups_go_by_the_kind_of_layer():
    model = problems.make("cifar10").build()
    groups = phi_groups(model)
    assert [tuple(p.shape) for p in groups["linear"]] == [(32, 256), (32,), (10, 32), (10,)]
    assert len(groups["convolutional"]) == 3 * 4  # weight and bias of convolutions and batch-norms
    assert list(phi_groups(problems.make("mnist").build())) == ["linear"]
    assert list(phi_groups(problems.make("quadratic").build())) == ["quadratic"]


@pytest.mark.parametrize(
    "dataset, optimizee, words",
    [
        ("svhn", None, "'svhn' is unknown"),
        ("mnist", "convnet", "'convnet' does not go with mnist"),
        ("quadratic", "mlp", "'mlp' does not go with quadratic"),
        ("mnist", "examples.networks:narrow", "^examples.networks:narrow cannot be"),
    ],
)
def test_mistakes_are_named(dataset, optimizee, words):
    with pytest.raises(InputError, match=words):
        problems.make(dataset, optimizee)
