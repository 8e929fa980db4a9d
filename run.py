#!/usr/bin/env python
"""Meta-train an optimizer under attack, transfer it to new models on clean data, judge those.

python run.py --dataset cifar10 --attack pgd --eps 0.03
"""

import os
import shlex
from pathlib import Path

import torch
from torch import nn

from l2l_ref.backend import resolve
from l2l_ref.experiment import cli, folder, jobs, machine, report
from l2l_ref.experiment.config import Config
from l2l_ref.experiment.phis import load_phis
from l2l_ref.experiment.progress import Display, Progress
from l2l_ref.experiment.protocol import Experiment
from l2l_ref.experiment.queue import compute_all
from l2l_ref.experiment.setting import Setting, prepare
from l2l_ref.files import locked


def main(arguments: list[str]) -> Path:
    """Parse, meta-train, transfer, compare, report; returns the folder of the results."""
    started = machine.torchrun()
    first = started.get("RANK", 0) == 0
    with cli.said_once(first):
        config = cli.parse(arguments)
        folder.choose(config)  # what is wrong with it is said before the data are read
    setting, phis = ready(config, started.get("LOCAL_RANK", 0))
    backend = resolve(setting.config.backend, setting.device)
    environment = machine.environment(setting.device, backend, setting.data)
    launcher = ["python"]
    if started:
        launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    command = shlex.join([*launcher, "run.py", *(a for a in arguments if a != "--resume")])
    out, environment = folder.join(setting.config, setting.data, environment, command)
    before, display = folder.report_of(out), Display(first)
    experiment = Experiment(setting, out, display.progress(), phis)
    pieces, parts = experiment.pieces(), experiment.parts
    there = dict(parts)  # raises for one that is broken
    pending = any(piece.name not in there for piece in pieces)
    number = jobs.number(config.jobs, pieces, parts, setting.device)
    if first:
        print(report.title(setting))
        processes = f"{number} process" + "es" * (number > 1)
        print(f"{environment['device']}, {processes}, backend {backend}, results in {out}",
              flush=True)  # fmt: skip
    with display.of(pieces, parts, number):
        if number > 1:
            jobs.share_out(work, (config, out), number, display)
        else:
            compute_all(pieces, parts, display.progress())
    with locked(out / folder.LOCK):
        # Else another process has written it: meanwhile, or before this one came.
        if folder.report_of(out) == before and (pending or not before or config.resume):
            left = experiment.results(), setting, environment, command
            print("\n" + report.write(out, *left), flush=True)
            report.draw(out, *left)
        folder.tidy(out)
    if first:
        names = sorted(path.name for path in out.iterdir() if path.name != folder.LOCK)
        print(f"\n{out}: " + ", ".join(names))
    return out


def ready(config: Config, number: int) -> tuple[Setting, dict[str, nn.ModuleDict]]:
    """What each process of a run needs: the setting, and the φ that are loaded. It has one thread,
    so that the bits depend on no number of cores or processes."""
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    setting = prepare(config, number)
    return load_phis(config.load, setting) if config.load else (setting, {})


def work(config: Config, out: Path, number: int, progress: Progress) -> None:
    """One of several processes of a run."""
    setting, phis = ready(config, number)
    experiment = Experiment(setting, out, progress, phis)
    compute_all(experiment.pieces(), experiment.parts, progress)


if __name__ == "__main__":
    cli.run_as_script("run.py", main, "stopped; --resume continues")
