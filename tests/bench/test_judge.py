"""bench/judge.py: models of a run, trained once more, under a stronger PGD."""

import json

import pytest

import run
from bench import judge
from l2l_ref.errors import InputError

TINY = ["--quick", "--steps", "4", "--seeds", "1", "--eval-samples", "40", "--batch-size", "32"]


@pytest.fixture
def finished(tmp_path, monkeypatch, small_data, few_candidates):
    monkeypatch.chdir(tmp_path)
    run.main([*TINY, "--episodes", "1", "--episode-steps", "4", "--unroll", "2", "--out", "r"])
    return tmp_path / "r"


def test_the_same_models_and_more_steps(finished, capsys):
    before = json.loads((finished / "summary.json").read_text())["table"]
    stronger = ["--steps", "7", "--restarts", "2", "--samples", "30"]
    judge.main(["r", "L2L", "Adam + L1", *stronger])
    assert "PGD-7 acc." in capsys.readouterr().out
    found = json.loads((finished / "judge.json").read_text())
    assert found["loss_difference"] == 0
    assert sorted(row["method"] for row in found["table"]) == ["Adam + L1", "L2L"]
    losses = {row["method"]: row["pgd_loss"] for row in before}
    for row in found["table"]:
        assert row["pgd_loss"] == losses[row["method"]]
        assert (row["pgd_accuracy"]["mean"] * 30) % 1 == pytest.approx(0, abs=1e-9)


def test_mistakes(finished):
    for arguments, words in (
        (["nowhere", "L2L"], "nowhere holds no run"),
        (["r", "Adamant"], "there is no 'Adamant' in that run"),
        (["r", "L2L", "--steps", "0"], "not a whole number"),
    ):
        with pytest.raises(InputError, match=words):
            judge.main(arguments)
    next((finished / "parts").glob("run-*")).unlink()
    with pytest.raises(InputError, match="r is not finished"):
        judge.main(["r", "L2L"])
    assert not (finished / "judge.json").exists()
