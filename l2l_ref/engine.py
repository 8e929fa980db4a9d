"""Chooses who runs the operators of `equations.py`: the fused extension or the reference."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from l2l_ref import equations
from l2l_ref.errors import InputError

BACKENDS = ("auto", "reference", "fused")
EXTENSION = "l2l_ref._engine"  # holds the same operator names as `equations`


@cache
def resolve(backend: str) -> str:
    """The backend that `backend` stands for here: "reference" or "fused".

    Raises:
        InputError: an unknown name, or "fused" where the extension is not built.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend '{backend}' is unknown: choose one of {', '.join(BACKENDS)}")
    built = find_spec(EXTENSION) is not None
    if backend == "fused" and not built:
        raise InputError(
            "backend 'fused' needs the compiled extension, which this installation does not have: "
            "use backend 'reference', or 'auto' to take what is there"
        )
    return "fused" if built and backend != "reference" else "reference"


@cache
def operators(backend: str = "auto") -> ModuleType:
    """The module whose `theta_step_`, `theta_step` and `unroll_meta_gradient` `backend` runs.

    An extension that is there but does not import raises its own error: a broken build is never
    mistaken for a missing one.
    """
    return equations if resolve(backend) == "reference" else import_module(EXTENSION)
