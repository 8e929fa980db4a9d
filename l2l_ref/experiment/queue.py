"""A run as a graph of pieces: each is computed once, by whichever process is free, and kept.

The folder is the queue. A piece's result is a JSON file, and while a process computes it, it holds
the lock of a file beside, which the kernel frees when that process ends, however it ends. So any
process that sees the folder can take part, on this machine or another, and at any time.
"""

import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from l2l_ref.errors import InputError
from l2l_ref.experiment import machine
from l2l_ref.experiment.folder import Parts
from l2l_ref.files import locked

POLL = 0.5  # seconds that a process sleeps when no piece is free
EVERY = 0.05  # of a run, between two lines that say how far it is


@dataclass(frozen=True)
class Piece:
    """Something to compute once."""

    name: str
    compute: Callable[[Parts], dict[str, Any]]  # the results so far -> its own, which JSON has
    cost: float  # in evaluations of the gradient of a batch, roughly
    needs: tuple[str, ...] = ()  # names of pieces that come first, in a list of them too


def named(*words: object) -> str:
    """A name that any file system takes: words with "-" between them."""
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, words))).strip("-")


def compute_all(pieces: Sequence[Piece], parts: Parts, say: Callable[[str], object]) -> None:
    """Compute every piece that is not there yet and that no other process has taken, the most
    costly first, and say now and then, between them, how much of the run is there.

    Returns when all are there: a process that finds nothing more to do takes over what others leave
    should they die.
    """
    pending, said = sorted(pieces, key=lambda piece: -piece.cost), list[float]()
    whole, begin = sum(piece.cost for piece in pieces), time.monotonic()
    parts.folder.mkdir(parents=True, exist_ok=True)
    while True:
        there = set(parts)
        pending = [piece for piece in pending if piece.name not in there]
        if not pending:
            return
        done = 1 - sum(piece.cost for piece in pending) / whole
        said = said or [done]  # at first
        if done >= said[-1] + EVERY:
            seconds = (time.monotonic() - begin) * (1 - done) / (done - said[0])
            say(f"{done:.0%} of the run, {timedelta(seconds=round(seconds))} left")
            said.append(done)
        for piece in [piece for piece in pending if there.issuperset(piece.needs)]:
            with locked(parts.path(piece.name, "lock"), wait=False) as held:
                if held and piece.name not in parts:
                    parts.keep(piece.name, piece.compute(parts))
                    break
        else:
            time.sleep(POLL)


def number(asked: int | None, pieces: Sequence[Piece], parts: Parts, device: torch.device) -> int:
    """How many processes a run has here: as many as are asked for, else one for each core, or GPU,
    that this one may use, and no more than make it faster: it takes no less time than its most
    costly piece."""
    there = set(parts)
    costs = [piece.cost for piece in pieces if piece.name not in there]
    if asked or not costs:
        return asked or 1
    here = machine.cores() if device.type == "cpu" else torch.cuda.device_count()
    here = here if device.index is None else 1  # that GPU, and no other
    return max(1, min(here, math.ceil(sum(costs) / max(costs))))


@contextmanager
def helpers(work: Callable[..., None], arguments: tuple, count: int) -> Iterator[None]:
    """Meanwhile run work(*arguments, number), of a module, in so many processes more, numbered from
    1. They end with this one, however it ends; what they leave undone, it does."""
    with ExitStack() as ends:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # in them: control-C meets the first
        ends.callback(signal.signal, signal.SIGINT, before)  # if one cannot be started, too
        for number in range(1, count + 1):
            given = work, (*arguments, number)
            process = get_context("spawn").Process(target=lend_a_hand, args=given, daemon=True)
            process.start()
            ends.callback(process.join)
            ends.callback(process.terminate)  # the last callback is the first to be called
        signal.signal(signal.SIGINT, before)
        yield


def lend_a_hand(work: Callable[..., None], arguments: tuple) -> None:
    """What such a process does. The first one meets its errors too, and says them."""

    def end_with_the_first() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_the_first, daemon=True).start()
    with suppress(InputError, OSError):
        work(*arguments)
