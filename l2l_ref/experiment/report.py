"""What a run leaves: config.json, metrics.csv, summary.json, curves.png, and the printed table."""

import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

from l2l_ref.experiment.config import Config
from l2l_ref.experiment.figure import draw_curves, draw_meta_training, marks
from l2l_ref.experiment.protocol import KEY, Results
from l2l_ref.experiment.setting import Setting
from l2l_ref.experiment.summary import METRICS, differences, summarise, verdicts
from l2l_ref.files import replace_with, write_json

SHOWN = ("attacked_loss", "pgd_loss", "accuracy", "pgd_accuracy", "seconds")  # the rest is in JSON


def cell(row: dict[str, Any], name: str) -> str:
    """`mean ± std`, accuracies in %, seconds without ±; "–" where there is none."""
    value, scale = row.get(name), 1
    if value is None:
        return "–"
    if value["mean"] is None:
        return "not finite"
    digits = 3 if value["mean"] < 10 else 2
    if name.endswith("accuracy"):
        scale, digits = 100, 1
    if name == "seconds":
        return f"{value['mean']:.3f}"[:5].rstrip(".")
    text = f"{scale * value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {scale * value['std']:.{digits}f}"


def table(summary: list[dict[str, Any]], config: Config, title: str, footer: str) -> str:
    """The comparison as a Markdown table of at most 100 columns, the lowest loss first; what ended
    badly is named below it."""
    names = [name for name in SHOWN if any(name in row for row in summary)]
    if "pgd_loss" in names:
        names.remove("attacked_loss")
    attack = config.eval_attack.partition(":")[2] or f"PGD-{config.eval_steps}"
    labels = [METRICS[name].format(attack=attack) for name in names]
    several = len({row["eps"] for row in summary}) > 1
    head = ["ε"] * several + ["method", "trains on", *labels]

    def order(row: dict[str, Any]) -> tuple[float, float]:
        loss = row.get(names[0], {"mean": None})["mean"] if names else None
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
             f"data: {setting.source}"]  # fmt: skip
    if setting.origin:
        words.append(f"φ from {setting.origin}")
    return " · ".join(words + ["quick miniature"] * config.quick)


def footnote(config: Config, environment: dict[str, Any], command: str) -> str:
    """Seeds, hardware, versions and command, for the foot of a table or figure."""
    e = environment
    commit = e["git_commit"]
    images = "" if config.dataset == "quadratic" else f" on {config.eval_on} images"
    return (
        f"{config.steps} steps, evaluated{images}; mean ± sample deviation\n"
        f"seeds: {config.seeds}, folds: {config.folds}, φ: {config.meta_seeds} (baselines: no φ)"
        "\n"
        f"{e['device']}, threads: {e['threads']}"
        + f", torch {e['torch']}, backend {e['backend']}"
        + (", continued elsewhere (config.json)" if e.get("continued_in") else "")
        + (f", commit {commit[:9]}{'+' * commit.endswith('+')}" if commit else "")
        + f"\n{command}"
    )


def curves_csv(results: Results, data: str) -> str:
    """One row for each ε, method, fold, φ, seed and step; the last column says what data it was."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*KEY, "step", "clean_loss", "attacked_loss", "data"])
    for run in results.runs:
        key = [run[column] for column in KEY]
        curves = (run.get(name, []) for name in ("steps", "clean", "attacked"))
        for row in zip(*curves, strict=True):
            writer.writerow([*key, *row, data])
    return buffer.getvalue()


def write(
    out: Path, results: Results, setting: Setting, environment: dict[str, Any], command: str
) -> str:
    """Write metrics.csv and summary.json into `out`; returns the table."""
    config = setting.config
    heading, footer = title(setting), footnote(config, environment, command)
    summary = summarise(results)
    text = curves_csv(results, setting.source)
    replace_with(out / "metrics.csv", lambda partial: partial.write_text(text, encoding="utf-8"))
    runs = [{k: v for k, v in run.items() if k not in ("steps", "clean", "attacked")}
            for run in results.runs]  # fmt: skip
    curves = {name: {k: v for k, v in history.items() if k not in ("loss", "norm")}  # by unroll
              for name, history in results.meta_training.items()}  # fmt: skip
    value: dict[str, Any] = {
        "title": heading,
        "data": setting.source,
        "command": command,
        "environment": environment,
        "table": summary,
        "differences": differences(results),
        "tuned": results.chosen,
        "runs": runs,
        "meta_training": curves,
    }
    write_json(out / "summary.json", value)
    learned = verdicts(value["differences"], config.recipe)
    return "\n\n".join([table(summary, config, heading, footer), *filter(None, [learned])])


def draw(
    out: Path, results: Results, setting: Setting, environment: dict[str, Any], command: str
) -> None:
    """Draw meta_training.png, if φ was trained, and curves.png; a figure that fails is one line on
    stderr, and all else is there."""
    words = title(setting), footnote(setting.config, environment, command)
    heading, footer = (text.encode(errors="replace").decode() for text in words)  # bytes of paths
    rows, path = summarise(results), out / "curves.png"
    try:
        if results.meta_training:
            draw_meta_training(out / "meta_training.png", results.meta_training, heading, footer)
        draw_curves(path, results.runs, rows, setting.config, heading, footer)
    except Exception as error:  # fonts, a broken matplotlib: nothing that the run can help
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(f"{path} could not be drawn ({why}): --resume tries again", file=sys.stderr)
