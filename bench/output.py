"""What the commands share: numbers as options, where they ran, their files."""

import argparse
import json
import platform
import shlex
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.device import CPU, about
from l2l_ref.backend import build_info, resolve
from l2l_ref.experiment.machine import processor
from l2l_ref.files import replace_with


def count(text: str) -> int:
    """A whole number of at least 1, also as 1e6."""
    try:
        value = float(text)
        if value >= 1 and value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")


def machine(backend: str, device: torch.device = CPU) -> dict[str, Any]:
    """Date, hardware, versions, and the backend with what it says of its build."""
    gpu, chosen = about(device), resolve(backend, device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": chosen,
        "build": build_info() if chosen == "fused" else None,
        **({"gpu": asdict(gpu)} if gpu else {}),
    }


def where(about: dict[str, Any]) -> str:
    """The name of what `machine` is about: the GPU's, or the CPU's."""
    return about["gpu"]["name"] if "gpu" in about else about["cpu"]


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write `report`, whole or not at all."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    replace_with(path, lambda partial: partial.write_text(text))


def command(script: str, arguments: list[str]) -> str:
    """The command line that made a result, without the folders of this machine."""
    shown = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    return shlex.join(["python", "-m", f"bench.{script.removesuffix('.py')}", *shown])
