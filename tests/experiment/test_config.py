"""The command line: what is complete without being asked for, and what beats what."""

from dataclasses import asdict, replace

import pytest

from l2l_ref.errors import InputError
from l2l_ref.experiment import cli

ROBUST = {"input_alpha": 1, "alpha": 0, "odd": True, "theta_input": True, "nominal": True,
          "curriculum": (0, 0), "episode_steps": (100, 1000)}  # fmt: skip
QUADRATIC = {"curriculum": (0, 0), "penalty": 0, "nominal": False, "alpha": 1,
             "episode_steps": (100,), "episodes": 100, "meta_lr": 1e-2}  # fmt: skip


@pytest.mark.parametrize(
    "command, expected",
    [
        # without arguments it is the paper's MNIST
        ("", {"dataset": "mnist", "attack": "fgsm", "eps": (0.1,), "recipe": "paper", "steps": 100,
              "batch_size": 128, "alpha": 0.5, "input_alpha": 0.5, "p": 5, "meta_lr": 3e-3,
              "episodes": 140, "episode_steps": (100,), "nominal": False, "curriculum": (0, 0.5),
              "penalty": 0, "eval_on": "test", "images": None}),
        ("--dataset cifar10", {"steps": 1000, "folds": 1, "optimizee": "convnet", "meta_lr": 1e-3,
                               "episode_steps": (100, 300), "episodes": 100, "p": 10,
                               "curriculum": (0.5, 0.75)}),
        ("--dataset cifar10 --attack pgd", {"episodes": 50, "episode_steps": (100, 300)}),
        # a miniature of its meta-training learns nothing
        ("--dataset cifar10 --quick", {"load": "cifar10-fgsm-2-255", "steps": 40,
                                       "eps": (2 / 255,)}),
        ("--dataset cifar10 --quick --attack pgd", {"load": "cifar10-pgd-0.03"}),
        ("--dataset cifar10 --quick --recipe paper --unroll 5", {"load": None, "episodes": 1}),
        ("--dataset cifar10 --quick --recipe robust", {"load": None}),
        ("--dataset cifar10 --recipe robust", {"episode_steps": (100, 1000), "episodes": 30}),
        ("--dataset cifar10 --recipe penalty", {"episodes": 30, "episode_steps": (100, 300),
                                                "penalty": 1}),
        # quadratics have neither curriculum nor penalty
        ("--dataset quadratic --recipe robust", QUADRATIC),
        ("--dataset quadratic --recipe penalty", QUADRATIC),
        # robust reads clean gradients and is judged under attack
        ("--recipe robust", {**ROBUST, "penalty": 0}),
        # the attack chooses alpha
        ("--attack pgd", {"alpha": 0.2}),
        ("--attack none", {"alpha": 1}),
        ("--alpha 0.7", {"alpha": 0.7, "input_alpha": 0.7}),
        # what is given beats --quick
        ("--quick", {"seeds": 2}),
        ("--quick --seeds 7", {"seeds": 7}),
        ("--eps 8/255 0.5", {"eps": (8 / 255, 0.5)}),
        # a φ of the package says what it is for
        ("--load cifar10-pgd-0.03 --eps 0.1", {"dataset": "cifar10", "attack": "pgd",
                                               "eps": (0.1,)}),
    ],
)  # fmt: skip
def test_what_is_complete_and_what_beats_what(command, expected):
    config = asdict(cli.parse(command.split()))
    assert {name: config[name] for name in expected} == expected


def test_penalty_is_robust_but_for_what_it_reads():
    robust, penalty = (cli.parse(["--recipe", name]) for name in ("robust", "penalty"))
    assert penalty.penalty == 1.5
    assert penalty.episodes == 60 and penalty.episode_steps == (100, 300)
    episodes = {"episodes": robust.episodes, "episode_steps": robust.episode_steps}
    assert replace(penalty, recipe="robust", penalty=0.0, **episodes) == robust


@pytest.mark.parametrize("switch", ["--no-quick", "--record-every=7", "--nominal"])
def test_what_is_no_option(switch):
    with pytest.raises(InputError, match=f"unrecognized arguments: {switch}"):
        cli.parse([switch])


def test_help_fits_two_screens():
    lines = cli.parser().format_help().splitlines()
    assert len(lines) <= 75 and max(map(len, lines)) <= 100
