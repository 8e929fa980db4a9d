"""A run as a graph of pieces: order, needs, nothing twice, whoever takes part."""

import os
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from l2l_ref.errors import InputError
from l2l_ref.experiment import queue
from l2l_ref.experiment.progress import Progress
from l2l_ref.experiment.queue import Parts, Piece, chains, compute_all, named
from l2l_ref.files import locked


class Graph:
    """Pieces from {name: (cost, needs)}; notes which were computed, in order, and what was said."""

    def __init__(self, pieces: dict[str, tuple[float, str]], seconds: float = 0.0):
        self.done, self.said, self.seconds = [], [], seconds
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

    def run(self, parts):
        compute_all(self.pieces, parts, Progress(lambda *told: self.said.append(told)))
        assert set(parts) == self.needs.keys()  # each stays until all is there

    def together(self, parts, count):
        """`run` in so many threads; a lock is that of an open file, so they are as processes."""
        with ThreadPoolExecutor(count) as pool:
            for each in [pool.submit(self.run, parts) for _ in range(count)]:
                each.result(20)


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "parts")


class TestParts:
    def test_a_result_is_a_file_that_any_process_reads(self, parts):
        assert "a" not in parts and list(parts) == [] and len(parts) == 0
        parts.keep("a", {"loss": [1.5, float("inf")], "end": None})
        other = Parts(parts.folder)
        assert "a" in other and other["a"] == {"loss": [1.5, float("inf")], "end": None}
        assert list(other) == ["a"] and other.get("b", 3) == 3
        assert [path.name for path in parts.folder.iterdir()] == ["a.json"]  # no partial file stays

    def test_a_broken_file_is_named(self, parts):
        for text in ("", "null", "[]", '{"loss": 1}', "{", "\0", "[" * 100_000):
            parts.keep("a", {"loss": 1})
            parts.path("a").write_text(text)
            with pytest.raises(InputError, match=r"a\.json is broken: delete it"):
                parts["a"]


def test_a_name_is_one_that_any_file_system_takes():
    words = "run", "Adam (attacked) + L1, cosine", "lr 0.001, L1 0", f"eps{0.1}"
    assert named(*words) == "run-Adam-attacked-L1-cosine-lr-0.001-L1-0-eps0.1"


class TestOrder:
    names = {"c": (3, ""), "a": (1, ""), "f": (1, "a"), "d": (9, "c"), "b": (20, "a"),
             "e": (2, "bd")}  # fmt: skip

    def test_the_longest_chain_comes_first(self, parts):
        graph = Graph(self.names)
        assert chains(graph.pieces) == {"a": 23, "b": 22, "c": 14, "d": 11, "e": 2, "f": 1}
        graph.run(parts)
        assert graph.done == ["a", "b", "c", "d", "e", "f"]


class TestTogether:
    def test_nothing_twice_nothing_before_what_it_needs(self, parts, monkeypatch):
        monkeypatch.setattr(queue, "POLL", (1e-3, 1e-3))
        names = {str(i): (i % 7, [str(i // 2)] * (i > 1)) for i in range(1, 40)}
        graph = Graph(names, seconds=0.002)  # `compute` asserts that what a piece needs is there
        graph.together(parts, 5)
        graph.run(parts)  # resumed, it repeats none
        assert sorted(graph.done) == sorted(names)

    def test_what_another_holds_is_waited_for_by_name_then_taken_over(self, parts, monkeypatch):
        monkeypatch.setattr(queue, "POLL", (1e-3, 1e-3))
        monkeypatch.setattr(queue, "PATIENCE", 0.05)
        graph, free = Graph({"a": (2, ""), "b": (1, "")}), threading.Event()
        parts.folder.mkdir()
        with locked(parts.path("a", "lock")) as held:
            assert held
            threading.Thread(target=lambda: (graph.run(parts), free.set())).start()
            assert not free.wait(0.3) and graph.done == ["b"]
        assert free.wait(5) and graph.done == ["b", "a"]
        words = f"waiting for a, which process {os.getpid()} on {platform.node()} computes"
        assert graph.said.count(("line", words)) == 1
