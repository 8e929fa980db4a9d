"""What the processes of a run are at, how much of it is done, and when it will end."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EVERY = 0.05  # of a run, between two lines of a log


@dataclass(frozen=True)
class Progress:
    """Where a process says what it does; by default nowhere.

    Attributes:
        tell: (what, value): "begin" and the name of a piece, "share" and (how much of it is done,
            in words), "end" and its seconds, "line" and a line.
    """

    tell: Callable[[str, Any], None] = lambda what, value: None

    def say(self, line: str) -> None:
        """Print a line."""
        self.tell("line", line)

    def begin(self, total: int, label: str) -> Callable[[int, float], None]:
        """A callback (done, loss) of something long, of which there is `total` to do."""

        def update(done: int, loss: float) -> None:
            self.tell("share", (done / total, f"{label}: {done}/{total}, loss {loss:.3f}"))

        return update


@dataclass
class Work:
    """A piece that is being computed: how much of it is done, in words too, and since when; what an
    earlier run has done of it took no time now."""

    piece: Any  # queue.Piece
    words: str
    share: float = 0.0
    earlier: float = 0.0
    since: float = 0.0


class Display:
    """Shows what the jobs of a run tell: bars on a terminal, elsewhere a line now and then.

    Args:
        first: of the processes of torchrun; the others show lines alone.
    """

    def __init__(self, first: bool = True):
        self.first = first
        self.bars: list[Any] = []  # of tqdm: the run, and each job
        self.now: dict[int, Work] = {}  # by job
        self.spent: dict[str, tuple[float, float]] = {}  # by kind of piece: cost, seconds

    @contextmanager
    def of(self, pieces: Sequence[Any], parts: Mapping[str, Any], jobs: int = 1) -> Iterator[None]:
        """Show this run.

        Args:
            pieces: all of them, `queue.Piece`.
            parts: the names of those that are there.
            jobs: processes, which share what is left.
        """
        self.pieces, self.parts, self.jobs = {piece.name: piece for piece in pieces}, parts, jobs
        self.total = sum(piece.cost for piece in pieces) or 1.0
        self.shown = self.share(self.pending())
        if self.first and getattr(sys.stderr, "isatty", bool)():
            from tqdm import tqdm

            whole = "{percentage:3.0f}% of the run |{bar:40}| {desc}"
            self.bars = [tqdm(total=1.0, bar_format=whole)]
            self.bars += [tqdm(bar_format="{desc}", position=1 + job) for job in range(jobs)]
        try:
            yield
        finally:
            for bar in reversed(self.bars):
                bar.close()

    def progress(self, job: int = 0) -> Progress:
        """Of a job in this process."""
        return Progress(lambda what, value: self.hear(job, what, value))

    def hear(self, job: int, what: str, value: Any) -> None:
        """What a job tells."""
        if what == "line":
            return self.print(value)
        if what == "begin":
            self.now[job] = Work(self.pieces[value], value)
        elif what == "share":
            work, (share, words) = self.now[job], value
            if not work.since:
                work.earlier, work.since = share, time.monotonic()
            work.share, work.words = share, words
        else:
            work = self.now.pop(job)
            cost, seconds = self.spent.get(work.piece.kind, (0.0, 0.0))
            self.spent[work.piece.kind] = cost + work.piece.cost, seconds + value
        self.show()

    def pending(self) -> dict[str, float]:
        """The cost of what is left, by piece."""
        there, shares = set(self.parts), {w.piece.name: w.share for w in self.now.values()}
        left = (piece for piece in self.pieces.values() if piece.name not in there)
        return {piece.name: piece.cost * (1 - shares.get(piece.name, 0.0)) for piece in left}

    def share(self, pending: dict[str, float]) -> float:
        """Of the run, that is done."""
        return 1 - sum(pending.values()) / self.total

    def left(self, pending: dict[str, float]) -> float | None:
        """Seconds until the run ends, from what its pieces took so far by kind; a kind that has not
        been met yet is as fast as the others together. None before there are any."""
        spent = dict(self.spent)
        for work in self.now.values():
            cost, seconds = spent.get(work.piece.kind, (0.0, 0.0))
            if work.since:
                cost += (work.share - work.earlier) * work.piece.cost
                spent[work.piece.kind] = cost, seconds + time.monotonic() - work.since
        cost, seconds = map(sum, zip((0.0, 0.0), *spent.values(), strict=True))
        if not cost:
            return None
        rates = {kind: s / c for kind, (c, s) in spent.items() if c}
        left = [c * rates.get(self.pieces[name].kind, seconds / cost)
                for name, c in pending.items()]  # fmt: skip
        return max(sum(left) / self.jobs, *left, 0.0)

    def show(self) -> None:
        """Bring the bars up to date, or print a line if there is enough to tell."""
        if not self.first:
            return
        pending = self.pending()
        share, left = self.share(pending), self.left(pending)
        ending = f"{duration(left)} left" if left is not None else ""
        works = [work.words for work in self.now.values()]
        if self.bars:
            self.bars[0].n = share
            self.bars[0].set_description_str(ending)
            for bar, words in zip(self.bars[1:], [*works, *[""] * self.jobs], strict=False):
                bar.set_description_str(words)
        elif share >= self.shown + EVERY and share < 1:
            self.shown = share
            done = ", ".join(filter(None, [f"{share:.0%} of the run", ending]))
            self.print(" · ".join([done, *works]))

    def print(self, line: str) -> None:
        """Print a line, above the bars."""
        if self.bars:
            self.bars[0].write(line)
        else:
            print(line, flush=True)


def duration(seconds: float) -> str:
    """`47 s`, `12 min` or `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
