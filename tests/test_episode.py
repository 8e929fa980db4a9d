"""Episodes: unrolls and their meta-gradients against autograd, their lengths."""

import pytest
import torch
from conftest import SMALL, generator, weights
from torch import nn

from l2l_ref import equations
from l2l_ref.episode import Episode, MetaSettings, truncated_unrolls
from l2l_ref.meta_optimizer import new_phi

BATCH, STEPS, UNROLL = 6, 7, 4
# α of the input of φ and of the meta-loss, λ, the curriculum of three episodes, d of the average;
# both α in the first of them.
WAYS = {
    "one loss": (0.5, 0.5, 0.0, (0, 0), 0.0, 0.5, 0.5),
    "two losses": (1.0, 0.25, 0.0, (0, 0), 0.0, 1.0, 0.25),
    "penalised": (1.0, 0.25, 0.3, (0, 0), 0.0, 1.0, 0.25),
    "penalised, one α": (0.5, 0.5, 0.3, (0, 0), 0.0, 0.5, 0.5),
    "a curriculum before its start": (0.6, 0.2, 0.0, (1, 1), 0.0, 1.0, 1.0),
    "a quarter of a curriculum": (0.6, 0.2, 0.0, (0, 1), 0.0, 0.9, 0.8),
    "one loss, its average": (0.5, 0.5, 0.0, (0, 0), 0.7, 0.5, 0.5),
    "penalised, its average": (1.0, 0.25, 0.3, (0, 0), 0.7, 1.0, 0.25),
}


def shift(model, x, y):
    """An attack that is easy to follow."""
    return (0.8 * x + 0.1).flip(-1)


def drawn():
    """A model, and the batches of an episode."""
    noise = generator(50)
    batches = [(torch.rand(BATCH, 5, generator=noise, dtype=torch.float64),
                torch.randint(3, (BATCH,), generator=noise))
               for _ in range(STEPS + 1)]  # fmt: skip
    return SMALL.draw(generator()).double(), batches


def by_autograd(meta, model, batches, way):
    """Each unroll's losses and derivatives by all parameters of φ."""
    _, _, penalty, _, decay, input_alpha, alpha = WAYS[way]

    def loss(theta, x, y, alpha, penalty=0.0):
        w_1, b_1, w_2, b_2 = theta.split([20, 4, 12, 3])

        def of(x):
            logits = (x @ w_1.view(4, 5).T + b_1).tanh() @ w_2.view(3, 4).T + b_2  # `SMALL`
            return nn.functional.cross_entropy(logits, y)

        x = x.clone().requires_grad_()
        clean, attacked = of(x), of(shift(None, x.detach(), y))
        if penalty:
            (slope,) = torch.autograd.grad(clean, x, create_graph=True)
            clean = clean + penalty * slope.abs().sum()
        return alpha * clean + (1 - alpha) * attacked

    theta = average = weights(model)
    state, moments = meta.init_state(len(theta)), meta.init_moments(len(theta))
    for start in range(0, STEPS, UNROLL):
        losses = []
        for t in range(start, min(start + UNROLL, STEPS)):
            seen = theta.detach().requires_grad_()  # what φ sees enters as a constant
            value = loss(seen, *batches[t], input_alpha, penalty)
            (gradient,) = torch.autograd.grad(value, seen)
            u, state = equations.update(seen.detach(), gradient, state, meta.phi(), **meta.form)
            theta = theta + u
            if meta.nominal:
                d, moments = equations.adam_direction(gradient, moments)
                theta = theta - meta.log_eta.exp() * d
            weight = max(1 - decay, 1 / (t + 1))
            average = (1 - weight) * average + weight * theta
            losses.append(loss(average, *batches[t + 1], alpha))
        derivative = torch.autograd.grad(sum(losses), list(meta.parameters()))
        yield torch.cat([d.flatten() for d in derivative]), torch.stack(losses).detach()
        theta, average, state = theta.detach(), average.detach(), state.detach()


@pytest.mark.parametrize(
    "theta_input, odd, nominal",
    [(False, False, True), (False, True, False), (True, False, False), (True, True, True)],
)
@pytest.mark.parametrize("way", WAYS)
def test_the_closed_form_is_autograd_through_the_unroll(backend, theta_input, odd, nominal, way):
    """To first order: gradients, d and the θ that φ saw are constants. Two unrolls, the states
    and moments of the first carried on."""
    names = "input_alpha", "alpha", "penalty", "curriculum", "average"
    options = dict(zip(names, WAYS[way], strict=False))
    settings = MetaSettings(3, steps=STEPS, unroll=UNROLL, **options)
    phi = new_phi(SMALL.build(), generator=generator(1), hidden_size=4, output_scale=0.1,
                  theta_input=theta_input, odd=odd, nominal=nominal).double()  # fmt: skip
    meta = phi["linear"]
    nn.init.normal_(meta.head.weight, generator=generator(2))
    if nominal:
        nn.init.constant_(meta.log_eta, -3.0)
    model, batches = drawn()
    expected = list(by_autograd(meta, model, batches, way))
    episode = Episode(model, iter(batches), shift)
    found = list(truncated_unrolls(episode, phi, settings, backend))
    assert [len(losses) for _, losses in found] == [4, 3]
    for (dphis, losses), (derivative, expected_losses) in zip(found, expected, strict=True):
        torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=1e-12)
        dphi = dphis["linear"]
        assert dphi.shape == derivative.shape == (nominal + meta.phi().numel(),)
        error, slope = (dphi - derivative).abs(), derivative.abs()
        assert slope[nominal:].norm() > 1e-3
        assert error[nominal:].max() <= 1e-9 * slope[nominal:].max()
        if nominal:  # log η, first in order
            assert slope[0] > 1e-4 and error[0] <= 1e-9 * slope[0]


@pytest.mark.parametrize("odd", [False, True])
def test_the_samples_of_coordinates_take_turns_and_add_up(backend, odd):
    """The mean over the turns is the whole meta-gradient; each unroll samples others."""

    def found(number, stride):
        phi = new_phi(SMALL.build(), generator=generator(1), hidden_size=4, theta_input=odd,
                      odd=odd, nominal=odd).double()  # fmt: skip
        nn.init.normal_(phi["linear"].head.weight, generator=generator(2))
        model, batches = drawn()
        settings = MetaSettings(1, steps=STEPS, unroll=UNROLL, stride=stride, average=0.5)
        episode = Episode(model, iter(batches), shift)
        unrolls = truncated_unrolls(episode, phi, settings, backend, number=number)
        return torch.stack([dphis["linear"] for dphis, _ in unrolls])

    whole, n = found(0, 1), sum(p.numel() for p in SMALL.build().parameters())
    for stride in (2, 10**6):  # as many turns, or one for each coordinate
        turns = min(stride, n)
        parts = torch.stack([found(number, stride) for number in range(turns)])
        sizes = torch.tensor([[len(range((number + k) % turns, n, turns)) for k in range(2)]
                              for number in range(turns)])  # fmt: skip
        total = (parts * sizes[..., None]).sum(0) / n
        torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-12)
        assert (parts[0] - parts[1]).abs().max() > 1e-6
