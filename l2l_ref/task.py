"""What a run works on: data cut into folds, random streams, and the pieces a Config describes.

Every random number comes from a stream named by what it is for. So all methods of a seed start from
the same θ₀ and see the same batches, and no result depends on what was computed before it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref import attacks, data, engine, evaluate, problems
from l2l_ref.config import Config
from l2l_ref.errors import InputError
from l2l_ref.files import replace_with
from l2l_ref.meta_train import Episode, MetaSettings, meta_train, new_meta_optimizers
from l2l_ref.optimizer import LearnedOptimizer, flatten_
from l2l_ref.transfer import Curve, Method, train

VALIDATION = 6  # one sixth of the meta-training half chooses learning rates and grid settings
TRANSFER, NOT = "transfer", "not"  # the two kinds of φ: meta-trained under attack, or clean


def stream(*labels: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `labels`; on the CPU the same labels give the same bits anywhere."""
    digest = hashlib.sha256(repr(labels).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Parts:
    """Results on disk, one JSON file each: computed once, found again by a resumed run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The stored value of `name`, or what `compute` returns, stored.

        Raises:
            InputError: a stored part that cannot be read.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            try:
                return json.loads(path.read_text())
            except ValueError:
                raise InputError(f"{path} is broken: delete it and resume again") from None
        value = compute()
        replace_with(path, lambda partial: partial.write_text(json.dumps(value)))
        return value


@dataclass(frozen=True)
class Fold:
    """The data of one fold, and how often the halves have changed places (0 or 1)."""

    number: int
    meta: data.ImageSet | None  # meta-trains
    fit: data.ImageSet | None  # the part of it that trains candidates
    validation: data.ImageSet | None  # the part of it that chooses among them
    transfer: data.ImageSet | None  # trains what is compared


def folds(config: Config, images: data.Data | None) -> list[Fold]:
    """Cut the training set into halves by the seed, once, or twice with the halves swapped."""
    if images is None:  # quadratics are drawn, not split
        return [Fold(number, None, None, None, None) for number in range(config.folds)]
    halves = data.halves(len(images.train), config.seed)
    result = []
    for number in range(config.folds):
        meta, transfer = halves if number == 0 else halves[::-1]
        validation = len(meta) // VALIDATION
        cut = [meta, meta[validation:], meta[:validation], transfer]
        result.append(Fold(number, *(images.train.subset(index) for index in cut)))
    return result


@dataclass(frozen=True)
class Task:
    """What stays the same over a whole run: settings, problem, data, device."""

    config: Config
    problem: problems.Problem
    images: data.Data | None
    device: torch.device
    origin: str | None = None  # of φ, where it is loaded: data, attack, ε

    @property
    def checksum(self) -> str | None:
        """Of the images; None for quadratics."""
        return None if self.images is None else self.images.checksum

    @property
    def source(self) -> str:
        """Where the data came from, in the words that every artefact carries."""
        return "random quadratics" if self.images is None else self.images.source

    def test(self, count: int) -> data.ImageSet:
        """`count` test images, always the same: the first of a shuffled order.

        MNIST's own order will not do: its first thousands are by other writers than its last.
        """
        test = self.images.test
        order = torch.randperm(len(test), generator=stream(self.config.seed, "test"))
        return test.subset(order[:count].to(test.labels.device))

    def attack(self, eps: float, *labels: Any) -> attacks.Attack:
        """The attack that trains and is recorded, its random starts from a stream of its own.

        It draws on the task's device, so a GPU has other random starts than a CPU.
        """
        c = self.config
        size, generator = c.attack_step_size, stream(c.seed, "attack", *labels, device=self.device)
        return attacks.make(
            c.attack, eps=eps, steps=c.attack_steps, step_size=size, generator=generator
        )

    def batches(self, images: data.ImageSet | None, *labels: tuple) -> Iterator:
        """Endless batches: shuffled images, or one drawn set of quadratics.

        Of each of `labels` a stream draws; of several the batches are those of all, as
        `problems.Stacked` takes them.
        """
        size = self.config.batch_size
        generators = [stream(self.config.seed, "batches", *task) for task in labels]
        if images is None:
            return problems.quadratics(size, *generators, device=self.device)
        return data.batches(images, size, *generators)

    def draw(self, *labels: Any) -> nn.Module:
        """A fresh optimizee."""
        return self.problem.draw(stream(self.config.seed, "theta", *labels), self.device)

    def recorder(self, images: data.ImageSet | None, eps: float, *labels: Any):
        """model -> (clean loss, attacked loss) on the first images of a set, always the same."""
        if images is None:
            x, y = next(self.batches(None, labels))

            @torch.no_grad()
            def record(model: nn.Module) -> tuple[Tensor, Tensor]:
                loss = self.problem.loss(model, x, y)
                return loss, loss

            return record
        count = min(self.config.curve_samples, len(images))
        x, y = images.batch(torch.arange(count))
        return partial(evaluate.losses, x=x, y=y, attack=self.attack(eps, "record", *labels))

    def train(
        self,
        method: Method,
        images: data.ImageSet | None,
        probe: data.ImageSet | None,
        eps: float,
        *labels: Any,
        every: int = 1,
    ) -> tuple[nn.Module, Curve]:
        """A fresh optimizee that `method` has trained on `images`, and its curve on `probe`.

        θ₀, batches and attacks come from streams of `labels`: the same for every method.
        """
        model = self.draw(*labels)
        curve = train(
            model,
            method,
            self.batches(images, labels),
            loss=self.problem.loss,
            attack=self.attack(eps, *labels),
            steps=self.config.steps,
            record=self.recorder(probe, eps, *labels),
            every=every,
            capture=self.config.graphs,
        )
        return model, curve


def learn(
    task: Task,
    images: data.ImageSet | None,
    kind: str,
    eps: float,
    fold: int,
    meta_seed: int,
    on_episode: Callable[[int, float], None],
    checkpoint: Path | None = None,
) -> tuple[nn.ModuleDict, dict[str, Any]]:
    """Meta-train a φ of `kind` on `images`; returns it and its `History` as a dict.

    Transfer-NOT's is trained with α = 1, on clean batches and for the clean loss.
    """
    c = task.config
    settings = MetaSettings(
        episodes=c.episodes,
        steps=c.steps,
        unroll=c.unroll,
        meta_lr=c.meta_lr,
        schedule=c.meta_schedule,
        clip=c.clip,
        read_alpha=1.0 if kind == NOT else c.read_alpha,
        alpha=1.0 if kind == NOT else c.alpha,
        tasks=c.tasks,
    )
    phi = new_meta_optimizers(
        task.problem,
        stream(c.seed, "phi", fold, meta_seed),
        task.device,
        hidden_size=c.hidden_size,
        num_layers=c.num_layers,
        p=c.p,
        output_scale=c.output_scale,
        theta_input=c.theta_input,
        odd=c.odd,
    )

    def draw(number: int) -> Episode:
        # Task k of episode n has the θ₀ and the batches of episode n·K + k of a run with K = 1.
        tasks = [("meta", fold, meta_seed, number * c.tasks + k) for k in range(c.tasks)]
        models = [task.draw(*labels) for labels in tasks]
        model = models[0] if c.tasks == 1 else problems.Stacked(models)
        attack = task.attack(eps * warmup(number, c.eps_warmup * c.episodes), *tasks[0])
        return Episode(model, task.batches(images, *tasks), attack)

    history = meta_train(
        task.problem,
        phi,
        settings,
        draw,
        backend=c.backend,
        capture=c.graphs,
        checkpoint=checkpoint,
        on_episode=on_episode,
    )
    return phi, asdict(history)


def warmup(number: int, length: float) -> float:
    """The factor of ε in an episode: grows evenly over the first `length` episodes, then 1.

    An untrained φ can only drift. Under the full attack drifting to a constant predictor lowers the
    loss, and φ stays there; under a weak one it learns to descend first.
    """
    return min(1.0, (number + 1) / length) if length > 0 else 1.0


def learned(phi: nn.ModuleDict, backend: str, model: nn.Module) -> LearnedOptimizer:
    """φ as the optimizer of a model: one parameter group, of one vector, for each φ-group."""
    groups = problems.phi_groups(model).items()
    return LearnedOptimizer(
        [{"params": [flatten_(params)], "meta_optimizer": phi[name]} for name, params in groups],
        backend=backend,
    )


def prepare(config: Config) -> Task:
    """Load the data and choose the device.

    Raises:
        InputError: a device or backend that is not there; what `data.load` raises; too little data.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = engine.available_device(name)
    engine.resolve(config.backend, device)
    torch.backends.cudnn.deterministic = True  # the same command, the same bits
    problem = problems.make(config.dataset, config.optimizee, config.batch_size)
    images = None
    if config.dataset != "quadratic":
        images = data.load(
            config.dataset, config.data_dir, device=device, strict=config.strict_data
        )
        half = len(images.train) // 2
        smallest = half - half // VALIDATION
        if config.batch_size > smallest:
            raise InputError(
                f"--batch-size is {config.batch_size} but a candidate trains on {smallest} images "
                f"of {images.source}: choose a smaller one"
            )
    return Task(config, problem, images, device)


@dataclass(frozen=True)
class Reporter:
    """Where a run says what it does: `say` prints a line, `progress(total, label)` makes a
    callback (done, loss) that shows how far a piece of work is."""

    say: Callable[[str], None]
    progress: Callable[[int, str], Callable[[int, float], None]]
