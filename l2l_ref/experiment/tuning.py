"""Choosing the settings of the baselines without the test set."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from l2l_ref import attacks, data, evaluate
from l2l_ref.experiment.config import Config
from l2l_ref.experiment.folder import Parts
from l2l_ref.experiment.phis import OWN, phi_methods
from l2l_ref.experiment.queue import Piece, named
from l2l_ref.experiment.setting import Fold, Setting, Trial
from l2l_ref.foreign import imported, takes
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method

# Candidates of the baselines: learning rates from low to high, weights of the L1 norm, λ/ε.
ADAM_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SGD_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
LOW_LRS, LRS = (5e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
L1_WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2)
LITTLE_L1 = (0.0, 1e-3)  # beside a loss that knows of attacks
PENALTIES = (1.0, 1.5)
# θ of a quadratic travels farther. Its loss is a mean over functions, so SGD's rates are
# multiplied by how many there are.
QUADRATIC_ADAM_LRS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
QUADRATIC_SGD_LRS = (0.002, 0.005, 0.01, 0.02, 0.03)
STAY = 3  # one candidate in so many, the best of the first seed, runs on the others


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam on all parameters (Kingma & Ba 2015), PyTorch's defaults but for the learning rate."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    rate = torch.tensor(lr, device=device) if on_gpu else lr
    return torch.optim.Adam(model.parameters(), lr=rate, capturable=on_gpu)


def sgd(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Plain gradient descent, Eq. 2, but for the options."""
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def candidates(config: Config, eps: float) -> dict[str, dict[str, Method]]:
    """The grids of the baselines: {label: {settings in words: the method}}."""
    grids: dict[str, dict[str, Method]] = {}

    def add(label: str, axes: Mapping[str, Sequence[float]], optimizer=adam, **fixed: Any) -> None:
        """A baseline over the product of `axes`: learning rates, and weights of L1 and λ/ε."""
        grids[label] = {}
        points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
        for point in points[:: config.tune_every]:
            words = ", ".join(f"{name} {value:g}" for name, value in point.items())
            own = {"l1": point.pop("L1", 0.0), "penalty": point.pop("penalty", 0.0) * eps, **fixed}
            grids[label][words] = Method(label, partial(optimizer, **point), **own)

    if config.dataset == "quadratic":
        add("Adam", {"lr": QUADRATIC_ADAM_LRS})
        add("SGD", {"lr": [lr * config.batch_size for lr in QUADRATIC_SGD_LRS]}, sgd)
        return grids
    mnist, alpha = config.dataset == "mnist", config.attacked_alpha
    add("Adam", {"lr": ADAM_LRS})
    add("SGD", {"lr": SGD_LRS}, sgd)
    add("Adam + L1", {"lr": LOW_LRS, "L1": L1_WEIGHTS})
    if config.attack != "none":
        penalised = {"L1": LITTLE_L1, "penalty": PENALTIES if mnist else PENALTIES[:1]}
        attacked = {"lr": LRS, "L1": l1_weights(config, alpha)}
        add("Adam + penalty + L1", {"lr": LRS, **penalised})
        add("Adam (attacked)", {"lr": ADAM_LRS}, alpha=alpha)
        add("Adam (attacked) + L1", attacked, alpha=alpha)
        add("Adam (N-FGSM) + L1", attacked, alpha=alpha, attack="n-fgsm")
        if mnist:  # on CIFAR-10 under PGD they would double the time of all that is compared
            of_sgd = {"lr": SGD_LRS[1:4], **penalised}
            nesterov = partial(sgd, momentum=0.9, nesterov=True)
            add("SGD + penalty + L1, cosine", of_sgd, nesterov, cosine=True, capture=False)
            add("Adam (attacked) + L1, cosine", attacked, alpha=alpha, cosine=True)
            add("Adam (attacked) + penalty + L1", {"lr": LRS, **penalised}, alpha=alpha)
    for name in config.compare:
        make, label = imported(name), name.partition(":")[2]
        label = name if label in grids else label
        tuned = {"lr": ADAM_LRS} if takes(make, "lr") else {}
        add(label, tuned, make, capture=False)
        if config.attack != "none":
            add(f"{label} (attacked)", tuned, make, alpha=alpha, capture=False)
    return grids


def l1_weights(config: Config, alpha: float) -> tuple[float, ...]:
    """Of attacked batches of CIFAR-10 one, as a candidate takes minutes there."""
    return L1_WEIGHTS if config.dataset == "mnist" or alpha == 1 else LITTLE_L1[1:]


def with_l1(config: Config, method: Method) -> dict[str, Method]:
    """A method with each weight of the L1 norm, by its settings in words."""
    weights = l1_weights(config, method.alpha)[:: config.tune_every]
    return {f"L1 {weight:g}": replace(method, l1=weight) for weight in weights}


