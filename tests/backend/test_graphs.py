"""A step that is captured and replayed is the step: counts, copies, errors, whole trajectories."""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import SHAPE, generator
from graph_emulator import REFUSED, Emulated

import run
from l2l_ref import attacks, data, evaluate, problems
from l2l_ref.backend import cuda_graphs
from l2l_ref.backend.cuda_graphs import EAGER_CALLS, Graphed, graphs_of
from l2l_ref.episode import Episode, MetaSettings, truncated_unrolls
from l2l_ref.errors import InputError
from l2l_ref.experiment import cli, tuning
from l2l_ref.meta_optimizer import new_phi as untrained
from l2l_ref.meta_training import apply_meta_gradient
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method, train

CPU = torch.device("cpu")
SHORT = ["--quick", "--steps", "8", "--unroll", "4", "--jobs", "1"]


@pytest.fixture
def emulated(monkeypatch):
    """Steps on the CPU are captured by the emulator; the list of its instances."""
    made = []

    def graphs_of(device, generators):
        made.append(Emulated(device, generators))
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "graphs_of", graphs_of)
    return made


def warm(step, *inputs):
    """Up to the call that is captured."""
    for _ in range(EAGER_CALLS):
        step(*inputs)
    return step


class TestGraphed:
    def test_on_a_cpu_or_without_capture_a_call_is_a_call(self, emulated):
        step = Graphed(lambda x, y: (x, y.item()), CPU, capture=False)
        x = torch.ones(1)
        for count in range(EAGER_CALLS + 3):
            first, second = step(x, torch.tensor(count))
            assert first is x and second == count
        assert not emulated
        assert graphs_of(CPU, ()) is None

    def test_every_call_is_one_real_step(self, emulated):
        """Inputs are copied; outputs stay where they are."""
        total, held = torch.zeros(()), []

        def add(x):
            held.append(x)
            total.add_(x)
            return total * 2

        step, inputs, outputs = Graphed(add, CPU), torch.arange(1.0, 11.0).unbind(), []
        for count, x in enumerate(inputs, 1):
            outputs.append(step(x))
            assert total.item() == count * (count + 1) / 2 and outputs[-1].item() == 2 * total
        (fake,) = emulated
        assert (fake.eager, fake.captures, fake.replays) == (EAGER_CALLS, 1, 10 - EAGER_CALLS)
        assert len(held) == EAGER_CALLS + 1 and outputs[-1] is outputs[EAGER_CALLS]
        assert torch.stack(inputs).tolist() == list(range(1, 11))

    def test_other_shapes_are_refused(self, emulated):
        step = warm(Graphed(lambda x: x + 1, CPU), torch.zeros(3))
        step(torch.zeros(3))
        with pytest.raises(InputError, match=r"shape \[1\] but .* captured with \[3\].*capture=F"):
            step(torch.zeros(1))

    def test_a_step_that_waits_for_the_device_is_named(self, emulated):
        step = warm(Graphed(lambda x: x.item(), CPU), torch.zeros(()))
        with pytest.raises(InputError, match=f"cannot be captured.*{REFUSED}.*capture=False"):
            step(torch.zeros(()))

    def test_the_cause_is_named_where_the_end_of_the_capture_fails_too(self, emulated, monkeypatch):
        error = RuntimeError("capture invalidated")
        error.__context__ = ValueError("the true cause")
        monkeypatch.setattr(Emulated, "capture", Mock(side_effect=error))
        step = warm(Graphed(lambda: None, CPU))
        with pytest.raises(InputError, match="the true cause"):
            step()

    def test_a_generator_must_be_known(self, emulated):
        noise, expected = generator(), generator()
        draw = lambda: torch.empty(3).uniform_(generator=noise)  # noqa: E731
        step = Graphed(draw, CPU, generators=[noise])
        for _ in range(8):
            assert torch.equal(step(), torch.empty(3).uniform_(generator=expected))


def noise_images(dataset, count, device):
    images = torch.randint(256, (count, *SHAPE[dataset]), generator=generator(3)).byte()
    return data.ImageSet(images.to(device), (torch.arange(count) % 10).to(device))


