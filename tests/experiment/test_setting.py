"""Folds that do not overlap, random streams that depend on their labels alone, fair comparisons."""

import math
from functools import partial

import pytest
import torch
from conftest import TINY, pictures, zeroing

from l2l_ref.experiment import cli, phis, protocol, tuning
from l2l_ref.experiment.setting import folds, prepare, stream
from l2l_ref.experiment.trial import ABLATION, train_phi, untrained
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
    setting = prepared("--folds", "2")
    first, second = folds(setting)
    assert pictures(first.meta) == pictures(second.transfer)
    assert pictures(first.transfer) == pictures(second.meta)
    assert not pictures(first.meta) & pictures(first.transfer)
    assert len(first.meta) == len(first.transfer) == len(setting.train) // 2
    assert not pictures(first.fit) & pictures(first.validation)
    assert pictures(first.fit) | pictures(first.validation) == pictures(first.meta)
    test = pictures(setting.test)
    assert not test & (pictures(first.meta) | pictures(first.transfer))


def test_methods_of_a_seed_share_theta0_and_batches(setting, monkeypatch):
    (fold,) = folds(setting)
    seen = []

    def spy(model, method, batches, **options):
        x, y = next(batches)
        seen.append([*(p.detach().clone() for p in model.parameters()), x, y])
        raise StopIteration

    monkeypatch.setattr("l2l_ref.experiment.trial.train", spy)
    for method in (Method("a", partial(sgd, 0.1)), Method("b", partial(sgd, 0.2), alpha=0.0)):
        for seed in (0, 1):
            with pytest.raises(StopIteration):
                protocol.run_method(setting, method, fold, 0.1, seed)
    a0, a1, b0, b1 = seen
    assert all(map(torch.equal, a0, b0)) and all(map(torch.equal, a1, b1))
    assert not torch.equal(a0[0], a1[0]) and not torch.equal(a0[-2], a1[-2])


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

    ends = {"ok": partial(sgd, 0.0), "diverged": partial(sgd, math.inf), "collapsed": zeroing}
    for end, optimizer in ends.items():
        assert protocol.run_method(setting, Method("", optimizer), fold, 0.1, 0)["end"] == end


@pytest.mark.parametrize("images", [None, 40])
@pytest.mark.parametrize("half", ["meta", "transfer", "fit"])
def test_each_method_trains_on_its_half_or_so_many_images_of_it(
    small_data, seen_pictures, half, images
):
    """And while it is tuned, on its part of the meta-training half. φ meta-trains on all."""
    setting = prepared(*["--images", str(images)] * bool(images))
    (fold,) = folds(setting)
    assert len(fold.meta) == len(fold.transfer) == len(setting.train) // 2
    method = Method("a", partial(sgd, 0.1), half=half)
    if half == "fit":
        tuning.validate(setting, method, fold, 0.1, 0)
    else:
        protocol.run_method(setting, method, fold, 0.1, 0)
    own = pictures(getattr(fold, half).first(images))
    probed = pictures(fold.validation if half == "fit" else fold.test)
    assert seen_pictures & own and seen_pictures <= own | probed


def test_the_nominal_term_alone_learns_its_rate_and_nothing_else(setting):
    (fold,) = folds(setting)
    phi, _ = train_phi(setting, fold.meta, ABLATION, 0.1, 0, 0, lambda *a: None)
    fresh = untrained(setting, ABLATION, 0, 0)
    meta, start = phi["linear"], fresh["linear"]
    assert (meta.hidden_size, meta.num_layers) == (1, 1) and meta.nominal
    assert all(map(torch.equal, meta.weights(), start.weights()))
    assert not meta.head.weight.any() and not meta.head.bias.any()
    assert meta.log_eta != start.log_eta and meta.log_eta.requires_grad
    # what a run's own φ has does not reach it, nor does its seed
    robust = prepared("--recipe", "robust")
    assert untrained(robust, ABLATION, 0, 0)["linear"].settings == meta.settings
    other = untrained(setting, "attacked", 0, 0)["linear"]
    assert not other.nominal and other.hidden_size == 20
    assert untrained(robust, "attacked", 0, 0)["linear"].nominal


