"""The benchmarks of a GPU: what they count and say."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # takes stock of torch.cuda at its import: before anything there is faked

from bench import gpu, measure, operators, peers
from bench.case import make_case

H200 = {"name": "NVIDIA H200", "capability": (9, 0), "multiprocessors": 132, "max_mhz": 1980.0}
SILENT = {**H200, "max_mhz": None}
on_gpu = pytest.mark.gpu


class Event:
    """A CUDA event on a CPU, where nothing is asynchronous."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def no_graphs():
    raise RuntimeError("no streams here")


@pytest.fixture
def pretended(monkeypatch):
    """The CPU passes for an H200 that cannot record graphs."""
    monkeypatch.setattr(measure, "kind", lambda device: "cuda")
    monkeypatch.setattr(measure, "about", lambda device: H200)
    nothing = {"set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"}
    fakes = dict.fromkeys(nothing, lambda *args: None)
    fakes |= dict.fromkeys(("memory_reserved", "memory_allocated"), lambda device: 1000)
    fakes |= {"max_memory_allocated": lambda device: 3000, "Event": Event}
    fakes |= {"mem_get_info": lambda device: (8 << 30, 8 << 30), "Stream": no_graphs}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu, "COPIED", 1 << 20)
    monkeypatch.setattr(peers, "SIDE", 64)


def test_the_clock_of_a_gpu(pretended):
    calls = []
    found = measure.clock(lambda: calls.append(time.sleep(0.01)), 5)
    assert len(calls) == 5 and 0.01 <= found < 0.03


def test_bytes_of_a_step():
    one, two = (gpu.traffic("step", make_case(n, 1)) for n in (1, 2))
    assert two - one == 2 * 2 * 2 * 20 * 4 + 8 + 4 == 652  # h and c of two layers; θ; ∇
    assert one == 652 + 4 * 5301  # φ
    assert gpu.traffic("step", make_case(3, 7)) == 7 * gpu.traffic("step", make_case(3, 1))
    odd = gpu.traffic("step", make_case(2, 1, odd=True))
    assert odd - gpu.traffic("step", make_case(1, 1, odd=True)) == 1292


def test_bytes_of_a_meta_gradient():
    one, two = (gpu.traffic("meta_gradient", make_case(n, 20)) for n in (1, 2))
    assert two - one == 320 + 2 * 20 * 4  # the first state, ∇ and cotangents
    assert one - (two - one) == 2 * 4 * 5301  # φ is read, dφ is written
    one, two = (gpu.traffic("meta_gradient", make_case(n, 20, theta_input=True)) for n in (1, 2))
    assert two - one == 320 + 3 * 20 * 4  # and θ


def test_ceilings_of_an_h200():
    found = gpu.ceilings(H200, 4.3e12)
    assert found["nominal"] == 4.8e12 and found["measured"] == 4.3e12
    assert found["flops"] == pytest.approx(132 * 128 * 2 * 1.98e9)
    assert found["formula"] == "132 multiprocessors × 128 lanes × 2 × 1.98 GHz"
    assert "4.3 TB/s" in gpu.title(found) and "66.9 TFLOP/s" in gpu.title(found)


def test_ceilings_of_others():
    a100 = {"name": "NVIDIA A100-SXM4-80GB", "capability": (8, 0), "multiprocessors": 108}
    found = gpu.ceilings({**a100, "max_mhz": 1410.0}, 1.7e12)
    assert found["nominal"] is None and found["flops"] == pytest.approx(19.5e12, rel=1e-2)
    found = gpu.ceilings({**SILENT, "name": "NVIDIA H200 NVL"}, 4e12)
    assert found["nominal"] == 4.8e12 and found["flops"] is None and "unknown" in gpu.title(found)


def test_floors_of_an_h200():
    case, limits = make_case(1_000_000, 1), gpu.ceilings(H200, 4.0e12)
    found = gpu.floors("step", case, limits)
    assert found["ns"]["nominal"] == pytest.approx(0.136, abs=5e-4)
    assert found["ns"]["measured"] == pytest.approx(0.163, abs=5e-4) == found["floor"]
    assert found["ns"]["flops"] == pytest.approx(0.149, abs=5e-4)
    meta = gpu.floors("meta_gradient", make_case(1000, 20), limits)
    assert meta["floor"] == meta["ns"]["flops"] == pytest.approx(3 * found["ns"]["flops"])


def test_table_of_floors():
    known, unknown = (
        gpu.floors("step", make_case(1000, 1), gpu.ceilings(about, 4.0e12))
        for about in (H200, {**SILENT, "name": "Some GPU"})
    )
    assert unknown["ns"]["flops"] is None and unknown["floor"] == unknown["ns"]["measured"]
    row = {"operator": "step", "n": 1000, "unroll": 1, "floors": known | {"reached": {"ours": 0.5}}}
    other = {**row, "floors": unknown | {"reached": {}}}
    head, line, last = gpu.table([row, {"operator": "step"}, other]).splitlines()
    assert line.split() == "step 1000 1 673.2 9960 0.168 0.140 0.149 ours 50%".split()
    assert last.split()[-2:] == ["–", "–"]
    assert head.index("bytes/nominal") < head.index("FLOP/rate") < head.index("of the larger")


