"""What befalls runs: another in their folder, files that changed, a full disk, signals."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_jobs import SHORT, end, start

import run
from l2l_ref.errors import InputError
from l2l_ref.experiment import cli, figure, folder, queue
from l2l_ref.files import read_checkpoint, read_json, write_checkpoint


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of a run that has come to its end."""
    folder = tmp_path_factory.mktemp("once")
    run.main([*SHORT, "--out", str(folder)])
    return folder


@pytest.fixture
def finished(once, workdir):
    """A copy of it, which is r of the current folder."""
    return shutil.copytree(once, workdir / "r")


class TestTwoRunsAndOneFolder:
    def test_of_default_runs_each_has_its_own(self, workdir):
        for process in [start(*SHORT, cwd=workdir) for _ in range(2)]:
            end(process)
        folders = {path.name: (path / "summary.json").exists() for path in Path("runs").iterdir()}
        assert folders == {"quadratic-none-paper-quick" + number: True for number in ("", "-2")}
        assert run.main([*SHORT, "--resume"]) == Path("runs/quadratic-none-paper-quick-2")

    def test_of_two_that_chose_the_same_folder_one_ends(self, workdir, monkeypatch):
        """While one has chosen it and not claimed it yet, the other begins there."""
        locked = folder.locked

        def slow(path):
            monkeypatch.setattr(folder, "locked", locked)
            run.main([*SHORT, "--seed", "1", "--out", "r"])
            return locked(path)

        monkeypatch.setattr(folder, "locked", slow)
        with pytest.raises(InputError, match="--out r is not empty"):
            run.main([*SHORT, "--seed", "2", "--out", "r"])
        assert read_json(Path("r/config.json"), "")["settings"]["seed"] == 1

    @pytest.mark.parametrize("resume", [[], ["--resume"]])
    def test_a_claim_that_came_to_nothing_or_is_under_way_is_no_run(self, workdir, resume):
        Path("r").mkdir()
        for name in (folder.LOCK, "config.json.7.partial"):
            Path("r", name).touch()
        run.main([*SHORT, "--out", "r", *resume])
        assert Path("r/summary.json").exists()


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"e", len(content) // 2)] ^= 1
    path.write_bytes(content)


def unsealed(path: Path) -> None:
    """However well formed."""
    if path.suffix == ".pt":
        return torch.save(torch.load(path, weights_only=True), path)
    value = json.loads(path.read_text())
    del value["checksum"]
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("change", [flipped, unsealed])
@pytest.mark.parametrize(
    "name, command",
    [
        ("config.json", [*SHORT, "--resume"]),
        ("parts/run-SGD-seed0-fold0-eps0.0.json", [*SHORT, "--resume"]),
        ("parts/attacked-fold0-phi0-eps0.0.pt", [*SHORT, "--resume"]),
        ("meta_optimizer.pt", [*SHORT[:3], "--load", "r/meta_optimizer.pt"]),
    ],
)
def test_a_file_that_has_changed_is_named(finished, name, command, change, monkeypatch):
    change(finished / name)
    if "run-SGD" in name:  # it is said before anything is computed
        monkeypatch.setattr(queue, "compute_all", None)
    out = ["--out", "x" if "--load" in command else "r"]
    with pytest.raises(InputError, match=re.escape(name.rpartition("/")[2])):
        run.main([*command, *out])


def test_a_phi_that_does_not_say_where_it_is_from_is_not_compared(finished):
    saved = read_checkpoint(Path("r/meta_optimizer.pt"))
    del saved["config"]
    write_checkpoint(Path("edited.pt"), saved)
    with pytest.raises(InputError, match=r"edited\.pt does not say"):
        run.main([*SHORT[:3], "--load", "edited.pt"])


@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_in_mid_run_and_then_resumed(once, workdir, monkeypatch, last):
    """At the first or the last checkpoint there is no room, once."""
    write, calls = Path.write_bytes, itertools.count()
    at = last * (len(list(once.rglob("*.pt"))) - 1)

    def full(path, content):
        if next(calls) == at:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device: .*pt'"):
            run.main([*SHORT, "--out", "r"])
    assert not list(Path("r").rglob("*.partial"))
    left = Path("r/parts/a.json.7.partial"), Path("r/parts/a.lock")  # by one that was killed
    for path in left:
        path.touch()
    run.main([*SHORT, "--out", "r", "--resume"])
    assert not any(path.exists() for path in left)
    assert Path("r", folder.LOCK).exists()  # others may hold it, or wait for it
    assert Path("r/metrics.csv").read_bytes() == (once / "metrics.csv").read_bytes()


def test_a_reader_that_leaves_ends_a_run_that_can_be_resumed(tmp_path):
    process = start(*SHORT, "--out", "r", cwd=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 2
    assert process.stderr.read() == "run.py: Broken pipe (stopped; --resume continues)\n"
    run.main([*SHORT, "--out", str(tmp_path / "r"), "--resume"])


def test_without_stdout(workdir):
    shell = ["sh", "-c", 'exec "$@" >&-', "sh"]
    end(start(*SHORT, "--out", "r", cwd=workdir, shell=shell))
    assert {"curves.png", "summary.json"} <= {path.name for path in Path("r").iterdir()}


def test_a_tilde(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir / "home"))
    run.main([*SHORT, "--out=~/mine"])
    assert (workdir / "home" / "mine" / "curves.png").exists() and not Path("~").exists()


def test_a_figure_that_fails_is_one_line(workdir, monkeypatch, capsys):
    def failing(*_):
        raise ValueError("no such font\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(figure, "marks", failing)
        run.main([*SHORT, "--out", "r"])
    heard = capsys.readouterr()
    (line,) = [line for line in heard.err.splitlines() if "could not be drawn" in line]
    assert "r: a figure could not be drawn (ValueError: no such font): --resume" in line
    assert "| method" in heard.out and not list(Path("r").glob("curves*"))
    run.main([*SHORT, "--out", "r", "--resume"])
    assert Path("r/curves.png").exists()


@pytest.fixture
def as_script(monkeypatch, capsys):
    """`main` of a program -> its exit code and what it says on stderr."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run_as_script("x.py", main, "stopped")
        return ended.value.code, capsys.readouterr().err

    return call


def test_control_c_ends_a_program_with_a_word(as_script):
    assert as_script(lambda _: signal.raise_signal(signal.SIGINT)) == (130, "\nstopped\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--eps", "2"], "--eps is 2"),
        (["--dataset", "x" * 5000], "choose from"),  # a long value is cut
        (["--out", "x" * 300], "x" * 290),
        (["--out", "file/x"], "--out file/x cannot be written (Not a directory)"),
        (["--out", "/proc/no/such"], "/proc/no/such"),
    ],
)
def test_what_goes_wrong_is_one_sentence(arguments, words, workdir, as_script):
    (workdir / "file").touch()
    code, said = as_script(run.main, *SHORT, *arguments)
    assert code == 2 and said.startswith("x.py: ") and words in said
    assert said.count("\n") == 1 and len(said) < 1000
