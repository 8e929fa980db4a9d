"""The benchmarks in miniature: that they run, agree with the reference and write what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from bench import measure, memory, operators, peers, resnet_step, transfer_step
from bench.case import flops, make_case
from l2l_ref import drawing
from l2l_ref.backend import built
from l2l_ref.experiment import cli
from l2l_ref.experiment.config import RECIPES, complete


def report_of(command, folder: Path, *arguments: str) -> dict:
    """What a command writes, which is one report."""
    command.main([*arguments, "--out", str(folder)])
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_operators_in_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "SIDE", 256)  # a floor that takes no time
    small = "--quick --no-compile --no-memory --threads 1 --sizes 50 --seconds 0".split()
    report = report_of(operators, tmp_path / "out", *small, "--odd", "--theta-input")
    assert len(report["rows"]) == 2 * 2  # operators, unrolls
    for row in report["rows"]:
        expected = {"ours", "nn.LSTM", "reference", "sgemm floor"}
        expected |= {"LearnedOptimizer"} if row["operator"] == "step" else set()
        assert row["peers"].keys() == expected and not row["unavailable"]
        for peer in row["peers"].values():
            low, high = peer["quartiles"]
            assert 0 < low <= peer["median"] <= high
        assert row["ratios"].keys() == expected - {"ours"}
    assert (tmp_path / "out" / "operators.png").stat().st_size > 10_000
    assert str(tmp_path) not in json.dumps(report)
    assert "ns per coordinate-step" in capsys.readouterr().out


def test_operations_of_the_plain_form():
    assert flops(make_case(1, 1).meta) == 9960


def test_a_peer_that_differs_is_caught():
    case = make_case(20, 2)
    peer = peers.builders("meta_gradient", "reference")["reference"](case)
    result = peer.run()
    peers.check("meta_gradient", case, "itself", peer, result)
    with pytest.raises(AssertionError, match="itself differs"):
        peers.check("meta_gradient", case, "itself", peer, 1.01 * result)
    step = peers.step_with(lambda thetas, *rest, **form: thetas[0].add_(0.01), case)
    with pytest.raises(AssertionError, match="adder differs"):
        peers.check("step", case, "adder", step, None)


def test_no_formulas_on_logarithmic_axes(tmp_path):
    with drawing.own_style():
        figure = Figure()
        for panel, scale in zip(figure.subplots(1, 2), ("log", "symlog"), strict=True):
            panel.plot([1, 4, 1000], [200, 300, 450])
            panel.set(xscale=scale, yscale=scale)
        drawing.save_png(figure, tmp_path / "x.png", 50)
        axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
        labels = [label.get_text() for axis in axes for label in axis.get_ticklabels(which="both")]
    assert "10" in labels and "300" in labels and "$" not in "".join(labels)


def test_xla_computes_the_same():
    pytest.importorskip("jax")
    case = make_case(50, 3, odd=True, theta_input=True)
    expected = peers.builders("meta_gradient", "reference")["reference"](case).run()
    for operator in peers.OPERATORS:
        peer = peers.builders(operator, "reference")[peers.XLA](case)
        peers.check(operator, case, peers.XLA, peer, expected)


def test_the_machine_is_measured():
    rates = measure.rates(copied=1 << 22, rounds=3)
    assert 1e8 < rates["copied"] < 1e13
    assert 1e9 < rates["flops"] < 1e13 if built() else rates["flops"] is None
    line = measure.where({"cpu": "x", "torch": "y", "backend": "z", "rates": rates})
    assert ("GFLOP/s" in line) == built() and "GB/s" in line


def test_blocks_add_up(monkeypatch):
    case = make_case(37, 3, odd=True)
    whole = peers.meta_gradient_lstm(case).run()
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2e5)
    peer = peers.meta_gradient_lstm(case)
    assert "blocks" in peer.note
    torch.testing.assert_close(peer.run(), whole, rtol=1e-4, atol=1e-4)


def test_memory_of_a_peer():
    case = {"n": 3000, "steps": 3, "backend": "reference", "form": {}}
    found = memory.peak_extra({"name": "nn.LSTM", "operator": "meta_gradient", **case})
    assert 4e6 < found["bytes"] < 100e6  # about 2 kB for each of 9,000 coordinate-steps


def test_interleaved_rounds():
    calls = []
    samples = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: None}, seconds=0)
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3} and calls
    assert measure.summary([1.0, 2.0, 4.0], 10)["median"] == 20


def test_transfer_step_in_miniature(tmp_path):
    small = "--quick --steps 1 --batch-size 8".split()
    report = report_of(transfer_step, tmp_path, *small)
    assert [row["optimizee"] for row in report["rows"]] == ["mlp", "convnet"]
    for row in report["rows"]:
        learned = {f"L2L-Transfer ({recipe})" for recipe in RECIPES}
        assert row["methods"].keys() == learned | {"Adam (clean)", "Adam (PGD-7)"}
        assert row["ratios"]["Adam (PGD-7)"] == 1
        assert all(method["median"] > 0 for method in row["methods"].values())


@pytest.fixture
def small_net(monkeypatch):
    """The "ResNet" has 1,005 parameters."""
    monkeypatch.setattr(resnet_step, "resnet18", lambda num_classes: nn.Linear(200, 5))


def learned_labels(recipes) -> list[str]:
    return [f"φ, {recipe}{one}" for recipe in recipes for one in ("", ", one tensor")]


def test_resnet_step_in_miniature(tmp_path, capsys, small_net):
    report = report_of(resnet_step, tmp_path, "--seconds", "0")
    assert report["parameters"] == 1005
    adam, *others = report["optimizers"].values()
    assert list(report["optimizers"])[1:] == learned_labels(RECIPES) and adam["over_adam"] == 1
    for row in others:
        assert row["over_adam"] == row["median"] / adam["median"]
        assert row["ns_per_parameter"] == pytest.approx(1e6 * row["median"] / 1005)
    assert "φ, robust, one tensor" in capsys.readouterr().out


def test_a_state_that_does_not_fit_is_a_line(tmp_path, capsys, small_net, monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2 * 320 * 1005)
    rows = report_of(resnet_step, tmp_path, "--seconds", "0", "--backend", "auto")["optimizers"]
    assert [label for label, row in rows.items() if "unavailable" in row] == (
        learned_labels([r for r in RECIPES if complete({"recipe": r}).odd] if built() else RECIPES)
    )
    assert "GB are free" in capsys.readouterr().out


def test_one_tensor_has_gradients_too(small_net):
    (theta,) = resnet_step.resnet(measure.CPU, one=True)
    assert len(theta) == 1005 and theta.grad.all()


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--sizes 0", "whole number"),
        ("--sizes 1.5", "whole number"),
        ("--threads 100000", "cores"),
        ("--seconds nan", "seconds"),
        ("--backend other", "other"),
        ("--what", "--what"),
        ("--device meta", "--device meta is not available here: use --device cpu"),
        ("--device gpu", "--device gpu is not available"),
        ("--device cuda:99", "--device cuda:99 is not available"),
        pytest.param("--device cuda", "--device cuda is not available", marks=no_gpu),
        pytest.param("--device cuda:0", "--device cuda:0 is not available", marks=no_gpu),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["operators.py", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        cli.run_as_script("operators.py", operators.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("operators.py: ") and message in line


def test_profile(tmp_path):
    arguments = "--dataset quadratic --steps 4 --unroll 2 --episodes 2 --seeds 1 --device cpu"
    done = subprocess.run(
        [sys.executable, "-m", "bench.run_profile", *arguments.split(), "--out", tmp_path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (file,) = tmp_path.iterdir()
    seconds = json.loads(file.read_text())["seconds"]
    assert {"meta-training", "tuning", "transfer"} <= seconds.keys()
    for phase in ("meta-training", "transfer"):
        for what in ("LSTM", "optimizee: forward, backward", "everything else"):
            assert seconds[phase][what] > 0
    assert "LSTM" not in seconds["tuning"]  # where the baselines are
    last = done.stdout.split("\nall")[1].splitlines()[0]
    assert last.split()[-2:] == ["100.0", "100.0"]
