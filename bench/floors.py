"""The least time that an operator can take on a GPU: what it must move, what it must compute.

bytes   each input read once and each output written once, over the bandwidth of memory.
        A state smaller than the L2 cache can stay there from step to step, and beat this one
FLOP    the matrix products of an update, three times as many for a meta-gradient (forward,
        dx, dφ), over what the float32 lanes do: multiprocessors × lanes × 2 × highest clock
"""

from dataclasses import dataclass
from typing import Any

import torch

from bench.case import Case, flops
from bench.device import Gpu, about, clock, free_bytes, kind
from bench.timing import summary

NOMINAL = {"NVIDIA H200": 4.8e12}  # bytes a second, by the vendor's data sheet; start of the name
LANES = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}  # float32, if not 128
PASSES = {"step": 1, "meta_gradient": 3}  # matrix products, in those of an update
COPIED = 2 << 30  # bytes of the copy that tells the bandwidth: far beyond any L2 cache


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do: bytes a second, measured and nominal, and FLOP a second; None: unknown."""

    measured: float
    nominal: float | None
    flops: float | None
    formula: str


def traffic(operator: str, case: Case) -> int:
    """Bytes that an operator must move for a case: T steps in place, or one meta-gradient."""
    once = case.phi.nbytes
    if operator == "meta_gradient":
        read = [case.state, case.gradients, case.cotangents]
        read += [] if case.thetas is None else [case.thetas]
        return sum(tensor.nbytes for tensor in read) + 2 * once
    gradient = case.gradients[0].nbytes
    return len(case.gradients) * (2 * (case.theta.nbytes + case.state.nbytes) + gradient + once)


def operations(operator: str, case: Case) -> int:
    """FLOP of the matrix products of an operator for a case."""
    return PASSES[operator] * flops(case.meta) * case.gradients.numel()


def ceilings(gpu: Gpu, measured: float) -> Ceilings:
    """The ceilings of a GPU whose copies moved `measured` bytes a second."""
    nominal = [rate for name, rate in NOMINAL.items() if gpu.name.startswith(name)]
    lanes, rate = LANES.get(gpu.capability, 128), None
    clock_rate = "unknown clock"
    if gpu.max_mhz:
        rate = gpu.multiprocessors * lanes * 2 * gpu.max_mhz * 1e6
        clock_rate = f"{gpu.max_mhz / 1e3:g} GHz"
    formula = f"{gpu.multiprocessors} multiprocessors × {lanes} lanes × 2 × {clock_rate}"
    return Ceilings(measured, nominal[0] if nominal else None, rate, formula)


def copy_bandwidth(device: torch.device, rounds: int = 9) -> float:
    """Bytes a second, read and written, of a large copy on the device; the median."""
    elements = int(min(COPIED, free_bytes(device) / 8)) // 4
    source = torch.rand(elements, device=device)  # zeros could be faster than data
    target = torch.empty_like(source)
    samples = [clock(lambda: target.copy_(source), 5, device) for _ in range(rounds)]
    return 2 * source.nbytes / summary(samples[1:])["median"]


def ceilings_of(device: torch.device) -> Ceilings | None:
    """The ceilings of a device, its bandwidth measured first; None for a CPU."""
    if kind(device) == "cpu":
        return None
    measured = copy_bandwidth(device)
    return ceilings(about(device), measured)


def floors(operator: str, case: Case, limits: Ceilings) -> dict[str, Any]:
    """The floors of an operator for a case.

    Returns:
        "bytes" and "flops" of a call; "ns", per coordinate-step: "measured" and "nominal"
        bandwidth, and "flops", None where not known; "floor": the larger of "measured" and "flops".
    """
    moved, computed = traffic(operator, case), operations(operator, case)

    def ns(amount: int, rate: float | None) -> float | None:
        return 1e9 * amount / rate / case.gradients.numel() if rate else None

    times = {
        "measured": ns(moved, limits.measured),
        "nominal": ns(moved, limits.nominal),
        "flops": ns(computed, limits.flops),
    }
    floor = max(times["measured"], times["flops"] or 0.0)
    return {"bytes": moved, "flops": computed, "ns": times, "floor": floor}


def reached(found: dict[str, Any], peers: dict[str, Any], names: tuple[str, ...]) -> dict:
    """name -> the share of the larger floor in the median of each of `names` that was clocked."""
    return {name: found["floor"] / peers[name]["median"] for name in names if name in peers}


def title(limits: Ceilings) -> str:
    """What the floors are over, in a line."""
    rate = f"{limits.flops / 1e12:.3g} TFLOP/s" if limits.flops else "an unknown rate"
    nominal = f", nominally {limits.nominal / 1e12:.3g}" if limits.nominal else ""
    return (f"floors: bytes over {limits.measured / 1e12:.3g} TB/s (a copy, measured){nominal}; "
            f"FLOP over {rate} = {limits.formula}")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The floors of the rows of a report, in ns per coordinate-step, and what was reached."""
    head = f"{'operator':<14}{'N':>10}{'T':>4}{'B':>8}{'FLOP':>8}"
    lines = [f"{head}{'bytes/measured':>16}{'bytes/nominal':>15}{'FLOP/rate':>11}  of the larger"]
    for row in (row for row in rows if "floors" in row):
        found, steps = row["floors"], row["n"] * row["unroll"]
        times = (("measured", 16), ("nominal", 15), ("flops", 11))
        cells = "".join(
            f"{'–':>{width}}" if found["ns"][name] is None else f"{found['ns'][name]:>{width}.3f}"
            for name, width in times
        )
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found["reached"].items())
        lines.append(f"{row['operator']:<14}{row['n']:>10}{row['unroll']:>4}"
                     f"{found['bytes'] / steps:>8.1f}{found['flops'] / steps:>8.0f}"
                     f"{cells}  {shares}")  # fmt: skip
    return "\n".join(lines)
