"""Models of a finished run, trained once more and evaluated under a stronger attack.

python -m bench.reevaluate runs/mnist-fgsm-robust "L2L-Transfer (clean)" "Adam + L1"
python -m bench.reevaluate runs/mnist-fgsm-robust "Adam + L1" \
    --attack examples.another_attack:auto_attack

Takes φ and tuned settings as the run left them, so the losses should come out as they did there:
their largest difference is printed. Writes reevaluation.json into the run's folder.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.measure import count, origin
from l2l_ref.errors import InputError
from l2l_ref.experiment import folder, report
from l2l_ref.experiment.cli import Parser, run_as_script
from l2l_ref.experiment.config import Config
from l2l_ref.experiment.protocol import Experiment
from l2l_ref.files import read_json, write_json
from run import ready


def parser(prog: str, doc: str) -> Parser:
    """Of what looks at the models of a finished run once more."""
    top = Parser(prog=prog, description=doc.splitlines()[0], allow_abbrev=False)
    top.add_argument("folder", type=Path, help="of a finished run")
    top.add_argument("methods", nargs="+", metavar="METHOD", help="rows of its table")
    top.add_argument("--samples", type=count, default=500, metavar="N", help="images (500)")
    top.add_argument("--data-dir", metavar="DIR", help="where the data is (as in the run)")
    return top


def settings_of(options: Any, **changes: Any) -> Config:
    """Those of the run's config.json, but for the attack that evaluates."""
    try:
        config = Config(**read_json(options.folder / "config.json", folder.AFRESH)["settings"])
    except (OSError, KeyError, TypeError):
        raise InputError(
            f"{options.folder} holds no run of this version: name the folder of one"
        ) from None
    if config.dataset == "quadratic":
        raise InputError(f"{options.folder} is of quadratics, which have no pixels to attack")
    directory = options.data_dir or config.data_dir
    changes |= {"eval_samples": options.samples, "data_dir": directory}
    return replace(config, **changes, record_every=config.steps)


def experiment_of(options: Any, **changes: Any) -> Experiment:
    """The run with all its pieces there."""
    setting, phis = ready(settings_of(options, **changes))
    experiment = Experiment(setting, options.folder, phis)
    labels = dict.fromkeys(key["method"] for key, _ in experiment.runs())
    for label in options.methods:
        if label not in labels:
            raise InputError(f"that run has no {label!r}: choose one of {', '.join(labels)}")
    if {piece.name for piece in experiment.pieces()} - set(experiment.parts):
        raise InputError(f"{options.folder} is not finished: --resume that run first")
    return experiment


def main(arguments: list[str]) -> None:
    """Parse, train, evaluate, print, write."""
    top = parser("reevaluate.py", __doc__)
    top.add_argument("--attack", default="pgd", metavar="NAME", help="pgd, or MODULE:FUNCTION")
    top.add_argument("--steps", type=count, default=50, metavar="N", help="of PGD (50)")
    top.add_argument("--restarts", type=count, default=10, metavar="N", help="on each loss (10)")
    options = top.parse_args(arguments)
    stronger = {"eval_attack": options.attack, "eval_steps": options.steps}
    experiment = experiment_of(options, **stronger, restarts=options.restarts)
    setting, parts = experiment.setting, experiment.parts
    runs, worst = [], 0.0
    for key, piece in experiment.runs():
        if key["method"] in options.methods:
            run = piece.compute(parts)
            worst = max(worst, abs(run["pgd_loss"] - parts[piece.name]["pgd_loss"]))
            runs.append({**key, **run})
    found = origin("reevaluate", arguments, setting.device, setting.config.backend, setting.data)
    rows = report.summarise(runs)
    footer = f"losses differ from the run's by at most {worst:.3g}\n{found['command']}"
    print("\n" + report.table(rows, setting.config, report.title(setting), footer))
    found |= {"table": rows, "differences": report.differences(runs), "loss_difference": worst}
    write_json(options.folder / "reevaluation.json", found)
    print(f"\n{options.folder}: reevaluation.json")


if __name__ == "__main__":
    run_as_script("reevaluate.py", main)
