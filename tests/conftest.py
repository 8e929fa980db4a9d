"""What the tests share: small data and where the real data is, small models, chosen kernels."""

import itertools
import math
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from l2l_ref import data, problems
from l2l_ref.backend import BUILD, BUILD_CUDA, build_info, built
from l2l_ref.experiment import tuning
from l2l_ref.meta_optimizer import MetaOptimizer

# The same bits whatever the machine, and no contention among test workers, in what they start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A run in seconds; a φ that is loaded has its own episodes and unrolls.
LOADING = ["--quick", "--steps", "4", "--seeds", "1", "--eval-samples", "40", "--batch-size", "32",
           "--jobs", "1"]  # fmt: skip
TINY = [*LOADING, "--episodes", "1", "--episode-steps", "4", "--unroll", "2"]
FORMS = tuple((theta_input, odd) for theta_input in (False, True) for odd in (False, True))
every_form = pytest.mark.parametrize("theta_input, odd", FORMS)
SHAPE = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
# Inputs [b, 5], three classes.
SMALL = problems.Problem(
    "small",
    lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
    problems.cross_entropy,
    3,
)


NO_GPU = None  # why, where there is none to test on
if not torch.cuda.is_available():
    NO_GPU = "there is none here"
elif not built("cuda"):
    NO_GPU = f"the CUDA engine is not built ({BUILD_CUDA})"


