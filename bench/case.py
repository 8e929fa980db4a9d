"""What every peer is given and is, and what those made of PyTorch's LSTM modules need of it.

Shapes as in `l2l_ref.equations`: N coordinates, T steps, H units, L layers, F inputs, M = N, or 2N
in the odd form.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.measure import CPU, free_bytes
from l2l_ref import equations
from l2l_ref.equations import THETA_CLAMP, THETA_SCALE, preprocess
from l2l_ref.meta_optimizer import MetaOptimizer

STEP_BYTES = 1600  # that a step in plain PyTorch may take for each column of the state
SHARE = 0.4  # of the free memory that one peer may take


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """`run` does the job once; `scale` turns its seconds into ns per coordinate-step."""

    run: Callable[[], Tensor | None]
    scale: float
    note: str = ""


@dataclass(frozen=True)
class Case:
    """φ as modules and packed [P], θ [N], gradients and cotangents [T, N], state [L, 2, H, M].

    `thetas` [T, N] is what an unroll's updates saw of θ; None where φ does not see θ.

    No peer changes them: each works on copies of its own.
    """

    meta: MetaOptimizer
    phi: Tensor
    theta: Tensor
    gradients: Tensor
    cotangents: Tensor
    state: Tensor
    thetas: Tensor | None

    def part(self, start: int, stop: int) -> "Case":
        """The case of the coordinates from `start` to before `stop`."""
        by_sign = self.state.unflatten(-1, (-1, len(self.theta)))  # [L, 2, H, 1 or 2, N]
        cut = slice(start, stop)
        steps = (self.gradients[:, cut], self.cotangents[:, cut])
        state = by_sign[..., cut].flatten(3)
        thetas = None if self.thetas is None else self.thetas[:, cut]
        return Case(self.meta, self.phi, self.theta[cut], *steps, state, thetas)


def make_case(
    n: int,
    steps: int,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    **settings: int | bool,
) -> Case:
    """φ, of the paper's size (H = 20, L = 2) unless `settings` of `MetaOptimizer` say otherwise,
    with a head that is not zero, and random data, drawn on the device.

    The sizes of the gradients spread over nine decades, so that both branches of Eq. 5 are taken.
    """
    generator = torch.Generator().manual_seed(0)
    meta = MetaOptimizer(**settings, generator=generator)
    for weight in meta.head.parameters():
        nn.init.normal_(weight, std=0.2, generator=generator)
    meta = meta.to(device, dtype)
    generator = torch.Generator(device).manual_seed(1)
    options = {"generator": generator, "device": device, "dtype": dtype}
    theta = 0.1 * torch.randn(n, **options)
    gradients = torch.randn(steps, n, **options)
    gradients *= 10 ** (9 * torch.rand(steps, n, **options) - 8)
    cotangents = torch.randn(steps, n, **options)
    state = meta.init_state(n).uniform_(-0.5, 0.5, generator=generator)
    thetas = None
    if meta.form["theta_input"]:
        thetas = theta + 0.01 * torch.randn(steps, n, **options)
    return Case(meta, meta.phi().detach(), theta, gradients, cotangents, state, thetas)


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
        plus, minus = out.chunk(2, dim=-1)
        out = plus - minus
    return case.meta.form["output_scale"] * out


def lstm_state(case: Case) -> tuple[Tensor, Tensor]:
    """The state as `nn.LSTM` wants it: h and c, [L, M, H] each."""
    h, c = case.state.transpose(2, 3).unbind(1)
    return h.contiguous(), c.contiguous()


def flops(meta: MetaOptimizer) -> int:
    """Floating-point operations of the matrix products of one update of one coordinate."""
    h, width = meta.hidden_size, meta.lstm.input_size
    multiplications = 4 * h * (width + h) + (meta.num_layers - 1) * 4 * h * 2 * h + h
    return 2 * multiplications * (2 if meta.form["odd"] else 1)


def ns(case: Case) -> float:
    """ns per coordinate-step of a peer that takes a second for the case."""
    return 1e9 / case.gradients.numel()


def overfills(needed: float, device: torch.device) -> bool:
    """Whether so many bytes are more than a peer may take of what is free."""
    return needed > SHARE * free_bytes(device)


def must_fit(case: Case) -> None:
    """Raise Unavailable where a step on all coordinates at once would overfill memory."""
    needed, device = STEP_BYTES * case.state.shape[-1], case.theta.device
    if overfills(needed, device):
        free = free_bytes(device) / 1e9
        raise Unavailable(f"needs about {needed / 1e9:.0f} GB, and {free:.0f} GB are free")


def step_with(theta_step_: Callable, case: Case) -> Peer:
    """T calls of an operator with the signature of `equations.theta_step_`."""
    if theta_step_ is equations.theta_step_:
        must_fit(case)
    theta, state = case.theta.clone(), case.state.clone()

    def run() -> Tensor:
        for gradient in case.gradients:
            theta_step_(theta, gradient, state, case.phi, **case.meta.form)
        return theta

    return Peer(run, ns(case))
