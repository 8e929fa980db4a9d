"""Who runs: backend chooses as it says, and nobody who uses it can tell who ran."""

import copy
import pickle
import warnings
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch
from conftest import generator, random_phi, weights
from torch import nn

from l2l_ref import equations
from l2l_ref.backend import _operators, _takes, _warn, build_info, operators, resolve
from l2l_ref.errors import InputError
from l2l_ref.optimizer import LearnedOptimizer


@pytest.fixture(autouse=True)
def warns_anew():
    """The one warning is given anew in each test, and the choice is made anew."""
    _warn.cache_clear()
    _operators.cache_clear()
    yield
    _operators.cache_clear()


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": False)


def state(hidden=20, dtype=torch.float32, device="cpu"):
    return torch.zeros(2, 2, hidden, 3, dtype=dtype, device=device)


@contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestChoice:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("backend", ["auto", "fused"])
    def test_fused_where_it_serves(self, fused, backend, dtype, recwarn):
        assert resolve(backend) == "fused"
        assert operators(backend, state(dtype=dtype)) is fused
        assert operators(backend, state(hidden=256)) is fused
        assert len(recwarn) == 0

    def test_reference_on_demand(self, recwarn):
        assert resolve("reference") == "reference"
        assert operators("reference", state()) is equations
        assert len(recwarn) == 0

    @pytest.mark.parametrize(
        "given, words",
        [
            (state(dtype=torch.bfloat16), "torch.bfloat16, only float32 and float64"),
            (state(dtype=torch.float16), "torch.float16"),
            (state(hidden=300), "300 hidden units, only up to 256"),
            (state(hidden=257), "257 hidden units"),
            (state(device="meta"), "does not run on meta"),
        ],
    )
    def test_what_it_does_not_serve(self, fused, given, words):
        with pytest.warns(UserWarning, match=words):
            assert operators("auto", given) is equations
        with silent():  # once is enough
            assert operators("auto", given) is equations
            assert operators("reference", given) is equations
        with pytest.raises(InputError, match=words + ".*or use backend 'reference'"):
            operators("fused", given)

    def test_not_built(self, not_built):
        with pytest.warns(UserWarning, match="needs the compiled extension.*build_ext --inplace"):
            assert resolve("auto") == "reference"
        with silent():
            assert resolve("auto") == "reference"
            assert operators("auto", state()) is equations
        with pytest.raises(InputError, match="'fused' needs the compiled extension"):
            resolve("fused")
        with pytest.raises(InputError, match="'fused' needs the compiled extension"):
            LearnedOptimizer([nn.Parameter(torch.zeros(2))], random_phi(), backend="fused")
        assert build_info() is None

    def test_built_without_cuda(self, fused, monkeypatch):
        monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": kind == "cpu")
        with pytest.warns(UserWarning, match="was built without CUDA.*USE_CUDA=1 python setup.py"):
            assert resolve("auto", "cuda") == "reference"
        with pytest.raises(InputError, match="'fused' was built without CUDA"):
            resolve("fused", "cuda:1")
        assert resolve("fused") == "fused"
        assert build_info()["cuda"] is None

    def test_built_with_cuda(self, fused, monkeypatch, recwarn):
        monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": True)
        assert resolve("auto", "cuda") == "fused" == resolve("fused", "cuda:1")
        assert len(recwarn) == 0

    def test_a_gpu_with_too_little_shared_memory(self, fused, monkeypatch):
        """As on a T4, asked by way of a state that says it is on CUDA."""

        class Module:
            @staticmethod
            def serves(layers, units, float64, device):
                return units <= (28 if float64 else 56) and (layers, device) == (2, 1)

        monkeypatch.setattr("l2l_ref.backend.built", lambda kind="cpu": True)
        monkeypatch.setattr("l2l_ref.backend.import_module", lambda name: Module)
        device, ask = torch.device("cuda:1"), _takes
        assert ask(2, 56, torch.float32, device) and not ask(2, 57, torch.float32, device)
        assert ask(2, 28, torch.float64, device) and not ask(2, 29, torch.float64, device)
        large = MagicMock(shape=(2, 2, 64, 3), dtype=torch.float32, device=device)
        with pytest.warns(UserWarning, match="shared memory for 64 hidden units on cuda:1"):
            assert operators("auto", large) is equations
        with pytest.raises(InputError, match="'fused' has not the shared memory for 64"):
            operators("fused", large)

    def test_build_info(self, cpu_level, fused):
        info = build_info()
        assert info["kernel"] == cpu_level and cpu_level in info["kernels"]
        assert info["kernels"][-1] == "baseline" and info["compiler"]
        assert [int(n) for n in info["stable_abi"].split(".")] <= [
            int(n) for n in torch.__version__.split("+")[0].split(".")[:2]
        ]


def train(backend, dtype=torch.float32, steps=10, pause=lambda model, optimizer: None, **settings):
    """A small net trained by a random φ; returns its parameters and the optimizer."""
    noise = generator(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)
    for param in model.parameters():
        nn.init.normal_(param, generator=noise)
    x = torch.randn(16, 6, generator=noise).to(dtype)
    phi = random_phi(dtype=dtype, **settings)
    optimizer = LearnedOptimizer(model.parameters(), phi, backend=backend)
    for t in range(steps):
        if t == steps // 2:
            model, optimizer = pause(model, optimizer) or (model, optimizer)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(16) % 2).backward()
        optimizer.step()
    return weights(model), optimizer


class TestWhoeverRuns:
    """The same results with either backend."""

    @pytest.mark.parametrize("first, then", [("fused", "reference"), ("reference", "fused")])
    def test_a_state_dict_goes_from_one_to_the_other(self, fused, first, then):
        def change(model, optimizer):
            other = LearnedOptimizer(
                model.parameters(), optimizer.defaults["meta_optimizer"], backend=then
            )
            other.load_state_dict(optimizer.state_dict())
            return model, other

        a, optimizer = train(first, torch.float64, odd=True, pause=change)
        assert optimizer.param_groups[0]["backend"] == then
        torch.testing.assert_close(a, train(then, torch.float64, odd=True)[0], rtol=1e-12, atol=0)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
    )
    def test_a_copy_continues_alike(self, backend, copied):
        a, _ = train(backend, pause=lambda *both: copied(both))
        assert torch.equal(a, train(backend)[0])

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
            a, _ = train("auto", torch.bfloat16)
        assert torch.equal(a, train("reference", torch.bfloat16)[0])
        with pytest.raises(InputError, match="bfloat16"):
            train("fused", torch.bfloat16)
