"""The paper's figure: loss under attack over the steps of training, one panel for each ε."""

import math
import textwrap
from pathlib import Path
from typing import Any

import torch

from l2l_ref.experiment.config import Config
from l2l_ref.experiment.phis import ABLATION, CLEAN, LEARNED_RATE
from l2l_ref.files import replace_with

Rows = list[dict[str, Any]]  # runs, means or differences, by column
# Okabe & Ito's colour-blind-safe palette, and a line style each, so that grey print will do too.
STYLES = {
    "L2L": ("#0072B2", "-"),
    "L2L + L1": ("#0072B2", "--"),
    "L2L-Transfer": ("#D55E00", "-"),
    "L2L-Transfer (clean)": ("#D55E00", "-"),
    "L2L-Transfer (clean) + L1": ("#D55E00", ":"),
    "L2L-Transfer (mixed)": ("#E69F00", "--"),
    "Transfer-NOT": ("#CC79A7", "-."),
    "Adam": ("#000000", "-"),
    "Adam (attacked)": ("#009E73", ":"),
    "Adam (attacked) + L1": ("#009E73", "--"),
    "Adam + L1": ("#999999", "--"),
    "Adam + penalty + L1": ("#8B4513", "-."),
    LEARNED_RATE: ("#56B4E9", "-."),
}
TOP = 1.5  # of a panel, in losses at the start, or a curve that runs away would flatten the others


def marks(row: dict[str, Any]) -> str:
    """How many runs ended badly, in words."""
    ends = [end for end in ("collapsed", "diverged") if row[end]]
    return ", ".join(f"{row[end]}/{row['runs']} {end}" for end in ends)


def draw_curves(
    path: Path, runs: Rows, summary: Rows, config: Config, title: str, footer: str
) -> None:
    """Draw the mean of each method in `STYLES`, ± one deviation, into the PNG at `path`.

    Above a panel are the counts of runs that collapsed or diverged, and where curves go that leave
    it, so that no mean hides them. `summary` is that of `report.summarise`.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(config.eps))
    rows = math.ceil(len(config.eps) / columns)
    figure, most = Figure(layout="constrained"), 0  # notes above a panel
    handles: dict[str, Any] = {}
    for number, eps in enumerate(config.eps, start=1):
        panel = figure.add_subplot(rows, columns, number)
        notes = [f"ε = {eps:.3g}"] * (config.attack != "none")
        notes += [f"{row['method']}: {marks(row)}" for row in summary
                  if row["eps"] == eps and row["method"] in STYLES and marks(row)]  # fmt: skip
        means = []
        for method, (colour, style) in STYLES.items():
            own = [run for run in runs if (run["eps"], run["method"]) == (eps, method)]
            if not own:
                continue
            losses, steps = torch.tensor([run["attacked"] for run in own]), own[0]["steps"]
            mean, spread = losses.mean(0), losses.std(0, correction=int(len(own) > 1))
            means.append(mean[mean.isfinite()])
            if means[-1].max() > TOP * mean[0] and config.dataset != "quadratic":
                notes.append(f"{method}: up to {means[-1].max():.3g}")
            panel.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
            (handles[method],) = panel.plot(steps, mean, style, color=colour, lw=1.8, label=method)
        under = {"none": "", "fgsm": " under FGSM", "pgd": f" under PGD-{config.attack_steps}"}
        panel.set(xlabel="step", ylabel="loss" + under.get(config.attack, " under attack"))
        if config.dataset == "quadratic":
            panel.set_yscale("log")
        else:  # all begin at one loss; a deviation may lie outside
            shown = torch.cat(means)
            highest = min(1.05 * shown.max(), TOP * shown[0])
            panel.set_ylim(0.95 * shown.min().item(), highest.item())
        most = max(most, len(notes))
        panel.set_title("\n".join(notes), fontsize=9)
        panel.grid(alpha=0.3)
    figure.set_size_inches(7.5 * columns, (4.2 + 0.15 * most) * rows + 1.6)
    title = textwrap.fill(title, 75 * columns)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3 * columns,
                  frameon=False, title=title, title_fontsize=11)  # fmt: skip
    left_out = dict.fromkeys(row["method"] for row in summary if row["method"] not in STYLES)
    if left_out:
        footer = f"not drawn: {', '.join(left_out)}\n{footer}"
    finish(figure, path, footer)


def draw_meta_training(
    path: Path, histories: dict[str, dict[str, Any]], title: str, footer: str
) -> None:
    """Draw how each episode of meta-training ended, and as circles what the checks of φ said."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.7 + 0.1 * len(histories)), layout="constrained")
    panel, colours = figure.subplots(), dict[str, str]()
    for name, history in histories.items():
        kind, _, which = name.partition("-")  # of one fold, seed and ε, all have one colour
        style = {CLEAN: ":", ABLATION: "--"}.get(kind, "-")
        colour = colours.setdefault(which, f"C{len(colours)}")
        episodes = range(1, len(history["episodes"]) + 1)
        panel.plot(episodes, history["episodes"], style, color=colour, lw=0.8, label=name)
        if history["checks"]:
            panel.plot(*zip(*history["checks"], strict=True), "o", color=colour, ms=4)
    words = "loss of the last unroll (circles: validation, PGD-7)"
    panel.set(xlabel="episode", ylabel=words, yscale="log")  # early episodes run away
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, title=title,
                  title_fontsize=9, fontsize=8)  # fmt: skip
    finish(figure, path, footer)


def finish(figure: Any, path: Path, footer: str) -> None:
    figure.supxlabel(footer, fontsize=7, color="0.35", wrap=True)
    replace_with(path, lambda partial: figure.savefig(partial, format="png", dpi=130))
