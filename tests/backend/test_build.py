"""setup.py: which CUDA toolkit it takes, for which GPUs, and what it says where it cannot."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no shell scripts")


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module; it builds nothing when it is imported."""
    monkeypatch.chdir(ROOT)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "USE_CUDA", "L2L_VERBOSE"):
        monkeypatch.setenv(name, "")  # as if not set; afterwards, what setup.py set is undone too
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


def flag(number: str, code: str) -> str:
    return f"-gencode=arch=compute_{number},code={code}_{number}"


class TestArchitectures:
    def test_all_that_the_toolkit_knows_and_what_follows(self, build):
        names, flags = build.architectures(NVCC)
        assert names == ["7.5", "8.0", "9.0+PTX", "10.0", "12.0+PTX"]
        codes = [("75", "sm"), ("80", "sm"), ("90", "sm"), ("90", "compute"), ("100", "sm")]
        codes += [("120", "sm"), ("120", "compute")]
        assert sorted(flags) == sorted(flag(*code) for code in codes)

    def test_an_older_toolkit(self, build):
        names, flags = build.architectures("sm_80\nsm_90\nsm_90a\n")
        assert names == ["8.0", "9.0+PTX"] and len(flags) == 3

    @pytest.mark.parametrize(
        "wish, expected",
        [
            ("8.6;9.0a+PTX", [("86", "sm"), ("90a", "compute"), ("90a", "sm")]),
            ("8.6 9.0a+PTX", [("86", "sm"), ("90a", "compute"), ("90a", "sm")]),
            ("Hopper", [("90", "compute"), ("90", "sm")]),  # a name of torch
        ],
    )
    def test_what_is_asked_for(self, build, monkeypatch, wish, expected):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
        assert sorted(build.architectures(NVCC)[1]) == [flag(*code) for code in expected]

    @pytest.mark.parametrize(
        "toolkit, wish, words",
        [
            ("sm_35\nsm_60\n", "", "the toolkit knows none of 7.5, 8.0"),
            (NVCC, "8.0 Lovelace", "_LIST is '8.0 Lovelace': Unknown.*Lovelace"),
        ],
    )
    def test_none(self, build, monkeypatch, toolkit, wish, words):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
        with pytest.raises(build.NotBuilt, match=words):
            build.architectures(toolkit)


class TestNvcc:
    def test_behind_a_wrapper(self, build, monkeypatch, tmp_path):
        """nvcc on PATH may be a script, anywhere: it is taken, for it knows its toolkit."""
        real = script(tmp_path / "toolkit" / "bin" / "nvcc", 'echo "$0"')
        wrapper = script(tmp_path / "path" / "nvcc", f'exec {real} "$@"')
        monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
        nvcc = build.find_nvcc()
        assert Path(nvcc) == wrapper and build.run([nvcc]).strip() == str(real)

    def test_cuda_home_goes_first(self, build, monkeypatch, tmp_path):
        script(tmp_path / "path" / "nvcc", "exit 1")
        named = script(tmp_path / "home" / "bin" / "nvcc", "true")
        monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert Path(build.find_nvcc()) == named

    def test_none(self, build, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(build.NotBuilt, match=f"nvcc is not in {tmp_path}/bin; CUDA_HOME names"):
            build.find_nvcc()

    def test_what_fails_is_quoted(self, build, tmp_path):
        tool = script(tmp_path / "nvcc", "echo 'kernels.cu(3): error: no such thing' >&2; exit 2")
        with pytest.raises(build.NotBuilt, match=r"nvcc failed \(kernels.cu\(3\): error: no such"):
            build.run([str(tool)])
        with pytest.raises(build.NotBuilt, match="does not run"):
            build.run([str(tmp_path / "missing")])


def engine(build):
    """The command that builds the extension."""
    return build.BuildEngine(Distribution())


@pytest.mark.parametrize(
    "wish, torch_has, words",
    [
        ("0", "13.2", "USE_CUDA is 0"),
        ("yes", "13.2", "USE_CUDA is 'yes', it must be 0, 1"),
        ("", None, "this torch is without CUDA"),
        ("", "13.2", "nvcc is of CUDA 11.8, torch of 13.2"),
    ],
)
def test_left_out_before_anything_is_compiled(build, monkeypatch, tmp_path, wish, torch_has, words):
    script(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("USE_CUDA", wish)
    monkeypatch.setattr("torch.version.cuda", torch_has)
    command = engine(build)
    command.compiler = SimpleNamespace(include_dirs=[])
    with pytest.raises(build.NotBuilt, match=words):
        command.build_cuda("_engine_cuda.so")


class TestCompile:
    """Objects, by ninja: what a compiler says is kept, what is new enough stays."""

    @pytest.fixture
    def command(self, build, tmp_path):
        command = engine(build)
        command.build_temp, command.force = str(tmp_path / "of objects"), False
        return command

    @pytest.fixture
    def compiler(self, tmp_path):
        """A script that notes its first option, speaks, and makes the object, its last argument."""
        text = f'echo "$1" >> {tmp_path}/calls; echo "spoke of $1"; [ "$1" != bad ] || exit 1\n'
        return [str(script(tmp_path / "compiler", text + 'for last; do :; done; echo > "$last"'))]

    def test_each_object_with_its_flags(self, command, compiler, tmp_path):
        if shutil.which("ninja") is None:
            pytest.skip("ninja is not on PATH")
        files = {name: ("setup.py", [name]) for name in ("one", "two")}  # from the same source
        for command.force, more in [(False, 2), (False, 0), (True, 2)]:
            (tmp_path / "calls").write_text("")
            objects = command.compile("cpu", files, compiler)
            said = [Path(f"{name}.log").read_text() for name in objects]
            assert said == ["spoke of one\n", "spoke of two\n"] and Path(objects[0]).exists()
            assert len((tmp_path / "calls").read_text().split()) == more

    def test_without_ninja(self, build, command, compiler, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(build.sysconfig, "get_path", lambda name: tmp_path)
        with pytest.raises(build.NotBuilt, match=f"{tmp_path}/ninja does not run .*No such file"):
            command.compile("cpu", {"one": ("setup.py", [])}, compiler)

    def test_what_fails(self, build, command, compiler):
        with pytest.raises(build.NotBuilt, match="failed"):
            command.compile("cpu", {"one": ("setup.py", ["bad"])}, compiler)
