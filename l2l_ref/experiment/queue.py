"""A run as a graph of pieces: each is computed once, by whichever process is free, and kept.

The folder is the queue. A piece's result is a JSON file, and while a process computes it, it holds
the lock of a file beside, which the kernel frees when that process ends, however it ends. So any
process that sees the folder can take part, on this machine or another, and at any time.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2l_ref.experiment.progress import Progress
from l2l_ref.files import locked, read_json, replace_with, sealed

POLL = 0.1, 2.0  # seconds that a process sleeps when no piece is free: a tenth of its idle time
PATIENCE = 60.0  # after so many it says what it waits for


class Parts(Mapping):
    """Results on disk by name, one JSON file each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str, kind: str = "json") -> Path:
        return self.folder / f"{name}.{kind}"

    def __contains__(self, name: object) -> bool:
        return self.path(str(name)).exists()

    def __getitem__(self, name: str) -> Any:
        """The value of `name`; InputError where its file is not as it was written."""
        try:
            return read_json(self.path(name), "delete it and resume again")
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("*.json"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keep(self, name: str, value: Any) -> None:
        text = json.dumps(sealed(value))
        replace_with(self.path(name), lambda partial: partial.write_text(text))


@dataclass(frozen=True)
class Piece:
    """A piece of a run.

    Attributes:
        name: of its file (`named`).
        compute: the results of all pieces so far, and where to say how far it is -> its own
            result, a dict of what JSON has.
        cost: in evaluations of the gradient of a batch, roughly.
        needs: names of pieces that come first, in a list of them too.
    """

    name: str
    compute: Callable[[Mapping[str, Any], Progress], Any]
    cost: float
    needs: tuple[str, ...] = ()


def named(*words: object) -> str:
    """A name that any file system takes: words with "-" between them."""
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, words))).strip("-")


def chains(pieces: Sequence[Piece]) -> dict[str, float]:
    """What a run takes from the begin of each piece on, however many processes there are: the cost
    of the longest chain of pieces that need one another, {name: cost}."""
    result: dict[str, float] = {}
    for piece in reversed(pieces):
        result[piece.name] = piece.cost + result.get(piece.name, 0.0)
        for name in piece.needs:
            result[name] = max(result.get(name, 0.0), result[piece.name])
    return result


def compute_all(pieces: Sequence[Piece], parts: Parts, progress: Progress) -> None:
    """Compute every piece that is not there yet and that no other process has taken; that with the
    longest chain comes first.

    Returns when all are there: a process that finds nothing more to do takes over what others leave
    should they die.
    """
    chain = chains(pieces)
    pending = sorted(pieces, key=lambda piece: -chain[piece.name])
    parts.folder.mkdir(parents=True, exist_ok=True)
    idle, said = time.monotonic(), ""
    while True:
        there = set(parts)
        pending = [piece for piece in pending if piece.name not in there]
        if not pending:
            return
        ready = [piece for piece in pending if there.issuperset(piece.needs)]
        if any(compute(piece, parts, progress) for piece in ready):
            idle = time.monotonic()
            continue
        if time.monotonic() - idle > PATIENCE and ready and ready[0].name != said:
            said = ready[0].name
            with suppress(FileNotFoundError):  # done just now
                holder = parts.path(said, "lock").read_text()
                progress.say(f"waiting for {said}, which {holder} computes")
        time.sleep(min(max(POLL[0], (time.monotonic() - idle) / 10), POLL[1]))


def compute(piece: Piece, parts: Parts, progress: Progress) -> bool:
    """Compute a piece and keep it, unless another process has it; whether this one did."""
    with locked(parts.path(piece.name, "lock"), wait=False) as held:
        if not held or piece.name in parts:
            return False
        progress.tell("begin", piece.name)
        parts.keep(piece.name, piece.compute(parts, progress))
        progress.tell("end", None)
        return True
