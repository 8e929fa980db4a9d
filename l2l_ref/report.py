"""What a run leaves: config.json, metrics.csv, summary.json, curves.png, and the printed table."""

import csv
import io
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from l2l_ref import engine
from l2l_ref.config import Config
from l2l_ref.experiment import PGD_STEPS, Results
from l2l_ref.figure import draw_curves, marks
from l2l_ref.files import replace_with
from l2l_ref.pieces import duration
from l2l_ref.task import PGD_STEPS as LOSS_STEPS
from l2l_ref.task import Reporter, Task

METRICS = {
    "attacked_loss": "loss",  # the last of the curve, where there is no other
    "pgd_loss": f"loss, PGD-{LOSS_STEPS}",
    "fgsm_loss": "loss, FGSM",
    "accuracy": "clean acc.",
    "fgsm_accuracy": "FGSM acc.",
    "pgd_accuracy": f"PGD-{PGD_STEPS} acc.",
    "ms_per_step": "ms/step",
}
# Of each recipe the row that says whether φ has learned, and those that it must be below: what it
# would be without φ, and the best opponent that reads the same.
CONTROLS = {
    "paper": ("L2L", ("Nominal alone", "Adam (attacked) + L1")),
    "robust": ("L2L-Transfer (clean)", ("Nominal alone", "Adam + L1")),
    "penalty": ("L2L-Transfer (clean)", ("Nominal alone", "Adam + penalty + L1")),
}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 1 to 10
PAIRED = ("attacked_loss", "pgd_loss", "accuracy", "pgd_accuracy")  # of which differences are given


def reporter(bars: bool = True) -> Reporter:
    """Progress bars with loss and time left on a terminal, if they may, plain lines elsewhere."""
    if bars and sys.stderr.isatty():
        from tqdm import tqdm

        def bar(total: int, label: str) -> Callable[[int, float], None]:
            shown = tqdm(total=total, desc=label)

            def update(done: int, loss: float) -> None:
                if shown.n == 0:  # what an earlier run has done took no time now
                    shown.initial = shown.n = done - 1
                shown.update(done - shown.n)
                shown.set_postfix(loss=f"{loss:.3f}")
                if done == total:
                    shown.close()

            return update

        return Reporter(tqdm.write, bar)

    def lines(total: int, label: str) -> Callable[[int, float], None]:
        begin, before, shown = time.monotonic(), None, -1

        def update(done: int, loss: float) -> None:
            nonlocal before, shown
            before = done - 1 if before is None else before  # done by an earlier run, in no time
            tenth = 10 * done // total
            if tenth > shown:
                shown = tenth
                left = (time.monotonic() - begin) / (done - before) * (total - done)
                print(
                    f"{label}: {done}/{total}, loss {loss:.3f}, {duration(left)} left", flush=True
                )

        return update

    return Reporter(lambda line: print(line, flush=True), lines)


def environment(task: Task, backend: str, processes: int = 1) -> dict[str, Any]:
    """Versions, hardware and code that a result depends on."""
    device = task.device
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: package_version(name) for name in ("torchvision", "numpy")},
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "backend": backend,
        "engine": engine.build_info() if backend == "fused" else None,
        "git_commit": git_commit(),
        "data": task.source,
        "data_sha256": task.checksum,
    }


def package_version(name: str) -> str | None:
    """The version of an installed package, which is not imported for that."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this checkout, with "+" behind it if files differ; None outside git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        run = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def summarise(results: Results) -> list[dict[str, Any]]:
    """One row for each ε and method: mean and sample deviation over folds, φ and seeds.

    A metric that is not finite in some run has mean and deviation None: no run is left out. Runs of
    a φ that was given up are counted, as "skipped".
    """
    rows: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in results.runs:
        rows.setdefault((run["eps"], run["method"]), []).append(run)
    summary = []
    for (eps, method), every in rows.items():
        runs = [run for run in every if "skipped" not in run]
        row: dict[str, Any] = {"eps": eps, "method": method, "runs": len(every)}
        for name in METRICS:
            values = [run.get(name) for run in runs]
            if values and values[0] is not None:
                row[name] = spread(values)
                phis = sorted({run["phi"] for run in runs} - {None})
                if len(phis) > 1:
                    row[name]["by_phi"] = [
                        spread([run[name] for run in runs if run["phi"] == phi])["mean"]
                        for phi in phis
                    ]
        for end in ("collapsed", "diverged"):
            row[end] = sum(run["end"] == end for run in runs)
        row["skipped"] = len(every) - len(runs)
        summary.append(row)
    return summary


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and sample deviation; None where a value is not finite."""
    finite = all(map(math.isfinite, values))
    return {
        "mean": statistics.fmean(values) if finite else None,
        "std": statistics.stdev(values) if finite and len(values) > 1 else None,
    }


