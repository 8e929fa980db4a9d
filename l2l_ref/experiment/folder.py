"""A run's folder: which it is, and that what is continued there is the same run."""

import fcntl
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config, as_saved, names_of
from l2l_ref.files import read_json, replace_with, sealed

AFRESH = "start afresh with another --out"


class Origin(TypedDict):
    """Of the samples: their source and checksum."""

    data: str
    data_sha256: str | None


class Environment(Origin, total=False):
    """What a folder says of the machine, code and data of its run; older ones say less."""

    device: str
    threads: int
    processes: int
    torch: str
    backend: str
    git_commit: str | None
    continued_in: list[dict[str, Any]]


class Saved(TypedDict):
    """What config.json holds."""

    command: str
    settings: dict[str, Any]
    environment: Environment


LOCK = ".lock"  # in a folder, held by the run that writes there, until it ends however it ends


def choose(config: Config, root: Path = Path("runs")) -> Path:
    """The folder of this run: `--out`, or a name such as runs/mnist-fgsm-paper-quick, with
    -2, -3, … behind it where that is taken.

    A run never writes over another. With `--resume` the newest folder of the name is continued.

    Raises:
        InputError: `--out` is taken and `--resume` not given; there is nothing to resume.
    """
    if config.out is not None:
        folder = Path(config.out)
    else:
        attack = config.attack.replace(":", ".")  # of MODULE:FUNCTION
        recipe = "loaded" if config.load else config.recipe  # φ's own, which is not read yet
        parts = [config.dataset, attack, recipe] + ["quick"] * config.quick
        name = "-".join(parts)
        folder = root / name
        for number in itertools.count(2):
            following = root / f"{name}-{number}"
            if not folder.exists() or (config.resume and not following.exists()):
                break
            folder = following
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    if not config.resume and folder.is_dir() and not empty(folder):
        raise InputError(
            f"--out {folder} is not empty: add --resume to continue that run, or name another"
        )
    if config.resume and not (folder / "config.json").exists():
        raise InputError(f"--resume finds no run in {folder}: leave it out, or name a run's folder")
    return folder


def restarted(config: Config) -> Config:
    """The same, with --resume where torchrun may have begun the run anew (`--max-restarts`) and
    there is something to continue: in `--out`, or in the newest folder of the name after a restart
    on this machine."""
    count, most = (
        int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    again = replace(config, resume=True)
    if count or (most and config.out is not None):
        with suppress(InputError):
            choose(again)
            return again
    return config


def empty(folder: Path) -> bool:
    """Whether there is nothing in it, but perhaps the lock of a run that did not get far."""
    return all(path.name == LOCK for path in folder.iterdir())


def make(folder: Path, exist_ok: bool = True) -> None:
    """Make the folder of a run.

    Raises:
        FileExistsError: unless `exist_ok`.
        InputError: the file system says no.
    """
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise InputError(
            f"--out {folder} cannot be made ({error.strerror}): name a folder you may write to"
        ) from None


@contextmanager
def claimed(config: Config) -> Iterator[Path]:
    """Choose the folder of this run, make it, and hold it to the end of the context.

    Raises:
        InputError: another run holds it; the file system says no; what `choose` raises.
    """
    while True:
        folder = choose(config)
        with suppress(FileExistsError):  # made by another run, since it was chosen
            make(folder, exist_ok=config.out is not None or config.resume)
            break
    with open(folder / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.stat(lock.fileno()), os.stat(folder / LOCK))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise InputError(
                f"--out {folder} belongs to a run that is alive: wait for it, or name another"
            )
        try:
            choose(replace(config, out=str(folder)))  # after what another run did until now
            yield folder
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def must_match(config: Config, data: tuple[str, str | None], folder: Path) -> None:
    """A run that is continued must have the settings, but for those of places, and the data that
    it began with.

    Args:
        data: its source and checksum. The halves go by the order of the images, which differs
            between layouts, so the same pixels from another layout are other data.
        folder: of the run; nothing is checked where it holds no config.json.

    Raises:
        InputError: another value, or a config.json that cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        return
    saved = read_json(path, AFRESH, Saved)
    before, environment = as_saved(saved["settings"]), saved["environment"]
    data_before = environment["data"], environment["data_sha256"]
    now = json.loads(json.dumps(asdict(config)))  # tuples become lists, as in the file
    for name in sorted(now.keys() - names_of("place")):
        if now[name] != before.get(name):
            raise InputError(
                f"{folder} was run with {name.replace('_', '-')} {before.get(name)}, not "
                f"{now[name]}: resume with that, or start afresh with another --out"
            )
    if before.get("eps_warmup"):
        raise InputError(
            f"{folder} was run with eps-warmup {before['eps_warmup']}, which there is no more: "
            "start afresh with another --out"
        )
    if data != data_before:
        raise InputError(
            f"{folder} was run on {describe(data_before)}, not {describe(data)}: give the same "
            "--data-dir, or start afresh with another --out"
        )


def describe(data: tuple[str, str | None]) -> str:
    """A data set's source and the beginning of its checksum."""
    source, checksum = data
    return source if checksum is None else f"{source} (checksum {checksum[:12]})"


def plain(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """JSON that any reader takes: no NaN, no infinities."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    replace_with(path, lambda partial: partial.write_text(text))


def write_config(
    out: Path, config: Config, environment: dict[str, Any], command: str
) -> dict[str, Any]:
    """config.json: every setting, and all that the results depend on beside them.

    A run that is continued keeps the environment it began in, and lists the others. Returns it.
    """
    path = out / "config.json"
    if path.exists():
        value = read_json(path, AFRESH, Saved)
        first = value["environment"]
        others = first.setdefault("continued_in", [])
        if environment != {k: v for k, v in first.items() if k != "continued_in"}:
            others.append(environment)
        environment = first
    else:
        value = {"command": command, "settings": asdict(config), "environment": environment}
    write_json(path, sealed(plain(value)))
    return environment
