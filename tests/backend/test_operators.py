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
    DTYPES,
    STEP,
    UNROLL,
    Case,
    arguments,
    by_id,
    covering,
    error,
    expect_close,
    expected,
    listed,
    run_all,
    run_gradients,
    run_unroll,
    run_update,
    threads,
    trajectory,
)

from l2l_ref import equations

# Vectors are of 2 to 16 lanes, blocks of 64 (32 in the odd form); up to 64 segments of blocks.
SIZES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000)
OWN_SIZE = [Case(15910, 2, 20, *form, steps=3) for form in FORMS]  # the weights of 784-20-10
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# Through 100 steps, or summed over thousands of coordinates, float32 keeps a digit less; it must
# then be as good as the float32 reference, which loses it too.
LONG = 1e-4
WIDE = Case(70, 2, 97, True, True, steps=2)  # more units than a GPU's warps take at once
LONG_UNROLLS = [Case(65, 2, 20, *form, steps=100) for form in FORMS]


def expect_as_good_as_the_reference(run, case, dtype, actual):
    """Within TOLERANCE, or in float32 within LONG and no worse than twice the reference's error."""
    reference = expected(run, case)
    if dtype == torch.float64:
        return expect_close(actual, reference, TOLERANCE[dtype])
    own = expected(run, case, torch.float32)
    for a, r, o in zip(actual, reference, own, strict=True):
        assert error(a, r) <= max(TOLERANCE[dtype], min(LONG, 2 * error(o, r)))


@pytest.mark.parametrize("dtype", DTYPES, ids=by_id)
class TestAgainstTheReference:
    @pytest.mark.parametrize("case", [*covering(SIZES), WIDE], ids=by_id)
    @pytest.mark.parametrize("run", [run_update, run_gradients])
    def test_a_step_and_its_gradients(self, level, fused, run, case, dtype):
        actual = run(fused, case, arguments(case, dtype))
        assert all(a.dtype == dtype for a in actual)
        expect_close(actual, expected(run, case), TOLERANCE[dtype])

    @pytest.mark.parametrize(
        "case", [*covering(SIZES, steps=(1, 5, 20, 3)), WIDE, *LONG_UNROLLS], ids=by_id
    )
    def test_unroll_meta_gradient(self, level, fused, case, dtype):
        actual = run_unroll(fused, case, arguments(case, dtype))
        expect_as_good_as_the_reference(run_unroll, case, dtype, actual)

    @pytest.mark.parametrize("case", OWN_SIZE, ids=by_id)
    def test_many_coordinates(self, fused, case, dtype):
        given = arguments(case, dtype)
        expect_close(run_update(fused, case, given), expected(run_update, case), TOLERANCE[dtype])
        actual = run_unroll(fused, case, given)
        expect_as_good_as_the_reference(run_unroll, case, dtype, actual)


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
    """Both dtypes stay near the float64
    reference, and float32 as near as the float32 reference, in root mean square: a coordinate that
    sits where its gradient changes sign multiplies whatever error it has."""
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


@pytest.mark.parametrize("dtype", DTYPES, ids=by_id)
@every_form
def test_threads_do_not_change_a_bit(level, fused, dtype, theta_input, odd):
    """Nor does another run."""
    case = Case(3000, 2, 8, theta_input, odd, steps=3)
    results = []
    for count in (1, 2, 2, 1):
        with threads(count):
            results.append(run_all(fused, case, arguments(case, dtype)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_calls_from_several_python_threads_do_not_meet(level, fused):
    """Each thread has scratch memory of its own, whatever the sizes that come by."""
    cases = [Case(300 + 50 * i, 1 + i % 3, 5 + 4 * i, odd=i % 2 == 0, steps=2) for i in range(8)]

    def everything(case):
        return run_all(fused, case, arguments(case, torch.float32))

    alone = [everything(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(everything, cases * 3))
    for one, other in zip(alone * 3, together, strict=True):
        assert all(map(torch.equal, one, other))


MIXED = (1, 0, 33, 64, 65, 200, 7, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_id)
@every_form
def test_a_list_is_one_after_the_other_to_the_bit(level, fused, dtype, theta_input, odd):
    """Of any shapes and sizes, whoever shares out their blocks (two threads meet within the last
    tensor); on a GPU in several launches."""
    case = Case(0, 2, 20, theta_input, odd)
    shapes = [(n,) for n in MIXED] + [(), (3, 5, 7), (2, 0)] + [(2,)] * 70 + [(6000,)]
    given = [arguments(case._replace(n=math.prod(s), seed=i), dtype) for i, s in enumerate(shapes)]
    phi = given[0]["phi"]

    def lists():
        copies = [[each[name].clone() for each in given] for name in STEP[:3]]
        shaped = [[x.view(s) for x, s in zip(xs, shapes, strict=True)] for xs in copies[:2]]
        states = [x.view(*x.shape[:3], 1 + odd, *s) for x, s in zip(copies[2], shapes, strict=True)]
        return *shaped, states

    alone, results = lists(), []
    for theta, gradient, state in zip(*alone, strict=True):
        fused.theta_step_(*listed(theta, gradient, state, phi), **case.form)
    for count in (1, 2):
        with threads(count):
            results.append(lists())
            fused.theta_step_(*results[-1], phi, **case.form)
    for together in results:
        for one, other in zip(alone, together, strict=True):
            assert all(map(torch.equal, one, other))
    assert not torch.equal(alone[0][5], given[5]["theta"])


def test_the_inputs_are_left_alone(level, fused):
    """theta_step_ writes theta and state and nothing else; the others write nothing."""
    case = Case(70, 2, 5, True, True, steps=3)
    given = arguments(case)
    before = {name: tensor.clone() for name, tensor in given.items()}
    run_gradients(fused, case, given)
    run_unroll(fused, case, given)
    fused.theta_step_(*listed(*(given[name] for name in STEP)), **case.form)
    changed = {name for name in given if not torch.equal(given[name], before[name])}
    assert changed == {"theta", "state"}


def test_no_steps_have_no_gradient(level, fused):
    case = Case(9, theta_input=True, steps=0)
    given = arguments(case)
    assert torch.equal(run_unroll(fused, case, given)[0], torch.zeros_like(given["phi"]))


@pytest.mark.parametrize("odd", [False, True])
def test_what_phi_does_not_see_is_not_read_and_needs_no_graph(level, fused, odd):
    case = Case(70, 2, 5, odd=odd, steps=3)
    given = arguments(case)
    given["thetas"].fill_(torch.nan)
    given["phi"].requires_grad_()
    d_phi = fused.unroll_meta_gradient(*(given[name] for name in UNROLL), **case.form)
    assert torch.equal(d_phi, run_unroll(fused, case, given)[0]) and not d_phi.requires_grad
