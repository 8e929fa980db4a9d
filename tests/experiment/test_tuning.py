"""What is chosen without the test: the baselines' grids on one seed and more, and φ's grid."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
from conftest import TINY, zeroing

from l2l_ref.experiment import cli, tuning
from l2l_ref.experiment.progress import Progress
from l2l_ref.experiment.protocol import Experiment
from l2l_ref.experiment.setting import Fold, folds, prepare
from l2l_ref.experiment.trial import Trial
from l2l_ref.experiment.tuning import Grid, Search, sgd
from l2l_ref.transfer import Method

QUIET = Progress(lambda line: None, lambda total, label: lambda done, loss: None)


def outcome(loss, collapsed=False):
    return {"collapsed": collapsed, "loss": loss}


def computed(pieces, parts=None) -> dict:
    """All pieces in an order that their needs allow."""
    parts = {} if parts is None else parts
    for piece in pieces:
        assert set(piece.needs) <= parts.keys()
        parts[piece.name] = json.loads(json.dumps(piece.compute(parts)))
    return parts


@pytest.fixture
def choose(monkeypatch):
    """{settings: outcomes by seed} -> what is chosen of them, and (settings, seed) as they ran."""
    setting = prepare(cli.parse(["--dataset", "quadratic"]))

    def choose(outcomes, tune_seeds=2):
        ran = []

        def validate(setting, method, fold, eps, seed):
            assert (fold.number, eps, setting.config.steps) == (0, 0.2, 100)  # all are whole runs
            ran.append((method.label, seed))
            return outcomes[method.label][seed]

        monkeypatch.setattr(tuning, "validate", validate)
        own = replace(setting, config=replace(setting.config, tune_seeds=tune_seeds))
        methods = {name: Method(name, partial(sgd, 0.1)) for name in outcomes}
        grid = Grid(own, Fold(0, *[None] * 5), 0.2, "a baseline", methods)
        parts = computed(grid.pieces())
        assert set(grid.needs()) == parts.keys()
        assert grid.method(parts) is methods[grid.chosen(parts)]
        return grid.chosen(parts), ran

    return choose


class TestGrid:
    def test_all_run_once_and_the_best_third_on_the_other_seeds(self, choose):
        losses = {"a": [5.0, 0.0, 0.0], "b": [1.0, 4.0, 4.0], "c": [2.0, 2.0, 2.0],
                  "d": [6.0, 0.0, 0.0], "e": [3.0, 0.0, 0.0]}  # fmt: skip
        outcomes = {name: [outcome(loss) for loss in of] for name, of in losses.items()}
        chosen, ran = choose(outcomes, tune_seeds=3)
        # of five candidates two stay, b and c; c has the better mean, 2 against 3
        assert chosen == "c"
        assert ran[:5] == [(name, 0) for name in "abcde"]
        assert sorted(ran[5:]) == [("b", 1), ("b", 2), ("c", 1), ("c", 2)]

    @pytest.mark.parametrize("count, stay", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
    def test_a_third_is_rounded_up(self, choose, count, stay):
        outcomes = {str(i): [outcome(i), outcome(i)] for i in range(count)}
        chosen, ran = choose(outcomes)
        assert chosen == "0" and ran[count:] == [(str(i), 1) for i in range(stay)]

    def test_one_seed_is_one_run_each(self, choose):
        outcomes = {"a": [outcome(2.0)], "b": [outcome(1.0)], "c": [outcome(3.0)]}
        assert choose(outcomes, tune_seeds=1) == ("b", [("a", 0), ("b", 0), ("c", 0)])

    def test_the_mean_is_over_all_seeds(self, choose):
        """The first seed counts too, and a dropped candidate's low loss does not."""
        losses = {"a": [1.0, 9.0], "b": [4.0, 5.0], "c": [4.25, 0.0], "d": [8.0, 0.0]}
        chosen, _ = choose({name: [outcome(x) for x in of] for name, of in losses.items()})
        assert chosen == "b"  # 4.5 against 5; c's 4.25 is of one seed

    @pytest.mark.parametrize("tune_seeds", [1, 2])
    def test_a_collapsed_one_is_never_chosen(self, choose, tune_seeds):
        outcomes = {"a": [outcome(0.1, True)] * 2, "b": [outcome(3.0)] * 2, "c": [outcome(4.0)] * 2,
                    "d": [outcome(5.0)] * 2}  # fmt: skip
        chosen, ran = choose(outcomes, tune_seeds)
        assert chosen == "b" and ("a", 1) not in ran

    def test_nor_one_that_collapses_on_another_seed(self, choose):
        outcomes = {"a": [outcome(1.0), outcome(0.1, True)], "b": [outcome(3.0)] * 2,
                    "c": [outcome(4.0)] * 2, "d": [outcome(5.0)] * 2}  # fmt: skip
        assert choose(outcomes)[0] == "b"

    def test_where_all_of_the_best_third_collapse_one_that_was_dropped_is_chosen(self, choose):
        outcomes = {"a": [outcome(1.0), outcome(0.1, True)], "b": [outcome(3.0)] * 2,
                    "c": [outcome(4.0)] * 2}  # fmt: skip
        assert choose(outcomes) == ("b", [("a", 0), ("b", 0), ("c", 0), ("a", 1)])

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_one_that_is_not_finite_comes_last_but_before_a_collapse(self, choose, loss):
        fine, broken = [outcome(9.0)] * 2, [outcome(loss)] * 2
        assert choose({"a": broken, "b": fine, "c": broken, "d": broken})[0] == "b"
        assert choose({"a": [outcome(1.0, True)] * 2, "b": broken})[0] == "b"

    def test_names_and_costs(self):
        setting = prepare(cli.parse([*TINY, "--dataset", "quadratic"]))
        setting = replace(setting, config=replace(setting.config, tune_seeds=2))
        methods = {"x": Method("", None), "y": Method("", None, penalty=1.0)}
        grid = Grid(setting, Fold(1, *[None] * 5), 0.2, "Adam", methods)
        pieces = {piece.name: piece for piece in grid.pieces()}
        assert list(pieces) == [
            "tune-fold1-eps0.2-Adam-x-seed0",
            "tune-fold1-eps0.2-Adam-y-seed0",
            "tune-fold1-eps0.2-Adam-place-0-seed1",
        ]
        assert [piece.cost for piece in pieces.values()] == [4, 12, 12]
        assert {piece.kind for piece in pieces.values()} == {"Adam"}
        assert [len(piece.needs) for piece in pieces.values()] == [0, 0, 2]


