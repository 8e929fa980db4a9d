"""Real processes that share a run: those that run.py starts, torchrun's, and whoever joins."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import call_script
from test_run import same_results

import run
from l2l_ref.errors import InputError
from l2l_ref.experiment import jobs, machine
from l2l_ref.experiment.progress import Display
from l2l_ref.experiment.queue import Parts, Piece
from l2l_ref.files import locked

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds, of a machine that is busy with other things
RUN = ["--dataset", "quadratic", "--quick", "--episodes", "20", "--steps", "40", "--seeds", "5",
       "--nominal"]  # fmt: skip
CPU = torch.device("cpu")


def start(*arguments, cwd: Path, torchrun=()):
    """run.py, in a group of its own, as a shell would start it; or torchrun with these options."""
    launcher = ["-m", "torch.distributed.run", "--standalone", *torchrun] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "run.py"), *arguments],
        cwd=cwd, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def descendants(pid: int) -> list[int]:
    """The processes that work for this one: those of multiprocessing, or of torchrun."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            words = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"spawn_main" in words or b"run.py" in words:
                found += [child, *descendants(child)]
    return found


def wait_for(what, job) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end and job.poll() is None, job.communicate()
        time.sleep(0.01)


def begun(folder: Path, count: int = 1):
    """Whether there are so many parts, or checkpoints of them."""
    return lambda: len([*folder.glob("parts/*.json"), *folder.glob("parts/*.pt")]) >= count


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


def assert_same(folder: Path, alone: Path) -> None:
    """The same bits, and no file that the run of one process does not leave."""
    assert same_results(folder, alone)
    ours, theirs = ({p.name for p in out.rglob("*")} for out in (folder, alone))
    assert ours == theirs


def hear(job, words: str) -> None:
    """Wait until it has said that."""
    for line in job.stdout:
        if words in line:
            return
    raise AssertionError(job.communicate())


def test_two_torchruns_one_of_which_begins_a_rank_anew_and_who_joins(tmp_path, alone):
    options = ["--nproc-per-node=2", "--max-restarts=1"], ["--nproc-per-node=1"]
    several = [start(*RUN, "--out", "r", cwd=tmp_path, torchrun=own) for own in options]
    hear(several[0], "results in r")
    lock = tmp_path / "r/parts/run-eps0.0-methodL2L-Transfer-fold0-phi0-seed0.lock"
    wait_for(lock.parent.exists, several[0])
    with locked(lock):  # so that none ends before all are there
        hear(several[1], "results in r")
        several.append(start(*RUN, "--out", "r", "--resume", "--jobs", "2", cwd=tmp_path))
        os.kill(descendants(several[0].pid)[-1], signal.SIGKILL)
        for job in several[0], several[2]:
            hear(job, "results in r")
    said = "".join(map(end, several))
    assert_same(tmp_path / "r", alone)
    assert said.count("| Nominal alone") == 1  # the report, once


def test_a_child_that_is_killed_is_replaced_and_with_the_first_all_end(tmp_path, alone):
    """One run, killed and resumed again and again."""
    command = [*RUN, "--out", "r", "--jobs", "3"]
    job = start(*command, cwd=tmp_path)
    wait_for(begun(tmp_path / "r"), job)
    os.kill(descendants(job.pid)[0], signal.SIGKILL)
    hear(job, "a process was killed (SIGKILL): another takes its place")
    os.killpg(job.pid, signal.SIGINT)  # control-C meets all of them
    said = end(job, 128 + signal.SIGINT)
    assert said.endswith("\nstopped; --resume continues\n") and "Traceback" not in said
    job = start(*command, "--resume", cwd=tmp_path)
    wait_for(lambda: len(descendants(job.pid)) == 3, job)
    children = descendants(job.pid)
    job.kill()
    end(job, -signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    said = end(start(*command, "--resume", cwd=tmp_path))
    assert said.count("3 processes") == said.count("| Nominal alone") == 1
    assert_same(tmp_path / "r", alone)


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
         ("killed", InputError, "4 processes were killed one after the other, by SIGKILL")],
    )  # fmt: skip
    def test_what_goes_wrong_in_one_ends_all(self, how, error, words):
        begin = time.monotonic()
        with pytest.raises(error, match=words):
            jobs.share_out(fail, (how,), 2, Display())
        assert time.monotonic() - begin < 50

    def test_a_mistake_is_one_sentence(self, workdir, monkeypatch, capsys):
        done = call_script("--eps", "2", cwd=workdir, processes=2)
        sentence = "run.py: --eps is 2.0: it must be between 0 and 1"
        assert done.returncode != 0 and done.stdout == ""
        assert done.stderr.count("run.py: --") == done.stderr.count(sentence) == 1
        for rank, words in (("0", "usage: run.py"), ("1", "")):
            under_torchrun(monkeypatch, rank)
            with pytest.raises(SystemExit):
                run.main(["--help"])
            assert capsys.readouterr().out[: len("usage: run.py")] == words
        under_torchrun(monkeypatch)
        with pytest.raises(InputError, match="--out is missing: under torchrun"):
            run.main(RUN)
        assert list(workdir.iterdir()) == []


def under_torchrun(monkeypatch, rank="0"):
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)


class TestHowMany:
    def pieces(self, *costs, needs=()):
        return [Piece(str(i), None, "", cost, needs) for i, cost in enumerate(costs)]

    @pytest.fixture(autouse=True)
    def eight_cores(self, monkeypatch):
        monkeypatch.setattr(machine, "cores", lambda: 8)
        monkeypatch.delenv("RANK", raising=False)

    def test_no_more_than_pay(self, tmp_path, monkeypatch):
        parts = Parts(tmp_path)
        assert jobs.number(None, self.pieces(*[1.0] * 20), parts, CPU) == 8
        assert jobs.number(None, self.pieces(6.0, 6.0, 8.0), parts, CPU) == 3  # 20 / 8
        chain = [*self.pieces(5.0), Piece("end", None, "", 5.0, ("0",))]
        assert jobs.number(None, chain, parts, CPU) == 1
        assert jobs.number(5, chain, parts, CPU) == 5
        parts.keep("0", {})
        assert jobs.number(None, self.pieces(9.0, 1.0, 1.0), parts, CPU) == 2  # what is left
        assert jobs.number(None, self.pieces(1.0), parts, CPU) == 1
        under_torchrun(monkeypatch)
        assert jobs.number(5, self.pieces(*[1.0] * 20), parts, CPU) == 1

    def test_one_for_each_gpu(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        for name, count in (("cuda", 4), ("cuda:1", 1)):
            many = self.pieces(*[1.0] * 20)
            assert jobs.number(None, many, Parts(tmp_path), torch.device(name)) == count


@pytest.mark.parametrize(
    "files, count",
    [({"cpu.max": "150000 100000"}, 2), ({"cpu.max": "max 100000"}, 6), ({}, 6),
     ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
     ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1)],
)  # fmt: skip
def test_cores_of_a_container(files, count, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert machine.cores() == count
