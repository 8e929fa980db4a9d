"""Peak memory of one peer: what it takes beyond what it is given.

The peer has run once before, so that libraries are loaded and graphs compiled.
"""

import ctypes
import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers
from bench.case import Unavailable, make_case
from bench.measure import CPU, said_by_linux


def peak_extra(request: dict[str, Any], device: torch.device = CPU) -> dict[str, Any]:
    """Bytes that a peer takes at its peak, of a CPU's in a new process, on one thread.

    Args:
        request: "name" of the peer, "operator", "n", "steps", "backend", and "form": `odd` and
            `theta_input`.

    Returns:
        {"bytes": x, "method": how it was measured}, or {"unavailable": why not}.
    """
    if measure.kind(device) == "cuda":  # its allocator knows the peak
        return measured(request, device)
    fresh = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads}
    with ProcessPoolExecutor(1, **fresh, initargs=(1,)) as pool:
        try:
            return pool.submit(measured, request).result()
        except Exception as error:  # whatever ended the process
            return {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0]}


def measured(request: dict[str, Any], device: torch.device = CPU) -> dict[str, Any]:
    """What `peak_extra` returns, of this process."""
    case = make_case(request["n"], request["steps"], device=device, **request["form"])
    try:
        table = peers.builders(request["operator"], request["backend"], device=device)
        peer = table[request["name"]](case)
        peer.run()
        if measure.kind(device) == "cuda":
            size, before = "peak of PyTorch's allocator", torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            peer.run()
            extra = torch.cuda.max_memory_allocated(device) - before
        else:
            size, before = "peak resident size", forget_peak()
            peer.run()
            extra = max(0, said_by_linux("self/status", "VmHWM") - before)
    except (Unavailable, torch.OutOfMemoryError) as error:
        return {"unavailable": str(error).splitlines()[0]}
    return {"bytes": extra, "method": f"{size} of a warm run"}


def forget_peak() -> int:
    """Return freed memory to the system, so that it counts again when it is taken again, and set
    the peak to what is in memory then; returns these bytes.

    Raises:
        Unavailable: the system cannot forget a peak: anything but Linux.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another C library
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise Unavailable("this system does not forget the peak of a process") from None
    return said_by_linux("self/status", "VmRSS")
