"""bench/unseen.py: networks that φ has not met, each beside its own Adam + L1."""

import pytest

import run
from bench import unseen
from l2l_ref.errors import InputError

TINY = ["--quick", "--steps", "4", "--seeds", "1", "--eval-samples", "40", "--batch-size", "32"]


@pytest.fixture
def phi(tmp_path, monkeypatch, small_data, few_candidates):
    monkeypatch.chdir(tmp_path)
    run.main([*TINY, "--episodes", "1", "--episode-steps", "4", "--unroll", "2", "--out", "r"])
    return "r/meta_optimizer.pt"


def test_each_network_has_a_table_of_two_rows(phi, capsys):
    capsys.readouterr()
    unseen.main([phi, *TINY, "--out", "u"])
    printed = capsys.readouterr().out
    for name in unseen.NETWORKS:
        assert f"{name}; Adam + L1 tuned on it; 4 steps" in printed
    rows = [line.split("|")[2].strip() for line in printed.splitlines() if line.startswith("| 0.1")]
    assert sorted(rows) == sorted([*unseen.METHODS] * len(unseen.NETWORKS))
    # results of another φ are not found again under its name
    with pytest.raises(InputError, match="--out u is not empty"):
        unseen.main([phi, *TINY, "--out", "u"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name the meta_optimizer.pt"),
        (["--steps", "4"], "name the meta_optimizer.pt"),
        (["x.pt", "--dataset", "quadratic"], "--dataset is quadratic"),
        (["x.pt", "--resume"], "--resume is of run.py"),
        (["x.pt", *TINY], "x.pt does not exist"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, small_data, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        unseen.main(arguments)
    assert not list(tmp_path.iterdir())
