"""The page that a reviewer asks for, of a model that a finished run trained (`l2l_ref.review`).

python -m bench.review runs/mnist-fgsm-robust "L2L-Transfer (clean)" "Adam + L1"

Trains the first model of each method once more, and one with Adam from another seed, whose images
are tried on it. Writes review-METHOD.json and .png into the run's folder.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench import reevaluate
from bench.measure import origin
from l2l_ref.experiment import report, tuning
from l2l_ref.experiment.cli import run_as_script
from l2l_ref.experiment.figure import finish
from l2l_ref.experiment.protocol import transfer_trial
from l2l_ref.experiment.queue import named
from l2l_ref.experiment.setting import Trial
from l2l_ref.files import write_json
from l2l_ref.review import Review, review
from l2l_ref.transfer import Method


def main(arguments: list[str]) -> None:
    """Parse, train, review, draw, write."""
    options = reevaluate.parser("review.py", __doc__).parse_args(arguments)
    experiment = reevaluate.experiment_of(options)
    setting, fold, eps = experiment.setting, experiment.folds[0], experiment.setting.config.eps[0]
    about = origin("review", arguments, setting.device, setting.config.backend, setting.data)
    adam = Method("surrogate", partial(tuning.adam, lr=1e-3))
    surrogate, *_ = Trial(setting, ("surrogate",)).train(adam, fold, eps)
    images = fold.test.first(options.samples)
    # A label stands there once for each φ: the last one read is the first.
    first = {row.label: row for row in reversed(experiment.tables[0])}
    for label in dict.fromkeys(options.methods):
        trial = transfer_trial(setting, fold, seed=0)
        model, *_ = trial.train(first[label].method(experiment.parts), fold, eps)
        found = review(
            model, images, eps=eps, surrogate=surrogate, generator=trial.stream("review")
        )
        name = named("review", label).lower()
        draw(options.folder / f"{name}.png", found, f"{report.title(setting)} · {label}",
             about["command"])  # fmt: skip
        write_json(options.folder / f"{name}.json", {**about, "method": label, **asdict(found)})
        attacks = ", ".join(f"{name} {value:.3f}" for name, value in found.by_attack.items())
        print(f"{label}: {attacks}\nalarms: {'; '.join(found.alarms) or 'none'}")


def draw(path: Path, found: Review, title: str, footer: str = "") -> None:
    """The page of figures, a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    over_eps, over_steps, over_restarts, bars = figure.subplots(2, 2).ravel()
    curves = found.by_eps, found.by_steps, found.by_restarts
    for panel, curve in zip((over_eps, over_steps, over_restarts), curves, strict=True):
        panel.plot(list(curve), list(curve.values()), "o-")
        panel.grid(alpha=0.3)
    over_eps.axvline(found.eps, color="0.6", lw=0.8)
    over_eps.set(xlabel="ε", ylabel="accuracy under PGD", ylim=(0, 1))
    over_eps.set_xscale("symlog", linthresh=found.eps)
    over_eps.set_xlim(0, 1)
    over_steps.set(xlabel="steps of PGD", ylabel="loss", xscale="log")
    over_restarts.set(xlabel="restarts of PGD", ylabel="accuracy", ylim=(0, 1))
    names = list(found.by_attack)[::-1]
    boxes = bars.barh(names, [found.by_attack[name] for name in names], color="#0072B2")
    bars.bar_label(boxes, fmt="%.3f", padding=2)
    bars.set(xlabel="accuracy", xlim=(0, 1.1))
    verdict = "; ".join(found.alarms) or "none"
    figure.suptitle(f"{title}\nε = {found.eps:.3g}, {found.samples} images. Alarms: {verdict}")
    finish(figure, path, footer)


if __name__ == "__main__":
    run_as_script("review.py", main)
