"""What a run shows of itself: how much is done, what each job is at, when it will end."""

import re
import time

import pytest

from l2l_ref.experiment.progress import Display, duration
from l2l_ref.experiment.queue import Parts, Piece, compute_all


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path)


class TestDisplay:
    a, b, c = Piece("a", None, 4.0), Piece("b", None, 10.0), Piece("c", None, 6.0)

    def test_by_hand(self, parts, capsys, monkeypatch):
        """What an earlier run has done took no time now."""
        now = iter([100.0, *[104.0] * 9])
        monkeypatch.setattr(time, "monotonic", lambda: next(now))
        parts.keep("a", {})
        display = Display([self.a, self.b, self.c], parts)
        display.hear(0, "begin", "b")
        display.hear(1, "begin", "c")
        display.hear(0, "share", (0.4, "b, 4/10"))
        # 4 of 20 were done, now 8, in 4 s
        assert display.done() == 0.4
        assert capsys.readouterr().out == "40% of the run, 12 s left · b, 4/10\n"
        parts.keep("b", {})
        display.hear(0, "end", None)
        assert display.done() == 0.7

    def test_a_line_every_twentieth_of_the_run(self, parts, capsys):
        pieces = [Piece(str(i), lambda *_: {}, 1.0) for i in range(100)]
        display = Display(pieces, parts)
        with display.of(1):
            compute_all(pieces, parts, display.progress())
        lines = capsys.readouterr().out.splitlines()
        assert 15 <= len(lines) <= 20
        shares = [int(line.split("%")[0]) for line in lines]
        assert shares == sorted(set(shares)) and shares[0] <= 6 and 95 <= shares[-1] < 100
        assert all(re.fullmatch(r"\d+% of the run, \d+ s left", line) for line in lines)

    def test_bars_on_a_terminal(self, parts, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        display = Display([self.a, self.b], parts)
        with display.of(2):
            display.hear(1, "begin", "a")
            display.hear(1, "share", (0.5, "half of a"))
            display.hear(1, "line", "a word")
        heard = capsys.readouterr()
        assert "half of a" in heard.err and "of the run |" in heard.err
        assert "a word" in heard.out

    @pytest.mark.parametrize(
        "seconds, text",
        [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (3569, "59 min"), (3590, "1 h 00 min"),
         (7500, "2 h 05 min")],
    )  # fmt: skip
    def test_durations(self, seconds, text):
        assert duration(seconds) == text
