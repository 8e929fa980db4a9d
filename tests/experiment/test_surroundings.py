"""What surrounds a run: its streams, matplotlib's settings, the names of its folders."""

import os
from pathlib import Path

import pytest
from PIL import Image
from test_jobs import SHORT, end, start

import run
from l2l_ref.experiment import figure

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


@pytest.mark.parametrize(
    "options, environment",
    [
        ({"python": ["-c", NOTEBOOK]}, {"MPLBACKEND": "no-such-backend"}),
        ({"shell": ["sh", "-c", 'exec "$@" >&-', "sh"]}, {"MATPLOTLIBRC": "broken"}),
    ],
    ids=["notebook, MPLBACKEND", "no stdout, matplotlibrc"],
)
def test_all_of_it_is_there(options, environment, workdir):
    (workdir / "broken").write_text("text.usetex: True\nfont.size: 1e9\n")
    end(start(*SHORT, "--out", "r", cwd=workdir, **options, **environment))
    assert {"curves.png", "summary.json"} <= {path.name for path in Path("r").iterdir()}


def test_dollars_and_a_tilde(workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(workdir / "home"))
    run.main([*SHORT, "--out=~/c$/lab_{1$"])
    assert (workdir / "home" / "c$" / "lab_{1$" / "curves.png").exists()
    assert not (workdir / "~").exists()


def test_bytes_that_are_no_text(workdir, few_candidates):
    for part, n in (("train", 20), ("test", 4)):
        for label in range(10):
            place = Path(os.fsdecode(b"donn\xe9es"), "mnist", part, str(label))
            place.mkdir(parents=True)
            for i in range(n):
                Image.new("L", (28, 28), 20 * label + i).save(place / f"{i}.png")
    run.main(["--quick", "--steps", "4", "--episodes", "1", "--batch-size", "16", "--jobs", "1",
              "--data-dir", os.fsdecode(b"donn\xe9es"),
              "--out", os.fsdecode(b"r\xff")])  # fmt: skip
    assert os.path.exists(b"r\xff/curves.png")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is full")
def test_a_full_disk_behind_stdout_is_named(workdir):
    shell = ["sh", "-c", 'exec "$@" > /dev/full', "sh"]
    said = end(start(*SHORT, "--out", "r", cwd=workdir, shell=shell), 2)
    assert said == "run.py: No space left on device (stopped; --resume continues)\n"


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
