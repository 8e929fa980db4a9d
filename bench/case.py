"""What every peer is given, and what the peers made of PyTorch's LSTM modules need of it.

Shapes as in `l2l_ref.equations`: N coordinates, T steps, H units, L layers, F inputs, M = N, or 2N
in the odd form. Everything is float32 on the CPU.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from l2l_ref.equations import THETA_CLAMP, THETA_SCALE, preprocess
from l2l_ref.optimizer import MetaOptimizer

STEP_BYTES = 1600  # that a step in plain PyTorch may take for each column of the state
SHARE = 0.4  # of the free memory that one peer may take


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """φ as modules and packed [P], θ [N], gradients and cotangents [T, N], state [L, 2, H, M].

    No peer changes them: each works on copies of its own.
    """

    meta: MetaOptimizer
    phi: Tensor
    theta: Tensor
    gradients: Tensor
    cotangents: Tensor
    state: Tensor

    def part(self, start: int, stop: int) -> "Case":
        """The case of the coordinates from `start` to before `stop`."""
        by_sign = self.state.unflatten(-1, (-1, len(self.theta)))  # [L, 2, H, 1 or 2, N]
        cut = slice(start, stop)
        steps = (self.gradients[:, cut], self.cotangents[:, cut])
        return Case(self.meta, self.phi, self.theta[cut], *steps, by_sign[..., cut].flatten(3))


def make_case(n: int, steps: int, *, odd: bool = False, theta_input: bool = False) -> Case:
    """φ of the paper's size (H = 20, L = 2) with a head that is not zero, and random data.

    The sizes of the gradients spread over nine decades, so that both branches of Eq. 5 are taken.
    """
    generator = torch.Generator().manual_seed(0)
    meta = MetaOptimizer(odd=odd, theta_input=theta_input, generator=generator)
    for weight in meta.head.parameters():
        nn.init.normal_(weight, std=0.2, generator=generator)
    theta = 0.1 * torch.randn(n, generator=generator)
    gradients = torch.randn(steps, n, generator=generator)
    gradients *= 10 ** (9 * torch.rand(steps, n, generator=generator) - 8)
    cotangents = torch.randn(steps, n, generator=generator)
    state = meta.init_state(n).uniform_(-0.5, 0.5, generator=generator)
    return Case(meta, meta.phi().detach(), theta, gradients, cotangents, state)


def inputs(case: Case, theta: Tensor, gradient: Tensor) -> Tensor:
    """What φ reads, batch first: θ [N] and gradient [..., N] -> [..., M, F]."""
    x = preprocess(gradient, case.meta.form["p"])  # [2, ..., N]
    if case.meta.form["theta_input"]:
        seen = (THETA_SCALE * theta).clamp(-THETA_CLAMP, THETA_CLAMP)
        x = torch.cat((x, seen.expand_as(gradient)[None]))
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


def free_bytes() -> float:
    """Memory that is free now; infinite where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    return float("inf")


def overfills(needed: float) -> bool:
    """Whether so many bytes are more than a peer may take of what is free."""
    return needed > SHARE * free_bytes()


def must_fit(case: Case) -> None:
    """Raise Unavailable where a step on all coordinates at once would overfill memory."""
    needed = STEP_BYTES * case.state.shape[-1]
    if overfills(needed):
        free = free_bytes() / 1e9
        raise Unavailable(f"needs about {needed / 1e9:.0f} GB, and {free:.0f} GB are free")
