"""What a report says of runs: means by φ, paired differences, verdicts, what ended badly."""

import json
import math
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from l2l_ref.experiment import cli, report, tuning
from l2l_ref.experiment.config import complete
from l2l_ref.experiment.report import differences, summarise
from l2l_ref.experiment.setting import prepare

EVALUATED = {"pgd_loss": 1.5, "fgsm_loss": 1.25, "accuracy": 0.9, "pgd_accuracy": 0.5}


def run(method, phi=None, seed=0, fold=0, eps=0.1, loss=1.0, end="ok", **more):
    return {"eps": eps, "method": method, "fold": fold, "phi": phi, "seed": seed, "steps": [0, 1],
            "clean": [1.0, 1.0], "attacked": [2.0, loss], "clean_loss": 1.0, "attacked_loss": loss,
            "ms_per_step": 1.0, "seconds": 1.0, "trains_on": "clean", "end": end,
            **more}  # fmt: skip


@pytest.mark.parametrize(
    "values, mean, half_width",
    [
        # mean 3, deviation √7, t of two degrees of freedom 4.303
        ([1.0, 2.0, 6.0], 3.0, pytest.approx(4.303 * math.sqrt(7 / 3))),
        # that of ten holds for more
        ([0.0, 1.0] * 8, 0.5, pytest.approx(2.228 * math.sqrt(4 / 15 / 16))),
        ([1.0, 2.0], 1.5, None),
        ([math.nan], None, None),
        ([math.inf, -math.inf, 2.0], None, None),
    ],
)
def test_an_interval_by_hand(values, mean, half_width):
    assert report.interval(values) == {"mean": mean, "half_width": half_width}


@pytest.mark.parametrize(
    "runs, expected",
    [
        # seed 0: mean 2 over φ, less 1.5; seed 1: 5 less 2; differences 0.5 and 3: too few for an
        # interval. The seeds are in another order; a baseline less a φ says no more
        ([run("φ", phi=0, seed=0, loss=1.0), run("φ", phi=1, seed=0, loss=3.0),
          run("φ", phi=0, seed=1, loss=4.0), run("φ", phi=1, seed=1, loss=6.0),
          run("Adam", seed=1, loss=2.0), run("Adam", seed=0, loss=1.5)],
         {(0.1, "φ", "Adam"): (1.75, None)}),
        # folds are pairs of their own (-1, 3 and 1, whose deviation is 2), and ε never mix
        ([run("φ", phi=0, fold=0, loss=1.0), run("φ", phi=0, fold=1, loss=5.0),
          run("φ", phi=0, fold=1, seed=1, loss=3.0), run("Adam", fold=1, seed=1, loss=2.0),
          run("Adam", fold=0, loss=2.0), run("Adam", fold=1, loss=2.0),
          run("φ", phi=0, eps=0.2, loss=9.0), run("SGD", eps=0.2, loss=3.0)],
         {(0.1, "φ", "Adam"): (1.0, pytest.approx(4.303 * 2 / 3**0.5)),
          (0.2, "φ", "SGD"): (6.0, None)}),
        # methods of φ are compared both ways
        ([run("a", phi=0, loss=3.0), run("b", phi=0, loss=1.0)],
         {(0.1, "a", "b"): (2.0, None), (0.1, "b", "a"): (-2.0, None)}),
        # a run that diverged leaves no mean
        ([run("φ", phi=0, seed=0, loss=math.nan, end="diverged"), run("φ", phi=0, seed=1),
          run("Adam", seed=0), run("Adam", seed=1)], {(0.1, "φ", "Adam"): (None, None)}),
    ],
)  # fmt: skip
def test_differences_by_fold_and_seed_after_the_mean_over_phi(runs, expected):
    rows = differences(runs)
    found = {(row["eps"], row["method"], row["less"]): tuple(row["attacked_loss"].values())
             for row in rows}  # fmt: skip
    assert found == expected and len(rows) == len(expected)


def test_differences_of_the_metrics_of_classifiers():
    other = {"pgd_loss": 3.0, "accuracy": 0.7, "pgd_accuracy": 0.6}
    row, *none = differences([run("φ", phi=0, **EVALUATED), run("Adam", **other)])
    means = {name: row[name]["mean"] for name in other}
    assert means == pytest.approx({"pgd_loss": -1.5, "accuracy": 0.2, "pgd_accuracy": -0.1})
    assert not none


