"""What a run works on: its problem, its data cut into folds, its device, its random streams."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from l2l_ref import attacks, data, problems
from l2l_ref.backend import available_device, resolve
from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config
from l2l_ref.foreign import imported

VALIDATION = 6  # one sixth of the meta-training half chooses learning rates and grid settings


def stream(*labels: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `labels`; on the CPU the same labels give the same bits anywhere."""
    digest = hashlib.sha256(repr(labels).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Setting:
    """What stays the same over a whole run: configuration, problem, samples, device."""

    config: Config
    problem: problems.Problem
    train: data.Samples
    test: data.Samples
    source: str  # of the samples, in the words that every artefact carries
    checksum: str | None  # of images
    device: torch.device
    origin: str | None = None  # of φ, where it is loaded: data, attack, ε

    @property
    def data(self) -> tuple[str, str | None]:
        """Where the samples came from, and their checksum."""
        return self.source, self.checksum


@dataclass(frozen=True)
class Fold:
    """The samples of one fold, and how often the halves have changed places (0 or 1)."""

    number: int
    meta: data.Samples  # meta-trains
    fit: data.Samples  # the part of it that trains candidates
    validation: data.Samples  # the part of it that chooses among them
    transfer: data.Samples  # trains what is compared
    test: data.Samples  # evaluates it


def folds(setting: Setting) -> list[Fold]:
    """Cut the training set into halves by the seed, once, or twice with the halves swapped.

    With `--eval-on validation` all is of the meta-training half: what the parts of it that train
    and choose have in a run that touches the test set, they have here in place of halves and test.
    """
    config, result = setting.config, []
    halves = setting.train.halves(config.seed)
    # MNIST's own order will not do: its first thousands are by other writers than its last.
    test = setting.test.shuffled(stream(config.seed, "test"))
    for number in range(config.folds):
        meta, transfer = halves if number == 0 else halves[::-1]
        count = len(meta) // VALIDATION
        fit, validation = meta.rest(count), meta.first(count)
        if config.eval_on == "validation":
            meta, transfer, test = fit, fit, validation
        result.append(Fold(number, meta, fit, validation, transfer, test))
    return result


def prepare(config: Config, number: int = 0) -> Setting:
    """Load the data and choose the device; of several GPUs this process takes that of its number.

    Raises:
        InputError: a device, backend or attack that is not there; too little data; what `data.load`
            raises.
    """
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
        imported(name, "compare")
    torch.backends.cudnn.deterministic = True  # the same command, the same bits
    problem = problems.make(config.dataset, config.optimizee, config.batch_size)
    if not problem.classes:
        drawn = problems.Quadratics(config.batch_size, device)
        return Setting(config, problem, drawn, drawn, "random quadratics", None, device)
    images = data.load(
        config.dataset, config.data_dir, device=device, strict=config.strict_data, seed=config.seed
    )
    half = len(images.train) // 2
    smallest = half - half // VALIDATION
    for name in ("batch_size", "images"):
        if (getattr(config, name) or 0) > smallest:
            raise InputError(
                f"--{name.replace('_', '-')} is {getattr(config, name)} but a candidate trains "
                f"on {smallest} images of {images.source}: choose a smaller one"
            )
    return Setting(
        config, problem, images.train, images.test, images.source, images.checksum, device
    )
