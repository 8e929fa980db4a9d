"""Who runs: backend chooses as it says."""

import warnings
from unittest.mock import Mock

import pytest
import torch
from conftest import cpu_levels, random_phi
from torch import nn

from l2l_ref import equations
from l2l_ref.backend import _warn, build_info, operators, resolve, use_tensor_cores
from l2l_ref.errors import InputError
from l2l_ref.optimizer import LearnedOptimizer


@pytest.fixture(autouse=True)
def anew():
    """The one warning is given anew in each test, and the choice is made anew."""
    _warn.cache_clear()
    resolve.cache_clear()
    yield
    resolve.cache_clear()


def state(hidden=20, dtype=torch.float32, device="cpu"):
    return torch.zeros(2, 2, hidden, 3, dtype=dtype, device=device)


def test_fused_where_it_serves_and_the_reference_on_demand(fused, recwarn):
    for backend in ("auto", "fused"):
        assert resolve(backend) == "fused"
        for served in (state(), state(dtype=torch.float64), state(hidden=256)):
            assert operators(backend, served) is fused
    assert operators("reference", state()) is equations
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    "given, words",
    [
        (state(dtype=torch.bfloat16), "torch.bfloat16, only float32 and float64"),
        (state(hidden=257), "257 hidden units, only up to 256"),
        (state(device="meta"), "does not run on meta"),
    ],
)
def test_what_it_does_not_serve(fused, given, words):
    with pytest.warns(UserWarning, match=words):
        assert operators("auto", given) is equations
    resolve.cache_clear()
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert operators("auto", given) is equations
        assert operators("reference", given) is equations
    with pytest.raises(InputError, match=words + ".*or use backend 'reference'"):
        operators("fused", given)


@pytest.mark.parametrize(
    "halves, device, words",
    [
        ((), "cpu", "needs the compiled extension.*build_ext --inplace"),
        (("cpu",), "cuda:1", "was built without CUDA.*USE_CUDA=1 python setup.py"),
    ],
)
def test_not_built(fused, monkeypatch, halves, device, words):
    monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": kind in halves)
    with pytest.warns(UserWarning, match=words):
        assert resolve("auto", device) == "reference"
    with pytest.raises(InputError, match=f"'fused' {words}"):
        resolve("fused", device)
    if halves:
        assert resolve("fused") == "fused" and build_info()["cuda"] is None
        with pytest.raises(InputError, match="tensor cores need the fused engine with CUDA: 'U"):
            use_tensor_cores(True)
    else:
        assert operators("auto", state()) is equations and build_info() is None
        with pytest.raises(InputError, match=f"'fused' {words}"):
            LearnedOptimizer([nn.Parameter(torch.zeros(2))], random_phi(), backend="fused")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_with_too_little_shared_memory(fused, monkeypatch, dtype):
    """Asked by way of a state that says it is on CUDA."""
    cuda = Mock(serves=Mock(side_effect=[True, False, False]))
    monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": True)
    monkeypatch.setattr("l2l_ref.backend.import_module", lambda name: cuda)
    own = Mock(shape=(2, 2, 56, 3), dtype=dtype, device=torch.device("cuda:1"))
    assert operators("auto", own) is fused
    resolve.cache_clear()
    with pytest.warns(UserWarning, match="memory for 56 hidden units on cuda:1"):
        assert operators("auto", own) is equations
    with pytest.raises(InputError, match="'fused' has too little shared memory for"):
        operators("fused", own)
    cuda.serves.assert_called_with(2, 56, dtype == torch.float64, 1)


@cpu_levels
def test_build_info(level):
    info = build_info()
    assert info["kernel"] == level and level in info["kernels"]
    assert info["kernels"][-1] == "baseline" and info["compiler"]
    oldest, own = ([*map(int, v.split("+")[0].split(".")[:2])]
                   for v in (info["stable_abi"], torch.__version__))  # fmt: skip
    assert oldest <= own


def test_inference_mode(backend):
    """A step under inference_mode changes the parameters as one under no_grad."""
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        param = nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = LearnedOptimizer([param], random_phi(), backend=backend)
        for _ in range(3):
            param.grad = param.detach().square()
            with mode():
                optimizer.step()
        results.append(param.detach().clone())
    assert torch.equal(*results) and not torch.equal(results[0], torch.linspace(-1, 1, 5))
