"""The paper's experiment: meta-train, tune the baselines, transfer, evaluate.

Every finished piece is kept in `<out>/parts`, so that a resumed run repeats none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from l2l_ref import attacks, data, evaluate
from l2l_ref.experiment import tuning
from l2l_ref.experiment.phis import kinds_of_phi, phi_methods, phi_name, phis_of
from l2l_ref.experiment.progress import Progress
from l2l_ref.experiment.queue import Parts, Piece, named
from l2l_ref.experiment.setting import Fold, Setting, folds
from l2l_ref.experiment.trial import CLEAN, Trial, train_phi, untrained
from l2l_ref.files import read_checkpoint, write_checkpoint
from l2l_ref.meta_training import CHECKS
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.pretrained import read, save
from l2l_ref.transfer import Curve, Method

KEY = ("eps", "method", "fold", "phi", "seed")  # of a run; phi is a meta-seed, None for a baseline


@dataclass(frozen=True)
class Results:
    """All that a report is made of.

    Attributes:
        runs: one dict a run: its `KEY`, and what `run_method` returns.
        chosen: {eps: {fold: {baseline: its tuned settings}}}.
        meta_training: {φ's name: its History as a dict}.
    """

    runs: list[dict[str, Any]]
    chosen: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    meta_training: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """A row of a table.

    Attributes:
        method: its label, and what it costs; tuned settings and φ come from `make`.
        make: the results of all pieces so far -> the method.
        needs: the pieces that it needs for that.
        meta_seed: of its φ; None for a baseline.
    """

    method: Method
    make: Callable[[Mapping[str, Any]], Method]
    needs: tuple[str, ...] = ()
    meta_seed: int | None = None


class Experiment:
    """The pieces of the experiment of `setting.config`, which leave parts/ in `out`.

    Args:
        phis: φ by name (`load_phis`); those that are missing are meta-trained.
    """

    def __init__(self, setting: Setting, out: Path, phis: dict[str, nn.ModuleDict] | None = None):
        self.setting, self.out, self.parts = setting, out, Parts(out / "parts")
        self.phis = dict(phis or {})
        self.given = frozenset(self.phis)
        self.folds = folds(setting)

    def pieces(self) -> list[Piece]:
        """All of them; φ first, then what chooses, then what is compared."""
        c, result = self.setting.config, []
        for name, (kind, number, meta_seed, eps) in phis_of(c).items():
            if name not in self.given:
                result.append(self.phi_piece(name, kind, self.folds[number], meta_seed, eps))
        for fold, eps in product(self.folds, c.eps):
            for grid in tuning.grids(self.setting, fold, eps):
                result += grid.pieces()
        return result + [piece for _, piece in self.runs()]

    def phi_piece(self, name: str, kind: str, fold: Fold, meta_seed: int, eps: float) -> Piece:
        """Meta-trains a φ; its history is the result, its weights are in the checkpoint."""
        c = self.setting.config

        def compute(_: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
            show = progress.begin(
                c.episodes, f"meta-training φ {meta_seed} ({kind}, ε {eps:g}), episode"
            )
            checkpoint = self.parts.path(name, "pt")
            check = tuning.check_of(self.setting, fold, kind, eps)
            self.phis[name], history = train_phi(
                self.setting, fold.meta, kind, eps, fold.number, meta_seed, show, checkpoint, check
            )
            if history["skipped"] or history["diverged"]:
                progress.say(
                    f"{name}: {history['skipped']} meta-gradients were not finite and skipped, "
                    f"{history['diverged']} episodes diverged and were cut short"
                )
            return history

        alphas = [1.0] if kind == CLEAN else {c.alpha, c.input_alpha}
        updates = c.episodes * sum(c.episode_steps) / len(c.episode_steps)
        updates += (kind != CLEAN) * CHECKS * c.tune_seeds * c.episode_steps[-1]
        cost = updates / c.steps * sum(tuning.cost(c, alpha, c.penalty) for alpha in alphas)
        return Piece(name, compute, 1.5 * cost)

    def phi(self, name: str) -> nn.ModuleDict:
        """A φ that is there: given, meta-trained here, or by another process."""
        if name not in self.phis:
            phi = untrained(self.setting, name.split("-")[0], 0, 0)
            path = self.parts.path(name, "pt")
            saved = read_checkpoint(path, self.setting.device)
            phi.load_state_dict(saved["meta_optimizers"])
            self.phis[name] = phi
        return self.phis[name]

    def runs(self) -> list[tuple[dict[str, Any], Piece]]:
        """What is compared: each run's key in a table, and the piece that computes it."""
        c, result = self.setting.config, []
        for fold, eps in product(self.folds, c.eps):
            contenders = self.contenders(fold, eps)
            for seed, contender in product(range(c.seeds), contenders):
                method, meta_seed = contender.method, contender.meta_seed
                values = eps, method.label, fold.number, meta_seed, seed
                key: dict[str, Any] = dict(zip(KEY, values, strict=True))
                words = [f"{k}{v}" for k, v in key.items() if k != "method" and v is not None]

                def compute(parts, _, make=contender.make, fold=fold, eps=eps, seed=seed):
                    return run_method(self.setting, make(parts), fold, eps, seed)

                cost = tuning.cost(c, method.alpha, method.penalty, method.attack)
                cost += c.steps * (meta_seed is not None)  # the LSTM
                name = named("run", method.label, *words)
                result.append((key, Piece(name, compute, cost, contender.needs)))
        return result

    def contenders(self, fold: Fold, eps: float) -> list[Contender]:
        """The rows of a table."""
        c, result = self.setting.config, []
        for grid in tuning.grids(self.setting, fold, eps):
            any_of = next(iter(grid.methods.values()))
            result.append(Contender(any_of, grid.method, grid.needs()))
        for meta_seed, kind in product(range(c.meta_seeds), kinds_of_phi(c)):
            name = phi_name(kind, fold.number, meta_seed, eps)

            def optimizer(model: nn.Module, name=name) -> LearnedOptimizer:
                return LearnedOptimizer.for_model(model, self.phi(name), backend=c.backend)

            needs = () if name in self.given else (name,)
            for method in phi_methods(c, kind, eps, optimizer):

                def make(_: Mapping[str, Any], method: Method = method) -> Method:
                    return method

                result.append(Contender(method, make, needs, meta_seed))
        return result

    def results(self) -> Results:
        """What all pieces left; also writes meta_optimizer.pt."""
        c, parts = self.setting.config, self.parts
        runs = [{**key, **parts[piece.name]} for key, piece in self.runs()]
        chosen: dict[str, dict[str, dict[str, str]]] = {}
        for fold, eps in product(self.folds, c.eps):
            chosen.setdefault(str(eps), {})[str(fold.number)] = {
                grid.label: grid.chosen(parts) for grid in tuning.grids(self.setting, fold, eps)
            }
        phis = {name: self.phi(name) for name in phis_of(c)}
        histories = {name: parts[name] for name in phis if name not in self.given}
        if c.load and not histories:  # what they come from goes along unchanged
            write_checkpoint(self.out / "meta_optimizer.pt", read(c.load))
        else:
            data, checksum = self.setting.data
            about = {"config": asdict(c), "data": data, "data_sha256": checksum}
            save(self.out / "meta_optimizer.pt", phis, about)
        return Results(runs, chosen, histories)


def train_method(
    setting: Setting, method: Method, fold: Fold, eps: float, seed: int
) -> tuple[Trial, nn.Module, Curve, nn.Module]:
    """The trial of an optimizee that a method has trained on its half, and `Trial.train`'s."""
    trial = Trial(setting, ("transfer", fold.number, seed))
    half = (fold.meta if method.half == "meta" else fold.transfer).first(setting.config.images)
    return trial, *trial.train(method, half, fold.test, eps)


def run_method(
    setting: Setting, method: Method, fold: Fold, eps: float, seed: int
) -> dict[str, Any]:
    """Train one optimizee and evaluate its average: the fields of its `Curve`, and unless it is a
    quadratic what `Trial.evaluate` returns (for the last θ too), robust accuracies, and its `end`:
    "ok", "collapsed" or "diverged"."""
    c, trained = setting.config, train_method(setting, method, fold, eps, seed)
    trial, model, curve, last = trained
    ends = {"clean_loss": curve.clean[-1], "attacked_loss": curve.attacked[-1]}
    result = {**asdict(curve), **ends, "end": "diverged" if curve.diverged else "ok"}
    result["seconds"] = curve.ms_per_step * c.steps / 1e3
    result["trains_on"] = method.trains_on
    if isinstance(fold.test, data.ImageSet):
        sample = fold.test.first(c.eval_samples)
        generator = trial.stream("judge")
        result |= trial.evaluate(model, fold.test, eps)
        result["last"] = trial.evaluate(last, fold.test, eps)
        # The margin finds what the cross-entropy of a shrunk or overconfident model hides.
        losses, restarts = list(attacks.LOSSES), c.restarts
        if c.eval_attack != "pgd":  # it has a loss and restarts of its own
            losses, restarts = ["cross_entropy"], 1
        make = partial(attacks.make, eps=eps, steps=c.eval_steps, generator=generator)
        attackers = [make(c.eval_attack, loss=loss) for loss in losses]
        fgsm = attacks.make("fgsm", eps=eps)
        result["fgsm_accuracy"] = evaluate.robust_accuracy(model, sample, fgsm)
        result["pgd_accuracy"] = evaluate.robust_accuracy(
            model, sample, attackers, restarts=restarts
        )
        if evaluate.is_collapsed(result["pgd_loss"], result["accuracy"], setting.problem.classes):
            result["end"] = "collapsed"
    return result
