"""Hypothesis draws problems of every size, form and kind of number: fused equals reference."""

import math

import pytest
import torch
from engine_cases import Case, arguments, run_gradients, run_unroll, run_update

from l2l_ref import equations

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

RTOL = {torch.float32: 1e-3, torch.float64: 1e-8}
ATOL = {torch.float32: 3e-4, torch.float64: 1e-9}  # of the largest finite element

cases = st.builds(
    Case,
    n=st.integers(0, 200),
    layers=st.integers(1, 3),
    hidden=st.integers(1, 40),
    theta_input=st.booleans(),
    odd=st.booleans(),
    steps=st.integers(1, 6),
    p=st.floats(0.5, 80, exclude_min=True),
    output_scale=st.floats(1e-3, 10),
    seed=st.integers(0, 1000),
)
# What replaces a few gradients: any float32 at all.
floats = st.lists(
    st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan])),
    max_size=8,
)
scales = st.sampled_from([1e-20, 1e-6, 1e-3, 1.0, 1e3, 1e20])


def expect_same(actual, reference, dtype, least):
    """The same NaN and infinities; what is finite is close, in units of the largest or of `least`:
    the head's bias has no derivative in the odd form but rounding errors."""
    for a, r in zip(actual, reference, strict=True):
        assert a.shape == r.shape and a.dtype == r.dtype
        finite = r.isfinite()
        size = max(least, float(r[finite].abs().max())) if finite.any() else least
        torch.testing.assert_close(a, r, rtol=RTOL[dtype], atol=ATOL[dtype] * size, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("run", [run_update, run_gradients, run_unroll])
def test_fused_equals_reference(level, fused, run, dtype):
    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(cases, floats, scales)
    def check(case, odd_ones, scale):
        tensors = arguments(case, dtype)
        for name in ("gradient", "gradients"):
            tensors[name] *= scale
            flat = tensors[name].flatten()[:: 1 + case.seed % 7]
            some = torch.tensor(odd_ones[: len(flat)], dtype=dtype)
            tensors[name].view(-1)[:: 1 + case.seed % 7][: len(some)] = some
        reference, actual = (run(module, case, tensors) for module in (equations, fused))
        expect_same(actual, reference, dtype, case.output_scale)

    check()
