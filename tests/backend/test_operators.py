"""The fused operators against their twins in `equations.py`, for every kernel of the build.

The reference runs in float64 on the same float32 numbers. Float64 is held to 1e-10 and float32 to
1e-5 of the result's own size: of its largest element, as a single element can be a difference of
large ones.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import FORMS, every_form
from engine_cases import (
    RUNS,
    STEP,
    Case,
    arguments,
    error,
    every_dtype,
    expect_close,
    expected,
    listed,
    run_all,
    run_unroll,
    trajectory,
)

from l2l_ref import equations

# Vectors are of 2 to 16 lanes, blocks of 64 (32 in the odd form); up to 64 segments of blocks.
SIZES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 5000)
HIDDEN, STEPS = (20, 1, 5, 8, 16, 32, 33), (1, 5, 20, 3)
CASES = [  # layers, units, steps and forms take turns beside the sizes
    Case(n, 1 + at % 3, HIDDEN[at % 7], *FORMS[at % 4], STEPS[at % 4], seed=at)
    for at, n in enumerate(SIZES)
]
CASES.append(Case(70, 2, 97, True, True, steps=2))  # more units than a GPU's warps take at once
CASES += [Case(65, 2, 20, *form, steps=100) for form in FORMS]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Through 100 steps, or summed over thousands of coordinates, float32 keeps a digit less; it must
# then be as good as the float32 reference, which loses it too.
LONG = 1e-4


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_against_the_reference(level, fused, run, case, dtype):
    """Within TOLERANCE, or in float32 within LONG and no worse than twice the reference's error."""
    actual = run(fused, case, arguments(case, dtype))
    assert all(a.dtype == dtype for a in actual)
    if dtype == torch.float64:
        return expect_close(actual, expected(run, case), TOLERANCE[dtype])
    own = expected(run, case, torch.float32)
    for a, r, o in zip(actual, expected(run, case), own, strict=True):
        assert error(a, r) <= max(TOLERANCE[dtype], min(LONG, 2 * error(o, r)))


def test_long_sums_keep_their_digits(level, fused):
    """20,000 blocks that are all alike have 20,000 times the dφ of one: partial sums in float32
    are added in float64 often enough that rounding, here always the same way, does not pile up."""
    case, times = Case(64, 1, 3), 20_000

    def alike(count):
        given = arguments(case, torch.float32)
        return {
            name: x if name == "phi" else x[..., :1].expand(*x.shape[:-1], count).contiguous()
            for name, x in given.items()
        }

    (one,) = run_unroll(fused, case, alike(case.n))
    (many,) = run_unroll(fused, case._replace(n=case.n * times), alike(case.n * times))
    torch.testing.assert_close(many.double() / times, one.double(), rtol=1e-5, atol=0)


@every_form
@pytest.mark.parametrize("layers", [1, 2])
def test_a_trajectory_of_100_steps(level, fused, layers, theta_input, odd):
    """Both dtypes stay near the float64 reference, and float32 as near as the float32 reference,
    in root mean square: a coordinate that sits where its gradient changes sign multiplies whatever
    error it has."""
    case = Case(33, layers, 20, theta_input, odd, output_scale=0.02)

    def rms(actual, reference):
        return float((actual.double() - reference).norm() / reference.norm())

    reference = trajectory(equations, case, torch.float64)
    assert (reference[0][-1] - reference[0][0]).abs().max() > 0.005
    expect_close(trajectory(fused, case, torch.float64), reference, 1e-11)
    actual, own = (trajectory(module, case, torch.float32) for module in (fused, equations))
    expect_close(actual, reference, 1e-4)
    for a, r, o in zip(actual, reference, own, strict=True):
        assert rms(a, r) <= 1e-7 + 4 * rms(o, r)


@every_dtype
@every_form
def test_threads_do_not_change_a_bit(level, fused, dtype, theta_input, odd):
    """Nor does another run."""
    case = Case(3000, 2, 8, theta_input, odd, steps=3)
    results = []
    for count in (2, 2, 1):
        torch.set_num_threads(count)
        results.append(run_all(fused, case, arguments(case, dtype)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_calls_from_several_python_threads_do_not_meet(level, fused):
    """Each thread has scratch memory of its own, whatever the sizes that come by."""
    cases = [Case(300 + 50 * i, 1 + i % 3, 5 + 4 * i, odd=i % 2 == 0, steps=2) for i in range(8)]
    everything = lambda case: run_all(fused, case, arguments(case, torch.float32))  # noqa: E731
    alone = [everything(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(everything, cases * 3))
    for one, other in zip(alone * 3, together, strict=True):
        assert all(map(torch.equal, one, other))


@every_dtype
@every_form
def test_a_list_is_one_after_the_other_to_the_bit(level, fused, dtype, theta_input, odd):
    """Of any shapes and sizes, whoever shares out their blocks (two threads meet within the last
    tensor); on a GPU in several launches."""
    case = Case(0, 2, 20, theta_input, odd)
    shapes = [(1,), (0,), (33,), (64,), (65,), (200,), (), (3, 5, 7), (2, 0), *[(2,)] * 70, (6000,)]
    given = [arguments(case._replace(n=math.prod(s), seed=i), dtype) for i, s in enumerate(shapes)]
    phi = given[0]["phi"]

    def lists():
        copies = [[each[name].clone() for each in given] for name in STEP[:3]]
        shaped = [[x.view(s) for x, s in zip(xs, shapes, strict=True)] for xs in copies[:2]]
        states = [x.view(*x.shape[:3], 1 + odd, *s) for x, s in zip(copies[2], shapes, strict=True)]
        return *shaped, states

    alone = lists()
    for theta, gradient, state in zip(*alone, strict=True):
        fused.theta_step_(*listed(theta, gradient, state, phi), **case.form)
    for count in (2, 1):
        together = lists()
        torch.set_num_threads(count)
        fused.theta_step_(*together, phi, **case.form)
        for one, other in zip(alone, together, strict=True):
            assert all(map(torch.equal, one, other))
    assert not torch.equal(alone[0][5], given[5]["theta"])


def test_no_steps_have_no_gradient_and_no_graph(level, fused):
    case = Case(9, theta_input=True, steps=0)
    given = arguments(case)
    given["phi"].requires_grad_()
    (d_phi,) = run_unroll(fused, case, given)
    assert not d_phi.any() and not d_phi.requires_grad
