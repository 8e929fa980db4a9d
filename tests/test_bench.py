"""The benchmarks run, and what they say adds up."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_profile(tmp_path):
    arguments = "--dataset quadratic --steps 4 --unroll 2 --episodes 2 --seeds 1 --device cpu"
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "profile.py", *arguments.split(), "--out", tmp_path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (file,) = tmp_path.iterdir()
    seconds = json.loads(file.read_text())["seconds"]
    assert {"meta-training", "tuning", "transfer"} <= seconds.keys()
    for phase in ("meta-training", "transfer"):
        for what in ("LSTM", "optimizee: forward, backward", "everything else"):
            assert seconds[phase][what] > 0
    assert "LSTM" not in seconds["tuning"]  # where the baselines are
    last = done.stdout.split("\nall")[1].splitlines()[0]
    assert last.split()[-2:] == ["100.0", "100.0"]
