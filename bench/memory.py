"""Peak memory of one way to a meta-gradient: what it takes beyond what it is given.

It has run once before, so that libraries are loaded and graphs compiled.
"""

import ctypes
import gc
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.case import Unavailable, make_case
from bench.measure import said_by_linux


def peak_extra(
    name: str, n: int, steps: int, form: dict[str, bool], backend: str, device: torch.device
) -> dict[str, Any]:
    """Bytes that a peer takes at its peak, of a CPU's in a new process, on one thread.

    Args:
        name: of the peer.
        form: `odd` and `theta_input`.

    Returns:
        {"bytes": x, "method": how it was measured}, or {"unavailable": why not}.
    """
    request = name, n, steps, form, backend, device
    if device.type == "cuda":  # its allocator knows the peak
        return measured(*request)
    one = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(1, get_context("spawn"), **one) as pool:
        return pool.submit(measured, *request).result()


def measured(
    name: str, n: int, steps: int, form: dict[str, bool], backend: str, device: torch.device
) -> dict[str, Any]:
    """What `peak_extra` returns, of this process."""
    case = make_case(n, steps, device=device, **form)
    try:
        run = peers.builders("meta_gradient", backend, device)[name](case).run
        run()
        if device.type == "cuda":
            size, before = "peak of PyTorch's allocator", torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
            extra = torch.cuda.max_memory_allocated(device) - before
        else:
            size, before = "peak resident size", forget_peak()
            run()
            extra = max(0, said_by_linux("self/status", "VmHWM") - before)
    except (Unavailable, RuntimeError) as error:
        return {"unavailable": str(error).splitlines()[0]}
    return {"bytes": extra, "method": f"{size} of a warm run"}


def forget_peak() -> int:
    """Return freed memory to the system, so that it counts again when it is taken again, and set
    the peak to what is in memory then; returns these bytes.

    Raises:
        Unavailable: the system cannot forget a peak: anything but Linux.
    """
    if sys.platform != "linux":
        raise Unavailable("this system does not forget the peak of a process")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return said_by_linux("self/status", "VmRSS")
