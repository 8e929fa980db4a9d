"""The paper's experiment: meta-train, tune the baselines, transfer, evaluate."""

import math
import warnings
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from l2l_ref import attacks, data, evaluate
from l2l_ref.episode import Episode
from l2l_ref.experiment import phis, tuning
from l2l_ref.experiment.config import Config
from l2l_ref.experiment.folder import Parts
from l2l_ref.experiment.queue import Piece
from l2l_ref.experiment.setting import Fold, Setting, Trial, capturable, folds, stream
from l2l_ref.experiment.tuning import Row
from l2l_ref.files import read_checkpoint, write_checkpoint
from l2l_ref.meta_training import CHECKS, meta_train
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.pretrained import read, save
from l2l_ref.transfer import Method

KEY = ("eps", "method", "fold", "phi", "seed")  # of a run; phi is a meta-seed, None for a baseline


class Experiment:
    """The pieces of the experiment of `setting.config`, kept in parts/ of `out`; φ are meta-trained
    unless it has --load, and these are what that loads, by name (`load_phis`)."""

    def __init__(self, setting: Setting, out: Path, phis: dict[str, nn.ModuleDict] | None = None):
        self.setting, self.out, self.parts = setting, out, Parts(out / "parts")
        self.phis = dict(phis or {})
        self.folds, self.warned = folds(setting), False
        self.tables = [
            self.rows(fold, eps) for fold, eps in product(self.folds, setting.config.eps)
        ]

    def pieces(self) -> list[Piece]:
        """All of them; φ first, then what chooses, then what is compared."""
        c, result = self.setting.config, []
        for name, key in ({} if c.load else phis.phis_of(c)).items():
            result.append(Piece(name, partial(self.train_phi, key), cost_of_phi(c, key[1])))
        result += [piece for rows in self.tables for row in rows for piece in row.pieces()]
        return result + [piece for _, piece in self.runs()]

    def train_phi(self, key: phis.Key, _: Any) -> dict[str, Any]:
        """Meta-train a φ, whose weights are in the checkpoint; returns its `History` as a dict."""
        setting, c, name = self.setting, self.setting.config, phis.phi_name(*key)
        number, kind, meta_seed, eps = key
        fold = self.folds[number]
        settings = c.meta_settings(eps, clean=kind == phis.CLEAN)
        phi = phis.untrained(setting, kind, number, meta_seed)
        lengths = phis.episode_lengths(c, stream(c.seed, "lengths", number, meta_seed))

        def draw(episode: int) -> Episode:
            trial = Trial(setting, ("meta", number, meta_seed, episode))
            return Episode(
                trial.model(),
                fold.meta.batches(c.batch_size, trial.stream("batches")),
                trial.attack(eps * settings.strength(episode)),
                setting.problem.loss,
                lengths[episode],
            )

        def on_episode(done: int, loss: float) -> None:
            if done % math.ceil(c.episodes / 10) == 0:
                words = f"meta-training {name}, episode {done}/{c.episodes}, loss {loss:.3f}"
                print(words, flush=True)

        check = partial(tuning.loss_of_phi, setting, fold, kind, eps, phi)
        history = meta_train(
            phi,
            settings,
            draw,
            backend=c.backend,
            capture=capturable(c),
            checkpoint=self.parts.path(name, "pt"),
            on_episode=on_episode,
            check=None if kind == phis.CLEAN else check,  # Transfer-NOT is meant for no row
        )
        self.phis[name] = phi
        if history.skipped or history.diverged:
            words = f"{history.skipped} meta-gradients not finite, {history.diverged} episodes cut"
            print(f"{name}: {words}", flush=True)
        return asdict(history)

    def phi(self, name: str) -> nn.ModuleDict:
        """A φ that is there: given, meta-trained here, or by another process."""
        if name not in self.phis:
            phi = phis.untrained(self.setting, name.split("-")[0], 0, 0)
            path = self.parts.path(name, "pt")
            phi.load_state_dict(read_checkpoint(path, self.setting.device)["meta_optimizers"])
            self.phis[name] = phi
        return self.phis[name]

    def rows(self, fold: Fold, eps: float) -> list[Row]:
        """Those of a table: the baselines, then what each φ trains."""
        c, of = self.setting.config, partial(Row, self.setting, fold, eps)
        result = [of(label, methods) for label, methods in tuning.candidates(c, eps).items()]
        for meta_seed, kind in product(range(c.meta_seeds), phis.kinds_of_phi(c)):
            name = phis.phi_name(fold.number, kind, meta_seed, eps)

            def optimizer(model: nn.Module, name=name) -> LearnedOptimizer:
                return LearnedOptimizer.for_model(model, self.phi(name), backend=c.backend)

            needs = () if c.load else (name,)
            for one in phis.phi_methods(c, kind, eps, optimizer):
                result.append(of(one.label, {"": one}, meta_seed, needs))
                if one.label in phis.WITH_L1 and c.attack != "none" and not c.theta_input:
                    label, grid = f"{one.label} + L1", tuning.with_l1(c, one)
                    result.append(of(label, grid, meta_seed, needs))
        return result

    def runs(self) -> list[tuple[dict[str, Any], Piece]]:
        """What is compared: each run's key in a table, and the piece that computes it."""
        c, result = self.setting.config, []
        for rows in self.tables:
            for seed, row in product(range(c.seeds), rows):
                values = row.eps, row.label, row.fold.number, row.meta_seed, seed
                needs = row.needs + tuple(piece.name for piece in row.pieces())
                piece = row.piece("run", f"seed{seed}", partial(self.run, row, seed), needs)
                result.append((dict(zip(KEY, values, strict=True)), piece))
        return result

    def run(self, row: Row, seed: int, parts: Parts) -> dict[str, Any]:
        """Train and evaluate one; of all warnings, of samples without a gradient, one is told."""
        with warnings.catch_warnings(record=True) as caught:
            result = run_method(self.setting, row.method(parts), row.fold, row.eps, seed)
        if caught and not self.warned:
            self.warned = True
            print(f"{row.label}: {caught[0].message}", flush=True)
        return result

    def results(self) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        """What all pieces left: the runs, one dict each, its `KEY` and what `run_method` returns;
        {eps: {fold: {row: its tuned settings}}}; {φ's name: its `History` as a dict}. Also
        writes meta_optimizer.pt."""
        c, parts = self.setting.config, self.parts
        runs = [{**key, **parts[piece.name]} for key, piece in self.runs()]
        chosen: dict[str, dict[str, dict[str, str]]] = {}
        for rows in self.tables:
            settings = {row.title: row.chosen(parts) for row in rows if "" not in row.methods}
            chosen.setdefault(str(rows[0].eps), {})[str(rows[0].fold.number)] = settings
        made = {name: self.phi(name) for name in phis.phis_of(c)}
        histories = {} if c.load else {name: parts[name] for name in made}
        if c.load:  # what they come from goes along unchanged
            write_checkpoint(self.out / "meta_optimizer.pt", read(c.load))
        else:
            save(self.out / "meta_optimizer.pt", made, {"config": asdict(c), **self.setting.data})
        return runs, chosen, histories


