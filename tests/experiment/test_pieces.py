"""A run as a graph of pieces: order, needs, nothing twice, whatever the number of processes."""

import csv
import json
import re
import threading
import time

import pytest
import torch.distributed as dist
from conftest import call_script

from l2l_ref.errors import InputError
from l2l_ref.experiment import pieces, ranks
from l2l_ref.experiment.pieces import Clock, Parts, Piece, compute_all
from l2l_ref.experiment.progress import duration
from l2l_ref.experiment.ranks import Ranks


class Graph:
    """Pieces from {name: (cost, needs)}; notes which were computed, in order."""

    def __init__(self, pieces: dict[str, tuple[float, str]], seconds: float = 0.0):
        self.done, self.seconds = [], seconds
        self.before = self.after = lambda name: None  # what a piece does beside
        self.pieces = [
            Piece(name, lambda parts, name=name: self.compute(name, parts), "", cost, tuple(needs))
            for name, (cost, needs) in pieces.items()
        ]
        self.needs = {piece.name: piece.needs for piece in self.pieces}

    def compute(self, name, parts):
        self.before(name)
        assert all(parts[need] == {"of": need} for need in self.needs[name])
        self.done.append(name)
        time.sleep(self.seconds)
        self.after(name)
        return {"of": name}


def alone(graph, parts, say=lambda line: None):
    compute_all(graph.pieces, parts, Ranks(), say)


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "parts")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class TestParts:
    def test_a_result_is_a_file_that_any_process_reads(self, parts):
        assert "a" not in parts and list(parts) == [] and len(parts) == 0
        with pytest.raises(KeyError):
            parts["a"]
        parts.keep("a", {"loss": [1.5, float("inf")], "end": None})
        other = Parts(parts.folder)
        assert "a" in other and other["a"] == {"loss": [1.5, float("inf")], "end": None}
        assert list(other) == ["a"] and other.get("b", 3) == 3
        assert [path.name for path in parts.folder.iterdir()] == ["a.json"]  # no partial file stays

    def test_a_broken_file_is_named(self, parts):
        parts.keep("a", {"loss": 1})
        parts.path("a").write_text("{")
        with pytest.raises(InputError, match=r"a\.json is broken: delete it"):
            parts["a"]

    @pytest.mark.parametrize("name", ["λ/ε 1", "lr 0.001, L1 0", "a.b", "100%", "%2F"])
    def test_every_name_is_one_file_and_comes_back(self, parts, name):
        parts.keep(name, {"loss": 7})
        assert list(parts) == [name] and dict(parts) == {name: {"loss": 7}}


class TestAlone:
    def test_the_longest_that_is_ready_comes_first(self, parts):
        graph = Graph({"a": (1, ""), "b": (5, "a"), "c": (3, ""), "d": (9, "c"), "e": (2, "bd")})
        alone(graph, parts)
        # c before a, being longer; that makes d ready, longest of all; b waits for a; e for both
        assert graph.done == ["c", "d", "a", "b", "e"]
        assert {name: parts[name] for name in "abcde"} == {n: {"of": n} for n in "abcde"}

    def test_among_equals_the_order_is_kept(self, parts):
        graph = Graph({name: (1, "") for name in "jacket"})
        alone(graph, parts)
        assert "".join(graph.done) == "jacket"

    def test_resumed_repeats_none(self, parts):
        names = {"a": (1, ""), "b": (2, "a"), "c": (3, "b")}
        graph = Graph(names)

        def killed_at_c(name):
            if name == "c":
                raise KeyboardInterrupt

        graph.before = killed_at_c
        with pytest.raises(KeyboardInterrupt):
            alone(graph, parts)
        assert graph.done == ["a", "b"] and "c" not in parts
        again = Graph(names)
        alone(again, parts)
        assert again.done == ["c"]
        alone(again, parts)
        assert again.done == ["c"]

    def test_it_says_how_much_is_left(self, parts):
        said = []
        alone(Graph({str(i): (100 - i, "") for i in range(100)}), parts, said.append)
        assert 15 <= len(said) <= 20  # not more often than every twentieth
        shares = [int(line.split("%")[0]) for line in said]
        assert shares == sorted(set(shares)) and shares[-1] < 100
        assert all(re.fullmatch(r"\d+% of the run, \d+ s left", line) for line in said)
        quiet = []
        alone(Graph({"only": (1, "")}), Parts(parts.folder / "other"), quiet.append)
        assert quiet == []


