"""bench/judge.py: models of a run under a stronger PGD; bench/unseen.py: networks that are new."""

import json
import shutil

import pytest
from conftest import LOADING, TINY

import run
from bench import judge, review, unseen
from l2l_ref import evaluate
from l2l_ref.errors import InputError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "r"


@pytest.fixture
def finished(workdir, small_data, few_candidates, whole):
    """A copy of the one run of this file."""
    if not whole.exists():
        run.main([*TINY, "--attack", "pgd", "--attack-steps", "2", "--out", "r"])
        shutil.copytree("r", whole)
    else:
        shutil.copytree(whole, "r")
    return workdir / "r"


def test_the_same_models_and_more_steps(finished, capsys, monkeypatch):
    judged, robust_accuracy = set(), evaluate.robust_accuracy

    def spy(model, images, attack, restarts=1):
        several = [attack] if callable(attack) else attack
        judged.update(("steps" in a.keywords and a.keywords["steps"], restarts, len(images))
                      for a in several if hasattr(a, "keywords"))  # fmt: skip
        return robust_accuracy(model, images, attack, restarts=restarts)

    monkeypatch.setattr(evaluate, "robust_accuracy", spy)
    before = json.loads((finished / "summary.json").read_text())["table"]
    stronger = ["--steps", "7", "--restarts", "2", "--samples", "30"]
    judge.main(["r", "L2L", "Adam + L1", *stronger])
    assert "PGD-7 %" in capsys.readouterr().out
    found = json.loads((finished / "judge.json").read_text())
    assert found["loss_difference"] == 0
    assert judged == {(7, 2, 30), (False, 1, 30)}  # PGD on both losses, and FGSM
    assert sorted(row["method"] for row in found["table"]) == ["Adam + L1", "L2L"]
    losses = {row["method"]: row["pgd_loss"] for row in before}
    for row in found["table"]:
        assert row["pgd_loss"] == losses[row["method"]]
        assert (row["pgd_accuracy"]["mean"] * 30) % 1 == pytest.approx(0, abs=1e-9)


def test_mistakes_of_judge(finished):
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


def test_the_page_of_a_reviewer(finished, capsys):
    review.main(["r", "Adam + L1", "--samples", "30"])
    assert "Adam + L1: none " in capsys.readouterr().out
    assert (finished / "review-adam-l1.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((finished / "review-adam-l1.json").read_text())
    assert (found["samples"], found["data"]) == (30, "stand-in")
    assert "python -m bench.review" in found["command"] and "transfer" in found["by_attack"]
    with pytest.raises(InputError, match="unrecognized arguments: --restarts"):
        review.main(["r", "Adam + L1", "--restarts", "2"])


def test_each_network_has_a_table_of_two_rows(finished, capsys):
    capsys.readouterr()
    unseen.main(["r/meta_optimizer.pt", *LOADING, "--out", "u"])
    printed = capsys.readouterr().out
    for name in unseen.NETWORKS:
        assert f"{name}; Adam + L1 tuned on it; 4 steps" in printed
    cells = [line.split("|")[1].strip() for line in printed.splitlines() if line.count("|") > 2]
    rows = [name for name in cells if name in unseen.METHODS]
    assert sorted(rows) == sorted([*unseen.METHODS] * len(unseen.NETWORKS))
    # results of another φ are not found again under its name
    with pytest.raises(InputError, match="--out u is not empty"):
        unseen.main(["r/meta_optimizer.pt", *LOADING, "--out", "u"])


def test_help_of_unseen(capsys):
    unseen.main(["--help"])
    assert "python -m bench.unseen" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name the meta_optimizer.pt"),
        (["--steps", "4"], "name the meta_optimizer.pt"),
        (["x.pt", "--dataset", "quadratic"], "--dataset is quadratic"),
        (["x.pt", "--resume"], "--resume is of run.py"),
        (["x.pt", *LOADING], "x.pt does not exist"),
    ],
)
def test_mistakes_of_unseen(workdir, small_data, arguments, words):
    with pytest.raises(InputError, match=words):
        unseen.main(arguments)
    assert not list(workdir.iterdir())


def never(model, x, y, eps):
    return x


def test_another_attack_judges(finished, capsys):
    before = json.loads((finished / "summary.json").read_text())["table"]
    clean = {row["method"]: row["accuracy"]["mean"] for row in before}
    judge.main([str(finished), "Adam", "--samples", "40", "--attack", f"{__name__}:never"])
    found = json.loads((finished / "judge.json").read_text())
    assert found["loss_difference"] == 0
    (row,) = found["table"]
    assert row["pgd_accuracy"]["mean"] == clean["Adam"] and "never %" in capsys.readouterr().out
    with pytest.raises(InputError, match="--eval-attack is fgsm: it must be pgd, or MODULE"):
        judge.main([str(finished), "Adam", "--attack", "fgsm"])
