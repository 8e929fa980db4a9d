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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import connection, get_context, parent_process
from typing import Any

import torch

from l2l_ref.errors import InputError
from l2l_ref.experiment import machine
from l2l_ref.experiment.folder import Parts
from l2l_ref.files import locked

POLL = 0.1, 2.0  # seconds that a process sleeps when no piece is free: at first, at most
EVERY = 0.05  # of a run, between two lines of a log
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# A process says what it is at: the piece, some words, and how much of the piece is done; the words
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


def chains(pieces: Sequence[Piece]) -> dict[str, float]:
    """What a run takes from the begin of each piece on, however many processes there are: the cost
    of the longest chain of pieces that need one another, {name: cost}."""
    result: dict[str, float] = {}
    for piece in reversed(pieces):
        result[piece.name] = piece.cost + result.get(piece.name, 0.0)
        for name in piece.needs:
            result[name] = max(result.get(name, 0.0), result[piece.name])
    return result


def compute_all(pieces: Sequence[Piece], parts: Parts, tell: Tell) -> None:
    """Compute every piece that is not there yet and that no other process has taken; that with the
    longest chain comes first.

    Returns when all are there: a process that finds nothing more to do takes over what others leave
    should they die.
    """
    chain = chains(pieces)
    pending, pause = sorted(pieces, key=lambda piece: -chain[piece.name]), POLL[0]
    parts.folder.mkdir(parents=True, exist_ok=True)
    while True:
        there = set(parts)
        pending = [piece for piece in pending if piece.name not in there]
        if not pending:
            return
        if any(compute(piece, parts, tell) for piece in pending if there.issuperset(piece.needs)):
            pause = POLL[0]
        else:
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
    that this one may use, and no more than make it faster. It takes no less time than its longest
    chain of pieces."""
    there = set(parts)
    left = [piece for piece in pieces if piece.name not in there]
    if asked or not left:
        return asked or 1
    here = machine.cores() if device.type == "cpu" else torch.cuda.device_count()
    if device.index is not None:  # that GPU, and no other
        here = 1
    pays = math.ceil(sum(piece.cost for piece in left) / (max(chains(left).values()) or 1.0))
    return max(1, min(here, pays))


class Display:
    """Shows what processes are at: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, pieces: Sequence[Piece] = (), parts: Iterable[str] = ()):
        self.costs = {piece.name: piece.cost for piece in pieces}
        self.parts = parts  # the names of those that are there
        self.now: dict[int, tuple[str, str, float]] = {}  # by process: a piece, words, its share
        self.start = self.shown = self.done()
        self.begin = time.monotonic()
        self.bar: Any = None
        if getattr(sys.stderr, "isatty", bool)():
            from tqdm import tqdm

            bar = "{percentage:3.0f}% of the run |{bar:20}| {desc}"
            self.bar = tqdm(total=1.0, bar_format=bar)

    def hear(self, process: int, piece: str, words: str, share: float | None) -> None:
        """What a process tells (`Tell`)."""
        if share is None:
            return self.print(words)
        self.now[process] = piece, words, share
        done = self.done()
        if done > self.start:
            seconds = (time.monotonic() - self.begin) * (1 - done) / (done - self.start)
            at = [words for _, words, _ in self.now.values() if words]
            text = " · ".join([f"{timedelta(seconds=round(seconds))} left", *at])
            if self.bar is not None:
                self.bar.n = done
                self.bar.set_description_str(text)
            elif self.shown + EVERY <= done < 1:
                self.shown = done
                self.print(f"{done:.0%} of the run, {text}")

    def done(self) -> float:
        """The share of the run that is done, by cost."""
        shares = {piece: share for piece, _, share in self.now.values()}
        shares |= dict.fromkeys(self.parts, 1.0)
        costs = sum(cost * shares.get(name, 0.0) for name, cost in self.costs.items())
        return costs / (sum(self.costs.values()) or 1.0)

    def print(self, line: str) -> None:
        """Print a line, above the bar."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)


def share_out(work: Callable[..., None], arguments: tuple, jobs: int, display: Display) -> None:
    """Run work(*arguments, number, tell), of a module, in `jobs` processes until all have returned.

    What one that is killed leaves, the others compute. They end when this process does, however it
    ends, and when one of them raises an exception, which is raised here. InputError if all are
    killed.
    """
    context, killed = get_context("spawn"), 0
    running: dict[Any, tuple[int, Any]] = {}  # the pipe of each: its number, the process
    try:
        for number in range(jobs):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=lend_a_hand, args=(work, arguments, number, theirs))
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # there too, until it has handlers
            process.start()
            running[ours] = number, process
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            theirs.close()  # so that the pipe ends with the process
        while running:
            ready: list[Any] = connection.wait(list(running))
            for pipe in ready:
                number, process = running[pipe]
                try:
                    told = pipe.recv()
                except (EOFError, OSError):
                    del running[pipe]
                    process.join()
                    if process.exitcode < 0:
                        killed += 1
                        name = signal.Signals(-process.exitcode).name
                        display.now.pop(number, None)
                        display.print(f"a process was killed ({name}): the others go on")
                    elif process.exitcode:
                        sys.exit(process.exitcode)  # it has said why
                    continue
                if isinstance(told, Exception):
                    raise told
                display.hear(number, *told)
        if killed == jobs:
            raise InputError(
                f"all {jobs} processes were killed, by {name}: if memory is short, give fewer "
                "--jobs, and --resume"
            )
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def lend_a_hand(work: Callable[..., None], arguments: tuple, number: int, pipe: Any) -> None:
    """What such a process does; what it has to say goes through `pipe`."""

    def end_with_the_first() -> None:
        parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_the_first, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C meets all: the first ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    try:
        work(*arguments, number, lambda *told: pipe.send(told))
    except (InputError, OSError) as error:
        pipe.send(error)
