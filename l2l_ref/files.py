"""Files that are whole or not there, sealed with a checksum, and locked while a process works.

The seal of a checkpoint is its last line, that of JSON the key "checksum" of a dict.
"""

import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from l2l_ref.errors import InputError

SEAL = b"\nsha256 "  # behind a checkpoint; 64 hexadecimal digits follow


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: a reader finds the old or the new one.

    Makes the folder of `path` if need be. An OSError names `path`.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file (`flock`), which stays; the kernel frees it when this process ends,
    however it ends. If another process holds it, wait for that, or yield False."""
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def write_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """What `torch.load` reads with `weights_only`, and the seal, which it skips."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getvalue()
    content += SEAL + sha256(content).hexdigest().encode()
    replace_with(path, lambda partial: partial.write_bytes(content))


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_checkpoint` wrote, or an InputError; loading it never executes code."""
    with suppress(OSError):
        body, _, digest = path.read_bytes().rpartition(SEAL)
        if sha256(body).hexdigest().encode() == digest:
            return torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    raise InputError(
        f"checkpoint {path} cannot be read: it is not there, not yours to read, broken, or was "
        "not written by l2l_ref; name another, or delete it"
    )


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same with its checksum, for JSON."""
    text = json.dumps(value, sort_keys=True)
    return {**value, "checksum": sha256(text.encode()).hexdigest()}


def plain(value: Any) -> Any:
    """`value` as it comes back from JSON, in which NaN and infinities are null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_json(path: Path, value: Any) -> None:
    """JSON that any reader takes: no NaN, no infinities."""
    text = json.dumps(plain(value), indent=2) + "\n"
    replace_with(path, lambda partial: partial.write_text(text))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """What was `sealed`, without its checksum; InputError, with the remedy, if it has changed."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("checksum") == sealed(value)["checksum"]:
            return value
    raise InputError(f"{path} is broken: {remedy}")
