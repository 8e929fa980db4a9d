"""How robust a model is: accuracy and loss under attack, and the mark of a collapsed run.

Models are evaluated as they would be used, in eval mode: batch-norm normalises by its running
statistics, so that no prediction depends on the other samples of its batch. A network trained for
only a few steps has immature statistics (they move by a tenth per step) and is evaluated with them.
Modes, buffers and `.grad` of the model come out as they went in, whatever the attack does.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from l2l_ref import attacks
from l2l_ref.attacks import Attack
from l2l_ref.equations import Loss, cross_entropy
from l2l_ref.errors import InputError, must
from l2l_ref.guard import check_samples, guarded, untouched


def robust_accuracy(
    model: Callable,
    images: Any,
    attack: Attack | Sequence[Attack],
    *,
    restarts: int = 1,
    batch_size: int = 500,
) -> float:
    """The fraction of samples that the model, in eval mode, gets right under every attack on them.

    Args (InputError for a number out of range, no attack, or no images):
        model: x -> logits [b, classes], put in eval mode if it is an `nn.Module`; where it is
            another callable, call `eval` of what is behind it first. A sample with a NaN logit
            counts as wrong.
        images: the samples, taken in order, at least one: a pair of tensors (x, y), a map-style
            Dataset of (x, y), an iterable of batches (x, y) such as a DataLoader, or what has a
            length and `batch(index)`, such as `data.ImageSet`. They are moved to the model.
        attack: any callable (model, x, y) -> x_adv, or several, of which a sample must survive all;
            `attacks.none` gives the clean accuracy.
        restarts: of each attack, per sample, >= 1; a sample that one of them breaks is not attacked
            again.
        batch_size: samples per call, >= 1; a DataLoader brings its own.

    Returns:
        A number in [0, 1]. A warning says of how many samples that count as robust PGD and FGSM had
        no gradient: it was exactly zero. (Of a constant predictor it says nothing.)
    """
    for name, value in (("restarts", restarts), ("batch_size", batch_size)):
        must(value >= 1 and not value % 1, name, value, "a whole number >= 1")
    several = [attack] if callable(attack) else list(attack)
    if not several:
        raise InputError("attack is an empty list: give at least attacks.none")
    tries = [guarded(attack) for attack in several for _ in range(restarts)]
    losses = {loss for attack in several if (loss := attacks.loss_of(attack))}
    robust = count = unseen = 0
    with untouched(model, training=False):
        for x, y in batches_of(model, images, batch_size):
            count += len(y)
            for attack in tries:
                survives = is_right(model, attack(model, x, y), y)
                x, y = x[survives], y[survives]
                if len(y) == 0:
                    break
            robust += len(y)  # the survivors
            if losses and len(y.unique()) > 1:
                unseen += int(attacks.without_gradient(model, x, y, losses=losses).sum())
    if unseen:
        warnings.warn(
            f"{unseen} of the {robust} samples that count as robust have a gradient of exactly "
            "zero, so PGD and FGSM could not attack them: l2l_ref.review tries other ways",
            stacklevel=2,
        )
    return robust / count


def batches_of(model: Callable, images: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples once, in order, of any of the kinds that `robust_accuracy` takes, where the model
    is; InputError for none at all."""
    batches = images
    if callable(getattr(images, "batch", None)):
        batches = (images.batch(i) for i in torch.arange(len(images)).split(size) if len(i))
    elif isinstance(images, (tuple, list)) and images and isinstance(images[0], Tensor):
        batches = zip(*[part.split(size) for part in images], strict=True)
    elif hasattr(images, "__getitem__") and not isinstance(images, (tuple, list)):
        batches = DataLoader(images, batch_size=size)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    count = 0
    for x, y in batches:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise InputError("images holds no batches: give a Dataset or DataLoader of (x, y)")
        check_samples(x, y)
        count += len(y)
        yield (x, y) if parameter is None else (x.to(parameter.device), y.to(parameter.device))
    if not count:
        raise InputError("images has 0 samples, but an accuracy needs at least 1; add some.")


@torch.no_grad()
def losses(
    model: Callable, x: Tensor, y: Tensor, attack: Attack, loss: Loss = cross_entropy
) -> tuple[Tensor, Tensor]:
    """The mean loss of the model on a batch and on the same batch under attack.

    x is float [b, ...] in [0, 1], y int64 [b], and `loss` (model, x, y) -> 0-dim; the two are 0-dim
    tensors without a graph, on the model's device.
    """
    with untouched(model, training=False):
        x_adv = guarded(attack)(model, x, y)
        return loss(model, x, y), loss(model, x_adv, y)


def is_collapsed(attacked_loss: float, accuracy: float, classes: int) -> bool:
    """Whether a run ended in the constant predictor, which no attack can hurt further.

    So it did where the mean cross-entropy under attack, in nats, is within 1 % of ln(classes), that
    of the uniform prediction, and the accuracy near chance: at most 1.5 / classes, which leaves
    room for unbalanced classes. NaN is not a collapse.
    """
    chance = math.log(classes)
    return abs(attacked_loss - chance) <= 0.01 * chance and accuracy <= 1.5 / classes


@torch.no_grad()
def is_right(model: Callable, x: Tensor, y: Tensor) -> Tensor:
    """Of each sample [b], whether its largest logit is the true class's, and none is NaN."""
    logits = model(x)
    # argmax takes NaN for the maximum, and that could be the true class.
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)
