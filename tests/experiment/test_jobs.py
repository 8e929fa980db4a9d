"""Real processes that share a run: those that run.py starts, and whoever joins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_run import same_results

import run
from l2l_ref.errors import InputError
from l2l_ref.experiment import jobs, machine
from l2l_ref.experiment.progress import Display
from l2l_ref.experiment.queue import Parts, Piece

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds, of a machine that is busy with other things
OPTIONS = ["--dataset", "quadratic", "--quick"]
RUN = [*OPTIONS, "--episodes", "20", "--steps", "40", "--seeds", "5", "--nominal"]
SHORT = [*OPTIONS, "--episodes", "2", "--steps", "10", "--seeds", "1", "--jobs", "1"]
CPU = torch.device("cpu")


def start(*arguments, cwd: Path, shell=(), python=(), **environment) -> subprocess.Popen:
    """run.py, in a group of its own, as a shell would start it."""
    return subprocess.Popen(
        [*shell, sys.executable, *python, str(ROOT / "run.py"), *arguments],
        cwd=cwd, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """The processes that work for this one."""
    children = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children")
                for child in task.read_text().split()]  # fmt: skip
    return [child for child in children
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]  # fmt: skip


def wait_for(what, job=None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        assert job is None or job.poll() is None, job.communicate()
        time.sleep(0.01)


def end(job, code: int = 0) -> str:
    said, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == code, (said, errors)
    return said + errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run.main([*RUN, "--out", str(folder), "--jobs", "1"])
    return folder


def hear(job, words: str) -> None:
    """Wait until it has said that."""
    for line in job.stdout:
        if words in line:
            return
    raise AssertionError(job.communicate())


def test_what_a_killed_child_leaves_the_others_compute_and_with_the_first_all_end(tmp_path, alone):
    """One run, killed and resumed again and again; another joins it, and begins it."""
    command = [*RUN, "--out", "r", "--jobs", "3", "--resume"]
    job = start(*command, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("r/parts/*.[jp]*")), job)  # results and checkpoints
    os.kill(descendants(job.pid)[0], signal.SIGKILL)
    hear(job, "a process was killed (SIGKILL): the others go on")
    os.killpg(job.pid, signal.SIGINT)  # control-C meets all of them
    said = end(job, 128 + signal.SIGINT)
    assert said.endswith("\nstopped; --resume continues\n") and "Traceback" not in said
    job = start(*command, cwd=tmp_path)
    wait_for(lambda: len(descendants(job.pid)) == 3, job)
    children = descendants(job.pid)
    job.kill()
    end(job, -signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))
    both = [start(*command, cwd=tmp_path), start(*command, cwd=tmp_path)]
    for job in both:
        assert end(job).count("| Adam, learned rate") == 1
    assert same_results(tmp_path / "r", alone)
    ours, theirs = ({p.name for p in out.rglob("*")} for out in (tmp_path / "r", alone))
    assert ours == theirs


def fail(how: str, number: int, progress) -> None:
    """Work that goes wrong in one of several processes."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 1:
        raise OSError(28, "No space left on device", "a file") if how == "full" else ValueError(how)
    time.sleep(60)


class TestShareOut:
    @pytest.mark.parametrize(
        "how, error, words",
        [("full", OSError, "No space left on device: 'a file'"), ("a bug", SystemExit, "1"),
         ("killed", InputError, "all 2 processes were killed, by SIGKILL")],
    )  # fmt: skip
    def test_what_goes_wrong_in_one_ends_all(self, how, error, words):
        begin = time.monotonic()
        with pytest.raises(error, match=words):
            jobs.share_out(fail, (how,), 2, Display())
        assert time.monotonic() - begin < 50


class TestHowMany:
    def pieces(self, *costs, needs=()):
        return [Piece(str(i), None, cost, needs) for i, cost in enumerate(costs)]

    @pytest.fixture(autouse=True)
    def eight_cores(self, monkeypatch):
        monkeypatch.setattr(machine, "cores", lambda: 8)

    def test_no_more_than_pay(self, tmp_path):
        parts = Parts(tmp_path)
        assert jobs.number(None, self.pieces(*[1.0] * 20), parts, CPU) == 8
        assert jobs.number(None, self.pieces(6.0, 6.0, 8.0), parts, CPU) == 3  # 20 / 8
        chain = [*self.pieces(5.0), Piece("end", None, 5.0, ("0",))]
        assert jobs.number(None, chain, parts, CPU) == 1
        assert jobs.number(5, chain, parts, CPU) == 5
        parts.keep("0", {})
        assert jobs.number(None, self.pieces(9.0, 1.0, 1.0), parts, CPU) == 2  # what is left
        assert jobs.number(None, self.pieces(1.0), parts, CPU) == 1

    def test_one_for_each_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        for name, count in (("cuda", 4), ("cuda:1", 1)):
            many = self.pieces(*[1.0] * 20)
            assert jobs.number(None, many, Parts(tmp_path), torch.device(name)) == count


@pytest.mark.parametrize(
    "quota, count",
    [("150000 100000\n", 2), ("max 100000\n", 6), (None, 6), ("50000 100000\n", 1)],
)
def test_cores_of_a_container(quota, count, tmp_path, monkeypatch):
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert machine.cores() == count
