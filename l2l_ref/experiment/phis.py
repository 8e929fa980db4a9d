"""The φ of a run: kinds and names, how each begins, what it is compared as, and those of a file."""

import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import product
from typing import Any

import torch
from torch import nn

from l2l_ref.data import sources
from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config, names_of
from l2l_ref.experiment.folder import describe
from l2l_ref.experiment.setting import Setting, stream
from l2l_ref.meta_optimizer import new_phi, with_phi
from l2l_ref.pretrained import build, list_pretrained, read
from l2l_ref.transfer import Method

Key = tuple[int, str, int, float]  # of a φ: fold, kind, meta-seed, ε
# The kinds: meta-trained under attack; on clean batches; a nominal term without an LSTM.
UNDER_ATTACK, CLEAN, ABLATION = "attacked", "clean", "ablation"
LEARNED_RATE = "Adam, learned rate"  # the label of the ablation
# Rows that are there with Adam's tuned L1 norm, too; a φ that sees θ gains nothing by it.
WITH_L1 = ("L2L", "L2L-Transfer (clean)")
# The row of each recipe that its φ are meant for.
OWN = {"paper": "L2L", "robust": "L2L-Transfer (clean)", "penalty": LEARNED_RATE}


def phi_name(fold: int, kind: str, meta_seed: int, eps: float) -> str:
    """That of a `Key`. Transfer-NOT's has no eps: it never meets an attack."""
    return f"{kind}-fold{fold}-phi{meta_seed}" + (f"-eps{eps}" if kind != CLEAN else "")


def phis_of(c: Config) -> dict[str, Key]:
    """Every φ of a run by its name; Transfer-NOT's once, whatever ε."""
    keys = product(range(c.folds), kinds_of_phi(c), range(c.meta_seeds), c.eps)
    return {phi_name(*key): key for key in keys}


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
    methods = [Method("L2L", phi, half="meta", **learned_on)]
    if c.attack == "none":
        methods.append(Method("L2L-Transfer", phi, **clean))
    else:
        methods.append(Method("L2L-Transfer (clean)", phi, **clean))
        methods.append(Method("L2L-Transfer (mixed)", phi, alpha=0.5, **clean))
    if c.eval_on == "validation":  # halves are one: of two rows alike the recipe's own stays
        methods.sort(key=lambda one: one.label == OWN[c.recipe])
        methods = list({(one.alpha, one.penalty): one for one in methods}.values())
    return methods


def untrained(setting: Setting, kind: str, fold: int, meta_seed: int) -> nn.ModuleDict:
    """An untrained φ of a kind; ABLATION's is as small as can be, and its update frozen at zero."""
    c = setting.config
    names = "p", "output_scale", "theta_input", "odd", "nominal"
    form = {name: getattr(c, name) for name in names}
    if kind == ABLATION:
        form = {"hidden_size": 1, "num_layers": 1, "nominal": True}
    generator = stream(c.seed, "phi", fold, meta_seed)
    phi = new_phi(setting.problem.build().to(setting.device), generator=generator, **form)
    if kind == ABLATION:
        for meta in phi.values():
            meta.requires_grad_(False)
            meta.log_eta.requires_grad_(True)
    return phi


def episode_lengths(c: Config, generator: torch.Generator) -> list[int]:
    """The updates of each episode: log-uniform, and stratified, so that every φ meets as many long
    ones; which episode is how long is drawn."""
    low, high = c.episode_steps[0], c.episode_steps[-1]
    strata = torch.randperm(c.episodes, generator=generator)
    shares = (strata + torch.rand(c.episodes, generator=generator)) / c.episodes
    return [round(low * (high / low) ** share) for share in shares.tolist()]


def load_phis(path: str, setting: Setting) -> tuple[Setting, dict[str, nn.ModuleDict]]:
    """Every φ that a run needs, by name, from the `meta_optimizer.pt` of a run.

    A φ of the same kind, fold and meta-seed that was trained for another ε will do where it is the
    only one. The settings of φ in the setting's configuration become those of the file, and
    `data["phi"]` says where φ comes from. InputError for φ that are missing, do not fit the model,
    or were meta-trained on images that this run would transfer or evaluate on.
    """
    value = read(path, setting.device)
    if "config" not in value:
        raise InputError(f"--load {path} does not say what its φ come from: name that of a run")
    c, before, saved = setting.config, value["config"], value["phis"]
    if before["dataset"] == c.dataset != "quadratic":  # images, cut into halves
        seen = f"{describe(value)}, seed {before['seed']}, --eval-on {before['eval_on']}"
        # what trains with --eval-on validation is a part of the half that trains without
        on = before["eval_on"] if c.eval_on == "test" else c.eval_on
        if seen != f"{describe(setting.data)}, seed {c.seed}, --eval-on {on}":
            source, own = setting.data["data"], path in list_pretrained()
            # a miniature claims nothing, and without a network there is no other data
            if not (own and (c.quick or source.endswith((sources.DIGITS, "stand-in")))):
                raise InputError(
                    f"--load {path} holds φ meta-trained on another half: that of {seen}. Give the "
                    "same, or this run would use images that they have seen"
                )
            print(f"φ of {path} may have met some of these images: {source}", file=sys.stderr)
    config = replace(c, **{name: before[name] for name in names_of("φ")})
    phis, model = {}, setting.problem.build()
    for name, (fold, kind, meta_seed, _) in phis_of(config).items():
        alike = [key for key in saved if f"{key}-".startswith(f"{kind}-fold{fold}-phi{meta_seed}-")]
        if name not in saved and len(alike) != 1:
            raise InputError(
                f"--load {path} holds {', '.join(saved)} but this run needs {name}: change --eps, "
                "--attack, --folds or --meta-seeds to what is there"
            )
        phis[name] = build(saved[name if name in saved else alike[0]], setting.device)
        with_phi(model, phis[name])  # raises where a layer has none
    origin = f"{value['data']}, {before['attack']}, ε {', '.join(map(str, before['eps']))}"
    loaded: list[Any] = [meta for phi in phis.values() for meta in phi.values()]
    digest = sha256("".join(meta.fingerprint() for meta in loaded).encode()).hexdigest()
    about = {**setting.data, "phi": describe({"data": origin, "data_sha256": digest})}
    return replace(setting, config=config, data=about), phis
