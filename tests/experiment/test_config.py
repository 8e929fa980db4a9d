"""The command line: what is complete without being asked for, and what beats what."""

import math
from dataclasses import replace

import pytest

from l2l_ref.errors import InputError
from l2l_ref.experiment import cli
from l2l_ref.experiment.config import RECIPES


def test_no_arguments_is_the_papers_mnist():
    c = cli.parse([])
    assert (c.dataset, c.attack, c.eps, c.recipe) == ("mnist", "fgsm", (0.1,), "paper")
    assert (c.steps, c.batch_size, c.alpha, c.read_alpha, c.p) == (100, 128, 0.5, 0.5, 10)
    assert c.meta_lr == 3e-3 and c.episode_steps == (100,) and not c.nominal
    assert c.episodes * math.ceil(c.episode_steps[0] / c.unroll) >= 300
    assert (c.curriculum, c.penalty, c.judge, c.images) == ((0, 0.5), 0, "test", None)


def test_the_attack_chooses_alpha():
    assert cli.parse(["--attack", "pgd"]).alpha == 0.2
    assert cli.parse(["--attack", "none"]).alpha == 1
    assert cli.parse(["--alpha", "0.7"]).read_alpha == 0.7


def test_robust_reads_clean_and_is_judged_under_attack():
    c = cli.parse(["--recipe", "robust"])
    assert (c.read_alpha, c.alpha, c.odd, c.theta_input) == (1, 0, True, True)
    assert c.nominal and (c.curriculum, c.episode_steps, c.penalty) == ((0, 0), (100, 1000), 0)
    assert not cli.parse(["--recipe", "robust", "--no-nominal"]).nominal
    assert cli.parse(["--nominal"]).nominal


def test_penalty_is_robust_but_for_what_it_reads():
    robust, penalty = (cli.parse(["--recipe", name]) for name in ("robust", "penalty"))
    assert penalty.penalty == 1 and replace(penalty, recipe="robust", penalty=0.0) == robust
    assert cli.parse(["--penalty", "0.5"]).penalty == 0.5


def test_cifar_defaults():
    c = cli.parse(["--dataset", "cifar10"])
    assert (c.steps, c.folds, c.optimizee) == (1000, 1, "convnet")
    assert (c.episode_steps, c.episodes, c.record_every) == ((100, 300), 50, 10)
    assert (c.meta_lr, c.curriculum) == (1e-3, (0.5, 0.75))
    for recipe in ("robust", "penalty"):
        c = cli.parse(["--dataset", "cifar10", "--recipe", recipe])
        assert (c.episode_steps, c.episodes) == ((100, 1000), 30)


def test_quadratics_have_neither_curriculum_nor_penalty():
    for recipe in RECIPES:
        c = cli.parse(["--dataset", "quadratic", "--recipe", recipe])
        assert (c.curriculum, c.penalty, c.nominal, c.alpha) == ((0, 0), 0, False, 1)
        assert (c.episode_steps, c.episodes, c.meta_lr) == ((100,), 100, 1e-2)


def test_a_curve_has_about_a_hundred_points():
    every = {steps: cli.parse(["--steps", steps]).record_every for steps in ("4", "100", "101")}
    assert every == {"4": 1, "100": 1, "101": 2}
    assert cli.parse(["--steps", "100", "--record-every", "7"]).record_every == 7


def test_what_is_given_beats_quick():
    assert cli.parse(["--quick", "--seeds", "7"]).seeds == 7
    assert cli.parse(["--quick"]).seeds < cli.parse([]).seeds


def test_fractions():
    assert cli.parse(["--eps", "8/255", "0.5"]).eps == (8 / 255, 0.5)


def test_switches_without_an_opposite():
    given = cli.parse(["--no-graphs", "--no-nominal", "--quick"])
    assert not given.graphs and not given.nominal and given.quick
    for flag in ("--no-quick", "--no-resume", "--no-strict-data"):
        with pytest.raises(InputError, match=f"unrecognized arguments: {flag}"):
            cli.parse([flag])
