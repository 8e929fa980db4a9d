"""Choosing settings without the test: the baselines' grids, and the paper's grid search for φ."""

import itertools
import math
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from l2l_ref import attacks, evaluate
from l2l_ref.config import Config, grid_points, with_grid
from l2l_ref.optimizer import flatten_
from l2l_ref.task import TRANSFER, Fold, Parts, Reporter, Task, learn, learned
from l2l_ref.transfer import Method

# Candidates of the baselines: learning rates from low to high, and weights of the L1 norm.
ADAM_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
L1_LRS = (1e-3, 3e-3, 1e-2)
L1_WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2)
# θ of a quadratic travels farther. Its loss is a mean over functions, so SGD's rates are
# multiplied by how many there are.
QUADRATIC_ADAM_LRS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
QUADRATIC_SGD_LRS = (0.002, 0.005, 0.01, 0.02, 0.03)
DEFAULT_LR = 1e-3  # PyTorch's for Adam, shown beside the tuned one


def adam(lr: float, model: nn.Module) -> torch.optim.Optimizer:
    """Adam on all parameters (Kingma & Ba 2015), PyTorch's defaults but for the learning rate."""
    theta = flatten_(model.parameters())
    return torch.optim.Adam([theta], lr=lr, capturable=theta.is_cuda)


def sgd(lr: float, model: nn.Module) -> torch.optim.Optimizer:
    """Plain gradient descent, Eq. 2."""
    return torch.optim.SGD([flatten_(model.parameters())], lr=lr)


def candidates(config: Config) -> dict[str, dict[str, Method]]:
    """The grids of the baselines: {label: {settings in words: the method}}."""
    quadratic = config.dataset == "quadratic"
    adam_lrs, sgd_lrs = ADAM_LRS, SGD_LRS
    if quadratic:
        adam_lrs = QUADRATIC_ADAM_LRS
        sgd_lrs = tuple(lr * config.batch_size for lr in QUADRATIC_SGD_LRS)
    grids = {
        "Adam": {f"lr {lr:g}": Method("Adam", partial(adam, lr)) for lr in adam_lrs},
        "SGD": {f"lr {lr:g}": Method("SGD", partial(sgd, lr)) for lr in sgd_lrs},
    }
    if config.attack != "none":
        alpha = config.attacked_alpha
        grids["Adam (attacked)"] = {
            f"lr {lr:g}": Method("Adam (attacked)", partial(adam, lr), alpha=alpha)
            for lr in adam_lrs
        }
    if not quadratic:
        grids["Adam + L1"] = {
            f"lr {lr:g}, L1 {l1:g}": Method("Adam + L1", partial(adam, lr), l1=l1)
            for lr, l1 in itertools.product(L1_LRS, L1_WEIGHTS)
        }
    every = slice(None, None, config.tune_every)
    return {label: dict(list(grid.items())[every]) for label, grid in grids.items()}


def baselines(
    task: Task, fold: Fold, eps: float, parts: Parts, reporter: Reporter
) -> tuple[list[Method], dict[str, str]]:
    """Each baseline with its best settings, and Adam with its default; {label: settings chosen}."""
    methods = [Method(f"Adam, lr {DEFAULT_LR:g}", partial(adam, DEFAULT_LR))]
    grids, chosen, done = candidates(task.config), {}, 0
    where = f"fold {fold.number}, ε {eps:g}"
    show = reporter.progress(sum(map(len, grids.values())), f"tune baselines, {where}")
    for label, grid in grids.items():
        scores = {}
        for settings, method in grid.items():
            name = f"tune-fold{fold.number}-eps{eps}-{label}, {settings}"
            scores[settings] = parts.get(name, partial(validate, task, method, fold, eps))
            done += 1
            show(done, scores[settings][1])
        chosen[label] = min(scores, key=lambda settings: tuple(scores[settings]))
        methods.append(grid[chosen[label]])
    words = "; ".join(f"{label}: {settings}" for label, settings in chosen.items())
    reporter.say(f"tuned on the meta-training half, {where}: {words}")
    return methods, chosen


def validate(task: Task, method: Method, fold: Fold, eps: float) -> tuple[bool, float]:
    """How good a method is without its test: (collapsed, attacked loss), the lower the better.

    It trains on one part of the meta-training half and is judged on the other. A constant
    predictor is nobody's best, however low its attacked loss.
    """
    losses, collapses = [], []
    for seed in range(task.config.tune_seeds):
        labels = ("tune", fold.number, seed)
        model, curve = task.train(
            method, fold.fit, fold.validation, eps, *labels, every=task.config.steps
        )
        loss = curve.attacked[-1]
        losses.append(loss if math.isfinite(loss) else math.inf)
        if fold.validation is not None:
            count = min(task.config.eval_samples, len(fold.validation))
            sample = fold.validation.subset(torch.arange(count))
            accuracy = evaluate.robust_accuracy(model, sample, attacks.none)
            collapses.append(evaluate.is_collapsed(loss, accuracy, task.problem.classes))
    return any(collapses), statistics.fmean(losses)


def search(
    task: Task, fold: Fold, parts: Parts, reporter: Reporter
) -> tuple[Task, list[dict[str, Any]]]:
    """The `--grid` of φ's settings: meta-train each combination and take the best.

    Candidates meta-train on one part of the meta-training half, then train new optimizees on the
    clean batches of that same part, and are judged on the other by their attacked loss, averaged
    over `eps`. Returns the task with the best in place, and what was tried, one dict a candidate.
    """
    c = task.config
    tried = []
    for chosen in grid_points(c):
        name = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        candidate = replace(task, config=with_grid(c, chosen))

        def judge(candidate=candidate, name=name) -> dict[str, Any]:
            outcomes = []
            for eps in c.eps:
                show = reporter.progress(c.episodes, f"grid: {name}, eps {eps:g}")
                phi, _ = learn(candidate, fold.fit, TRANSFER, eps, fold.number, 0, show)
                method = Method(name, partial(learned, phi, c.backend))
                outcomes.append(validate(candidate, method, fold, eps))
            collapsed, losses = zip(*outcomes, strict=True)
            return {"collapsed": any(collapsed), "attacked_loss": statistics.fmean(losses)}

        outcome = parts.get(f"grid-fold{fold.number}-{name.replace(', ', '-')}", judge)
        tried.append({"fold": fold.number, "settings": chosen, **outcome, "chosen": False})
        reporter.say(f"grid: {name}: validation attacked loss {outcome['attacked_loss']:.3f}")
    best = min(tried, key=lambda row: (row["collapsed"], row["attacked_loss"]))
    best["chosen"] = True
    reporter.say(f"grid: chose {best['settings']} on the meta-training half of fold {fold.number}")
    return replace(task, config=with_grid(c, best["settings"])), tried
