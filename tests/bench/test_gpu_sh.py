"""bench/gpu.sh, and what it puts sanitizers and profilers around."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import kernels

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_every_form_in_small_cases(monkeypatch, capsys):
    seen = []
    whole = kernels.prepared

    def noted(operator, case, backend):
        lstm, form = case.meta.lstm, case.meta.form
        shape = lstm.num_layers, lstm.hidden_size, form["odd"], form["theta_input"]
        seen.append((operator, len(case.theta), case.theta.dtype, *shape))
        return whole(operator, case, backend)

    monkeypatch.setattr(kernels, "prepared", noted)
    kernels.main("--device cpu --backend reference --every-form".split())
    assert {s[0] for s in seen} == set(kernels.OPERATORS) and {s[1] for s in seen} >= {1, 1000}
    assert len({s[3:] for s in seen if s[2] == torch.float64}) == 5 * 4
    assert len(set(seen)) == 3 * 4 * (4 + 10) and f"{len(seen)} cases" in capsys.readouterr().out


def test_kernel_times(capsys):
    kernels.main("--device cpu --backend reference --sizes 100 --unroll 2 --times".split())
    assert "aten::mm" in capsys.readouterr().out


def gpu_sh(**variables):
    script = Path(__file__).parents[2] / "bench" / "gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "variables, message",
    [
        pytest.param({}, "no GPU here", marks=no_gpu),
        ({"PARTS": "build all"}, "PARTS has 'all'"),
        ({"PYTHON": "/bin/false"}, "has no torch"),
    ],
)
def test_gpu_sh_refuses(tmp_path, variables, message):
    done = gpu_sh(OUT=str(tmp_path / "out"), **variables)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("timeout") is None, reason="no `timeout` of GNU's")
def test_gpu_sh_goes_on_after_a_failure(tmp_path):
    python = tmp_path / "python"  # sees a GPU; then nothing that it is asked to run succeeds
    python.write_text("#!/bin/sh\ncase $2 in *torch*) exit 0;; *) echo $@; exit 3;; esac\n")
    python.chmod(0o755)
    out = tmp_path / "o u t"
    done = gpu_sh(PYTHON=str(python), OUT=str(out), PARTS="resnet robust")
    assert done.returncode == 1 and "not done: resnet robust" in done.stdout
    assert "exit code 3" in (out / "parts.txt").read_text()
    assert "bench.resnet_step --device cuda" in (out / "resnet.log").read_text()
    assert "cores" in (out / "machine.txt").read_text()


@pytest.mark.gpu
def test_every_form_on_the_gpu(capsys):
    kernels.main("--backend auto --every-form".split())
    assert "on cuda:0" in capsys.readouterr().out
