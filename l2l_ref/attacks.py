"""The attacks of Eq. 7 and 8, and the one signature that every attack shares.

An attack is a plain callable `(model, x, y) -> x_adv`; `functools.partial` binds the rest. So an
attack of another library needs no adapter class, only a lambda (`lib` is foolbox, `linf` its PGD):

    attack = lambda model, x, y: linf.run(lib.PyTorchModel(model, (0, 1)), x, y, epsilon=0.1)
    attack = leaves_no_trace(attack)  # whatever it does to modes, buffers and .grad is undone

Throughout, `model` is any callable from x, float [b, ...] in [0, 1], to logits [b, classes]; y
holds the true labels, int64 [b]; x_adv has the shape, dtype and device of x, and lies in the
l-infinity ball of radius eps around x and in [0, 1]. Samples may lie on two axes of x, [K, b, ...],
if logits and y hold them one after the other, [K·b, ...] (`problems.Stacked`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from l2l_ref.errors import InputError

Attack = Callable[[Callable, Tensor, Tensor], Tensor]
ATTACKS = ("none", "fgsm", "pgd")


@contextmanager
def untouched(model: Callable) -> Iterator[None]:
    """Gives `model` back with its modes, buffers, `.grad` and `requires_grad` as they were.

    Inside, its parameters are frozen: whoever runs backward pays for the input's gradient alone.

    Args:
        model: an `nn.Module`. Other callables pass through: nothing is known of what they hide.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [(m, m.training) for m in modules]
    buffers = [(m._buffers, k, b) for m in modules for k, b in m._buffers.items() if b is not None]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None and p.is_leaf]
    grads = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        # Batch-norm writes into copies. To switch `track_running_stats` off would change what
        # instance-norm computes; to write old values back would break a graph yet to run backward.
        for owner, name, buffer in buffers:
            owner[name] = buffer.clone()
        for p in parameters:
            p.requires_grad_(False).grad = None  # else a `backward` would add to the caller's
        yield
    finally:
        for m, training in modes:
            m.training = training
        for owner, name, buffer in buffers:
            owner[name] = buffer
        for p, requires_grad, grad in grads:
            p.requires_grad_(requires_grad).grad = grad


