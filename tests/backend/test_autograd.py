"""The fused operators as PyTorch's: derivatives, opcheck, torch.compile, versions, memory."""

import ctypes
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import every_form, random_phi
from engine_cases import (
    BACKWARD,
    RUNS,
    STEP,
    UNROLL,
    Case,
    arguments,
    expect_close,
    listed,
    run_gradients,
    run_unroll,
    run_update,
)

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="needs glibc's mallinfo2",
)
COMPILE = partial(torch.compile, fullgraph=True, backend="aot_eager")  # no code is generated
OPERATORS = {
    "preprocess": ("gradient",),
    "preprocess_backward": ("gradient", "gradients"),
    "theta_step_": STEP,
    "theta_step": STEP,
    "theta_step_backward": BACKWARD,
    "unroll_meta_gradient": UNROLL,
}


def take(case: Case, names, dtype=torch.float64, requires_grad=(), device="cpu") -> list:
    """Those arguments of a case."""
    given = arguments(case, dtype)
    return [given[name].to(device).requires_grad_(name in requires_grad) for name in names]


class TestDerivatives:
    @every_form
    @pytest.mark.parametrize("layers", [1, 2])
    def test_gradcheck(self, level, fused, layers, theta_input, odd):
        case = Case(3, layers, 3, theta_input, odd, p=2.0)
        inputs = take(case, STEP, requires_grad=STEP)
        assert torch.autograd.gradcheck(lambda *a: fused.theta_step(*a, **case.form), inputs)

    @every_form
    def test_gradgradcheck(self, fused, theta_input, odd):
        case = Case(2, 2, 2, theta_input, odd, p=2.0)
        inputs = take(case, STEP, requires_grad=STEP)
        assert torch.autograd.gradgradcheck(
            lambda *a: fused.theta_step(*a, **case.form), inputs, nondet_tol=0.0
        )

    @pytest.mark.parametrize("name", STEP)
    def test_only_what_is_asked_for(self, fused, name):
        """With one input that requires a gradient, and with only one output used."""
        case = Case(5, 2, 4, True, True)
        every = take(case, STEP, requires_grad=STEP)
        one = take(case, STEP, requires_grad=[name])
        at = STEP.index(name)
        for output in (0, 1):
            (expected,) = torch.autograd.grad(
                fused.theta_step(*every, **case.form)[output].square().sum(), every[at]
            )
            fused.theta_step(*one, **case.form)[output].square().sum().backward()
            torch.testing.assert_close(one[at].grad, expected)
            one[at].grad = None
        assert all(x.grad is None for x in one)

    @every_form
    @pytest.mark.parametrize("moved_by_phi_alone", [True, False])
    def test_through_several_steps(self, level, fused, theta_input, odd, moved_by_phi_alone):
        """Autograd through an unroll of fused steps, each from the θ that it saw, is the closed
        form, whatever moved θ in between."""
        case = Case(9, 2, 5, theta_input, odd, steps=4)
        given = arguments(case)
        phi, state = given["phi"].clone().requires_grad_(), given["state"]
        rows = zip(given["thetas"], given["gradients"], given["cotangents"], strict=True)
        after, seen, total = given["theta"], [], 0.0
        for theta, gradient, cotangent in rows:
            seen.append(after.detach() if moved_by_phi_alone else theta)
            after, state = fused.theta_step(seen[-1], gradient, state, phi, **case.form)
            total = total + ((after - seen[-1]) * cotangent).sum()
        expected = torch.autograd.grad(total, phi)
        given["thetas"] = torch.stack(seen)
        expect_close(run_unroll(fused, case, given), expected, 1e-10)

    def test_results_require_nothing_without_need(self, fused):
        case = Case(5)
        assert not any(x.requires_grad for x in fused.theta_step(*take(case, STEP), **case.form))
        with torch.no_grad():
            inputs = take(case, STEP, requires_grad=STEP)
            outputs = fused.theta_step(*inputs, **case.form)
        assert not any(x.requires_grad for x in outputs)


