"""The penalty l + λ·Σ|∂l/∂x|: its value and gradient, who reads it, what it is of K at once."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from l2l_ref import attacks, problems
from l2l_ref.episode import Episode, MetaSettings, truncated_unrolls
from l2l_ref.equations import penalised, robust_loss
from l2l_ref.experiment.tuning import sgd
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.problems import Problem, Stacked
from l2l_ref.transfer import Method, train

LAMBDA = 0.7
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


SMALL = Problem("small", build, problems.cross_entropy, 3)


def network(seed=0) -> nn.Module:
    return SMALL.draw(generator(seed)).double()


def batch(seed=0, b=4):
    noise = generator(100 + seed)
    x = torch.rand(b, 1, 2, 3, generator=noise, dtype=torch.float64)
    return x, torch.randint(3, (b,), generator=noise)


def gradient(model, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def test_of_a_linear_model_by_hand():
    """Logits wx and 0, label 0: l = log(1 + e^-wx), ∂l/∂x = -w·σ(-wx); a batch has the mean."""
    w = torch.tensor([1.5, -2.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.2, 0.5], [0.9, 0.1]], dtype=torch.float64)
    logits = lambda x: torch.stack((x @ w, torch.zeros(len(x))), dim=1)  # noqa: E731
    value = penalised(problems.cross_entropy, logits, x, torch.zeros(2, dtype=torch.long), LAMBDA)
    at = x @ w
    slopes = torch.sigmoid(-at)[:, None] * w.abs() / 2  # |∂l/∂x|, l being a mean of two
    by_hand = torch.log1p(torch.exp(-at)).mean() + LAMBDA * slopes.sum()
    CLOSE(value, by_hand)
    CLOSE(torch.autograd.grad(value, w)[0], torch.autograd.grad(by_hand, w)[0])
    assert x.grad is None and not x.requires_grad


def test_is_to_first_order_the_loss_under_attack():
    model, (x, y) = network(), batch()
    eps = 1e-6
    attacked = SMALL.loss(model, attacks.fgsm(model, x + 0.0, y, eps=eps), y)
    clean = SMALL.loss(model, x, y)
    slope = (penalised(SMALL.loss, model, x, y, eps) - clean) / eps
    assert slope > 0.01
    # mean over the batch and sum over it: fgsm moves every sample, each has its part of the mean
    torch.testing.assert_close((attacked - clean) / eps, slope, rtol=1e-4, atol=0)


def test_gradient_equals_finite_differences():
    model, (x, y) = network(), batch()
    found = gradient(model, penalised(SMALL.loss, model, x, y, LAMBDA))
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    plain = gradient(model, SMALL.loss(model, x, y))
    assert (found - plain).norm() > 0.1 * plain.norm()  # the penalty has a share in it

    def value(theta):
        nn.utils.vector_to_parameters(theta, model.parameters())
        return penalised(SMALL.loss, model, x, y, LAMBDA).item()

    step = 1e-6 * torch.eye(len(theta), dtype=torch.float64)
    differences = torch.tensor([(value(theta + s) - value(theta - s)) / 2e-6 for s in step])
    torch.testing.assert_close(found, differences.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("vectorize", [False, True])
def test_of_k_at_once_it_is_the_mean(vectorize):
    models, batches = [network(k) for k in range(3)], [batch(k) for k in range(3)]
    together = Stacked(copy.deepcopy(models), vectorize=vectorize)
    xs, ys = zip(*batches, strict=True)
    value = penalised(SMALL.loss, together, torch.stack(xs), torch.cat(ys), LAMBDA)
    each = [penalised(SMALL.loss, m, *own, LAMBDA) for m, own in zip(models, batches, strict=True)]
    CLOSE(value, torch.stack(each).mean())
    stacked = torch.autograd.grad(value, list(together.parameters()))
    alone = [
        torch.autograd.grad(v, list(m.parameters())) for v, m in zip(each, models, strict=True)
    ]
    for of_all, own in zip(stacked, zip(*alone, strict=True), strict=True):
        CLOSE(of_all * 3, torch.stack(own))


def test_in_the_loss_of_eq_6_it_takes_the_place_of_the_clean_one():
    model, (x, y) = network(), batch()
    shift = lambda model, x, y: 1 - x  # noqa: E731
    pure, other = penalised(SMALL.loss, model, x, y, LAMBDA), SMALL.loss(model, 1 - x, y)
    loss = partial(robust_loss, SMALL.loss, model, x, y, attack=shift)
    CLOSE(loss(alpha=1.0, penalty=LAMBDA), pure)
    CLOSE(loss(alpha=0.25, penalty=LAMBDA), 0.25 * pure + 0.75 * other)
    CLOSE(loss(alpha=0.0, penalty=LAMBDA), other)
    CLOSE(loss(alpha=1.0), SMALL.loss(model, x, y))


def test_it_enters_what_phi_reads_and_nothing_else():
    """φ's head is zero, so θ stays: losses and judging gradients are those without a penalty."""
    x, y = batch(b=8)
    flip = lambda model, x, y: 1 - x  # noqa: E731
    read, judged, losses = {}, {}, {}
    for penalty in (0.0, LAMBDA):
        phi = new_phi(SMALL.build(), generator=generator(1), hidden_size=3).double()
        operator_calls = []

        def spy(gradients, state, cotangents, *rest, seen=operator_calls, **form):
            seen.append((gradients.clone(), cotangents.clone()))
            return torch.zeros_like(rest[0])

        settings = MetaSettings(1, steps=3, unroll=3, read_alpha=1.0, alpha=0.25, penalty=penalty)
        episode = Episode(network(), iter([(x, y)] * 9), flip)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("l2l_ref.equations.unroll_meta_gradient", spy)
            ((_, losses[penalty]),) = truncated_unrolls(episode, phi, settings, "reference")
        ((read[penalty], judged[penalty]),) = operator_calls
    model = network()
    clean, attacked = SMALL.loss(model, x, y), SMALL.loss(model, 1 - x, y)
    CLOSE(losses[0.0], (0.25 * clean + 0.75 * attacked).detach().expand(3))
    assert torch.equal(losses[LAMBDA], losses[0.0]) and torch.equal(judged[LAMBDA], judged[0.0])
    # row t of the cotangents sums the judging gradients after it
    row = gradient(model, 0.25 * clean + 0.75 * attacked)
    CLOSE(judged[LAMBDA], torch.stack([3 * row, 2 * row, row]))
    expected = gradient(model, penalised(SMALL.loss, model, x, y, LAMBDA))
    CLOSE(read[LAMBDA], expected.expand(3, -1))
    CLOSE(read[0.0], gradient(model, SMALL.loss(model, x, y)).expand(3, -1))


