"""Peak memory of one peer: what it takes beyond what it is given.

A CPU's is measured in a process of its own: as a script this prints JSON, and `peak_extra` starts
it. The peer has run once before, so that libraries are loaded and graphs compiled.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers
from bench.case import Unavailable, make_case
from bench.measure import CPU


def peak_extra(request: dict[str, Any], device: torch.device = CPU) -> dict[str, Any]:
    """Bytes that a peer takes at its peak, of a CPU's in a new process.

    Args:
        request: "name" of the peer, "operator", "n", "steps", "backend", and "form": `odd` and
            `theta_input`.

    Returns:
        {"bytes": x, "method": how it was measured}, or {"unavailable": why not}.
    """
    if measure.kind(device) == "cuda":  # its allocator knows the peak
        return measured(request, device)
    command = [sys.executable, "-m", "bench.memory", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"unavailable": f"exit code {done.returncode}: {lines[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def measured(request: dict[str, Any], device: torch.device = CPU) -> dict[str, Any]:
    """What `peak_extra` returns, of this process."""
    on_gpu = measure.kind(device) == "cuda"
    size = "peak of PyTorch's allocator" if on_gpu else "peak resident size"
    case = make_case(request["n"], request["steps"], device=device, **request["form"])
    try:
        table = peers.builders(request["operator"], request["backend"], device=device)
        peer = table[request["name"]](case)
        peer.run()
        if on_gpu:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            peer.run()
            extra = torch.cuda.max_memory_allocated(device) - before
        else:
            before = forget_peak()
            peer.run()
            extra = max(0, status("VmHWM") - before)
    except (Unavailable, torch.OutOfMemoryError) as error:
        return {"unavailable": str(error).splitlines()[0]}
    return {"bytes": extra, "method": f"{size} of a warm run"}


def status(key: str) -> int:
    """Bytes behind `key` in what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


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
    return status("VmRSS")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured(json.loads(sys.argv[1]))))
