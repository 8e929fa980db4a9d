"""What is chosen without the test set: the baselines' grids, on one seed and more."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY, zeroing
from torch import nn

from l2l_ref.errors import InputError
from l2l_ref.experiment import cli, tuning
from l2l_ref.experiment.setting import Fold, Trial, folds, prepare
from l2l_ref.experiment.tuning import Row, sgd
from l2l_ref.transfer import Method


@pytest.fixture
def choose(monkeypatch):
    """{settings: outcomes by seed} -> what is chosen of them, and what ran on other seeds than the
    first, on which all run: (settings, seed)."""
    setting = prepare(cli.parse(["--dataset", "quadratic"]))

    def choose(outcomes):
        ran = []

        def validate(setting, method, fold, eps, seed):
            assert (fold.number, eps, setting.config.steps) == (0, 0.2, 100)  # all are whole runs
            ran.append((method.label, seed))
            return outcomes[method.label][seed]

        monkeypatch.setattr(tuning, "validate", validate)
        (tune_seeds,) = {len(by_seed) for by_seed in outcomes.values()}
        own = replace(setting, config=replace(setting.config, tune_seeds=tune_seeds))
        methods = {name: Method(name, partial(sgd, lr=0.1)) for name in outcomes}
        row = Row(own, Fold(0, *[None] * 5), 0.2, "a baseline", methods)
        parts = {}
        for piece in row.pieces():
            assert set(piece.needs) <= parts.keys()
            parts[piece.name] = json.loads(json.dumps(piece.compute(parts)))
        assert row.method(parts) is methods[row.chosen(parts)]
        assert ran[: len(outcomes)] == [(name, 0) for name in outcomes]
        return row.chosen(parts), sorted(ran[len(outcomes) :])

    return choose


class TestRow:
    @pytest.mark.parametrize(
        "outcomes, chosen, later",
        [
            # of five candidates two stay, b and c; c has the better mean, 2 against 3
            ({"a": [5, 0, 0], "b": [1, 4, 4], "c": [2, 2, 2],
              "d": [6, 0, 0], "e": [3, 0, 0]},
             "c", [("b", 1), ("b", 2), ("c", 1), ("c", 2)]),
            # with one seed the first runs are all
            ({"a": [2], "b": [1], "c": [3]}, "b", []),
            # the first seed counts too: 4.5 against 5; c's 4.25 is of one seed
            ({"a": [1, 9], "b": [4, 5], "c": [4.25, 0], "d": [8, 0]},
             "b", [("a", 1), ("b", 1)]),
            # one that collapsed is never chosen, on whichever seed
            ({"a": [math.inf], "b": [3], "c": [4], "d": [5]}, "b", []),
            ({"a": [math.inf, math.inf], "b": [3, 3], "c": [4, 4], "d": [5, 5]},
             "b", [("b", 1), ("c", 1)]),
            ({"a": [1.0, math.inf], "b": [3, 3], "c": [4, 4], "d": [5, 5]},
             "b", [("a", 1), ("b", 1)]),
            # where all of the best third collapse, one that was dropped is chosen
            ({"a": [1.0, math.inf], "b": [3, 3], "c": [4, 4]}, "b", [("a", 1)]),
        ],
    )  # fmt: skip
    def test_the_best_of_all_seeds(self, choose, outcomes, chosen, later):
        """All candidates run once, the best third on the other seeds too."""
        assert choose(outcomes) == (chosen, later)

    def test_one_that_has_no_finite_loss_comes_last(self, choose):
        broken = [math.inf, math.inf]
        assert choose({"a": broken, "b": [9, 9], "c": broken, "d": broken})[0] == "b"
        assert choose({"a": broken, "b": broken})[0] == "a"  # some settings there must be

    def test_names_and_costs(self):
        setting = prepare(cli.parse([*TINY, "--dataset", "quadratic"]))
        setting = replace(setting, config=replace(setting.config, tune_seeds=2))
        methods = {name: Method("", None, penalty=1.0) for name in "xy"}
        pieces = Row(setting, Fold(1, *[None] * 5), 0.2, "Adam", methods).pieces()
        assert [(piece.name, piece.cost, len(piece.needs)) for piece in pieces] == [
            ("tune-Adam-x-seed0-fold1-eps0.2", 12, 0),
            ("tune-Adam-y-seed0-fold1-eps0.2", 12, 0),
            ("tune-Adam-place-0-seed1-fold1-eps0.2", 12, 2),
        ]


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_phi_has_the_weights_of_l1_that_adam_has_on_the_same_batches(dataset):
    c = cli.parse(["--dataset", dataset, "--attack", "pgd"])
    for label, alpha in (("Adam + L1", 1.0), ("Adam (attacked) + L1", c.attacked_alpha)):
        weights = {one.l1 for one in tuning.candidates(c, 0.1)[label].values()}
        assert {one.l1 for one in tuning.with_l1(c, Method("", None, alpha)).values()} == weights


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
    def grids(self, *arguments):
        return tuning.candidates(cli.parse([*arguments]), 0.1)

    def test_of_mnist(self):
        found = self.grids()
        counts = {label: len(grid) for label, grid in found.items()}
        assert counts == {"Adam": 6, "SGD": 5, "Adam + L1": 16, "Adam + penalty + L1": 12,
                          "SGD + penalty + L1, cosine": 12, "Adam (attacked)": 6,
                          "Adam (attacked) + L1": 12, "Adam (attacked) + L1, cosine": 12,
                          "Adam (attacked) + penalty + L1": 12,
                          "Adam (N-FGSM) + L1": 12}  # fmt: skip
        for label, grid in found.items():
            for method in grid.values():
                assert method.label == label and method.cosine == label.endswith("cosine")
                assert (method.alpha < 1) == ("(" in label)
                assert method.attack == ("n-fgsm" if "N-FGSM" in label else None)
                assert (method.penalty > 0) == ("penalty" in label)
        method = found["Adam + penalty + L1"]["lr 0.003, L1 0.001, penalty 1.5"]
        assert (method.l1, method.penalty) == (1e-3, pytest.approx(0.15))
        method = found["Adam (attacked) + L1"]["lr 0.01, L1 0.001"]
        assert (method.optimizer.keywords, method.l1, method.alpha) == ({"lr": 0.01}, 1e-3, 0.5)
        method = next(iter(found["SGD + penalty + L1, cosine"].values()))
        (group,) = method.optimizer(nn.Linear(1, 1)).param_groups
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.03, 0.9, True)

    def test_of_others(self):
        cifar = self.grids("--dataset", "cifar10")
        counts = {label: len(grid) for label, grid in cifar.items()}
        assert counts == {"Adam": 6, "SGD": 5, "Adam + L1": 16, "Adam + penalty + L1": 6,
                          "Adam (attacked)": 6, "Adam (attacked) + L1": 3,
                          "Adam (N-FGSM) + L1": 3}  # fmt: skip
        assert set(self.grids("--attack", "none")) == {"Adam", "SGD", "Adam + L1"}
        quadratic = self.grids("--dataset", "quadratic")
        assert {label: len(grid) for label, grid in quadratic.items()} == {"Adam": 6, "SGD": 5}
        assert list(self.grids("--quick")["Adam"]) == ["lr 0.0001", "lr 0.001", "lr 0.01"]

    def test_of_the_users_own_optimizers(self, tmp_path, monkeypatch):
        """A rate is tuned where there is one; a name that is taken stands in full."""
        (tmp_path / "own_optimizers.py").write_text(
            "from torch.optim import Adam as A, NAdam\n"
            "def nadam(model, lr): return NAdam(model.parameters(), lr)\n"
            "def Adam(model): return A(model.parameters())\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        found = self.grids("--compare", "own_optimizers:nadam", "own_optimizers:Adam")
        counts = {label: len(grid) for label, grid in list(found.items())[-4:]}
        assert counts == {"nadam": 6, "nadam (attacked)": 6, "own_optimizers:Adam": 1,
                          "own_optimizers:Adam (attacked)": 1}  # fmt: skip
        model = torch.nn.Linear(1, 1)
        method = found["nadam (attacked)"]["lr 0.03"]
        assert method.optimizer(model).param_groups[0]["lr"] == 0.03 and method.alpha == 0.5
        (method,) = found["own_optimizers:Adam"].values()
        assert isinstance(method.optimizer(model), torch.optim.Adam) and method.alpha == 1
        with pytest.raises(InputError, match="^own_.*:gone cannot .* attribute 'gone'"):
            prepare(cli.parse([*TINY, "--compare", "own_optimizers:gone"]))


@pytest.mark.parametrize(
    "recipe, kind, row, loss",
    [("paper", "attacked", "L2L", 1.5),
     ("robust", "attacked", "L2L-Transfer (clean)", 1.5),
     ("robust", "ablation", "Adam, learned rate", math.inf)],
)  # fmt: skip
def test_phi_is_checked_in_its_own_row_at_its_longest_episodes(
    small_data, monkeypatch, recipe, kind, row, loss
):
    setting = prepare(cli.parse([*TINY, "--recipe", recipe, "--episode-steps", "3", "7"]))

    def validate(short, method, fold, eps, seed):
        assert (short.config.steps, method.label, eps) == (7, row, 0.1)
        return loss

    monkeypatch.setattr(tuning, "validate", validate)
    assert tuning.loss_of_phi(setting, folds(setting)[0], kind, 0.1, {}) == loss


def test_the_end_of_a_candidate_by_hand(small_data):
    """PGD's loss on the validation part; infinite where it diverged or is constant."""
    setting = prepare(cli.parse(TINY))
    (fold,) = folds(setting)

    def ends(optimizer, seed=0):
        return tuning.validate(setting, Method("", optimizer), fold, 0.1, seed)

    idle = partial(sgd, lr=0.0)
    trial = Trial(setting, ("tune", 0, 0))
    model, *_ = trial.train(Method("", idle), fold.inner(), 0.1)
    found = trial.evaluate(model, fold.validation, 0.1)
    assert ends(idle) == found["pgd_loss"]
    assert found["pgd_loss"] >= found["fgsm_loss"] - 0.01
    assert ends(idle, seed=1) != found["pgd_loss"]  # another θ₀
    assert ends(partial(sgd, lr=math.inf)) == ends(zeroing) == math.inf