def test_costs_in_gradients():
    """Clean 1, its penalty 3, under attack as many as the attack takes and one more."""

    def cost(attack, **options):
        arguments = [*TINY, "--attack", attack, "--attack-steps", "5"]
        return tuning.cost(cli.parse(arguments), **options) / 4

    assert [cost("pgd", alpha=alpha) for alpha in (1.0, 0.5, 0.0)] == [1, 7, 6]
    assert [cost("fgsm", alpha=alpha) for alpha in (1.0, 0.5, 0.0)] == [1, 3, 2]
    assert cost("pgd", penalty=1.0) == 3 and cost("pgd", penalty=1.0, alpha=0.5) == 9
    assert cost("none") == 1


class TestCandidates:
    def grids(self, *arguments, eps=0.1):
        return tuning.candidates(cli.parse([*arguments]), eps)

    def test_of_mnist(self):
        found = self.grids()
        counts = {label: len(grid) for label, grid in found.items()}
        assert counts == {"Adam": 6, "SGD": 5, "Adam + L1": 12, "Adam + L1, cosine": 12,
                          "Adam + penalty + L1": 12, "Adam (attacked)": 6,
                          "Adam (attacked) + L1": 3}  # fmt: skip
        for label, grid in found.items():
            for method in grid.values():
                assert method.label == label and method.cosine == label.endswith("cosine")
                assert (method.alpha < 1) == ("attacked" in label)
                assert (method.penalty > 0) == ("penalty" in label)
        method = found["Adam + penalty + L1"]["lr 0.003, L1 0.001, λ/ε 1.5"]
        assert (method.l1, method.penalty) == (1e-3, pytest.approx(0.15))
        method = found["Adam (attacked) + L1"]["lr 0.01, L1 0.001"]
        assert (method.optimizer.args, method.l1, method.alpha) == ((0.01,), 1e-3, 0.5)

    def test_of_others(self):
        cifar = self.grids("--dataset", "cifar10")
        assert "Adam + L1, cosine" not in cifar and len(cifar["Adam + penalty + L1"]) == 6
        assert set(self.grids("--attack", "none")) == {"Adam", "SGD", "Adam + L1",
                                                       "Adam + L1, cosine"}  # fmt: skip
        quadratic = self.grids("--dataset", "quadratic")
        assert {label: len(grid) for label, grid in quadratic.items()} == {"Adam": 6, "SGD": 5}
        assert len(self.grids("--quick")["Adam"]) == 3  # every other one

    def test_the_best_of_each_is_used(self, small_data, monkeypatch):
        """Of the miniature: 0.01 collapses, else the larger is the better."""

        def validate(setting, method, fold, eps, seed):
            lr = method.optimizer.args[0]
            return outcome(9 - lr - 2 * method.l1 - method.penalty, collapsed=lr == 0.01)

        monkeypatch.setattr(tuning, "validate", validate)
        setting = prepare(cli.parse(TINY))
        (fold,) = folds(setting)
        grids = tuning.grids(setting, fold, 0.1)
        chosen = {grid.label: grid.chosen(computed(grid.pieces())) for grid in grids}
        assert chosen == {
            "Adam": "lr 0.001",  # of 1e-4, 1e-3, 1e-2 (every other one in the miniature)
            "SGD": "lr 1",
            "Adam + L1": "lr 0.003, L1 0.003",
            "Adam + L1, cosine": "lr 0.003, L1 0.003",
            "Adam + penalty + L1": "lr 0.003, L1 0.001, λ/ε 1",
            "Adam (attacked)": "lr 0.001",
            "Adam (attacked) + L1": "lr 0.001, L1 0.001",
        }
        assert tuning.default_adam().label == "Adam, lr 0.001"


