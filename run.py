#!/usr/bin/env python
"""Meta-train an optimizer under attack, transfer it to new models on clean data, evaluate those.

python run.py --dataset cifar10 --attack pgd --eps 0.03
"""

import io
import shlex
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2l_ref.backend import resolve
from l2l_ref.experiment import cli, folder, machine, queue, report
from l2l_ref.experiment.config import Config
from l2l_ref.experiment.phis import load_phis
from l2l_ref.experiment.protocol import Experiment
from l2l_ref.experiment.setting import Setting, prepare
from l2l_ref.files import locked


def main(arguments: list[str]) -> Path:
    """Parse, meta-train, transfer, compare, report; returns the folder of the results."""
    config = cli.parse(arguments)
    folder.choose(config)  # what is wrong with it is said before the data are read
    setting, phis = ready(config)
    backend = resolve(setting.config.backend, setting.device)
    environment = machine.environment(setting.device, backend, setting.data)
    command = shlex.join(["python", "run.py", *(a for a in arguments if a != "--resume")])
    out, environment = folder.join(setting.config, environment, command)
    experiment = Experiment(setting, out, phis)
    pieces, parts = experiment.pieces(), experiment.parts
    for name in parts:
        parts[name]  # raises for one that is broken
    number = queue.number(config.jobs, pieces, parts, setting.device)
    print(report.title(setting))
    print(f"{environment['device']}, {number} process" + "es" * (number > 1)
          + f", backend {backend}, results in {out}", flush=True)  # fmt: skip
    with queue.helpers(work, (config, out, setting.data), number - 1):
        queue.compute_all(pieces, parts, print)
    with locked(out / folder.LOCK):
        text = report.write(experiment, environment, command)
        folder.tidy(out)
    names = ", ".join(sorted(path.name for path in out.glob("[!.]*")))
    print(f"\n{text}\n\n{out}: {names}", flush=True)
    return out


def ready(config: Config, number: int = 0) -> tuple[Setting, dict[str, nn.ModuleDict]]:
    """What each process of a run needs: the setting, and the φ that are loaded. It has one thread,
    so that the bits depend on no number of cores or processes."""
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    setting = prepare(config, number)
    return load_phis(config.load, setting) if config.load else (setting, {})


def work(config: Config, out: Path, data: dict[str, Any], number: int) -> None:
    """Each further process of a run, where it finds the same data."""
    with redirect_stderr(io.StringIO()):  # the first has said it
        setting, phis = ready(config, number)
    if setting.data == data:
        experiment = Experiment(setting, out, phis)
        queue.compute_all(experiment.pieces(), experiment.parts, lambda *_: None)


if __name__ == "__main__":
    cli.run_as_script("run.py", main, "stopped; --resume continues")