def drawn(setting, monkeypatch, kind="attacked", eps=0.3, meta_seed=0):
    """What `learn` hands to `meta_train`: the settings, and each episode that it draws."""
    (fold,) = folds(setting)
    seen = []

    def spy(phi, settings, draw, **options):
        seen.append((settings, [draw(number) for number in range(settings.episodes)]))
        return History()

    with monkeypatch.context() as patch:
        patch.setattr("l2l_ref.experiment.trial.meta_train", spy)
        train_phi(setting, fold.meta, kind, eps, 0, meta_seed, lambda *a: None)
    return seen[0]


def test_the_curriculum_scales_eps_and_strength(small_data, monkeypatch):
    pgd = "--attack", "pgd", "--episodes", "9"
    settings, episodes = drawn(prepared(*pgd, "--curriculum", "1/3", "2/3"), monkeypatch)
    assert settings.curriculum == (1 / 3, 2 / 3)
    expected = [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    radii = [episode.attack.keywords["eps"] for episode in episodes]
    assert radii == pytest.approx([0.3 * strength for strength in expected])
    _, episodes = drawn(prepared(*pgd, "--curriculum", "0", "0"), monkeypatch)
    assert {episode.attack.keywords["eps"] for episode in episodes} == {0.3}


def test_settings_of_each_kind(small_data, monkeypatch):
    """α that φ reads and is judged by, λ; those of Transfer-NOT are clean."""

    def losses(kind, *arguments):
        settings, _ = drawn(prepared(*arguments), monkeypatch, kind)
        return settings.input_alpha, settings.alpha, settings.penalty

    assert losses("attacked") == losses("ablation") == (0.5, 0.5, 0.0)
    assert losses("attacked", "--recipe", "robust") == (1.0, 0.0, 0.0)
    for kind in ("attacked", "ablation"):
        penalised = losses(kind, "--recipe", "penalty", "--penalty", "2")
        assert penalised == (1.0, 0.0, pytest.approx(2 * 0.3))
    for recipe in ("paper", "robust", "penalty"):
        assert losses("clean", "--recipe", recipe) == (1.0, 1.0, 0.0)


def test_lengths_are_within_bounds_and_depend_on_the_episode_alone(small_data, monkeypatch):
    def lengths(*arguments, meta_seed=0, kind="attacked"):
        settings, episodes = drawn(prepared(*arguments), monkeypatch, kind, meta_seed=meta_seed)
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


@pytest.mark.parametrize("number", [0, 1])
def test_on_validation_all_is_of_the_meta_training_half(small_data, number):
    plain = folds(prepared("--folds", "2"))[number]
    fold = folds(prepared("--folds", "2", "--eval-on", "validation"))[number]
    assert pictures(fold.meta) == pictures(fold.transfer) == pictures(plain.fit)
    assert pictures(fold.fit) == pictures(plain.fit)
    assert pictures(fold.test) == pictures(fold.validation) == pictures(plain.validation)
    assert not pictures(fold.test) & pictures(fold.transfer)


def test_every_episode_has_streams_of_its_own(small_data, monkeypatch):
    setting = prepared("--episodes", "3")
    (fold,) = folds(setting)
    _, episodes = drawn(setting, monkeypatch)
    assert len(episodes) == 3
    for number, episode in enumerate(episodes):
        labels = ("meta", 0, 0, number)
        model = setting.problem.draw(stream(0, "theta", *labels))
        assert all(map(torch.equal, episode.model.parameters(), model.parameters()))
        own = next(fold.meta.batches(32, stream(0, "batches", *labels)))
        assert all(map(torch.equal, next(episode.batches), own))
