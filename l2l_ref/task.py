"""What a run works on: data cut into folds, random streams, and the pieces a Config describes.

Every random number comes from a stream named by what it is for. So all methods of a seed start from
the same θ₀ and see the same batches, and no result depends on what was computed before it.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref import attacks, data, engine, evaluate, problems
from l2l_ref.config import Config
from l2l_ref.errors import InputError
from l2l_ref.meta_train import Episode, MetaSettings, meta_train, new_meta_optimizers
from l2l_ref.optimizer import LearnedOptimizer, flatten_
from l2l_ref.transfer import Curve, Method, train

PGD_STEPS = 7  # of the loss under attack
VALIDATION = 6  # one sixth of the meta-training half chooses learning rates and grid settings
# The kinds of φ: meta-trained under attack; on clean batches; a nominal term alone.
TRANSFER, NOT, NOMINAL = "transfer", "not", "nominal"


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
class Task:
    """What stays the same over a whole run: settings, problem, data, device."""

    config: Config
    problem: problems.Problem
    images: data.Data | None
    device: torch.device
    origin: str | None = None  # of φ, where it is loaded: data, attack, ε
    given_up: dict[str, str] = field(default_factory=dict)  # of those: {name: why}

    @property
    def checksum(self) -> str | None:
        """Of the images; None for quadratics."""
        return None if self.images is None else self.images.checksum

    @property
    def source(self) -> str:
        """Where the data came from, in the words that every artefact carries."""
        return "random quadratics" if self.images is None else self.images.source

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
        every: int | None = None,
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
            every=every or self.config.record_every,
            capture=self.config.graphs,
        )
        return model, curve

    def judge(
        self, model: nn.Module, images: data.ImageSet, eps: float, *labels: Any
    ) -> dict[str, float]:
        """Losses under PGD and FGSM on the first images of a set, and the clean accuracy.

        PGD-7, whatever attack trains: FGSM alone is fooled by a model that hides its gradient.
        """
        generator = stream(self.config.seed, "judge loss", *labels, device=self.device)
        x, y = images.batch(torch.arange(min(self.config.curve_samples, len(images))))
        judges = {"pgd": {"steps": PGD_STEPS, "generator": generator}, "fgsm": {}}
        result = {}
        for name, options in judges.items():
            attack = attacks.make(name, eps=eps, **options)
            _, loss = evaluate.losses(model, x, y, attack)
            result[f"{name}_loss"] = loss.item()
        sample = images.subset(torch.arange(min(self.config.eval_samples, len(images))))
        result["accuracy"] = evaluate.robust_accuracy(model, sample, attacks.none)
        return result


def new_phi(task: Task, kind: str, fold: int, meta_seed: int) -> nn.ModuleDict:
    """An untrained φ of a kind; NOMINAL's is as small as can be, and its update frozen at zero."""
    c = task.config
    form: dict[str, Any] = {
        name: getattr(c, name)
        for name in ("hidden_size", "num_layers", "p", "output_scale", "theta_input", "odd")
    }
    form["nominal"] = c.nominal
    if kind == NOMINAL:
        form = {"hidden_size": 1, "num_layers": 1, "nominal": True}
    generator = stream(c.seed, "phi", fold, meta_seed)
    phi = new_meta_optimizers(task.problem, generator, task.device, **form)
    if kind == NOMINAL:
        for meta in phi.values():
            for weight in meta.weights():
                weight.requires_grad_(False)
    return phi


def meta_settings(c: Config, kind: str, eps: float) -> MetaSettings:
    """How a φ of a kind is trained; Transfer-NOT's with α = 1, on clean batches and for them."""
    clean = kind == NOT
    return MetaSettings(
        episodes=c.episodes,
        steps=c.episode_steps[-1],
        unroll=c.unroll,
        meta_lr=c.meta_lr,
        schedule=c.meta_schedule,
        clip=c.clip,
        read_alpha=1.0 if clean else c.read_alpha,
        penalty=0.0 if clean else c.penalty * eps,
        alpha=1.0 if clean else c.alpha,
        curriculum=c.curriculum,
        tasks=c.tasks,
    )


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
    """Meta-train a φ of `kind` on `images`; returns it and its `History` as a dict."""
    c = task.config
    settings = meta_settings(c, kind, eps)
    phi = new_phi(task, kind, fold, meta_seed)
    lengths = episode_lengths(c, stream(c.seed, "lengths", fold, meta_seed))

    def draw(number: int) -> Episode:
        # Task k of episode n has the θ₀ and the batches of episode n·K + k of a run with K = 1.
        tasks = [("meta", fold, meta_seed, number * c.tasks + k) for k in range(c.tasks)]
        models = [task.draw(*labels) for labels in tasks]
        model = models[0] if c.tasks == 1 else problems.Stacked(models)
        strength = settings.strength(number)
        attack = task.attack(eps * strength, *tasks[0])
        return Episode(model, task.batches(images, *tasks), attack, lengths[number], strength)

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


def episode_lengths(c: Config, generator: torch.Generator) -> list[int]:
    """The updates of each episode: log-uniform, and stratified, so that every φ meets as many long
    ones; which episode is how long is drawn."""
    low, high = c.episode_steps[0], c.episode_steps[-1]
    strata = torch.randperm(c.episodes, generator=generator)
    shares = (strata + torch.rand(c.episodes, generator=generator)) / c.episodes
    return [round(low * (high / low) ** share) for share in shares.tolist()]


def learned(phi: nn.ModuleDict, backend: str, model: nn.Module) -> LearnedOptimizer:
    """φ as the optimizer of a model: one parameter group, of one vector, for each φ-group."""
    groups = problems.phi_groups(model).items()
    return LearnedOptimizer(
        [{"params": [flatten_(params)], "meta_optimizer": phi[name]} for name, params in groups],
        backend=backend,
    )


def prepare(config: Config, rank: int = 0) -> Task:
    """Load the data and choose the device; with several GPUs each rank takes one in turn.

    Raises:
        InputError: a device or backend that is not there; what `data.load` raises; too little data.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and rank:
        name = f"cuda:{rank % torch.cuda.device_count()}"
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
        for name in ("batch_size", "images"):
            if (getattr(config, name) or 0) > smallest:
                raise InputError(
                    f"--{name.replace('_', '-')} is {getattr(config, name)} but a candidate trains "
                    f"on {smallest} images of {images.source}: choose a smaller one"
                )
    return Task(config, problem, images, device)


@dataclass(frozen=True)
class Reporter:
    """Where a run says what it does: `say` prints a line, `progress(total, label)` makes a
    callback (done, loss) that shows how far a piece of work is."""

    say: Callable[[str], None]
    progress: Callable[[int, str], Callable[[int, float], None]]