def leaves_no_trace(attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes an attack, ours or another library's, change nothing, even when it raises.

    Args:
        attack: `(model, x, y, **options) -> x_adv`. It meets the model in its current mode (in
            training mode batch-norm normalises by the batch, but its statistics stay), parameters
            frozen, x detached and gradients enabled, and may call `backward`, `eval` or
            `requires_grad_` at will.
    Returns:
        The same callable; model, x and the grad mode stay as they were, and x_adv is detached.
    """

    @wraps(attack)
    def wrapped(model: Callable, x: Tensor, y: Tensor, **options) -> Tensor:
        with untouched(model), torch.enable_grad():
            return attack(model, x.detach(), y, **options).detach()

    return wrapped


def none(model: Callable, x: Tensor, y: Tensor) -> Tensor:
    """Returns x itself, so that clean data is one more case of attacked data."""
    return x


@leaves_no_trace
def fgsm(model: Callable, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """One step of length eps along the gradient's sign (Eq. 7; Goodfellow et al., 2015).

    Args:
        eps: radius of the ball, finite and >= 0 (else InputError); 0 is the identity.
    """
    _check(eps)
    return _step(model, x, x, y, eps, step_size=eps) if eps else x


@leaves_no_trace
def pgd(
    model: Callable,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 7,
    step_size: float | None = None,
    random_start: bool = True,
    loss: str = "cross_entropy",
    generator: Generator | None = None,
) -> Tensor:
    """Several such steps, each projected on the ball and the box (Eq. 8; Madry et al., 2018).

    Args (InputError for a number out of range):
        eps: radius of the ball, finite and >= 0; 0 is the identity.
        steps: number of gradient steps, >= 1.
        step_size: length of one step, finite and > 0; None is 2.5 * eps / steps.
        random_start: start from a uniform point of the ball instead of x.
        loss: what is raised, one of LOSSES. The margin does not vanish where a model is sure, nor
            where its logits are small, so it tells a robust model from one that hides its gradient.
        generator: draws the starts, on its own device; None is torch's default for x's device.
    """
    _check(eps, steps, step_size, loss)
    if eps == 0:
        return x
    step_size = 2.5 * eps / steps if step_size is None else step_size
    x_adv = _uniform_in_ball(x, eps, generator) if random_start else x
    for _ in range(steps):
        x_adv = _step(model, x_adv, x, y, eps, step_size, loss)
    return x_adv


def make(
    name: str,
    *,
    eps: float,
    steps: int = 7,
    step_size: float | None = None,
    loss: str = "cross_entropy",
    generator: Generator | None = None,
) -> Attack:
    """The attack of that name, its options bound; those it does not have are checked and dropped.

    Args (InputError for an unknown name or a number out of range):
        name: one of ATTACKS. The others are those of `pgd`.
    Returns:
        A callable (model, x, y) -> x_adv.
    """
    _check(eps, steps, step_size, loss)
    if name == "none":
        return none
    if name == "fgsm":
        return partial(fgsm, eps=eps)
    if name == "pgd":
        options = {"steps": steps, "step_size": step_size, "loss": loss}
        return partial(pgd, eps=eps, generator=generator, **options)
    raise InputError(f"attack is {name!r}, which is unknown; choose one of {', '.join(ATTACKS)}.")


def generators(function: Callable) -> list[Generator]:
    """The generators that `functools.partial` bound to an attack, or to what an attack is bound to.

    A CUDA graph must know those that it draws from (`graphs.Graphed`).
    """
    found = []
    for value in getattr(function, "keywords", {}).values():
        found += [value] if isinstance(value, Generator) else generators(value)
    return found


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Of each sample: [b, classes], [b] -> [b]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best wrong logit less the true one (Carlini & Wagner 2017): [b, classes], [b] -> [b]."""
    true = y[:, None]
    others = logits.scatter(1, true, -math.inf)
    return others.amax(1) - logits.gather(1, true).squeeze(1)


LOSSES = {"cross_entropy": cross_entropy, "margin": margin}


def _step(
    model, x_adv: Tensor, x: Tensor, y: Tensor, eps: float, step_size: float,
    loss: str = "cross_entropy",
) -> Tensor:  # fmt: skip
    x_adv = x_adv.detach().requires_grad_()
    # A sum, not a mean, so that one sample's gradient does not depend on the batch size.
    total = LOSSES[loss](model(x_adv), y).sum()
    (gradient,) = torch.autograd.grad(total, x_adv)
    return _project_(gradient.sign().mul_(step_size).add_(x_adv.detach()), x, eps)


def _project_(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """x + clamp(x_adv - x, ±eps), clamped to [0, 1]; in place, as fresh memory costs more."""
    return x_adv.sub_(x).clamp_(-eps, eps).add_(x).clamp_(0, 1)


def _uniform_in_ball(x: Tensor, eps: float, generator: Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    noise = torch.empty(x.shape, dtype=x.dtype, device=device)
    noise.uniform_(-eps, eps, generator=generator)
    return _project_(noise.to(x.device).add_(x), x, eps)


def _check(
    eps: float,
    steps: int = 1,
    step_size: float | None = None,
    loss: str = "cross_entropy",
) -> None:
    if not 0 <= eps < math.inf:
        raise InputError(f"eps is {eps}, but must be finite and >= 0; pixels are in [0, 1].")
    if not steps >= 1:
        raise InputError(f"steps is {steps}, but must be >= 1; Madry et al. take 7.")
    if step_size is not None and not 0 < step_size < math.inf:
        raise InputError(
            f"step_size is {step_size}, but must be finite and > 0; "
            "leave it out for 2.5 * eps / steps."
        )
    if loss not in LOSSES:
        raise InputError(f"loss is {loss!r}, which is unknown; choose one of {', '.join(LOSSES)}.")
