#!/usr/bin/env python
"""Meta-train an optimizer under attack, transfer it to new models on clean data, judge those.

python run.py --dataset cifar10 --attack pgd --eps 0.03
torchrun --nproc-per-node 2 run.py --dataset cifar10 --attack pgd --eps 0.03
"""

import os
import shlex
from contextlib import nullcontext
from pathlib import Path

import torch

from l2l_ref.backend import resolve
from l2l_ref.experiment import cli, folder, machine, report
from l2l_ref.experiment.phis import load_phis
from l2l_ref.experiment.pieces import compute_all
from l2l_ref.experiment.progress import progress
from l2l_ref.experiment.protocol import Experiment
from l2l_ref.experiment.ranks import Ranks
from l2l_ref.experiment.setting import prepare


def main(arguments: list[str]) -> None:
    """Parse, meta-train, transfer, compare, report; other ranks than 0 lend a hand between."""
    if os.environ.get("RANK", "0") != "0" and {"-h", "--help"} & set(arguments):
        return  # rank 0 shows it, and is gone before they could meet
    ranks = Ranks()
    if ranks.world > 1:
        torch.set_num_threads(1)
    # A user's mistake ends rank 0 before it names the folder, and torchrun then ends the others.
    named = ranks.hear("folder") if ranks.rank else None
    config = cli.parse(arguments)
    machine.keep_freed_memory()
    if not named:
        config = folder.restarted(config)
        folder.choose(config)  # what is wrong with it is said before the data are read
    setting = prepare(config, ranks.rank)
    phis = {}
    if config.load:
        setting, phis = load_phis(config.load, setting)
    with nullcontext(Path(named)) if named else folder.claimed(config) as out:
        folder.must_match(setting.config, setting.data, out)  # with rank 0's, on the others
        experiment = Experiment(setting, out, progress(ranks.world == 1), phis)
        if ranks.rank:
            compute_all(experiment.pieces(), experiment.parts, ranks, experiment.progress.say)
        else:
            conduct(experiment, ranks, arguments)
    ranks.leave()


def conduct(experiment: Experiment, ranks: Ranks, arguments: list[str]) -> None:
    """What rank 0 does: begin, compute, report."""
    setting, out, parts = experiment.setting, experiment.out, experiment.parts
    parts.check(experiment.pieces())
    backend = resolve(setting.config.backend, setting.device)
    environment = machine.environment(setting.device, backend, setting.data, ranks.world)
    print(report.title(setting))
    print(f"{environment['device']}, backend {backend}, results in {out}", flush=True)
    launcher = ["torchrun", "--nproc-per-node", str(ranks.world)] if ranks.world > 1 else ["python"]
    command = shlex.join([*launcher, "run.py", *(a for a in arguments if a != "--resume")])
    environment = folder.write_config(out, setting.config, environment, command)
    ranks.tell("folder", str(out))
    compute_all(experiment.pieces(), parts, ranks, experiment.progress.say)
    left = experiment.results(), setting, environment, command
    print("\n" + report.write(out, *left), flush=True)
    report.draw(out, *left)
    names = sorted(path.name for path in out.iterdir() if path.name != folder.LOCK)
    print(f"\n{out}: " + ", ".join(names))


if __name__ == "__main__":
    cli.run_as_script("run.py", main, "stopped; --resume continues")
