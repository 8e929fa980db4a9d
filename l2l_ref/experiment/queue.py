"""A run as a graph of pieces: each is computed once, by whichever process is free, and kept.

The folder is the queue. A piece's result is a JSON file, and while a process computes it, it holds
the lock of a file beside, which the kernel frees when that process ends, however it ends. So any
process that sees the folder can take part, on this machine or another, and at any time.
"""

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from l2l_ref.errors import InputError
from l2l_ref.experiment import machine
from l2l_ref.experiment.folder import Parts
from l2l_ref.files import locked

POLL = 0.1, 2.0  # seconds that a process sleeps when no piece is free: at first, at most
EVERY = 0.05  # of a run, between two lines of a log
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# A process tells the piece that it is at, some words, and how much of the piece is done; the words
# are a line to be kept where that is None.
Tell = Callable[[str, str, float | None], None]


@dataclass(frozen=True)
class Piece:
    """Something to compute once."""

    name: str
    # The results of all pieces so far, and a `Tell` of this one -> its own result, which JSON has.
    compute: Callable[[Parts, Callable[[str, float | None], None]], dict[str, Any]]
    cost: float  # in evaluations of the gradient of a batch, roughly
    needs: tuple[str, ...] = ()  # names of pieces that come first, in a list of them too


def named(*words: object) -> str:
    """A name that any file system takes: words with "-" between them."""
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, words))).strip("-")


def compute_all(pieces: Sequence[Piece], parts: Parts, tell: Tell) -> None:
    """Compute every piece that is not there yet and that no other process has taken, the most
    costly first.

    Returns when all are there: a process that finds nothing more to do takes over what others leave
    should they die.
    """
    pending, pause = sorted(pieces, key=lambda piece: -piece.cost), POLL[0]
    parts.folder.mkdir(parents=True, exist_ok=True)
    while True:
        there = set(parts)
        pending = [piece for piece in pending if piece.name not in there]
        if not pending:
            return
        if any(compute(piece, parts, tell) for piece in pending if there.issuperset(piece.needs)):
            pause = POLL[0]
        else:
            tell("", "waiting for other processes", 0.0)
            time.sleep(pause)
            pause = min(1.1 * pause, POLL[1])


def compute(piece: Piece, parts: Parts, tell: Tell) -> bool:
    """Compute a piece and keep it, unless another process has it; whether this one did."""
    with locked(parts.path(piece.name, "lock"), wait=False) as held:
        if not held or piece.name in parts:
            return False
        tell(piece.name, "", 0.0)
        parts.keep(piece.name, piece.compute(parts, partial(tell, piece.name)))
        tell(piece.name, "", 1.0)
        return True


def number(asked: int | None, pieces: Sequence[Piece], parts: Parts, device: torch.device) -> int:
    """How many processes a run has here: as many as are asked for, else one for each core, or GPU,
    that this one may use, and no more than make it faster: it takes no less time than its most
    costly piece."""
    there = set(parts)
    costs = [piece.cost for piece in pieces if piece.name not in there]
    if asked or not costs:
        return asked or 1
    here = machine.cores() if device.type == "cpu" else torch.cuda.device_count()
    if device.index is not None:  # that GPU, and no other
        here = 1
    return max(1, min(here, math.ceil(sum(costs) / max(costs))))


@contextmanager
def helpers(work: Callable[..., None], arguments: tuple, count: int) -> Iterator[None]:
    """Meanwhile run work(*arguments, number), of a module, in so many processes more, numbered from
    1. They end with this one, however it ends; what they leave undone, it does."""
    running = []
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # there too, until it has handlers
        for number in range(1, count + 1):
            given = work, (*arguments, number)
            process = get_context("spawn").Process(target=lend_a_hand, args=given, daemon=True)
            process.start()
            running.append(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def lend_a_hand(work: Callable[..., None], arguments: tuple) -> None:
    """What such a process does. The first one meets its errors too, and says them."""

    def end_with_the_first() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_the_first, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C meets all: the first ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    with suppress(InputError, OSError):
        work(*arguments)


def quiet(piece: str, words: str, share: float | None) -> None:
    """The `Tell` of such a process: a line, and no progress."""
    if share is None:
        print(words, flush=True)


class Display:
    """Shows how far a run is: a bar on a terminal, elsewhere a line now and then.

    It knows the pieces that are there, whoever computed them, and what this process is at.
    """

    def __init__(self, pieces: Sequence[Piece] = (), parts: Iterable[str] = ()):
        from tqdm import tqdm

        self.costs = {piece.name: piece.cost for piece in pieces}
        self.parts = parts  # the names of those that are there
        self.start = self.shown = self.done()
        self.begin = time.monotonic()
        bar = "{percentage:3.0f}% of the run |{bar:20}| {desc}"
        self.bar = tqdm(total=1.0, bar_format=bar, disable=None)  # it is, where no terminal is

    def hear(self, piece: str, words: str, share: float | None) -> None:
        """What this process tells (`Tell`)."""
        if share is None:
            return self.bar.write(words)
        done = self.done(piece, share)
        if done > self.start:
            seconds = (time.monotonic() - self.begin) * (1 - done) / (done - self.start)
            text = f"{timedelta(seconds=round(seconds))} left" + f" · {words}" * bool(words)
            self.bar.n = done
            self.bar.set_description_str(text)
            if self.bar.disable and self.shown + EVERY <= done < 1:
                self.shown = done
                self.bar.write(f"{done:.0%} of the run, {text}")

    def done(self, piece: str = "", share: float = 0.0) -> float:
        """The share of the run that is done, by cost, with that share of that piece."""
        known = {piece: share, **dict.fromkeys(self.parts, 1.0)}
        costs = sum(cost * known.get(name, 0.0) for name, cost in self.costs.items())
        return costs / (sum(self.costs.values()) or 1.0)
