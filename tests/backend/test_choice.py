"""Who runs: backend chooses as it says, and nobody who uses it can tell who ran."""

import warnings
from unittest.mock import MagicMock

import pytest
import torch
from conftest import generator, random_phi, weights
from torch import nn

from l2l_ref import equations
from l2l_ref.backend import _operators, _warn, build_info, operators, resolve
from l2l_ref.errors import InputError
from l2l_ref.optimizer import LearnedOptimizer


@pytest.fixture(autouse=True)
def anew():
    """The one warning is given anew in each test, and the choice is made anew."""
    _warn.cache_clear()
    _operators.cache_clear()
    yield
    _operators.cache_clear()


def state(hidden=20, dtype=torch.float32, device="cpu"):
    return torch.zeros(2, 2, hidden, 3, dtype=dtype, device=device)


class OfAGpu:
    """The CUDA half of the engine, for a GPU with the shared memory of a T4."""

    @staticmethod
    def serves(layers, units, float64, device):
        assert (layers, device) == (2, 1)
        return units <= (28 if float64 else 56)


class TestChoice:
    def test_fused_where_it_serves_and_the_reference_on_demand(self, fused, recwarn):
        for backend in ("auto", "fused"):
            assert resolve(backend) == "fused"
            for served in (state(), state(dtype=torch.float64), state(hidden=256)):
                assert operators(backend, served) is fused
        assert resolve("reference") == "reference"
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
    def test_what_it_does_not_serve(self, fused, given, words):
        with pytest.warns(UserWarning, match=words):
            assert operators("auto", given) is equations
        _operators.cache_clear()
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
    def test_not_built(self, fused, monkeypatch, halves, device, words):
        monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": kind in halves)
        with pytest.warns(UserWarning, match=words):
            assert resolve("auto", device) == "reference"
        with pytest.raises(InputError, match=f"'fused' {words}"):
            resolve("fused", device)
        if halves:
            assert resolve("fused") == "fused" and build_info()["cuda"] is None
        else:
            assert operators("auto", state()) is equations and build_info() is None
            with pytest.raises(InputError, match=f"'fused' {words}"):
                LearnedOptimizer([nn.Parameter(torch.zeros(2))], random_phi(), backend="fused")

    def test_a_gpu_with_too_little_shared_memory(self, fused, monkeypatch):
        """Asked by way of a state that says it is on CUDA."""
        monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": True)
        monkeypatch.setattr("l2l_ref.backend.import_module", lambda name: OfAGpu)
        for dtype, most in ((torch.float32, 56), (torch.float64, 28)):
            fits, large = (
                MagicMock(shape=(2, 2, units, 3), dtype=dtype, device=torch.device("cuda:1"))
                for units in (most, most + 1)
            )
            assert operators("auto", fits) is fused
            with pytest.warns(UserWarning, match=f"memory for {most + 1} hidden units on cuda:1"):
                assert operators("auto", large) is equations
            with pytest.raises(InputError, match="'fused' has not the shared memory for"):
                operators("fused", large)

    def test_build_info(self, cpu_level, fused):
        info = build_info()
        assert info["kernel"] == cpu_level and cpu_level in info["kernels"]
        assert info["kernels"][-1] == "baseline" and info["compiler"]
        oldest, own = (
            v.split("+")[0].split(".")[:2] for v in (info["stable_abi"], torch.__version__)
        )
        assert list(map(int, oldest)) <= list(map(int, own))


def train(backend, dtype=torch.float32, then=None, **settings):
    """The parameters of a small net that a random φ trains; in the middle `then` takes over."""
    noise = generator(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)
    for param in model.parameters():
        nn.init.normal_(param, generator=noise)
    x = torch.randn(16, 6, generator=noise).to(dtype)
    phi = random_phi(dtype=dtype, **settings)
    optimizer = LearnedOptimizer(model.parameters(), phi, backend=backend)
    for t in range(10):
        if t == 5 and then:
            saved = optimizer.state_dict()
            optimizer = LearnedOptimizer(model.parameters(), phi, backend=then)
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["backend"] == then
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(16) % 2).backward()
        optimizer.step()
    return weights(model)


class TestWhoeverRuns:
    """The same results with either backend."""

    @pytest.mark.parametrize("first, then", [("fused", "reference"), ("reference", "fused")])
    def test_a_state_dict_goes_from_one_to_the_other(self, fused, first, then):
        a = train(first, torch.float64, then, odd=True)
        torch.testing.assert_close(a, train(then, torch.float64, odd=True), rtol=1e-12, atol=0)

    def test_inference_mode(self, fused):
        """A step under inference_mode changes the parameters as one under no_grad."""
        results = []
        for mode in (torch.inference_mode, torch.no_grad):
            param = nn.Parameter(torch.linspace(-1, 1, 5))
            optimizer = LearnedOptimizer([param], random_phi(), backend="fused")
            for _ in range(3):
                param.grad = param.detach().square()
                with mode():
                    optimizer.step()
            results.append(param.detach().clone())
        assert torch.equal(*results)
        assert not torch.equal(results[0], torch.linspace(-1, 1, 5))

    def test_bfloat16_runs_on_the_reference(self, fused):
        with pytest.warns(UserWarning, match="bfloat16"):
            a = train("auto", torch.bfloat16)
        assert torch.equal(a, train("reference", torch.bfloat16))