def cost(c: Config, alpha: float = 1.0, penalty: float = 0.0, attack: str | None = None) -> float:
    """Of training an optimizee, in gradients of a batch."""
    passes = {"none": 0, "fgsm": 1, "n-fgsm": 1}.get(attack or c.attack, c.attack_steps)
    attacked = 0 if alpha == 1 else 1 + passes
    clean = 0 if alpha == 0 else 3 if penalty else 1
    return c.steps * (attacked + clean)


@dataclass(frozen=True)
class Row:
    """A row of a table, for a fold and an ε: what a φ trains, or the candidates of a baseline.

    Of several candidates all train once, and the best third on more seeds. Fewer steps would choose
    otherwise, so each is a whole run.
    """

    setting: Setting
    fold: Fold
    eps: float
    label: str
    methods: dict[str, Method]  # by their settings in words
    meta_seed: int | None = None  # of its φ
    needs: tuple[str, ...] = ()  # the piece that makes that φ

    @property
    def title(self) -> str:
        """The label, and which φ."""
        return self.label + f", phi{self.meta_seed}" * (self.meta_seed is not None)

    def piece(self, what: str, run: str, compute: Callable, needs: tuple[str, ...]) -> Piece:
        """A training: all methods of a row cost the same, and an LSTM about another gradient."""
        c, one = self.setting.config, next(iter(self.methods.values()))
        own = cost(c, one.alpha, one.penalty, one.attack) + c.steps * (self.meta_seed is not None)
        if what == "run" and c.dataset != "quadratic":  # PGD on the test images comes after it
            own += len(attacks.LOSSES) * c.restarts * c.eval_steps * c.eval_samples / c.batch_size
        name = named(what, self.title, run, f"fold{self.fold.number}", f"eps{self.eps}")
        return Piece(name, compute, own, needs)

    def pieces(self) -> list[Piece]:
        """All that `chosen` needs."""
        if len(self.methods) == 1:
            return []
        result = []
        for settings in self.methods:
            run = partial(self.run, settings, 0)
            result.append(self.piece("tune", f"{settings}-seed0", run, self.needs))
        first = tuple(piece.name for piece in result)
        places = range(math.ceil(len(first) / STAY))
        for place, seed in product(places, range(1, self.setting.config.tune_seeds)):
            run = partial(self.run_place, place, seed)
            result.append(self.piece("tune", f"place-{place}-seed{seed}", run, first))
        return result

    def run(self, settings: str, seed: int, _: Parts) -> dict[str, Any]:
        loss = validate(self.setting, self.methods[settings], self.fold, self.eps, seed)
        return {"settings": settings, "loss": loss}

    def run_place(self, place: int, seed: int, parts: Parts) -> dict[str, Any]:
        first = [parts[piece.name] for piece in self.pieces()[: len(self.methods)]]
        ranked = sorted(first, key=lambda one: one["loss"])
        return self.run(ranked[place]["settings"], seed, parts)

    def chosen(self, parts: Parts) -> str:
        """The best settings, in words."""
        if len(self.methods) == 1:
            return next(iter(self.methods))
        losses: dict[str, list[float]] = {}
        for found in [parts[piece.name] for piece in self.pieces()]:
            losses.setdefault(found["settings"], []).append(found["loss"])

        def order(settings: str) -> tuple[bool, int, float]:
            mean = statistics.fmean(losses[settings])
            return math.isinf(mean), -len(losses[settings]), mean

        return min(losses, key=order)

    def method(self, parts: Parts) -> Method:
        return self.methods[self.chosen(parts)]


def validate(setting: Setting, method: Method, fold: Fold, eps: float, seed: int) -> float:
    """Train a method on one part of the meta-training half and evaluate it on the other: its loss
    under PGD, infinite if it is not finite or collapsed. A constant predictor is nobody's best."""
    c = replace(setting.config, record_every=setting.config.steps)
    trial = Trial(replace(setting, config=c), ("tune", fold.number, seed))
    model, curve, _ = trial.train(method, fold.inner(), eps)
    loss = curve.attacked[-1]
    if isinstance(fold.validation, data.ImageSet):
        found = trial.evaluate(model, fold.validation, eps)
        loss, accuracy = found["pgd_loss"], found["accuracy"]
        if evaluate.is_collapsed(loss, accuracy, setting.problem.classes):
            return math.inf
    return loss if math.isfinite(loss) else math.inf


def loss_of_phi(setting: Setting, fold: Fold, kind: str, eps: float, phi: nn.ModuleDict) -> float:
    """That of the row that φ is meant for, as candidates are validated, at the length of its
    longest episodes; infinite if it collapses."""
    c = setting.config
    short = replace(setting, config=replace(c, steps=c.episode_steps[-1]))
    by_phi = partial(LearnedOptimizer.for_model, phi=phi, backend=c.backend)
    methods = phi_methods(c, kind, eps, by_phi)
    method = next((one for one in methods if one.label == OWN[c.recipe]), methods[0])
    return statistics.fmean(validate(short, method, fold, eps, n) for n in range(c.tune_seeds))
