"""Runs a command of the table in docs/answers.md once more, into runs/FOLDER, and compares.

    python tools/results.py mnist-fgsm-paper --data-dir data     # options of run.py come last

What was interrupted goes on. Without a folder it lists them.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = r"^\| \[`([\w.-]+)`\]\([\w.-]+\) \| `python run\.py ?(.*?)`"


def commands() -> dict[str, str]:
    """{folder of docs/: the options of its run}."""
    return dict(re.findall(ROW, (ROOT / "docs/answers.md").read_text(), re.MULTILINE))


def rows_of(folder: Path) -> dict[tuple[float, str], dict[str, float]]:
    """The losses under PGD-7 of a run's table, if it is there: {(ε, method): {"mean", "std"}}."""
    path = folder / "summary.json"
    table = json.loads(path.read_text())["table"] if path.exists() else []
    return {(row["eps"], row["method"]): row["pgd_loss"] for row in table}


def main(name: str = "", *options: str) -> None:
    known = commands()
    if name not in known:
        sys.exit("choose one of " + ", ".join(known))
    out = Path("runs") / name
    command = [sys.executable, ROOT / "run.py", *shlex.split(known[name])]
    subprocess.run([*command, *options, "--out", out, "--resume"], check=True)
    print("\n| method | loss, PGD-7, in docs | now |\n|---|---|---|")
    before, now = rows_of(ROOT / "docs" / name), rows_of(out)
    for (eps, method), old in before.items():
        new = now.get((eps, method))
        cells = [f"{x['mean']:.3f} ± {x['std'] or 0:.3f}" if x else "–" for x in (old, new)]
        print(f"| {method}, ε {eps:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
