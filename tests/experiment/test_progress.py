"""What a run shows of itself: how much is done, what each job is at, when it will end."""

import time

import pytest

from l2l_ref.experiment.progress import Display, duration
from l2l_ref.experiment.queue import Parts, Piece, compute_all


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path)


class TestDisplay:
    a, b, c = Piece("a", None, "a", 4.0), Piece("b", None, "b", 10.0), Piece("c", None, "c", 6.0)

    def test_left_by_hand(self, parts):
        display = Display()
        with display.of([self.a, self.b, self.c], parts):
            assert display.left(display.pending()) is None
            for piece, seconds in ((self.a, 2.0), (self.b, 1.0)):  # 0.5 and 0.1 s a unit
                display.hear(0, "begin", piece.name)
                display.hear(0, "end", seconds)
            # c has not been met: as fast as both together, 3 s for 14
            assert display.left(display.pending()) == pytest.approx(2.0 + 1.0 + 6 * 3 / 14)
            parts.keep("b", {})
            display.jobs = 2  # which share what is left, but a piece is of one
            assert display.left(display.pending()) == pytest.approx(2.0)

    def test_a_piece_that_was_begun_earlier(self, parts, monkeypatch):
        """Half of it took no time now."""
        now = iter([100.0, 102.0, 102.0])
        monkeypatch.setattr(time, "monotonic", lambda: next(now))
        display = Display()
        with display.of([self.b], parts):
            display.hear(0, "begin", "b")
            display.first = False  # no lines, which ask for the time too
            display.hear(0, "share", (0.5, "5/10"))
            display.hear(0, "share", (0.75, "7/10"))
            assert display.share(display.pending()) == 0.75 and display.left(
                display.pending()
            ) == pytest.approx(2.0)

    def test_a_line_every_twentieth_of_the_run(self, parts, capsys):
        pieces = [Piece(str(i), lambda parts: {}, "", 1.0) for i in range(100)]
        display = Display()
        with display.of(pieces, parts):
            compute_all(pieces, parts, display.progress())
        lines = capsys.readouterr().out.splitlines()
        assert 15 <= len(lines) <= 20
        shares = [int(line.split("%")[0]) for line in lines]
        assert shares == sorted(set(shares)) and shares[0] <= 6 and 95 <= shares[-1] < 100
        assert all("% of the run, 0 s left" in line for line in lines)

    def test_bars_on_a_terminal(self, parts, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        display = Display()
        with display.of([self.a, self.b], parts, 2):
            display.hear(1, "begin", "a")
            display.hear(1, "share", (0.5, "half of a"))
            display.hear(1, "line", "a word")
        heard = capsys.readouterr()
        assert "half of a" in heard.err and "of the run |" in heard.err
        assert "a word" in heard.out

    @pytest.mark.parametrize(
        "seconds, text",
        [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (3569, "59 min"), (3590, "1 h 00 min"),
         (7500, "2 h 05 min"), (90000, "25 h 00 min")],
    )  # fmt: skip
    def test_durations(self, seconds, text):
        assert duration(seconds) == text
