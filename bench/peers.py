"""Other ways to do what the engine's operators do: same weights, same data, same result.

A peer does its whole job in `Peer.run()`:

    step           T updates in place; returns θ [N], from which the next call goes on
    meta_gradient  dφ of an unroll of T steps, forward included; returns [P]

The YARDSTICKS do something else, whose time tells how much theirs is.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import torch
from torch import Tensor

from bench import gpu, measure, xla
from bench.case import SHARE, UNROLL_BYTES, Case, Peer, Unavailable, flops, must_fit, ns, step_with
from bench.measure import CPU
from l2l_ref import equations
from l2l_ref.backend import operators
from l2l_ref.equations import THETA_CLAMP, THETA_SCALE, preprocess
from l2l_ref.optimizer import LearnedOptimizer

OPERATORS = ("step", "meta_gradient")
OURS, CLASS, XLA, FLOOR = "ours", "LearnedOptimizer", "XLA", "sgemm floor"
GRAPH, TENSOR = "ours in a CUDA graph", "ours on tensor cores"
ADAM, COPY = "fused Adam", "copy"
YARDSTICKS = (FLOOR, ADAM, COPY)
SIDE, COLUMNS = 2048, 512  # of the floor's product: 4.3 GFLOP, tens of milliseconds on a CPU
WIDER = 16  # as many columns on a GPU, or half of it would have nothing to do
TOLERANCE = 1e-3  # relative difference, in the 2-norm


def builders(
    operator: str, backend: str, device: torch.device = CPU, compiled: bool = True
) -> dict[str, Callable[[Case], Peer]]:
    """Name -> case -> peer, ours first, for one of OPERATORS.

    Args:
        device: where the cases are.
        compiled: with `torch.compile`, and on a CPU XLA.
    """
    ours = operators(backend, torch.empty(1, 2, 1, 1, device=device))  # all are float32
    on_gpu = measure.kind(device) == "cuda"
    if operator == "step":
        table = {
            OURS: partial(step_with, ours.theta_step_),
            CLASS: partial(step_by_class, backend),
            "nn.LSTM": step_lstm,
            "torch.compile": step_compiled,
            "reference": partial(step_with, equations.theta_step_),
            FLOOR: partial(floor, factor=1),
        }
        if on_gpu:
            table |= {
                GRAPH: partial(gpu.step_in_graph, ours.theta_step_),
                TENSOR: partial(gpu.step_on_tensor_cores, ours.theta_step_),
                ADAM: gpu.adam,
                COPY: gpu.copy,
            }
    else:
        eager = partial(meta_gradient_with, equations.unroll_meta_gradient)
        if on_gpu:  # its blocks suit the cache of a CPU
            eager = partial(meta_gradient_autograd, equations.unroll)
        table = {
            OURS: partial(meta_gradient_with, ours.unroll_meta_gradient),
            "nn.LSTM": meta_gradient_lstm,
            "torch.compile": meta_gradient_compiled,
            "reference": eager,
            FLOOR: partial(floor, factor=3),
        }
    if not compiled:
        del table["torch.compile"]
    elif not on_gpu:
        table[XLA] = xla.step if operator == "step" else xla.meta_gradient
    return table


def check(operator: str, case: Case, name: str, peer: Peer, expected: Tensor | None) -> None:
    """Raise unless `peer` does what the reference does; runs it, twice for a step.

    Args:
        expected: the reference's dφ [P]. None for a step, which follows the reference along 2T
            steps of up to 5,000 coordinates.
    """
    actual = peer.run()
    if name in YARDSTICKS:  # only made warm
        return
    if operator == "step":
        few = case.part(0, min(len(case.theta), 5000))
        reference, actual = step_with(equations.theta_step_, few), peer.run()
        reference.run()
        expected, actual = (t[: len(few.theta)] - few.theta for t in (reference.run(), actual))
    difference = ((actual - expected).norm() / expected.norm()).item()
    if not difference < TOLERANCE:
        raise AssertionError(f"{name} differs from the reference's {operator} by {difference:.1e}")


def floor(case: Case, factor: int) -> Peer:
    """`factor` times the operations of an update, in one large float32 matrix product."""
    device = case.theta.device
    columns = COLUMNS * WIDER if measure.kind(device) == "cuda" else COLUMNS
    a, b = torch.randn(SIDE, SIDE, device=device), torch.randn(SIDE, columns, device=device)
    out = torch.empty(SIDE, columns, device=device)
    operations = factor * flops(case.meta)
    scale = 1e9 * operations / (2 * SIDE * SIDE * columns)
    return Peer(lambda: torch.mm(a, b, out=out), scale, f"{operations} operations")


def inputs(case: Case, theta: Tensor | None, gradient: Tensor) -> Tensor:
    """What φ reads, batch first: θ and gradient [..., N] -> [..., M, F]."""
    x = preprocess(gradient, case.meta.form["p"])  # [2, ..., N]
    if case.meta.form["theta_input"]:
        seen = (THETA_SCALE * theta).clamp(-THETA_CLAMP, THETA_CLAMP)
        x = torch.cat((x, seen[None]))
    if case.meta.form["odd"]:
        x = torch.cat((x, torch.cat((x[:1], -x[1:]))), dim=-1)
    return x.movedim(0, -1).contiguous()


def head(case: Case, h: Tensor) -> Tensor:
    """The updates that follow from the top layer's h: [..., M, H] -> [..., N]."""
    out = case.meta.head(h).squeeze(-1)
    if case.meta.form["odd"]:
        out = torch.sub(*out.chunk(2, dim=-1))
    return case.meta.form["output_scale"] * out


