"""The scripts of tools/ that concern docs/: every result there can be made again, and drawn."""

import json
import shlex
from pathlib import Path

import pytest

from l2l_ref.experiment import cli
from tools import frontier, results

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_result_has_a_command_that_is_taken():
    commands = results.commands()
    assert set(commands) == {path.parent.name for path in DOCS.glob("*/config.json")}
    for name, words in commands.items():
        config = cli.parse(shlex.split(words))
        saved = json.loads((DOCS / name / "config.json").read_text())["settings"]
        fields = ["dataset", "attack", "recipe", "steps", "seeds", "meta_seeds"]
        fields += ["p", "episodes"] * (not config.load)  # a loaded φ brings its own along
        for field in fields:
            assert getattr(config, field) == saved[field], (name, field)


def test_a_result_that_is_not_there():
    with pytest.raises(SystemExit, match="choose one of .*mnist-fgsm-paper"):
        results.main("mnist-fgsm-papers")


def test_frontier(tmp_path):
    frontier.draw(tmp_path / "f.png", [DOCS / "mnist-fgsm-robust"])
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
