"""How an attack is called: what it does to a model is undone, and what it returns is checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from threading import Lock, RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from l2l_ref.errors import InputError

LOCKS: WeakKeyDictionary[Callable, RLock] = WeakKeyDictionary()  # of each model
LOCKING = Lock()


@contextmanager
def untouched(model: Callable) -> Iterator[None]:
    """Gives `model` back with its modes, buffers, `.grad` and `requires_grad` as they were.

    Inside, its parameters are frozen: whoever runs backward pays for the input's gradient alone.
    Another thread that comes with the same model waits.

    Args:
        model: an `nn.Module`. Other callables pass through: nothing is known of what they hide.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with LOCKING:
        lock = LOCKS.setdefault(model, RLock())
    with lock:
        yield from given_back(model)


def given_back(model: nn.Module) -> Iterator[None]:
    """The same, without the lock."""
    modules = list(model.modules())
    modes = [(m, m.training) for m in modules]
    buffers = [(m._buffers, k, b) for m in modules for k, b in m._buffers.items() if b is not None]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None and p.is_leaf]
    grads = [(p, p.requires_grad, p.grad) for p in parameters if not p.is_inference()]
    try:
        # Batch-norm writes into copies. To switch `track_running_stats` off would change what
        # instance-norm computes; to write old values back would break a graph yet to run backward.
        for owner, name, buffer in buffers:
            owner[name] = buffer.clone()
        for p, *_ in grads:
            p.requires_grad_(False).grad = None  # else a `backward` would add to the caller's
        yield
    finally:
        for m, training in modes:
            m.training = training
        for owner, name, buffer in buffers:
            owner[name] = buffer
        for p, requires_grad, grad in grads:
            p.requires_grad_(requires_grad).grad = grad


def traceless(attack: Callable) -> Callable:
    """Mark an attack that changes nothing and returns what it should: it is called as it is."""
    attack.__dict__["leaves_no_trace"] = True
    return attack


def undone(attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attack that changes nothing, even when it raises; what it returns is taken as it is.

    It meets the model in its current mode (in training mode batch-norm normalises by the batch, but
    its statistics stay), parameters frozen, copies of x and y, gradients enabled, and may call
    `backward`, `eval` or `requires_grad_` at will, also within `torch.inference_mode`.
    """

    @wraps(attack)
    def wrapped(model: Callable, x: Tensor, y: Tensor, **options) -> Tensor:
        with torch.inference_mode(False), untouched(model), torch.enable_grad():
            return attack(model, x.detach().clone(), y.clone(), **options)

    return traceless(wrapped)


def leaves_no_trace(
    attack: Callable[..., Tensor], *, eps: float | None = None, name: str | None = None
) -> Callable[..., Tensor]:
    """Makes another library's attack, or ours, change nothing, and checks what it returns.

    Args:
        attack: `(model, x, y, **options) -> x_adv`; of what it may do see `undone`.
        eps: radius of its l-infinity ball, where that is known.
        name: what messages call it; its own, where that is None.

    Returns:
        The same callable, that of this module itself. It raises an InputError for an x_adv that is
        no tensor like x, is not finite where the model's logits are, or leaves the ball.
    """
    inner = attack
    while isinstance(inner, partial):
        inner = inner.func
    if getattr(inner, "leaves_no_trace", False) and eps is None:
        return attack
    name, run = name or getattr(inner, "__name__", type(inner).__name__), undone(attack)

    @wraps(attack)
    def wrapped(model: Callable, x: Tensor, y: Tensor, **options) -> Tensor:
        x_adv = run(model, x, y, **options)
        if not isinstance(x_adv, Tensor):
            raise InputError(
                f"the attack '{name}' returned a {type(x_adv).__name__}: it must return x_adv, a "
                "tensor like x"
            )
        if (x_adv.shape, x_adv.dtype, x_adv.device) != (x.shape, x.dtype, x.device):
            raise InputError(
                f"the attack '{name}' returned {describe(x_adv)} for {describe(x)}: it must return "
                "a tensor like x"
            )
        x_adv = x_adv.detach()
        if not readable(x):
            return x_adv
        if not x_adv.isfinite().all() and finite_logits(model, x):
            raise InputError(f"the attack '{name}' returned NaN or infinity where x is finite")
        if eps is not None and x.numel():
            distance = (x_adv - x).abs().amax().item()
            if distance > 1.001 * eps + 2 * torch.finfo(x.dtype).eps:
                raise InputError(
                    f"the attack '{name}' moved a pixel by {distance:.4g} but eps is {eps:.4g}: "
                    "give it that radius, and the l-infinity norm"
                )
        return x_adv

    return traceless(wrapped)


def check_samples(x: Tensor, y: Tensor) -> None:
    """InputError unless x can be attacked and y holds the class of each."""
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}: give floats, of bytes x / 255")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise InputError(
            f"y is {y.dtype} {list(y.shape)} for {len(x)} samples: give the class of each, int64 "
            f"[{len(x)}], such as y.long(), or y.argmax(1) of one-hot rows"
        )


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def readable(x: Tensor) -> bool:
    """Whether the host may look at values."""
    return not (x.is_meta or capturing(x))


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which cannot wait for the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def finite_logits(model: Callable, x: Tensor) -> bool:
    """Whether what goes wrong is not the model's doing, such as a θ that diverged."""
    with torch.no_grad(), untouched(model):
        return bool(model(x).isfinite().all())
