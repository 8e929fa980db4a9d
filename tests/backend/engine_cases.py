"""What the tests of the fused engine share: problems of every shape, and what they are held to."""

import math
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from l2l_ref import equations


class Case(NamedTuple):
    """A problem: N coordinates, L layers of H units, T steps, and the form of the update."""

    n: int
    layers: int = 2
    hidden: int = 20
    theta_input: bool = False
    odd: bool = False
    steps: int = 1
    p: float = 10.0
    output_scale: float = 0.1
    seed: int = 0

    @property
    def form(self) -> equations.Form:
        """The keyword arguments of every operator."""
        return {name: getattr(self, name) for name in equations.Form.__annotations__}

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[L, 2, H, M]."""
        return self.layers, 2, self.hidden, self.n * (2 if self.odd else 1)


every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


def arguments(case: Case, dtype=torch.float64, device="cpu") -> dict[str, Tensor]:
    """What all operators take, and what some take more. Float32 numbers, whatever the dtype, so
    that both meet the same problem."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def gradients(*shape):  # on both sides of e^-p and far from it
        return normal(*shape) * 10 ** (10 * torch.rand(*shape, generator=generator) - 8)

    shapes = equations.phi_shapes(case.layers, case.hidden, 3 if case.theta_input else 2)
    of_phi = torch.Generator().manual_seed(100 + case.seed)
    phi = torch.randn(sum(map(math.prod, shapes)), generator=of_phi)
    tensors = {
        "theta": 0.3 * normal(case.n),  # so that clamp(10·θ, ±5) clamps some
        "gradient": gradients(case.n),
        "state": normal(*case.state_shape),
        "phi": phi * case.hidden**-0.5,
        "gradients": gradients(case.steps, case.n),
        "cotangents": normal(case.steps, case.n),
        "d_next_theta": normal(case.n),
        "d_next_state": normal(*case.state_shape),
        "thetas": 0.3 * normal(case.steps, case.n),  # whatever moved θ from row to row
    }
    tensors["state"][:, 0].tanh_()  # h is in ±1
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}


STEP = ("theta", "gradient", "state", "phi")
UNROLL = ("gradients", "state", "cotangents", "phi", "thetas")
OPERATORS = {
    "theta_step_": STEP,
    "theta_step": STEP,
    "theta_step_backward": (*STEP, "d_next_theta", "d_next_state"),
    "unroll_meta_gradient": UNROLL,
}


def listed(theta: Tensor, gradient: Tensor, state: Tensor, phi: Tensor) -> tuple:
    """What theta_step_ takes: lists, here of one tensor."""
    return [theta], [gradient], [state], phi


def run_update(module, case: Case, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """theta_step_ of a module on copies, of one tensor: u [N], h and c [L, H, M]."""
    theta, gradient, state, phi = (given[name] for name in STEP)
    after, state = torch.zeros_like(theta), state.clone()
    if case.theta_input:
        after = theta.clone()
    start = after.clone()
    assert module.theta_step_(*listed(after, gradient, state, phi), **case.form) is None
    return after - start, state[:, 0], state[:, 1]


def run_gradients(module, case: Case, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """theta_step's results and derivatives: θ + u, state, then by theta, gradient (times its size,
    as they span many powers of ten), state and phi."""
    inputs = [given[name].clone().requires_grad_() for name in STEP]
    outputs = module.theta_step(*inputs, **case.form)
    d_theta, d_gradient, d_state, d_phi = torch.autograd.grad(
        outputs, inputs, (given["d_next_theta"], given["d_next_state"])
    )
    size = given["gradient"].abs().clamp(min=math.exp(-case.p))
    results = (*outputs, d_theta, d_gradient * size, d_state, d_phi)
    return tuple(result.detach() for result in results)


def run_unroll(module, case: Case, given: dict[str, Tensor]) -> tuple[Tensor]:
    """unroll_meta_gradient: dφ. What φ does not see is not given."""
    names = UNROLL if case.theta_input else UNROLL[:-1]
    return (module.unroll_meta_gradient(*(given[name] for name in names), **case.form),)


RUNS = (run_update, run_gradients, run_unroll)


def run_all(module, case: Case, given: dict[str, Tensor]) -> list[Tensor]:
    """The results of all three."""
    return [result for run in RUNS for result in run(module, case, given)]


def edges(dtype) -> Tensor:
    """Gradients at the edge, of either sign: zeros, denormals, both sides of e^-10, the largest,
    infinities; some sizes between; and last a NaN."""
    limits, edge = torch.finfo(dtype), torch.tensor(math.exp(-10.0), dtype=dtype)
    around = [float(torch.nextafter(edge, edge + way)) for way in (-1, 0, 1)]
    sizes = [0.0, limits.tiny / 1024, limits.tiny, *around, 1e-30, 1e-3, 1.0, 1e30]
    sizes += [limits.max, math.inf]
    return torch.tensor([sign * s for s in sizes for sign in (1, -1)] + [math.nan], dtype=dtype)


def trajectory(module, case: Case, dtype) -> tuple[Tensor, Tensor]:
    """100 steps of θ [100, N] and the last state. φ reads gradients that depend on θ, so errors
    feed back."""
    given, path = arguments(case, dtype), []
    theta, state, phi = given["theta"], torch.zeros_like(given["state"]), 0.6 * given["phi"]
    for t in range(100):
        gradient = (theta - 0.1) * given["gradient"] * (1 + t % 3)
        module.theta_step_(*listed(theta, gradient, state, phi), **case.form)
        path.append(theta.clone())
    return torch.stack(path), state


@cache
def expected(run, case: Case, dtype=torch.float64) -> tuple[Tensor, ...]:
    """What the reference says, by default in float64 whatever is tested."""
    return run(equations, case, arguments(case, dtype))


def error(actual: Tensor, reference: Tensor) -> float:
    """The largest difference, in units of the largest element of the reference."""
    assert actual.shape == reference.shape
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - reference.double()).abs().max()
    return float(difference / reference.double().abs().max().clamp(min=1e-300))


def expect_close(actual, reference, tolerance: float) -> None:
    """Every tensor within `tolerance` of the reference, in units of its largest element."""
    errors = [error(*pair) for pair in zip(actual, reference, strict=True)]
    assert all(e <= tolerance for e in errors), errors