class Shared(Ranks):
    """A process among several; the store of all is a dict."""

    def __init__(self, rank, world, claims):
        self.rank, self.world, self.store = rank, world, self
        self.claims, self.lock, self.alive = (
            claims,
            claims.setdefault("lock", threading.Lock()),
            True,
        )
        self.begin()

    def add(self, key, value):
        with self.lock:
            self.claims[key] = self.claims.get(key, 0) + value * self.alive
            return self.claims[key]

    def set(self, key, value):
        self.claims[key] = value

    def check(self, keys=None):
        return all(key in self.claims for key in keys) if keys else super().check()


def together(graph, parts, world):
    """`compute_all` in as many threads; returns what each found there as it ended, by rank."""
    claims, ended, errors = {}, [], []

    def work(rank):
        try:
            compute_all(graph.pieces, parts, Shared(rank, world, claims), lambda line: None)
            ended.append((rank, {name for name in graph.needs if name in parts}))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank), daemon=True)
               for rank in range(world)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads), "a process waits for ever"
    return dict(ended)


class TestTogether:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch):
        monkeypatch.setattr(pieces, "POLL", 1e-3)
        monkeypatch.setattr(ranks, "POLL", 1e-3)
        monkeypatch.setattr(ranks, "BEAT", 0.02)
        monkeypatch.setattr(ranks, "PATIENCE", 0.5)

    def test_a_silent_process_is_not_waited_for(self, parts):
        """Rank 1 claims a piece and is gone; so is rank 0 before it says where the folder is."""
        claims = {}
        first, gone = (Shared(rank, 2, claims) for rank in range(2))
        time.sleep(0.1)
        gone.claim("a")
        gone.alive = False
        graph = Graph({"a": (2, ""), "b": (1, "")})
        with pytest.raises(ConnectionError, match="rank 1 gave no sign of life for 0.5 s"):
            compute_all(graph.pieces, parts, first, lambda line: None)
        assert graph.done == ["b"]  # what can be done is done
        first.alive, third = False, Shared(1, 2, claims)
        with pytest.raises(ConnectionError, match="rank 0 gave no sign of life"):
            third.hear("folder")

    def test_an_attempt_of_the_past_is_not_joined(self, monkeypatch):
        """Its rank 0 gives no more signs of life; unless it left, having ended well."""
        store, joined = dist.HashStore(), []
        past = ranks.meet(store, 0)
        store.add(f"{past}/beat 0", 7)
        late = threading.Thread(target=lambda: joined.append(ranks.meet(store, 1)), daemon=True)
        late.start()
        time.sleep(0.1)
        now = ranks.meet(store, 0)
        assert not joined
        for _ in range(100):
            store.add(f"{now}/beat 0", 1)
            time.sleep(0.005)
        late.join(5)
        assert joined == [now]
        store.set(f"{now}/left 0", "")
        assert ranks.meet(store, 1) == now
        monkeypatch.setattr(ranks, "BEGIN", 0.05)
        with pytest.raises(ConnectionError, match="rank 0 did not begin within 0.05 s"):
            ranks.meet(dist.HashStore(), 1)

    def test_a_slow_process_is_waited_for(self, parts):
        """It is longer at its piece than anyone's patience."""
        graph = Graph({"a": (2, ""), "b": (1, "")}, seconds=0.0)
        graph.before = lambda name: time.sleep(1.0) if name == "a" else None
        assert together(graph, parts, 3)[0] == {"a", "b"}

    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_nothing_twice_nothing_before_what_it_needs(self, parts, world):
        # `compute` asserts that what a piece needs is there
        names = {str(i): (i % 7, [str(i // 2)] * (i > 1)) for i in range(1, 40)}
        graph = Graph(names, seconds=0.002)
        there = together(graph, parts, world)
        assert sorted(graph.done) == sorted(names)
        assert there[0] == names.keys()

    def test_a_slow_folder(self, parts):
        """What is written is seen a while later, as on a file system of a network."""

        class Slow(Parts):
            def __contains__(self, name):
                path = self.path(name)
                return path.exists() and time.time() - path.stat().st_mtime > 0.2

        graph = Graph({"a": (3, ""), "b": (2, ""), "c": (1, "ab"), "d": (1, "c")})
        there = together(graph, Slow(parts.folder), 3)
        assert sorted(graph.done) == ["a", "b", "c", "d"] and there[0] == {"a", "b", "c", "d"}

    def test_another_goes_on_while_the_longest_runs(self, parts):
        graph = Graph({"long": (9, ""), "a": (1, ""), "b": (1, "a"), "end": (1, ["long", "b"])})
        free = threading.Event()
        graph.before = lambda name: name != "long" or free.wait(10)
        graph.after = lambda name: name == "b" and free.set()
        together(graph, parts, 2)
        assert graph.done == ["a", "b", "long", "end"]

    def test_each_waits_for_all(self, parts):
        """One that had nothing left to take and was gone could not be begun anew."""
        graph, both = Graph({"a": (1, ""), "b": (1, "")}), threading.Barrier(2)

        def before(name):
            both.wait(10)  # each process has one of the two
            time.sleep(0.2 * (threading.current_thread().name == "0"))  # the rank

        graph.before = before
        assert together(graph, parts, 2) == {0: {"a", "b"}, 1: {"a", "b"}}


class TestClock:
    a, b, c = Piece("a", None, "a", 4.0), Piece("b", None, "b", 10.0), Piece("c", None, "c", 6.0)

    def test_left_by_hand(self):
        clock = Clock([self.a, self.b, self.c], world=1)
        clock.count(self.a, 2.0)  # 0.5 s a unit
        clock.count(self.b, 1.0)  # 0.1 s a unit
        assert clock.left([self.a]) == pytest.approx(2.0)
        assert clock.left([self.a, self.b, self.b]) == pytest.approx(4.0)
        # c has not been met: as fast as both together, 3 s for 14
        assert clock.left([self.c]) == pytest.approx(6 * 3 / 14)
        clock.count(self.a, 4.0)  # now 6 s for 8
        assert clock.left([self.a, self.b]) == pytest.approx(3.0 + 1.0)
        clock.world = 4  # processes, which share what is left
        assert clock.left([self.a, self.b]) == pytest.approx(1.0)

    def test_tells_every_twentieth(self):
        said, clock = [], Clock([Piece(str(i), None, "", 1.0) for i in range(100)], world=1)
        clock.count(self.a, 40.0)
        for pending in (99, 96, 94, 91, 88, 50, 1, 0):
            clock.tell([Piece("", None, "", 1.0)] * pending, said.append)
        assert said == ["6% of the run, 16 min left", "12% of the run, 15 min left",
                        "50% of the run, 8 min left", "99% of the run, 10 s left"]  # fmt: skip

    def test_pieces_that_cost_nothing_tell_nothing(self):
        """Others may have done all that costs something."""
        said, clock = [], Clock([self.a, self.b], world=2)
        clock.count(Piece("free", None, "free", 0.0), 0.1)
        clock.tell([self.a], said.append)
        assert said == []
        clock.count(self.b, 5.0)
        clock.tell([self.a], said.append)
        assert said == ["71% of the run, 1 s left"]

    @pytest.mark.parametrize(
        "seconds, text",
        [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (3569, "59 min"), (3590, "1 h 00 min"),
         (7500, "2 h 05 min"), (90000, "25 h 00 min")],
    )  # fmt: skip
    def test_durations(self, seconds, text):
        assert duration(seconds) == text


class TestTorchrun:
    """Real processes."""

    tiny = ["--dataset", "quadratic", "--quick", "--steps", "4", "--unroll", "2", "--episodes", "2",
            "--episode-steps", "2", "5", "--seeds", "1", "--nominal"]  # fmt: skip

    def test_two_processes_give_the_bits_of_one(self, tmp_path):
        alone = call_script(*self.tiny, "--out", "one", cwd=tmp_path)
        both = call_script(*self.tiny, "--out", "two", cwd=tmp_path, processes=2)
        assert alone.returncode == both.returncode == 0, both.stderr
        one, two = tmp_path / "one", tmp_path / "two"
        text = (two / "metrics.csv").read_text()
        assert text == (one / "metrics.csv").read_text()
        methods = {row["method"] for row in csv.DictReader(text.splitlines())}
        assert methods == {"L2L-Transfer", "Nominal alone", "SGD", "Adam", "Adam, lr 0.001"}
        ours, theirs = ({p.name for p in (out / "parts").iterdir()} for out in (one, two))
        assert ours == theirs
        a, b = (json.loads((out / "summary.json").read_text()) for out in (one, two))
        assert a["meta_training"] == b["meta_training"] and a["tuned"] == b["tuned"]
        # what rank 0 says, it says once
        assert both.stdout.count("results in two") == 1
        assert both.stdout.count("| Nominal alone") == 1

    def test_a_mistake_is_one_sentence_and_an_end(self, tmp_path):
        done = call_script("--eps", "2", cwd=tmp_path, processes=2)
        assert done.returncode != 0 and done.stdout == ""
        sentence = "run.py: --eps is 2.0: it must be between 0 and 1"
        assert done.stderr.count("run.py: --") == done.stderr.count(sentence) == 1
        assert list(tmp_path.iterdir()) == []

    def test_help_leaves_no_process_waiting(self, tmp_path):
        done = call_script("--help", cwd=tmp_path, processes=2)
        assert done.returncode == 0 and done.stdout.count("usage: run.py") == 1