def cost_of_phi(c: Config, kind: str) -> float:
    """Of meta-training a φ with its checks, in gradients of a batch."""
    alphas = [1.0] if kind == phis.CLEAN else {c.alpha, c.input_alpha}
    updates = c.episodes * sum(c.episode_steps) / len(c.episode_steps)
    updates += (kind != phis.CLEAN) * CHECKS * c.tune_seeds * c.episode_steps[-1]
    return 1.5 * updates / c.steps * sum(tuning.cost(c, alpha, c.penalty) for alpha in alphas)


def transfer_trial(setting: Setting, fold: Fold, seed: int) -> Trial:
    """That of all methods of a seed."""
    return Trial(setting, ("transfer", fold.number, seed))


def run_method(
    setting: Setting, method: Method, fold: Fold, eps: float, seed: int
) -> dict[str, Any]:
    """Train one optimizee and evaluate its average: the fields of its `Curve`, and unless it is a
    quadratic what `Trial.evaluate` returns (for the last θ too), robust accuracies, and its `end`:
    "ok", "collapsed" or "diverged"."""
    c, trial = setting.config, transfer_trial(setting, fold, seed)
    model, curve, last = trial.train(method, fold, eps)
    ends = {"clean_loss": curve.clean[-1], "attacked_loss": curve.attacked[-1]}
    result = {**asdict(curve), **ends, "end": "diverged" if curve.diverged else "ok"}
    result["seconds"] = curve.ms_per_step * c.steps / 1e3
    result["trains_on"] = method.trains_on
    if isinstance(fold.test, data.ImageSet):
        result |= trial.evaluate(model, fold.test, eps)
        result["last"] = trial.evaluate(last, fold.test, eps)
        # The margin finds what the cross-entropy of a shrunk or overconfident model hides.
        losses, restarts = list(attacks.LOSSES), c.restarts
        if c.eval_attack != "pgd":  # it has a loss and restarts of its own
            losses, restarts = ["cross_entropy"], 1
        make = partial(attacks.make, eps=eps, steps=c.eval_steps, generator=trial.stream("judge"))
        several = [make(c.eval_attack, loss=loss) for loss in losses]
        accuracy = partial(evaluate.robust_accuracy, model, fold.test.first(c.eval_samples))
        result["fgsm_accuracy"] = accuracy(attacks.make("fgsm", eps=eps))
        result["pgd_accuracy"] = accuracy(several, restarts=restarts)
        if evaluate.is_collapsed(result["pgd_loss"], result["accuracy"], setting.problem.classes):
            result["end"] = "collapsed"
    return result
