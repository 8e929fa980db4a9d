"""φ on disk: settings and plain state dicts, several φ in a file, each by its name.

Those that come with the package have a card, NAME.json, which says what they are and are not good
for, beside NAME.pt.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint, read_json, write_checkpoint
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
    write_checkpoint(path, {"format": FORMAT, **about, "phis": saved})


def read(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` wrote: {"phis": {name: what `build` takes}, and what was given as `about`}.

    `path` is that of a file, or one of `list_pretrained()`. InputError for no such file or name, or
    a file of another kind.
    """
    if str(path) in list_pretrained():
        return {**card(str(path)), **read_checkpoint(FOLDER / f"{path}.pt", device)}
    if not Path(path).exists():
        names = ", ".join(list_pretrained())
        raise InputError(f"there is no file {path}, and no such φ in the package, only {names}")
    value = read_checkpoint(Path(path), device)
    if value.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a meta_optimizer.pt of this version: name the file of a finished run"
        )
    return value


def build(groups: dict[str, dict[str, Any]], device: torch.device | str = "cpu") -> nn.ModuleDict:
    """A φ of a file: {φ-group: MetaOptimizer}, on `device`."""
    phi = nn.ModuleDict()
    for name, saved in groups.items():
        weights = saved["state_dict"]
        meta = MetaOptimizer(**saved["settings"])
        meta.to(weights["head.weight"].dtype)  # whatever the default dtype
        meta.load_state_dict(weights)
        phi[name] = meta.to(device)
    return phi


def load(name: str | Path, phi: str | None = None) -> nn.ModuleDict:
    """A meta-trained φ, {φ-group: MetaOptimizer}, for `LearnedOptimizer.for_model`.

    Args (InputError for no such name, file or φ):
        name: one of `list_pretrained()`, or the meta_optimizer.pt of a run.
        phi: its name in the file; None is the first, which a run meta-trained under attack.
    """
    saved = read(name)["phis"]
    chosen = next(iter(saved)) if phi is None else phi
    if chosen not in saved:
        raise InputError(f"{name} has no φ {chosen}: choose one of {', '.join(saved)}")
    return build(saved[chosen])


def list_pretrained() -> list[str]:
    """The names of the φ that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def card(name: str) -> dict[str, Any]:
    """What one of `list_pretrained()` is: what it is good for and what not, its horizon in updates,
    licence, data, command, commit and measured results."""
    return read_json(FOLDER / f"{name}.json", "install l2l_ref again")
