"""The functions of csrc/cell.h against NumPy in a wider type, for every kernel of a CPU.

Errors are in units in the last place of the exact result (ulp).
"""

from importlib import import_module

import numpy as np
import pytest
from conftest import cpu_levels

BITS = {np.float32: np.uint32, np.float64: np.uint64}
ULP = {"exp2": 3.5, "exp2m1": 3.5, "log": 3.5, "sigmoid": 3.5, "tanh": 4}
every_dtype = pytest.mark.parametrize("dtype", BITS)
every_name = pytest.mark.parametrize("name", ULP)
pytestmark = cpu_levels


@pytest.fixture
def function(level):
    """name, x -> y of the kernels in use."""
    return import_module("l2l_ref.backend._C").function


def exact(name, x):
    """The function in the next wider type."""
    x = x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)
    with np.errstate(all="ignore"):
        if name == "exp2m1":
            near = np.expm1(x * np.log(x.dtype.type(2)))
            return np.where(np.abs(x) < 0.5, near, np.exp2(x) - 1)
        return 1 / (1 + np.exp(-x)) if name == "sigmoid" else getattr(np, name)(x)


def ulps(actual, expected):
    """|actual - expected| in ulp of the expected value. Below the smallest normal number any
    result as small will do, and counts as exact."""
    tiny = np.finfo(actual.dtype).tiny
    unit = np.spacing(np.maximum(np.abs(expected), tiny).astype(actual.dtype))
    errors = np.abs(actual.astype(expected.dtype) - expected) / unit
    return np.where((np.abs(expected) < tiny) & (np.abs(actual) <= tiny), 0, errors)


def numbers(dtype, low, high, count=300_000):
    """Random bit patterns, uniform draws, and what is next to every boundary: in [low, high]."""
    random, bits = np.random.default_rng(0), BITS[dtype]
    patterns = random.integers(0, np.iinfo(bits).max, count, bits, endpoint=True).view(dtype)
    halves = (np.arange(-2400, 2400) / 2).astype(dtype)  # where split() and log's m change sides
    powers = 2.0 ** np.arange(-126 if dtype == np.float32 else -1000, 127)
    roots = (powers * 0.70710678118654752).astype(dtype)
    edges = np.concatenate((halves, powers.astype(dtype), -powers.astype(dtype), roots))
    near = [np.nextafter(edges, dtype(to)) for to in (np.inf, -np.inf)]
    uniform = [random.uniform(-r, r, count // 3).astype(dtype) for r in (1e-3, 1, 30, 1500)]
    x = np.concatenate((patterns, edges, *near, np.array([0.0, -0.0], dtype), *uniform))
    return x[(x >= low) & (x <= high)]  # neither infinities nor NaN where the bounds are finite


@every_dtype
@every_name
def test_within_a_few_ulp(function, name, dtype):
    bias, largest = np.finfo(dtype).maxexp - 1, np.finfo(dtype).max
    domains = {
        "exp2": (2 - bias, bias),  # below, the general form goes to 0
        "exp2m1": (-largest, bias),
        "log": (np.finfo(dtype).tiny, largest),
    }
    x = numbers(dtype, *domains.get(name, (-largest, largest)))
    assert len(x) > 100_000
    errors = ulps(function(name, x), exact(name, x))
    if name == "sigmoid":  # over its condition number: scaled weights round its argument once more
        errors /= 1 + np.abs(x) * exact("sigmoid", -x).astype(float)
    worst = np.argmax(errors)
    assert errors[worst] <= ULP[name], (x[worst], function(name, x[worst : worst + 1]))


@every_dtype
@every_name
def test_nan_stays_nan_whatever_its_bits(function, name, dtype):
    infinity = np.array([np.inf], dtype).view(BITS[dtype])[0]
    payloads = np.random.default_rng(0).integers(1, np.finfo(dtype).eps ** -1, 1000)
    payloads[:600] = np.arange(1, 601)
    x = (infinity | payloads.astype(BITS[dtype])).view(dtype)
    assert np.isnan(function(name, np.concatenate((x, -x)))).all()


@every_dtype
@pytest.mark.parametrize("name, low", [("sigmoid", 0), ("tanh", -1)])
def test_saturates_without_leaving_its_range(function, name, low, dtype):
    x = np.sort(numbers(dtype, -np.inf, np.inf))
    y = function(name, x)
    assert (y >= low).all() and (y <= 1).all()
    steps = np.diff(y) / np.spacing(np.maximum(np.abs(y[1:]), np.finfo(dtype).tiny))
    assert steps.min() >= -4  # monotone but for the last bits
    assert (y[x > 40] == 1).all() and (y[x < -800] == low).all()
