"""setup.py, with compilers that are shell scripts: what it builds, and says where it cannot."""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools import Distribution, Extension

ROOT = Path(__file__).resolve().parents[2]
NVCC = """case $1 in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --list-gpu-code) echo "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120" ;;
  *) echo "$@" >> {calls}; for last; do :; done; echo > "$last"
     echo "for 'sm_90': 4 bytes spill stores, 8 bytes spill loads" ;;
esac"""
OTHER = NVCC.replace("13.0", "11.8")
FAILS = "echo 'kernels.cu(3): error: no such thing' >&2; exit 2"
CPU, GPU = "_C", "_C_cuda"
pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("ninja") is None, reason="no shell scripts or ninja"
)


@pytest.fixture
def build(monkeypatch, tmp_path, capsys):
    """Builds with two compilers: the halves that are there, what it reports, all calls."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.version.cuda", "13.2")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # ninja is on PATH, or missing
    for name in ("TORCH_CUDA_ARCH_LIST", "USE_CUDA"):
        monkeypatch.setenv(name, "")  # as if not set; afterwards, what setup.py set is undone too
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("setup_of_l2l_ref", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)

    def run(cxx=NVCC, nvcc=NVCC, torch=torch):
        monkeypatch.setitem(sys.modules, "torch", torch)
        for path, text in ((tmp_path / "c++", cxx), (tmp_path / "bin/nvcc", nvcc)):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text.replace('{calls}', str(tmp_path / 'calls'))}\n")
            path.chmod(0o755)
        (tmp_path / "calls").write_text("")
        halves = [Extension(name, []) for name in (CPU, GPU)]
        command = setup.BuildEngine(Distribution({"ext_modules": halves}))
        command.ensure_finalized()
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "of objects")
        cxx = [str(tmp_path / "c++")]
        command.compiler = SimpleNamespace(include_dirs=[], compiler_so_cxx=cxx, linker_so_cxx=cxx)
        command.extensions = halves
        command.build_extensions()
        reports = capsys.readouterr().err.strip().splitlines()
        here = {path.name.split(".")[0] for path in (tmp_path / "lib").glob("*.so")}
        assert here == {line.split()[0] for line in reports if "is built with" in line}
        return here, reports, (tmp_path / "calls").read_text().splitlines()

    return run


def gencode(calls):
    """The architectures that the kernels were compiled for."""
    (line,) = (line for line in calls if "cuda/kernels.cu" in line)
    return re.findall(r"code=((?:sm|compute)_\w+)", line)


def test_each_object_with_its_flags_and_once(build):
    here, reports, calls = build()
    assert here == {CPU, GPU}
    assert reports[1].endswith("CUDA 13.0 for 7.5 8.0 9.0+PTX 10.0 12.0+PTX")
    assert gencode(calls) == [
        "sm_100", "compute_120", "sm_120", "sm_75", "sm_80", "compute_90", "sm_90"
    ]  # fmt: skip
    flags = dict(re.findall(r"NAMESPACE=(\w+)(.*?) -MMD", "\n".join(calls)))
    assert flags["baseline"] == "" and "-gencode" in flags["gpu"]
    if "avx2" in reports[0]:  # not on ARM
        assert flags["avx2"] == " -mavx2 -mfma" and "-mavx512f" in flags["avx512"]
    assert any('L2L_SPILLED="sm_90:12"' in line for line in calls)
    links = [line for line in calls if " -c " not in line]
    assert "--exclude-libs,ALL" in links[0] and "-cudart=static" in links[1]
    assert build()[2] == links  # the objects are new enough


@pytest.mark.parametrize(
    "wish, nvcc, codes",
    [
        ("8.6;9.0a+PTX", NVCC, ["sm_86", "compute_90a", "sm_90a"]),
        ("", NVCC.replace(" sm_100 sm_120", ""), ["sm_75", "sm_80", "compute_90", "sm_90"]),
    ],
)
def test_architectures_asked_for_or_known(build, monkeypatch, wish, nvcc, codes):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert gencode(build(nvcc=nvcc)[2]) == codes


def test_nvcc_on_path_and_of_another_cuda_on_demand(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("USE_CUDA", "1")
    assert build(nvcc=OTHER)[0] == {CPU, GPU}


@pytest.mark.parametrize(
    "half, given, environment, words",
    [
        (GPU, {}, {"USE_CUDA": "0"}, "USE_CUDA is 0"),
        (GPU, {"nvcc": OTHER}, {}, "nvcc is of CUDA 11.8, torch of 13.2; USE_CUDA=1"),
        (GPU, {"nvcc": "echo nothing"}, {}, "nvcc is of CUDA , torch of 13.2"),
        (GPU, {"nvcc": FAILS}, {}, r"nvcc failed \(kernels.cu\(3\): error: no such thing\)"),
        (GPU, {}, {"CUDA_HOME": "/nowhere"}, "No such file or directory: '/nowhere/bin/nvcc'"),
        (GPU, {}, {"TORCH_CUDA_ARCH_LIST": "8.0 Lovelace"}, "Unknown.*Lovelace"),
        (CPU, {"cxx": "exit 127"}, {}, r"failed \(exit status 127\)"),  # links: objects are new
        (CPU, {}, {"PATH": "/nowhere"}, "/nowhere/ninja"),
        (CPU, {"torch": None}, {}, "torch"),
    ],
)
def test_a_half_that_cannot_be_built(build, monkeypatch, half, given, environment, words):
    """One line says why, and the installation goes on; what an earlier build left does not stay."""
    build()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    here, reports, _ = build(**given)
    assert here == ({CPU} if half == GPU else set())
    assert re.search(f"^{half} is not built: .*{words}", reports[-1])
