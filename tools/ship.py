"""Puts a φ of a finished run into the package: weights as a run writes them, and a card in JSON.

    python tools/ship.py runs/mnist-fgsm-paper mnist-fgsm-0.1 --eps 0.1 --horizon 100 \
        --for "mixed batches, as in the paper" --not-for "clean batches"

It takes the meta-seed whose φ was the best of all on validation images.
"""

import argparse
import json
import math
from pathlib import Path

from l2l_ref import pretrained
from l2l_ref.experiment.config import names_of
from l2l_ref.files import plain, sealed, write_checkpoint, write_json

METHODS = ("L2L", "Adam")  # what the rows that are kept begin with
NUMBERS = ("pgd_loss", "accuracy", "pgd_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--eps", type=float, required=True)
    parser.add_argument("--horizon", required=True, help="updates that it has been shown to train")
    parser.add_argument("--for", dest="good_for", required=True)
    parser.add_argument("--not-for", dest="not_good_for", required=True)
    given = parser.parse_args()
    saved = pretrained.read(given.run / "meta_optimizer.pt")
    summary = json.loads((given.run / "summary.json").read_text())
    about = json.loads((given.run / "config.json").read_text())
    best = {
        int(name.split("-")[2].removeprefix("phi")): min(
            math.inf if loss is None else loss for _, loss in history["checks"]
        )
        for name, history in summary["meta_training"].items()
        if name.startswith("attacked-fold0") and name.endswith(f"eps{given.eps}")
    }
    seed = min(best, key=best.__getitem__)
    phis = {}
    for kind in ("attacked", "clean", "ablation"):
        (chosen,) = [
            name
            for name in saved["phis"]
            if name.split("-")[:3] == [kind, "fold0", f"phi{seed}"]
            and name.endswith((f"phi{seed}", f"eps{given.eps}"))
        ]
        phi = chosen.replace(f"-phi{seed}", "-phi0")  # as a run of one φ names it
        phis[phi] = saved["phis"][chosen]
    rows = [row for row in summary["table"] if abs(row["eps"] - given.eps) < 1e-9]
    results = {
        row["method"]: {"runs": row["runs"], **{name: row[name] for name in NUMBERS if name in row}}
        for row in rows
        if row["method"].startswith(METHODS)
    }
    config = {**saved["config"], "eps": [given.eps], "meta_seeds": 1, "load": None}
    card = {
        "good_for": given.good_for,
        "not_good_for": given.not_good_for,
        "horizon": given.horizon,
        "licence": "MIT, as l2l_ref",
        "data": saved["data"],
        "data_sha256": saved["data_sha256"],
        "command": about["command"],
        "commit": about["environment"]["git_commit"],
        "evaluated_on": f"{config['eval_on']} images, {config['steps']} steps",
        "results_of": f"all φ of that run; this is number {seed}, the best on validation images",
        "results": results,
        "config": {name: v for name, v in config.items() if name not in names_of("place")},
    }
    path = pretrained.FOLDER / f"{given.name}.pt"
    write_checkpoint(path, {"format": pretrained.FORMAT, "phis": phis})
    write_json(path.with_suffix(".json"), sealed(plain(card)))
    print(f"{given.name}: φ {', '.join(phis)}")


if __name__ == "__main__":
    main()
