"""The fused operators as PyTorch's: derivatives, opcheck, torch.compile, versions, memory."""

import ctypes
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import cpu_levels, every_form
from engine_cases import OPERATORS, RUNS, STEP, Case, arguments, listed, run_all

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")
COMPILE = partial(torch.compile, fullgraph=True, backend="aot_eager")  # no code is generated


def take(case: Case, names, dtype=torch.float64, requires_grad=False, device="cpu") -> list:
    """Those arguments of a case."""
    given = arguments(case, dtype, device)
    return [given[name].requires_grad_(requires_grad) for name in names]


@every_form
def test_gradgradcheck(fused, theta_input, odd):
    case = Case(2, 2, 2, theta_input, odd, p=2.0)
    inputs = take(case, STEP, requires_grad=True)
    step = partial(fused.theta_step, **case.form)
    assert torch.autograd.gradgradcheck(step, inputs, nondet_tol=0.0)


class TestRegistration:
    @pytest.mark.parametrize("theta_input, odd", [(False, True), (True, False)])
    @pytest.mark.parametrize("name", OPERATORS)
    def test_opcheck(self, fused, device, name, theta_input, odd):
        """With autograd's own cotangents too, which are broadcast."""
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
    def test_autograd_notices_a_tensor_changed_in_place(self, fused, owner):
        case = Case(5, 2, 3)
        inputs = take(case, STEP)
        versions = [x._version for x in inputs]
        saved = [(torch.ones_like(x, requires_grad=True) * x).sum() for x in inputs]
        step = (fused if owner == "function" else torch.ops.l2l_ref).theta_step_
        step(*listed(*inputs), **case.form)
        changed = [x._version > before for x, before in zip(inputs, versions, strict=True)]
        assert changed == [True, False, True, False]
        for loss in saved[::2]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize(
    "name, run", list(zip(("theta_step_", "theta_step", "unroll_meta_gradient"), RUNS, strict=True))
)
def test_compiled(fused, name, run):
    """Whole graphs, without a break; then with another N and another form."""
    torch._dynamo.reset()
    compiled = SimpleNamespace(**{name: COMPILE(getattr(fused, name))})
    for case in (Case(5, 2, 3, steps=2), Case(70, 2, 3, steps=2),
                 Case(6, 1, 4, True, True, steps=3)):  # fmt: skip
        given = arguments(case, torch.float32)
        assert all(map(torch.equal, run(compiled, case, given), run(fused, case, given)))
    torch._dynamo.reset()


@cpu_levels
class TestMemory:
    def test_a_step_in_place_allocates_no_tensors(self, level, fused):
        case = Case(1000, 2, 20, True, True)
        inputs = take(case, STEP, torch.float32)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            fused.theta_step_(*listed(*inputs), **case.form)
        events = {event.key: event for event in profile.key_averages()}
        assert "l2l_ref::theta_step_" in events
        assert [e.key for e in events.values() if e.cpu_memory_usage or e.key == "[memory]"] == []

    @linux
    def test_nor_scratch_once_it_is_warm(self, level, fused):
        """Were some MB mapped anew in every step, each of them would fault."""
        case = Case(10, 1, 256)  # a packed φ of 2 MB
        inputs = take(case, STEP, torch.float32)
        resource = pytest.importorskip("resource")
        mmap_threshold, default = -3, 128 * 1024
        ctypes.CDLL(None).mallopt(mmap_threshold, default)  # and keep it there

        def faults(calls):
            for _ in range(calls):
                fused.theta_step_(*listed(*inputs), **case.form)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        assert -faults(5) + faults(50) < 25

    @linux
    def test_a_thousand_calls_do_not_grow_the_process(self, level, fused):
        case = Case(100, 2, 20, True, True, steps=3)
        given = arguments(case, torch.float32)

        def resident(calls):
            for _ in range(calls):
                run_all(fused, case, given)
            return int(Path("/proc/self/statm").read_text().split()[1])

        # In pages of 4 kB; a φ alone is 21 kB a call.
        assert -resident(10) + resident(1000) < 250
