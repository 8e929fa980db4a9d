"""Files that are whole or not there, and what is read back from them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from l2l_ref.errors import InputError


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: a reader finds the old or the new one.

    Makes the folder of `path` if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(partial)
    os.replace(partial, path)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A dict that `torch.save` wrote; loading it never executes code.

    Raises:
        InputError: no such file, or one that is not a checkpoint.
    """
    try:
        value = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist: check the path") from None
    except Exception as error:  # torch raises many kinds for broken or unsafe files
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is broken or was not "
            "written by l2l_ref; delete it, or name another"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"checkpoint {path} does not hold what l2l_ref writes: name another")
    return value
