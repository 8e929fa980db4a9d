"""Folds that do not overlap, random streams that depend on their labels alone, fair comparisons."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY, pictures, zeroing
from torch import nn

from l2l_ref.experiment import cli, phis, protocol, tuning
from l2l_ref.experiment.phis import ABLATION, untrained
from l2l_ref.experiment.setting import folds, prepare, stream
from l2l_ref.experiment.tuning import sgd
from l2l_ref.meta_training import History
from l2l_ref.transfer import Method

QUICK = [*TINY, "--episodes", "2"]


def prepared(*arguments):
    return prepare(cli.parse([*QUICK, *arguments]))


@pytest.fixture
def setting(small_data):
    return prepared()


def test_streams_depend_on_their_labels_alone():
    first = torch.rand(3, generator=stream(0, "theta", 1))
    torch.rand(7, generator=stream(0, "batches", 1))
    assert torch.equal(first, torch.rand(3, generator=stream(0, "theta", 1)))
    for other in ((1, "theta", 1), (0, "theta", 2), (0, "batches", 1), (0, "theta", "1")):
        assert not torch.equal(first, torch.rand(3, generator=stream(*other)))
    # fixed for all time and machines, as a published seed must be
    assert stream("l2l_ref", 0).initial_seed() == 2504999805823337517


def test_halves_do_not_overlap_and_folds_swap_them(small_data):
    """With --eval-on validation all is of the meta-training half."""
    setting = prepared("--folds", "2")
    first, second = folds(setting)
    assert pictures(first.meta) == pictures(second.transfer)
    assert pictures(first.transfer) == pictures(second.meta)
    assert len(first.meta) == len(first.transfer) == len(setting.train) // 2
    test = pictures(setting.test)
    assert pictures(first.test) == test
    assert pictures(first.test.first(20)) != pictures(setting.test.first(20))
    on_validation = folds(prepared("--folds", "2", "--eval-on", "validation"))
    for fold, own in zip((first, second), on_validation, strict=True):
        meta, fit, validation = map(pictures, (fold.meta, fold.fit, fold.validation))
        assert not meta & pictures(fold.transfer) and not fit & validation
        assert fit | validation == meta and not test & (meta | pictures(fold.transfer))
        assert pictures(own.meta) == pictures(own.transfer) == pictures(own.fit) == fit
        assert pictures(own.test) == pictures(own.validation) == validation


def test_methods_of_a_seed_share_theta0_and_batches(small_data, monkeypatch):
    settings = prepared("--steps", "101"), prepared("--steps", "101", "--seed", "1")
    (fold,), seen = folds(settings[0]), []

    def spy(model, method, batches, **options):
        assert options["every"] == 3  # a curve has about fifty points
        assert torch.equal(options["calibration"][0], fold.transfer.first(32).all()[0])
        x, y = next(batches)
        seen.append([*(p.detach().clone() for p in model.parameters()), x, y])
        raise StopIteration

    monkeypatch.setattr("l2l_ref.experiment.setting.train", spy)
    a, b = Method("a", partial(sgd, lr=0.1)), Method("b", partial(sgd, lr=0.2), alpha=0.0)
    for base, method, seed in ((0, a, 0), (0, b, 0), (0, a, 1), (1, a, 0)):
        with pytest.raises(StopIteration):
            protocol.run_method(settings[base], method, fold, 0.1, seed)
    first, same, *others = seen
    assert all(map(torch.equal, first, same))
    for other in others:
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[-2], other[-2])


def test_what_a_network_draws_in_training_depends_on_its_trial_alone(setting):
    """Dropout: whatever was computed before."""
    build = lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))  # noqa: E731
    own = replace(setting, problem=replace(setting.problem, build=build))
    (fold,), method = folds(own), Method("", partial(sgd, lr=0.1))
    first, other, again = (protocol.run_method(own, method, fold, 0.1, seed) for seed in (0, 1, 0))
    assert first["attacked"] == again["attacked"] != other["attacked"]


NOT = {
    "Transfer-NOT": ("clean", 0.0, 0.0, "transfer"),
    "Transfer-NOT (clean)": ("clean", 1.0, 0.0, "transfer"),
}
PENALISED = {"Adam, learned rate": ("ablation", 1.0, pytest.approx(0.3), "transfer")}


@pytest.mark.parametrize(
    "command, expected",
    [
        ("", {**NOT, "L2L": ("attacked", 0.5, 0.0, "meta"),
              "L2L-Transfer (clean)": ("attacked", 1.0, 0.0, "transfer"),
              "L2L-Transfer (mixed)": ("attacked", 0.5, 0.0, "transfer"),
              "Adam, learned rate": ("ablation", 0.5, 0.0, "transfer")}),
        ("--attack none", {"L2L": ("attacked", 1.0, 0.0, "meta"),
                           "L2L-Transfer": ("attacked", 1.0, 0.0, "transfer"),
                           "Adam, learned rate": ("ablation", 1.0, 0.0, "transfer")}),
        # the penalty is in units of ε, and Transfer-NOT, which knows of no attack, has none
        ("--recipe robust --penalty 1.5", {
              **NOT, **PENALISED, "L2L": ("attacked", 1.0, pytest.approx(0.3), "meta"),
              "L2L-Transfer (clean)": ("attacked", 1.0, pytest.approx(0.3), "transfer"),
              "L2L-Transfer (mixed)": ("attacked", 0.5, pytest.approx(0.3), "transfer")}),
        ("--recipe penalty", PENALISED),
        ("--eval-on validation", {  # no row is there twice, where both halves are one
              **NOT, "L2L": ("attacked", 0.5, 0.0, "meta"),
              "L2L-Transfer (clean)": ("attacked", 1.0, 0.0, "transfer"),
              "Adam, learned rate": ("ablation", 0.5, 0.0, "transfer")}),
        ("--recipe robust --eval-on validation", {
              **NOT, "L2L-Transfer (clean)": ("attacked", 1.0, 0.0, "transfer"),
              "L2L-Transfer (mixed)": ("attacked", 0.5, 0.0, "transfer"),
              "Adam, learned rate": ("ablation", 1.0, 0.0, "transfer")}),
        ("--dataset quadratic", {"L2L-Transfer": ("attacked", 1.0, 0.0, "transfer"),
                                 "Adam, learned rate": ("ablation", 1.0, 0.0, "transfer")}),
    ],
)  # fmt: skip
def test_curves_are_those_of_the_paper(command, expected):
    """Label: which φ, α and λ of the loss whose gradients it reads, and the half it trains on."""
    c = cli.parse(command.split())
    kinds = phis.kinds_of_phi(c)
    methods = [method for kind in kinds for method in phis.phi_methods(c, kind, 0.2, kind)]
    assert not any(method.cosine or method.l1 for method in methods)
    found = {m.label: (m.optimizer, m.alpha, m.penalty, m.half) for m in methods}
    assert found == expected and len(found) == len(methods)


def test_bad_ends_are_marked(setting):
    """A rate of 0 leaves θ₀ alone, one of infinity makes it nan; weights of 0 predict nothing."""
    (fold,) = folds(setting)

    ends = {"ok": partial(sgd, lr=0.0), "diverged": partial(sgd, lr=math.inf), "collapsed": zeroing}
    for end, optimizer in ends.items():
        assert protocol.run_method(setting, Method("", optimizer), fold, 0.1, 0)["end"] == end
    found = protocol.run_method(
        prepared("--steps", "30"), Method("", partial(sgd, lr=0.1)), fold, 0.1, 0
    )
    assert found["last"]["pgd_loss"] != found["pgd_loss"]  # which is that of the average


@pytest.mark.parametrize("half", ["meta", "transfer", "fit"])
def test_each_method_trains_on_so_many_images_of_its_half(small_data, seen_pictures, half):
    """And while it is tuned, of its part of the meta-training half."""
    setting = prepared("--images", "40")
    (fold,) = folds(setting)
    method = Method("a", partial(sgd, lr=0.1), half=half)
    if half == "fit":
        tuning.validate(setting, method, fold, 0.1, 0)
    else:
        protocol.run_method(setting, method, fold, 0.1, 0)
    own = pictures(getattr(fold, half).first(40))
    probed = pictures(fold.validation if half == "fit" else fold.test)
    assert seen_pictures & own and seen_pictures <= own | probed


def train_phi(setting, out, kind, eps=0.1, meta_seed=0):
    """The φ that a run meta-trains."""
    experiment = protocol.Experiment(setting, out)
    experiment.train_phi((0, kind, meta_seed, eps), {})
    return experiment.phi(phis.phi_name(0, kind, meta_seed, eps))


def test_a_run_waits_for_its_phi_or_for_what_tunes_it(setting, tmp_path):
    experiment = protocol.Experiment(setting, tmp_path)
    runs = {key["method"]: piece for key, piece in experiment.runs()}
    needs = {label: set(piece.needs) for label, piece in runs.items()}
    tuning_sgd = {p.name for p in experiment.pieces() if p.name.startswith("tune-SGD-lr")}
    assert needs["L2L"] == {"attacked-fold0-phi0-eps0.1"}
    assert needs["SGD"] == tuning_sgd and len(tuning_sgd) == 3
    phi, (row,) = needs["L2L"], [r for r in experiment.tables[0] if r.label == "L2L + L1"]
    tuned = {piece.name: set(piece.needs) for piece in row.pieces()}
    weights = {f"tune-L2L-L1-phi0-L1-{weight}-seed0-fold0-eps0.1": phi for weight in (3e-4, 3e-3)}
    assert tuned == weights and needs["L2L + L1"] == phi | tuned.keys()
    found = {m.l1: (m.alpha, m.half) for m in row.methods.values()}
    assert found == dict.fromkeys((3e-4, 3e-3), (0.5, "meta"))
    c = setting.config  # clean, FGSM, attacked, the LSTM; then PGD on two losses
    evaluation = 2 * c.restarts * c.eval_steps * c.eval_samples / c.batch_size
    assert runs["L2L + L1"].cost == 4 * c.steps + evaluation
    (rows,) = protocol.Experiment(prepared("--recipe", "robust"), tmp_path).tables
    assert not any(r.label.startswith("L2L") and "L1" in r.label for r in rows)  # φ sees θ


def test_the_nominal_term_alone_learns_its_rate_and_nothing_else(setting, tmp_path):
    phi, fresh = train_phi(setting, tmp_path, ABLATION), untrained(setting, ABLATION, 0, 0)
    meta, start = phi["linear"], fresh["linear"]
    assert [*meta.settings.values()][:2] == [1, 1] and meta.nominal
    assert all(map(torch.equal, meta.weights(), start.weights()))
    assert not meta.head.weight.any() and not meta.head.bias.any()
    assert meta.log_eta != start.log_eta and meta.log_eta.requires_grad
    # what a run's own φ has does not reach it, nor does its seed
    robust = prepared("--recipe", "robust")
    assert untrained(robust, ABLATION, 0, 0)["linear"].settings == meta.settings
    other = untrained(setting, "attacked", 0, 0)["linear"]
    assert not other.nominal and other.settings["hidden_size"] == 20
    assert untrained(robust, "attacked", 0, 0)["linear"].nominal


@pytest.fixture
def drawn(small_data, tmp_path, monkeypatch):
    """What a run hands to `meta_train`: the settings, and each episode that it draws."""

    def drawn(*arguments, kind="attacked", eps=0.3, meta_seed=0):
        seen = []

        def spy(phi, settings, draw, check, **options):
            assert (check is None) == (kind == "clean")  # no row is meant for that
            seen.append((settings, [draw(number) for number in range(settings.episodes)]))
            return History()

        monkeypatch.setattr(protocol, "meta_train", spy)
        train_phi(prepared(*arguments), tmp_path, kind, eps, meta_seed)
        return seen[0]

    return drawn


def test_the_curriculum_scales_eps_and_strength(drawn):
    pgd = "--attack", "pgd", "--episodes", "9"
    settings, episodes = drawn(*pgd, "--curriculum", "1/3", "2/3")
    assert settings.curriculum == (1 / 3, 2 / 3)
    expected = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    radii = [episode.attack.keywords["eps"] for episode in episodes]
    assert radii == pytest.approx([0.3 * strength for strength in expected])
    _, episodes = drawn(*pgd, "--curriculum", "0", "0")
    assert {episode.attack.keywords["eps"] for episode in episodes} == {0.3}


def test_settings_of_each_kind(drawn):
    """α that φ reads and is judged by, λ; those of Transfer-NOT are clean."""

    def losses(kind, *arguments):
        settings, _ = drawn(*arguments, kind=kind)
        return settings.input_alpha, settings.alpha, settings.penalty

    assert losses("attacked") == losses("ablation") == (0.5, 0.5, 0.0)
    assert losses("attacked", "--recipe", "robust") == (1.0, 0.0, 0.0)
    for kind in ("attacked", "ablation"):
        penalised = losses(kind, "--recipe", "penalty", "--penalty", "2")
        assert penalised == (1.0, 0.0, pytest.approx(2 * 0.3))
    for recipe in ("paper", "robust", "penalty"):
        assert losses("clean", "--recipe", recipe) == (1.0, 1.0, 0.0)


def test_lengths_are_within_bounds_and_depend_on_the_episode_alone(drawn):
    def lengths(*arguments, **which):
        settings, episodes = drawn(*arguments, **which)
        found = [episode.steps for episode in episodes]
        assert settings.steps >= max(found)
        return found

    sixty = "--episodes", "60", "--episode-steps", "3", "7"
    many = lengths(*sixty)
    assert set(many) == {3, 4, 5, 6, 7}  # both bounds too
    # stratified: of equal shares of log(length) each holds one, so no φ meets few long episodes
    long = sorted(lengths("--episodes", "20", "--episode-steps", "100", "1000"))
    strata = [20 * math.log10(n / 100) for n in long]
    assert all(i - 0.05 <= at <= i + 1.05 for i, at in enumerate(strata))
    assert lengths(*sixty, kind="clean") == many
    assert lengths(*sixty, meta_seed=1) != many and lengths(*sixty, "--seed", "1") != many
    assert set(lengths("--episodes", "5", "--episode-steps", "6")) == {6}


def test_every_episode_has_streams_of_its_own(drawn):
    setting, (_, episodes) = prepared("--episodes", "3"), drawn("--episodes", "3")
    (fold,) = folds(setting)
    assert len(episodes) == 3
    for number, episode in enumerate(episodes):
        labels = ("meta", 0, 0, number)
        model = setting.problem.draw(stream(0, "theta", *labels))
        assert all(map(torch.equal, episode.model.parameters(), model.parameters()))
        own = next(fold.meta.batches(32, stream(0, "batches", *labels)))
        assert all(map(torch.equal, next(episode.batches), own))
