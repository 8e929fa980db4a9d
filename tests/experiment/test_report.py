"""What a report says of runs: means by φ, paired differences, verdicts."""

import json
import math

import pytest
from matplotlib.figure import Figure

from l2l_ref.experiment import cli, report, summary, tuning
from l2l_ref.experiment.config import complete
from l2l_ref.experiment.figure import draw_curves
from l2l_ref.experiment.folder import write_json
from l2l_ref.experiment.protocol import Results
from l2l_ref.experiment.setting import prepare


def run(method, phi=None, seed=0, fold=0, eps=0.1, loss=1.0, end="ok", **more):
    return {"eps": eps, "method": method, "fold": fold, "phi": phi, "seed": seed, "steps": [0, 1],
            "clean": [1.0, 1.0], "attacked": [2.0, loss], "clean_loss": 1.0, "attacked_loss": loss,
            "ms_per_step": 1.0, "seconds": 1.0, "trains_on": "clean", "end": end,
            **more}  # fmt: skip


def results(*runs) -> Results:
    return Results(list(runs))


class TestStudent:
    def test_quantiles_of_the_tables(self):
        """Three digits, as printed in any table of the t distribution."""
        known = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 11: 2.201, 14: 2.145, 20: 2.086,
                 30: 2.042, 60: 2.000, 120: 1.980}  # fmt: skip
        assert {n: round(summary.student(n), 3) for n in known} == known
        assert summary.student(10**9) == pytest.approx(1.959964, abs=1e-6)

    def test_against_scipy(self):
        t = pytest.importorskip("scipy.stats").t
        for freedom in range(1, 200):
            assert summary.student(freedom) == pytest.approx(t.ppf(0.975, freedom), abs=6e-4)


class TestInterval:
    def test_by_hand(self):
        # mean 3, deviation √7, t of two degrees of freedom 4.303
        expected = {"mean": 3.0, "half_width": pytest.approx(4.303 * math.sqrt(7 / 3))}
        assert summary.interval([1.0, 2.0, 6.0]) == expected
        for values in ([1.5], [1.0, 2.0]):
            assert summary.interval(values) == {"mean": 1.5, "half_width": None}

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_has_none(self, value):
        for values in ([value], [1.0, value], [value, -value, 2.0]):
            assert summary.interval(values) == {"mean": None, "half_width": None}


class TestDifferences:
    def by_pair(self, *runs):
        rows = summary.differences(results(*runs))
        pairs = [(row["eps"], row["method"], row["less"]) for row in rows]
        assert len(set(pairs)) == len(pairs)
        return dict(zip(pairs, rows, strict=True))

    def test_pairs_by_seed_after_the_mean_over_phi(self):
        found = self.by_pair(
            # seed 0: mean 2 over φ, less 1.5; seed 1: 5 less 2; the seeds in another order
            run("φ", phi=0, seed=0, loss=1.0), run("φ", phi=1, seed=0, loss=3.0),
            run("φ", phi=0, seed=1, loss=4.0), run("φ", phi=1, seed=1, loss=6.0),
            run("Adam", seed=1, loss=2.0), run("Adam", seed=0, loss=1.5),
        )  # fmt: skip
        assert found.keys() == {(0.1, "φ", "Adam")}  # a baseline less a φ says no more
        expected = {"mean": 1.75, "half_width": None}  # differences 0.5 and 3: too few
        assert found[0.1, "φ", "Adam"]["attacked_loss"] == expected

    def test_folds_are_pairs_of_their_own_and_eps_never_mix(self):
        found = self.by_pair(
            run("φ", phi=0, fold=0, loss=1.0), run("φ", phi=0, fold=1, loss=5.0),
            run("φ", phi=0, fold=1, seed=1, loss=3.0), run("Adam", fold=1, seed=1, loss=2.0),
            run("Adam", fold=0, loss=2.0), run("Adam", fold=1, loss=2.0),
            run("φ", phi=0, eps=0.2, loss=9.0), run("SGD", eps=0.2, loss=3.0),
        )  # fmt: skip
        assert found.keys() == {(0.1, "φ", "Adam"), (0.2, "φ", "SGD")}
        half = pytest.approx(4.303 * 2 / 3**0.5)  # of -1, 3 and 1, whose deviation is 2
        assert found[0.1, "φ", "Adam"]["attacked_loss"] == {"mean": 1.0, "half_width": half}
        only = {"mean": 6.0, "half_width": None}
        assert found[0.2, "φ", "SGD"]["attacked_loss"] == only

    def test_methods_of_phi_are_compared_both_ways(self):
        found = self.by_pair(run("a", phi=0, loss=3.0), run("b", phi=0, loss=1.0))
        assert found[0.1, "a", "b"]["attacked_loss"]["mean"] == 2.0
        assert found[0.1, "b", "a"]["attacked_loss"]["mean"] == -2.0

    @pytest.mark.parametrize(
        "runs, mean",
        [
            # only seeds that both have count
            ([run("φ", phi=0, seed=0, loss=1.0), run("φ", phi=0, seed=1, loss=2.0),
              run("Adam", seed=1, loss=0.5), run("Adam", seed=2, loss=9.0)], 1.5),
            # a run that diverged leaves no mean
            ([run("φ", phi=0, seed=0, loss=math.nan, end="diverged"), run("φ", phi=0, seed=1),
              run("Adam", seed=0), run("Adam", seed=1)], None),
        ],
    )  # fmt: skip
    def test_what_is_not_there(self, runs, mean):
        found = self.by_pair(*runs)
        assert found.keys() == {(0.1, "φ", "Adam")}
        assert found[0.1, "φ", "Adam"]["attacked_loss"] == {"mean": mean, "half_width": None}

    def test_the_metrics_of_classifiers(self):
        more = {"pgd_loss": 1.0, "accuracy": 0.9, "pgd_accuracy": 0.5}
        other = {"pgd_loss": 3.0, "accuracy": 0.7, "pgd_accuracy": 0.6}
        found = self.by_pair(run("φ", phi=0, **more), run("Adam", **other))
        row = found[0.1, "φ", "Adam"]
        means = {name: row[name]["mean"] for name in more}
        assert means == pytest.approx({"pgd_loss": -2, "accuracy": 0.2, "pgd_accuracy": -0.1})
        found = self.by_pair(run("φ", phi=0), run("Adam"))  # quadratics
        assert found[0.1, "φ", "Adam"].keys() == {"eps", "method", "less", "attacked_loss"}


