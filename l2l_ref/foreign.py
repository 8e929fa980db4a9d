"""Attacks of other libraries as they are, and what MODULE:FUNCTION names."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Generator, Tensor

from l2l_ref.errors import InputError


def imported(name: str, option: str) -> Callable:
    """What MODULE:FUNCTION names, for that option of `run.py`; InputError if there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"--{option} {name} cannot be imported ({error}): name a function of a module that is "
            "installed, or whose folder is on PYTHONPATH"
        ) from None
    if not callable(found):
        raise InputError(f"--{option} {name} is no function: name one")
    return found


def adapted(attack: Any, *, eps: float) -> Callable[..., Tensor]:
    """An attack of radius eps: a function (model, x, y, eps=...) -> x_adv, an attack of foolbox (an
    object, or its class), or a class of torchattacks."""
    is_class = isinstance(attack, type)
    kinds = (attack if is_class else type(attack)).__mro__
    libraries = {kind.__module__.partition(".")[0] for kind in kinds}
    if "foolbox" in libraries:
        return partial(foolbox, attack() if is_class else attack, eps=eps)
    of_torchattacks = "torchattacks" in libraries
    if not takes(attack, "eps") or (of_torchattacks and not is_class):
        raise InputError(
            f"the attack {attack!r} has no argument eps: give a function (model, x, y, eps) -> "
            "x_adv, an attack of foolbox, or a class of torchattacks that has a radius"
        )
    return partial(torchattacks, attack, eps=eps) if of_torchattacks else partial(attack, eps=eps)


def takes(function: Any, name: str) -> bool:
    """Whether an argument of that name may be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin, or nothing to call
        return False
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def foolbox(attack: Any, model: Callable, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    from foolbox import PyTorchModel

    with warnings.catch_warnings(record=True):  # of a model in training mode, as it is to be
        theirs = PyTorchModel(model, bounds=(0, 1), device=x.device)
        return attack(theirs, x, y, epsilons=eps)[1]


def torchattacks(attack: Any, model: Callable, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    options = {"eps": eps}
    if takes(attack, "n_classes"):  # else it aims at ten
        with torch.no_grad():
            options["n_classes"] = model(x).shape[1]
    return attack(model, **options)(x, y)


def seeded(
    attack: Callable[..., Tensor], generator: Generator, model: Callable, x: Tensor, y: Tensor
) -> Tensor:
    """`attack`, whose draws from torch's global generators depend on `generator` alone."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.default_generator.manual_seed(int(seed))
        if x.is_cuda:
            torch.cuda.default_generators[x.device.index].manual_seed(int(seed))
        return attack(model, x, y)