def needs_gpu(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    marked = "cuda" in item.fixturenames or item.get_closest_marker("gpu")
    return bool(marked) or "cuda" in (params.get("level"), params.get("device"))


def pytest_collection_modifyitems(items):
    """Without a GPU, what needs one is a line at the end, not a skip each."""
    if NO_GPU:
        items[:] = [item for item in items if not needs_gpu(item)]


def pytest_terminal_summary(terminalreporter):
    if NO_GPU:
        terminalreporter.write_line(f"without the tests that need a GPU: {NO_GPU}")


def generator(seed=0, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def weights(model: nn.Module) -> Tensor:
    """A copy of all parameters on one axis."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def snapshot(model: nn.Module) -> dict:
    """What an attack or a judge may not change: modes, and every tensor's identity, version and
    value."""

    def facts(t: Tensor | None):
        return None if t is None else (id(t), t._version, t.requires_grad, t.tolist())

    return {
        "modes": [module.training for module in model.modules()],
        "parameters": {name: facts(p) for name, p in model.named_parameters()},
        "grads": {name: facts(p.grad) for name, p in model.named_parameters()},
        "buffers": {name: facts(b) for name, b in model.named_buffers()},
    }


def random_phi(seed=0, dtype=torch.float32, **settings) -> MetaOptimizer:
    """One whose head is not zero, so that every weight matters, and whose η, if it has one, is far
    from where it begins."""
    noise = generator(seed)
    meta = MetaOptimizer(generator=noise, **settings)
    for weight in meta.head.parameters():
        nn.init.normal_(weight, generator=noise)
    if meta.nominal:
        nn.init.constant_(meta.log_eta, math.log(0.02))
    return meta.to(dtype)


def wild(steps, n, dtype=torch.float64, seed=0) -> Tensor:
    """Gradients from 1e-12 to 1e4 of any sign, some of them zero. [steps, n]"""
    noise = generator(seed)
    size = 10 ** (16 * torch.rand(steps, n, generator=noise, dtype=torch.float64) - 12)
    gradients = size * torch.randn(steps, n, generator=noise, dtype=torch.float64)
    return (gradients * (torch.rand(steps, n, generator=noise) > 0.1)).to(dtype)


def zeroing(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer after whose steps all parameters are zero, so that nothing is predicted."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: [p.data.zero_() for p in model.parameters()])
    return optimizer


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["reference", "fused"])
def backend(request):
    """Either; the test skips where the extension is not built."""
    if request.param == "fused":
        request.getfixturevalue("fused")
    return request.param


@cache
def drawn(name: str, *sizes: int) -> data.Data:
    """Pictures of ten kinds: blots, moved about, under noise; so many to train and to test on."""
    g = generator()
    blots = (F.avg_pool2d(torch.rand(10, *SHAPE[name], generator=g), 5, 1, 2) > 0.54).float()
    sets = []
    for n in sizes:
        y = (torch.arange(n) % 10)[torch.randperm(n, generator=g)]
        moves = torch.randint(-4, 5, (n, 2), generator=g).tolist()
        x = torch.stack([blots[k].roll(move, (1, 2)) for k, move in zip(y, moves, strict=True)])
        ink, dirt = torch.rand(n, 1, 1, 1, generator=g), torch.rand(x.shape, generator=g)
        x = x * (1 + ink) / 2 + 1.5 * (dirt - 0.8).clamp(min=0)
        sets.append(data.ImageSet((255 * x.clamp(max=1)).to(torch.uint8), y))
    return data.Data("stand-in", *sets, "0" * 64)


@pytest.fixture(scope="session")
def small_digits() -> data.Data:
    """1,200 + 300 pictures in the place of MNIST."""
    return drawn("mnist", 1200, 300)


@pytest.fixture
def small_data(monkeypatch, small_digits):
    """`data.load` gives small sets, whatever it is asked for."""

    def load(name, data_dir, *, device="cpu", **options):
        found = small_digits if name == "mnist" else drawn("cifar10", 600, 200)
        train, test = (data.ImageSet(one.images.to(device), one.labels.to(device))
                       for one in (found.train, found.test))  # fmt: skip
        return replace(found, train=train, test=test)

    monkeypatch.setattr(data, "load", load)


def pictures(images: data.ImageSet) -> set[bytes]:
    return {row.numpy().tobytes() for row in images.images}


@pytest.fixture
def seen_pictures(monkeypatch) -> set[bytes]:
    """Those that batches are made of from now on."""
    seen, batch = set(), data.ImageSet.batch

    def spy(self, index, *args):
        seen.update(pictures(data.ImageSet(self.images[index], self.labels[index])))
        return batch(self, index, *args)

    monkeypatch.setattr(data.ImageSet, "batch", spy)
    return seen


@pytest.fixture
def few_candidates(monkeypatch):
    """The grids of the baselines have two candidates at most, for tests of something else."""
    every = tuning.candidates

    def first_two(config, eps):
        count = max(1, 2 // config.tune_every)
        return {label: dict(list(grid.items())[:count])
                for label, grid in every(config, eps).items()}  # fmt: skip

    monkeypatch.setattr(tuning, "candidates", first_two)


@pytest.fixture
def fused():
    """The module `l2l_ref.backend.ops`; the test skips where the extension is not built."""
    if not built():
        pytest.skip(f"the fused engine is not built: {BUILD}")
    return import_module("l2l_ref.backend.ops")


@pytest.fixture(params=["cpu", "cuda"])
def device(request, fused):
    """Where a test that makes its own tensors has them."""
    return request.param


@pytest.fixture
def killed_at(monkeypatch):
    """A context in which a run must end as one that is killed, at that call of a function of a
    module or class (from 0)."""

    @contextmanager
    def context(owner, name: str, count: int):
        function, calls = getattr(owner, name), itertools.count()

        def killed(*args, **options):
            if next(calls) == count:
                raise RuntimeError("killed")
            return function(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(RuntimeError, match="killed"):
                yield

    return context


def use_emulated(fused, monkeypatch):
    """The functions of `fused` run the GPU's kernels on the host, with the same derivatives."""
    monkeypatch.setattr(fused, "_ops", torch.ops.l2l_ref_emulated)
    register_emulated(fused)


@cache
def register_emulated(fused):
    """An operator is told of its derivative once."""
    name = "l2l_ref_emulated::theta_step"
    torch.library.register_autograd(name, fused._backward, setup_context=fused._setup)


def on_gpu(operator):
    """The operator for tensors of the CPU, run on a GPU: autograd follows, and what it changes in
    place is changed."""

    def run(*tensors, **form):
        moved = tree_map_only(torch.Tensor, torch.Tensor.cuda, tensors)
        result = operator(*moved, **form)
        if result is None:  # theta_step_(thetas, gradients, states, phi)
            with torch.no_grad():
                for at in (0, 2):
                    torch._foreach_copy_(tensors[at], moved[at])
            return None
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(x.cpu() for x in result)

    return run


# Of this build, on this machine.
KERNELS = build_info()["kernels"] if built() else ["avx512", "avx2", "baseline"]


@pytest.fixture(params=[*KERNELS, "emulated", "cuda"])
def level(request, fused, monkeypatch):
    """The name of the kernels in use: the test runs once with each that this machine has.

    "emulated" are the GPU's on the host, "cuda" those on a GPU, to which tensors are moved."""
    if request.param == "emulated":
        use_emulated(fused, monkeypatch)
        yield request.param
        return
    if request.param == "cuda":
        for operator in ("theta_step_", "theta_step", "unroll_meta_gradient"):
            monkeypatch.setattr(fused, operator, on_gpu(getattr(fused, operator)))
        yield request.param
        return
    module = import_module("l2l_ref.backend._C")
    before = module.build_info()["kernel"]
    module.use_instruction_set(request.param)
    yield request.param
    module.use_instruction_set(before)


# `level`, of the kernels that a CPU runs when it is not testing.
cpu_levels = pytest.mark.parametrize("level", KERNELS, indirect=True)
