"""One loop that trains an optimizee with any optimizer and records its curves."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2l_ref.equations import robust_loss
from l2l_ref.problems import Loss

Recorder = Callable[[nn.Module], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """A way to train an optimizee: an optimizer, and the loss whose gradient it reads.

    Attributes:
        label: as in figures and tables.
        optimizer: model -> a `torch.optim.Optimizer` on its parameters.
        alpha: Eq. 6 of the training loss; 1 trains on clean batches alone.
        l1: weight of Σ|θ| in the training loss.
        half: "transfer", or "meta" for the half that φ was meta-trained on.
    """

    label: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    alpha: float = 1.0
    l1: float = 0.0
    half: str = "transfer"


@dataclass(frozen=True)
class Curve:
    """Losses along a training run, at each number of updates in `steps`.

    Attributes:
        steps: updates done.
        clean: loss on clean data.
        attacked: loss under attack; equals `clean` where there is no attack.
        ms_per_step: median wall-clock milliseconds of an update: attack, forward, backward and
            optimizer, without the recording.
    """

    steps: list[int]
    clean: list[float]
    attacked: list[float]
    ms_per_step: float

    @property
    def diverged(self) -> bool:
        """A loss became nan or infinite."""
        return not all(map(math.isfinite, self.clean + self.attacked))


def train(
    model: nn.Module,
    method: Method,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    loss: Loss,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    steps: int,
    record: Recorder,
    every: int = 1,
) -> Curve:
    """Train `model` in place for `steps` updates.

    Args:
        batches: endless (x, y); one is used an update.
        loss: (model, x, y) -> 0-dim loss.
        attack: (model, x, y) -> x', for methods with alpha < 1.
        record: model -> (clean loss, attacked loss), on data that stays the same.
        every: record after every so many updates; before the first and after the last always.
    """
    optimizer = method.optimizer(model)
    device = next(model.parameters()).device
    recorded, recordings, times = [0], [record(model)], []
    for step in range(1, steps + 1):
        begin = now(device)
        x, y = next(batches)
        objective = robust_loss(loss, model, x, y, attack=attack, alpha=method.alpha)
        optimizer.zero_grad(set_to_none=False)  # what `flatten_` made stays in place
        objective.backward()
        if method.l1:
            add_l1_gradient(optimizer, method.l1)
        optimizer.step()
        times.append(now(device) - begin)
        if step % every == 0 or step == steps:
            recorded.append(step)
            recordings.append(record(model))
    clean, attacked = (torch.stack(column).tolist() for column in zip(*recordings, strict=True))
    return Curve(recorded, clean, attacked, 1e3 * statistics.median(times))


@torch.no_grad()
def add_l1_gradient(optimizer: torch.optim.Optimizer, weight: float) -> None:
    """Add the gradient of weight·Σ|θ|, which is weight·sign θ, to that of each parameter."""
    for group in optimizer.param_groups:
        for theta in group["params"]:
            if theta.grad is None:
                theta.grad = torch.zeros_like(theta)
            theta.grad.add_(theta.sign(), alpha=weight)


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