def cells(line: str) -> list[str]:
    """Of a line of a table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def lines_of(runs, config=None) -> list[str]:
    return report.table(summarise(runs), config or complete({}), "title", "footer").splitlines()


def test_means_by_phi():
    (row,) = summarise([
        run("φ", phi=1, seed=0, loss=5.0), run("φ", phi=0, seed=0, loss=1.0),
        run("φ", phi=0, seed=1, loss=2.0), run("φ", phi=1, seed=1, loss=8.0),
    ])  # fmt: skip
    assert row["attacked_loss"]["mean"] == 4.0
    assert row["attacked_loss"]["by_phi"] == [1.5, 6.5]
    (row,) = summarise([run("m", None, seed=0), run("m", None, seed=1)])
    assert "by_phi" not in row["attacked_loss"]


def test_losses_of_the_evaluation_take_the_place_of_the_curves():
    runs = [run("φ", phi=0, fgsm_accuracy=0.6, **EVALUATED)]
    assert summarise(runs)[0]["attacked_loss"]["mean"] == 1.0  # stays in summary.json
    text = lines_of(runs)
    assert cells(text[2]) == ["method", "trains on", "loss, PGD-7", "clean %", "PGD-20 %", "s"]
    assert cells(text[4]) == ["φ", "clean", "1.500", "90.0", "50.0", "1.000"]


def test_a_row_for_each_eps_the_lowest_loss_first():
    losses = {"a": 2.0, "b": 1.0, "c": math.nan}
    lines = lines_of(
        [run(name, eps=eps, loss=x) for eps in (0.1, 0.2) for name, x in losses.items()]
    )
    assert cells(lines[2])[0] == "ε" and [cells(line)[:2] for line in lines[4:10]] == [
        [eps, name] for eps in ("0.1", "0.2") for name in "bac"
    ]


def test_a_table_fits_a_hundred_columns():
    wide = {"pgd_loss": 12.5, "accuracy": 0.9, "pgd_accuracy": 0.5, "seconds": 120.5}
    runs = [run(name, seed=seed, trains_on="mixed, penalty",
                **{metric: value * (1 - 0.1 * seed) for metric, value in wide.items()})
            for name in tuning.candidates(complete({}), 0.1) for seed in (0, 1)]  # fmt: skip
    assert max(map(len, lines_of(runs))) <= 100


def test_the_figure_names_what_ended_badly(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (
        drawn.append(figure), savefig(figure, *args, **options)))  # fmt: skip
    runs = [run("Adam"), run("L2L", phi=0), run("L2L", phi=1, end="collapsed"), run("SGD"),
            run("Adam + L1", loss=99.0),
            run("Adam (attacked)", loss=0.0), run("Adam (attacked)", loss=4.0)]  # fmt: skip
    config = cli.parse(["--dataset", "mnist"])
    report.draw_curves(tmp_path / "x.png", runs, summarise(runs), config, "t", "f")
    (axes,) = drawn[0].axes
    assert axes.get_legend_handles_labels()[1] == [
        "L2L", "Adam", "Adam (attacked)", "Adam + L1"]  # fmt: skip
    assert drawn[0].get_supxlabel().startswith("not drawn: SGD\n")
    assert axes.get_title() == "ε = 0.1\nL2L: 1/2 collapsed\nAdam + L1: up to 99"
    low, high = axes.get_ylim()  # of means: a deviation may be cut
    assert 0 < low and high < 4 and axes.get_ylabel() == "loss under FGSM"
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_with_runs_that_diverged(tmp_path, monkeypatch):
    """All of it is written, in JSON that any reader takes; a figure says what it is of."""
    setting, feet = prepare(cli.parse(["--dataset", "quadratic"])), []
    for name in ("draw_curves", "draw_meta_training"):
        monkeypatch.setattr(report, name, lambda *told: feet.append(told[-1].splitlines()))
    runs = [run("Adam", seed=s, eps=0.0) for s in (0, 1)]
    runs.append(run("L2L-Transfer", phi=0, seed=0, eps=0.0, loss=math.nan, end="diverged"))
    runs += [run("L2L-Transfer", phi=0, seed=1, eps=0.0)]
    environment = dict.fromkeys(("git_commit", "device", "threads", "torch", "backend"))
    history = {"φ": {"loss": [1.0], "norm": [1.0], "episodes": [1.0], "checks": []}}
    found = SimpleNamespace(out=tmp_path, setting=setting, results=lambda: (runs, {}, history))
    text = report.write(found, environment, "python run.py")
    assert "1/2 diverged" in text and "not finite" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["method"]: row for row in summary["table"]}
    assert rows["L2L-Transfer"]["diverged"] == 1 and len(summary["runs"]) == 4
    assert summary["meta_training"] == {"φ": {"episodes": [1.0], "checks": []}}
    (row,) = summary["differences"]
    assert (row["method"], row["less"]) == ("L2L-Transfer", "Adam")
    assert row["attacked_loss"] == {"mean": None, "half_width": None}
    meta_training, curves = feet
    assert curves == ["100 steps, evaluated; mean ± sample deviation", *meta_training]
    assert meta_training[0].startswith("seeds: 5") and meta_training[-1] == "python run.py"


def test_verdicts_are_of_the_row_and_the_controls_of_a_recipe():
    def row(method, less, value, half):
        loss = {"mean": value, "half_width": half}
        return {"eps": 0.1, "method": method, "less": less, "pgd_loss": loss}

    rows = [
        row("L2L", "Adam, learned rate", -0.25, 0.1),
        row("L2L-Transfer (clean)", "Adam, learned rate", None, None),
        row("L2L", "Adam", -9.0, 0.1),  # no control
        row("L2L", "Adam (attacked)", 0.5, None),
        row("L2L-Transfer (clean)", "Adam", 2.0, 0.25),
        row("L2L-Transfer (clean)", "Adam + L1", 1.0, 0.125),
    ]
    of_clean = "ε 0.1: loss of L2L-Transfer (clean) minus that of "
    end = "(95 % over seeds, after the mean over φ"
    assert report.verdicts(rows, "paper") == (
        f"{of_clean}Adam +2.000 ± 0.250 {end})\n"
        "ε 0.1: loss of L2L minus that of Adam, learned rate -0.250 ± 0.100, Adam (attacked) "
        f"+0.500 {end})"
    )
    assert report.verdicts(rows, "robust") == (
        f"{of_clean}Adam, learned rate not finite, Adam +2.000 ± 0.250, "
        f"Adam + L1 +1.000 ± 0.125 {end})"
    )
    assert report.verdicts([], "paper") == ""
