"""A run's folder: which it is, and that what is continued there is the same run."""

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2l_ref.errors import InputError
from l2l_ref.experiment.config import Config, as_saved, names_of
from l2l_ref.files import replace_with


def new(config: Config, root: Path = Path("runs")) -> Path:
    """Choose the folder of this run: `--out`, or a name such as runs/mnist-fgsm-paper-quick, with
    -2, -3, … behind it where that is taken.

    A run never writes over another. With `--resume` the newest folder of the name is continued.

    Raises:
        InputError: `--out` is taken and `--resume` not given; there is nothing to resume.
    """
    if config.out is not None:
        folder = Path(config.out)
    else:
        attack = config.attack.replace(":", ".")  # of MODULE:FUNCTION
        parts = [config.dataset, attack, config.recipe] + ["quick"] * config.quick
        name = "-".join(parts)
        folder = root / name
        for number in itertools.count(2):
            following = root / f"{name}-{number}"
            if not folder.exists() or (config.resume and not following.exists()):
                break
            folder = following
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    taken = folder.is_dir() and any(folder.iterdir())
    if taken and not config.resume:
        raise InputError(
            f"--out {folder} is not empty: add --resume to continue that run, or name another"
        )
    if config.resume and not (folder / "config.json").exists():
        raise InputError(f"--resume finds no run in {folder}: leave it out, or name a run's folder")
    return folder


def make(folder: Path) -> None:
    """Make the folder of a run.

    Raises:
        InputError: the file system says no.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {folder} cannot be made ({error.strerror}): name a folder you may write to"
        ) from None


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
    try:
        saved = json.loads(path.read_text())
        before, environment = as_saved(saved["settings"]), saved["environment"]
        data_before = environment["data"], environment["data_sha256"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is broken: start afresh with another --out") from None
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
        value = json.loads(path.read_text())
        first = value["environment"]
        others = first.setdefault("continued_in", [])
        if environment != {k: v for k, v in first.items() if k != "continued_in"}:
            others.append(environment)
        environment = first
    else:
        value = {"command": command, "settings": asdict(config), "environment": environment}
    write_json(path, value)
    return environment
