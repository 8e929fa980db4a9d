"""The machine that a run is on: what its results depend on, and the heap of its C library."""

import ctypes
import math
import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from l2l_ref.backend import build_info

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
CGROUP = Path("/sys/fs/cgroup")
LARGEST_BLOCK = 32 << 20  # bytes; glibc takes no higher threshold


def keep_freed_memory() -> None:
    """Tell glibc, if that is the C library, not to give freed memory back to the system.

    Every step of a network frees tensors of some megabytes and asks for the same ones again. Memory
    that comes anew from the system is cleared page by page at first touch, which costs a network
    of convolutions as much time as its arithmetic.
    """
    with suppress(OSError, TypeError, AttributeError):  # another one has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)


def cores() -> int:
    """CPU cores that this process may run on, within the quota of its container (cgroups)."""
    known = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    try:
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
    except (OSError, ValueError):  # not there, or "max"
        return count
    return min(count, math.ceil(quota / period))


def environment(device: torch.device, backend: str, data: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware, code and data (`Setting.data`) that a result depends on."""
    cuda = device.type == "cuda"
    versions = {one.name: one.version for one in distributions()}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: versions.get(name) for name in ("torchvision", "numpy")},  # None: not installed
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "engine": build_info() if backend == "fused" else None,
        "git_commit": git_commit(),
        **data,
    }


def processor() -> str:
    """The CPU: its name, on x86 also family, model and the vector instructions that torch uses, for
    a name such as "AMD EPYC" says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""  # not Linux
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in found:
        return name
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{name} (family {found['cpu family']}, model {found['model']}; {vectors})"


def git_commit() -> str | None:
    """The commit of this checkout, with "+" behind it if files differ; None outside git."""
    root = Path(__file__).resolve().parents[2]
    where = [f"--git-dir={root}/.git", f"--work-tree={root}"]  # not that of a folder around it
    words = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]  # without tags
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.check_output(
            ["git", *where, *words], env=own, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
