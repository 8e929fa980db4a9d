#!/usr/bin/env python
"""Meta-train an optimizer under attack, transfer it to new models on clean data, judge those.

python run.py --dataset cifar10 --attack pgd --eps 0.03
torchrun --nproc-per-node 2 run.py --dataset cifar10 --attack pgd --eps 0.03
"""

import shlex
from pathlib import Path

import torch

from l2l_ref import cli, engine, report
from l2l_ref.config import must_match
from l2l_ref.experiment import Experiment, load_phis
from l2l_ref.heap import keep_freed_memory
from l2l_ref.pieces import Ranks, compute_all
from l2l_ref.task import prepare


def main(arguments: list[str]) -> None:
    """Parse, meta-train, transfer, compare, report; other ranks than 0 lend a hand between."""
    ranks = Ranks()
    if ranks.world > 1:
        torch.set_num_threads(1)
    if ranks.rank and {"-h", "--help"} & set(arguments):
        return
    # A user's mistake ends rank 0 before it names the folder, and torchrun then ends the others.
    folder = ranks.hear("folder") if ranks.rank else None
    config = cli.parse(arguments)
    keep_freed_memory()
    out = Path(folder) if folder else cli.new_folder(config)
    task = prepare(config, ranks.rank)
    backend = engine.resolve(config.backend, task.device)
    phis = {}
    if config.load:
        task, phis = load_phis(Path(config.load), task)
    must_match(task.config, (task.source, task.checksum), out)  # with rank 0's, on the others
    experiment = Experiment(task, out, report.reporter(ranks.world == 1), phis)
    if ranks.rank:
        compute_all(experiment.pieces(), experiment.parts, ranks, experiment.reporter.say)
        return

    cli.make_folder(out)
    environment = report.environment(task, backend, ranks.world)
    print(report.title(task))
    print(f"{environment['device']}, backend {backend}, results in {out}", flush=True)
    launcher = ["torchrun", "--nproc-per-node", str(ranks.world)] if ranks.world > 1 else ["python"]
    command = shlex.join([*launcher, "run.py", *(a for a in arguments if a != "--resume")])
    environment = report.write_config(out, task.config, environment, command)
    ranks.tell("folder", str(out))
    compute_all(experiment.pieces(), experiment.parts, ranks, experiment.reporter.say)
    print("\n" + report.report(out, experiment.results(), task, environment, command))
    print(f"\n{out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


if __name__ == "__main__":
    cli.run_as_script("run.py", main, "stopped; --resume continues")
