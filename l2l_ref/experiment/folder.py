"""A run's folder: which it is, that what is continued there is the same run, and its parts."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config, flag, names_of
from l2l_ref.files import locked, plain, read_json, replace_with, sealed, write_json

LOCK = ".lock"  # in a folder, held while its config.json or its report is written
AFRESH = "start afresh with another --out"


class Parts:
    """The results of a run's pieces by name, one JSON file each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str, kind: str = "json") -> Path:
        return self.folder / f"{name}.{kind}"

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def __getitem__(self, name: str) -> Any:
        """InputError where the file is not as it was written."""
        return read_json(self.path(name), "delete it and resume again")

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("*.json"))

    def keep(self, name: str, value: Any) -> None:
        text = json.dumps(sealed(value))
        replace_with(self.path(name), lambda partial: partial.write_text(text))


def choose(config: Config, root: Path = Path("runs")) -> Path:
    """The folder of this run: `--out`, or a name such as runs/mnist-fgsm-paper-quick, with
    -2, -3, … behind it where that is taken.

    A run never writes over another. With `--resume` that in `--out`, or the newest of the name, is
    continued or joined if it is there, and begun if not. InputError if `--out` is taken otherwise.
    """
    if config.out is not None:
        folder = Path(config.out)
    else:
        attack = config.attack.replace(":", ".")  # of MODULE:FUNCTION
        recipe = "loaded" if config.load else config.recipe  # φ's own, which is not read yet
        name = "-".join([config.dataset, attack, recipe] + ["quick"] * config.quick)
        numbered = (root / (name + f"-{number}" * (number > 1)) for number in itertools.count(1))
        newest = None
        while (folder := next(numbered)).exists():
            newest = folder
        if config.resume and newest:
            folder = newest
    begun = (LOCK, ".partial")  # all that is there while another process writes the config.json
    if folder.is_file() or not all(path.name.endswith(begun) for path in folder.glob("*")):
        if not (folder / "config.json").exists():
            raise InputError(f"--out {folder} is taken, but not by a run: name another folder")
        if not config.resume:
            raise InputError(
                f"--out {folder} is not empty: add --resume to continue that run, or name another"
            )
    return folder


def join(config: Config, environment: dict[str, Any], command: str) -> tuple[Path, dict[str, Any]]:
    """Choose the folder of this run and make it, or join what is there; write its config.json.

    A run that is continued keeps the environment it began in, and lists the others. Returns the
    folder and that environment; InputError for a folder that cannot be written, or is another's.
    """
    folder = choose(config)
    value = plain({"command": command, "settings": asdict(config), "environment": environment})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK):
            path = folder / "config.json"
            if path.exists() and not config.resume:
                return join(config, environment, command)  # another run has chosen it too
            if path.exists():
                here, value = value, read_json(path, AFRESH)
                must_match(here, value, folder)
                first, environment = value["environment"], here["environment"]
                others = first.pop("continued_in", [])
                if environment not in [first, *others]:
                    others.append(environment)
                first["continued_in"] = others
            write_json(path, sealed(value))
    except OSError as error:
        why = f"--out {folder} cannot be written ({error.strerror}): name another folder"
        raise InputError(why) from None
    return folder, value["environment"]


def must_match(here: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """InputError unless settings and data are those of the config.json that is there.

    Places may differ. The halves go by the order of the images, which differs between layouts, so
    the same pixels from another layout are other data.
    """

    def facts(value: dict[str, Any]) -> dict[str, Any]:
        settings = {flag(name): one for name, one in value["settings"].items()}
        about = value["environment"]
        return settings | {"data": describe(about), "φ": about.get("phi")}

    before, now = facts(saved), facts(here)
    for name in sorted(now.keys() - map(flag, names_of("place"))):
        was, fresh = before.get(name), f"give that, or {AFRESH}"
        if was != now[name]:
            raise InputError(f"{folder} was run with {name} {was}, not {now[name]}: {fresh}")


def describe(value: dict[str, Any]) -> str:
    """Of a file that says what data it comes from: their source, and their checksum's begin."""
    source, checksum = value["data"], value["data_sha256"]
    return source if checksum is None else f"{source} (checksum {checksum[:12]})"


def tidy(folder: Path) -> None:
    """Remove the locks of the parts of a run that is complete, and what killed processes left."""
    for leftover in [*folder.rglob("*.partial"), *folder.glob("parts/*.lock")]:
        leftover.unlink(missing_ok=True)