# Episodes of 11 updates by three: dataset, attack, whether φ is the robust recipe's (odd, sees θ,
# reads α = 1, is judged by 0) or the paper's (reads and is judged by 0.5), and other settings.
EPISODES = {
    "mlp-paper": ("mnist", "fgsm", False, {}),
    "mlp-average": ("mnist", "pgd", False, {"input_alpha": 0.0, "alpha": 0.0, "average": 0.9}),
    "convnet-robust": ("cifar10", "pgd", True, {}),
    "quadratic": ("quadratic", "none", False, {"input_alpha": 1.0, "alpha": 1.0}),
    "mlp-penalty-nominal": ("mnist", "pgd", True, {"penalty": 0.1}),
    "convnet-nominal": ("cifar10", "pgd", True, {"average": 0.5, "penalty": 0.1}),
}


def new_phi(problem, device, **settings):
    """One whose head is not zero."""
    phi = untrained(problem.build(), generator=generator(1), output_scale=0.1, **settings)
    for meta in phi.values():
        torch.nn.init.uniform_(meta.head.weight, -0.5, 0.5, generator=generator(2))
    return phi.to(device)


def meta_run(name, capture, backend="auto", device=CPU):
    """All that an episode leads to, φ learning on the way."""
    dataset, attack, robust, chosen = EPISODES[name]
    problem = problems.make(dataset, batch_size=8)
    alphas = {"input_alpha": 1.0, "alpha": 0.0} if robust else {"input_alpha": 0.5, "alpha": 0.5}
    settings = MetaSettings(1, steps=11, unroll=3, **alphas | chosen)
    phi = new_phi(problem, device, odd=robust, theta_input=robust, nominal="nominal" in name)
    sgd, stream = torch.optim.SGD(phi.parameters()), generator(7)
    samples = problems.Quadratics(8, device)
    if dataset != "quadratic":
        samples = noise_images(dataset, 40, device)
    batches = samples.batches(8, stream)
    attack = attacks.make(attack, eps=0.1, steps=2, generator=generator(5, device))
    episode = Episode(problem.draw(generator(), device), batches, attack, problem.loss)
    found = []
    for dphis, losses in truncated_unrolls(episode, phi, settings, backend, capture=capture):
        found += [losses, *dphis.values()]
        apply_meta_gradient(phi, dphis, sgd, 0.1, settings)
    return [*found, *episode.model.parameters(), *episode.model.buffers(), *phi.parameters()]


@pytest.mark.parametrize("name", EPISODES)
def test_a_replayed_unroll_is_the_unroll_to_the_bit(emulated, name):
    eager, replayed = (meta_run(name, capture) for capture in (False, True))
    (fake,) = emulated
    assert (fake.captures, fake.replays) == (1, 11 - EAGER_CALLS)
    assert len(eager) == len(replayed) and all(map(torch.equal, eager, replayed))


def transfer_run(dataset, kind, captured, device=CPU, **options):
    """A curve, and the model behind it; batches, PGD and recordings from streams of their own."""
    problem = problems.make(dataset)
    phi = new_phi(problem, device, theta_input=True, nominal=True)
    optimizer = {
        "sgd": partial(tuning.sgd, lr=0.1),
        "adam": partial(tuning.adam, lr=1e-3),
        "learned": partial(LearnedOptimizer.for_model, phi=phi),
    }.get(kind, kind)
    model = problem.draw(generator(0), device)
    images = noise_images(dataset, 64, device)
    pgd = [attacks.make("pgd", eps=0.1, steps=2, generator=generator(s, device)) for s in (4, 5)]
    x, y = images.batch(torch.arange(16))
    curve = train(
        model, Method("", optimizer, **options), images.batches(8, generator(6)),
        loss=problem.loss, attack=pgd[0], steps=10,
        record=partial(evaluate.losses, x=x, y=y, attack=pgd[1]), capture=captured,
    )  # fmt: skip
    return curve, [*model.parameters(), *model.buffers()]


