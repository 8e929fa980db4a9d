"""The one loop, against gradient descent written out by hand."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from l2l_ref import attacks
from l2l_ref.experiment.tuning import sgd
from l2l_ref.transfer import Curve, Method, running_average, train


def line(w) -> nn.Module:
    """x -> wx without a bias."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, w)
    return model


def square(model, x, y):
    return (model(x) - y).square().mean()


def nothing(model):
    """A recording."""
    return torch.zeros(()), torch.zeros(())


XS = 1.0, 3.0, 2.0, 5.0


def run(method, every=1, shift=0.0, decay=None, w=2.0):
    """Trains w by three updates on x = XS, y = 0; the attack adds `shift`; records w and 10·w, or
    those of its average of that decay."""
    model = line(w)
    batches = iter([(torch.tensor([[x]]), torch.zeros(1, 1)) for x in XS])
    curve = train(
        model, method, batches, loss=square, attack=lambda m, x, y: x + shift, steps=3,
        record=lambda m: (m.weight.detach().sum(), 10 * m.weight.detach().sum()), every=every,
        average=None if decay is None else running_average(model, decay),
    )  # fmt: skip
    return model, curve, batches


def by_hand(lr, alpha=1.0, shift=0.0, l1=0.0, cosine=False, penalty=0.0):
    """w after each of three updates; the penalty is on 2·w²·|x|."""
    w, trace = 2.0, [2.0]
    factors = (1.0, 0.75, 0.25) if cosine else (1.0, 1.0, 1.0)  # cos 0°, 60°, 120°
    for x, factor in zip(XS, factors, strict=False):
        clean, attacked = 2 * w * x**2 + penalty * 4 * w * x, 2 * w * (x + shift) ** 2
        slope = alpha * clean + (1 - alpha) * attacked + l1 * math.copysign(1, w)
        w -= lr * factor * slope
        trace.append(w)
    return trace


def close(actual, expected):
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected))


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.0}, {"alpha": 0.5}, {"cosine": True}, {"l1": 0.7}, {"penalty": 0.7},
     {"alpha": 0.5, "penalty": 0.7}],
)  # fmt: skip
def test_sgd_by_hand_and_what_is_recorded(options):
    _, curve, batches = run(Method("", partial(sgd, lr=0.01), **options), shift=0.5)
    trace = by_hand(0.01, shift=0.5, **options)
    assert curve.steps == [0, 1, 2, 3]
    close(curve.clean, trace)
    close(curve.attacked, [10 * w for w in trace])
    assert next(batches)[0].item() == 5.0  # one batch an update, none more
    assert curve.ms_per_step > 0 and not curve.diverged


def test_the_time_is_of_an_update(monkeypatch):
    now = itertools.count()  # each look at the clock is a second later
    monkeypatch.setattr("l2l_ref.transfer.time.perf_counter", lambda: float(next(now)))
    assert run(Method("SGD", partial(sgd, lr=0.0)), every=3)[1].ms_per_step == pytest.approx(
        1e3 / 3
    )


def test_l1_reaches_parameters_that_the_loss_does_not():
    class Unused(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    model = Unused(1, 1)
    nn.init.constant_(model.bias, -1.0)
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    method = Method("", lambda m: torch.optim.SGD(m.parameters(), lr=0.1), l1=0.5)
    batches = iter([(torch.ones(1, 1), torch.zeros(1, 1))] * 2)
    train(model, method, batches, loss=square, attack=attacks.none, steps=2, record=nothing)
    close([model.bias.item(), model.frozen.item()], [-0.9, 1.0])


def test_records_first_every_kth_and_last():
    for every, steps in ((2, [0, 2, 3]), (3, [0, 3])):
        _, curve, _ = run(Method("", partial(sgd, lr=0.01)), every=every)
        assert curve.steps == steps


def test_a_loss_that_is_not_finite_is_marked():
    _, curve, _ = run(Method("", partial(sgd, lr=1e30)))
    assert curve.diverged
    assert Curve([0], [1.0], [math.nan], 1.0).diverged
    assert not Curve([0], [1.0], [1.0], 1.0).diverged


def test_its_running_average_is_recorded_and_normalises_anew():
    """w as ever; recorded is w̄ of weights 1, 1/2 and 0.4 = 1 - d."""
    model, curve, _ = run(Method("", partial(sgd, lr=0.01)), decay=0.6)
    w = by_hand(0.01)
    averages = [w[0], w[1], (w[1] + w[2]) / 2]
    averages.append(0.6 * averages[2] + 0.4 * w[3])
    close(model.weight.item(), w[3])
    close(curve.clean, averages)

    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = running_average(model, 0.5)
    x, calibration = torch.rand(8, 2), torch.rand(40, 2)
    train(
        model, Method("", partial(sgd, lr=0.1)), iter([(x, torch.zeros(8, 3))] * 5), loss=square,
        attack=attacks.none, steps=5, record=nothing, average=average,
        calibration=calibration.split(20),
    )  # fmt: skip
    hidden = average.module[0](calibration)
    torch.testing.assert_close(average.module[1].running_mean, hidden.mean(0))
    assert (model[1].running_mean - hidden.mean(0)).abs().max() > 1e-3


def test_a_schedule_free_optimizer_is_evaluated_at_its_other_weights():
    """One that holds w + 1 while it is evaluated, and refuses to be trained there."""

    class Swapping(torch.optim.SGD):
        moved = 1.0

        def shift(self, moved):
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(moved - self.moved)
            self.moved = moved

        def eval(self):
            self.shift(1.0)

        def train(self):
            self.shift(0.0)

        def step(self, closure=None):
            assert self.moved == 0.0
            super().step()

    method = Method("", lambda m: Swapping(m.parameters(), 0.01))
    model, curve, _ = run(method, decay=0.0, w=3.0)
    close(curve.clean, [w + 1 for w in by_hand(0.01)])
    close(model.weight.item(), by_hand(0.01)[-1] + 1)
