"""One training, of an optimizee or of a φ, with all its randomness.

Every random number comes from a stream named by what it is for and by the labels of its trial. So
all methods of a seed start from the same θ₀ and see the same batches, and no result depends on what
was computed before it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref import attacks, data, evaluate
from l2l_ref.episode import Episode
from l2l_ref.experiment.config import Config
from l2l_ref.experiment.setting import Setting, stream
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.meta_training import meta_train
from l2l_ref.transfer import Curve, Method, running_average, train

PGD_STEPS = 7  # of the loss under attack
CALIBRATION = 1024  # images that the batch-norm of an average takes its statistics from
# The kinds of φ: meta-trained under attack; on clean batches; a nominal term without an LSTM.
UNDER_ATTACK, CLEAN, ABLATION = "attacked", "clean", "ablation"


@dataclass(frozen=True)
class Trial:
    """A training of an optimizee. Methods that share a trial share θ₀, batches and attacks.

    Attributes:
        setting: of the run.
        labels: name the trial, and with it its random streams.
    """

    setting: Setting
    labels: tuple[Any, ...]

    def stream(self, what: str, device: torch.device | str = "cpu") -> torch.Generator:
        """The trial's generator for a purpose, from its beginning."""
        return stream(self.setting.config.seed, what, *self.labels, device=device)

    def model(self) -> nn.Module:
        """A fresh optimizee."""
        return self.setting.problem.draw(self.stream("theta"), self.setting.device)

    def attack(self, eps: float, name: str | None = None) -> attacks.Attack:
        """The attack that trains and is recorded, or one by name, its random starts from a stream
        of its own.

        It draws on the setting's device, so a GPU has other random starts than a CPU.
        """
        c, generator = self.setting.config, self.stream("attack", self.setting.device)
        steps, size = c.attack_steps, c.attack_step_size
        return attacks.make(
            name or c.attack, eps=eps, steps=steps, step_size=size, generator=generator
        )

    def probe(
        self, samples: data.Samples, eps: float
    ) -> Callable[[nn.Module], tuple[Tensor, Tensor]]:
        """model -> (clean loss, attacked loss), always on the same samples."""
        x, y = samples.probe(self.setting.config.curve_samples, self.stream("batches"))
        attack = Trial(self.setting, ("record", *self.labels)).attack(eps)
        return partial(evaluate.losses, x=x, y=y, attack=attack, loss=self.setting.problem.loss)

    def train(
        self,
        method: Method,
        samples: data.Samples,
        probe: data.Samples,
        eps: float,
        *,
        every: int | None = None,
    ) -> tuple[nn.Module, Curve, nn.Module]:
        """A fresh optimizee that `method` has trained on `samples`, at its running average, its
        curve on `probe`, and itself."""
        c, model = self.setting.config, self.model()
        average = running_average(model, 1 - 1 / max(1.0, c.average_over * c.steps))
        calibration, _ = samples.probe(CALIBRATION, self.stream("calibration"))
        curve = train(
            model,
            method,
            samples.batches(c.batch_size, self.stream("batches")),
            loss=self.setting.problem.loss,
            attack=self.attack(eps, method.attack),
            steps=c.steps,
            record=self.probe(probe, eps),
            every=every or c.record_every,
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


def untrained(setting: Setting, kind: str, fold: int, meta_seed: int) -> nn.ModuleDict:
    """An untrained φ of a kind; ABLATION's is as small as can be, and its update frozen at zero."""
    c = setting.config
    names = ("hidden_size", "num_layers", "p", "output_scale", "theta_input", "odd", "nominal")
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


def train_phi(
    setting: Setting,
    samples: data.Samples,
    kind: str,
    eps: float,
    fold: int,
    meta_seed: int,
    on_episode: Callable[[int, float], None],
    checkpoint: Path | None = None,
    check: Callable[[nn.ModuleDict], float] | None = None,
) -> tuple[nn.ModuleDict, dict[str, Any]]:
    """Meta-train a φ of `kind` on `samples`; returns it and its `History` as a dict.

    `check`: the loss of φ on validation images, or None where its last state will do.
    """
    c = setting.config
    settings = c.meta_settings(eps, clean=kind == CLEAN)
    phi = untrained(setting, kind, fold, meta_seed)
    lengths = episode_lengths(c, stream(c.seed, "lengths", fold, meta_seed))

    def draw(number: int) -> Episode:
        trial = Trial(setting, ("meta", fold, meta_seed, number))
        return Episode(
            trial.model(),
            samples.batches(c.batch_size, trial.stream("batches")),
            trial.attack(eps * settings.strength(number)),
            setting.problem.loss,
            lengths[number],
        )

    history = meta_train(
        phi,
        settings,
        draw,
        backend=c.backend,
        capture=capturable(c),
        checkpoint=checkpoint,
        on_episode=on_episode,
        check=check and partial(check, phi),
    )
    return phi, asdict(history)


def capturable(c: Config) -> bool:
    """Whether updates may be CUDA graphs: another library's attack waits for the device."""
    return c.graphs and c.attack in attacks.ATTACKS


def episode_lengths(c: Config, generator: torch.Generator) -> list[int]:
    """The updates of each episode: log-uniform, and stratified, so that every φ meets as many long
    ones; which episode is how long is drawn."""
    low, high = c.episode_steps[0], c.episode_steps[-1]
    strata = torch.randperm(c.episodes, generator=generator)
    shares = (strata + torch.rand(c.episodes, generator=generator)) / c.episodes
    return [round(low * (high / low) ** share) for share in shares.tolist()]
