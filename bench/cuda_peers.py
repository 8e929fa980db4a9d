"""What a step is measured beside on a GPU: a graph of it, it on tensor cores, Adam's, and a copy of
as many bytes."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Peer, Unavailable, ns
from bench.floors import COPIED, traffic
from l2l_ref.backend import operators, use_tensor_cores

GRAPH_MOST = 1_000_000  # coordinates; beyond, a launch takes no time beside the step


def step_in_graph(theta_step_: Callable, case: Case) -> Peer:
    """T steps recorded in one CUDA graph: without Python, and with one launch."""
    if len(case.theta) > GRAPH_MOST:
        raise Unavailable(f"is for small N, up to {GRAPH_MOST:.0e}")
    theta, state = case.theta.clone(), case.state.clone()

    def steps() -> None:
        for gradient in case.gradients:
            theta_step_(theta, gradient, state, case.phi, **case.meta.form)

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        steps()  # what is loaded or allocated at a first call cannot be recorded
    torch.cuda.current_stream().wait_stream(beside)
    theta.copy_(case.theta)
    state.copy_(case.state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()

    def run(recorded: Callable = steps) -> Tensor:  # the graph knows addresses; this keeps tensors
        graph.replay()
        return theta

    return Peer(run, ns(case))


def step_on_tensor_cores(theta_step_: Callable, case: Case) -> Peer:
    """T steps whose products are three of TF32 each (`engine.use_tensor_cores`)."""
    if operators("auto", case.state).theta_step_ is not theta_step_:
        raise Unavailable("needs the fused engine")
    if torch.cuda.get_device_capability()[0] < 8:
        raise Unavailable("needs an Ampere GPU or a later one")
    theta, state = case.theta.clone(), case.state.clone()

    def run() -> Tensor:
        use_tensor_cores(True)
        for gradient in case.gradients:
            theta_step_(theta, gradient, state, case.phi, **case.meta.form)
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
