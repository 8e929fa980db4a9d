"""The benchmarks in miniature: that they run, agree with the reference and write what they say."""

import json
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch

from bench import limits, measure, memory, operators, peers, transfer_step
from bench.case import Unavailable, make_case
from l2l_ref.backend import built
from l2l_ref.experiment.config import RECIPES


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    """Yardsticks that take no time."""
    monkeypatch.setattr(peers, "SIDE", 256)
    monkeypatch.setattr(limits, "COPIED", 1 << 22)


def test_operators_in_miniature(tmp_path, capsys):
    small = "--no-compile --no-memory --sizes 50 500 --most 100 --unroll 1 2 --seconds 0 --odd"
    operators.main([*small.split(), "--theta-input", "--out", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "operators.json").read_text())
    rows = [(row["operator"], row["n"], row["unroll"]) for row in report["rows"]]
    assert rows == [(o, 50, steps) for o in ("step", "meta_gradient") for steps in (1, 2)]
    for row in report["rows"]:
        expected = {"ours", "nn.LSTM", "reference", "sgemm floor"}
        expected |= {"LearnedOptimizer", "fused Adam"} if row["operator"] == "step" else set()
        assert row["peers"].keys() == expected and not row["unavailable"]
        assert row["floors"].keys() == ({"bytes", "FLOP"} if built() else {"bytes"})
        for peer in row["peers"].values():
            low, high = peer["quartiles"]
            assert 0 < low <= peer["median"] <= high
    assert report["phi"]["odd"] and report["phi"]["theta_input"]
    assert "bench.operators --no-compile" in report["command"] and str(tmp_path) not in str(report)
    rates, printed = report["rates"], capsys.readouterr().out
    assert 1e8 < rates["copied"] < 1e13
    assert 1e9 < rates["flops"] < 1e13 if built() else rates["flops"] is None
    assert ("GFLOP/s" in printed) == built() and "one thread" in printed and "GB/s" in printed
    assert "ours                    1.00×" in printed


def test_what_cannot_run_is_told_from_what_is_broken(monkeypatch):
    options = operators.parse("--seconds 0 --no-compile --backend reference".split())
    about = "step", 50, 1, 1, options, {"copied": 1e9, "flops": None}
    none_left = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. 30 GiB. GPU 0 has 1."))
    monkeypatch.setattr(peers, "step_lstm", none_left)
    row = operators.measured(*about)
    why = "fails here: CUDA out of memory. 30 GiB"
    assert row["unavailable"] == {"nn.LSTM": why} and f"–  {why}" in operators.lines(row)
    broken = Mock(theta_step_=Mock(side_effect=RuntimeError("illegal memory access")))
    monkeypatch.setattr(peers, "operators", lambda *args: broken)
    with pytest.raises(RuntimeError, match="illegal"):
        operators.measured(*about)
    monkeypatch.setattr(operators, "make_case", none_left)
    row = operators.measured(*about)
    assert not row["peers"] and why in operators.lines(row)
    monkeypatch.setattr("bench.case.free_bytes", lambda device: 1600 * 37 * 2.4)
    with pytest.raises(Unavailable, match="GB are free"):
        peers.step_compiled(make_case(37, 1, odd=True))


def test_a_peer_that_differs_is_caught():
    case = make_case(20, 2)
    peer = peers.meta_gradient_lstm(case)
    peers.check("meta_gradient", case, "LSTM", peer)
    off = peers.Peer(lambda: 1.01 * peer.run(), 1.0)
    with pytest.raises(AssertionError, match="off differs"):
        peers.check("meta_gradient", case, "off", off)
    step = peers.step_with(lambda thetas, *rest, **form: thetas[0].add_(0.01), case)
    with pytest.raises(AssertionError, match="adder differs"):
        peers.check("step", case, "adder", step)


@pytest.mark.parametrize(
    "operator, steps, form, each, once",
    [
        ("step", 7, {}, 7 * (2 * (2 * 2 * 20 * 4 + 4) + 4), 7 * 4 * 5301),  # h and c, θ; ∇; φ
        ("step", 1, {"odd": True}, 1292, 4 * 5301),
        ("meta_gradient", 20, {}, 320 + 2 * 20 * 4, 2 * 4 * 5301),  # state, ∇, cotangents; φ, dφ
        ("meta_gradient", 20, {"theta_input": True}, 320 + 3 * 20 * 4, 2 * 4 * 5381),  # and θ
    ],
)
def test_bytes(operator, steps, form, each, once):
    one, two = (limits.traffic(operator, make_case(n, steps, **form)) for n in (1, 2))
    assert two - one == each and one - each == once


