"""What an operator is measured against on a GPU: the least time that it can take there, and other
work on as many bytes.

bytes   each input read once and each output written once, over the bandwidth of memory.
        A state smaller than the L2 cache can stay there from step to step, and beat this one
FLOP    the matrix products of an update, three times as many for a meta-gradient (forward,
        dx, dφ), over what the float32 lanes do: multiprocessors × lanes × 2 × highest clock
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.case import Case, Peer, Unavailable, flops, ns, step_with
from bench.measure import clock, free_bytes, summary
from l2l_ref.backend import operators, use_tensor_cores

NOMINAL = {"NVIDIA H200": 4.8e12}  # bytes a second, by the vendor's data sheet; start of the name
LANES = {(6, 0): 64, (7, 0): 64, (7, 2): 64, (7, 5): 64, (8, 0): 64}  # float32, if not 128
PASSES = {"step": 1, "meta_gradient": 3}  # matrix products, in those of an update
COPIED = 2 << 30  # bytes of the copy that tells the bandwidth: far beyond any L2 cache
GRAPH_MOST = 1_000_000  # coordinates; beyond, a launch takes no time beside the step


def traffic(operator: str, case: Case) -> int:
    """Bytes that an operator must move for a case: T steps in place, or one meta-gradient."""
    once = case.phi.nbytes
    if operator == "meta_gradient":
        read = [case.state, case.gradients, case.cotangents]
        read += [] if case.thetas is None else [case.thetas]
        return sum(tensor.nbytes for tensor in read) + 2 * once
    gradient = case.gradients[0].nbytes
    return len(case.gradients) * (2 * (case.theta.nbytes + case.state.nbytes) + gradient + once)


def ceilings(gpu: dict[str, Any], measured: float) -> dict[str, Any]:
    """What a GPU can do whose copies moved `measured` bytes a second.

    Returns:
        "measured" and "nominal": bytes a second; "flops": FLOP a second, and its "formula". None:
        unknown.
    """
    nominal = [rate for name, rate in NOMINAL.items() if gpu["name"].startswith(name)]
    lanes, mhz = LANES.get(gpu["capability"], 128), gpu["max_mhz"]
    rate = gpu["multiprocessors"] * lanes * 2 * mhz * 1e6 if mhz else None
    clock_rate = f"{mhz / 1e3:g} GHz" if mhz else "unknown clock"
    formula = f"{gpu['multiprocessors']} multiprocessors × {lanes} lanes × 2 × {clock_rate}"
    nominal = nominal[0] if nominal else None
    return {"measured": measured, "nominal": nominal, "flops": rate, "formula": formula}


def ceilings_of(device: torch.device, rounds: int = 9) -> dict[str, Any] | None:
    """The ceilings of a device, where bytes a second, read and written, are those of a large copy,
    the median; None for a CPU."""
    if measure.kind(device) == "cpu":
        return None
    elements = int(min(COPIED, free_bytes(device) / 8)) // 4
    source = torch.rand(elements, device=device)  # zeros could be faster than data
    target = torch.empty_like(source)
    samples = [clock(lambda: target.copy_(source), 5, device) for _ in range(rounds)]
    return ceilings(measure.about(device), 2 * source.nbytes / summary(samples[1:])["median"])


def floors(operator: str, case: Case, limits: dict[str, Any]) -> dict[str, Any]:
    """The floors of an operator for a case.

    Returns:
        "bytes" and "flops" of a call; "ns", per coordinate-step: "measured" and "nominal"
        bandwidth, and "flops", None where not known; "floor": the larger of "measured" and "flops".
    """
    moved = traffic(operator, case)
    computed = PASSES[operator] * flops(case.meta) * case.gradients.numel()
    amounts = {"measured": moved, "nominal": moved, "flops": computed}
    times = {
        name: ns(case) * amount / limits[name] if limits[name] else None
        for name, amount in amounts.items()
    }
    floor = max(times["measured"], times["flops"] or 0.0)
    return {"bytes": moved, "flops": computed, "ns": times, "floor": floor}


def title(limits: dict[str, Any]) -> str:
    """What the floors are over, in a line."""
    rate = f"{limits['flops'] / 1e12:.3g} TFLOP/s" if limits["flops"] else "an unknown rate"
    nominal = f", nominally {limits['nominal'] / 1e12:.3g}" if limits["nominal"] else ""
    return (f"floors: bytes over {limits['measured'] / 1e12:.3g} TB/s (a copy, measured){nominal}; "
            f"FLOP over {rate} = {limits['formula']}")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The floors of the rows of a report, in ns per coordinate-step, and what was reached."""
    head = f"{'operator':<14}{'N':>10}{'T':>4}{'B':>8}{'FLOP':>8}"
    lines = [f"{head}{'bytes/measured':>16}{'bytes/nominal':>15}{'FLOP/rate':>11}  of the larger"]
    for row in (row for row in rows if "floors" in row):
        found, steps = row["floors"], row["n"] * row["unroll"]
        cells = "".join(
            f"{'–' if found['ns'][name] is None else format(found['ns'][name], '.3f'):>{width}}"
            for name, width in (("measured", 16), ("nominal", 15), ("flops", 11))
        )
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found["reached"].items())
        lines.append(f"{row['operator']:<14}{row['n']:>10}{row['unroll']:>4}"
                     f"{found['bytes'] / steps:>8.1f}{found['flops'] / steps:>8.0f}"
                     f"{cells}  {shares}")  # fmt: skip
    return "\n".join(lines)


def step_in_graph(theta_step_: Callable, case: Case) -> Peer:
    """T steps recorded in one CUDA graph: without Python, and with one launch."""
    if len(case.theta) > GRAPH_MOST:
        raise Unavailable(f"is for small N, up to {GRAPH_MOST:.0e}")
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # what is loaded or allocated at a first call is not recorded
        step_with(theta_step_, case).run()
    torch.cuda.current_stream().wait_stream(beside)
    steps, graph = step_with(theta_step_, case).run, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        theta = steps()

    def run(recorded: Callable = steps) -> Tensor:  # the graph knows addresses; this keeps tensors
        graph.replay()
        return theta

    return Peer(run, ns(case))


def step_on_tensor_cores(theta_step_: Callable, case: Case) -> Peer:
    """T steps whose products are three of TF32 each (`use_tensor_cores`)."""
    if operators("auto", case.state).theta_step_ is not theta_step_:
        raise Unavailable("needs the fused engine")
    if torch.cuda.get_device_capability()[0] < 8:
        raise Unavailable("needs an Ampere GPU or a later one")
    steps = step_with(theta_step_, case).run

    def run() -> Tensor:
        use_tensor_cores(True)
        theta = steps()
        use_tensor_cores(False)
        return theta

    return Peer(run, ns(case))


def adam(case: Case) -> Peer:
    """One step of `torch.optim.Adam(fused=True)` on as many parameters."""
    theta = case.theta.clone()
    theta.grad = case.gradients[0].clone()
    return Peer(torch.optim.Adam([theta], fused=True).step, 1e9 / len(theta))


def copy(case: Case) -> Peer:
    """A copy that reads and writes as many bytes as the steps do, or COPIED of them if fewer."""
    moved = traffic("step", case)
    floats = min(moved, COPIED) // 8  # half of the bytes are read, half are written
    source = torch.rand(floats, device=case.theta.device)
    target = torch.empty_like(source)
    scale = ns(case) * moved / (2 * source.nbytes)
    return Peer(lambda: target.copy_(source), scale, f"{2 * source.nbytes} bytes a call")