def test_operators_on_a_pretended_gpu(tmp_path, capsys, pretended, monkeypatch):
    monkeypatch.setattr(operators, "MEMORY_CASE", (50, 2))
    arguments = "--sizes 50 200 --most 4000 --seconds 0 --no-compile --backend reference"
    operators.main([*arguments.split(), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "operators.json").read_text())
    assert report["gpu"]["name"] == "NVIDIA H200" and report["gpu"]["capability"] == [9, 0]
    assert report["ceilings"]["formula"].startswith("132 multiprocessors")
    rows = [(row["operator"], row["n"], row["unroll"]) for row in report["rows"]]
    assert rows == [(o, n, t) for o, t in (("step", 1), ("meta_gradient", 20)) for n in (50, 200)]
    for row in report["rows"]:
        others = {"LearnedOptimizer", "fused Adam", "copy"} if row["operator"] == "step" else set()
        assert row["peers"].keys() == {"ours", "nn.LSTM", "reference", "sgemm floor"} | others
        share = row["floors"]["floor"] / row["peers"]["ours"]["median"]
        assert row["floors"]["reached"] == {"ours": pytest.approx(share)}
        assert all(peer["median"] > 0 for peer in row["peers"].values())
        why = {"ours in a CUDA graph": "fails here: no streams here",
               "ours on tensor cores": "needs the fused engine"}  # fmt: skip
        assert row["unavailable"] == (why if row["operator"] == "step" else {})
    assert report["memory"]["peers"]["ours"]["bytes"] == 2000
    printed = capsys.readouterr().out
    assert "NVIDIA H200, torch" in printed and "floors: bytes over" in printed
    assert (tmp_path / "operators.png").stat().st_size > 10_000


def test_no_memory_is_a_line_not_an_end(tmp_path, capsys, pretended, monkeypatch):
    def too_large(case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30 GiB. GPU 0 has 1.")

    monkeypatch.setattr(gpu, "adam", too_large)
    monkeypatch.setattr(peers, "step_lstm", too_large)
    arguments = ["--sizes", "50", "--most", "50", "--seconds", "0", "--no-compile", "--no-memory"]
    operators.main([*arguments, "--backend", "reference", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "nn.LSTM: fails here: CUDA out of memory. Tried to allocate 30 GiB\n" in printed
    monkeypatch.setattr(operators, "make_case", lambda *args, device=None, **form: too_large(None))
    row = operators.measured("step", 50, 1, 1, operators.parse(arguments), None)
    assert not row["peers"] and "30 GiB" in operators.line(row, operators.COLUMNS["cuda"])


def test_a_broken_engine_is_no_missing_peer(pretended, monkeypatch):
    def broken(*args, **form):
        raise RuntimeError("illegal memory access")

    ours = SimpleNamespace(theta_step_=broken)
    monkeypatch.setattr(peers, "operators", lambda *args: ours)
    options = operators.parse(["--no-compile"])
    with pytest.raises(RuntimeError, match="illegal"):
        operators.measured("step", 50, 1, 1, options, None)


@pytest.mark.parametrize("most", [8000, 1 << 30])
def test_a_copy_moves_as_many_bytes_or_is_scaled(monkeypatch, most):
    monkeypatch.setattr(gpu, "COPIED", most)
    case = make_case(1000, 1)
    peer, moved = gpu.copy(case), gpu.traffic("step", case)
    copied = 2 * peer.run().nbytes
    assert copied == min(most, moved // 8 * 8)
    assert peer.scale == pytest.approx(1e6 * moved / copied)


def test_adam_counts_parameters():
    adam = gpu.adam(make_case(1000, 1))
    adam.run()
    assert adam.scale == 1e6


def test_what_the_driver_says(tmp_path, monkeypatch):
    told = "580.1, 1980, [N/A], 700.00"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ntest $1 = --id=GPU-1 && echo '{told}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = measure.ask_driver("GPU-1")
    assert found == {"driver": "580.1", "max_mhz": 1980, "mhz": None, "watts": 700}
    assert set(measure.ask_driver("GPU-2").values()) == {None}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert set(measure.ask_driver("GPU-1").values()) == {None}


@on_gpu
def test_operators_on_the_gpu(tmp_path, capsys):
    arguments = "--device cuda --sizes 300 5e3 --seconds 0.1 --no-compile"
    operators.main([*arguments.split(), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "operators.json").read_text())
    for row in report["rows"]:
        assert row["peers"].keys() >= {"ours", "nn.LSTM", "reference", "sgemm floor"}
        assert 0 < row["floors"]["reached"]["ours"]
        assert not row["unavailable"]
    assert report["ceilings"]["measured"] > 1e11 and report["gpu"]["driver"]
    assert report["memory"]["peers"]["reference"]["bytes"] > 0


@on_gpu
def test_the_clock_waits_for_the_gpu():
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    found = measure.clock(lambda: a @ a, 10, measure.chosen("cuda"))
    assert found > 2 * 4096**3 / 1e15  # faster than any GPU, were the launch alone clocked
