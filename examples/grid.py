"""The grid searches of sections 3 and 4.1: p of Eq. 5 at two ε, and the rate on φ.

python -m examples.grid [DATA_DIR] [OPTIONS OF run.py]

Of each setting L2L alone is computed, into runs/grid. It resumes, and several processes share it.
MNIST under FGSM, the paper's recipe, validation images.
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import run
from l2l_ref.experiment import cli, queue
from l2l_ref.experiment.config import Config
from l2l_ref.experiment.phis import UNDER_ATTACK
from l2l_ref.experiment.protocol import Experiment

PS = 5, 10, 20
GRID = [*product((0.05, 0.1), PS, [3e-3]), *product([0.05], PS, [1e-3])]  # ε, p, rate on φ
COMMAND = (
    "--eval-on validation --meta-seeds 2 --seeds 3 --episodes 140 --eps {} --p {} --meta-lr {}"
)


def main(data_dir: str = "data", *options: str, root: Path = Path("runs/grid")) -> dict:
    """Compute what is missing and print the table; returns the runs of each setting."""

    def config(*point: float) -> Config:
        return cli.parse([*COMMAND.format(*point).split(), "--data-dir", data_dir, *options])

    (setting, _), found = run.ready(config(*GRID[0])), {}
    for eps, p, rate in GRID:
        own = replace(setting, config=config(eps, p, rate))
        experiment = Experiment(own, root / f"eps{eps}-p{p}-lr{rate}")
        runs = [piece for key, piece in experiment.runs() if key["method"] == "L2L"]
        phis = [piece for piece in experiment.pieces() if piece.name.startswith(UNDER_ATTACK)]
        queue.compute_all([*phis, *runs], experiment.parts, print)
        found[eps, p, rate] = [experiment.parts[piece.name] for piece in runs]
    print("| ε | p | rate on φ | loss, PGD-7 | by φ | PGD-20 % |\n|---|---|---|---|---|---|")
    for (eps, p, rate), ends in found.items():
        losses, accuracies = ([end[name] for end in ends] for name in ("pgd_loss", "pgd_accuracy"))
        count = setting.config.meta_seeds
        by_phi = ", ".join(f"{fmean(losses[k::count]):.2f}" for k in range(count))
        print(f"| {eps} | {p} | {rate} | {fmean(losses):.2f} ± {stdev(losses):.2f} | {by_phi} "
              f"| {100 * fmean(accuracies):.1f} ± {100 * stdev(accuracies):.1f} |")  # fmt: skip
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