LOSSES = [{"alpha": 1.0}, {"alpha": 0.5}, {"alpha": 1.0, "l1": 1e-2},
          {"alpha": 0.5, "penalty": 0.1}]  # fmt: skip


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("kind", ["sgd", "learned"])
def test_a_replayed_transfer_is_the_transfer_to_the_bit(emulated, dataset, options, kind):
    (eager, state), (replayed, final) = (
        transfer_run(dataset, kind, capture, **options) for capture in (False, True)
    )
    update, probe = emulated
    assert (update.captures, update.replays) == (1, 10 - EAGER_CALLS)
    assert (probe.captures, probe.replays) == (1, 11 - EAGER_CALLS)
    assert replace(replayed, ms_per_step=0.0) == replace(eager, ms_per_step=0.0)
    assert len(set(eager.attacked)) == 11  # ten updates, ten changes
    assert all(map(torch.equal, state, final))


def test_what_a_graph_would_not_see_is_not_captured(emulated):
    """The rate of SGD with a cosine, and what the user's optimizer counts, are Python's numbers."""
    own = ["--compare", "torch.optim:RAdam"]
    rows = tuning.candidates(cli.parse(own), 0.1)
    methods = [next(iter(row.values())) for row in rows.values()]
    apart = {one.label for one in methods if not one.capture}
    assert apart == {"SGD + penalty + L1, cosine", "RAdam", "RAdam (attacked)"}
    nesterov = partial(tuning.sgd, lr=0.1, momentum=0.9, nesterov=True)
    transfer_run("mnist", nesterov, True, cosine=True, capture=False)
    assert sum(each.captures for each in emulated) == 1  # the recording


def test_a_run_captures_unless_told_not_to(workdir, monkeypatch, emulated):
    """With and without, the same results. SGD is in Adam's place, which reads its step count on a
    CPU."""
    monkeypatch.setattr(tuning, "adam", tuning.sgd)
    arguments = [*SHORT, "--dataset", "quadratic", "--episodes", "2", "--seeds", "1"]
    run.main([*arguments, "--out", "a"])
    assert sum(each.replays for each in emulated) > 0
    emulated.clear()
    run.main([*arguments, "--out", "b", "--no-graphs"])
    assert emulated == []
    assert (workdir / "a/metrics.csv").read_text() == (workdir / "b/metrics.csv").read_text()


@pytest.mark.gpu
class TestOnAGpu:
    """Replayed against launched one by one. Some sums may be taken in another order."""

    device = torch.device("cuda")

    @pytest.fixture(autouse=True)
    def deterministic(self, monkeypatch):
        """As in a run (`setting.prepare`); else a sign that flips would be another trajectory."""
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    close = staticmethod(partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5))

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("name", EPISODES)
    def test_meta_training(self, name, backend):
        self.close(*(meta_run(name, capture, backend, self.device) for capture in (True, False)))

    @pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
    @pytest.mark.parametrize("options", LOSSES)
    @pytest.mark.parametrize("kind", ["sgd", "adam", "learned"])
    def test_transfer(self, dataset, options, kind):
        (eager, state), (replayed, final) = (
            transfer_run(dataset, kind, capture, self.device, **options)
            for capture in (False, True)
        )
        self.close([replayed.clean, replayed.attacked, final], [eager.clean, eager.attacked, state])
        assert replayed.ms_per_step > 0

    def test_an_optimizer_that_cannot_be_captured_is_named(self):
        with pytest.raises(InputError, match="cannot be captured.*capturable is False"):
            transfer_run("mnist", lambda m: torch.optim.Adam(m.parameters()), True, self.device)

    @pytest.mark.parametrize("dataset", ["mnist", "cifar10", "quadratic"])
    def test_a_run(self, workdir, small_data, dataset):
        arguments = [*SHORT, "--dataset", dataset, "--batch-size", "32", "--device", "cuda"]
        arguments += ["--attack", "pgd"] * (dataset != "quadratic")
        for out in "ab":  # the same command, the same bits
            run.main([*arguments, "--out", out])
        assert (workdir / "a/metrics.csv").read_text() == (workdir / "b/metrics.csv").read_text()
