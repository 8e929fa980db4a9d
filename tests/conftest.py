"""Shared fixtures: small data, and where the real data is."""

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch

from l2l_ref import data, engine, stand_in

torch.set_num_threads(1)  # same bits whatever the machine, and no contention among test workers


@pytest.fixture(scope="session")
def small_digits() -> data.Data:
    """1,200 + 300 stand-in digits."""
    x, y, x_test, y_test = stand_in.digits(1200, 300)
    train, test = data.ImageSet(x, y), data.ImageSet(x_test, y_test)
    return data.Data("mnist", "stand-in", train, test, "0" * 64)


@pytest.fixture(scope="session")
def small_textures() -> data.Data:
    """600 + 200 stand-in textures."""
    x, y, x_test, y_test = stand_in.textures(600, 200)
    train, test = data.ImageSet(x, y), data.ImageSet(x_test, y_test)
    return data.Data("cifar10", "stand-in", train, test, "0" * 64)


@pytest.fixture
def small_data(monkeypatch, small_digits, small_textures):
    """`data.load` gives the small sets, whatever it is asked for."""
    sets = {"mnist": small_digits, "cifar10": small_textures}
    monkeypatch.setattr(data, "load", lambda name, data_dir, **options: sets[name])


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """A folder with the real MNIST in torchvision's layout; the test skips where there is none."""
    named = os.environ.get("L2L_DATA_DIR")
    folder = Path(named or Path(__file__).resolve().parents[1].parent / "shared" / "data")
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip("no real MNIST: set L2L_DATA_DIR to a folder that torchvision can read")
    return folder


@pytest.fixture
def fused():
    """The module `l2l_ref.fused`; the test skips where the extension is not built."""
    if not engine.built():
        pytest.skip(f"the fused engine is not built: {engine.BUILD}")
    return import_module("l2l_ref.fused")


@pytest.fixture(params=["avx512", "avx2", "baseline", "emulated"])
def level(request, fused):
    """The name of the kernels in use: the test runs once with each that this machine has."""
    info = fused.build_info()
    if request.param not in info["kernels"]:
        pytest.skip(f"no {request.param} kernels in this build or on this machine")
    _engine = import_module("l2l_ref._engine")
    _engine.use_level(request.param)
    yield request.param
    _engine.use_level(info["kernel"])
