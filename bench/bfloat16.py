"""What φ's products in bfloat16 would do to θ: why the engine has none.

python -m bench.bfloat16 --data-dir data

Trains MNIST's MLP on clean batches with the φ of the package, in float64, in float32, and with the
products of every LSTM layer as a CPU's or GPU's bfloat16 instructions take them: factors rounded,
sums and all else in float32. Prints how far θ is off float64's after so many steps, over the way
that float64's went, where both are given the same gradients and where each meets its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bench import measure
from l2l_ref import attacks, data, equations, evaluate, pretrained, problems
from l2l_ref.experiment.cli import run_as_script
from l2l_ref.experiment.options import path
from l2l_ref.meta_optimizer import with_phi

PHIS, EPS = ("mnist-fgsm-0.1", "mnist-fgsm-0.1-robust"), 0.1
Pairs = tuple[tuple[int, int], ...]  # of `parts`: that of a weight, that of an input


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """x rounded to bfloat16, and what that leaves, rounded too; both in the dtype of x."""
    high = x.bfloat16().to(x.dtype)
    return high, (x - high).bfloat16().to(x.dtype)


# The name of a row, which parts of weights and inputs its products take, and what those cost beside
# float32's, where an instruction does two multiply-adds in bfloat16 in the time of one in float32.
ROWS: tuple[tuple[str, Pairs, float], ...] = (
    ("float32", (), 1.0),
    ("weights and inputs in bfloat16", ((0, 0),), 0.5),
    ("weights as two numbers each", ((0, 0), (1, 0)), 1.0),
    ("weights and inputs as two numbers", ((0, 0), (1, 0), (0, 1)), 1.5),
)


def factors(w: Tensor, x: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """w [R, F] and x [F, M] -> two factors whose product is the sum of those of the pairs."""
    ws, xs = parts(w), parts(x)
    return torch.cat([ws[i] for i, _ in pairs], dim=1), torch.cat([xs[j] for _, j in pairs])


@dataclass(frozen=True)
class Run:
    """θ [N] after training, how far it went, the gradients that it met, the loss under PGD-7."""

    theta: Tensor
    way: float
    gradients: list[Tensor]
    loss: float


def train(
    name: str, images: data.Data, seed: int, steps: int, dtype: torch.dtype,
    given: list[Tensor] | None = None,
) -> Run:  # fmt: skip
    """Train on clean batches with a φ of the package; `given` replaces the gradients met."""
    problem, generator = problems.make("mnist"), torch.Generator().manual_seed(seed)
    model, batches = problem.draw(generator).to(dtype), images.train.batches(128, generator)
    ((params, meta),) = with_phi(model, pretrained.load(name).to(dtype)).values()
    theta = parameters_to_vector(params).detach()
    vector_to_parameters(theta, params)  # views of it, from now on
    start, gradients, state = theta.clone(), [], meta.init_state(len(theta))
    moments = [meta.init_moments(len(theta))] if meta.nominal else None
    for step in range(steps):
        x, y = next(batches)
        if given is None:
            grads = torch.autograd.grad(problem.loss(model, x.to(dtype), y), params)
            gradient = parameters_to_vector(grads)
        else:
            gradient = given[step].to(dtype)
        gradients.append(gradient)
        meta.step_([theta], [gradient], [state], moments, backend="reference")
    x, y = images.test.first(1000).all()
    attack = attacks.make("pgd", eps=EPS, steps=7, generator=generator)
    _, loss = evaluate.losses(model.float(), x, y, attack)
    return Run(theta, float((theta - start).norm()), gradients, loss.item())


@contextmanager
def products(pairs: Pairs) -> Iterator[None]:
    """The reference backend multiplies so."""
    before = equations.lstm_cell

    def lstm_cell(
        x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor
    ) -> tuple[Tensor, Tensor]:
        (w_ih, x), (w_hh, h) = factors(w_ih, x, pairs), factors(w_hh, h, pairs)
        return before(x, h, c, w_ih, w_hh, *biases)

    if pairs:
        equations.lstm_cell = lstm_cell
    try:
        yield
    finally:
        equations.lstm_cell = before


def main(arguments: list[str]) -> None:
    """Parse, train, print."""
    top = measure.parser("bfloat16", __doc__, backend="reference")
    top.add_argument("--data-dir", type=path, default="data", metavar="DIR", help="(data)")
    top.add_argument("--steps", type=measure.count, default=100, metavar="N", help="(100)")
    top.add_argument("--seeds", type=measure.count, default=3, metavar="N", help="(3)")
    options = measure.parse(top, arguments)
    images = data.load("mnist", options.data_dir)
    print(f"{images.source}, {options.steps} steps, mean of {options.seeds} seeds")
    for name in PHIS:
        print(f"\n{name:<36}{'cost':>5}{'same gradients':>16}{'own gradients':>15}{'PGD-7':>7}")
        exact = [train(name, images, s, options.steps, torch.float64) for s in range(options.seeds)]
        print(f"{'float64':<56}{'':>16}{mean(run.loss for run in exact):>7.3f}")
        for label, pairs, cost in ROWS:
            same, own, losses = [], [], []
            for seed, reference in enumerate(exact):
                with products(pairs):
                    for errors, given in ((same, reference.gradients), (own, None)):
                        run = train(name, images, seed, options.steps, torch.float32, given)
                        errors.append((run.theta - reference.theta).norm().item() / reference.way)
                losses.append(run.loss)
            row = f"{mean(same):>16.1e}{mean(own):>15.1e}{mean(losses):>7.3f}"
            print(f"{label:<36}{cost:>5}{row}", flush=True)


if __name__ == "__main__":
    run_as_script("bfloat16.py", main)
