"""bench/reevaluate.py and review.py: models of a finished run once more."""

import json
import shutil

import pytest
from conftest import TINY

import run
from bench import reevaluate, review
from l2l_ref import evaluate
from l2l_ref.errors import InputError


@pytest.fixture
def finished(workdir, small_data, few_candidates, tmp_path_factory):
    """A copy of the one run of this file."""
    whole = tmp_path_factory.getbasetemp() / "whole"
    if not whole.exists():
        run.main([*TINY, "--attack", "pgd", "--attack-steps", "2", "--out", str(whole)])
    shutil.copytree(whole, "r")
    return workdir / "r"


def test_the_same_models_and_more_steps(finished, capsys, monkeypatch):
    evaluated, robust_accuracy = set(), evaluate.robust_accuracy

    def spy(model, images, attack, restarts=1):
        several = [attack] if callable(attack) else attack
        evaluated.update(("steps" in a.keywords and a.keywords["steps"], restarts, len(images))
                      for a in several if hasattr(a, "keywords"))  # fmt: skip
        return robust_accuracy(model, images, attack, restarts=restarts)

    monkeypatch.setattr(evaluate, "robust_accuracy", spy)
    before = json.loads((finished / "summary.json").read_text())["table"]
    reevaluate.main("r --steps 7 --restarts 2 --samples 30".split() + ["L2L", "Adam + L1"])
    assert "PGD-7 %" in capsys.readouterr().out
    found = json.loads((finished / "reevaluation.json").read_text())
    assert found["loss_difference"] == 0
    assert evaluated == {(7, 2, 30), (False, 1, 30)}  # PGD on both losses, and FGSM
    assert sorted(row["method"] for row in found["table"]) == ["Adam + L1", "L2L"]
    losses = {row["method"]: row["pgd_loss"] for row in before}
    for row in found["table"]:
        assert row["pgd_loss"] == losses[row["method"]]


def test_mistakes(finished):
    for arguments, words in (
        (["nowhere", "L2L"], "nowhere holds no run"),
        (["r", "Adamant"], "that run has no 'Adamant'"),
    ):
        with pytest.raises(InputError, match=words):
            reevaluate.main(arguments)
    next((finished / "parts").glob("run-*")).unlink()
    with pytest.raises(InputError, match="r is not finished"):
        reevaluate.main(["r", "L2L"])
    assert not (finished / "reevaluation.json").exists()


def test_the_page_of_a_reviewer(finished, capsys):
    review.main(["r", "Adam + L1", "--samples", "30"])
    assert "Adam + L1: none " in capsys.readouterr().out
    assert (finished / "review-adam-l1.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((finished / "review-adam-l1.json").read_text())
    assert (found["samples"], found["environment"]["data"]) == (30, "stand-in")
    assert "python -m bench.review" in found["command"] and "transfer" in found["by_attack"]


def never(model, x, y, eps):
    return x


def test_another_attack(finished, capsys):
    before = json.loads((finished / "summary.json").read_text())["table"]
    clean = {row["method"]: row["accuracy"]["mean"] for row in before}
    reevaluate.main([str(finished), "Adam", "--samples", "40", "--attack", f"{__name__}:never"])
    found = json.loads((finished / "reevaluation.json").read_text())
    assert found["loss_difference"] == 0
    (row,) = found["table"]
    assert row["pgd_accuracy"]["mean"] == clean["Adam"] and "never %" in capsys.readouterr().out
