"""The attacks of Eq. 7 and 8, and the one signature that every attack shares.

An attack is a plain callable `(model, x, y) -> x_adv`; `functools.partial` binds the rest. So an
attack of another library is a function of two lines (`examples/another_attack.py`).

Throughout, `model` is any callable from x, float [b, ...] in [0, 1], to logits [b, classes]; y
holds the true labels, int64 [b]; x_adv has the shape, dtype and device of x, and lies in the ball
of radius eps around x and in [0, 1]. A model that wants other pixels normalises them itself.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from l2l_ref.errors import InputError, must
from l2l_ref.foreign import imported, takes
from l2l_ref.guard import check_samples, guarded, readable

Attack = Callable[[Callable, Tensor, Tensor], Tensor]
NORMS = ("linf", "l2")


def none(model: Callable, x: Tensor, y: Tensor) -> Tensor:
    """Returns x itself, so that clean data is one more case of attacked data."""
    return x


def fgsm(
    model: Callable,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    loss: str = "cross_entropy",
) -> Tensor:
    """One step of length eps up the loss (Eq. 7; Goodfellow et al., 2015): `pgd` of a single step.

    Args (InputError for a number out of range, or an x outside [0, 1]): as those of `pgd`.
    """
    options = {"random_start": False, "norm": norm, "loss": loss}
    return pgd(model, x, y, eps=eps, steps=1, step_size=eps or None, **options)


fgsm.__dict__["is_guarded"] = True  # as `pgd` is


@partial(guarded, check=False)
def n_fgsm(
    model: Callable, x: Tensor, y: Tensor, *, eps: float, generator: Generator | None = None
) -> Tensor:
    """FGSM from x and uniform noise in ±2·eps (N-FGSM; de Jorge et al. 2022): it is for training.

    Only pixels are clipped, to [0, 1], so x_adv is up to 3·eps from x.
    """
    _check(x, y, eps)
    start = _noise(x, generator).uniform_(-2 * eps, 2 * eps, generator=generator)
    start = start.to(x.device).add_(x)
    gradient = _input_gradient(model, start, y, "cross_entropy")
    return start.add_(gradient.sign(), alpha=eps).clamp_(0, 1)


@partial(guarded, check=False)
def pgd(
    model: Callable,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 7,
    step_size: float | None = None,
    random_start: bool = True,
    norm: str = "linf",
    loss: str = "cross_entropy",
    generator: Generator | None = None,
) -> Tensor:
    """Several such steps, each projected on the ball and the box (Eq. 8; Madry et al., 2018).

    A step goes along the gradient's sign in the l-infinity norm, along the gradient itself in l2.

    Args (InputError for a number out of range, or an x outside [0, 1]):
        eps: radius of the ball, finite and >= 0; 0 is the identity.
        steps: number of gradient steps, >= 1.
        step_size: length of one step, finite and > 0; None is 2.5 * eps / steps.
        random_start: start from a uniform point of the ball instead of x.
        norm: of the ball, one of NORMS; of each sample.
        loss: what is raised, one of LOSSES. The margin does not vanish where a model is sure, nor
            where its logits are small, so it tells a robust model from one that hides its gradient.
        generator: draws the starts, on its own device; None is torch's default for x's device.
    """
    _check(x, y, eps)
    must(steps >= 1 and not steps % 1, "steps", steps, "a whole number >= 1")
    sized = step_size is None or 0 < step_size < math.inf
    must(sized, "step_size", step_size, "finite and > 0; None is 2.5 * eps / steps")
    must(loss in LOSSES, "loss", loss, f"one of {', '.join(LOSSES)}")
    must(norm in NORMS, "norm", norm, f"one of {', '.join(NORMS)}")
    if eps == 0 or not len(x):
        return x
    step_size = 2.5 * eps / steps if step_size is None else step_size
    x_adv = _uniform_in_ball(x, eps, norm, generator) if random_start else x
    for _ in range(steps):
        gradient = _input_gradient(model, x_adv, y, loss)
        if norm == "l2":
            direction = gradient / _length(gradient).clamp_min(torch.finfo(x.dtype).tiny)
        else:
            direction = gradient.sign()
        x_adv = _project_(direction.mul_(step_size).add_(x_adv), x, eps, norm)
    return x_adv


def make(
    name: str,
    *,
    eps: float,
    steps: int = 7,
    loss: str = "cross_entropy",
    generator: Generator | None = None,
) -> Attack:
    """The attack of that name, with those of the options bound that it has.

    Args (InputError for an unknown name):
        name: none, fgsm, n-fgsm, pgd, or MODULE:FUNCTION, a function (model, x, y, eps) -> x_adv.
            Its x_adv is in the l-infinity ball of eps, unless an attribute `norm` says otherwise.
        generator: what it draws depends on that alone. The others are those of `pgd`.

    Returns:
        A callable (model, x, y) -> x_adv.
    """
    if ":" in name:
        found = imported(name)
        if not takes(found, "eps"):
            raise InputError(
                f"the attack {name} has no argument eps: give a function (model, x, y, eps) -> "
                "x_adv, such as those of examples/another_attack.py"
            )
        radius = eps if getattr(found, "norm", "linf") == "linf" else None
        return guarded(partial(found, eps=eps), eps=radius, generator=generator)
    ours: dict[str, Attack] = {
        "none": none,
        "fgsm": partial(fgsm, eps=eps, loss=loss),
        "n-fgsm": partial(n_fgsm, eps=eps, generator=generator),
        "pgd": partial(pgd, eps=eps, steps=steps, loss=loss, generator=generator),
    }
    if name not in ours:
        known = f"{', '.join(ours)}, or MODULE:FUNCTION"
        raise InputError(f"attack is {name!r}, which is unknown: choose one of {known}")
    return ours[name]


def generators(function: Any) -> list[Generator]:
    """The generators that `functools.partial` bound to an attack, or to what an attack is bound to.

    A CUDA graph must know those that it draws from (`cuda_graphs.Graphed`).
    """
    if isinstance(function, Generator):
        return [function]
    if isinstance(function, partial):
        bound = [function.func, *function.args, *function.keywords.values()]
        return [generator for value in bound for generator in generators(value)]
    inner = getattr(function, "__wrapped__", None)  # of `guarded`
    return generators(inner) if inner else []


def loss_of(attack: Any) -> str | None:
    """What an attack of this module raises, if it goes by the gradient; None of any other."""
    options: dict[str, Any] = {}
    while isinstance(attack, partial):
        attack, options = attack.func, {**attack.keywords, **options}
    return options.get("loss", "cross_entropy") if attack in (fgsm, n_fgsm, pgd) else None


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each sample: [b, classes], [b] -> [b]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit less the true one (Carlini & Wagner 2017): [b, classes], [b] -> [b]."""
    true = y[:, None]
    others = logits.scatter(1, true, -math.inf)
    return others.amax(1) - logits.gather(1, true).squeeze(1)


