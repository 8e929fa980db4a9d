"""Where the time of a run goes.

python -m bench.run_profile --quick --dataset mnist --attack pgd

Runs run.py with the same options, in one process and without CUDA graphs, under a clock; prints a
table of per cent and writes the seconds to profile.json in the run's folder.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import run
from l2l_ref import attacks, equations, evaluate, problems
from l2l_ref.backend import operators
from l2l_ref.experiment import cli, protocol, tuning
from l2l_ref.files import write_json

OPTIMIZEE, CRAFTING = "optimizee: forward, backward", "attacks: forward, backward"
ATTACKS, LSTM, REST = "attacks: steps, projections", "LSTM", "everything else"
ROWS = (OPTIMIZEE, CRAFTING, ATTACKS, LSTM, REST)
PHASES = ("meta-training", "tuning", "transfer", "recording", "evaluation", "between")


class Clock:
    """Wall time by phase and what the program does: the innermost range counts, alone."""

    def __init__(self):
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.stack, self.since = [("between", REST)], time.perf_counter()

    def lap(self) -> None:
        """Give the time since the last lap to the range that is open."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        then, (phase, what) = time.perf_counter(), self.stack[-1]
        self.seconds[phase][what] += then - self.since
        self.since = then

    def timed(self, function: Callable, what: str = "", phase: str = "") -> Callable:
        """`function` with its calls in a range; what is not named stays as it is outside."""

        @wraps(function)
        def wrapper(*args, **options):
            self.lap()
            outer_phase, outer = self.stack[-1]
            inner = what or outer
            if outer == LSTM:  # the reference runs autograd, too
                inner = LSTM
            elif inner == OPTIMIZEE and outer == ATTACKS:
                inner = CRAFTING
            self.stack.append((phase or outer_phase, inner))
            try:
                return function(*args, **options)
            finally:
                self.lap()
                self.stack.pop()

        return wrapper


def instrument(clock: Clock) -> None:
    """Put ranges around what is called in a run, for as long as this program lives."""

    def patch(owner: Any, *names: str, **ranges: str) -> None:
        for name in names:
            setattr(owner, name, clock.timed(getattr(owner, name), **ranges))

    patch(protocol.Experiment, "train_phi", phase="meta-training")
    patch(tuning.Row, "run", phase="tuning")
    patch(protocol, "run_method", phase="transfer")
    patch(evaluate, "losses", phase="recording")
    patch(evaluate, "robust_accuracy", phase="evaluation")
    patch(torch.autograd, "backward", "grad", what=OPTIMIZEE)
    patch(F, "cross_entropy", what=OPTIMIZEE)
    patch(attacks, "fgsm", "pgd", what=ATTACKS)
    for module in {equations, operators("auto", torch.empty(1, 2, 1, 1))}:
        patch(module, "theta_step_", "theta_step", "unroll_meta_gradient", what=LSTM)

    make = problems.make

    def made(*args, **options) -> problems.Problem:
        problem = make(*args, **options)

        def build() -> nn.Module:
            model = problem.build()
            patch(model, "forward", what=OPTIMIZEE)
            return model

        return replace(problem, build=build)

    problems.make = made


def table(seconds: dict[str, dict[str, float]]) -> str:
    """Per cent: a row for what is done, a column for when."""
    phases = [phase for phase in PHASES if phase in seconds]
    rows = {what: [seconds[phase].get(what, 0.0) for phase in phases] for what in ROWS}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    total = sum(rows["all"])
    lines = [f"{'% of wall time':<30}" + "".join(f"{name:>14}" for name in (*phases, "all"))]
    for what, row in rows.items():
        cells = "".join(f"{100 * cell / total:14.1f}" for cell in (*row, sum(row)))
        lines.append(f"{what:<30}{cells}")
    return "\n".join(lines)


def main(arguments: list[str]) -> Path:
    """Run, print, write."""
    instrument(clock := Clock())
    out = run.main([*arguments, "--jobs", "1", "--no-graphs"])
    clock.lap()
    print(f"\n{table(clock.seconds)}")
    write_json(out / "profile.json", clock.seconds)
    return out


if __name__ == "__main__":
    cli.run_as_script("run_profile.py", main)
