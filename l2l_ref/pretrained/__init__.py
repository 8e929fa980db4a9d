"""φ on disk: settings and plain state dicts, several φ in a file, each by its name.

Those that come with the package have a card, NAME.json, which says what they are and are not good
for, and weights, NAME.safetensors, whose checksum the card holds.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint, read_json, write_checkpoint
from l2l_ref.meta_optimizer import MetaOptimizer, load_weights

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

    Args:
        path: of a file, or one of `list_pretrained()`.

    Raises:
        InputError: no such file or name, or a file of another kind.
    """
    if str(path) in list_pretrained():
        return shipped(str(path))
    value = read_checkpoint(Path(path), device)
    if value.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a meta_optimizer.pt of this version: name the file of a finished run"
        )
    return value


def shipped(name: str) -> dict[str, Any]:
    """The same of a φ that comes with the package: card and weights.

    Raises:
        InputError: weights that are not those of the card.
    """
    about, raw = card(name), (FOLDER / f"{name}.safetensors").read_bytes()
    if hashlib.sha256(raw).hexdigest() != about["sha256"]:
        raise InputError(
            f"the weights of {name} are not those that l2l_ref came with: install it again"
        )
    tensors = safetensors(raw)
    phis: dict[str, dict[str, Any]] = {
        phi: {group: {"settings": form, "state_dict": {}} for group, form in groups.items()}
        for phi, groups in about["phis"].items()
    }
    for key, weight in tensors.items():
        phi, group, parameter = key.split("/")
        phis[phi][group]["state_dict"][parameter] = weight
    return {**about, "format": FORMAT, "phis": phis}


def safetensors(raw: bytes) -> dict[str, Tensor]:
    """The tensors, float32, of a file in the format of the library safetensors: the length of a
    header, the header in JSON, and numbers. Nothing in it executes."""
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        assert entry["dtype"] == "F32", "no other dtype is shipped"
        values = torch.frombuffer(bytearray(raw[begin:end]), dtype=torch.float32)
        tensors[name] = values.view(entry["shape"])
    return tensors


def build(
    groups: dict[str, dict[str, Any]], where: object, device: torch.device | str = "cpu"
) -> nn.ModuleDict:
    """A φ of a file: {φ-group: MetaOptimizer}, on `device`.

    Args:
        where: it comes from, for messages.

    Raises:
        InputError: settings that are none, or not those of the weights; what `load_weights` raises.
    """
    phi = nn.ModuleDict()
    for name, saved in groups.items():
        settings, weights = saved["settings"], saved["state_dict"]
        head, layers = weights.get("head.weight"), sum("weight_hh" in key for key in weights)
        sizes = {"num_layers": layers, "hidden_size": head.numel() if head is not None else 0}
        try:
            if (
                head is None or not sizes.items() <= settings.items()
            ):  # before anything of that size is made
                raise TypeError
            meta = MetaOptimizer(**settings).to(head.dtype)  # whatever the default dtype
        except (TypeError, InputError):
            raise InputError(
                f"{where} holds a φ whose settings, {settings}, are not those of its weights: take "
                "a file that is whole"
            ) from None
        load_weights(meta, weights, f"{where}, {name},")
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
    saved = read(name)["phis"]
    chosen = next(iter(saved)) if phi is None else phi
    if chosen not in saved:
        raise InputError(f"{name} has no φ {chosen}: choose one of {', '.join(saved)}")
    return build(saved[chosen], name)


def list_pretrained() -> list[str]:
    """The names of the φ that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def card(name: str) -> dict[str, Any]:
    """What a φ that comes with the package is: what it is good for and what not, its horizon in
    updates, licence, data, command, commit and measured results.

    Raises:
        InputError: no such name.
    """
    if name not in list_pretrained():
        raise InputError(
            f"there is no φ called {name}: choose one of {', '.join(list_pretrained())}"
        )
    return read_json(FOLDER / f"{name}.json", "install l2l_ref again")
