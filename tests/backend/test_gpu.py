"""What only the GPU's kernels have: launches shaped by the device, and CUDA's own semantics.

On the host the kernels run for any GPU one can imagine (`l2l_ref_emulated`), thread by thread, in
an order that changes from barrier to barrier: where one is missing, a number is wrong.
"""

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
from l2l_ref.errors import InputError

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
SMALL = [gpu for gpu in GPUS if gpu != "little shared memory"]


@pytest.fixture
def emulate(fused, monkeypatch):
    """name of a GPU, tensor_cores -> the emulated kernels run as on that GPU."""
    use_machine = torch.ops.l2l_ref_emulated.use_machine
    use_emulated(fused, monkeypatch)
    yield lambda name, tensor_cores=False: use_machine(*GPUS[name], tensor_cores)
    use_machine(2, *GPUS["H200"][1:], False)


class TestLaunches:
    @every_form
    @pytest.mark.parametrize("gpu", SMALL)
    def test_every_gpu_has_the_same_results(self, fused, emulate, gpu, theta_input, odd):
        """Blocks of 32 to 256 lanes, one to many blocks, runs of blocks a processor."""
        emulate(gpu)
        for n, hidden in ((1, 20), (70, 28), (130, 20), (777, 20), (2000, 9)):
            case = Case(n, 2, hidden, theta_input, odd, steps=2)
            for dtype, *tolerances in ((torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4)):
                given = arguments(case, dtype)
                for run, tolerance in zip((run_update, run_unroll), tolerances, strict=True):
                    expect_close(run(fused, case, given), expected(run, case), tolerance)

    def test_a_step_has_the_same_bits_on_every_gpu(self, fused, emulate):
        case, results = Case(777, 2, 20, True, True), []
        for gpu in SMALL:
            emulate(gpu)
            results.append(run_update(fused, case, arguments(case, torch.float32)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))

    @pytest.mark.parametrize("run", RUNS)
    def test_what_does_not_fit_is_refused(self, fused, emulate, run):
        """Nothing is written either."""
        emulate("little shared memory")
        case = Case(9, 2, 5)
        expect_close(run(fused, case, arguments(case)), expected(run, case), 1e-10)
        case = Case(9, 2, 32)
        given = arguments(case)
        before = given["theta"].clone(), given["state"].clone()
        with pytest.raises(RuntimeError, match="32 units need more shared memory than"):
            run(fused, case, given)
        assert torch.equal(given["theta"], before[0]) and torch.equal(given["state"], before[1])


class TestTensorCores:
    """Steps of up to 20 units in float32, as three products of numbers with 11 digits."""

    @every_form
    @pytest.mark.parametrize("gpu", SMALL)
    def test_update(self, fused, emulate, gpu, theta_input, odd):
        emulate(gpu, tensor_cores=True)
        for n, layers, hidden in ((1, 2, 20), (33, 1, 1), (130, 3, 7), (777, 2, 20), (2000, 2, 19)):
            case = Case(n, layers, hidden, theta_input, odd)
            given = arguments(case, torch.float32)
            expect_close(run_update(fused, case, given), expected(run_update, case), 1e-5)

    def test_they_are_used_and_only_where_they_serve(self, fused, emulate):
        """The same bits as without, but for float32 and up to 20 units."""
        for hidden, dtype, same in (
            (20, torch.float32, False),
            (21, torch.float32, True),
            (20, torch.float64, True),
        ):
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

    def test_they_need_cuda(self, monkeypatch):
        monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": kind == "cpu")
        with pytest.raises(InputError, match="tensor cores need the fused engine with CUDA: 'U"):
            use_tensor_cores(True)

    def test_on_a_gpu(self, cuda):
        if torch.cuda.get_device_capability()[0] < 8:
            pytest.skip("no tensor cores for TF32")
        case, results = Case(10_000, 2, 20, True, True), []
        try:
            for on in (False, True):
                use_tensor_cores(on)
                results.append(run_update(cuda, case, on_gpu(case)))
        finally:
            use_tensor_cores(False)
        reference = expected(run_update, case)
        for result in results:
            expect_close([x.cpu() for x in result], reference, 1e-5)
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


def on_gpu(case: Case, names=None, dtype=torch.float32, device="cuda"):
    given = {name: x.to(device) for name, x in arguments(case, dtype).items()}
    return given if names is None else [given[name] for name in names]


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
        given = on_gpu(case)
        tensors = {name: given[name].clone() for name in STEP}
        step = [tensors[name] for name in STEP]
        side, d_phi = torch.cuda.Stream(), []

        def work():
            cuda.theta_step_(*listed(*step), **case.form)
            return run_unroll(cuda, case, given)[0]

        with torch.cuda.stream(side):
            work()  # warm
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        for name in STEP:
            tensors[name].copy_(given[name])
        for _ in range(5):
            graph.replay()
            d_phi.append(captured.clone())
        theta, state = given["theta"].clone(), given["state"].clone()
        for _ in range(5):
            cuda.theta_step_([theta], [given["gradient"]], [state], given["phi"], **case.form)
        assert torch.equal(tensors["theta"], theta) and torch.equal(tensors["state"], state)
        (alone,) = run_unroll(cuda, case, given)
        assert all(torch.equal(each, alone) for each in d_phi)

    def test_a_step_in_place_allocates_nothing(self, cuda):
        case = Case(1000, 2, 20, True, True)
        step = on_gpu(case, STEP)
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
        for row in range(40):  # without a second copy of it all
            at = divmod(row, 20)
            for part in (0, 1):
                own = some["state"][at[0], part, at[1]]
                state[at[0], part, at[1]] = own.repeat(n // 1000 + 1)[:n]
        cuda.theta_step_([theta], [gradient], [state], some["phi"], **case.form)
        u, h, c = run_update(cuda, few, some)
        last = slice(n - n % 1000 - 1000, n - n % 1000)
        torch.testing.assert_close(theta[last], some["theta"] + u, rtol=0, atol=1e-6)
        assert torch.equal(state[:, 0, :, last], h) and torch.equal(state[:, 1, :, last], c)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
    def test_several_gpus(self, cuda):
        """Each in turn, whatever the current device."""
        case = Case(500, 2, 20, steps=2)
        results = []
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            given = on_gpu(case, device=device)
            results.append([*run_update(cuda, case, given), *run_unroll(cuda, case, given)])
            assert all(str(x.device) == device for x in results[-1])
            results[-1] = [x.cpu() for x in results[-1]]
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