def test_rates_and_floors_of_gpus(monkeypatch):
    h200 = {"capability": (9, 0), "multiprocessors": 132, "clocks.max.sm": "1980 MHz"}
    a100 = {"capability": (8, 0), "multiprocessors": 108, "clocks.max.sm": "1410 MHz"}
    assert limits.rates(about=a100)["flops"] == pytest.approx(19.5e12, rel=1e-2)
    assert limits.rates(about={**h200, "clocks.max.sm": "[N/A]"})["flops"] is None
    rates = {"copied": 4.0e12, "flops": limits.rates(about=h200)["flops"]}
    found = limits.floors("step", make_case(1_000_000, 1), rates)
    assert found == pytest.approx({"bytes": 0.163, "FLOP": 0.149}, rel=5e-3)
    meta = limits.floors("meta_gradient", make_case(1000, 20), rates)
    assert meta["FLOP"] == pytest.approx(3 * found["FLOP"])
    told = Mock(side_effect=["580.1, 1980 MHz, [N/A], 700.00 W\n", FileNotFoundError])
    monkeypatch.setattr(limits.subprocess, "check_output", told)
    said = limits.driver("GPU-1")
    assert (said["driver_version"], said["clocks.max.sm"]) == ("580.1", "1980 MHz")
    assert "--id=GPU-1" in told.call_args.args[0] and limits.driver("GPU-1") == {}


def test_memory_of_a_peer():
    found = memory.peak_extra("nn.LSTM", 3000, 3, {}, "reference", measure.CPU)
    assert 4e6 < found["bytes"] < 100e6  # about 2 kB for each of 9,000 coordinate-steps


def test_interleaved_rounds():
    runs = {"a": lambda: None, "b": lambda: time.sleep(0.002)}  # the latter in samples of three
    samples = measure.interleave(runs, seconds=0)
    assert [*map(len, samples.values())] == [3, 3] and 0.002 <= min(samples["b"]) < 0.005
    assert measure.summary([1.0, 2.0, 4.0], 10)["median"] == 20
    assert peers.adam(make_case(1000, 7)).scale == 1e6  # by parameters, not coordinate-steps


def test_transfer_step_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_step, "BATCH", 8)
    transfer_step.main(["--steps", "1", "--seconds", "0", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "transfer_step.json").read_text())
    assert [row["optimizee"] for row in report["rows"]] == ["mlp", "convnet"]
    for row in report["rows"]:
        learned = {f"L2L-Transfer ({recipe})" for recipe in RECIPES}
        assert row["methods"].keys() == learned | {"Adam (clean)", "Adam (PGD-7)"}
        assert row["ratios"]["Adam (PGD-7)"] == 1 and row["ratios"]["Adam (clean)"] > 0


def test_profile(tmp_path):
    arguments = f"--dataset quadratic --quick --steps 4 --unroll 2 --episodes 2 --out {tmp_path}"
    command = [sys.executable, "-m", "bench.run_profile", *arguments.split(), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = json.loads((tmp_path / "profile.json").read_text())
    assert {"meta-training", "tuning", "transfer"} <= seconds.keys()
    for phase in ("meta-training", "transfer"):
        for what in ("LSTM", "optimizee: forward, backward", "everything else"):
            assert seconds[phase][what] > 0
    assert "LSTM" not in seconds["tuning"]  # where the baselines are
    assert done.stdout.split("\nall")[1].splitlines()[0].split()[-1] == "100.0"


@pytest.mark.gpu
def test_operators_on_the_gpu(tmp_path):
    arguments = "--device cuda --sizes 300 5e3 --seconds 0.1 --no-compile"
    operators.main([*arguments.split(), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "operators.json").read_text())
    rows = [(row["operator"], row["n"], row["unroll"]) for row in report["rows"]]
    assert rows == [(o, n, t) for o, t in (("step", 1), ("meta_gradient", 20)) for n in (300, 5000)]
    assert not any(row["unavailable"] for row in report["rows"])
    assert report["rates"]["copied"] > 1e11 and report["gpu"]["driver_version"]
    assert report["memory"]["peers"]["reference"]["bytes"] > 0


@pytest.mark.gpu
def test_the_clock_waits_for_the_gpu():
    a = torch.randn(4096, 4096, device="cuda")
    a @ a
    found = measure.clock(lambda: a @ a, 10, torch.device("cuda:0"))
    assert found > 2 * 4096**3 / 1e15  # faster than any GPU, were the launch alone clocked
