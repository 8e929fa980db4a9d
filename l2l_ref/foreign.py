"""What MODULE:FUNCTION names on the command line."""

import inspect
from collections.abc import Callable
from importlib import import_module

from l2l_ref.errors import InputError


def imported(name: str) -> Callable:
    """What MODULE:FUNCTION names; InputError if there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be imported ({error}): name a function of a module that is "
            "installed, or whose folder is on PYTHONPATH"
        ) from None
    if not callable(found):
        raise InputError(f"{name} is no function: name one")
    return found


def takes(function: Callable, name: str) -> bool:
    """Whether an argument of that name may be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin
        return False
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