class TestValidate:
    def test_ends_by_hand(self, small_data):
        """PGD's loss on the validation part; a diverged one has none, a constant one collapsed."""
        setting = prepare(cli.parse(TINY))
        (fold,) = folds(setting)
        found = tuning.validate(setting, Method("", partial(sgd, 0.0)), fold, 0.1, 0)
        trial = Trial(setting, ("tune", 0, 0))
        model, _ = trial.train(Method("", partial(sgd, 0.0)), fold.fit, fold.validation, 0.1)
        judged = trial.judge(model, fold.validation, 0.1)
        assert found == outcome(judged["pgd_loss"])
        assert judged["pgd_loss"] >= judged["fgsm_loss"] - 0.01
        other = tuning.validate(setting, Method("", partial(sgd, 0.0)), fold, 0.1, 1)
        assert other["loss"] != found["loss"]  # another θ₀
        broken = tuning.validate(setting, Method("", partial(sgd, math.inf)), fold, 0.1, 0)
        assert math.isnan(broken["loss"]) and not broken["collapsed"]

        assert tuning.validate(setting, Method("", zeroing), fold, 0.1, 0) == {
            "collapsed": True,
            "loss": pytest.approx(math.log(10)),
        }


class TestSearch:
    @pytest.fixture
    def setting(self, small_data):
        grid = ["--grid", "p=5,10", "alpha=0.25,0.75"]
        setting = prepare(cli.parse([*TINY, "--eps", "0.1", "0.2", *grid]))
        return replace(setting, config=replace(setting.config, tune_seeds=2))

    def test_by_hand(self, setting, monkeypatch):
        """Each is meta-trained on the part that fits for each ε, judged on each seed; the best
        mean is chosen, and a candidate that collapses anywhere, or is given up, is not."""
        learned, losses = [], {(5, 0.25): 4.0, (5, 0.75): 2.0, (10, 0.25): 3.0, (10, 0.75): 5.0}

        def train_phi(setting, images, kind, eps, fold, meta_seed, on_episode):
            c = setting.config
            learned.append((c.p, c.alpha, eps))
            assert images is fold0.fit and (kind, fold, meta_seed) == ("transfer", 0, 0)
            assert c.read_alpha == c.alpha
            # the second best would be given up
            return None, {"ended": "collapsed" if (c.p, c.alpha) == (10, 0.25) else None}

        def validate(setting, method, fold, eps, seed):
            c = setting.config
            bad = (c.p, c.alpha, eps, seed) == (5, 0.75, 0.2, 1)  # the best but for this
            return outcome(losses[c.p, c.alpha] + 10 * eps + seed, collapsed=bad)

        monkeypatch.setattr(tuning, "train_phi", train_phi)
        monkeypatch.setattr(tuning, "validate", validate)
        (fold0,) = folds(setting)
        search = Search(setting, fold0, QUIET)
        parts = computed(search.pieces())
        every = [(p, a, eps) for p in (5, 10) for a in (0.25, 0.75) for eps in (0.1, 0.2)]
        assert learned == [key for key in every if key != (10, 0.25, 0.2)]
        rows = search.tried(parts)
        assert [row["settings"] for row in rows] == [
            {"p": p, "alpha": a} for p in (5, 10) for a in (0.25, 0.75)
        ]
        assert [row["loss"] for row in rows] == pytest.approx([6.0, 4.0, math.inf, 7.0])
        assert [row["collapsed"] for row in rows] == [False, True, True, False]
        assert [row["chosen"] for row in rows] == [True, False, False, False]
        best = search.best(parts).config
        assert (best.p, best.alpha, best.read_alpha) == (5, 0.25, 0.25)

    def test_what_is_meta_trained_needs_the_whole_search(self, setting, tmp_path):
        experiment = Experiment(setting, tmp_path, QUIET)
        pieces = {piece.name: piece for piece in experiment.pieces()}
        points = {name for name in pieces if name.startswith("grid-")}
        assert len(points) == 4
        for kind in ("transfer", "nominal"):
            for eps in (0.1, 0.2):
                assert set(pieces[f"{kind}-fold0-phi0-eps{eps}"].needs) == points
        assert set(pieces["not-fold0-phi0"].needs) == points
        assert not any(pieces[name].needs for name in points)
        run = next(p for name, p in pieces.items() if "L2L-Transfer (clean)" in name)
        assert run.needs == ("transfer-fold0-phi0-eps0.1",)

    def test_without_a_grid_the_task_is_itself(self, small_data):
        setting = prepare(cli.parse(TINY))
        (fold,) = folds(setting)
        search = Search(setting, fold, QUIET)
        assert search.pieces() == [] and search.tried({}) == [] and search.best({}) is setting