def lstm_state(case: Case) -> tuple[Tensor, Tensor]:
    """The state as `nn.LSTM` wants it: h and c, [L, M, H] each."""
    h, c = case.state.transpose(2, 3).unbind(1)
    return h.contiguous(), c.contiguous()


def step_by_class(backend: str, case: Case) -> Peer:
    """T steps of the `torch.optim.Optimizer`, with all coordinates in one parameter."""
    theta, meta = torch.nn.Parameter(case.theta.clone()), case.meta
    optimizer = LearnedOptimizer([theta], meta, backend=backend)
    optimizer.state[theta]["lstm"] = case.state.view(*meta.state_axes, -1).clone()

    def run() -> Tensor:
        for gradient in case.gradients:
            theta.grad = gradient
            optimizer.step()
        return theta.detach()

    return Peer(run, ns(case))


def step_lstm(case: Case) -> Peer:
    """`nn.LSTM` over sequences of one step, with the coordinates as batch."""
    must_fit(case)
    theta, state = case.theta.clone(), lstm_state(case)

    @torch.no_grad()
    def run() -> Tensor:
        nonlocal state
        for gradient in case.gradients:
            h, state = case.meta.lstm(inputs(case, theta, gradient)[None], state)
            theta.add_(head(case, h[0]))
        return theta

    return Peer(run, ns(case))


def step_compiled(case: Case) -> Peer:
    """`torch.compile` of the reference, for static shapes."""
    must_fit(case)
    step_ = fresh_compile(equations.theta_step_)
    attempt(step_with(step_, case).run)
    return step_with(step_, case)


def meta_gradient_with(unroll_meta_gradient: Callable, case: Case) -> Peer:
    """One call of an operator with the signature of `equations.unroll_meta_gradient`."""
    data = (case.gradients, case.state, case.cotangents, case.phi, case.thetas)
    return Peer(lambda: unroll_meta_gradient(*data, **case.meta.form), ns(case))


def meta_gradient_lstm(case: Case) -> Peer:
    """Autograd through `nn.LSTM`, all T steps in one call."""
    weights = list(case.meta.parameters())

    def gradient(part: Case) -> Tensor:
        x = inputs(part, part.thetas, part.gradients)
        u = head(part, part.meta.lstm(x, lstm_state(part))[0])
        grads = torch.autograd.grad((u * part.cotangents).sum(), weights)
        return torch.cat([grad.reshape(-1) for grad in grads])

    return in_blocks(case, gradient)


def meta_gradient_autograd(unroll: Callable, case: Case, note: str = "") -> Peer:
    """Autograd through a function with the signature of `equations.unroll`."""

    def gradient(part: Case) -> Tensor:
        phi = part.phi.clone().requires_grad_()
        u, _ = unroll(part.gradients, part.state, phi, part.thetas, **part.meta.form)
        return torch.autograd.grad(u, phi, part.cotangents)[0]

    return in_blocks(case, gradient, note)


def meta_gradient_compiled(case: Case) -> Peer:
    """Autograd through T times the compiled update: the graph of all steps takes a minute to
    compile for T = 20, and then runs no faster."""
    update = fresh_compile(equations.update)

    def unroll(*data: Tensor | None, **form) -> tuple[Tensor, Tensor]:
        with patch.object(equations, "update", update):
            return equations.unroll(*data, **form)

    peer = meta_gradient_autograd(unroll, case, "one step a graph")
    attempt(peer.run)
    return peer


def in_blocks(case: Case, gradient: Callable[[Case], Tensor], note: str = "") -> Peer:
    """Sum `gradient` over blocks of coordinates: all N at once, unless that overfills memory."""
    n, count = len(case.theta), 1
    needed = UNROLL_BYTES * len(case.gradients) * case.state.shape[-1]
    while needed / count > SHARE * measure.free_bytes(case.theta.device):
        count *= 2
    bounds = [n * i // count for i in range(count + 1)]

    def run() -> Tensor:
        return sum(gradient(case.part(*pair)) for pair in pairwise(bounds))

    notes = [note] * bool(note) + [f"in {count} blocks, for memory"] * (count > 1)
    return Peer(run, ns(case), ", ".join(notes))


def fresh_compile(function: Callable) -> Callable:
    """`function` compiled for static shapes; what was compiled before is forgotten."""
    torch._dynamo.reset()  # else its limit on recompilations is soon reached
    return torch.compile(function, dynamic=False)


def attempt(run: Callable[[], object]) -> None:
    """Run once, to compile; raises Unavailable where that fails."""
    try:
        run()
    except Exception as error:  # whatever a compiler or its absence may raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"fails here: {reason[0]}") from error
