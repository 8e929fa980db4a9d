"""Files that are whole or not there, sealed with a checksum, and of the form that they should have.

The seal of a checkpoint is its last line, that of JSON the key "checksum" of a dict. What carries
none, as in older versions, is taken as it is, with a line on stderr.
"""

import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch

from l2l_ref.errors import InputError

SEAL = b"\nsha256 "  # behind a checkpoint; 64 hexadecimal digits follow


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: a reader finds the old or the new one.

    Makes the folder of `path` if need be.

    Raises:
        OSError: the file system says no; it names `path`.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        if partial.exists():
            partial.unlink()


@cache
def say_unsealed(folder: Path) -> None:
    print(
        f"{folder} holds files without a checksum, as older versions wrote them: they are taken as "
        "they are",
        file=sys.stderr,
    )


def write_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """What `torch.load` reads with `weights_only`, and the seal, which it skips."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getvalue()
    content += SEAL + hashlib.sha256(content).hexdigest().encode()
    replace_with(path, lambda partial: partial.write_bytes(content))


def read_checkpoint(
    path: Path, device: torch.device | str = "cpu", kind: Any = dict[str, Any]
) -> Any:
    """What `write_checkpoint` wrote; loading it never executes code.

    Args:
        kind: the type that `fits`.

    Raises:
        InputError: no such file, or one that is not a checkpoint, or not as it was written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist: check the path") from None
    except IsADirectoryError:
        raise InputError(f"checkpoint {path} is a folder: name a file in it") from None
    body, seal, digest = content.rpartition(SEAL)
    try:
        if seal and hashlib.sha256(body).hexdigest().encode() != digest:
            raise ValueError
        value = torch.load(io.BytesIO(body or content), map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for broken or unsafe files
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): it is broken or was not "
            "written by l2l_ref; delete it, or name another"
        ) from error
    if not fits(value, kind):
        raise InputError(f"checkpoint {path} does not hold what l2l_ref writes: name another")
    if not seal:
        say_unsealed(path.parent)
    return value


def digest_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same with its seal, for JSON."""
    return {**value, "checksum": digest_of(value)}


def read_json(path: Path, remedy: str, kind: Any = dict[str, Any]) -> Any:
    """What was `sealed`, without the seal.

    Args:
        remedy: what the user can do about a broken file.
        kind: the type that `fits`.

    Raises:
        FileNotFoundError: no such file.
        InputError: a file that is no JSON, or not as it was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        seal = value.pop("checksum", None)
        whole = seal is None or seal == digest_of(value)
    except (ValueError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole or not fits(value, kind):
        raise InputError(f"{path} is broken: {remedy}")
    if seal is None:
        say_unsealed(path.parent)
    return value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read is of a type: with int for float, and list for tuple.

    Args:
        kind: a class, a union, a Literal, list, tuple or dict of such; a dataclass, whose fields
            without a default must be there and no others may; a TypedDict, which may have more.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in args)
    if origin in (list, tuple):
        fixed = origin is tuple and args[-1] is not Ellipsis
        if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
            return False
        kinds = args if fixed else [args[0]] * len(value)
        return all(map(fits, value, kinds))
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(fits(k, args[0]) and fits(v, args[1]) for k, v in pairs)
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return False
        hints = get_type_hints(kind)
        if is_typeddict(kind):
            named = kind.__required_keys__ <= value.keys()
        else:
            named = without_default(kind) <= value.keys() <= hints.keys()
        return named and all(fits(v, hints[k]) for k, v in value.items() if k in hints)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def without_default(kind: Any) -> set[str]:
    """The fields of a dataclass that its constructor must be given."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return {f.name for f in fields if f.default is missing and f.default_factory is missing}
