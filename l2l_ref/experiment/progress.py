"""What the processes of a run are at, how much of it is done, and when it will end."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EVERY = 0.05  # of a run, between two lines of a log


@dataclass(frozen=True)
class Progress:
    """Where a process says what it does; by default nowhere.

    Attributes:
        tell: (what, value): "begin" and the name of a piece, "share" and (how much of it is done,
            in words), "end", "line" and a line.
    """

    tell: Callable[[str, Any], None] = lambda what, value: None

    def say(self, line: str) -> None:
        """Print a line."""
        self.tell("line", line)

    def begin(self, total: int, label: str) -> Callable[[int, float], None]:
        """A callback (done, loss) of something long, of which there is `total` to do."""

        def update(done: int, loss: float) -> None:
            self.tell("share", (done / total, f"{label} {done}/{total}, loss {loss:.3f}"))

        return update


class Display:
    """Shows what the jobs of a run tell: bars on a terminal, elsewhere a line now and then.

    Args:
        pieces: all of the run, `queue.Piece`.
        parts: the names of those that are there.
    """

    def __init__(self, pieces: Sequence[Any] = (), parts: Iterable[str] = ()):
        self.costs = {piece.name: piece.cost for piece in pieces}
        self.parts = parts
        self.bars: list[Any] = []  # of tqdm: the run, and each job
        self.now: dict[int, tuple[str, float, str]] = {}  # by job: a piece, its share, in words
        self.start = self.shown = self.done()
        self.begin = time.monotonic()

    @contextmanager
    def of(self, jobs: int) -> Iterator[None]:
        """Show this run, which so many processes compute."""
        if getattr(sys.stderr, "isatty", bool)():
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
            self.now[job] = value, 0.0, ""
        elif what == "share":
            self.now[job] = self.now[job][0], *value
        else:
            self.now.pop(job, None)
        self.show()

    def done(self) -> float:
        """The share of the run that is done, by cost."""
        shares = {name: share for name, share, _ in self.now.values()}
        shares |= dict.fromkeys(self.parts, 1.0)
        costs = sum(cost * shares.get(name, 0.0) for name, cost in self.costs.items())
        return costs / (sum(self.costs.values()) or 1.0)

    def show(self) -> None:
        """Bring the bars up to date, or print a line if there is enough to tell."""
        done, ending = self.done(), ""
        if done > self.start:
            seconds = (time.monotonic() - self.begin) * (1 - done) / (done - self.start)
            ending = f"{duration(seconds)} left"
        words = [words for *_, words in self.now.values() if words]
        if self.bars:
            self.bars[0].n = done
            self.bars[0].set_description_str(ending)
            for bar, text in zip(self.bars[1:], [*words, *[""] * len(self.bars)], strict=False):
                bar.set_description_str(text)
        elif self.shown + EVERY <= done < 1:
            self.shown = done
            self.print(" · ".join([f"{done:.0%} of the run, {ending}", *words]))

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
