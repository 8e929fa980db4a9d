"""How an attack is called: what it does to a model is undone, and what it returns is checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Generator, Tensor, nn

from l2l_ref.errors import InputError


@contextmanager
def untouched(model: Callable, training: bool | None = None) -> Iterator[None]:
    """Gives `model` back with its modes, buffers, `.grad` and `requires_grad` as they were.

    Inside, its parameters are frozen: whoever runs backward pays for the input's gradient alone.
    Not for threads that attack the same model at once.

    Args:
        model: an `nn.Module`. Other callables pass through: nothing is known of what they hide.
        training: the mode inside; None leaves it.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(m._buffers, dict(m._buffers)) for m in model.modules()]
    leaves = [p for p in model.parameters() if p.is_leaf and not p.is_inference()]
    grads = [(p, p.requires_grad, p.grad) for p in leaves]
    try:
        # Batch-norm writes into copies. To switch `track_running_stats` off would change what
        # instance-norm computes; old values written back would break a graph yet to run backward.
        for own, kept in buffers:
            own.update({name: b.clone() for name, b in kept.items() if b is not None})
        for p in leaves:
            p.requires_grad_(False).grad = None  # else a `backward` would add to the caller's
        if training is not None:
            model.train() if training else model.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training
        for own, kept in buffers:
            own.update(kept)
        for p, requires_grad, grad in grads:
            p.requires_grad_(requires_grad).grad = grad


def guarded(
    attack: Callable[..., Tensor],
    *,
    eps: float | None = None,
    generator: Generator | None = None,
    check: bool = True,
) -> Callable[..., Tensor]:
    """Makes an attack change nothing, even when it raises, and checks what it returns.

    It meets the model in its current mode (in training mode batch-norm normalises by the batch, but
    its statistics stay), parameters frozen, copies of x and y, gradients enabled, and may call
    `backward`, `eval` or `requires_grad_` at will, also within `torch.inference_mode`.

    Args:
        attack: `(model, x, y, **options) -> x_adv`.
        eps: radius of its l-infinity ball, where that is known.
        generator: what it draws from torch's global generators depends on that alone.
        check: False takes what it returns as it is.

    Returns:
        The same callable, or `attack` itself if it is guarded. It raises an InputError for an x_adv
        that is no tensor like x, is not finite where the model's logits are, or leaves the ball.
    """
    inner: Any = attack
    while isinstance(inner, partial):
        inner = inner.func
    if hasattr(inner, "is_guarded") and eps is None:
        return attack
    called = f"the attack '{getattr(inner, '__name__', type(inner).__name__)}'"

    @wraps(attack)
    def wrapped(model: Callable, x: Tensor, y: Tensor, **options) -> Tensor:
        seed = nullcontext() if generator is None else seeded(generator, x.device)
        with torch.inference_mode(False), untouched(model), torch.enable_grad(), seed:
            x_adv = attack(model, x.detach().clone(), y.clone(), **options)
        if not check:
            return x_adv
        if describe(x_adv) != describe(x):
            raise InputError(
                f"{called} returned {describe(x_adv)} for {describe(x)}: it must return x_adv, a "
                "tensor like x"
            )
        x_adv = x_adv.detach()
        if not readable(x):
            return x_adv
        if not x_adv.isfinite().all():
            with torch.no_grad(), untouched(model):
                if model(x).isfinite().all():  # else a θ that diverged is to blame
                    raise InputError(f"{called} returned NaN or infinity where logits are finite")
        if eps is not None and x.numel():
            distance = (x_adv - x).abs().amax().item()
            if distance > 1.001 * eps + 2 * torch.finfo(x.dtype).eps:
                raise InputError(
                    f"{called} moved a pixel by {distance:.4g} but eps is {eps:.4g}: give it that "
                    "radius, and the l-infinity norm"
                )
        return x_adv

    wrapped.__dict__["is_guarded"] = True
    return wrapped


@contextmanager
def seeded(generator: Generator, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators, of the CPU and of a device, are seeded by `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def check_samples(x: Tensor, y: Tensor) -> None:
    """InputError unless x can be attacked and y holds the class of each."""
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}: give floats, of bytes x / 255")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise InputError(
            f"y is {y.dtype} {list(y.shape)} for {len(x)} samples: give the class of each, int64 "
            f"[{len(x)}], such as y.long(), or y.argmax(1) of one-hot rows"
        )


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def readable(x: Tensor) -> bool:
    """Whether the host may look at values."""
    return not (x.is_meta or capturing(x))


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which cannot wait for the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
