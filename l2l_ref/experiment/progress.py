"""Bars and lines: how far a run is, and the time that is left."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run says what it does.

    Attributes:
        say: prints a line.
        begin: (how much there is to do, a label) -> a callback (done, loss) that shows how far
            it is.
    """

    say: Callable[[str], None]
    begin: Callable[[int, str], Callable[[int, float], None]]


def progress(bars: bool = True) -> Progress:
    """Progress bars with loss and time left on a terminal, if they may, plain lines elsewhere."""
    if bars and getattr(sys.stderr, "isatty", bool)():
        from tqdm import tqdm

        def bar(total: int, label: str) -> Callable[[int, float], None]:
            shown = tqdm(total=total, desc=label)

            def update(done: int, loss: float) -> None:
                if shown.n == 0:  # what an earlier run has done took no time now
                    shown.initial = shown.n = done - 1
                shown.update(done - shown.n)
                shown.set_postfix(loss=f"{loss:.3f}")
                if done == total:
                    shown.close()

            return update

        return Progress(tqdm.write, bar)

    def lines(total: int, label: str) -> Callable[[int, float], None]:
        begin, before, shown = time.monotonic(), None, -1

        def update(done: int, loss: float) -> None:
            nonlocal before, shown
            before = done - 1 if before is None else before  # done by an earlier run, in no time
            tenth = 10 * done // total
            if tenth > shown:
                shown = tenth
                left = (time.monotonic() - begin) / (done - before) * (total - done)
                print(
                    f"{label}: {done}/{total}, loss {loss:.3f}, {duration(left)} left", flush=True
                )

        return update

    return Progress(lambda line: print(line, flush=True), lines)


def duration(seconds: float) -> str:
    """`47 s`, `12 min` or `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
