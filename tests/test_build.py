"""setup.py: which CUDA toolkit it takes, for which GPUs, and what it says where it cannot."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no shell scripts")


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module; it builds nothing when it is imported."""
    monkeypatch.chdir(ROOT)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "USE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_of_l2l_ref", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


NVCC = "sm_75\nsm_80\nsm_86\nsm_90\nsm_100\nsm_120\n"


class TestArchitectures:
    def test_all_that_the_toolkit_knows_and_what_follows(self, build):
        names, flags = build.architectures(NVCC)
        assert names == ["7.5", "8.0", "9.0+PTX", "10.0", "12.0+PTX"]
        assert flags[0] == "-gencode=arch=compute_75,code=sm_75"
        assert flags[-1] == "-gencode=arch=compute_120,code=compute_120"
        names, flags = build.architectures("sm_80\nsm_90\nsm_90a\n")
        assert names == ["8.0", "9.0+PTX"] and len(flags) == 3
        with pytest.raises(build.NotBuilt, match="the toolkit knows none of 7.5, 8.0"):
            build.architectures("sm_35\nsm_60\n")

    @pytest.mark.parametrize("wish", ["8.6;9.0a+PTX", "8.6 9.0a+PTX"])
    def test_what_is_asked_for(self, build, monkeypatch, wish):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
        assert build.architectures(NVCC) == (
            ["8.6", "9.0a+PTX"],
            [
                "-gencode=arch=compute_86,code=sm_86",
                "-gencode=arch=compute_90a,code=sm_90a",
                "-gencode=arch=compute_90a,code=compute_90a",
            ],
        )

    def test_another_name(self, build, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 Hopper")
        with pytest.raises(build.NotBuilt, match="has 'Hopper', it takes names such as 8.0"):
            build.architectures(NVCC)


class TestNvcc:
    def test_behind_a_wrapper(self, build, monkeypatch, tmp_path):
        """nvcc on PATH may be a script: the toolkit is where nvcc itself says it is."""
        root = tmp_path / "toolkit"
        real = script(root / "bin" / "nvcc", f"echo '#$ TOP={root}/bin/..' >&2")
        wrapper = script(tmp_path / "path" / "nvcc", f'exec {real} "$@"')
        monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
        nvcc, found = build.find_nvcc()
        assert Path(nvcc) == wrapper and found.resolve() == root

    def test_cuda_home_goes_first(self, build, monkeypatch, tmp_path):
        script(tmp_path / "path" / "nvcc", "exit 1")
        named = script(tmp_path / "home" / "bin" / "nvcc", "true")
        monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        nvcc, root = build.find_nvcc()
        assert Path(nvcc) == named and root == tmp_path / "home"

    def test_none(self, build, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(build.NotBuilt, match=f"nvcc is not in {tmp_path}/bin; CUDA_HOME names"):
            build.find_nvcc()

    def test_what_fails_is_quoted(self, build, tmp_path):
        tool = script(tmp_path / "nvcc", "echo 'kernels.cu(3): error: no such thing' >&2; exit 2")
        with pytest.raises(
            build.NotBuilt, match=r"nvcc failed \(kernels.cu\(3\): error: no such thing"
        ):
            build.run([str(tool)])
        with pytest.raises(build.NotBuilt, match="does not run"):
            build.run([str(tmp_path / "missing")])


class TestLeftOut:
    """`build_cuda` before it compiles anything."""

    def attempt(self, build):
        from setuptools import Distribution, Extension

        command = build.BuildEngine(Distribution())
        return command.build_cuda(Extension(build.CUDA, []))

    @pytest.mark.parametrize(
        "wish, words", [("0", "USE_CUDA is 0"), ("yes", "USE_CUDA is 'yes', it must be 0, 1")]
    )
    def test_on_demand(self, build, monkeypatch, wish, words):
        monkeypatch.setenv("USE_CUDA", wish)
        with pytest.raises(build.NotBuilt, match=words):
            self.attempt(build)

    def test_a_torch_without_cuda(self, build, monkeypatch):
        monkeypatch.setattr("torch.version.cuda", None)
        with pytest.raises(build.NotBuilt, match="this torch is without CUDA"):
            self.attempt(build)

    def test_a_toolkit_of_another_version(self, build, monkeypatch, tmp_path):
        script(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setattr("torch.version.cuda", "13.2")
        with pytest.raises(build.NotBuilt, match="nvcc is of CUDA 11.8, torch of 13.2"):
            self.attempt(build)
