"""The paper's experiment: meta-train, tune the baselines, transfer, judge.

Every finished piece is kept in `<out>/parts`, so that a resumed run repeats none of them.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2l_ref import attacks, evaluate, tuning
from l2l_ref.config import Config, describe
from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint, replace_with
from l2l_ref.optimizer import MetaOptimizer
from l2l_ref.problems import phi_groups
from l2l_ref.task import NOT, TRANSFER, Fold, Parts, Reporter, Task, folds, learn, learned, stream
from l2l_ref.transfer import Method

PGD_STEPS = 20  # of the attack that judges: Eq. 8 with step size 2.5·eps/20
FORMAT = "l2l_ref φ 1"
# The settings that a loaded φ brings along.
OF_PHI = ("recipe", "p", "output_scale", "theta_input", "odd", "hidden_size", "num_layers",
          "alpha", "read_alpha", "episodes", "tasks", "unroll", "meta_lr", "meta_schedule", "clip",
          "eps_warmup")  # fmt: skip


@dataclass(frozen=True)
class Results:
    """All that a report is made of.

    Attributes:
        runs: one dict a run: eps, method, fold, phi (meta-seed, or None), seed, the fields of
            `Curve`, the three accuracies and `end` ("ok", "collapsed" or "diverged").
        chosen: {eps: {fold: {baseline: its tuned settings}}}.
        grid: what `--grid` tried, one dict a candidate.
        meta_training: {φ's name: its History as a dict}.
    """

    runs: list[dict[str, Any]]
    chosen: dict[str, dict[str, dict[str, str]]]
    grid: list[dict[str, Any]]
    meta_training: dict[str, dict[str, Any]]


def phi_name(kind: str, fold: int, meta_seed: int, eps: float) -> str:
    """The key of a φ. Transfer-NOT's has no eps: it never meets an attack."""
    return f"{kind}-fold{fold}-phi{meta_seed}" + (f"-eps{eps}" if kind == TRANSFER else "")


def run(
    task: Task, out: Path, reporter: Reporter, phis: dict[str, nn.ModuleDict] | None = None
) -> Results:
    """The whole experiment of `task.config`; leaves parts/ and meta_optimizer.pt in `out`.

    Args:
        phis: φ by name (`load_phis`); those that are missing are meta-trained.
    """
    c = task.config
    parts = Parts(out / "parts")
    phis = dict(phis or {})
    results = Results([], {}, [], {})
    for fold in folds(c, task.images):
        fold_task = task
        if c.grid:
            fold_task, tried = tuning.search(task, fold, parts, reporter)
            results.grid.extend(tried)

        def phi(kind: str, meta_seed: int, eps: float, fold=fold, task=fold_task) -> nn.ModuleDict:
            name = phi_name(kind, fold.number, meta_seed, eps)
            if name not in phis:
                phis[name], results.meta_training[name] = learn(
                    task,
                    fold.meta,
                    kind,
                    eps,
                    fold.number,
                    meta_seed,
                    reporter.progress(c.episodes, f"meta-train {name}"),
                    checkpoint=parts.folder / f"{name}.pt",
                )
                history = results.meta_training[name]
                if history["skipped"] or history["diverged"]:
                    reporter.say(
                        f"{name}: {history['skipped']} meta-gradients were not finite and skipped, "
                        f"{history['diverged']} episodes diverged and were cut short"
                    )
            return phis[name]

        for eps in c.eps:
            baselines, chosen = tuning.baselines(task, fold, eps, parts, reporter)
            results.chosen.setdefault(str(eps), {})[str(fold.number)] = chosen
            methods: list[tuple[int | None, Method]] = [(None, method) for method in baselines]
            for meta_seed in range(c.meta_seeds):
                kinds = {kind: phi(kind, meta_seed, eps) for kind in kinds_of_phi(c)}
                methods += [(meta_seed, method) for method in phi_methods(fold_task.config, kinds)]
            total = len(methods) * c.seeds
            show = reporter.progress(total, f"transfer, fold {fold.number}, ε {eps:g}")
            for done, (seed, (meta_seed, method)) in enumerate(product(range(c.seeds), methods), 1):
                key = {
                    "eps": eps,
                    "method": method.label,
                    "fold": fold.number,
                    "phi": meta_seed,
                    "seed": seed,
                }
                name = "-".join(f"{k}{v}" for k, v in key.items() if v is not None)
                judged = parts.get(name, partial(run_method, task, method, fold, eps, seed))
                results.runs.append({**key, **judged})
                show(done, judged["attacked"][-1])
    if c.load:  # what they come from goes along unchanged
        shutil.copyfile(c.load, out / "meta_optimizer.pt")
    else:
        save_phis(out / "meta_optimizer.pt", phis, task)
    return results


def kinds_of_phi(config: Config) -> tuple[str, ...]:
    """Without an attack the two kinds are one."""
    return (TRANSFER,) if config.attack == "none" else (TRANSFER, NOT)


def phi_methods(c: Config, phis: dict[str, nn.ModuleDict]) -> list[Method]:
    """The curves of a φ, for Transfer-NOT that of the φ which never met an attack (README)."""
    phi = partial(learned, phis[TRANSFER], c.backend)
    if NOT not in phis:
        transfer = Method("L2L-Transfer", phi)
        both = [Method("L2L", phi, half="meta"), transfer]
        return [transfer] if c.dataset == "quadratic" else both  # quadratics have no halves
    clean_phi = partial(learned, phis[NOT], c.backend)
    return [
        Method("L2L", phi, alpha=c.read_alpha, half="meta"),
        Method("L2L-Transfer (clean)", phi),
        Method("L2L-Transfer (mixed)", phi, alpha=c.transfer_alpha),
        Method("Transfer-NOT", clean_phi, alpha=0.0),
        Method("Transfer-NOT (clean)", clean_phi),
    ]


def run_method(task: Task, method: Method, fold: Fold, eps: float, seed: int) -> dict[str, Any]:
    """Train one optimizee and judge it: its curve, its accuracies and how it ended."""
    c = task.config
    labels = ("transfer", fold.number, seed)
    half = fold.meta if method.half == "meta" else fold.transfer
    probe = None if task.images is None else task.test(c.curve_samples)
    model, curve = task.train(method, half, probe, eps, *labels)
    result = {**asdict(curve), "end": "diverged" if curve.diverged else "ok"}
    if task.images is not None:
        sample = task.test(c.eval_samples)
        generator = stream(c.seed, "judge", *labels)
        pgd = attacks.make("pgd", eps=eps, steps=PGD_STEPS, generator=generator)
        judges = {
            "accuracy": (attacks.none, 1),
            "fgsm_accuracy": (attacks.make("fgsm", eps=eps), 1),
            "pgd_accuracy": (pgd, c.restarts),
        }
        for name, (attack, restarts) in judges.items():
            result[name] = evaluate.robust_accuracy(model, sample, attack, restarts=restarts)
        if evaluate.is_collapsed(curve.attacked[-1], result["accuracy"], task.problem.classes):
            result["end"] = "collapsed"
    return result


def save_phis(path: Path, phis: dict[str, nn.ModuleDict], task: Task) -> None:
    """Every φ of a run in one file: settings and plain state dicts by name and φ-group.

    With them goes what they come from: the run's configuration and its data.
    """
    saved = {
        name: {
            group: {
                "settings": meta.settings,
                "state_dict": {key: weight.cpu() for key, weight in meta.state_dict().items()},
            }
            for group, meta in phi.items()
        }
        for name, phi in phis.items()
    }
    value = {
        "format": FORMAT,
        "config": asdict(task.config),
        "data": task.source,
        "data_sha256": task.checksum,
        "phis": saved,
    }
    replace_with(path, partial(torch.save, value))


def load_phis(path: Path, task: Task) -> tuple[Task, dict[str, nn.ModuleDict]]:
    """Every φ that a run needs, by name, from the file that `save_phis` wrote.

    A φ of the same kind, fold and meta-seed that was trained for another ε will do where it is the
    only one. The settings of φ in the task's configuration become those of the file, and its
    `origin` says where φ comes from.

    Raises:
        InputError: a file of another kind; φ that are missing or do not fit the problem's φ-groups;
            φ meta-trained on a half which this run would transfer on.
    """
    value = read_checkpoint(path, task.device)
    if value.get("format") != FORMAT:
        raise InputError(
            f"--load {path} is not a meta_optimizer.pt of this version: name the file of a "
            "finished run"
        )
    c, before, saved = task.config, value["config"], value["phis"]
    if before["dataset"] == c.dataset and c.dataset != "quadratic":
        if before["seed"] != c.seed:
            raise InputError(
                f"--load {path} holds φ meta-trained on another half of {c.dataset}: give --seed "
                f"{before['seed']}, or transfer would train on what they have seen"
            )
        data = value["data"], value["data_sha256"]
        here = task.source, task.checksum
        if data != here and "stand-in" not in (data[0], here[0]):
            raise InputError(
                f"--load {path} holds φ meta-trained on {describe(data)}, whose halves are not "
                f"those of {describe(here)}: give the same --data-dir"
            )
    phis = {}
    for kind, fold, meta_seed, eps in product(
        kinds_of_phi(c), range(c.folds), range(c.meta_seeds), c.eps
    ):
        name = phi_name(kind, fold, meta_seed, eps)
        alike = [key for key in saved if f"{key}-".startswith(f"{kind}-fold{fold}-phi{meta_seed}-")]
        if name not in saved and len(alike) != 1:
            raise InputError(
                f"--load {path} holds {', '.join(saved)} but this run needs {name}: change --eps, "
                "--attack, --folds or --meta-seeds to what is there"
            )
        phis[name] = nn.ModuleDict()
        groups = saved[name if name in saved else alike[0]]
        for group in phi_groups(task.problem.build()):
            if group not in groups:
                raise InputError(
                    f"--load {path} has no φ for {group} parameters, only for {', '.join(groups)}: "
                    "load one that was meta-trained on an optimizee with such layers"
                )
            meta = MetaOptimizer(**groups[group]["settings"])
            meta.load_state_dict(groups[group]["state_dict"])
            phis[name][group] = meta.to(task.device)
    origin = f"{value['data']}, {before['attack']}, ε {', '.join(map(str, before['eps']))}"
    settings = {name: before[name] for name in OF_PHI if name in before}  # `tasks` came later
    return replace(task, config=replace(c, **settings), origin=origin), phis
