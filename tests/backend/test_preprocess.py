"""Eq. 5 alone as an operator, against its twin in `equations.py`."""

import math

import pytest
import torch
from engine_cases import DTYPES, by_id, edges, expect_close, threads

from l2l_ref import equations

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
everywhere = pytest.mark.parametrize("dtype", DTYPES, ids=by_id)


def gradients(*shape, dtype=torch.float64, seed=0):
    """Sizes over ten decades, on both sides of e^-p."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (10 * torch.rand(shape, generator=generator) - 8)
    return (torch.randn(shape, generator=generator) * size).to(dtype)


@everywhere
@pytest.mark.parametrize(
    "shape, p",
    [((0,), 1.0), ((1,), 10.0), ((15,), 80.0), ((16,), 1.0), ((17,), 10.0), ((), 80.0),
     ((3, 5, 7), 10.0), ((40_000,), 10.0), ((40_000,), 80.0)],
)  # fmt: skip
def test_result_and_derivatives(level, fused, shape, p, dtype):
    gradient = gradients(*shape, dtype=dtype)
    d_result = gradients(2, *shape, dtype=dtype, seed=1)
    results = []
    for module, of in ((fused, dtype), (equations, torch.float64)):
        g = gradient.to(of, copy=True).requires_grad_()
        out = module.preprocess(g, p)
        assert out.shape == (2, *shape) and out.dtype == of
        (d,) = torch.autograd.grad(out, g, d_result.to(of))
        results.append((*out.detach(), d * g.detach().abs().clamp(min=math.exp(-p))))
    expect_close(*results, TOLERANCE[dtype] * (100 if p == 80 else 1))


@everywhere
def test_numbers_at_the_edge(level, fused, dtype):
    g = edges(dtype)
    actual, reference = fused.preprocess(g, 10.0), equations.preprocess(g, 10.0)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, reference, rtol=tolerance, atol=0, equal_nan=True)


def test_gradgradcheck(fused):
    g = torch.tensor([0.3, -2.0, 1e-3, -1e-4, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fused.preprocess(x, 2.0), g)


def test_threads_share_the_work(fused):
    results, gradient = [], gradients(100_003)
    for count in (1, 2):
        with threads(count):
            results.append(fused.preprocess(gradient, 10.0))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "gradient, p, words",
    [
        *[(torch.ones(3).to(dtype), 10.0, "gradient must be float32 or float64")
          for dtype in (torch.float16, torch.int64, torch.complex64)],
        *[(torch.ones(3), p, "p is .*: it must be above 0 and at most 80")
          for p in (0.0, -1.0, 80.5, math.nan)],
        (torch.ones(4, 6).T, 10.0, "gradient is not contiguous: pass"),
    ],
)  # fmt: skip
def test_what_is_refused(fused, gradient, p, words):
    with pytest.raises(RuntimeError, match=words):
        fused.preprocess(gradient, p)


@pytest.mark.parametrize(
    "d_result, words",
    [
        *[(d, "d_result must be contiguous like gradient")
          for d in (torch.ones(3), torch.ones(2, 4), torch.ones(3, 3), torch.ones(2, 3).double(),
                    torch.ones(3, 2).T)],
        (torch.ones(2, 3, device="meta"), "d_result is on meta, gradient on cpu"),
    ],
)  # fmt: skip
def test_cotangents_that_are_refused(fused, d_result, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.l2l_ref.preprocess_backward(torch.ones(3), d_result, p=10.0)
