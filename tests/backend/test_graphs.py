"""A step that is captured and replayed is the step: counts, copies, errors, whole trajectories."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SHAPE, generator
from graph_emulator import REFUSED, Emulated

import run
from l2l_ref import attacks, data, evaluate, problems
from l2l_ref.backend import cuda_graphs
from l2l_ref.backend.cuda_graphs import EAGER_CALLS, Graphed
from l2l_ref.episode import Episode, truncated_unrolls
from l2l_ref.errors import InputError
from l2l_ref.experiment import tuning
from l2l_ref.meta_optimizer import new_phi as untrained
from l2l_ref.meta_settings import MetaSettings
from l2l_ref.meta_training import apply_meta_gradient
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method, train

CPU = torch.device("cpu")


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
    def test_on_a_cpu_a_call_is_a_call(self):
        seen = []
        step = Graphed(lambda *inputs: seen.append(inputs) or len(seen), CPU)
        x, y = torch.ones(1), torch.ones(2)
        assert [step(x, y) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        assert all(inputs[0] is x and inputs[1] is y for inputs in seen)

    def test_every_call_is_one_real_step(self, emulated):
        total, python_calls = torch.zeros(()), []

        def add(x):
            python_calls.append(1)
            total.add_(x)
            return total * 2

        step = Graphed(add, CPU)
        for count in range(1, 11):
            out = step(torch.tensor(float(count)))
            assert total.item() == count * (count + 1) / 2 and out.item() == 2 * total.item()
        (fake,) = emulated
        assert (fake.eager, fake.captures, fake.replays) == (EAGER_CALLS, 1, 10 - EAGER_CALLS)
        assert len(python_calls) == EAGER_CALLS + 1

    def test_inputs_are_copied_and_outputs_stay_where_they_are(self, emulated):
        held = []
        step = warm(Graphed(lambda x: held.append(x) or x + 1, CPU), torch.zeros(2))
        first = torch.tensor([1.0, 2.0])
        out = step(first)
        assert held[-1] is not first
        kept, copied = out, out.clone()
        second = torch.tensor([5.0, 6.0])
        again = step(second)
        assert again is kept and again.tolist() == [6.0, 7.0] and copied.tolist() == [2.0, 3.0]
        assert first.tolist() == [1.0, 2.0] and second.tolist() == [5.0, 6.0]

    def test_capture_false_never_captures(self, emulated):
        step = Graphed(lambda x: x.item(), CPU, capture=False)
        assert [step(torch.tensor(float(i))) for i in range(8)] == list(range(8))
        assert not emulated

    def test_other_shapes_are_refused(self, emulated):
        step = warm(Graphed(lambda x: x + 1, CPU), torch.zeros(3))
        step(torch.zeros(3))
        with pytest.raises(InputError, match=r"shape \[1\] but .* captured with \[3\].*capture=F"):
            step(torch.zeros(1))

    def test_a_step_that_waits_for_the_device_is_named(self, emulated):
        step = warm(Graphed(lambda x: x.item(), CPU), torch.zeros(()))
        with pytest.raises(InputError, match=f"cannot be captured.*{REFUSED}.*capture=False"):
            step(torch.zeros(()))

    def test_the_cause_is_named_where_the_end_of_the_capture_fails_too(self, monkeypatch):
        class Broken(Emulated):
            def capture(self, function):
                try:
                    function()
                finally:
                    raise RuntimeError("capture invalidated")

        monkeypatch.setattr(cuda_graphs, "graphs_of", Broken)

        calls = itertools.count()

        def fails():
            if next(calls) == EAGER_CALLS:
                raise ValueError("the true cause")

        step = warm(Graphed(fails, CPU))
        with pytest.raises(InputError, match="the true cause"):
            step()

    def test_a_generator_must_be_known(self, emulated):
        noise = generator()
        draw = lambda: torch.empty(3).uniform_(generator=noise)  # noqa: E731
        step, expected = Graphed(draw, CPU, generators=[noise]), generator()
        for _ in range(8):
            assert torch.equal(step(), torch.empty(3).uniform_(generator=expected))
        step = warm(Graphed(draw, CPU))
        with pytest.raises(InputError, match="not registered"):
            step()


def test_the_generators_of_an_attack_are_found():
    noise, other = generator(), generator()
    attack = attacks.make("pgd", eps=0.1, generator=noise)
    assert attacks.generators(attack) == [noise]
    assert attacks.generators(partial(evaluate.losses, attack=attack, x=other)) == [noise, other]
    for none in (attacks.none, attacks.make("fgsm", eps=0.1), attacks.make("pgd", eps=0.1)):
        assert attacks.generators(none) == []


def noise_images(dataset, count, device):
    images = torch.randint(256, (count, *SHAPE[dataset]), generator=generator(3)).byte()
    return data.ImageSet(images.to(device), (torch.arange(count) % 10).to(device))


def cases(device=CPU):
    """Episodes of 11 updates by three: optimizee, attack, α that φ reads and is judged by, d, λ,
    and whether φ has a nominal term."""
    datasets = {"mlp": "mnist", "convnet": "cifar10", "quadratic": "quadratic"}

    def case(name, attack, read_alpha, alpha, average=0.0, penalty=0.0, nominal=False):
        problem = problems.make(datasets[name], batch_size=8)
        settings = MetaSettings(1, steps=11, unroll=3, read_alpha=read_alpha, alpha=alpha,
                                average=average, penalty=penalty)  # fmt: skip

        def episode():
            stream = generator(7)
            if name == "quadratic":
                batches = problems.quadratics(8, stream, device)
            else:
                batches = noise_images(datasets[name], 40, device).batches(8, stream)
            noise = generator(5, device)
            chosen = attacks.make(attack, eps=0.1, steps=2, generator=noise)
            return Episode(problem.draw(generator(), device), batches, chosen, problem.loss)

        return problem, settings, episode, nominal

    yield case("mlp", "fgsm", 0.5, 0.5)  # the paper's recipe
    yield case("mlp", "pgd", 1.0, 0.0)  # the robust one
    yield case("mlp", "pgd", 0.0, 0.0, average=0.5)
    yield case("convnet", "pgd", 1.0, 0.0)
    yield case("convnet", "fgsm", 0.5, 0.5, average=0.5)
    yield case("quadratic", "none", 1.0, 1.0)
    yield case("mlp", "fgsm", 0.5, 0.5, nominal=True)
    yield case("mlp", "pgd", 1.0, 0.0, penalty=0.1, nominal=True)
    yield case("convnet", "pgd", 1.0, 0.0, average=0.5, penalty=0.1, nominal=True)


NAMES = ["mlp-paper", "mlp-robust", "mlp-pgd-average", "convnet-robust",
         "convnet-paper-average", "quadratic",
         "mlp-nominal", "mlp-penalty", "convnet-penalty-2"]  # fmt: skip


def new_phi(problem, device=CPU, theta_input=True, nominal=True, odd=False):
    """One whose head is not zero."""
    phi = untrained(
        problem.build().to(device), generator=generator(1),
        output_scale=0.1, odd=odd, theta_input=theta_input, nominal=nominal,
    )  # fmt: skip
    for meta in phi.values():
        noise = torch.empty(meta.head.weight.shape).uniform_(-0.5, 0.5, generator=generator(2))
        meta.head.weight.data.copy_(noise)
    return phi


def meta_run(problem, settings, episode, nominal, capture, backend="auto", device=CPU):
    """All that an episode leads to, φ learning on the way."""
    robust = settings.read_alpha != settings.alpha
    phi = new_phi(problem, device, odd=robust, theta_input=robust, nominal=nominal)
    sgd = torch.optim.SGD(phi.parameters())
    episode, found = episode(), []
    for dphis, losses in truncated_unrolls(episode, phi, settings, backend, capture=capture):
        found += [losses, *dphis.values()]
        apply_meta_gradient(phi, dphis, sgd, 0.1, settings)
    return [*found, *episode.model.parameters(), *episode.model.buffers(), *phi.parameters()]


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_a_replayed_unroll_is_the_unroll_to_the_bit(emulated, number):
    case = list(cases())[number]
    eager = meta_run(*case, capture=False)
    assert not emulated
    replayed = meta_run(*case, capture=True)
    (fake,) = emulated
    assert (fake.captures, fake.replays) == (1, 11 - EAGER_CALLS)
    assert len(eager) == len(replayed) and all(map(torch.equal, eager, replayed))


def transfer_run(dataset, kind, capture, device=CPU, **options):
    """A curve, and the model behind it; batches, PGD and recordings from streams of their own."""
    problem = problems.make(dataset)
    optimizer = {
        "sgd": partial(tuning.sgd, 0.1),
        "adam": partial(tuning.adam, 1e-3),
        "learned": partial(LearnedOptimizer.for_model, phi=new_phi(problem, device)),
    }.get(kind, kind)
    model = problem.draw(generator(0), device)
    images = noise_images(dataset, 64, device)
    pgd = [attacks.make("pgd", eps=0.1, steps=2, generator=generator(s, device)) for s in (4, 5)]
    x, y = images.batch(torch.arange(16))
    curve = train(
        model, Method("", optimizer, **options), images.batches(8, generator(6)),
        loss=problem.loss, attack=pgd[0], steps=10,
        record=partial(evaluate.losses, x=x, y=y, attack=pgd[1]), capture=capture,
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


def test_an_optimizer_that_cannot_be_captured_is_named(emulated):
    with pytest.raises(InputError, match="cannot be captured.*capture=False"):
        transfer_run("mnist", "adam", True)  # on a CPU its step count is read


def test_a_run_captures_unless_told_not_to(workdir, monkeypatch, emulated):
    """With and without, the same results. SGD is in Adam's place, which reads its step count on a
    CPU."""
    monkeypatch.setattr(tuning, "adam", tuning.sgd)
    arguments = ["--quick", "--dataset", "quadratic", "--steps", "8", "--unroll", "4"]
    arguments += ["--episodes", "2", "--seeds", "1", "--jobs", "1"]
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
    @pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
    def test_meta_training(self, number, backend):
        case = list(cases(self.device))[number]
        eager, replayed = (
            meta_run(*case, capture, backend, self.device) for capture in (False, True)
        )
        self.close(replayed, eager)

    @pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
    @pytest.mark.parametrize("options", LOSSES)
    @pytest.mark.parametrize("kind", ["sgd", "adam", "learned"])
    def test_transfer(self, dataset, options, kind):
        (eager, state), (replayed, final) = (
            transfer_run(dataset, kind, capture, self.device, **options)
            for capture in (False, True)
        )
        self.close(replayed.clean, eager.clean)
        self.close(replayed.attacked, eager.attacked)
        self.close(final, state)
        assert replayed.ms_per_step > 0

    def test_an_optimizer_that_cannot_be_captured_is_named(self):
        with pytest.raises(InputError, match="cannot be captured.*capturable is False"):
            transfer_run("mnist", lambda m: torch.optim.Adam(m.parameters()), True, self.device)

    @pytest.mark.parametrize("dataset", ["mnist", "cifar10", "quadratic"])
    def test_a_run(self, workdir, small_data, dataset):
        arguments = ["--quick", "--dataset", dataset, "--steps", "8", "--unroll", "4"]
        arguments += ["--jobs", "1"]
        arguments += ["--attack", "pgd"] * (dataset != "quadratic")
        arguments += ["--batch-size", "32", "--device", "cuda"]
        for out in "ab":  # the same command, the same bits
            run.main([*arguments, "--out", out])
        assert (workdir / "a/metrics.csv").read_text() == (workdir / "b/metrics.csv").read_text()
