"""Numbers at the edge: the fused operators have the infinities and NaN of the reference, and no
others, and a coordinate keeps its NaN to itself.

Every kernel has its own arithmetic of infinities.
"""

import math

import pytest
import torch
from conftest import every_form
from engine_cases import (
    RUNS,
    Case,
    arguments,
    edges,
    every_dtype,
    run_gradients,
    run_unroll,
    run_update,
)

from l2l_ref import equations

inf, nan = math.inf, math.nan


def expect_same(actual, reference):
    """The same infinities and NaN, and what is finite is close."""
    for a, r in zip(actual, reference, strict=True):
        rtol = 1e-4 if a.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(a, r, rtol=rtol, atol=1e-5, equal_nan=True)


def run_both(fused, run, case, given):
    """What the fused operator returns, as the reference does."""
    actual = run(fused, case, given)
    expect_same(actual, run(equations, case, given))
    return actual


@every_dtype
@every_form
class TestExtremeGradients:
    def test_update(self, level, fused, theta_input, odd, dtype):
        g = edges(dtype)
        case = Case(len(g), 2, 7, theta_input, odd)
        u, *_ = run_both(fused, run_update, case, arguments(case, dtype) | {"gradient": g})
        assert u[:-1].isfinite().all() and u[-1:].isnan().all()

    def test_derivatives(self, level, fused, theta_input, odd, dtype):
        """One coordinate at a time, as dφ is a sum; the gradient's own is finite but for NaN."""
        for g in edges(dtype):
            case = Case(1, 2, 7, theta_input, odd)
            run_both(fused, run_gradients, case, arguments(case, dtype) | {"gradient": g[None]})

    def test_unroll(self, level, fused, theta_input, odd, dtype):
        g = edges(dtype)
        case = Case(len(g) - 3, 2, 7, theta_input, odd, steps=3)  # without infinities and NaN
        given = arguments(case, dtype) | {"gradients": g[:-3].repeat(3, 1).roll(1, 0)}
        assert run_both(fused, run_unroll, case, given)[0].isfinite().all()
        for bad in (inf, -inf, nan):
            given["gradients"][1, 5] = bad
            assert run_both(fused, run_unroll, case, given)[0].isnan().any()


@every_dtype
def test_the_edge_of_eq_5_is_on_the_log_side(level, fused, dtype):
    """There the direction is exactly 1, where e^p·g is 1 but for a bit: one unit whose gate is that
    bit, g = tanh(w·(direction - 1)) with a large w, tells them apart."""
    case, tell = Case(4, 1, 1), 0.01 / torch.finfo(dtype).eps
    phi = torch.zeros(22, dtype=dtype)
    w_ih, _, b_ih, _, head_weight, _ = equations.unpack(phi, equations.phi_shapes(1, 1, 2))
    w_ih[2, 1], b_ih[2], head_weight[0, 0] = tell, -tell, 1.0
    seen = 0
    for p in torch.arange(1, 60, 0.25).tolist():
        at, slope = (torch.tensor(math.exp(x), dtype=dtype) for x in (-p, p))
        below = at * (1 - 8 * torch.finfo(dtype).eps)
        given = arguments(case, dtype) | {"phi": phi, "state": torch.zeros(1, 2, 1, 4, dtype=dtype)}
        given["gradient"] = torch.stack((at, torch.nextafter(at, 2 * at), below, below / 2))
        u, _, _ = run_update(fused, case._replace(p=p), given)
        if at * slope != 1:
            assert (u != 0).tolist() == [False, False, True, True]
            seen += 1
    assert seen > 10


@every_dtype
@pytest.mark.parametrize("value", [-1e30, 1e30, inf, -inf, nan])
class TestExtremeTensors:
    @pytest.mark.parametrize(
        "name, at", [("state", (0, 0, 2, 8)), ("state", (1, 1, 1, 11)), ("theta", 3)]
    )
    def test_of_coordinates(self, level, fused, name, at, value, dtype):
        """In h, in c, and in θ."""
        for odd in (False, True):
            case = Case(70, 2, 7, True, odd, steps=2)
            given = arguments(case, dtype)
            given[name][at] = value
            for run in RUNS:
                run_both(fused, run, case, given)

    def test_phi(self, level, fused, value, dtype):
        """In the middle of a weight matrix, in a bias, and in the head."""
        for at in (5, 4 * 7 * 3 + 4 * 7 * 7 + 2, -3, -1):
            case = Case(5, 1, 7, True, steps=1)
            given = arguments(case, dtype)
            given["phi"][at] = value
            run_both(fused, run_update, case, given)
            if math.isinf(value):
                # dφ may have more NaN than the reference, never fewer: lanes without a coordinate
                # hold zeros, and zero times an infinite weight is NaN.
                (actual,), (reference,) = (run_unroll(m, case, given) for m in (fused, equations))
                assert (actual.isnan() >= reference.isnan()).all()
                both = ~actual.isnan()
                expect_same([actual[both]], [reference[both]])
            else:
                run_both(fused, run_unroll, case, given)


@every_dtype
@every_form
def test_a_nan_cotangent_touches_no_other_coordinate(level, fused, theta_input, odd, dtype):
    case = Case(70, 2, 7, theta_input, odd)
    for name in ("d_next_theta", "d_next_state"):
        given = arguments(case, dtype)
        given[name][..., 33] = nan
        run_both(fused, run_gradients, case, given)
