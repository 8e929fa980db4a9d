"""What a run says of its machine, and that freed memory stays with the process."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from l2l_ref.experiment import machine

GIVEN_BACK = """
import sys, torch
from l2l_ref.experiment.machine import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
resident = lambda: int(open("/proc/self/statm").read().split()[1])  # pages of 4 KiB
blocks = [torch.zeros(2**20) for _ in range(16)]  # 64 MiB in blocks of 4
held = resident()
blocks.clear()
print((held - resident()) / 2**14)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_freed_memory_stays():
    def given_back(how: str) -> float:
        """The share of freed memory that goes back to the system."""
        command = [sys.executable, "-c", GIVEN_BACK, how]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        return float(done.stdout)

    assert given_back("kept") < 0.1 and given_back("default") > 0.9


@pytest.mark.parametrize("library", [object(), OSError("none")])
def test_another_c_library_is_left_alone(monkeypatch, library):
    def load(name):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert machine.keep_freed_memory() is False


CPUINFO = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    "text, name",
    [
        (CPUINFO, "AMD EPYC (family 25, model 17; avx2 avx512f avx512_bf16)"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_cpu_by_name_and_model(monkeypatch, text, name):
    def read(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    assert machine.processor() == name


def test_the_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    if (own := machine.git_commit()) is None:
        pytest.skip("no checkout")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "another"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, env=clean)
    for name, value in (("DIR", f"{tmp_path}/.git"), ("WORK_TREE", str(tmp_path))):
        monkeypatch.setenv(f"GIT_{name}", value)
        assert machine.git_commit() == own