def test_a_penalty_separates_the_losses_even_where_the_alphas_agree():
    x, y = batch(b=8)
    found = []
    for penalty in (0.0, LAMBDA):
        phi = new_phi(SMALL.build(), generator=generator(1), hidden_size=3).double()
        settings = MetaSettings(1, steps=2, unroll=2, read_alpha=1.0, alpha=1.0, penalty=penalty)
        episode = Episode(network(), iter([(x, y)] * 9), attacks.none)
        ((dphis, losses),) = truncated_unrolls(episode, phi, settings)
        found.append((dphis["linear"], losses))
    CLOSE(found[0][1], found[1][1])
    CLOSE(found[0][1], SMALL.loss(network(), x, y).detach().expand(2))
    assert not torch.allclose(found[0][0], found[1][0], rtol=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_method_trains_on_it(alpha):
    x, y = batch(b=8)
    shift = lambda model, x, y: 1 - x  # noqa: E731
    model, twin = network(), network()
    method = Method("", partial(sgd, 0.1), alpha=alpha, penalty=LAMBDA)
    train(model, method, iter([(x, y)] * 9), loss=SMALL.loss, attack=shift, steps=3,
          record=lambda m: (torch.zeros(()), torch.zeros(())))  # fmt: skip
    for _ in range(3):
        value = alpha * penalised(SMALL.loss, twin, x, y, LAMBDA)
        value = value + (1 - alpha) * SMALL.loss(twin, 1 - x, y)
        moved = nn.utils.parameters_to_vector(twin.parameters()) - 0.1 * gradient(twin, value)
        nn.utils.vector_to_parameters(moved.detach(), twin.parameters())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        CLOSE(a, b)
