"""The processes of `torchrun`, on one machine or several, which share its store."""

import atexit
import os
import threading
import time
import uuid
from contextlib import suppress

import torch.distributed as dist

from l2l_ref.errors import InputError

POLL = 0.1  # seconds that a process sleeps when no piece is ready
BEAT = 1.0  # between the signs of life of a process
PATIENCE = 60.0  # seconds of silence after which it is gone
BEGIN = 600.0  # seconds in which rank 0 must have begun


class Ranks:
    """This process among those of `torchrun`; without torchrun, the only one.

    Raises:
        InputError: a WORLD_SIZE that torchrun did not set.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.store = None
        if self.world > 1:
            if "MASTER_ADDR" not in os.environ:
                raise InputError(f"WORLD_SIZE is {self.world} without MASTER_ADDR: use torchrun")
            store = next(dist.rendezvous("env://"))[0]
            self.store = dist.PrefixStore(meet(store, self.rank), store)
        self.begin()

    def begin(self) -> None:
        """Give signs of life from now on, and listen to those of the others."""
        self.heard = {rank: (0, time.monotonic()) for rank in range(self.world)}
        self.checked = time.monotonic()
        self.over = threading.Event()
        if self.store is not None:
            self.thread = threading.Thread(target=self._beat, daemon=True)
            self.thread.start()
            atexit.register(self.end)

    def _beat(self) -> None:
        try:
            while not self.over.is_set():
                self.store.add(f"beat {self.rank}", 1)
                self.over.wait(BEAT)
        except RuntimeError:
            pass  # the store is gone: whoever needs it will say so

    def end(self) -> None:
        """No more signs of life: a thread that is in the store when Python ends aborts it."""
        if self.store is not None:
            self.over.set()
            self.thread.join(PATIENCE)

    def claim(self, name: str) -> bool:
        """Whether this process is the first to ask for `name`."""
        return self.store is None or self.store.add(f"claim {name}", 1) == 1

    def tell(self, key: str, value: str) -> None:
        """Rank 0 tells the others."""
        if self.store is not None:
            self.store.set(key, value)

    def hear(self, key: str) -> str:
        """What rank 0 tells; waits for it as long as rank 0 lives."""
        while not self.store.check([key]):
            self.check()
            time.sleep(POLL)
        return self.store.get(key).decode()

    def leave(self) -> None:
        """The end, when rank 0 has come to its own: torchrun begins nothing anew on a machine whose
        processes are gone, wherever another dies."""
        with suppress(dist.DistError):  # the store was rank 0's, and is gone with it
            if self.rank:
                self.hear("left 0")
            self.tell(f"left {self.rank}", "")
        self.end()

    def check(self) -> None:
        """To be called while one waits.

        Raises:
            ConnectionError: a process that has begun is silent, and did not leave.
        """
        now = time.monotonic()
        if self.store is None or now - self.checked < BEAT:
            return
        self.checked = now
        for rank, (before, since) in self.heard.items():
            count = self.store.add(f"beat {rank}", 0)
            if count != before:
                self.heard[rank] = count, now
            elif count and now - since > PATIENCE and not self.store.check([f"left {rank}"]):
                raise ConnectionError(f"rank {rank} gave no sign of life for {PATIENCE:g} s")


def meet(store: dist.Store, rank: int) -> str:
    """The name of this attempt, which rank 0 gives: where torchrun begins a job anew, the store
    holds the claims of those that died.

    Raises:
        ConnectionError: rank 0 does not begin.
    """
    if rank == 0:
        attempt = uuid.uuid4().hex
        store.set("attempt", attempt)
        return attempt
    first: dict[str, int] = {}  # beats of rank 0, by attempt; in one of the past there are no more
    end = time.monotonic() + BEGIN
    while time.monotonic() < end:
        if store.check(["attempt"]):
            attempt = store.get("attempt").decode()
            count = store.add(f"{attempt}/beat 0", 0)
            if first.setdefault(attempt, count) != count or store.check([f"{attempt}/left 0"]):
                return attempt
        time.sleep(POLL)
    raise ConnectionError(f"rank 0 did not begin within {BEGIN:g} s")
