"""Draws what each method of finished runs is worth: clean against robust accuracy, and robust
accuracy against the seconds of a training.

    python tools/frontier.py docs/frontier-mnist.png docs/mnist-fgsm-robust
"""

import json
import sys
from pathlib import Path

# By what a method trains on.
COLOURS = {
    "clean batches": "#0072B2",
    "the input-gradient penalty": "#E69F00",
    "attacked batches": "#CC3311",
}
OF_PHI = "L2L", "Transfer", "Adam, learned rate"


def kind(trains_on: str) -> str:
    clean, penalty, attacked = COLOURS
    return penalty if "penalty" in trains_on else clean if trains_on == "clean" else attacked


def draw(path: Path, folders: list[Path]) -> None:
    """The PNG at `path`; methods are numbered from the most robust to the least."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    rows = [row for run in runs for row in run["table"]]
    rows.sort(key=lambda row: -row["pgd_accuracy"]["mean"])
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    panels, handles = figure.subplots(1, 2, sharey=True), []
    for number, row in enumerate(rows, start=1):
        name = row["method"].replace("Nominal alone", "Adam, learned rate")  # of old runs
        marker = "*" if name.startswith(OF_PHI) else "o"
        style = {"marker": marker, "color": COLOURS[kind(row["trains_on"])], "ms": 7, "lw": 0}
        y, error = (100 * (row["pgd_accuracy"][key] or 0) for key in ("mean", "std"))
        for panel, field, scale in zip(panels, ("accuracy", "seconds"), (100, 1), strict=True):
            x = scale * row[field]["mean"]
            panel.errorbar(x, y, error, elinewidth=0.6, **style)
            aside = (6, 3) if number % 2 else (-14, -9)
            panel.annotate(str(number), (x, y), aside, textcoords="offset points", fontsize=8)
        bad = ", some collapsed" * bool(row["collapsed"])
        handles.append(Line2D([], [], label=f"{number} {name}{bad}", **style))
    panels[0].set(xlabel="clean accuracy, %", ylabel="accuracy under the attack of the table, %")
    panels[1].set(xlabel="seconds of a training", xscale="log")
    colours = [Line2D([], [], color=c, lw=6, label=f"on {name}") for name, c in COLOURS.items()]
    star = Line2D([], [], color="0.3", marker="*", ms=9, lw=0, label="a φ, or its ablation")
    figure.legend(handles=[*handles, *colours, star], loc="outside right center", frameon=False,
                  fontsize=8)  # fmt: skip
    for panel in panels:
        panel.grid(alpha=0.3)
    words = []
    for run in runs:
        e, table = run["environment"], run["table"]
        radii = ", ".join(f"{eps:.3g}" for eps in sorted({row["eps"] for row in table}))
        counts = ", ".join(map(str, sorted({row["runs"] for row in table})))
        words += [f"{run['title']}, ε {radii}, {counts} runs a method (of φ: seeds times φ)",
                  f"{e['device']}, torch {e['torch']}, commit {e['git_commit'][:9]}",
                  run["command"]]  # fmt: skip
    figure.supxlabel("\n".join([*words, "mean ± sample deviation"]), fontsize=7, color="0.35")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
