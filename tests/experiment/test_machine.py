"""What a run says of its machine, and that freed memory stays with the process."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2l_ref.experiment import machine

GIVEN_BACK = """
import torch
from l2l_ref.experiment.machine import keep_freed_memory
keep_freed_memory()
resident = lambda: int(open("/proc/self/statm").read().split()[1])  # pages of 4 KiB
blocks = [torch.zeros(2**20) for _ in range(16)]  # 64 MiB in blocks of 4
held = resident()
blocks.clear()
print((held - resident()) / 2**14)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
def test_freed_memory_stays():
    """By default all of it is given back."""
    done = subprocess.check_output(
        [sys.executable, "-c", GIVEN_BACK], text=True, cwd=Path(__file__).parents[2]
    )
    assert float(done) < 0.1


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    machine.keep_freed_memory()


CPUINFO = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
"""
UNNAMED = platform.processor() or platform.machine()


@pytest.mark.parametrize(
    "text, name",
    [
        (CPUINFO, "AMD EPYC (family 25, model 17; AVX2)"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", UNNAMED),
        (None, UNNAMED),
    ],
)
def test_the_cpu_by_name_and_model(monkeypatch, text, name):
    def read(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.processor() == name


def test_the_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    if (own := machine.git_commit()) is None:
        pytest.skip("no checkout")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # as a hook sets them
        monkeypatch.setenv(name, str(tmp_path))
        assert machine.git_commit() == own


@pytest.mark.parametrize(
    "quota, count",
    [("150000 100000\n", 2), ("max 100000\n", 6), (None, 6), ("50000 100000\n", 1)],
)
def test_cores_of_a_container(quota, count, tmp_path, monkeypatch):
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert machine.cores() == count
