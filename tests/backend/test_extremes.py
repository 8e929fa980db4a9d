"""Numbers at the edge: the fused operators have the infinities and NaN of the reference, and no
others, and a coordinate keeps its NaN to itself."""

import math

import pytest
import torch
from conftest import every_form
from engine_cases import (
    DTYPES,
    RUNS,
    Case,
    arguments,
    by_id,
    edges,
    run_gradients,
    run_unroll,
    run_update,
    without,
)

from l2l_ref import equations

inf, nan = math.inf, math.nan
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
# Every kernel has its own arithmetic of infinities; the forms take turns beside them.
everywhere = pytest.mark.parametrize("dtype", DTYPES, ids=by_id)


def expect_same(actual, reference, dtype):
    """The same infinities and NaN, and what is finite is close."""
    for a, r in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, r, rtol=TOLERANCE[dtype], atol=1e-5, equal_nan=True)


def run_both(fused, run, case, given, dtype):
    expect_same(run(fused, case, given), run(equations, case, given), dtype)


@everywhere
@every_form
class TestExtremeGradients:
    def test_update(self, level, fused, theta_input, odd, dtype):
        g = edges(dtype)
        case = Case(len(g), 2, 7, theta_input, odd)
        given = arguments(case, dtype) | {"gradient": g}
        u, h, c = run_update(fused, case, given)
        expect_same((u, h, c), run_update(equations, case, given), dtype)
        assert u[:-1].isfinite().all() and u[-1:].isnan().all()

    def test_derivatives(self, level, fused, theta_input, odd, dtype):
        """One coordinate at a time, as dφ is a sum; the gradient's own is finite but for NaN."""
        for g in edges(dtype):
            case = Case(1, 2, 7, theta_input, odd)
            given = arguments(case, dtype) | {"gradient": g[None]}
            run_both(fused, run_gradients, case, given, dtype)

    def test_unroll(self, level, fused, theta_input, odd, dtype):
        g = edges(dtype)
        case = Case(len(g) - 3, 2, 7, theta_input, odd, steps=3)  # without infinities and NaN
        given = arguments(case, dtype) | {"gradients": g[:-3].repeat(3, 1).roll(1, 0)}
        assert run_unroll(fused, case, given)[0].isfinite().all()
        run_both(fused, run_unroll, case, given, dtype)
        for bad in (inf, -inf, nan):
            given["gradients"][1, 5] = bad
            (d_phi,) = run_unroll(fused, case, given)
            assert d_phi.isnan().any()
            run_both(fused, run_unroll, case, given, dtype)


@everywhere
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


@everywhere
@pytest.mark.parametrize("value", [-1e30, 1e30, inf, -inf, nan])
class TestExtremeTensors:
    @pytest.mark.parametrize("row", [0, 1], ids=["h", "c"])
    def test_states(self, level, fused, row, value, dtype):
        case = Case(20, 2, 7, True, True, steps=2)
        given = arguments(case, dtype)
        for layer in (0, 1):
            for unit in range(3):
                given["state"][layer, row, unit, 4 * unit + 7 * layer] = value
        for run in RUNS:
            run_both(fused, run, case, given, dtype)

    @pytest.mark.parametrize("odd", [False, True])
    def test_theta(self, level, fused, odd, value, dtype):
        case = Case(20, 2, 7, True, odd, steps=2)
        given = arguments(case, dtype)
        given["theta"][3] = value
        run_both(fused, run_gradients, case, given, dtype)
        run_both(fused, run_unroll, case, given, dtype)

    def test_phi(self, level, fused, value, dtype):
        """In the middle of a weight matrix, in a bias, and in the head."""
        for at in (5, 4 * 7 * 3 + 4 * 7 * 7 + 2, -3, -1):
            case = Case(5, 1, 7, True, steps=1)
            given = arguments(case, dtype)
            given["phi"][at] = value
            run_both(fused, run_update, case, given, dtype)
            if math.isinf(value):
                # dφ may have more NaN than the reference, never fewer: lanes without a coordinate
                # hold zeros, and zero times an infinite weight is NaN.
                (actual,), (reference,) = (run_unroll(m, case, given) for m in (fused, equations))
                assert (actual.isnan() >= reference.isnan()).all()
                both = ~actual.isnan()
                expect_same([actual[both]], [reference[both]], dtype)
            else:
                run_both(fused, run_unroll, case, given, dtype)


@everywhere
@every_form
def test_a_nan_touches_no_other_coordinate(level, fused, theta_input, odd, dtype):
    case = Case(70, 2, 7, theta_input, odd)
    given = arguments(case, dtype)
    clean = run_update(fused, case, given) + run_gradients(fused, case, given)[:-1]
    for name in ("theta", "gradient", "state", "d_next_theta", "d_next_state"):
        bad = given | {name: given[name].clone()}
        bad[name][..., 33] = nan
        dirty = run_update(fused, case, bad) + run_gradients(fused, case, bad)[:-1]
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(without(33, case, a), without(33, case, b))
        assert any(b[..., 33].isnan().any() for b in dirty)
