"""φ on disk: settings and plain state dicts, several φ in a file, each by its name."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint, replace_with
from l2l_ref.meta_optimizer import MetaOptimizer

FORMAT = "l2l_ref φ 1"
FOLDER = Path(__file__).parent  # of the φ that come with the package


def save(path: Path, phis: dict[str, nn.ModuleDict], about: dict[str, Any]) -> None:
    """Write every φ of `phis`, by name and φ-group, and what they come from.

    Args:
        phis: {name: {φ-group: MetaOptimizer}}.
        about: what `torch.load` reads with `weights_only`: configuration, data and the like.
    """
    saved = {
        name: {
            group: {
                "settings": meta.settings,
                "state_dict": {key: weight.cpu() for key, weight in meta.state_dict().items()},
            }
            for group, meta in phi.items()
        }
        for name, phi in phis.items()
    }
    replace_with(path, partial(torch.save, {"format": FORMAT, **about, "phis": saved}))


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` wrote: {"phis": {name: what `build` takes}, and what was given as `about`}.

    Raises:
        InputError: no such file, or one of another kind.
    """
    value = read_checkpoint(path, device)
    if value.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a meta_optimizer.pt of this version: name the file of a finished run"
        )
    return value


def build(groups: dict[str, Any], device: torch.device | str = "cpu") -> nn.ModuleDict:
    """A φ of a file: {φ-group: MetaOptimizer}, on `device`."""
    phi = nn.ModuleDict()
    for name, saved in groups.items():
        meta = MetaOptimizer(**saved["settings"])
        meta.load_state_dict(saved["state_dict"])
        phi[name] = meta.to(device)
    return phi


def load(name: str | Path, phi: str | None = None) -> nn.ModuleDict:
    """A meta-trained φ, {φ-group: MetaOptimizer}, for `LearnedOptimizer.for_model`.

    Args:
        name: one of `list_pretrained()`, or the meta_optimizer.pt of a run.
        phi: its name in the file; None is the first, which a run meta-trained under attack.

    Raises:
        InputError: no such name, file or φ.
    """
    path = FOLDER / f"{name}.pt" if str(name) in list_pretrained() else Path(name)
    saved = read(path)["phis"]
    chosen = next(iter(saved)) if phi is None else phi
    if chosen not in saved:
        raise InputError(f"{path} has no φ {chosen}: choose one of {', '.join(saved)}")
    return build(saved[chosen])


def list_pretrained() -> list[str]:
    """The names of the φ that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.pt"))
