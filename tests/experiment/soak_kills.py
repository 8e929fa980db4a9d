"""50 kills of a real run at random, then the same bits: `make soak`.

Each is killed when it has left a random number of files, from none to all: in meta-training,
tuning, transfer, report, and some again while they are resumed. By turns one process and two ranks.
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_ranks import ROOT, RUN, children, torchrun
from test_run import same_results


def start(ranks: int, *more: str, cwd: Path):
    if ranks > 1:
        return torchrun(
            "--standalone", "--nproc-per-node", ranks, ROOT / "run.py", *RUN, *more, cwd=cwd
        )
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *RUN, *more], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill(job) -> None:
    """The process, or the launcher and all its ranks."""
    everyone = [job.pid, *children(job.pid)]
    for pid in everyone:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.communicate()
    while any(Path(f"/proc/{pid}/exe").exists() for pid in everyone):
        time.sleep(0.01)


def files(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    out, said = start(1, "--out", "r", cwd=folder).communicate()
    assert (folder / "r" / "curves.png").exists(), said
    return folder / "r"


@pytest.mark.parametrize("seed", range(50))
def test_killed_at_random(seed, whole, tmp_path):
    noise, ranks, more = random.Random(seed), 1 + seed % 2, []
    folder, most = tmp_path / "r", files(whole)
    for _ in range(noise.choice((1, 1, 2))):
        job, count = start(ranks, "--out", "r", *more, cwd=tmp_path), noise.randrange(most + 1)
        while job.poll() is None and files(folder) < count:
            time.sleep(0.002)
        time.sleep(noise.random() * 0.3)
        kill(job)
        more = ["--resume"] if (folder / "config.json").exists() else []
    job = start(ranks, "--out", "r", *more, cwd=tmp_path)
    _, said = job.communicate()
    assert job.returncode == 0, said
    assert same_results(whole, folder) and files(folder) == files(whole)
    assert not list(folder.rglob("*.partial"))
