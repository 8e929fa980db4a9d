"""What differs where the tensors are on a GPU: its choice, its clock, its memory, its name."""

import gc
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l2l_ref.backend import available_device

CPU = torch.device("cpu")
ASKED = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit")  # of nvidia-smi


@dataclass(frozen=True)
class Gpu:
    """What a GPU and its driver say of themselves; None where they do not.

    Attributes:
        capability: (major, minor).
        max_mhz, mhz: clock of the multiprocessors, the highest and that of the moment.
        watts: the limit on its power.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    driver: str | None = None
    max_mhz: float | None = None
    mhz: float | None = None
    watts: float | None = None
    cuda: str | None = torch.version.cuda


def chosen(name: str) -> torch.device:
    """The device `name`, with its number, ready to be measured: float32 is float32 on it.

    Raises:
        InputError: a device that is not there, or neither a CPU nor a GPU with CUDA.
    """
    device = torch.empty(0, device=available_device(name)).device
    if kind(device) == "cuda":
        torch.cuda.set_device(device)  # streams and events are the current device's
        torch.backends.cudnn.allow_tf32 = False  # cuDNN's LSTM would round to 10 bits
    return device


def kind(device: torch.device) -> str:
    """ "cpu" or "cuda": which side of the seams a device is on."""
    return device.type


def clock(run: Callable[[], Any], calls: int, device: torch.device = CPU) -> float:
    """Seconds a call, of `calls` in a row: on a GPU from when the first begins there to when the
    last has ended, so the time to launch them counts where the GPU waits for it."""
    if kind(device) == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def free_bytes(device: torch.device) -> float:
    """Memory that is free now; infinite where the system does not say."""
    if kind(device) == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return float("inf")


def give_back(device: torch.device) -> None:
    """Free what nothing refers to, on a GPU for the other programs too."""
    gc.collect()
    if kind(device) == "cuda":
        torch.cuda.empty_cache()


def about(device: torch.device) -> Gpu | None:
    """What a GPU is; None for a CPU."""
    if kind(device) == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    told = ask_driver(f"GPU-{found.uuid}")
    kilohertz = getattr(found, "clock_rate", 0)
    return Gpu(
        name=found.name,
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        l2_bytes=found.L2_cache_size,
        driver=told["driver_version"],
        max_mhz=number(told["clocks.max.sm"]) or kilohertz / 1e3 or None,
        mhz=number(told["clocks.sm"]),
        watts=number(told["power.limit"]),
    )


def ask_driver(identity: str) -> dict[str, str | None]:
    """ASKED -> what nvidia-smi says of the GPU `identity`; None for all where it says nothing."""
    query = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(ASKED)}"]
    command = [*query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
        return dict(zip(ASKED, values, strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return dict.fromkeys(ASKED)


def number(text: str | None) -> float | None:
    """A number of nvidia-smi, which says "[N/A]" where it has none."""
    try:
        return float(text or "")
    except ValueError:
        return None
