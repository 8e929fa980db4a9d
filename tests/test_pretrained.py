"""φ on disk: what is saved is what is loaded, and what is not there is named."""

import pytest
import torch
from conftest import generator
from torch import nn

import l2l_ref
from l2l_ref.errors import InputError
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.pretrained import save
from l2l_ref.problems import make


@pytest.fixture
def file(tmp_path):
    """Two φ of another form, the first of them by which `load` goes."""
    phis = {}
    for seed, name in enumerate(("transfer", "not")):
        form = {"hidden_size": 3, "odd": True, "nominal": True}
        phis[name] = new_phi(make("mnist").build(), generator=generator(seed), **form)
    save(tmp_path / "phi.pt", phis, {"data": "none"})
    return tmp_path / "phi.pt", phis


@pytest.mark.parametrize("asked, name", [(None, "transfer"), ("not", "not")])
def test_what_is_saved_is_loaded(file, asked, name):
    path, phis = file
    loaded = l2l_ref.load(path, asked)
    assert loaded["linear"].settings == phis[name]["linear"].settings
    pairs = zip(loaded.parameters(), phis[name].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_is_not_there_is_named(file, tmp_path):
    path, _ = file
    with pytest.raises(InputError, match="has no φ nominal: choose one of transfer, not"):
        l2l_ref.load(path, "nominal")
    with pytest.raises(InputError, match="mnist-unknown does not exist"):
        l2l_ref.load("mnist-unknown")
    torch.save({"format": "another"}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt is not a meta_optimizer.pt"):
        l2l_ref.load(tmp_path / "other.pt")


def test_a_model_with_layers_that_no_phi_has_met(file):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="no φ for convolutional parameters, only for linear"):
        l2l_ref.LearnedOptimizer.for_model(model, l2l_ref.load(file[0]))
