#!/usr/bin/env python
"""Meta-train an optimizer under attack, transfer it to new models on clean data, judge those.

python run.py --dataset cifar10 --attack pgd --eps 0.03
"""

import shlex
from pathlib import Path

from l2l_ref import cli, engine, experiment, report
from l2l_ref.config import must_match
from l2l_ref.heap import keep_freed_memory
from l2l_ref.task import prepare


def main(arguments: list[str]) -> None:
    """Parse, meta-train, transfer, compare, report."""
    config = cli.parse(arguments)
    keep_freed_memory()
    out = cli.new_folder(config)
    task = prepare(config)
    backend = engine.resolve(config.backend, task.device)
    phis = {}
    if config.load:
        task, phis = experiment.load_phis(Path(config.load), task)
    must_match(task.config, (task.source, task.checksum), out)
    cli.make_folder(out)
    environment = report.environment(task, backend)
    print(report.title(task))
    print(f"{environment['device']}, backend {backend}, results in {out}", flush=True)

    command = shlex.join(["python", "run.py", *(a for a in arguments if a != "--resume")])
    environment = report.write_config(out, task.config, environment, command)
    results = experiment.run(task, out, report.reporter(), phis)
    print("\n" + report.report(out, results, task, environment, command))
    print(f"\n{out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


if __name__ == "__main__":
    cli.run_as_script("run.py", main, "stopped; --resume continues")
