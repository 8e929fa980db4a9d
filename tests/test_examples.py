"""The scripts of examples/ do what they say, on the stand-in."""

import math

import pytest
from conftest import generator

from examples import fair_comparison, own_loop, own_phi, resnet, transformer
from l2l_ref.meta_optimizer import new_phi
from l2l_ref.pretrained import save
from l2l_ref.problems import make


def test_own_loop(tmp_path, small_data, capsys):
    """With a φ that is Adam, the nominal term alone, which learns in a hundred steps."""
    phi = new_phi(make("mnist").build(), generator=generator(), hidden_size=1, nominal=True)
    save(tmp_path / "phi.pt", {"transfer": phi}, {})
    accuracy = own_loop.main(str(tmp_path / "phi.pt"))
    assert accuracy["clean"] > 0.5 > accuracy["PGD-20 at 0.1"]
    assert "of stand-in" in capsys.readouterr().out


def test_another_attack(small_data, capsys):
    pytest.importorskip("foolbox")
    from examples import another_attack

    losses = another_attack.main(episodes=2, steps=20)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert "episode 2: meta-loss" in capsys.readouterr().out


def test_own_phi():
    """Its φ trains robust models on clean batches, Adam does not; which is what it is for."""
    ours, adam = own_phi.main(episodes=25, steps=40)
    assert ours > adam + 0.1


def test_fair_comparison(small_data, capsys):
    gap, half = fair_comparison.main(seeds=2, steps=30)
    assert math.isfinite(gap) and half >= 0
    assert "difference" in capsys.readouterr().out


def test_transformer():
    assert transformer.main(steps=150) > 0.5


def test_resnet(small_data, capsys):
    """On a network that is less of a load."""
    losses = resnet.main(steps=8, build=make("cifar10").build)
    assert all(map(math.isfinite, losses)) and losses[2] != losses[1]
    assert capsys.readouterr().out.count("on stand-in: test loss") == 3
