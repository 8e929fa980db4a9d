"""Files that are whole or not there, sealed with a checksum, and locked while a process works.

The seal of a checkpoint is its last line, that of JSON the key "checksum" of a dict.
"""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

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


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file (`flock`), which is there only meanwhile and says who holds it.

    The kernel frees it when this process ends, however it ends.

    Args:
        wait: for another process that holds it; else yield False.

    Raises:
        InputError: a file system that has no locks.
    """
    file = lock(path, wait)
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def lock(path: Path, wait: bool) -> TextIO | None:
    """The file, open and locked; None if another process holds it and this one may not wait."""
    while True:
        file = open(path, "a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                return file
        except FileNotFoundError:
            pass  # as with another file there: who held this one has removed it
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            path.unlink(missing_ok=True)
            raise InputError(
                f"{path.parent} is on a file system that has no locks (flock: {error.strerror}): "
                "name a folder on another with --out"
            ) from None
        file.close()


def write_checkpoint(path: Path, value: dict[str, Any]) -> None:
    """What `torch.load` reads with `weights_only`, and the seal, which it skips."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getvalue()
    content += SEAL + hashlib.sha256(content).hexdigest().encode()
    replace_with(path, lambda partial: partial.write_bytes(content))


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_checkpoint` wrote; loading it never executes code.

    Raises:
        InputError: no such file, or one that is not a checkpoint, or not as it was written.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist: check the path") from None
    except IsADirectoryError:
        raise InputError(f"checkpoint {path} is a folder: name a file in it") from None
    body, _, digest = content.rpartition(SEAL)
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise InputError(
            f"checkpoint {path} cannot be read: it is broken or was not written by l2l_ref; delete "
            "it, or name another"
        )
    return torch.load(io.BytesIO(body), map_location=device, weights_only=True)


def digest_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same with its seal, for JSON."""
    return {**value, "checksum": digest_of(value)}


def plain(value: Any) -> Any:
    """`value` as JSON has it: lists, and None for numbers that it has not."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """JSON that any reader takes: no NaN, no infinities."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    replace_with(path, lambda partial: partial.write_text(text))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """What was `sealed`, without the seal.

    Args:
        remedy: what the user can do about a broken file.

    Raises:
        FileNotFoundError: no such file.
        InputError: a file that is no JSON, or not as it was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("checksum") == digest_of(value):
            return value
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{path} is broken: {remedy}")
