"""bench/gpu.sh, and what it puts sanitizers and profilers around."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import kernels

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_every_form_in_small_cases(capsys):
    options = SimpleNamespace(every_form=True, device=torch.device("cpu"))
    seen = {(len(case.theta), case.theta.dtype, *case.meta.settings.values())
            for case in kernels.cases(options)}  # fmt: skip
    assert len(seen) == 4 * (4 + 10)  # forms; sizes, and shapes in two dtypes
    kernels.main("--device cpu --backend reference --every-form".split())
    assert f"{3 * 4 * (5 + 10)} cases of step, meta_gradient, differ" in capsys.readouterr().out


def test_kernel_times(capsys):
    kernels.main("--device cpu --backend reference --sizes 100 --times".split())
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


def test_gpu_sh_goes_on_after_a_failure(tmp_path):
    python = tmp_path / "python"  # sees a GPU; then nothing that it is asked to run succeeds
    python.write_text("#!/bin/sh\ncase $2 in *torch*) exit 0;; *) echo $@; exit 3;; esac\n")
    python.chmod(0o755)
    out = tmp_path / "o u t"
    done = gpu_sh(PYTHON=str(python), OUT=str(out), PARTS="operators robust")
    assert done.returncode == 1 and "not done: operators robust" in done.stdout
    assert "exit code 3" in (out / "parts.txt").read_text()
    assert "bench.operators --device cuda" in (out / "operators.log").read_text()
    assert "cores" in (out / "machine.txt").read_text()


@pytest.mark.gpu
def test_every_form_on_the_gpu(capsys):
    kernels.main("--backend auto --every-form".split())
    assert "on cuda:0" in capsys.readouterr().out
