"""Chooses who runs the operators of `equations.py`: the fused extension or the reference."""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from l2l_ref import equations
from l2l_ref.errors import InputError

BACKENDS = ("auto", "reference", "fused")
BUILD = "python setup.py build_ext --inplace"  # in a checkout; pip install does the same
BUILD_CUDA = f"USE_CUDA=1 {BUILD}"
DEVICES = ("cpu", "cuda")
MAX_HIDDEN = 256  # units that the fused kernels take; some GPUs take fewer
_warn = cache(warnings.warn)  # each reason once


@cache
def built(device: str = "cpu") -> bool:
    """Is the extension there, for a type of device, "cpu" or "cuda"? No CUDA without the CPU, or
    where torch has none."""
    names = ["l2l_ref.backend._C"] + ["l2l_ref.backend._C_cuda"] * (device == "cuda")
    missing = device == "cuda" and torch.version.cuda is None
    return not missing and all(find_spec(name) is not None for name in names)


def available_device(name: str) -> torch.device:
    """The device that is called so; InputError unless it is there, a CPU or a GPU with CUDA."""
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise RuntimeError("of another type")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch raises either, by the way it was built
        raise InputError(f"--device {name} is not available here: use --device cpu") from None
    return device


@cache
def resolve(backend: str, device: torch.device | str = "cpu", lstm: tuple | None = None) -> str:
    """The backend that `backend` stands for on a device, for an LSTM of (layers, units, dtype) if
    that is given: "reference" or "fused". Remembered, as every step asks.

    "auto" is fused where that is built and serves both. Where it does not, the reference runs, and
    a warning says so once.

    Raises:
        InputError: an unknown name, or "fused" where it is not to be had.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend '{backend}' is unknown: choose one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    kind, why = torch.device(device).type, None
    if not built():
        why = "needs the compiled extension, which this installation does not have: with a C++ "
        why += f"compiler '{BUILD}' in a checkout, or 'pip install .', builds it"
    elif kind not in DEVICES:
        why = f"does not run on {device}"
    elif not built(kind):
        why = "was built without CUDA: with a CUDA toolkit of PyTorch's version "
        why += f"'{BUILD_CUDA}' in a checkout builds it"
    elif lstm is not None:
        why = _unserved(torch.device(device), *lstm)
    if why is None:
        return "fused"
    if backend == "fused":
        raise InputError(f"backend 'fused' {why}; or use backend 'reference'")
    _warn(f"the reference runs the LSTM, as the fused engine {why}", stacklevel=3)
    return "reference"


def operators(backend: str, state: Tensor) -> ModuleType:
    """The module whose operators `backend` runs on an LSTM state such as `state` [L, 2, H, ...].

    Raises:
        InputError: as `resolve`.
        ImportError: an extension that is there but broken is never mistaken for a missing one.
    """
    layers, _, units = state.shape[:3]
    if resolve(backend, state.device, (layers, units, state.dtype)) == "reference":
        return equations
    from l2l_ref.backend import ops  # a statement, which torch.compile can follow

    return ops


def _unserved(device: torch.device, layers: int, units: int, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take such an LSTM; a GPU's shared memory may be too small."""
    if dtype not in (torch.float32, torch.float64):
        return f"does not serve {dtype}, only float32 and float64"
    if units > MAX_HIDDEN:
        return f"does not serve {units} hidden units, only up to {MAX_HIDDEN}"
    if device.type == "cuda":
        cuda = import_module("l2l_ref.backend._C_cuda")
        if not cuda.serves(layers, units, dtype == torch.float64, device.index):
            return f"has too little shared memory for {units} hidden units on {device}"
    return None


def build_info() -> dict[str, Any] | None:
    """How the extension was built and which kernels run here; None where there is none.

    Under "cuda" the same of its CUDA half; None where that or torch's is missing.
    """
    if not built():
        return None
    cuda = import_module("l2l_ref.backend._C_cuda").build_info() if built("cuda") else None
    return {**import_module("l2l_ref.backend._C").build_info(), "cuda": cuda}


def use_tensor_cores(on: bool) -> None:
    """Whether steps in float32 multiply on a GPU's tensor cores; off at first.

    Serves φ of up to 20 units, from the Ampere generation on, as three products of TF32 numbers, to
    about the accuracy of float32. An infinite gradient or state becomes NaN there. InputError where
    the extension has no CUDA half, or torch has none.
    """
    if not built("cuda"):
        raise InputError(f"tensor cores need the fused engine with CUDA: '{BUILD_CUDA}' builds it")
    import_module("l2l_ref.backend._C_cuda").use_tensor_cores(on)
