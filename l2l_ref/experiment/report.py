"""What a run says and leaves: means, paired differences, verdicts, the table; its files."""

import csv
import math
import statistics
import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any

from l2l_ref.experiment.config import Config
from l2l_ref.experiment.figure import Rows, draw_curves, draw_meta_training, marks
from l2l_ref.experiment.phis import LEARNED_RATE
from l2l_ref.experiment.protocol import KEY, Experiment
from l2l_ref.experiment.setting import PGD_STEPS, Setting
from l2l_ref.files import replace_with, write_json

METRICS = ("attacked_loss", "pgd_loss", "fgsm_loss", "accuracy", "fgsm_accuracy", "pgd_accuracy",
           "ms_per_step", "seconds")  # fmt: skip
SHOWN = {  # in the table; of these differences are given, too
    "attacked_loss": "loss",  # the last of the curve, where there is no other
    "pgd_loss": f"loss, PGD-{PGD_STEPS}",
    "accuracy": "clean %",
    "pgd_accuracy": "{attack} %",
    "seconds": "s",
}
# What φ is compared with: the paper's claim first, then what its row would be without φ, and the
# strongest baseline that trains on the same.
CONTROLS: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": {
        "L2L-Transfer (clean)": ("Adam",),
        "L2L": (LEARNED_RATE, "Adam (attacked)"),
        "L2L + L1": ("Adam (attacked) + L1",),
    },
    "robust": {"L2L-Transfer (clean)": ("Adam", LEARNED_RATE, "Adam + L1")},
    "penalty": {LEARNED_RATE: ("Adam", "Adam + penalty + L1")},
}
# The 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom; of more, that of 10 is taken.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def summarise(runs: Rows) -> Rows:
    """One row for each ε and method: mean and sample deviation over folds, φ and seeds.

    A metric that is not finite in some run has mean and deviation None: no run is left out.
    """
    rows: dict[tuple[float, str], Rows] = {}
    for run in runs:
        rows.setdefault((run["eps"], run["method"]), []).append(run)
    summary = []
    for (eps, method), own in rows.items():
        row: dict[str, Any] = {"eps": eps, "method": method, "runs": len(own)}
        row["trains_on"] = own[0]["trains_on"]
        phis = sorted({run["phi"] for run in own} - {None})
        for name in [name for name in METRICS if name in own[0]]:
            row[name] = spread([run[name] for run in own])
            if len(phis) > 1:
                by_phi = [[run[name] for run in own if run["phi"] == phi] for phi in phis]
                row[name]["by_phi"] = [spread(values)["mean"] for values in by_phi]
        for end in ("collapsed", "diverged"):
            row[end] = sum(run["end"] == end for run in own)
        summary.append(row)
    return summary


def spread(values: list[Any]) -> dict[str, float | None]:
    """Mean and sample deviation; None where a value is not finite."""
    finite = all(map(math.isfinite, values))
    return {
        "mean": statistics.fmean(values) if finite else None,
        "std": statistics.stdev(values) if finite and len(values) > 1 else None,
    }


def differences(runs: Rows) -> Rows:
    """Each method that a φ trains, less each other one: {"mean", "half_width"} of `SHOWN`.

    Runs of a seed share θ₀ and batches, so they are compared in pairs, after averaging over φ; the
    interval is that of Student's t at 95 % over seeds and folds. Fewer than three have none.
    """
    seeds: dict[tuple[float, str], dict[tuple[int, int], Rows]] = {}
    for run in runs:
        own = seeds.setdefault((run["eps"], run["method"]), {})
        own.setdefault((run["fold"], run["seed"]), []).append(run)
    rows = []
    for ((eps, method), own), ((eps_too, other), theirs) in permutations(seeds.items(), 2):
        (first, *_), *_ = own.values()
        if eps_too != eps or first["phi"] is None:
            continue
        row: dict[str, Any] = {"eps": eps, "method": method, "less": other}
        for name in [name for name in SHOWN if name in first]:
            gaps = [mean(own[key], name) - mean(theirs[key], name) for key in sorted(own)]
            row[name] = interval(gaps)
        rows.append(row)
    return rows


def verdicts(rows: Rows, recipe: str) -> str:
    """The loss of φ minus that of `CONTROLS`, of `differences`; a line for each ε and row of φ."""
    lines = []
    for eps, own in product(dict.fromkeys(row["eps"] for row in rows), CONTROLS[recipe]):
        texts = [f"{row['less']} {signed(row.get('pgd_loss') or row['attacked_loss'])}"
                 for row in rows if (row["eps"], row["method"]) == (eps, own)
                 and row["less"] in CONTROLS[recipe][own]]  # fmt: skip
        if texts:
            line = f"ε {eps:g}: loss of {own} minus that of " + ", ".join(texts)
            lines.append(line + " (95 % over seeds, after the mean over φ)" * ("±" in line))
    return "\n".join(lines)