def differences(results: Results) -> list[dict[str, Any]]:
    """Each method that a φ trains, less each other one: {"mean", "half_width"} of `PAIRED`.

    Runs of a seed share θ₀ and batches, so they are compared in pairs, after averaging over φ; the
    interval is that of Student's t at 95 % over seeds and folds. One pair has none.
    """
    seeds: dict[tuple[float, str], dict[tuple[int, int], list[dict[str, Any]]]] = {}
    for run in results.runs:
        if "skipped" not in run:
            own = seeds.setdefault((run["eps"], run["method"]), {})
            own.setdefault((run["fold"], run["seed"]), []).append(run)
    rows = []
    for (eps, method), own in seeds.items():
        if all(run["phi"] is None for runs in own.values() for run in runs):
            continue
        for (eps_too, other), theirs in seeds.items():
            if eps_too != eps or other == method:
                continue
            row: dict[str, Any] = {"eps": eps, "method": method, "less": other}
            for name in PAIRED:
                pairs = [(mean(own[key], name), mean(theirs[key], name))
                         for key in sorted(own.keys() & theirs.keys())]  # fmt: skip
                if pairs and None not in pairs[0]:
                    row[name] = interval([a - b for a, b in pairs])
            rows.append(row)
    return rows


def verdicts(results: Results, rows: list[dict[str, Any]], recipe: str) -> str:
    """Whether φ has learned: its loss less that of `CONTROLS`; a line for each ε."""
    own, controls = CONTROLS[recipe]
    lines = []
    for eps in dict.fromkeys(row["eps"] for row in rows):
        texts = []
        for row in rows:
            if (row["eps"], row["method"]) == (eps, own) and row["less"] in controls:
                loss = row.get("pgd_loss", row.get("attacked_loss"))
                texts.append(f"{row['less']} {signed(loss)}")
        every = {(run["phi"], "skipped" in run) for run in results.runs
                 if (run["eps"], run["method"]) == (eps, own)}  # fmt: skip
        given_up = sum(skipped for _, skipped in every)
        note = f"; {given_up} of {len(every)} φ given up" if given_up else ""
        if texts:
            lines.append(f"ε {eps:g}: loss of {own} less that of " + ", ".join(texts)
                         + f" (95 % over seeds, after the mean over φ{note})")  # fmt: skip
    return "\n".join(lines)


def signed(value: dict[str, float | None] | None) -> str:
    """`+0.123 ± 0.045`."""
    if value is None or value["mean"] is None:
        return "not finite"
    half = value["half_width"]
    return f"{value['mean']:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def mean(runs: list[dict[str, Any]], name: str) -> float | None:
    values = [run.get(name) for run in runs]
    return None if None in values else statistics.fmean(values)


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean, and half the width of the 95 % interval of Student's t; None as in `spread`."""
    half = None
    if not all(map(math.isfinite, values)):
        return {"mean": None, "half_width": None}
    if len(values) > 1:
        quantile = student(len(values) - 1)
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "half_width": half}


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; from 11 on by Fisher's expansion, to three decimals."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def cell(value: dict[str, float | None] | None, digits: int) -> str:
    """`mean ± std`; "–" where there is none."""
    if value is None:
        return "–"
    if value["mean"] is None:
        return "not finite"
    text = f"{value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std']:.{digits}f}"


