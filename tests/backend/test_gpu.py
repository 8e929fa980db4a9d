"""What only the GPU's kernels have: launches shaped by the device, and CUDA's own semantics.

On the host the kernels run for any GPU one can imagine (`l2l_ref_emulated`), thread by thread, in
an order that changes from barrier to barrier: where one is missing, a number is wrong.
"""

from functools import partial

import pytest
import torch
from conftest import every_form, use_emulated
from engine_cases import (
    RUNS,
    STEP,
    Case,
    arguments,
    expect_close,
    expected,
    listed,
    run_unroll,
    run_update,
    trajectory,
)

from l2l_ref import equations
from l2l_ref.backend import BUILD_CUDA, build_info, operators, resolve, use_tensor_cores

KB = 1024
# processors, shared memory of a block and of a processor
GPUS = {
    "H200": (132, 227 * KB, 228 * KB),
    "A100": (108, 163 * KB, 164 * KB),
    "RTX 4090": (128, 99 * KB, 100 * KB),
    "T4": (40, 64 * KB, 64 * KB),
    "one processor": (1, 227 * KB, 228 * KB),
    "little shared memory": (1, 24 * KB, 48 * KB),
}
*SMALL, LITTLE = GPUS
on_gpu = partial(arguments, dtype=torch.float32, device="cuda")


@pytest.fixture
def emulate(fused, monkeypatch):
    """name of a GPU, tensor_cores -> the emulated kernels run as on that GPU."""
    use_machine = torch.ops.l2l_ref_emulated.use_machine
    use_emulated(fused, monkeypatch)
    yield lambda name, tensor_cores=False: use_machine(*GPUS[name], tensor_cores)
    use_machine(2, *GPUS["H200"][1:], False)


class TestLaunches:
    @every_form
    @pytest.mark.parametrize(
        "n, layers, hidden",
        [(1, 2, 20), (33, 1, 1), (70, 2, 28), (130, 3, 7), (777, 2, 20), (2000, 2, 19)],
    )
    def test_every_gpu(self, fused, emulate, n, layers, hidden, theta_input, odd):
        """Blocks of 32 to 256 lanes, one to many blocks, runs of blocks a processor. A step has the
        same bits on each; on tensor cores, as three products of numbers with 11 digits, nearly."""
        case = Case(n, layers, hidden, theta_input, odd, steps=2)
        for dtype, of_step, of_sum in ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4)):
            given, steps = arguments(case, dtype), []
            for gpu in SMALL:
                emulate(gpu, tensor_cores=True)
                expect_close(run_update(fused, case, given), expected(run_update, case), of_step)
                emulate(gpu)
                steps.append(run_update(fused, case, given))
                assert all(map(torch.equal, steps[0], steps[-1]))
                expect_close(run_unroll(fused, case, given), expected(run_unroll, case), of_sum)
            expect_close(steps[0], expected(run_update, case), of_step)

    @pytest.mark.parametrize("run", RUNS)
    def test_what_does_not_fit_is_refused(self, fused, emulate, run):
        """Nothing is written either."""
        emulate(LITTLE)
        case = Case(9, 2, 5)
        expect_close(run(fused, case, arguments(case)), expected(run, case), 1e-10)
        case = Case(9, 2, 32)
        given = arguments(case)
        with pytest.raises(RuntimeError, match="32 units need more shared memory than"):
            run(fused, case, given)
        assert all(torch.equal(given[name], x) for name, x in arguments(case).items())


class TestTensorCores:
    def test_they_are_used_and_only_where_they_serve(self, fused, emulate):
        """The same bits as without, but for float32 and up to 20 units."""
        float32, float64 = torch.float32, torch.float64
        for hidden, dtype, same in ((20, float32, False), (21, float32, True), (20, float64, True)):
            case, results = Case(300, 2, hidden), []
            for tensor_cores in (False, True):
                emulate("H200", tensor_cores)
                results.append(run_update(fused, case, arguments(case, dtype)))
            assert all(map(torch.equal, *results)) == same

    def test_a_trajectory_of_100_steps(self, fused, emulate, record_property):
        """As near to float64 as multiply-adds in float32, where errors feed back."""
        case, errors = Case(200, 2, 20, output_scale=0.02), []
        reference = trajectory(equations, case, torch.float64)[0][-1]
        for tensor_cores in (False, True):
            emulate("H200", tensor_cores)
            theta = trajectory(fused, case, torch.float32)[0][-1]
            errors.append(float((theta.double() - reference).norm() / reference.norm()))
        record_property("relative error of θ: multiply-adds, tensor cores", errors)
        assert errors[1] <= 1e-6 + 2 * errors[0]

    def test_on_a_gpu(self, cuda):
        if torch.cuda.get_device_capability()[0] < 8:
            pytest.skip("no tensor cores for TF32")
        case, results = Case(10_000, 2, 20, True, True), []
        for on in (True, False):
            use_tensor_cores(on)
            results.append([x.cpu() for x in run_update(cuda, case, on_gpu(case))])
            expect_close(results[-1], expected(run_update, case), 1e-5)
        assert not torch.equal(results[0][0], results[1][0])


