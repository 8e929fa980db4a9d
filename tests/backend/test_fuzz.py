"""Any shape, layout and values for every operator: the reference's result, or a refusal.

It draws for `L2L_FUZZ_SECONDS` (4) with each of the machine's kernels and the GPU's on the host;
`make soak` has it draw for a quarter of an hour. A failure names the seed of its example, where
`L2L_FUZZ_SEED` begins.
"""

import math
import os
import random
import time

import pytest
import torch
from conftest import KERNELS
from engine_cases import OPERATORS, Case, arguments, listed

from l2l_ref import equations

SECONDS = float(os.environ.get("L2L_FUZZ_SECONDS", 4))
SEED = int(os.environ.get("L2L_FUZZ_SEED", 0))
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}  # of the largest finite element
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3e38, math.exp(-10))


def theta_step_backward(*tensors, **form):
    """By the reference: autograd through theta_step."""
    inputs = [x.clone().requires_grad_() for x in tensors[:4]]
    return torch.autograd.grad(equations.theta_step(*inputs, **form), inputs, tensors[4:])


def in_lists(step_):
    """theta_step_ of one tensor, and what it writes."""

    def step(*tensors, **form):
        step_(*listed(*tensors), **form)
        return tensors[0], tensors[2]

    return step


TWINS = {
    "theta_step_": in_lists(equations.theta_step_),
    "theta_step": equations.theta_step,
    "theta_step_backward": theta_step_backward,
    "unroll_meta_gradient": equations.unroll_meta_gradient,
}


def drawn_case(noise: random.Random) -> Case:
    return Case(
        n=noise.choice((0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, noise.randrange(400))),
        layers=noise.choice((1, 2, 2, 3)),
        hidden=noise.choice((1, 2, 7, 8, 16, 20, 20, 20, 33, noise.randrange(1, 65))),
        theta_input=noise.random() < 0.5,
        odd=noise.random() < 0.5,
        steps=noise.choice((1, 2, 3, 7)),
        p=noise.choice((10.0, 10.0, 0.5, 1.0, 40.0, 80.0)),
        output_scale=noise.choice((0.1, 1e-3, 1.0, 10.0, 0.0, -1.0)),
        seed=noise.randrange(1000),
    )


def with_values(noise: random.Random, x: torch.Tensor, strange: bool) -> torch.Tensor:
    """Some elements become tiny, huge, or, if `strange`, no numbers."""
    x = x.clone()
    flat = x.view(-1)
    for _ in range(noise.choice((0, 0, 1, 3)) if len(flat) else 0):
        value = noise.choice(SPECIAL) if strange else 10 ** noise.uniform(-20, 3)
        flat[noise.randrange(len(flat))] = value
    return x


def with_layout(noise: random.Random, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The same numbers elsewhere in memory, and whether an operator takes them there."""
    kind = noise.choice(("plain", "plain", "plain", "offset", "strided", "transposed"))
    if kind == "offset":
        wide = x.new_full((noise.randrange(1, 9) + x.numel() + 3,), math.nan)
        x = wide[-3 - x.numel() : -3].view(x.shape).copy_(x)
    elif kind == "strided":
        x = x.new_full((*x.shape, 2), math.nan)[..., 0].copy_(x)
    elif kind == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x, x.is_contiguous()


def finite_size(x: torch.Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0


def check(operators, name: str, noise: random.Random) -> None:
    case, dtype = drawn_case(noise), noise.choice((torch.float32, torch.float64))
    given = arguments(case, dtype)
    odd_ones = noise.choice(("gradient", "gradients", "state", "cotangents", "theta", "", "", ""))
    tensors, taken = [], True
    for argument in OPERATORS[name]:
        x = None
        if argument != "thetas" or case.theta_input:
            x = with_values(noise, given[argument], argument == odd_ones)
            x, plain = with_layout(noise, x)
            taken &= plain
        tensors.append(x)
    operator = getattr(operators, name)
    if name == "theta_step_":
        operator = in_lists(operator)
    if not taken:
        with pytest.raises(RuntimeError, match="contiguous"):
            operator(*tensors, **case.form)
        return
    clones = [None if x is None else x.clone() for x in tensors]
    results = operator(*tensors, **case.form), TWINS[name](*clones, **case.form)
    for at, (x, clone) in enumerate(zip(tensors, clones, strict=True)):
        if x is not None and (name != "theta_step_" or at in (1, 3)):  # what is only read
            torch.testing.assert_close(x, clone, rtol=0, atol=0, equal_nan=True)
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    state = clones[OPERATORS[name].index("state")]
    largest = max(map(finite_size, [*results[1], state]))  # products of h are summed
    for a, e in zip(*results, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        least = max(abs(case.output_scale), 1e-30)
        size = max(finite_size(e), finite_size(clones[0]) if name == "theta_step_" else 0.0, least)
        if largest < 1e30:  # beyond, sums overflow in one order and not in another
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * size, equal_nan=True)


@pytest.mark.parametrize("level", [*KERNELS, "emulated"], indirect=True)
@pytest.mark.parametrize("name", OPERATORS)
def test_any_input(level, fused, name):
    seed, end = SEED, time.monotonic() + SECONDS / len(OPERATORS)
    while time.monotonic() < end:
        try:
            check(fused._ops, name, random.Random(f"{name} {seed}"))
        except BaseException as error:
            raise AssertionError(f"L2L_FUZZ_SEED={seed}, {name}, {level}") from error
        seed += 1
    assert seed - SEED >= SECONDS, "hardly an example was tried"
