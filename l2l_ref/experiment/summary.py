"""What the runs of a comparison say: means, paired differences, and whether φ has learned."""

import math
import statistics
from itertools import product
from typing import Any

from l2l_ref.experiment.phis import LEARNED_RATE
from l2l_ref.experiment.protocol import Results
from l2l_ref.experiment.trial import PGD_STEPS

METRICS = {
    "attacked_loss": "loss",  # the last of the curve, where there is no other
    "pgd_loss": f"loss, PGD-{PGD_STEPS}",
    "fgsm_loss": "loss, FGSM",
    "accuracy": "clean %",
    "fgsm_accuracy": "FGSM %",
    "pgd_accuracy": "{attack} %",
    "ms_per_step": "ms/step",
    "seconds": "s",
}
# What φ is compared with: the paper's claim first, then what its row would be without φ, and the
# strongest baseline that trains on the same.
CONTROLS: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": {"L2L-Transfer (clean)": ("Adam",), "L2L": (LEARNED_RATE, "Adam (attacked) + L1")},
    "robust": {"L2L-Transfer (clean)": ("Adam", LEARNED_RATE, "Adam + L1")},
    "penalty": {LEARNED_RATE: ("Adam", "Adam + penalty + L1")},
}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 1 to 10
PAIRED = ("attacked_loss", "pgd_loss", "accuracy", "pgd_accuracy")  # of which differences are given


def summarise(results: Results) -> list[dict[str, Any]]:
    """One row for each ε and method: mean and sample deviation over folds, φ and seeds.

    A metric that is not finite in some run has mean and deviation None: no run is left out.
    """
    rows: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in results.runs:
        rows.setdefault((run["eps"], run["method"]), []).append(run)
    summary = []
    for (eps, method), runs in rows.items():
        row: dict[str, Any] = {"eps": eps, "method": method, "runs": len(runs)}
        row["trains_on"] = runs[0]["trains_on"]
        for name in METRICS:
            values = [run.get(name) for run in runs]
            if values[0] is not None:
                row[name] = spread(values)
                phis = sorted({run["phi"] for run in runs} - {None})
                if len(phis) > 1:
                    row[name]["by_phi"] = [
                        spread([run[name] for run in runs if run["phi"] == phi])["mean"]
                        for phi in phis
                    ]
        for end in ("collapsed", "diverged"):
            row[end] = sum(run["end"] == end for run in runs)
        summary.append(row)
    return summary


def spread(values: list[Any]) -> dict[str, float | None]:
    """Mean and sample deviation; None where a value is not finite."""
    finite = all(map(math.isfinite, values))
    return {
        "mean": statistics.fmean(values) if finite else None,
        "std": statistics.stdev(values) if finite and len(values) > 1 else None,
    }


def differences(results: Results) -> list[dict[str, Any]]:
    """Each method that a φ trains, less each other one: {"mean", "half_width"} of `PAIRED`.

    Runs of a seed share θ₀ and batches, so they are compared in pairs, after averaging over φ; the
    interval is that of Student's t at 95 % over seeds and folds. Fewer than three have none.
    """
    seeds: dict[tuple[float, str], dict[tuple[int, int], list[dict[str, Any]]]] = {}
    for run in results.runs:
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
                present = [a - b for a, b in pairs if a is not None and b is not None]
                if pairs and len(present) == len(pairs):
                    row[name] = interval(present)
            rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]], recipe: str) -> str:
    """The loss of φ minus that of `CONTROLS`, of `differences`; a line for each ε and row of φ."""
    lines = []
    for eps, own in product(dict.fromkeys(row["eps"] for row in rows), CONTROLS[recipe]):
        texts = []
        for row in rows:
            if (row["eps"], row["method"]) == (eps, own) and row["less"] in CONTROLS[recipe][own]:
                loss = row.get("pgd_loss", row.get("attacked_loss"))
                texts.append(f"{row['less']} {signed(loss)}")
        if texts:
            line = f"ε {eps:g}: loss of {own} minus that of " + ", ".join(texts)
            lines.append(line + " (95 % over seeds, after the mean over φ)" * ("±" in line))
    return "\n".join(lines)


def signed(value: dict[str, float | None] | None) -> str:
    """`+0.123 ± 0.045`."""
    if value is None or value["mean"] is None:
        return "not finite"
    half = value["half_width"]
    return f"{value['mean']:+.3f}" + ("" if half is None else f" ± {half:.3f}")


def mean(runs: list[dict[str, Any]], name: str) -> float | None:
    values: list[Any] = [run.get(name) for run in runs]
    return None if None in values else statistics.fmean(values)


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean, and half the width of the 95 % interval of Student's t; None as in `spread`, and of
    fewer than three values."""
    of, half = spread(values), None
    if of["std"] is not None and len(values) > 2:
        half = student(len(values) - 1) * of["std"] / math.sqrt(len(values))
    return {"mean": of["mean"], "half_width": half}


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; from 11 on by Fisher's expansion, to three decimals."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
