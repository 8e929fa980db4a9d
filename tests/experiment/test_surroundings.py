"""What surrounds a run: its streams, matplotlib's settings, the names of its folders."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import run
from l2l_ref.errors import InputError
from l2l_ref.experiment import figure

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--dataset", "quadratic", "--quick", "--episodes", "2", "--steps", "10", "--seeds", "1",
         "--jobs", "1"]  # fmt: skip
NOTEBOOK = """
import runpy, sys
class Stream:
    def __init__(self, file): self.file = file
    def write(self, text): return self.file.write(text)
    def flush(self): self.file.flush()
sys.stdout, sys.stderr = Stream(sys.__stdout__), Stream(sys.__stderr__)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(arguments, workdir, shell=None, **environment):
    command = [*(shell or []), sys.executable, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=workdir, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments, shell, environment",
    [
        (["-c", NOTEBOOK, ROOT / "run.py"], None, {"MPLBACKEND": "no-such-backend"}),
        ([ROOT / "run.py"], ["sh", "-c", 'exec "$@" >&-', "sh"], {"MATPLOTLIBRC": "broken"}),
    ],
    ids=["notebook, MPLBACKEND", "no stdout, matplotlibrc"],
)
def test_all_of_it_is_there(arguments, shell, environment, workdir):
    (workdir / "broken").write_text("text.usetex: True\nfont.size: 1e9\n")
    done = script([*map(str, arguments), *SHORT, "--out", "r"], workdir, shell, **environment)
    assert done.returncode == 0, done.stderr
    assert {"curves.png", "summary.json"} <= {path.name for path in Path("r").iterdir()}


def test_dollars_and_a_tilde(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir / "home"))
    run.main([*SHORT, "--out=~/c$/lab_{1$"])
    assert (workdir / "home" / "c$" / "lab_{1$" / "curves.png").exists()
    assert not (workdir / "~").exists()


def test_bytes_that_are_no_text(workdir, few_candidates):
    run.main([*SHORT, "--out", os.fsdecode(b"r\xff")])
    assert os.path.exists(b"r\xff/curves.png")
    for part, n in (("train", 20), ("test", 4)):
        for label in range(10):
            place = Path(os.fsdecode(b"donn\xe9es"), "mnist", part, str(label))
            place.mkdir(parents=True)
            for i in range(n):
                Image.new("L", (28, 28), 20 * label + i).save(place / f"{i}.png")
    options = ["--quick", "--steps", "4", "--episodes", "1", "--batch-size", "16", "--jobs", "1"]
    run.main([*options, "--data-dir", os.fsdecode(b"donn\xe9es"), "--out", "a"])
    assert Path("a/curves.png").exists()


def test_without_a_name_and_a_home(workdir, monkeypatch):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    run.main([*SHORT, "--out", "r"])
    assert Path("r/curves.png").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
def test_a_full_disk_behind_stdout_is_named(workdir):
    shell = ["sh", "-c", 'exec "$@" > /dev/full', "sh"]
    done = script([str(ROOT / "run.py"), *SHORT, "--out", "r"], workdir, shell)
    words = "run.py: No space left on device (stopped; --resume continues)\n"
    assert (done.returncode, done.stderr) == (2, words)


@pytest.mark.parametrize("flag", ["--out", "--load", "--data-dir"])
def test_no_path_at_all(flag, workdir):
    with pytest.raises(InputError, match=f"argument {flag}: it is empty"):
        run.main([*SHORT, flag, ""])


def test_a_figure_that_fails_is_one_line(workdir, monkeypatch, capsys):
    def failing(*_):
        raise ValueError("no such font\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(figure, "marks", failing)
        run.main([*SHORT, "--out", "r"])
    heard = capsys.readouterr()
    (line,) = [line for line in heard.err.splitlines() if "could not be drawn" in line]
    assert "r/curves.png could not be drawn (ValueError: no such font): --resume" in line
    assert "| method" in heard.out and not list(Path("r").glob("curves*"))
    run.main([*SHORT, "--out", "r", "--resume"])
    assert Path("r/curves.png").exists()