LOSSES = {"cross_entropy": cross_entropy, "margin": margin}


def _input_gradient(model: Callable, x: Tensor, y: Tensor, loss: str) -> Tensor:
    """Of the sum, not the mean, so that one sample's gradient does not depend on the batch size.

    Only its direction counts, so each sample's is times a power of two that keeps it from vanishing
    in the rounding of float16. InputError for one that is not finite where the logits are.
    """
    x = x.detach().requires_grad_()
    logits = model(x)
    gradient = torch.autograd.grad(logits, x, _slope(logits, y, loss))[0]
    if readable(x) and not gradient.sum().isfinite():
        lost = logits.isfinite().all(1) & ~gradient.isfinite().flatten(1).all(1)
        if count := int(lost.sum()):
            raise InputError(
                f"the gradient of {count} of {len(x)} samples is NaN or infinite, where their "
                "logits are finite: change the model there (a root at 0, say), or leave those out"
            )
    return gradient


def _slope(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    """Of the loss by the logits, each sample's times a power of two that makes it about 1."""
    z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
    slope = torch.autograd.grad(LOSSES[loss](z, y).sum(), z)[0]
    largest = slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return (slope * (largest.frexp().mantissa / largest)).to(logits.dtype)


@partial(guarded, check=False)
def without_gradient(model: Callable, x: Tensor, y: Tensor, *, losses: Iterable[str]) -> Tensor:
    """Of each sample [b], whether its gradient is exactly zero, of all these losses: no attack that
    follows it has anything to go by."""
    slopes = [_input_gradient(model, x, y, loss) for loss in losses]
    return ~torch.stack(slopes).any(0).flatten(1).any(1)


def _project_(x_adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest point of the ball, clamped to [0, 1]; in place, as fresh memory costs more.

    Clamping leads to no point outside the ball, as x is in [0, 1].
    """
    change = x_adv.sub_(x)
    if norm == "l2":
        change.mul_((eps / _length(change).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1))
    else:
        change.clamp_(-eps, eps)
    return change.add_(x).clamp_(0, 1)


def _length(change: Tensor) -> Tensor:
    """The l2 norm of each sample; as many axes as `change`."""
    return torch.linalg.vector_norm(change, dim=tuple(range(1, change.ndim)), keepdim=True)


def _noise(x: Tensor, generator: Generator | None) -> Tensor:
    """Room for draws in the shape of x, where they are drawn."""
    return torch.empty_like(x, device=x.device if generator is None else generator.device)


def _uniform_in_ball(x: Tensor, eps: float, norm: str, generator: Generator | None) -> Tensor:
    noise = _noise(x, generator)
    if norm == "l2":  # a uniform direction, and a radius whose power of the dimension is uniform
        noise.normal_(generator=generator)
        length = _length(noise)
        radius = torch.rand(length.shape, dtype=x.dtype, device=noise.device, generator=generator)
        noise.mul_(eps * radius.pow(length.numel() / noise.numel()) / length)
    else:
        noise.uniform_(-eps, eps, generator=generator)
    return _project_(noise.to(x.device).add_(x), x, eps, norm)


def _check(x: Tensor, y: Tensor, eps: float) -> None:
    """Of what every attack here is given."""
    must(0 <= eps < math.inf, "eps", eps, "finite and >= 0; pixels are in [0, 1]")
    check_samples(x, y)
    if x.numel() and readable(x):
        low, high = (value.item() for value in x.aminmax())
        slack = 8 * torch.finfo(x.dtype).eps  # for rounding, as where images were resized
        if not (-slack <= low and high <= 1 + slack):
            raise InputError(
                f"x has values from {low:.4g} to {high:.4g}, but pixels are in [0, 1]: give images "
                "in that range and normalise them inside the model"
            )