def test_no_register_is_spilled():
    """ptxas's own count, of every kernel, from the build, by the toolkit that we know."""
    info = build_info()
    if info is None or info["cuda"] is None:
        pytest.skip(f"the CUDA engine is not built, or torch is without CUDA: {BUILD_CUDA}")
    spilled = dict(part.split(":") for part in info["cuda"]["spilled"].split())
    checked = {"sm_80", "sm_90"} & spilled.keys()
    if info["cuda"]["nvcc"] != "13.0" or not checked:
        pytest.skip(f"nvcc {info['cuda']['nvcc']} spills, in bytes: {info['cuda']['spilled']}")
    assert {name: spilled[name] for name in checked} == dict.fromkeys(checked, "0")


@pytest.fixture
def cuda(fused):
    """The functions of `fused`, on CUDA tensors."""
    return fused


class TestCuda:
    def test_it_is_chosen(self, cuda, recwarn):
        assert resolve("auto", "cuda") == "fused"
        state = torch.zeros(2, 2, 56, 3, device="cuda")
        assert operators("auto", state) is cuda
        assert len(recwarn) == 0
        with pytest.warns(UserWarning, match="shared memory for 256 hidden units on cuda:0"):
            assert operators("auto", torch.zeros(2, 2, 256, 3, device="cuda")) is equations

    def test_the_current_stream(self, cuda):
        """Work waits for what its stream waits for: a step after a long kernel on a side stream
        reads what that kernel wrote."""
        case = Case(5000)
        given = on_gpu(case)
        reference = run_update(cuda, case, given)
        late = {name: torch.zeros_like(x) for name, x in given.items()}
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            for name, x in given.items():
                late[name].copy_(x)
            actual = run_update(cuda, case, late)
        side.synchronize()
        assert all(map(torch.equal, actual, reference))

    def test_a_cuda_graph(self, cuda):
        """Captured once, replayed: the trajectory of eager calls."""
        case = Case(3000, 2, 20, True, True, steps=4)
        own, twin = on_gpu(case), on_gpu(case)

        def work(tensors):
            cuda.theta_step_(*listed(*(tensors[name] for name in STEP)), **case.form)
            return run_unroll(cuda, case, tensors)[0]

        with torch.cuda.stream(torch.cuda.Stream()):
            work(own)  # warm
        torch.cuda.synchronize()
        work(twin)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            d_phi = work(own)
        for _ in range(5):
            graph.replay()
            assert torch.equal(d_phi, work(twin))
        assert all(torch.equal(own[name], twin[name]) for name in STEP)

    def test_a_step_in_place_allocates_nothing(self, cuda):
        case = Case(1000, 2, 20, True, True)
        given = on_gpu(case)
        step = [given[name] for name in STEP]
        cuda.theta_step_(*listed(*step), **case.form)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cuda.theta_step_(*listed(*step), **case.form)
        assert torch.cuda.max_memory_allocated() == before

    def test_tensors_of_different_devices_are_refused(self, cuda):
        case = Case(6, 2, 4, steps=3)
        for name in STEP:
            given = on_gpu(case) | {name: arguments(case, torch.float32)[name]}
            with pytest.raises(RuntimeError, match="is not on|on cuda:0"):
                cuda.theta_step_(*listed(*(given[n] for n in STEP)), **case.form)

    def test_more_elements_than_an_int_counts(self, cuda):
        """State beyond 2^31 elements: the last coordinates are as if alone."""
        n = 27_000_001
        case = Case(n)
        if torch.cuda.mem_get_info()[0] < 3 * 4 * 80 * n:
            pytest.skip("not enough memory on the GPU")
        few = Case(1000)
        some = on_gpu(few)
        theta, gradient = (some[name].repeat(n // 1000 + 1)[:n] for name in ("theta", "gradient"))
        state = torch.empty(case.state_shape, device="cuda")
        rows = some["state"].flatten(0, 2)
        for own, row in zip(state.flatten(0, 2), rows, strict=True):  # no second copy of it all
            own.copy_(row.repeat(n // 1000 + 1)[:n])
        cuda.theta_step_([theta], [gradient], [state], some["phi"], **case.form)
        u, h, c = run_update(cuda, few, some)
        last = slice(n - n % 1000 - 1000, n - n % 1000)
        torch.testing.assert_close(theta[last], some["theta"] + u, rtol=0, atol=1e-6)
        assert torch.equal(state[:, 0, :, last], h) and torch.equal(state[:, 1, :, last], c)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
    def test_several_gpus(self, cuda):
        """Each in turn, whatever the current device."""
        case, results = Case(500, 2, 20, steps=2), []
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            given = on_gpu(case, device=device)
            found = [*run_update(cuda, case, given), *run_unroll(cuda, case, given)]
            assert all(str(x.device) == device for x in found)
            results.append([x.cpu() for x in found])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
