"""The benchmarks of a GPU: what they count and say."""

import json
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch._dynamo  # takes stock of torch.cuda at its import: before anything there is faked

from bench import limits, measure, operators, peers
from bench.case import make_case

H200 = {"name": "NVIDIA H200", "capability": (9, 0), "multiprocessors": 132,
        "clocks.max.sm": "1980 MHz"}  # fmt: skip


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


@pytest.fixture
def pretended(monkeypatch):
    """The CPU passes for an H200 that cannot record graphs."""
    monkeypatch.setattr(measure, "kind", lambda device: "cuda")
    monkeypatch.setattr(limits, "gpu", lambda device: H200)
    nothing = {"set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"}
    fakes = dict.fromkeys(nothing, lambda *args: None)
    fakes |= dict.fromkeys(("memory_reserved", "memory_allocated"), lambda device: 1000)
    fakes |= {"max_memory_allocated": lambda device: 3000, "Event": Event}
    fakes |= {
        "mem_get_info": lambda device: (8 << 30, 8 << 30),
        "Stream": Mock(side_effect=RuntimeError("no streams here")),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(limits, "COPIED", 1 << 20)
    monkeypatch.setattr(peers, "SIDE", 64)


def test_the_clock_of_a_gpu(pretended):
    calls = []
    found = measure.clock(lambda: calls.append(time.sleep(0.01)), 5)
    assert len(calls) == 5 and 0.01 <= found < 0.03


@pytest.mark.parametrize(
    "operator, steps, form, each, once",
    [
        ("step", 1, {}, 2 * (2 * 2 * 20 * 4 + 4) + 4, 4 * 5301),  # h and c of two layers, θ; ∇; φ
        ("step", 7, {}, 7 * 652, 7 * 4 * 5301),
        ("step", 1, {"odd": True}, 1292, 4 * 5301),
        ("meta_gradient", 20, {}, 320 + 2 * 20 * 4, 2 * 4 * 5301),  # state, ∇, cotangents; φ, dφ
        ("meta_gradient", 20, {"theta_input": True}, 320 + 3 * 20 * 4, 2 * 4 * 5381),  # and θ
    ],
)
def test_bytes(operator, steps, form, each, once):
    one, two = (limits.traffic(operator, make_case(n, steps, **form)) for n in (1, 2))
    assert two - one == each and one - each == once


def test_rates_of_gpus(pretended):
    found = limits.rates(about=H200)
    assert found["flops"] == pytest.approx(132 * 128 * 2 * 1.98e9) and found["copied"] > 1e8
    a100 = {"capability": (8, 0), "multiprocessors": 108, "clocks.max.sm": "1410 MHz"}
    assert limits.rates(about=a100)["flops"] == pytest.approx(19.5e12, rel=1e-2)
    assert limits.rates(about={**H200, "clocks.max.sm": "[N/A]"})["flops"] is None


def test_floors_of_an_h200():
    rates = {"copied": 4.0e12, "flops": 66.9e12}
    found = limits.floors("step", make_case(1_000_000, 1), rates)
    assert found["bytes"] == pytest.approx(0.163, abs=5e-4)
    assert found["FLOP"] == pytest.approx(0.149, abs=5e-4)
    meta = limits.floors("meta_gradient", make_case(1000, 20), rates)
    assert meta["FLOP"] == pytest.approx(3 * found["FLOP"])
    unknown = limits.floors("step", make_case(1000, 1), {**rates, "flops": None})
    assert unknown == {"bytes": pytest.approx(0.168, abs=5e-4)}


def test_operators_on_a_pretended_gpu(tmp_path, capsys, pretended, monkeypatch):
    too_large = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. 30 GiB. GPU 0 has 1."))
    monkeypatch.setattr(peers, "step_lstm", too_large)
    monkeypatch.setattr(operators, "MEMORY_CASE", (50, 2))
    arguments = "--seconds 0 --no-compile --backend reference --sizes 50 200 --most 4000".split()
    operators.main([*arguments, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "operators.json").read_text())
    rows = [(row["operator"], row["n"], row["unroll"]) for row in report["rows"]]
    assert rows == [(o, n, t) for o, t in (("step", 1), ("meta_gradient", 20)) for n in (50, 200)]
    why = {"ours in a CUDA graph": "fails here: no streams here",
           "ours on tensor cores": "needs the fused engine",
           "nn.LSTM": "fails here: CUDA out of memory. 30 GiB"}  # fmt: skip
    for row in report["rows"]:
        assert row["floors"].keys() == {"bytes", "FLOP"}
        assert row["unavailable"] == (why if row["operator"] == "step" else {})
    assert report["memory"]["peers"]["ours"]["bytes"] == 2000
    printed = capsys.readouterr().out
    assert "NVIDIA H200, torch" in printed and "66908 GFLOP/s" in printed
    assert f"–  {why['nn.LSTM']}\n" in printed
    monkeypatch.setattr(operators, "make_case", too_large)
    row = operators.measured("step", 50, 1, 1, operators.parse(arguments), {})
    assert not row["peers"] and "30 GiB" in operators.lines(row)


def test_a_broken_engine_is_no_missing_peer(pretended, monkeypatch):
    broken = SimpleNamespace(theta_step_=Mock(side_effect=RuntimeError("illegal memory access")))
    monkeypatch.setattr(peers, "operators", lambda *args: broken)
    with pytest.raises(RuntimeError, match="illegal"):
        operators.measured("step", 50, 1, 1, operators.parse(["--no-compile"]), {})


def test_adam_counts_parameters():
    adam = peers.adam(make_case(1000, 7))
    adam.run()
    assert adam.scale == 1e6


def test_what_the_driver_says(monkeypatch):
    told = Mock(side_effect=["580.1, 1980 MHz, [N/A], 700.00 W\n", FileNotFoundError])
    monkeypatch.setattr(limits.subprocess, "check_output", told)
    found = limits.driver("GPU-1")
    assert (found["driver_version"], found["clocks.max.sm"]) == ("580.1", "1980 MHz")
    assert "--id=GPU-1" in told.call_args.args[0] and limits.driver("GPU-1") == {}


@pytest.mark.gpu
def test_operators_on_the_gpu(tmp_path):
    arguments = "--device cuda --sizes 300 5e3 --seconds 0.1 --no-compile"
    operators.main([*arguments.split(), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "operators.json").read_text())
    assert not any(row["unavailable"] for row in report["rows"])
    assert report["rates"]["copied"] > 1e11 and report["gpu"]["driver_version"]
    assert report["memory"]["peers"]["reference"]["bytes"] > 0


@pytest.mark.gpu
def test_the_clock_waits_for_the_gpu():
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    found = measure.clock(lambda: a @ a, 10, torch.device("cuda:0"))
    assert found > 2 * 4096**3 / 1e15  # faster than any GPU, were the launch alone clocked
