"""What a reviewer asks of a robust model, and an alarm for one that only hides its gradient.

After Carlini et al. 2019, "On Evaluating Adversarial Robustness": accuracy over ε until nothing is
left, loss over the steps of the attack, restarts, noise of the same size, images that fool another
model, the worst of all attacks on each sample, and what must never be seen of an honest defence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from l2l_ref import attacks
from l2l_ref.errors import must
from l2l_ref.evaluate import batches_of, is_right
from l2l_ref.guard import untouched

FRACTIONS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # of ε; the whole box, 1.0, comes last
STEPS = (1, 2, 5, 10, 20, 50, 100)
RESTARTS = (1, 2, 5, 10)
CORNERS = 20  # of the ball, drawn at random for each sample


@dataclass(frozen=True)
class Review:
    """What was measured, on `samples` images.

    Attributes:
        eps: l-infinity radius of all that follows but `by_eps`.
        by_eps: radius -> accuracy under PGD, on cross-entropy and margin, of that radius and the
            smaller ones here.
        by_steps: steps of PGD -> mean cross-entropy.
        by_restarts: restarts of both PGD -> accuracy.
        by_attack: name -> accuracy; "worst case" has the samples that survive all.
        alarms: sentences about what a robust model does not show; none is well.
    """

    eps: float
    samples: int
    by_eps: dict[float, float]
    by_steps: dict[int, float]
    by_restarts: dict[int, float]
    by_attack: dict[str, float]
    alarms: list[str]


def review(
    model: Callable,
    images: Any,
    *,
    eps: float,
    steps: int = 20,
    surrogate: Callable | None = None,
    generator: Generator | None = None,
) -> Review:
    """Measure all of it; the model is in eval mode, and comes out as it went in.

    Args (InputError for an eps out of range, or no images):
        model: x in [0, 1] -> logits [b, classes].
        images: what `robust_accuracy` takes; a few hundred.
        eps: l-infinity radius, in (0, 1).
        steps: of PGD, where nothing else is said.
        surrogate: a model that was trained independently, whose adversarial images are tried.
        generator: draws random starts and noise.
    """
    must(0 < eps < 1, "eps", eps, "above 0 and below 1")
    x, y = (torch.cat(parts) for parts in zip(*batches_of(model, images, 1000), strict=True))
    pgd = partial(attacks.pgd, generator=generator)

    def both(radius: float) -> list[attacks.Attack]:
        return [partial(pgd, eps=radius, steps=steps, loss=loss) for loss in attacks.LOSSES]

    def survivors(*tries: attacks.Attack) -> Tensor:
        alive = clean.clone()
        for attack in tries:
            alive &= is_right(model, attack(model, x, y), y)
        return alive

    with untouched(model, training=False):
        clean = is_right(model, x, y)
        radii = sorted({min(share * eps, 1.0) for share in FRACTIONS} | {1.0})
        by_eps, alive = {}, clean.clone()
        for radius in radii:  # what a smaller one breaks is within the larger
            alive &= survivors(*both(radius))
            by_eps[radius] = mean(alive)
        by_steps = {}
        for count in STEPS:
            x_adv = pgd(model, x, y, eps=eps, steps=count)
            with torch.no_grad():
                by_steps[count] = attacks.cross_entropy(model(x_adv), y).mean().item()
        alive, by_restarts = clean.clone(), {}
        for count in range(1, max(RESTARTS) + 1):
            alive &= survivors(*both(eps))
            if count in RESTARTS:
                by_restarts[count] = mean(alive)
        tried = {
            "none": clean,
            "noise": survivors(*[partial(corner, eps=eps, generator=generator)] * CORNERS),
            "FGSM": survivors(partial(attacks.fgsm, eps=eps)),
            "PGD, cross-entropy": survivors(both(eps)[0]),
            "PGD, margin": survivors(both(eps)[1]),
        }
        if surrogate is not None:
            with untouched(surrogate, training=False):
                x_adv = pgd(surrogate, x, y, eps=eps, steps=steps)
            tried["transfer"] = survivors(lambda *_: x_adv)
        tried["worst case"] = torch.stack([alive, *tried.values()]).all(0)
        unseen = attacks.without_gradient(model, x, y, losses=attacks.LOSSES) & tried["worst case"]
    by_attack = {name: mean(alive) for name, alive in tried.items()}
    alarms = find_alarms(by_eps, by_steps, by_attack, mean(unseen), len(y))
    return Review(eps, len(y), by_eps, by_steps, by_restarts, by_attack, alarms)


def corner(model: Callable, x: Tensor, y: Tensor, *, eps: float, generator: Generator | None):
    """A random corner of the ball: what needs no gradient must not do better than what has one."""
    device = x.device if generator is None else generator.device
    signs = torch.randint(2, x.shape, generator=generator, device=device).to(x) * 2 - 1
    return (x + eps * signs).clamp(0, 1)


def mean(alive: Tensor) -> float:
    return alive.float().mean().item()


def find_alarms(
    by_eps: dict[float, float],
    by_steps: dict[int, float],
    by_attack: dict[str, float],
    unseen: float,  # share that survives without a gradient
    n: int,
) -> list[str]:
    """What should not be, beyond two standard errors of an accuracy on n samples, at least 0.02."""
    slack = max(0.02, n**-0.5)
    ce, margin = by_attack["PGD, cross-entropy"], by_attack["PGD, margin"]
    best = min(ce, margin)
    weak = min(by_steps[10], by_steps[20]) - by_steps[100]
    rules = [
        (by_attack["noise"] < best - slack, "random noise breaks more than PGD"),
        (by_attack["FGSM"] < best - slack, "one step breaks more than PGD"),
        (by_attack.get("transfer", 1) < best - slack, "another model's images break more than PGD"),
        (abs(ce - margin) > 0.1, "PGD on one loss breaks far more than on the other"),
        (by_eps[1.0] > slack, "some images survive PGD at ε = 1"),
        (unseen > slack, "some that survive have a gradient of exactly zero"),
        (weak > 0.02 * max(1.0, by_steps[10]), "the loss falls with more steps"),
    ]
    return [sentence for alarm, sentence in rules if alarm]
