"""A run's folder: which it is, and that what is continued or joined there is the same run."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config, names_of
from l2l_ref.files import locked, plain, read_json, sealed, write_json

LOCK = ".lock"  # in a folder, held while its config.json or its report is written
AFRESH = "start afresh with another --out"


def choose(config: Config, root: Path = Path("runs")) -> Path:
    """The folder of this run: `--out`, or a name such as runs/mnist-fgsm-paper-quick, with
    -2, -3, … behind it where that is taken.

    A run never writes over another. With `--resume` that in `--out`, or the newest of the name, is
    continued or joined if it is there, and begun if not.

    Raises:
        InputError: `--out` is taken, and not by a run that `--resume` may continue.
    """
    if config.out is not None:
        folder = Path(config.out)
    else:
        attack = config.attack.replace(":", ".")  # of MODULE:FUNCTION
        recipe = "loaded" if config.load else config.recipe  # φ's own, which is not read yet
        name = "-".join([config.dataset, attack, recipe] + ["quick"] * config.quick)
        folder = root / name
        for number in itertools.count(2):
            following = root / f"{name}-{number}"
            if not folder.exists() or (config.resume and not following.exists()):
                break
            folder = following
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        if not (folder / "config.json").exists():
            raise InputError(f"--out {folder} holds no run, but other files: name another folder")
        if not config.resume:
            raise InputError(
                f"--out {folder} is not empty: add --resume to continue that run, or name another"
            )
    return folder


def join(
    config: Config, data: tuple[str, str | None], environment: dict[str, Any], command: str
) -> tuple[Path, dict[str, Any]]:
    """Choose the folder of this run and make it, or join what is there; write its config.json.

    A run that is continued keeps the environment it began in, and lists the others.

    Returns:
        The folder, and the environment that the run began in.

    Raises:
        InputError: what `choose`, `make` and `must_match` raise.
    """
    environment = plain(environment)
    make(folder := choose(config))
    with to_be_written(folder), locked(folder / LOCK):
        path = folder / "config.json"
        if path.exists() and not config.resume:
            return join(config, data, environment, command)  # another run has chosen it too
        value = plain({"command": command, "settings": asdict(config), "environment": environment})
        if path.exists():
            settings, value = value["settings"], read_json(path, AFRESH)
            must_match(settings, value, data, folder)
            first = value["environment"]
            others = first.pop("continued_in", [])
            if environment not in [first, *others]:
                others.append(environment)
            first["continued_in"] = others
        write_json(path, sealed(value))
        return folder, value["environment"]


def make(folder: Path) -> None:
    """Make the folder of a run; InputError where the file system says no."""
    with to_be_written(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def to_be_written(folder: Path) -> Iterator[None]:
    """InputError where the file system says no."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--out {folder} cannot be written ({error.strerror}): name another folder"
        ) from None


def must_match(
    settings: dict[str, Any], saved: dict[str, Any], data: tuple[str, str | None], folder: Path
) -> None:
    """InputError unless settings and data are those of the config.json that is there.

    Places may differ. The halves go by the order of the images, which differs between layouts, so
    the same pixels from another layout are other data.
    """
    before, environment = saved["settings"], saved["environment"]
    for name in sorted(settings.keys() - names_of("place")):
        if settings[name] != before.get(name):
            raise InputError(
                f"{folder} was run with {name.replace('_', '-')} {before.get(name)}, not "
                f"{settings[name]}: resume with that, or {AFRESH}"
            )
    if data != (data_before := (environment["data"], environment["data_sha256"])):
        raise InputError(
            f"{folder} was run on {describe(data_before)}, not {describe(data)}: give the same "
            f"--data-dir, or {AFRESH}"
        )


def describe(data: tuple[str, str | None]) -> str:
    """A data set's source and the beginning of its checksum."""
    source, checksum = data
    return source if checksum is None else f"{source} (checksum {checksum[:12]})"


def tidy(folder: Path) -> None:
    """Remove what killed processes have left of a run that is complete."""
    for leftover in [*folder.rglob("*.partial"), *folder.rglob("*.lock")]:
        leftover.unlink(missing_ok=True)
