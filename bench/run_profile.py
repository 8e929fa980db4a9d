"""Where the time of a run goes: a tenth of one, or less, under a clock.

python -m bench.run_profile --recipe robust --attack pgd

Takes the options of run.py; the defaults shorten every part of a run by about the same factor. The
seconds go to profile-<dataset>-<attack>-<recipe>-<backend>.json in `--out` (runs/bench).
"""

import tempfile
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

from bench.measure import command
from l2l_ref import attacks, data, equations, evaluate
from l2l_ref.backend import cuda_graphs, operators, resolve
from l2l_ref.experiment import cli, folder, machine, protocol, tuning
from l2l_ref.experiment.progress import Progress
from l2l_ref.experiment.queue import compute_all
from l2l_ref.experiment.setting import Setting, prepare
from l2l_ref.files import write_json
from l2l_ref.optimizer import LearnedOptimizer

OPTIMIZEE, CRAFTING = "optimizee: forward, backward", "attacks: forward, backward"
LSTM, ATTACKS, OPTIMIZERS = "LSTM", "attacks: steps, projections", "optimizers without the LSTM"
BATCHES, REST = "batches", "everything else"
ROWS = (OPTIMIZEE, CRAFTING, LSTM, ATTACKS, OPTIMIZERS, BATCHES, REST)
PHASES = ("meta-training", "tuning", "transfer", "recording", "judging", "between")
SHORT = {
    "mnist": "--steps 50 --episodes 14 --seeds 1 --eval-samples 1000",
    "cifar10": "--steps 20 --record-every 10 --unroll 10 --episodes 4 --episode-steps 20 60 "
    "--eval-samples 40",
    "quadratic": "--steps 50 --episodes 20 --seeds 1",
}


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Wall time by phase and what the program does: the innermost range counts, alone."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.device = device
        self.stack, self.since = [("between", REST)], now(device)

    def lap(self) -> None:
        """Give the time since the last lap to the range that is open."""
        then, (phase, what) = now(self.device), self.stack[-1]
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


def instrument(clock: Clock, setting: Setting, backend: str) -> Setting:
    """Put ranges around what is called in a run, for as long as this program lives."""

    def patch(owner: Any, *names: str, **ranges: str) -> None:
        for name in names:
            setattr(owner, name, clock.timed(getattr(owner, name), **ranges))

    cuda_graphs.graphs_of = lambda device, generators: None  # a replay could not be told apart
    patch(protocol, "train_phi", phase="meta-training")
    patch(tuning.Grid, "run", phase="tuning")
    patch(protocol, "run_method", phase="transfer")
    patch(evaluate, "losses", phase="recording")
    patch(evaluate, "robust_accuracy", phase="judging")
    patch(torch.autograd, "backward", "grad", what=OPTIMIZEE)
    patch(F, "cross_entropy", what=OPTIMIZEE)
    patch(attacks, "fgsm", "pgd", what=ATTACKS)
    patch(data.ImageSet, "batch", what=BATCHES)
    for kind in (torch.optim.Adam, torch.optim.SGD, LearnedOptimizer):
        patch(kind, "step", "zero_grad", what=OPTIMIZERS)

    endless = data.ImageSet.batches
    data.ImageSet.batches = lambda *args: iter(clock.timed(endless(*args).__next__, BATCHES), None)

    for module in {equations, operators(backend, torch.empty(1, 2, 1, 1, device=clock.device))}:
        patch(module, "theta_step_", "theta_step", "unroll_meta_gradient", what=LSTM)

    def build() -> nn.Module:
        model = setting.problem.build()
        patch(model, "forward", what=OPTIMIZEE)
        return model

    return replace(setting, problem=replace(setting.problem, build=build))


def table(seconds: dict[str, dict[str, float]]) -> str:
    """Per cent: a row for what is done, a column for when; the last column is without the LSTM."""
    phases = [phase for phase in PHASES if phase in seconds]
    rows = {what: [seconds[phase].get(what, 0.0) for phase in phases] for what in ROWS}
    total, lstm = sum(map(sum, rows.values())), sum(rows[LSTM])
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    header = "".join(f"{name:>14}" for name in (*phases, "all", "no LSTM"))
    lines = [f"{'% of wall time':<30}{header}"]
    for what, row in rows.items():
        cells = [100 * cell / total for cell in (*row, sum(row))]
        without = {LSTM: 0.0, "all": total - lstm}.get(what, sum(row))
        cells.append(100 * without / (total - lstm))
        lines.append(f"{what:<30}" + "".join(f"{cell:14.1f}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Run, print the table, write the JSON."""
    dataset = cli.parse(arguments).dataset
    config = cli.parse([*SHORT[dataset].split(), *arguments])
    config = replace(config, tune_seeds=1)
    machine.keep_freed_memory()
    setting = prepare(config)
    backend = resolve(config.backend, setting.device)
    environment = machine.environment(setting.device, backend, setting.data)
    torch.optim.SGD([torch.zeros(1)]).zero_grad()  # the first one imports half of PyTorch
    clock = Clock(setting.device)
    with tempfile.TemporaryDirectory() as scratch:
        whole = protocol.Experiment(instrument(clock, setting, backend), Path(scratch), Progress())
        compute_all(whole.pieces(), whole.parts, Progress())
    clock.lap()
    line = command("run_profile", arguments)
    total = sum(sum(phase.values()) for phase in clock.seconds.values())
    print(f"{line}: {total:.1f} s, backend {backend}, {environment['device']}\n")
    print(table(clock.seconds))
    saved = {"command": line, "environment": environment, "seconds": clock.seconds}
    out = Path(config.out or "runs/bench")
    path = out / f"profile-{config.dataset}-{config.attack}-{config.recipe}-{backend}.json"
    folder.make(out)
    write_json(path, saved)
    print(f"\n{path}")


if __name__ == "__main__":
    cli.run_as_script("bench.run_profile", main)
