"""The fused operators as PyTorch's: derivatives, opcheck, torch.compile, versions, memory."""

import ctypes
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import every_form, random_phi
from engine_cases import BACKWARD, RUNS, STEP, UNROLL, Case, arguments, expect_close, listed

from l2l_ref import equations

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")
COMPILE = partial(torch.compile, fullgraph=True, backend="aot_eager")  # no code is generated
OPERATORS = {
    "theta_step_": STEP,
    "theta_step": STEP,
    "theta_step_backward": BACKWARD,
    "unroll_meta_gradient": UNROLL,
}


def take(case: Case, names, dtype=torch.float64, requires_grad=False, device="cpu") -> list:
    """Those arguments of a case."""
    given = arguments(case, dtype)
    return [given[name].to(device).requires_grad_(requires_grad) for name in names]


@every_form
class TestDerivatives:
    def test_gradgradcheck(self, fused, theta_input, odd):
        case = Case(2, 2, 2, theta_input, odd, p=2.0)
        inputs = take(case, STEP, requires_grad=True)
        step = partial(fused.theta_step, **case.form)
        assert torch.autograd.gradgradcheck(step, inputs, nondet_tol=0.0)

    def test_cotangents_of_any_layout(self, fused, theta_input, odd):
        """Autograd makes them: here a broadcast one and a transposed one."""
        case, grads = Case(4, 1, 3, theta_input, odd), []
        inputs = take(case, STEP, requires_grad=True)
        for module in (fused, equations):
            theta, state = module.theta_step(*inputs, **case.form)
            loss = theta.sum() + state.transpose(2, 3).square().sum()
            grads.append(torch.autograd.grad(loss, inputs))
        expect_close(*grads, 1e-10)


class TestRegistration:
    @pytest.mark.parametrize("theta_input, odd", [(False, True), (True, False)])
    @pytest.mark.parametrize("name", OPERATORS)
    def test_opcheck(self, fused, device, name, theta_input, odd):
        case = Case(5, 2, 3, theta_input, odd, steps=2)
        differentiable = name in ("theta_step", "theta_step_backward")
        inputs = take(case, OPERATORS[name], torch.float32, differentiable, device)
        if name == "unroll_meta_gradient" and not theta_input:
            inputs[-1] = None
        if name == "theta_step_":
            inputs = listed(*inputs)
        operator = getattr(torch.ops.l2l_ref, name).default
        torch.library.opcheck(operator, tuple(inputs), case.form)

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
        list(zip(("theta_step_", "theta_step", "unroll_meta_gradient"), RUNS, strict=True)),
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

    @linux
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

    @linux
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