class TestRegistration:
    @pytest.mark.parametrize("theta_input, odd", [(False, True), (True, False)])
    @pytest.mark.parametrize("name", OPERATORS)
    def test_opcheck(self, fused, device, name, theta_input, odd):
        case = Case(5, 2, 3, theta_input, odd, steps=2)
        operator = getattr(torch.ops.l2l_ref, name).default
        differentiable = name not in ("theta_step_", "unroll_meta_gradient")
        names = OPERATORS[name]
        inputs = take(case, names, torch.float32, device=device)
        inputs = [x.requires_grad_(differentiable) for x in inputs]
        if name == "unroll_meta_gradient" and not theta_input:
            inputs[-1] = None
        if name == "theta_step_":
            inputs = listed(*inputs)
        form = {"p": case.p} if name.startswith("preprocess") else case.form
        torch.library.opcheck(operator, tuple(inputs), form)

    @pytest.mark.parametrize("owner", ["function", "operator"])
    @pytest.mark.parametrize("name, at", [("theta", 0), ("state", 2)])
    def test_autograd_notices_a_tensor_changed_in_place(self, fused, owner, name, at):
        case = Case(5, 2, 3)
        inputs = take(case, STEP)
        versions = [x._version for x in inputs]
        factor = torch.ones_like(inputs[at], requires_grad=True)
        saved = (factor * inputs[at]).sum()
        step = (fused if owner == "function" else torch.ops.l2l_ref).theta_step_
        step(*listed(*inputs), **case.form)
        changed = [x._version > before for x, before in zip(inputs, versions, strict=True)]
        assert changed == [True, False, True, False]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()

    def test_a_step_saved_for_backward_is_guarded_too(self, fused):
        case = Case(5, 2, 3)
        inputs = take(case, STEP, requires_grad=["phi"])
        after, _ = fused.theta_step(*inputs, **case.form)
        fused.theta_step_(*listed(*inputs), **case.form)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            after.sum().backward()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
class TestCompile:
    """Whole graphs, compiled without a break; then with another N and another form."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "name, run",
        [
            ("theta_step_", run_update),
            ("theta_step", run_gradients),
            ("unroll_meta_gradient", run_unroll),
        ],
    )
    def test_an_operator(self, fused, name, run):
        compiled = SimpleNamespace(**{name: COMPILE(getattr(fused, name))})
        for case in (
            Case(5, 2, 3, steps=2),
            Case(70, 2, 3, steps=2),
            Case(6, 1, 4, True, True, steps=3),
        ):
            given = arguments(case, torch.float32)
            assert all(map(torch.equal, run(compiled, case, given), run(fused, case, given)))

    def test_in_the_middle_of_a_graph(self, fused):
        case = Case(5, 2, 3)

        def two_steps(theta, gradient, state, phi):
            theta, state = theta * 1, state * 1
            for _ in range(2):
                fused.theta_step_([theta], [gradient + theta], [state], phi, **case.form)
            return theta + 1, state

        inputs = take(case, STEP, torch.float32)
        actual = COMPILE(two_steps)(*inputs)
        expect_close(actual, two_steps(*inputs), 1e-6)

    @pytest.mark.parametrize("backend", ["auto", "fused"])
    def test_meta_optimizer(self, fused, backend):
        """Dynamo follows a module with an nn.LSTM in it only with allow_rnn."""
        meta = random_phi(hidden_size=4)
        inputs = torch.zeros(5), torch.linspace(-1, 1, 5), meta.init_state(5)
        results = []
        with torch._dynamo.config.patch(allow_rnn=True):
            for call in (COMPILE(meta), meta):
                theta, state = call(*inputs, backend=backend)
                d_phi = torch.autograd.grad(theta.square().sum(), list(meta.parameters()))
                results.append([theta.detach(), state.detach(), *d_phi])
        expect_close(*results, 1e-6)
        assert results[1][-2].abs().sum() > 0


class TestMemory:
    def test_a_step_in_place_allocates_no_tensors(self, cpu_level, fused):
        case = Case(1000, 2, 20, True, True)
        inputs = take(case, STEP, torch.float32)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            fused.theta_step_(*listed(*inputs), **case.form)
        events = {event.key: event for event in profile.key_averages()}
        assert "l2l_ref::theta_step_" in events
        assert [e.key for e in events.values() if e.cpu_memory_usage or e.key == "[memory]"] == []

    @glibc
    def test_nor_scratch_once_it_is_warm(self, cpu_level, fused):
        """Were some MB mapped anew in every step, each of them would fault."""
        case = Case(10, 1, 256)  # a packed φ of 2 MB
        inputs = take(case, STEP, torch.float32)
        resource = pytest.importorskip("resource")
        mmap_threshold, default = -3, 128 * 1024
        ctypes.CDLL(None).mallopt(mmap_threshold, default)  # and keep it there
        for _ in range(5):
            fused.theta_step_(*listed(*inputs), **case.form)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            fused.theta_step_(*listed(*inputs), **case.form)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 25

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
    @pytest.mark.parametrize("run", RUNS)
    def test_a_thousand_calls_do_not_grow_the_process(self, cpu_level, fused, run):
        case = Case(100, 2, 20, True, True, steps=3)
        given = arguments(case, torch.float32)

        def grown(calls):
            before = resident()
            for _ in range(calls):
                run(fused, case, given)
            return resident() - before

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1])

        grown(10)
        assert grown(1000) < 250  # pages of 4 kB; a φ alone is 21 kB a call
