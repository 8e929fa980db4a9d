"""K optimizees at once do what each does alone: outputs, gradients, attacks and batches."""

import copy
from functools import partial

import pytest
import torch
from conftest import SHAPE, generator
from torch import nn

from l2l_ref import attacks, data, problems
from l2l_ref.equations import penalised
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import phi_groups
from l2l_ref.problems import Problem, Stacked

K, BATCH = 3, 8
SHAPES = {"mlp": SHAPE["mnist"], "convnet": SHAPE["cifar10"]}
PROBLEMS = {
    "mlp": problems.make("mnist"),
    # vmap knows no channels-last layout, and no GPU needs it
    "convnet": Problem("", lambda: nn.Sequential(*problems.convnet()), problems.cross_entropy, 10),
    "quadratic": problems.make("quadratic", batch_size=BATCH),
}
BOTH_WAYS = pytest.mark.parametrize("vectorize", [False, True])
exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def draw(name):
    """K models in float64."""
    return [PROBLEMS[name].draw(generator(k)).double() for k in range(K)]


def batches(name, count):
    """`count` batches for each of the K: a list of (x, y) each."""
    noise = generator(9)

    def one():
        if name == "quadratic":
            w, y = next(problems.quadratics(BATCH, noise))
            return w.double(), y.double()
        x = torch.rand(BATCH, *SHAPES[name], generator=noise, dtype=torch.float64)
        return x, torch.randint(10, (BATCH,), generator=noise)

    return [[one() for _ in range(count)] for _ in range(K)]


def joint(each):
    """The batches of all, as `Stacked` takes them."""
    return [
        (torch.stack(xs), torch.cat(ys))
        for xs, ys in (zip(*b, strict=True) for b in zip(*each, strict=True))
    ]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("penalty", [0.0, 0.1])
@BOTH_WAYS
def test_outputs_gradients_and_statistics(name, penalty, vectorize):
    """So episodes (tests/test_episode.py) are those of each alone, and judged by their mean."""
    models, each = draw(name), batches(name, 2)
    together = Stacked(copy.deepcopy(models), vectorize=vectorize)

    def loss_of(model, batches):
        """Of the last of two, so that the running statistics of the first are kept."""
        for x, y in batches:
            loss = penalised(PROBLEMS[name].loss, model, x, y, penalty)
        loss.backward()
        return loss

    loss = loss_of(together, joint(each))
    losses = [loss_of(*own) for own in zip(models, each, strict=True)]
    exactly(loss, torch.stack(losses).mean())
    theirs = zip(*(model.named_parameters() for model in models), strict=True)
    for stacked, alone in zip(together.parameters(), theirs, strict=True):
        exactly(stacked.grad * K, torch.stack([p.grad for _, p in alone]))
    theirs = list(zip(*(model.buffers() for model in models), strict=True))
    assert len(theirs) == (9 if name == "convnet" else 0)
    for stacked, alone in zip(together.buffers(), theirs, strict=True):
        exactly(stacked, torch.stack(alone))
    together.eval(), [model.eval() for model in models]
    (x, y), *_ = joint(each)
    exactly(together(x), torch.cat([model(own) for model, own in zip(models, x, strict=True)]))


def test_one_after_the_other_gives_the_bits_of_each_alone():
    problem = problems.make("cifar10")  # channels last
    models = [problem.draw(generator(k)) for k in range(K)]
    x = torch.rand(K, BATCH, 3, 32, 32, generator=generator(5))
    expected = torch.cat([model(own) for model, own in zip(models, x, strict=True)])
    assert torch.equal(Stacked(models)(x), expected)


def test_groups_are_those_of_one_with_k_times_the_coordinates():
    models = [problems.make("cifar10").draw(generator(k)) for k in range(K)]
    alone = phi_groups(copy.deepcopy(models[0]))
    together = phi_groups(Stacked(models))
    assert list(together) == list(alone)
    for name, parameters in together.items():
        assert [p.shape for p in parameters] == [(K, *p.shape) for p in alone[name]]
        assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in parameters)


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(InputError, match="0 optimizees"):
        Stacked([])
    with pytest.raises(RuntimeError):
        Stacked([draw("mlp")[0], draw("mlp")[1].eval()])


@BOTH_WAYS
def test_attacks_meet_each_model_and_leave_no_trace(vectorize):
    models, each = draw("convnet"), batches("convnet", 1)
    together = Stacked(copy.deepcopy(models), vectorize=vectorize)
    ((x, y),) = joint(each)
    before = copy.deepcopy(together.state_dict())
    for attack in (
        partial(attacks.fgsm, eps=0.1),
        partial(attacks.pgd, eps=0.1, steps=2, random_start=False),
    ):
        expected = torch.stack([attack(m, *own[0]) for m, own in zip(models, each, strict=True)])
        exactly(attack(together, x, y), expected)
    assert all(torch.equal(value, before[key]) for key, value in together.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in together.parameters())


def test_batches_of_several_streams_are_those_of_each():
    images = data.ImageSet(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))
    together = images.batches(6, *map(generator, range(K)))
    each = [images.batches(6, generator(k)) for k in range(K)]
    for _ in range(7):  # over the end of an epoch
        x, y = next(together)
        xs, ys = zip(*map(next, each), strict=True)
        assert torch.equal(x, torch.stack(xs)) and torch.equal(y, torch.cat(ys))


def test_quadratics_of_several_streams_are_those_of_each():
    x, y = next(problems.quadratics(BATCH, *map(generator, range(K))))
    each = [next(problems.quadratics(BATCH, generator(k))) for k in range(K)]
    xs, ys = zip(*each, strict=True)
    assert torch.equal(x, torch.stack(xs)) and torch.equal(y, torch.cat(ys))
