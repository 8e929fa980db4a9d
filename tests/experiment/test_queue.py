"""A run as a graph of pieces: order, needs, nothing twice, whoever takes part, what is shown."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from l2l_ref.errors import InputError
from l2l_ref.experiment import queue
from l2l_ref.experiment.folder import Parts
from l2l_ref.experiment.queue import Display, Piece, compute_all
from l2l_ref.files import locked


class Graph:
    """Pieces from {name: (cost, needs)}; notes which were computed, in order."""

    def __init__(self, pieces: dict[str, tuple[float, str]], seconds: float = 0.0):
        self.done, self.seconds = [], seconds
        self.pieces = [
            Piece(name, lambda parts, _, name=name: self.compute(name, parts), cost, tuple(needs))
            for name, (cost, needs) in pieces.items()
        ]
        self.needs = {piece.name: piece.needs for piece in self.pieces}

    def compute(self, name, parts):
        assert all(parts[need] == {"of": need} for need in self.needs[name])
        self.done.append(name)
        time.sleep(self.seconds)
        return {"of": name}

    def run(self, parts, tell=lambda *_: None):
        compute_all(self.pieces, parts, tell)
        assert set(parts) == self.needs.keys()  # each stays until all is there


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "POLL", (1e-3, 1e-3))
    return Parts(tmp_path / "parts")


def test_a_result_is_a_file_that_any_process_reads(parts):
    assert "a" not in parts and list(parts) == []
    parts.keep("a", {"loss": [1.5, float("inf")], "end": None})
    other = Parts(parts.folder)
    assert "a" in other and other["a"] == {"loss": [1.5, float("inf")], "end": None}
    assert [path.name for path in parts.folder.iterdir()] == ["a.json"]  # no partial file stays
    parts.path("a").write_text("{")
    with pytest.raises(InputError, match=r"a\.json is broken: delete it"):
        parts["a"]


def test_the_most_costly_comes_first_of_those_whose_needs_are_there(parts):
    graph = Graph({"c": (3, ""), "a": (5, ""), "f": (1, "a"), "d": (9, "c"), "b": (20, "a")})
    graph.run(parts)
    assert graph.done == ["a", "b", "c", "d", "f"]


def test_nothing_twice_nothing_before_what_it_needs(parts):
    """Of five threads: a lock is that of an open file, so they are as processes."""
    names = {str(i): (i % 7, [str(i // 2)] * (i > 1)) for i in range(1, 40)}
    graph = Graph(names, seconds=0.002)  # `compute` asserts that what a piece needs is there
    with ThreadPoolExecutor(5) as pool:
        for each in [pool.submit(graph.run, parts) for _ in range(5)]:
            each.result(20)
    graph.run(parts)  # resumed, it repeats none
    assert sorted(graph.done) == sorted(names)


def test_what_another_holds_is_waited_for_then_taken_over(parts):
    graph, free, told = Graph({"a": (2, ""), "b": (1, "")}), threading.Event(), []
    parts.folder.mkdir()
    with locked(parts.path("a", "lock")) as held:
        assert held
        tell = lambda *words: told.append(words)  # noqa: E731
        threading.Thread(target=lambda: (graph.run(parts, tell), free.set())).start()
        assert not free.wait(0.3) and graph.done == ["b"]
        assert told[-1] == ("", "waiting for other processes", 0.0)
    assert free.wait(5) and graph.done == ["b", "a"]


class TestDisplay:
    a, b, c = Piece("a", None, 4.0), Piece("b", None, 10.0), Piece("c", None, 6.0)

    def test_by_hand(self, parts, capsys, monkeypatch):
        """What an earlier run has done took no time now; what others have done counts."""
        now = iter([100.0, *[104.1] * 9])
        monkeypatch.setattr(time, "monotonic", lambda: next(now))
        parts.keep("a", {})
        display = Display([self.a, self.b, self.c], parts)
        display.hear("b", "b, 4/10", 0.4)
        # 4 of 20 were done, now 8, in 4.1 s
        assert capsys.readouterr().out == "40% of the run, 0:00:12 left · b, 4/10\n"
        parts.keep("c", {})
        display.hear("b", "b, 5/10", 0.5)
        assert "75% of the run" in capsys.readouterr().out

    def test_a_line_every_twentieth_of_the_run(self, parts, capsys):
        pieces = [Piece(str(i), lambda *_: {}, 1.0) for i in range(100)]
        compute_all(pieces, parts, Display(pieces, parts).hear)
        lines = capsys.readouterr().out.splitlines()
        assert 15 <= len(lines) <= 20
        shares = [int(line.split("%")[0]) for line in lines]
        assert shares == sorted(set(shares)) and shares[0] <= 6 and 95 <= shares[-1] < 100
        assert all(re.fullmatch(r"\d+% of the run, \d:\d\d:\d\d left", line) for line in lines)

    def test_a_bar_on_a_terminal(self, parts, capsys, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        display = Display([self.a, self.b], parts)
        with display.bar:
            display.hear("a", "half of a", 0.5)
            display.hear("a", "a word", None)
        heard = capsys.readouterr()
        assert "left · half of a" in heard.err and "14% of the run |" in heard.err
        assert heard.out == "a word\n"
