"""50 kills of a real run at random, then the same bits: `make soak`.

Each is killed when it has left a random number of files, from none to all: in meta-training,
tuning, transfer, report, and some again while they are resumed. By turns one process, and two, of
which now one is killed and now the other.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from test_jobs import RUN, descendants, start
from test_run import same_results


def kill(job, noise) -> None:
    """The process that was started, with which all end, or one of those that work for it."""
    workers = descendants(job.pid)
    if workers and noise.random() < 0.5:
        os.kill(noise.choice(workers), signal.SIGKILL)
        return
    job.kill()
    job.communicate()
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers):
        time.sleep(0.01)


def files(folder: Path) -> int:
    return sum(path.is_file() and path.suffix != ".lock" for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    out, said = start(*RUN, "--jobs", "1", "--out", "r", cwd=folder).communicate()
    assert (folder / "r" / "curves.png").exists(), said
    return folder / "r"


@pytest.mark.parametrize("seed", range(50))
def test_killed_at_random(seed, whole, tmp_path):
    noise, more = random.Random(seed), ["--jobs", str(1 + seed % 2)]
    folder, most = tmp_path / "r", files(whole)
    for _ in range(noise.choice((1, 1, 2))):
        job, count = start("--out", "r", *RUN, *more, cwd=tmp_path), noise.randrange(most + 1)
        while job.poll() is None and files(folder) < count:
            time.sleep(0.002)
        time.sleep(noise.random() * 0.3)
        kill(job, noise)
        if job.returncode is None:  # a worker was killed, and the run goes on
            break
        more += ["--resume"] if (folder / "config.json").exists() else []
    if job.returncode is not None:
        job = start("--out", "r", *RUN, *more, cwd=tmp_path)
    _, said = job.communicate()
    assert job.returncode == 0, said
    assert same_results(whole, folder) and files(folder) == files(whole)
    assert not list(folder.rglob("*.partial"))
