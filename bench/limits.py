"""What a machine is and can do at best, and the times that no operator can beat there.

bytes   each input read once and each output written once, over what a large copy moves.
        A state smaller than the last cache can stay there from step to step, and beat this one
FLOP    the matrix products of an update, three times as many for a meta-gradient (forward,
        dx, dφ), over float32 multiply-adds: on a CPU those that one thread was seen to do, on a GPU
        multiprocessors × lanes × 2 × highest clock
"""

import subprocess
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from bench import measure
from bench.case import Case, flops
from bench.measure import CPU, clock
from l2l_ref.backend import built

ASKED = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit")  # of nvidia-smi
LANES = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}  # float32, if not 128
PASSES = {"step": 1, "meta_gradient": 3}  # matrix products, in those of an update
COPIED = 1 << 28  # bytes of the copy that tells the bandwidth: beyond the cache


def gpu(device: torch.device) -> dict[str, Any] | None:
    """What a GPU and its driver say of it; None for a CPU."""
    if device.type == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": (found.major, found.minor),
        "multiprocessors": found.multi_processor_count,
        **driver(f"GPU-{found.uuid}"),
    }


def driver(identity: str) -> dict[str, str]:
    """Each of ASKED in the words of nvidia-smi, of the GPU `identity`; empty where it fails."""
    query = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(ASKED)}"]
    try:
        told = subprocess.check_output([*query, "--format=csv,noheader"], text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(ASKED, map(str.strip, told.split(",")), strict=True))


def rates(device: torch.device = CPU, about: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a GPU, or one thread of a CPU, does a second at best.

    Args:
        about: what `gpu` says of the device.

    Returns:
        "flops": of independent multiply-adds in float32, two each, None where that is not known;
        "copied": bytes read and written by a large copy.
    """

    def fastest(run: Callable[[], Any]) -> float:
        return min(clock(run, 5, device) for _ in range(9))

    rate, before = None, torch.get_num_threads()
    source = torch.rand(COPIED // 4, device=device)  # zeros could be faster than data
    target = torch.empty_like(source)
    torch.set_num_threads(1)
    seconds = fastest(lambda: target.copy_(source))
    torch.set_num_threads(before)
    if about:
        mhz = about.get("clocks.max.sm", "").removesuffix(" MHz")
        if mhz.isdecimal():  # else nvidia-smi does not know it
            lanes = LANES.get(about["capability"], 128)
            rate = about["multiprocessors"] * lanes * 2 * int(mhz) * 1e6
    elif built():
        multiply_adds = import_module("l2l_ref.backend._C").multiply_adds
        many = 10**5
        rate = 2 * multiply_adds(many) / fastest(lambda: multiply_adds(many))
    return {"flops": rate, "copied": 2 * source.nbytes / seconds}


def machine(
    script: str, arguments: list[str], backend: str, device: torch.device = CPU
) -> dict[str, Any]:
    """What the report of a benchmark begins with: its `origin`, the GPU, `rates`."""
    about = gpu(device)
    noise = {"data": "noise", "data_sha256": None}
    begin = measure.origin(script, arguments, device, backend, noise)
    return {**begin, "gpu": about, "rates": rates(device, about)}


def where(report: dict[str, Any]) -> str:
    """What `machine` found, in two lines."""
    found, rate = report["environment"], report["rates"]
    name = report["gpu"]["name"] if report["gpu"] else found["device"]
    computed = f"{rate['flops'] / 1e9:.0f} GFLOP/s in float32, " if rate["flops"] else ""
    one = "" if report["gpu"] else "one thread: "
    copies = f"{one}{computed}copies {rate['copied'] / 1e9:.1f} GB/s"
    return f"{name}, torch {found['torch']}, {found['backend']} backend\n{copies}"


def traffic(operator: str, case: Case) -> int:
    """Bytes that an operator must move for a case: T steps in place, or one meta-gradient."""
    once = case.phi.nbytes
    if operator == "meta_gradient":
        read = [case.state, case.gradients, case.cotangents]
        read += [] if case.thetas is None else [case.thetas]
        return sum(tensor.nbytes for tensor in read) + 2 * once
    gradient = case.gradients[0].nbytes
    return len(case.gradients) * (2 * (case.theta.nbytes + case.state.nbytes) + gradient + once)


def floors(operator: str, case: Case, rate: dict[str, Any]) -> dict[str, float]:
    """The least ns per coordinate-step, by "bytes" and, where its rate is known, "FLOP"."""
    least = {"bytes": traffic(operator, case) / rate["copied"]}
    if rate["flops"]:
        computed = PASSES[operator] * flops(case.meta) * case.gradients.numel()
        least["FLOP"] = computed / rate["flops"]
    return {name: case.ns * seconds for name, seconds in least.items()}
