"""The functions of csrc/cell.h against NumPy in a wider type, for every kernel of the build.

Errors are in units in the last place of the exact result (ulp).
"""

from importlib import import_module

import numpy as np
import pytest

DTYPES = (np.float32, np.float64)
ULP = {  # largest errors allowed; measured: see the comment
    "exp2": 3.5,
    "exp2m1": 3.5,
    "log": 3.5,
    "sigmoid": 3.5,  # times the condition number
    "tanh": 4,
}


@pytest.fixture
def function(level):
    """name, x -> y of the kernels in use."""
    if level == "cuda":
        pytest.skip("a GPU's functions are tested through the operators")
    module = import_module("l2l_ref.backend._C")
    return (module.emulated if level == "emulated" else module).function


def wide(dtype):
    return np.float64 if dtype == np.float32 else np.longdouble


def exact(name, x):
    """The function in the next wider type."""
    x = x.astype(wide(x.dtype))
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        if name == "exp2m1":
            small = np.abs(x) < 0.5
            near = np.expm1(np.where(small, x, 0) * np.log(x.dtype.type(2)))
            return np.where(small, near, np.exp2(x) - 1)
        if name == "sigmoid":
            return 1 / (1 + np.exp(-x))
        return getattr(np, name)(x)


def ulps(actual, expected):
    """|actual - expected| in ulp of the expected value. Below the smallest normal number any
    result as small will do, and counts as exact."""
    tiny = np.finfo(actual.dtype).tiny
    unit = np.spacing(np.maximum(np.abs(expected), tiny).astype(actual.dtype))
    errors = np.abs(actual.astype(expected.dtype) - expected) / unit
    return np.where((np.abs(expected) < tiny) & (np.abs(actual) <= tiny), 0, errors)


def numbers(dtype, low, high, count=300_000):
    """Random bit patterns, uniform draws, and what is next to every boundary: in [low, high]."""
    random = np.random.default_rng(0)
    bits = np.uint32 if dtype == np.float32 else np.uint64
    patterns = random.integers(0, np.iinfo(bits).max, count, bits, endpoint=True).view(dtype)
    halves = (np.arange(-2400, 2400) / 2).astype(dtype)  # where split() and log's m change sides
    powers = 2.0 ** np.arange(-126 if dtype == np.float32 else -1000, 127)
    roots = (powers * 0.70710678118654752).astype(dtype)
    edges = np.concatenate((halves, powers.astype(dtype), -powers.astype(dtype), roots))
    edges = np.concatenate(
        (edges, np.nextafter(edges, dtype(np.inf)), np.nextafter(edges, dtype(-np.inf)))
    )
    parts = [patterns, edges, np.array([0.0, -0.0], dtype)]
    for reach in (1e-3, 1, 30, 1500):
        parts.append(random.uniform(-reach, reach, count // 3).astype(dtype))
    x = np.concatenate(parts)
    return x[(x >= low) & (x <= high)]  # neither infinities nor NaN where the bounds are finite


def domain(name, dtype):
    """Where the function promises to be accurate."""
    bias, largest = np.finfo(dtype).maxexp - 1, np.finfo(dtype).max
    return {
        "exp2": (2 - bias, bias),  # below, the general form goes to 0
        "exp2m1": (-largest, bias),
        "log": (np.finfo(dtype).tiny, largest),
        "sigmoid": (-largest, largest),
        "tanh": (-largest, largest),
    }[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULP)
def test_within_a_few_ulp(function, record_property, name, dtype):
    x = numbers(dtype, *domain(name, dtype))
    assert len(x) > 100_000
    expected = exact(name, x)
    errors = ulps(function(name, x), expected)
    if name == "sigmoid":  # its argument is rounded once more when the weights are scaled
        errors /= 1 + np.abs(x) * exact("sigmoid", -x).astype(float)
    worst = np.argmax(errors)
    record_property("ulp", float(errors[worst]))
    assert errors[worst] <= ULP[name], (x[worst], function(name, x[worst : worst + 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(function, dtype):
    inf, big = np.inf, np.finfo(dtype).max
    x = np.array([-inf, -big, -1e4, -0.0, 0.0, 1e4, big, inf], dtype)
    assert function("sigmoid", x).tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    assert function("tanh", x).tolist() == [-1, -1, -1, 0, 0, 1, 1, 1]
    assert function("exp2m1", x[:5]).tolist() == [-1, -1, -1, 0, 0]
    power = function("exp2", x)
    assert power.tolist() == [0, 0, 0, 1, 1, inf, inf, inf]
    assert function("log", np.array([1, inf], dtype)).tolist() == [0, inf]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULP)
def test_nan_stays_nan_whatever_its_bits(function, name, dtype):
    bits = np.uint32 if dtype == np.float32 else np.uint64
    nan = np.array([np.inf], dtype).view(bits)[0]
    payloads = np.random.default_rng(0).integers(1, np.finfo(dtype).eps ** -1, 1000).astype(bits)
    payloads[:600] = np.arange(1, 601)
    x = (nan | payloads).astype(bits).view(dtype)
    x = np.concatenate((x, -x))
    assert np.isnan(x).all()
    assert np.isnan(function(name, x)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, low, high", [("sigmoid", 0, 1), ("tanh", -1, 1)])
def test_saturates_without_leaving_its_range(function, name, low, high, dtype):
    x = np.sort(numbers(dtype, -np.inf, np.inf))
    y = function(name, x)
    assert (y >= low).all() and (y <= high).all()
    steps = np.diff(y) / np.spacing(np.maximum(np.abs(y[1:]), np.finfo(dtype).tiny))
    assert steps.min() >= -4  # monotone but for the last bits
    assert (y[x > 40] == high).all() and (y[x < -800] == low).all()


def test_the_length_need_not_fill_a_vector(function):
    x = np.linspace(-3, 3, 40).astype(np.float32)
    for count in range(40):
        assert np.array_equal(function("tanh", x[:count]), function("tanh", x)[:count])


def test_unknown_names_and_types_are_refused(function):
    with pytest.raises(ValueError, match="no function 'cosh'"):
        function("cosh", np.ones(1))
    with pytest.raises(TypeError):
        function("tanh", np.ones(1, np.int64))
    with pytest.raises(ValueError, match="no kernels 'sse9': choose one of"):
        import_module("l2l_ref.backend._C").use_instruction_set("sse9")
