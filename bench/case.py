"""What every peer is given and is, and the memory that it may take.

Shapes as in `l2l_ref.equations`: N coordinates, T steps, H units, L layers, F inputs, M = N, or 2N
in the odd form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bench.measure import CPU, free_bytes
from l2l_ref import equations
from l2l_ref.meta_optimizer import MetaOptimizer

UNROLL_BYTES = 2400  # that reverse mode may take for each step of each column of the state
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

    @property
    def ns(self) -> float:
        """ns per coordinate-step of a peer that takes a second for the case."""
        return 1e9 / self.gradients.numel()

    @property
    def unroll(self) -> tuple[Tensor | None, ...]:
        """What `equations.unroll_meta_gradient` takes."""
        return self.gradients, self.state, self.cotangents, self.phi, self.thetas

    @cached_property
    def meta_gradient(self) -> Tensor:
        """The reference's dφ [P], which runs whatever memory there is."""
        return equations.unroll_meta_gradient(*self.unroll, **self.meta.form)

    def first(self, count: int) -> "Case":
        """The case of the first `count` coordinates."""
        by_sign = self.state.unflatten(-1, (-1, len(self.theta)))  # [L, 2, H, 1 or 2, N]
        steps = (self.gradients[:, :count], self.cotangents[:, :count])
        state = by_sign[..., :count].flatten(3)
        thetas = None if self.thetas is None else self.thetas[:, :count]
        return Case(self.meta, self.phi, self.theta[:count], *steps, state, thetas)


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


def flops(meta: MetaOptimizer) -> int:
    """Floating-point operations of the matrix products of one update of one coordinate."""
    weights = sum(weight.numel() for weight in meta.parameters() if weight.dim() == 2)
    return 2 * weights * (2 if meta.form["odd"] else 1)


def must_fit(case: Case, column_bytes: int) -> None:
    """Raise Unavailable where so many bytes for each column of the state would overfill memory."""
    needed, free = column_bytes * case.state.shape[-1], free_bytes(case.theta.device)
    if needed > SHARE * free:
        raise Unavailable(f"needs about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