def cells(line: str) -> list[str]:
    """Of a line of a table."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


class TestSummary:
    def test_mean_and_sample_deviation_by_hand(self):
        losses = enumerate((1.0, 2.0, 6.0))
        (row,) = summary.summarise(results(*(run("m", 0, seed, loss=x) for seed, x in losses)))
        assert row["attacked_loss"] == {"mean": 3.0, "std": pytest.approx(7**0.5)}
        assert row["collapsed"] == row["diverged"] == 0 and row["runs"] == 3

    def test_collapsed_and_diverged_runs_are_counted_and_named(self):
        ends = [("collapsed", 2.3), ("ok", 1.0), ("diverged", math.nan)]
        runs = [run("m", 0, seed, loss=x, end=end) for seed, (end, x) in enumerate(ends)]
        (row,) = summary.summarise(results(*runs))
        assert (row["collapsed"], row["diverged"]) == (1, 1)
        text = report.table([row], complete({}), "title", "footer")
        assert "1/3 collapsed, 1/3 diverged" in text and "not finite" in text

    def test_means_by_phi(self):
        (row,) = summary.summarise(results(
            run("φ", phi=1, seed=0, loss=5.0), run("φ", phi=0, seed=0, loss=1.0),
            run("φ", phi=0, seed=1, loss=2.0), run("φ", phi=1, seed=1, loss=8.0),
        ))  # fmt: skip
        assert row["attacked_loss"]["mean"] == 4.0
        assert row["attacked_loss"]["by_phi"] == [1.5, 6.5]
        (row,) = summary.summarise(results(run("φ", phi=0, seed=0), run("φ", phi=0, seed=1)))
        assert "by_phi" not in row["attacked_loss"]
        (row,) = summary.summarise(results(run("Adam", seed=0), run("Adam", seed=1)))
        assert "by_phi" not in row["attacked_loss"]

    def test_judged_losses_take_the_place_of_the_curves(self):
        more = {"pgd_loss": 1.5, "fgsm_loss": 1.25, "accuracy": 0.9, "pgd_accuracy": 0.5}
        (row,) = summary.summarise(results(run("φ", phi=0, fgsm_accuracy=0.6, **more)))
        assert row["attacked_loss"]["mean"] == 1.0  # stays in summary.json
        text = report.table([row], complete({}), "title", "footer").splitlines()
        assert cells(text[2]) == [
            "method",
            "trains on",
            "loss, PGD-7",
            "clean %",
            "PGD-20 %",
            "s",
        ]
        assert cells(text[4]) == ["φ", "clean", "1.500", "90.0", "50.0", "1.000"]

    def test_a_row_for_each_eps_the_lowest_loss_first(self):
        losses = {"a": 2.0, "b": 1.0, "c": math.nan}
        runs = [run(name, eps=eps, loss=x) for eps in (0.1, 0.2) for name, x in losses.items()]
        lines = report.table(summary.summarise(results(*runs)), complete({}), "t", "f").splitlines()
        assert cells(lines[2])[0] == "ε" and [cells(line)[:2] for line in lines[4:10]] == [
            [eps, name] for eps in ("0.1", "0.2") for name in "bac"
        ]

    def test_it_fits_a_hundred_columns(self):
        setting = complete({})
        names = [label for label in tuning.candidates(setting, 0.1)]
        judged = {"accuracy": 0.9, "pgd_accuracy": 0.5, "seconds": 120.5}
        more = {"pgd_loss": 12.5, **judged, "trains_on": "mixed, penalty"}
        runs = [run(name, seed=seed, **{k: v if k == "trains_on" else v * (1 - 0.1 * seed)
                for k, v in more.items()}) for name in names for seed in (0, 1)]  # fmt: skip
        text = report.table(summary.summarise(results(*runs)), setting, "title", "footer")
        assert max(map(len, text.splitlines())) <= 100


def test_the_figure_names_what_ended_badly(tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (
        drawn.append(figure), savefig(figure, *args, **options)))  # fmt: skip
    runs = [run("Adam"), run("L2L", phi=0), run("L2L", phi=1, end="collapsed"), run("SGD")]
    config = cli.parse(["--dataset", "mnist"])
    draw_curves(tmp_path / "x.png", runs, summary.summarise(results(*runs)), config, "t", "f")
    (axes,) = drawn[0].axes
    assert axes.get_legend_handles_labels()[1] == ["L2L", "Adam"]
    assert drawn[0].get_supxlabel().startswith("not drawn: SGD\n")
    (note,) = axes.texts
    assert note.get_text() == "L2L: 1/2 collapsed"
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_with_runs_that_diverged(tmp_path):
    """All of it is written, in JSON that any reader takes."""
    setting = prepare(cli.parse(["--dataset", "quadratic"]))
    runs = [run("Adam", seed=s, eps=0.0) for s in (0, 1)]
    runs.append(run("L2L-Transfer", phi=0, seed=0, eps=0.0, loss=math.nan, end="diverged"))
    runs += [run("L2L-Transfer", phi=0, seed=1, eps=0.0)]
    environment = dict.fromkeys(("git_commit", "device", "threads", "torch", "backend"))
    text = report.write(tmp_path, results(*runs), setting, environment, "python run.py")
    assert "1/2 diverged" in text and "not finite" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["method"]: row for row in summary["table"]}
    assert rows["L2L-Transfer"]["diverged"] == 1 and len(summary["runs"]) == 4
    (row,) = summary["differences"]
    assert (row["method"], row["less"]) == ("L2L-Transfer", "Adam")
    assert row["attacked_loss"] == {"mean": None, "half_width": None}


def test_verdicts_are_of_the_row_and_the_controls_of_a_recipe():
    def row(method, less, value, half):
        loss = {"mean": value, "half_width": half}
        return {"eps": 0.1, "method": method, "less": less, "pgd_loss": loss}

    rows = [
        row("L2L", "Adam, learned rate", -0.25, 0.1),
        row("L2L-Transfer (clean)", "Adam, learned rate", None, None),
        row("L2L", "Adam", -9.0, 0.1),  # no control
        row("L2L", "Adam (attacked) + L1", 0.5, None),
        row("L2L-Transfer (clean)", "Adam", 2.0, 0.25),
        row("L2L-Transfer (clean)", "Adam + L1", 1.0, 0.125),
    ]
    of_clean = "ε 0.1: loss of L2L-Transfer (clean) minus that of "
    end = "(95 % over seeds, after the mean over φ"
    assert summary.verdicts(rows, "paper") == (
        f"{of_clean}Adam +2.000 ± 0.250 {end})\n"
        "ε 0.1: loss of L2L minus that of Adam, learned rate -0.250 ± 0.100, Adam (attacked) + L1 "
        f"+0.500 {end})"
    )
    assert summary.verdicts(rows, "robust") == (
        f"{of_clean}Adam, learned rate not finite, Adam +2.000 ± 0.250, "
        f"Adam + L1 +1.000 ± 0.125 {end})"
    )
    assert summary.verdicts([], "paper") == ""


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, 1.0]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.0]}
