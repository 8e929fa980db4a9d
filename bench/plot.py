"""The plot of a report of `operators.py`."""

from pathlib import Path
from typing import Any

from bench.peers import ADAM, CLASS, COPY, FLOOR, GRAPH, OURS, TENSOR, XLA
from l2l_ref.drawing import own_style, save_png

# Okabe & Ito's colour-blind-safe palette; a marker each, so that grey print will do too.
STYLES = {
    OURS: ("#D55E00", "o-"),
    CLASS: ("#666666", "+:"),
    "nn.LSTM": ("#0072B2", "s-"),
    "torch.compile": ("#CC79A7", "^--"),
    "reference": ("#000000", "x:"),
    XLA: ("#009E73", "v-."),
    FLOOR: ("#999999", "--"),
    GRAPH: ("#E69F00", "o--"),
    TENSOR: ("#F0E442", "p-"),
    ADAM: ("#56B4E9", "d-"),
    COPY: ("#999999", "-."),
}
FLOORS = {"measured": ("least: bytes", ":"), "flops": ("least: FLOP", "-")}
TITLES = {"step": "θ-step in place", "meta_gradient": "meta-gradient, forward included"}


@own_style()
def draw(path: Path, report: dict[str, Any]) -> None:
    """Draw ns per coordinate-step over N into the PNG at `path`: a line a peer, a panel for each
    operator and number of threads: steps one by one, unrolls at their longest; bars are
    quartiles. On a GPU the floors are lines, too."""
    from matplotlib.figure import Figure

    rows, threads, gpu = report["rows"], report["threads"], report.get("gpu")
    unrolls = [row["unroll"] for row in rows]
    at = {"step": min(unrolls), "meta_gradient": max(unrolls)}
    figure = Figure(figsize=(4.8 * len(threads) + 1.5, 8.5), layout="constrained")
    panels = figure.subplots(len(TITLES), len(threads), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for line, (operator, title) in zip(panels, TITLES.items(), strict=True):
        for panel, count in zip(line, threads, strict=True):
            shown = {"operator": operator, "unroll": at[operator], "threads": count}
            own = sorted((r for r in rows if shown.items() <= r.items()), key=lambda r: r["n"])
            for name, (colour, style) in STYLES.items():
                found = [(r["n"], r["peers"][name]) for r in own if name in r["peers"]]
                if not found:
                    continue
                middle = [peer["median"] for _, peer in found]
                low = [p["median"] - p["quartiles"][0] for _, p in found]
                high = [p["quartiles"][1] - p["median"] for _, p in found]
                handles[name] = panel.errorbar(
                    [n for n, _ in found], middle, (low, high), fmt=style, color=colour,
                    lw=1.6, ms=5, capsize=2,
                )  # fmt: skip
            for name, (label, style) in FLOORS.items():
                least = [(r["n"], r["floors"]["ns"][name]) for r in own if "floors" in r]
                if least and least[0][1] is not None:
                    x, y = zip(*least, strict=True)
                    (handles[label],) = panel.plot(x, y, style, color="#000000", lw=0.8)
            panel.set(xscale="log", yscale="log", xlabel="coordinates N")
            where = "" if gpu else f", {count} thread{'s' * (count > 1)}"
            panel.set_title(f"{title}, T = {at[operator]}{where}")
            panel.grid(alpha=0.3, which="both")
        line[0].set_ylabel("ns per coordinate-step")
    labels = [f"ours ({report['backend']})" if name == OURS else name for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=3, frameon=False)
    counts = " and ".join(map(str, threads))
    where = gpu["name"] if gpu else f"{report['cpu']}\n{counts} thread{'s' * (threads != [1])}"
    figure.suptitle(f"{where}, torch {report['torch']}, float32")
    save_png(figure, path, 130)
