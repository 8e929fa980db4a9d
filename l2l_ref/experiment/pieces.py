"""A run as a graph of pieces: each is computed once, by whichever process is free, and kept.

A piece's result is a JSON file, so that it travels between the processes of `torchrun`, and a
resumed run repeats none. Without torchrun the one process does them all.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2l_ref.errors import InputError
from l2l_ref.experiment.progress import duration
from l2l_ref.experiment.ranks import POLL, Ranks
from l2l_ref.files import read_json, replace_with, sealed

SAY_EVERY = 0.05  # of a run
AGAIN = "delete it and resume again"
SLASH = "∕"  # in the name of a file, which cannot have the other


class Parts(Mapping):
    """Results on disk by name, one JSON file each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', SLASH)}.json"

    def __contains__(self, name: object) -> bool:
        return self.path(str(name)).exists()

    def __getitem__(self, name: str) -> Any:
        """The value of `name`; InputError where its file is not as it was written."""
        try:
            return read_json(self.path(name), AGAIN)
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return (path.stem.replace(SLASH, "/") for path in self.folder.glob("*.json"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keep(self, name: str, value: Any) -> None:
        text = json.dumps(sealed(value))
        replace_with(self.path(name), lambda partial: partial.write_text(text))

    def check(self, pieces: Iterable["Piece"]) -> None:
        """InputError for a result that is there and is not one of its piece."""
        for piece in pieces:
            if piece.name in self and not piece.valid(self[piece.name]):
                raise InputError(f"{self.path(piece.name)} is broken: {AGAIN}")


@dataclass(frozen=True)
class Piece:
    """A piece of a run.

    Attributes:
        name: of its file.
        compute: the results of all pieces so far -> its own, a dict of what JSON has.
        kind: pieces of one kind take times in proportion to their costs.
        cost: in evaluations of the gradient of a batch, roughly.
        needs: names of pieces that come first.
        valid: whether what was read back is a result of it.
    """

    name: str
    compute: Callable[[Mapping[str, Any]], Any]
    kind: str
    cost: float
    needs: tuple[str, ...] = ()
    valid: Callable[[dict[str, Any]], bool] = bool


def compute_all(
    pieces: Iterable[Piece], parts: Parts, ranks: Ranks, say: Callable[[str], None]
) -> None:
    """Compute every piece that is not there yet; the longest of those that are ready comes first.

    Returns when all pieces are there.

    Args:
        say: prints a line: how much of the run is done, and the time that the rest will take.

    Raises:
        ConnectionError: another process is gone before its work was done.
    """
    pieces = sorted(pieces, key=lambda piece: -piece.cost)
    clock, pending, claimed = Clock(pieces, ranks.world), pieces, set()
    while True:
        pending = [piece for piece in pending if piece.name not in parts]
        if not pending:
            return
        free = (piece for piece in pending if piece.name not in claimed)
        ready = (piece for piece in free if all(name in parts for name in piece.needs))
        for piece in ready:
            claimed.add(piece.name)
            if ranks.claim(piece.name):
                begin = time.monotonic()
                parts.keep(piece.name, piece.compute(parts))
                clock.count(piece, time.monotonic() - begin)
                if ranks.rank == 0:
                    clock.tell([p for p in pending if p.name not in parts], say)
                break
        else:
            ranks.check()
            time.sleep(POLL)


class Clock:
    """How long the rest of a run will take, from what the pieces so far took by kind."""

    def __init__(self, pieces: list[Piece], world: int):
        self.total, self.world, self.said = sum(p.cost for p in pieces), world, 0.0
        self.seconds: dict[str, float] = {}
        self.cost: dict[str, float] = {}

    def count(self, piece: Piece, seconds: float) -> None:
        self.seconds[piece.kind] = self.seconds.get(piece.kind, 0) + seconds
        self.cost[piece.kind] = self.cost.get(piece.kind, 0) + piece.cost

    def tell(self, pending: list[Piece], say: Callable[[str], None]) -> None:
        """Say how far the run is, whenever that is `SAY_EVERY` more; nothing yet where all that was
        counted here cost nothing."""
        done = 1 - sum(piece.cost for piece in pending) / self.total
        if done >= self.said + SAY_EVERY and pending and any(self.cost.values()):
            self.said = done
            say(f"{done:.0%} of the run, {duration(self.left(pending))} left")

    def left(self, pending: list[Piece]) -> float:
        """Seconds; a kind that has not been met yet is as fast as the others together."""
        rates = {kind: self.seconds[kind] / cost for kind, cost in self.cost.items() if cost}
        average = sum(self.seconds.values()) / sum(self.cost.values())
        return sum(p.cost * rates.get(p.kind, average) for p in pending) / self.world