def signed(value: dict[str, float | None]) -> str:
    """`+0.123 ± 0.045`."""
    if value["mean"] is None:
        return "not finite"
    half = value["half_width"]
    return f"{value['mean']:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def mean(runs: Rows, name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean, and half the width of the 95 % interval of Student's t; None as in `spread`, and of
    fewer than three values."""
    of, half = spread(values), None
    if of["std"] is not None and len(values) > 2:
        quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
        half = quantile * of["std"] / math.sqrt(len(values))
    return {"mean": of["mean"], "half_width": half}


def cell(row: dict[str, Any], name: str) -> str:
    """`mean ± std`, accuracies in %, seconds without ±."""
    value, scale = row[name], 1
    if value["mean"] is None:
        return "not finite"
    digits = 3 if value["mean"] < 10 else 2
    if name.endswith("accuracy"):
        scale, digits = 100, 1
    if name == "seconds":
        return f"{value['mean']:.3f}"[:5].rstrip(".")
    text = f"{scale * value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {scale * value['std']:.{digits}f}"


def table(summary: Rows, config: Config, title: str, footer: str) -> str:
    """The comparison as a Markdown table of at most 100 columns, the lowest loss first; what ended
    badly is named below it."""
    names = [name for name in SHOWN if name in summary[0]]
    if "pgd_loss" in names:
        names.remove("attacked_loss")
    attack = config.eval_attack.partition(":")[2] or f"PGD-{config.eval_steps}"
    labels = [SHOWN[name].format(attack=attack) for name in names]
    several = len({row["eps"] for row in summary}) > 1
    head = ["ε"] * several + ["method", "trains on", *labels]

    def order(row: dict[str, Any]) -> tuple[float, float]:
        loss = row[names[0]]["mean"]
        return row["eps"], math.inf if loss is None else loss

    rows = sorted(summary, key=order)
    body = [
        [f"{row['eps']:g}"] * several
        + [row["method"], row["trains_on"], *(cell(row, name) for name in names)]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    named = [(row["method"] + f", ε {row['eps']:g}" * several, marks(row)) for row in rows]
    notes = [f"{name}: {words}" for name, words in named if words]
    return "\n".join([title, "", line(head), rule, *map(line, body), "", *notes, footer])


def title(setting: Setting) -> str:
    """What a table or figure shows; always says what the data were."""
    config = setting.config
    attacks = {"fgsm": "FGSM", "pgd": f"PGD-{config.attack_steps}", "none": "no attack"}
    words = [config.dataset.upper() if config.dataset != "quadratic" else "Quadratics",
             config.optimizee, attacks.get(config.attack, config.attack), f"recipe {config.recipe}",
             f"data: {setting.data['data']}"]  # fmt: skip
    if "phi" in setting.data:
        words.append(f"φ from {setting.data['phi']}")
    return " · ".join(words + ["quick miniature"] * config.quick)


def footnotes(config: Config, environment: dict[str, Any], command: str) -> tuple[str, str]:
    """What a comparison is of, and where all figures come from: seeds, hardware, command."""
    e, commit = environment, environment["git_commit"]
    images = "" if config.dataset == "quadratic" else f" on {config.eval_on} images"
    return f"{config.steps} steps, evaluated{images}; mean ± sample deviation\n", (
        f"seeds: {config.seeds}, folds: {config.folds}, φ: {config.meta_seeds} (baselines: no φ)\n"
        f"{e['device']}, threads: {e['threads']}, torch {e['torch']}, backend {e['backend']}"
        + (", continued elsewhere (config.json)" if e.get("continued_in") else "")
        + (f", commit {commit[:9]}{'+' * commit.endswith('+')}" if commit else "")
        + f"\n{command}"
    )


def write_curves(path: Path, runs: Rows, data: str) -> None:
    """One row for each ε, method, fold, φ, seed and step; the last column says what data it was."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, "step", "clean_loss", "attacked_loss", "data"])
        for run in runs:
            key = [run[column] for column in KEY]
            for row in zip(run["steps"], run["clean"], run["attacked"], strict=True):
                writer.writerow([*key, *row, data])


def write(experiment: Experiment, environment: dict[str, Any], command: str) -> str:
    """Write what it has found into its folder, and draw it; returns the table. A figure that fails
    is one line on stderr, and all else is there."""
    runs, chosen, histories = experiment.results()
    out, setting, config = experiment.out, experiment.setting, experiment.setting.config
    heading, (of_table, foot) = title(setting), footnotes(config, environment, command)
    summary, source = summarise(runs), setting.data["data"]
    replace_with(out / "metrics.csv", lambda partial: write_curves(partial, runs, source))
    value: dict[str, Any] = {
        "title": heading,
        "data": source,
        "command": command,
        "environment": environment,
        "table": summary,
        "differences": differences(runs),
        "tuned": chosen,
        "runs": [short(run) for run in runs],
        "meta_training": {name: short(history) for name, history in histories.items()},
    }
    write_json(out / "summary.json", value)
    try:
        if histories:
            draw_meta_training(out / "meta_training.png", histories, heading, foot)
        draw_curves(out / "curves.png", runs, summary, config, heading, of_table + foot)
    except Exception as error:  # fonts, a broken matplotlib: nothing that the run can help
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(f"{out}: a figure could not be drawn ({why}): --resume tries again", file=sys.stderr)
    verdict = verdicts(value["differences"], config.recipe)
    return table(summary, config, heading, of_table + foot) + f"\n\n{verdict}" * bool(verdict)


def short(value: dict[str, Any]) -> dict[str, Any]:
    """Without what has an entry for each step or unroll."""
    long = "steps", "clean", "attacked", "loss", "norm"
    return {key: one for key, one in value.items() if key not in long}
