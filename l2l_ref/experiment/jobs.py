"""The processes of a run on this machine: how many are worth it, and one that looks after them."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context, parent_process
from typing import Any

import torch

from l2l_ref.errors import InputError
from l2l_ref.experiment import machine
from l2l_ref.experiment.progress import Display, Progress
from l2l_ref.experiment.queue import Parts, Piece, chains

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


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


def share_out(work: Callable[..., None], arguments: tuple, jobs: int, display: Display) -> None:
    """Run work(*arguments, number, progress) in `jobs` processes until all have returned.

    What one that is killed leaves, the others compute. They end when this process does, however it
    ends.

    Args:
        work: a function of a module, so that another process can import it.

    Raises:
        InputError: all of them were killed.
        Exception: what one of them raised; the others are ended.
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
                    what, value = pipe.recv()
                except (EOFError, OSError):
                    del running[pipe]
                    process.join()
                    if process.exitcode < 0:
                        killed += 1
                        name = signal.Signals(-process.exitcode).name
                        display.hear(number, "end", None)
                        display.print(f"a process was killed ({name}): the others go on")
                    elif process.exitcode:
                        sys.exit(process.exitcode)  # it has said why
                    continue
                if what == "error":
                    raise value
                display.hear(number, what, value)
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
        work(*arguments, number, Progress(lambda what, value: pipe.send((what, value))))
    except (InputError, OSError) as error:
        pipe.send(("error", error))
