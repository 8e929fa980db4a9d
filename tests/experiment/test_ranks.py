"""Processes that die, start anew, or sit on two machines: real ones, under torchrun."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import call_script

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds, of a machine that is busy with other things
RUN = ["--dataset", "quadratic", "--quick", "--episodes", "6", "--steps", "40", "--seeds", "9",
       "--nominal"]  # fmt: skip
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """The processes that this one started and that are there."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def worker(rank: int, *launchers) -> int:
    """The process that one of these started as that rank."""
    while all(launcher.poll() is None for launcher in launchers):
        for pid in [pid for launcher in launchers for pid in children(launcher.pid)]:
            with suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environment:
                    return pid
        time.sleep(0.05)
    raise AssertionError([launcher.communicate() for launcher in launchers])


def wait_for_parts(folder: Path, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob("parts/*.json"))) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_until_still(folder: Path) -> None:
    """Until no part has come for five seconds."""
    count, since = -1, time.monotonic()
    while time.monotonic() < since + 5:
        if (now := len(list(folder.glob("parts/*.json")))) != count:
            count, since = now, time.monotonic()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = call_script(*RUN, "--out", "r", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "r"


def assert_same(folder: Path, alone: Path) -> None:
    assert (folder / "metrics.csv").read_bytes() == (alone / "metrics.csv").read_bytes()


class TestARankThatIsKilled:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_job_ends_and_goes_on_at_another_size(self, tmp_path, alone, rank):
        job = torchrun("--standalone", "--nproc-per-node", 2, ROOT / "run.py", *RUN, "--out", "r",
                       cwd=tmp_path)  # fmt: skip
        victim = worker(rank, job)
        wait_for_parts(tmp_path / "r", 2)
        os.kill(victim, signal.SIGKILL)
        _, said = job.communicate(timeout=PATIENCE)
        assert job.returncode == 1 and "Signal 9 (SIGKILL)" in said
        done = call_script(*RUN, "--out", "r", "--resume", cwd=tmp_path, processes=3)
        assert done.returncode == 0, done.stderr
        assert_same(tmp_path / "r", alone)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_torchrun_begins_it_anew(self, tmp_path, alone, rank):
        job = torchrun("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, ROOT / "run.py",
                       *RUN, "--out", "r", cwd=tmp_path)  # fmt: skip
        victim = worker(rank, job)
        wait_for_parts(tmp_path / "r", 2)
        os.kill(victim, signal.SIGKILL)
        _, said = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, said
        assert_same(tmp_path / "r", alone)


def node(port, *more, cwd):
    """A torchrun as on a machine of its own: they meet at an address, and share a folder."""
    return torchrun("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id",
                    "job", "--rdzv-endpoint", f"127.0.0.1:{port}", *more, ROOT / "run.py", *RUN,
                    "--out", "r", cwd=cwd)  # fmt: skip


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class TestTwoMachines:
    def test_the_same_bits(self, tmp_path, alone, port):
        jobs = [node(port, cwd=tmp_path) for _ in range(2)]
        for job in jobs:
            _, said = job.communicate(timeout=PATIENCE)
            assert job.returncode == 0, said
        assert_same(tmp_path / "r", alone)

    @pytest.mark.parametrize("rank, late", [(0, False), (1, False), (0, True)])
    def test_a_worker_that_dies_is_replaced_on_both(self, tmp_path, alone, port, rank, late):
        """Late, when the other has no more to do."""
        jobs = [node(port, "--max-restarts", 1, cwd=tmp_path) for _ in range(2)]
        victim = worker(rank, *jobs)
        total = len(list(alone.glob("parts/*.json")))
        wait_for_parts(tmp_path / "r", total - 20 if late else 1)  # runs, which nothing waits for
        if late:
            os.kill(victim, signal.SIGSTOP)
            wait_until_still(tmp_path / "r")
        os.kill(victim, signal.SIGKILL)
        for job in jobs:
            _, said = job.communicate(timeout=PATIENCE)
            assert job.returncode == 0, said
        assert_same(tmp_path / "r", alone)
