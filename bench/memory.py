"""Peak memory of one peer: what it takes beyond what it is given.

A CPU's is measured in a process of its own: as a script this prints JSON, and `peak_extra` starts
it. The peer has run once before, so that libraries are loaded and graphs compiled; where the system
cannot forget an old peak (anything but Linux), the first run is measured, with all that.
"""

import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.case import Unavailable, make_case
from bench.device import CPU, kind


def peak_extra(
    name: str,
    operator: str,
    n: int,
    steps: int,
    backend: str,
    form: dict,
    device: torch.device = CPU,
    **options: bool,
) -> dict[str, Any]:
    """Bytes that peer `name` of `operator` takes at its peak, of a CPU's in a new process.

    Args:
        form: `odd` and `theta_input`.
        options: of `peers.builders`.

    Returns:
        {"bytes": x, "method": how it was measured}, or {"unavailable": why not}.
    """
    if kind(device) == "cuda":  # its allocator knows the peak
        return measure_on_gpu(name, operator, n, steps, backend, form, device, options)
    request = {"name": name, "operator": operator, "n": n, "steps": steps, "backend": backend}
    argument = json.dumps({**request, "form": form, "options": options})
    command = [sys.executable, "-m", "bench.memory", argument]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"unavailable": f"exit code {done.returncode}: {lines[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    name: str, operator: str, n: int, steps: int, backend: str, form: dict, options: dict
) -> dict[str, Any]:
    """What `peak_extra` returns, of this process; one thread."""
    torch.set_num_threads(1)
    case = make_case(n, steps, **form)
    try:
        peer = peers.builders(operator, backend, **options)[name](case)
    except Unavailable as error:
        return {"unavailable": str(error)}
    if can_forget := forget_peak():
        peer.run()
        gc.collect()
        give_back()
        forget_peak()
    before = resident() if can_forget else peak()
    peer.run()
    method = "peak resident size of a warm run" if can_forget else "peak growth in the first run"
    return {"bytes": max(0, peak() - before), "method": method}


def measure_on_gpu(
    name: str,
    operator: str,
    n: int,
    steps: int,
    backend: str,
    form: dict,
    device: torch.device,
    options: dict,
) -> dict[str, Any]:
    """What `peak_extra` returns, of a GPU: what PyTorch's allocator gave at most."""
    case = make_case(n, steps, device=device, **form)
    try:
        peer = peers.builders(operator, backend, device=device, **options)[name](case)
        peer.run()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        peer.run()
    except (Unavailable, torch.OutOfMemoryError) as error:
        return {"unavailable": str(error).splitlines()[0]}
    extra = torch.cuda.max_memory_allocated(device) - before
    return {"bytes": extra, "method": "peak of PyTorch's allocator in a warm run"}


def status(key: str) -> int | None:
    """Bytes behind `key` in this process's status; None where there is no such thing."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None


def resident() -> int:
    """Bytes in memory now; Linux."""
    return status("VmRSS") or 0


def peak() -> int:
    """Bytes in memory at the peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    return status("VmHWM") or unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> bool:
    """Set the peak to what is in memory now; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return status("VmHWM") is not None


def give_back() -> None:
    """Return freed memory to the system, so that it counts again when it is taken again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another C library


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
