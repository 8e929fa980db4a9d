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

MOST_KILLS = 3  # of processes, since a piece was done
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def number(asked: int | None, pieces: Sequence[Piece], parts: Parts, device: torch.device) -> int:
    """How many processes a run has here: as many as are asked for, else one for each core, or GPU,
    that this one may use, and no more than make it faster. It takes no less time than its longest
    chain of pieces. Under torchrun, which starts the processes, one."""
    there = set(parts)
    left = [piece for piece in pieces if piece.name not in there]
    if machine.torchrun() or not left:
        return 1
    if asked:
        return asked
    here = machine.cores() if device.type == "cpu" else torch.cuda.device_count()
    if device.index is not None:  # that GPU, and no other
        here = 1
    pays = math.ceil(sum(piece.cost for piece in left) / (max(chains(left).values()) or 1.0))
    return max(1, min(here, pays))


def share_out(work: Callable[..., None], arguments: tuple, jobs: int, display: Display) -> None:
    """Run work(*arguments, number, progress) in `jobs` processes until all have returned.

    One that is killed is replaced. They end when this process does, however it ends.

    Args:
        work: a function of a module, so that another process can import it.

    Raises:
        InputError: they are killed again and again.
        Exception: what one of them raised; the others are ended.
    """
    context, kills = get_context("spawn"), 0
    running: dict[Any, tuple[int, Any]] = {}  # the pipe of each: its number, the process

    def start(number: int) -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=lend_a_hand, args=(work, arguments, number, theirs))
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # there too, until it knows what to do
        process.start()
        running[ours] = number, process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        theirs.close()  # so that the pipe ends with the process

    try:
        for number in range(jobs):
            start(number)
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
                        name, kills = signal.Signals(-process.exitcode).name, kills + 1
                        if kills > MOST_KILLS:
                            raise InputError(
                                f"{kills} processes were killed one after the other, by {name}: "
                                "if memory is short, give fewer --jobs, and --resume"
                            ) from None
                        display.print(f"a process was killed ({name}): another takes its place")
                        start(number)
                    elif process.exitcode:
                        sys.exit(process.exitcode)  # it has said why
                    continue
                if what == "error":
                    raise value
                kills = 0 if what == "end" else kills
                display.hear(number, what, value)
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
