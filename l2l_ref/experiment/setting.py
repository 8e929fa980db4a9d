"""What a run works on: its problem, its data cut into folds, its device, its random streams."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from l2l_ref import data, problems
from l2l_ref.backend import available_device, resolve
from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config

VALIDATION = 6  # one sixth of the meta-training half chooses learning rates and grid settings


def stream(*labels: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `labels`; on the CPU the same labels give the same bits anywhere."""
    digest = hashlib.sha256(repr(labels).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Fold:
    """The data of one fold, and how often the halves have changed places (0 or 1)."""

    number: int
    meta: data.ImageSet | None  # meta-trains
    fit: data.ImageSet | None  # the part of it that trains candidates
    validation: data.ImageSet | None  # the part of it that chooses among them
    transfer: data.ImageSet | None  # trains what is compared
    test: data.ImageSet | None  # judges it


def folds(config: Config, images: data.Data | None) -> list[Fold]:
    """Cut the training set into halves by the seed, once, or twice with the halves swapped.

    With `--judge validation` all is of the meta-training half: what the parts of it that train and
    choose have in a run that touches the test set, they have here in place of the halves and test.
    """
    if images is None:  # quadratics are drawn, not split
        return [Fold(number, *[None] * 5) for number in range(config.folds)]
    halves = data.halves(len(images.train), config.seed)
    # MNIST's own order will not do: its first thousands are by other writers than its last.
    order = torch.randperm(len(images.test), generator=stream(config.seed, "test"))
    test = images.test.subset(order.to(images.test.labels.device))
    result = []
    for number in range(config.folds):
        meta, transfer = halves if number == 0 else halves[::-1]
        count = len(meta) // VALIDATION
        fit, validation = (images.train.subset(i) for i in (meta[count:], meta[:count]))
        if config.judge == "validation":
            sets = [fit, fit, validation, fit, validation]
        else:
            meta, transfer = images.train.subset(meta), images.train.subset(transfer)
            sets = [meta, fit, validation, transfer, test]
        result.append(Fold(number, *sets))
    return result


def few(images: data.ImageSet | None, count: int | None) -> data.ImageSet | None:
    """The first `count` of a set in random order, or all of it."""
    return images if images is None or count is None else images.subset(torch.arange(count))


@dataclass(frozen=True)
class Setting:
    """What stays the same over a whole run: configuration, problem, data, device."""

    config: Config
    problem: problems.Problem
    images: data.Data | None
    device: torch.device
    origin: str | None = None  # of φ, where it is loaded: data, attack, ε
    given_up: dict[str, str] = field(default_factory=dict)  # of those: {name: why}

    @property
    def data(self) -> tuple[str, str | None]:
        """Where the data came from, and its checksum."""
        return self.source, self.checksum

    @property
    def checksum(self) -> str | None:
        """Of the images; None for quadratics."""
        return None if self.images is None else self.images.checksum

    @property
    def source(self) -> str:
        """Where the data came from, in the words that every artefact carries."""
        return "random quadratics" if self.images is None else self.images.source


def prepare(config: Config, rank: int = 0) -> Setting:
    """Load the data and choose the device; with several GPUs each rank takes one in turn.

    Raises:
        InputError: a device or backend that is not there; what `data.load` raises; too little data.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and rank:
        name = f"cuda:{rank % torch.cuda.device_count()}"
    device = available_device(name)
    resolve(config.backend, device)
    torch.backends.cudnn.deterministic = True  # the same command, the same bits
    problem = problems.make(config.dataset, config.optimizee, config.batch_size)
    images = None
    if config.dataset != "quadratic":
        images = data.load(
            config.dataset, config.data_dir, device=device, strict=config.strict_data
        )
        half = len(images.train) // 2
        smallest = half - half // VALIDATION
        for name in ("batch_size", "images"):
            if (getattr(config, name) or 0) > smallest:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(config, name)} but a candidate trains "
                    f"on {smallest} images of {images.source}: choose a smaller one"
                )
    return Setting(config, problem, images, device)
