"""Other ways to do what the engine's operators do: same weights, same data, same result.

A peer does its whole job in `Peer.run()`:

    step           T updates in place; returns θ [N], from which the next call goes on
    meta_gradient  dφ of an unroll of T steps, forward included; returns [P]

The YARDSTICKS do something else, whose time tells how much theirs is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.case import STEP_BYTES, UNROLL_BYTES, Case, Peer, Unavailable, flops, must_fit
from bench.measure import CPU
from l2l_ref import equations
from l2l_ref.backend import operators, use_tensor_cores
from l2l_ref.equations import THETA_CLAMP, THETA_SCALE, preprocess
from l2l_ref.optimizer import LearnedOptimizer

OPERATORS = ("step", "meta_gradient")
OURS, FLOOR, ADAM = "ours", "sgemm floor", "fused Adam"
YARDSTICKS = (FLOOR, ADAM)
SIDE, COLUMNS = 2048, 512  # of the floor's product: 4.3 GFLOP, tens of milliseconds on a CPU
WIDER = 16  # as many columns on a GPU, or half of it would have nothing to do
GRAPH_MOST = 1_000_000  # coordinates; beyond, a launch takes no time beside the step
TOLERANCE = 1e-3  # relative difference, in the 2-norm


def builders(
    operator: str, backend: str, device: torch.device = CPU, compiled: bool = True
) -> dict[str, Callable[[Case], Peer]]:
    """Name -> case -> peer, ours first, for one of OPERATORS.

    Args:
        device: where the cases are.
        compiled: with `torch.compile`.
    """
    ours = operators(backend, torch.empty(1, 2, 1, 1, device=device))  # all are float32
    on_gpu = device.type == "cuda"
    if operator == "step":
        table = {
            OURS: partial(step_with, ours.theta_step_),
            "LearnedOptimizer": partial(step_by_class, backend),
            "nn.LSTM": step_lstm,
            "torch.compile": step_compiled,
            "reference": partial(step_with, equations.theta_step_),
            FLOOR: partial(floor, factor=1),
            ADAM: adam,
        }
        if on_gpu:
            table["ours in a CUDA graph"] = partial(step_in_graph, ours.theta_step_)
            table["ours on tensor cores"] = partial(step_on_tensor_cores, ours.theta_step_)
    else:
        eager = partial(meta_gradient_with, equations.unroll_meta_gradient)
        if on_gpu:  # its blocks suit the cache of a CPU
            eager = partial(meta_gradient_autograd, equations.update)
        table = {
            OURS: partial(meta_gradient_with, ours.unroll_meta_gradient),
            "nn.LSTM": meta_gradient_lstm,
            "torch.compile": meta_gradient_compiled,
            "reference": eager,
            FLOOR: partial(floor, factor=3),
        }
    if not compiled:
        del table["torch.compile"]
    return table


def check(operator: str, case: Case, name: str, peer: Peer) -> None:
    """Raise unless `peer` does what the reference does; runs it, twice for a step, which follows
    the reference along 2T steps of up to 5,000 coordinates."""
    actual = peer.run()
    if name in YARDSTICKS:  # only made warm
        return
    if operator == "step":
        few = case.first(5000)
        reference, actual = step_with(equations.theta_step_, few), peer.run()
        reference.run()
        expected, actual = (t[: len(few.theta)] - few.theta for t in (reference.run(), actual))
    else:
        expected = case.meta_gradient
    difference = ((actual - expected).norm() / expected.norm()).item()
    if not difference < TOLERANCE:
        raise AssertionError(f"{name} differs from the reference's {operator} by {difference:.1e}")


def floor(case: Case, factor: int) -> Peer:
    """`factor` times the operations of an update, in one large float32 matrix product."""
    device = case.theta.device
    columns = COLUMNS * WIDER if device.type == "cuda" else COLUMNS
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


def step_with(theta_step_: Callable, case: Case) -> Peer:
    """T calls of an operator with the signature of `equations.theta_step_`."""
    if theta_step_ is equations.theta_step_:
        must_fit(case, STEP_BYTES)
    theta, state = case.theta.clone(), case.state.clone()

    def run() -> Tensor:
        for gradient in case.gradients:
            theta_step_([theta], [gradient], [state], case.phi, **case.meta.form)
        return theta

    return Peer(run, case.ns)


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

    return Peer(run, case.ns)


def step_lstm(case: Case) -> Peer:
    """`nn.LSTM` over sequences of one step, with the coordinates as batch."""
    must_fit(case, STEP_BYTES)
    theta, state = case.theta.clone(), lstm_state(case)

    @torch.no_grad()
    def run() -> Tensor:
        nonlocal state
        for gradient in case.gradients:
            h, state = case.meta.lstm(inputs(case, theta, gradient)[None], state)
            theta.add_(head(case, h[0]))
        return theta

    return Peer(run, case.ns)


def step_compiled(case: Case) -> Peer:
    """`torch.compile` of the reference, for static shapes."""
    must_fit(case, STEP_BYTES)
    return step_with(fresh_compile(equations.theta_step_), case)


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

    return Peer(run, case.ns)


def step_on_tensor_cores(theta_step_: Callable, case: Case) -> Peer:
    """T steps whose products are three of TF32 each (`use_tensor_cores`)."""
    if theta_step_ is equations.theta_step_:
        raise Unavailable("needs the fused engine")
    if torch.cuda.get_device_capability()[0] < 8:
        raise Unavailable("needs an Ampere GPU or a later one")
    steps = step_with(theta_step_, case).run

    def run() -> Tensor:
        use_tensor_cores(True)
        theta = steps()
        use_tensor_cores(False)
        return theta

    return Peer(run, case.ns)


def adam(case: Case) -> Peer:
    """One step of `torch.optim.Adam(fused=True)` on as many parameters."""
    theta = case.theta.clone()
    theta.grad = case.gradients[0].clone()
    return Peer(torch.optim.Adam([theta], fused=True).step, 1e9 / len(theta))


def meta_gradient_with(unroll_meta_gradient: Callable, case: Case) -> Peer:
    """One call of an operator with the signature of `equations.unroll_meta_gradient`."""
    return Peer(lambda: unroll_meta_gradient(*case.unroll, **case.meta.form), case.ns)


def meta_gradient_lstm(case: Case) -> Peer:
    """Autograd through `nn.LSTM`, all T steps in one call."""
    must_fit(case, UNROLL_BYTES * len(case.gradients))
    weights = list(case.meta.parameters())

    def run() -> Tensor:
        x = inputs(case, case.thetas, case.gradients)
        u = head(case, case.meta.lstm(x, lstm_state(case))[0])
        grads = torch.autograd.grad((u * case.cotangents).sum(), weights)
        return torch.cat([grad.reshape(-1) for grad in grads])

    return Peer(run, case.ns)


def meta_gradient_autograd(update: Callable, case: Case, note: str = "") -> Peer:
    """Autograd through T calls of a function with the signature of `equations.update`."""
    must_fit(case, UNROLL_BYTES * len(case.gradients))

    def run() -> Tensor:
        phi = case.phi.clone().requires_grad_()
        state, updates = case.state, []
        for t, gradient in enumerate(case.gradients):
            theta = None if case.thetas is None else case.thetas[t]
            u, state = update(theta, gradient, state, phi, **case.meta.form)
            updates.append(u)
        return torch.autograd.grad(torch.stack(updates), phi, case.cotangents)[0]

    return Peer(run, case.ns, note)


def meta_gradient_compiled(case: Case) -> Peer:
    """Autograd through T times the compiled update: the graph of all steps takes a minute to
    compile for T = 20, and then runs no faster."""
    return meta_gradient_autograd(fresh_compile(equations.update), case, "one step a graph")


def fresh_compile(function: Callable) -> Callable:
    """`function` compiled for static shapes; what was compiled before is forgotten."""
    torch._dynamo.reset()  # else its limit on recompilations is soon reached
    return torch.compile(function, dynamic=False)
