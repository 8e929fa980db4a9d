"""K optimizees at once do what each does alone: outputs, attacks, unrolls, batches, whole runs."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

import run
from l2l_ref import attacks, data, problems
from l2l_ref.episode import Episode, MetaSettings, truncated_unrolls
from l2l_ref.errors import InputError
from l2l_ref.experiment import cli
from l2l_ref.experiment.setting import folds, prepare, stream
from l2l_ref.experiment.trial import train_phi
from l2l_ref.meta_optimizer import new_phi, phi_groups
from l2l_ref.meta_training import History
from l2l_ref.problems import Problem, Stacked

K, BATCH = 3, 8
SHAPES = {"mlp": (1, 28, 28), "convnet": (3, 32, 32)}
PROBLEMS = {
    "mlp": problems.make("mnist"),
    # vmap knows no channels-last layout, and no GPU needs it
    "convnet": Problem("", lambda: nn.Sequential(*problems.convnet()), problems.cross_entropy, 10),
    "quadratic": problems.make("quadratic", batch_size=BATCH),
}
EVERY = pytest.mark.parametrize("name", PROBLEMS)
BOTH_WAYS = pytest.mark.parametrize("vectorize", [False, True])
exactly = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(name):
    """K models in float64."""
    return [PROBLEMS[name].draw(generator(k)).double() for k in range(K)]


def batches(name, count):
    """`count` batches for each of the K: a list of (x, y) each."""
    noise = generator(9)

    def one():
        if name == "quadratic":
            w, y = next(problems.quadratics(BATCH, noise))
            return w.double(), y.double()
        x = torch.rand(BATCH, *SHAPES[name], generator=noise, dtype=torch.float64)
        return x, torch.randint(10, (BATCH,), generator=noise)

    return [[one() for _ in range(count)] for _ in range(K)]


def joint(each):
    """The batches of all, as `Stacked` takes them."""
    return [
        (torch.stack(xs), torch.cat(ys))
        for xs, ys in (zip(*b, strict=True) for b in zip(*each, strict=True))
    ]


@EVERY
@BOTH_WAYS
def test_outputs_gradients_and_statistics(name, vectorize):
    models, each = draw(name), batches(name, 2)
    together = Stacked(copy.deepcopy(models), vectorize=vectorize)
    for x, y in joint(each):  # two, so that the running statistics of the first are kept
        loss = PROBLEMS[name].loss(together, x, y)
    loss.backward()
    losses = []
    for model, own in zip(models, each, strict=True):
        for x, y in own:
            single = PROBLEMS[name].loss(model, x, y)
        single.backward()
        losses.append(single)
    exactly(loss, torch.stack(losses).mean())
    theirs = zip(*(model.named_parameters() for model in models), strict=True)
    for stacked, alone in zip(together.parameters(), theirs, strict=True):
        exactly(stacked.grad * K, torch.stack([p.grad for _, p in alone]))
    theirs = list(zip(*(model.buffers() for model in models), strict=True))
    assert len(theirs) == (9 if name == "convnet" else 0)
    for stacked, alone in zip(together.buffers(), theirs, strict=True):
        exactly(stacked, torch.stack(alone))
    together.eval(), [model.eval() for model in models]
    (x, y), *_ = joint(each)
    exactly(together(x), torch.cat([model(own) for model, own in zip(models, x, strict=True)]))


def test_one_after_the_other_gives_the_bits_of_each_alone():
    problem = problems.make("cifar10")  # channels last
    models = [problem.draw(generator(k)) for k in range(K)]
    x = torch.rand(K, BATCH, 3, 32, 32, generator=generator(5))
    expected = torch.cat([model(own) for model, own in zip(models, x, strict=True)])
    assert torch.equal(Stacked(models)(x), expected)


def test_groups_are_those_of_one_with_k_times_the_coordinates():
    models = [problems.make("cifar10").draw(generator(k)) for k in range(K)]
    alone = phi_groups(copy.deepcopy(models[0]))
    together = phi_groups(Stacked(models))
    assert list(together) == list(alone)
    for name, parameters in together.items():
        assert [p.shape for p in parameters] == [(K, *p.shape) for p in alone[name]]
        assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in parameters)


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(InputError, match="0 optimizees"):
        Stacked([])
    with pytest.raises(RuntimeError):
        Stacked([draw("mlp")[0], draw("mlp")[1].eval()])


@pytest.mark.parametrize("vectorize", [False, True])
def test_attacks_meet_each_model_and_leave_no_trace(vectorize):
    models, each = draw("convnet"), batches("convnet", 1)
    together = Stacked(copy.deepcopy(models), vectorize=vectorize)
    ((x, y),) = joint(each)
    before = copy.deepcopy(together.state_dict())
    for attack in (
        partial(attacks.fgsm, eps=0.1),
        partial(attacks.pgd, eps=0.1, steps=2, random_start=False),
    ):
        expected = torch.stack([attack(m, *own[0]) for m, own in zip(models, each, strict=True)])
        exactly(attack(together, x, y), expected)
    assert all(torch.equal(value, before[key]) for key, value in together.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in together.parameters())


UNROLLS = [  # what φ reads and is judged by
    ("mlp", "fgsm", 0.5, 0.5),  # the paper's recipe
    ("mlp", "fgsm", 1.0, 0.0),  # the robust one
    ("mlp", "none", 1.0, 1.0),
    ("convnet", "fgsm", 0.5, 0.5),
    ("convnet", "fgsm", 1.0, 0.0),
    ("convnet", "none", 1.0, 1.0),
    ("quadratic", "none", 1.0, 1.0),
]


@pytest.mark.parametrize("name, attack, read_alpha, alpha", UNROLLS)
@BOTH_WAYS
def test_k_at_once_follow_the_paths_of_each_alone(name, attack, read_alpha, alpha, vectorize):
    """θ, losses, running statistics; dφ is the mean of theirs. The same φ throughout."""
    problem, models, each = PROBLEMS[name], draw(name), batches(name, 6)
    attack = attacks.make(attack, eps=0.1)
    robust = read_alpha != alpha
    phi = new_phi(
        problem.build(), generator=generator(1), output_scale=0.1, odd=robust, theta_input=robust
    ).double()
    for meta in phi.values():
        nn.init.uniform_(meta.head.weight, -0.5, 0.5, generator=generator(2))

    def unrolls(model, its_batches, tasks):
        """Of five steps by three: {φ-group: θ}, dφ and losses after each unroll."""
        settings = MetaSettings(
            1, steps=5, unroll=3, read_alpha=read_alpha, alpha=alpha, tasks=tasks
        )
        episode = Episode(model, iter(its_batches), attack, problem.loss)
        for dphis, losses in truncated_unrolls(episode, phi, settings):
            theta = [p.detach().clone() for p in model.parameters()]
            yield theta, {key: dphi.clone() for key, dphi in dphis.items()}, losses

    together = Stacked(copy.deepcopy(models), vectorize=vectorize)
    at_once = list(unrolls(together, joint(each), K))
    alone = zip(*(unrolls(m, own, 1) for m, own in zip(models, each, strict=True)), strict=True)
    start = [p.detach().clone() for p in draw(name)[0].parameters()]
    assert len(at_once) == 2
    for (theta, dphis, losses), singles in zip(at_once, alone, strict=True):
        thetas, their_dphis, their_losses = zip(*singles, strict=True)
        for stacked, own in zip(theta, zip(*thetas, strict=True), strict=True):
            exactly(stacked, torch.stack(own))
        exactly(losses, torch.stack(their_losses).mean(0))
        for key, dphi in dphis.items():
            assert dphi.norm() > 0
            exactly(dphi, torch.stack([own[key] for own in their_dphis]).mean(0))
        assert not torch.allclose(theta[0][0], start[0])  # it moves
    theirs = list(zip(*(m.buffers() for m in models), strict=True))
    for stacked, own in zip(together.buffers(), theirs, strict=True):
        exactly(stacked, torch.stack(own))


def test_the_model_must_hold_as_many_tasks_as_the_settings_say():
    problem = PROBLEMS["mlp"]
    phi = new_phi(problem.build(), generator=generator())
    for model, tasks in ((problem.draw(generator()), 3), (Stacked(draw("mlp")), 1)):
        episode = Episode(model, iter([]), attacks.none)
        with pytest.raises(InputError, match=f"but tasks is {tasks}"):
            next(truncated_unrolls(episode, phi, MetaSettings(1, tasks=tasks)))


def test_batches_of_several_streams_are_those_of_each():
    images = data.ImageSet(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))
    together = images.batches(6, *map(generator, range(K)))
    each = [images.batches(6, generator(k)) for k in range(K)]
    for _ in range(7):  # over the end of an epoch
        x, y = next(together)
        xs, ys = zip(*map(next, each), strict=True)
        assert torch.equal(x, torch.stack(xs)) and torch.equal(y, torch.cat(ys))


def test_quadratics_of_several_streams_are_those_of_each():
    x, y = next(problems.quadratics(BATCH, *map(generator, range(K))))
    each = [next(problems.quadratics(BATCH, generator(k))) for k in range(K)]
    xs, ys = zip(*each, strict=True)
    assert torch.equal(x, torch.stack(xs)) and torch.equal(y, torch.cat(ys))


class TestRuns:
    """The command line's --tasks."""

    tiny = ["--quick", "--steps", "4", "--unroll", "2", "--episodes", "2", "--batch-size", "32",
            "--seeds", "1", "--eval-samples", "40", "--episode-steps", "4"]  # fmt: skip

    def test_every_task_has_streams_of_its_own(self, small_data, monkeypatch):
        """Two episodes of three tasks draw what six episodes of one do."""
        seen = []

        def spy(phi, settings, draw, **options):
            for number in range(settings.episodes):
                episode = draw(number)
                x, y = next(episode.batches)
                drawn = [*(p.detach() for p in episode.model.parameters()), x, y.view(3, -1)]
                seen.extend(zip(*drawn, strict=True))
            return History()

        monkeypatch.setattr("l2l_ref.experiment.trial.meta_train", spy)
        setting = prepare(cli.parse([*self.tiny, "--tasks", "3"]))
        (fold,) = folds(setting)
        train_phi(setting, fold.meta, "transfer", 0.1, 0, 0, lambda *a: None)
        assert len(seen) == 6
        for number, (*theta, x, y) in enumerate(seen):
            labels = ("meta", 0, 0, number)
            model = setting.problem.draw(stream(0, "theta", *labels))
            assert all(map(torch.equal, theta, model.parameters()))
            own = next(fold.meta.batches(32, stream(0, "batches", *labels)))
            assert torch.equal(x, own[0]) and torch.equal(y, own[1])

    @pytest.mark.usefixtures("few_candidates")
    @pytest.mark.parametrize("dataset", ["mnist", "cifar10", "quadratic"])
    def test_a_run_from_end_to_end_and_resumed(
        self, tmp_path, small_data, monkeypatch, killed_at_step, dataset
    ):
        monkeypatch.chdir(tmp_path)
        arguments = ["--dataset", dataset, *self.tiny, "--tasks", "3"]
        if dataset == "cifar10":
            arguments += ["--attack", "pgd", "--attack-steps", "2", "--folds", "1"]
        run.main([*arguments, "--out", "whole"])
        saved = torch.load("whole/meta_optimizer.pt", weights_only=True)
        assert saved["config"]["tasks"] == 3
        settings = json.loads((tmp_path / "whole/config.json").read_text())["settings"]
        assert settings["tasks"] == 3
        summary = json.loads((tmp_path / "whole/summary.json").read_text())
        assert ", 3 tasks ·" in summary["title"]
        assert all(history["skipped"] == 0 for history in summary["meta_training"].values())

        with killed_at_step(3):  # in the second of two episodes of two unrolls
            run.main([*arguments, "--out", "r"])
        # one episode is kept of the piece that was running, the longest and so the first
        first = f"transfer-fold0-phi0-eps{saved['config']['eps'][0]}.pt"
        assert [path.name for path in (tmp_path / "r/parts").iterdir()] == [first]
        run.main([*arguments, "--out", "r", "--resume"])
        phis = torch.load("r/meta_optimizer.pt", weights_only=True)["phis"]
        for name, phi in saved["phis"].items():
            for group, meta in phi.items():
                for key, weight in meta["state_dict"].items():
                    assert torch.equal(weight, phis[name][group]["state_dict"][key])
        csv = (tmp_path / "whole/metrics.csv").read_text()
        assert (tmp_path / "r/metrics.csv").read_text() == csv

    def test_resume_refuses_another_number(self, tmp_path, small_data, monkeypatch):
        monkeypatch.chdir(tmp_path)
        arguments = ["--dataset", "quadratic", *self.tiny, "--out", "r"]
        run.main([*arguments, "--tasks", "2"])
        with pytest.raises(InputError, match="run with tasks 2, not 1"):
            run.main([*arguments, "--resume"])

    def test_a_phi_brings_its_number(self, tmp_path, small_data, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run.main(["--dataset", "quadratic", *self.tiny, "--tasks", "2", "--out", "a"])
        load = ["--load", "a/meta_optimizer.pt"]
        with pytest.raises(InputError, match="leave out --tasks"):
            cli.parse([*load, "--tasks", "2"])
        loading = ["--dataset", "quadratic", "--quick", "--steps", "4", "--seeds", "1", *load]
        run.main([*loading, "--out", "b"])
        settings = json.loads((tmp_path / "b/config.json").read_text())["settings"]
        assert settings["tasks"] == 2
        old = torch.load("a/meta_optimizer.pt", weights_only=True)
        del old["config"]["tasks"]  # as files were before there was a choice
        torch.save(old, "old.pt")
        loading[-1] = "old.pt"
        run.main([*loading, "--out", "c"])
        settings = json.loads((tmp_path / "c/config.json").read_text())["settings"]
        assert settings["tasks"] == 1
