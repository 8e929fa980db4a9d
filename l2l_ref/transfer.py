"""One loop that trains an optimizee with any optimizer and records its curves."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, update_bn

from l2l_ref import attacks
from l2l_ref.backend.cuda_graphs import Graphed
from l2l_ref.data.images import endless
from l2l_ref.equations import Loss, robust_loss
from l2l_ref.guard import guarded


@dataclass(frozen=True)
class Method:
    """A way to train an optimizee: an optimizer, and the loss whose gradient is its input."""

    label: str  # as in figures and tables
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]  # on the parameters of a model
    alpha: float = 1.0  # of Eq. 6; 1 trains on clean batches alone
    penalty: float = 0.0  # λ of the clean part (`equations.penalised`)
    cosine: bool = False  # the learning rate falls to 0 as a cosine
    l1: float = 0.0  # weight of Σ|θ| in the training loss
    attack: str | None = None  # of the training loss, where it is not that of the run
    half: str = "transfer"  # or "meta", the half that φ was meta-trained on
    capture: bool = True  # False if the optimizer reads numbers of Python's that change: a rate

    @property
    def trains_on(self) -> str:
        """Its batches, in words: clean ones, attacked ones, both mixed; and the penalty."""
        batches = "clean" if self.alpha == 1 else "mixed" if self.alpha else "attacked"
        return batches + ", penalty" * bool(self.penalty)


@dataclass(frozen=True)
class Curve:
    """Losses along a training run, at each number of updates in `steps`."""

    steps: list[int]  # updates done
    clean: list[float]  # loss on clean data
    attacked: list[float]  # loss under attack; equals `clean` where there is no attack
    # Of an update, without the recording: batch, attack, forward, backward and optimizer. The mean
    # between two recordings, of which this is the median.
    ms_per_step: float

    @property
    def diverged(self) -> bool:
        """A loss became nan or infinite."""
        return not all(map(math.isfinite, self.clean + self.attacked))


def train(
    model: nn.Module,
    method: Method,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Loss,
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    steps: int,
    record: Callable[[nn.Module], tuple[Tensor, Tensor]],
    every: int = 1,
    capture: bool = True,
    average: AveragedModel | None = None,
    calibration: Sequence[Tensor] = (),
) -> Curve:
    """Train `model` in place for `steps` updates.

    Args:
        batches: (x, y), one an update: an iterator without end, or what is begun again, such as a
            DataLoader.
        loss: (model, x, y) -> 0-dim loss.
        attack: (model, x, y) -> x', for methods with alpha < 1.
        record: model -> (clean loss, attacked loss), on data that stays the same.
        every: record after every so many updates; before the first and after the last always.
        capture: on a GPU, updates and recordings are CUDA graphs; False if one of the callables
            waits for the device. An optimizer of PyTorch's needs `capturable=True` there, if it has
            that option.
        average: of `model` (`running_average`), which takes in every update and is what `record`
            is given.
        calibration: batches of x; before it is recorded after an update, its batch-norm normalises
            by them.

    Raises:
        InputError: batches that end; an attack that returns no such thing as x; what cannot be
            captured.
    """
    batches, attack = endless(batches), guarded(attack)
    optimizer = method.optimizer(model)
    device = next(model.parameters()).device
    cosine = None
    if method.cosine:  # a rate that is a tensor changes in place, as a CUDA graph needs it
        cosine = LambdaLR(optimizer, lambda done: 0.5 * (1 + math.cos(math.pi * done / steps)))

    def mode(name: str) -> None:
        """Schedule-free optimizers hold other weights to be evaluated than to be trained."""
        getattr(optimizer, name, lambda: None)()

    def update(x: Tensor, y: Tensor) -> None:
        objective = robust_loss(
            loss, model, x, y, attack=attack, alpha=method.alpha, penalty=method.penalty
        )
        optimizer.zero_grad(set_to_none=False)  # stays in place for a CUDA graph
        objective.backward()
        if method.l1:
            add_l1_gradient(optimizer, method.l1)
        optimizer.step()

    mode("train")
    drawn = attacks.generators(attack), attacks.generators(record)
    graphed = Graphed(update, device, generators=drawn[0], capture=capture and method.capture)
    recorded_model = model if average is None else average.module
    probe = Graphed(lambda: record(recorded_model), device, generators=drawn[1], capture=capture)
    recorded, recordings, times = [0], [torch.stack(probe())], []
    begin = now(device)
    for step in range(1, steps + 1):
        graphed(*next(batches))
        if cosine is not None:
            cosine.step()
        if average is not None:
            mode("eval")
            average.update_parameters(model)
            mode("train")
        if step % every == 0 or step == steps:
            times.append((now(device) - begin) / (step - recorded[-1]))
            recorded.append(step)
            if calibration:
                update_bn(calibration, recorded_model)
            recordings.append(torch.stack(probe()))
            begin = now(device)
    mode("eval")
    clean, attacked = torch.stack(recordings, dim=1).tolist()  # waits for the device
    return Curve(recorded, clean, attacked, 1e3 * statistics.median(times))


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that holds θ̄ of its θ: `MetaSettings.average`, of `decay` d."""

    def take_in(averages: Any, thetas: Any, count: Any) -> None:
        torch._foreach_lerp_(averages, thetas, max(1 - decay, 1 / (int(count) + 1)))

    return AveragedModel(model, multi_avg_fn=take_in)


@torch.no_grad()
def add_l1_gradient(optimizer: torch.optim.Optimizer, weight: float) -> None:
    """Add the gradient of weight·Σ|θ|, which is weight·sign θ, to that of each parameter that is
    not frozen."""
    for group in optimizer.param_groups:
        for theta in [one for one in group["params"] if one.requires_grad]:
            if theta.grad is None:
                theta.grad = torch.zeros_like(theta)
            theta.grad.add_(theta.sign(), alpha=weight)


def now(device: torch.device) -> float:
    """Seconds on the clock when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
