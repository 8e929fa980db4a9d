"""What a run is made of: its setting, the folds of its data, and the training of one optimizee.

Every random number comes from a stream named by what it is for and by the labels of its trial. So
all methods of a seed start from the same θ₀ and see the same batches, and no result depends on what
was computed before it.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from l2l_ref import attacks, data, evaluate, problems
from l2l_ref.backend import available_device, resolve
from l2l_ref.errors import InputError, shortened
from l2l_ref.experiment.config import Config
from l2l_ref.foreign import imported
from l2l_ref.transfer import Curve, Method, running_average, train

VALIDATION = 6  # one sixth of the meta-training half chooses learning rates and grid settings
AVERAGE_OVER = 0.1  # share of the steps in the average that is evaluated
POINTS = 50  # of a curve
PGD_STEPS = 7  # of the loss under attack
CALIBRATION = 1024  # images that the batch-norm of an average takes its statistics from
Samples = data.ImageSet | problems.Quadratics


def stream(*labels: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `labels`; on the CPU the same labels give the same bits anywhere."""
    digest = hashlib.sha256(repr(labels).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Setting:
    """What stays the same over a whole run: configuration, problem, samples, device."""

    config: Config
    problem: problems.Problem
    train: Samples
    test: Samples
    data: dict[str, Any]  # in every artefact: what samples and loaded φ are, with checksums
    device: torch.device


@dataclass(frozen=True)
class Fold:
    """The samples of one fold, and how often the halves have changed places (0 or 1)."""

    number: int
    meta: Samples  # meta-trains
    fit: Samples  # the part of it that trains candidates
    validation: Samples  # the part of it that chooses among them
    transfer: Samples  # trains what is compared
    test: Samples  # evaluates it

    def inner(self) -> "Fold":
        """The same within its meta-training half."""
        return replace(self, meta=self.fit, transfer=self.fit, test=self.validation)


def folds(setting: Setting) -> list[Fold]:
    """Cut the training set into halves by the seed, once, or twice with the halves swapped.

    With `--eval-on validation` all is of the meta-training half, as what chooses always is.
    """
    config, result = setting.config, []
    halves = setting.train.halves(config.seed)
    # MNIST's own order will not do: its first thousands are by other writers than its last.
    test = setting.test.shuffled(stream(config.seed, "test"))
    for number, (meta, transfer) in enumerate([halves, halves[::-1]][: config.folds]):
        count = len(meta) // VALIDATION
        fold = Fold(number, meta, meta.rest(count), meta.first(count), transfer, test)
        result.append(fold.inner() if config.eval_on == "validation" else fold)
    return result


def prepare(config: Config, number: int = 0) -> Setting:
    """Load the data and choose the device; of several GPUs this process takes that of its number.
    InputError for a device, backend or attack that is not there, and for too little data."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and number:
        name = f"cuda:{number % torch.cuda.device_count()}"
    device = available_device(name)
    resolve(config.backend, device)
    for name in (config.attack, config.eval_attack):
        attacks.make(name, eps=config.eps[0])  # a name that is nowhere is wrong now
    for name in config.compare:
        imported(name)
    torch.backends.cudnn.deterministic = True  # the same command, the same bits
    problem = problems.make(config.dataset, config.optimizee, config.batch_size)
    if not problem.classes:
        drawn = problems.Quadratics(config.batch_size, device)
        about: dict[str, Any] = {"data": "random quadratics", "data_sha256": None}
        return Setting(config, problem, drawn, drawn, about, device)
    images = data.load(
        config.dataset, config.data_dir, device=device, strict=config.strict_data, seed=config.seed
    )
    black = torch.zeros(2, *images.train.images.shape[1:], device=device)
    try:
        problem.loss(problem.build().to(device), black, images.train.labels[:2])
    except Exception as error:  # a function of the user's raises what it likes
        words = f"--optimizee {config.optimizee} does not take images of {config.dataset} to logits"
        raise InputError(f"{words} ({shortened(error)}): name one that does") from None
    half, asked = len(images.train) // 2, config.images or config.batch_size
    if asked > (smallest := half - half // VALIDATION):
        raise InputError(
            f"{asked} images are asked for but a candidate trains on {smallest} images of "
            f"{images.source}: give --images or --batch-size a smaller number"
        )
    about = {"data": images.source, "data_sha256": images.checksum}
    return Setting(config, problem, images.train, images.test, about, device)


@dataclass(frozen=True)
class Trial:
    """A training of an optimizee. Methods that share a trial share θ₀, batches and attacks."""

    setting: Setting
    labels: tuple[Any, ...]  # name the trial, and with it its random streams

    def stream(self, what: str, device: torch.device | str = "cpu") -> torch.Generator:
        """The trial's generator for a purpose, from its beginning."""
        return stream(self.setting.config.seed, what, *self.labels, device=device)

    def model(self) -> nn.Module:
        """A fresh optimizee; what it draws in training, as dropout does, is the trial's too."""
        torch.manual_seed(self.stream("global").initial_seed())
        return self.setting.problem.draw(self.stream("theta"), self.setting.device)

    def attack(self, eps: float, name: str | None = None) -> attacks.Attack:
        """The attack that trains and is recorded, or one by name, with a stream of its own.

        It draws on the setting's device, so a GPU has other random starts than a CPU.
        """
        c, generator = self.setting.config, self.stream("attack", self.setting.device)
        return attacks.make(name or c.attack, eps=eps, steps=c.attack_steps, generator=generator)

    def train(self, method: Method, fold: Fold, eps: float) -> tuple[nn.Module, Curve, nn.Module]:
        """A fresh optimizee that `method` has trained on its half, at its running average, its
        curve, always on the same of `fold.test`, and itself."""
        c, model = self.setting.config, self.model()
        samples = (fold.meta if method.half == "meta" else fold.transfer).first(c.images)
        average = running_average(model, 1 - 1 / max(1.0, AVERAGE_OVER * c.steps))
        calibration, _ = samples.probe(CALIBRATION, self.stream("calibration"))
        x, y = fold.test.probe(c.curve_samples, self.stream("batches"))
        attack = Trial(self.setting, ("record", *self.labels)).attack(eps)
        loss = self.setting.problem.loss
        curve = train(
            model,
            method,
            samples.batches(c.batch_size, self.stream("batches")),
            loss=loss,
            attack=self.attack(eps, method.attack),
            steps=c.steps,
            record=partial(evaluate.losses, x=x, y=y, attack=attack, loss=loss),
            every=c.record_every or math.ceil(c.steps / POINTS),
            capture=capturable(c),
            average=average,
            calibration=calibration.split(c.batch_size),
        )
        return average.module, curve, model

    def evaluate(self, model: nn.Module, images: data.ImageSet, eps: float) -> dict[str, float]:
        """Losses under PGD and FGSM on the first images of a set, and the clean accuracy.

        PGD-7, whatever attack trains: FGSM alone is fooled by a model that hides its gradient.
        """
        c, generator = self.setting.config, self.stream("judge loss", self.setting.device)
        x, y = images.first(c.curve_samples).all()
        result = {}
        for name in ("pgd", "fgsm"):
            attack = attacks.make(name, eps=eps, steps=PGD_STEPS, generator=generator)
            _, loss = evaluate.losses(model, x, y, attack)
            result[f"{name}_loss"] = loss.item()
        sample = images.first(c.eval_samples)
        result["accuracy"] = evaluate.robust_accuracy(model, sample, attacks.none)
        return result


def capturable(c: Config) -> bool:
    """Whether updates may be CUDA graphs: another library's attack waits for the device."""
    return c.graphs and ":" not in c.attack
