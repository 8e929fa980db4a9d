"""A run as a graph of pieces: order, needs, nothing twice, whoever takes part, what is shown."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from l2l_ref.errors import InputError
from l2l_ref.experiment import queue
from l2l_ref.experiment.folder import Parts
from l2l_ref.experiment.queue import Piece, compute_all
from l2l_ref.files import locked


class Graph:
    """Pieces from {name: (cost, needs)}; notes which were computed, in order."""

    def __init__(self, pieces: dict[str, tuple[float, str]], seconds: float = 0.0):
        self.done, self.seconds = [], seconds
        self.pieces = [
            Piece(name, lambda parts, name=name: self.compute(name, parts), cost, tuple(needs))
            for name, (cost, needs) in pieces.items()
        ]
        self.needs = {piece.name: piece.needs for piece in self.pieces}

    def compute(self, name, parts):
        assert all(parts[need] == {"of": need} for need in self.needs[name])
        self.done.append(name)
        time.sleep(self.seconds)
        return {"of": name}

    def run(self, parts):
        compute_all(self.pieces, parts, print)
        assert set(parts) == self.needs.keys()  # each stays until all is there


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "POLL", 1e-3)
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
    graph, free = Graph({"a": (2, ""), "b": (1, "")}), threading.Event()
    parts.folder.mkdir()
    with locked(parts.path("a", "lock")) as held:
        assert held
        threading.Thread(target=lambda: (graph.run(parts), free.set())).start()
        assert not free.wait(0.3) and graph.done == ["b"]
    assert free.wait(5) and graph.done == ["b", "a"]


def test_how_much_is_left_by_hand(parts, monkeypatch):
    """What an earlier run has done took no time now; what others have done counts."""
    now, lines = iter([100.0, 107.8]), []
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    parts.keep("a", {})
    c = Piece("c", lambda parts: parts.keep("d", {}) or {}, 8.0)
    compute_all([Piece(x, lambda _: {}, 4.0) for x in "abd"] + [c], parts, lines.append)
    # 4 of 20 were done, now 16, in 7.8 s
    assert lines == ["80% of the run, 0:00:03 left"]


def test_a_line_every_twentieth_of_the_run(parts):
    pieces, lines = [Piece(str(i), lambda _: {}, 1.0) for i in range(100)], []
    compute_all(pieces, parts, lines.append)
    assert 15 <= len(lines) <= 20
    shares = [int(line.split("%")[0]) for line in lines]
    assert shares == sorted(set(shares)) and shares[0] <= 6 and 95 <= shares[-1] < 100
    assert all(re.fullmatch(r"\d+% of the run, \d:\d\d:\d\d left", line) for line in lines)