def table(summary: list[dict[str, Any]], title: str, footer: str) -> str:
    """The comparison as a Markdown table, for each metric `cell`."""
    names = [name for name in METRICS if any(name in row for row in summary)]
    if "pgd_loss" in names:
        names.remove("attacked_loss")
    head = ["ε", "method", *(METRICS[name] for name in names), "runs", ""]
    body = [
        [f"{row['eps']:g}", row["method"],
         *(cell(row.get(name), 2 if name == "ms_per_step" else 3) for name in names),
         str(row["runs"]), marks(row)]
        for row in summary
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([title, "", line(head), rule, *map(line, body), "", footer])


def title(task: Task) -> str:
    """What a table or figure shows; always says what the data were."""
    config = task.config
    attack = {"fgsm": "FGSM", "pgd": f"PGD-{config.attack_steps}", "none": "no attack"}
    recipe = f"recipe {config.recipe}" + f", {config.tasks} tasks" * (config.tasks > 1)
    words = [config.dataset.upper() if config.dataset != "quadratic" else "Quadratics",
             config.optimizee, attack[config.attack], recipe, f"data: {task.source}"]  # fmt: skip
    if task.origin:
        words.append(f"φ from {task.origin}")
    return " · ".join(words + ["quick miniature"] * config.quick)


def footnote(config: Config, environment: dict[str, Any], command: str) -> str:
    """Seeds, hardware, versions and command, for the foot of a table or figure."""
    e = environment
    commit = e["git_commit"]
    loss = f"on {config.judge} images" + (" under attack" if config.attack != "none" else "")
    if config.dataset == "quadratic":
        loss = "of the function it minimises"
    return (
        f"loss: after {config.steps} steps, {loss}; mean ± sample deviation\n"
        f"seeds: {config.seeds}, folds: {config.folds}, φ: {config.meta_seeds} (baselines: no φ)"
        "\n"
        f"{e['device']}, threads: {e['threads']}"
        + (f" in each of {e['processes']} processes" if e.get("processes", 1) > 1 else "")
        + f", torch {e['torch']}, backend {e['backend']}"
        + (", continued elsewhere (config.json)" if e.get("continued_in") else "")
        + (f", commit {commit[:9]}{'+' * commit.endswith('+')}" if commit else "")
        + f"\n{command}"
    )


def curves_csv(results: Results, data: str) -> str:
    """One row for each ε, method, fold, φ, seed and step; the last column says what data it was."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = ["eps", "method", "fold", "phi", "seed"]
    writer.writerow([*columns, "step", "clean_loss", "attacked_loss", "data"])
    for run in results.runs:
        key = [run[column] for column in columns]
        curves = (run.get(name, []) for name in ("steps", "clean", "attacked"))
        for row in zip(*curves, strict=True):
            writer.writerow([*key, *row, data])
    return buffer.getvalue()


def plain(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """JSON that any reader takes: no NaN, no infinities."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    replace_with(path, lambda partial: partial.write_text(text))


def write_config(
    out: Path, config: Config, environment: dict[str, Any], command: str
) -> dict[str, Any]:
    """config.json: every setting, and all that the results depend on beside them.

    A run that is continued keeps the environment it began in, and lists the others. Returns it.
    """
    path = out / "config.json"
    if path.exists():
        value = json.loads(path.read_text())
        first = value["environment"]
        others = first.setdefault("continued_in", [])
        if environment != {k: v for k, v in first.items() if k != "continued_in"}:
            others.append(environment)
        environment = first
    else:
        value = {"command": command, "settings": asdict(config), "environment": environment}
    write_json(path, value)
    return environment


def report(
    out: Path, results: Results, task: Task, environment: dict[str, Any], command: str
) -> str:
    """Write metrics.csv, summary.json and curves.png into `out`; returns the table."""
    config = task.config
    heading, footer = title(task), footnote(config, environment, command)
    summary = summarise(results)
    text = curves_csv(results, task.source)
    replace_with(out / "metrics.csv", lambda partial: partial.write_text(text))
    runs = [{k: v for k, v in run.items() if k not in ("steps", "clean", "attacked")}
            for run in results.runs]  # fmt: skip
    value = {
        "title": heading,
        "data": task.source,
        "command": command,
        "environment": environment,
        "table": summary,
        "differences": differences(results),
        "tuned": results.chosen,
        "grid": results.grid,
        "runs": runs,
        "meta_training": results.meta_training,
    }
    write_json(out / "summary.json", value)
    draw_curves(out / "curves.png", results.runs, summary, config, heading, footer)
    learned = verdicts(results, value["differences"], config.recipe)
    return "\n\n".join([table(summary, heading, footer), *filter(None, [learned])])
