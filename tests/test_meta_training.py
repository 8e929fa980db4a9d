"""Meta-training: it learns, it resumes to the same bits, and it survives what is not finite."""

import math

import pytest
import torch
from torch import nn

from l2l_ref import attacks, equations, problems
from l2l_ref import meta_optimizer as phis
from l2l_ref.episode import Episode, MetaSettings, truncated_unrolls
from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint
from l2l_ref.meta_training import History, how_it_ended, meta_train, watch
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method, train

BATCH = 16
PROBLEM = problems.make("quadratic", batch_size=BATCH)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(number: int) -> Episode:
    model = PROBLEM.draw(generator(number))
    batches = problems.quadratics(BATCH, generator(10_000 + number))
    return Episode(model, batches, attacks.none, PROBLEM.loss)


def new_phi(**settings) -> nn.ModuleDict:
    return phis.new_phi(PROBLEM.build(), generator=generator(1), **settings)


def settings(**changes) -> MetaSettings:
    clean = {"read_alpha": 1.0, "alpha": 1.0}
    return MetaSettings(**{"episodes": 4, "steps": 12, "unroll": 5, **clean, **changes})


def same(a: nn.ModuleDict, b: nn.ModuleDict) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def test_learned_optimizer_beats_tuned_sgd_on_quadratics():
    phi = new_phi(output_scale=0.1)
    history = meta_train(phi, settings(episodes=20, steps=60, unroll=20, meta_lr=0.01), draw)
    assert history.skipped == history.diverged == 0

    def final_loss(optimizer) -> float:
        losses = []
        for seed in range(3):
            episode = draw(1000 + seed)  # never seen in meta-training
            x, y = next(episode.batches)

            def record(model, x=x, y=y):
                loss = PROBLEM.loss(model, x, y).detach()
                return loss, loss

            curve = train(
                episode.model, Method("", optimizer), episode.batches, loss=PROBLEM.loss,
                attack=attacks.none, steps=60, record=record, every=60,
            )  # fmt: skip
            losses.append(curve.clean[-1])
        return sum(losses) / 3

    def sgd(lr):
        return lambda model: torch.optim.SGD(model.parameters(), lr=lr * BATCH)

    rates = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03)
    by_rate = {lr: final_loss(sgd(lr)) for lr in rates}
    best = min(by_rate, key=lambda lr: by_rate[lr] if math.isfinite(by_rate[lr]) else math.inf)
    assert best not in (rates[0], rates[-1])  # the optimum lies inside the grid
    learned = final_loss(lambda m: LearnedOptimizer(m.parameters(), phi["quadratic"]))
    assert learned < 0.9 * by_rate[best]


def test_unrolls_follow_the_equations_to_the_bit():
    """Losses, carried state and dφ of two unrolls, written out step by step."""
    phi = new_phi(output_scale=0.1)
    meta = phi["quadratic"]
    nn.init.constant_(meta.head.weight, 0.05)
    unrolls = list(truncated_unrolls(draw(0), phi, settings(steps=7, unroll=4)))
    assert [len(losses) for _, losses in unrolls] == [4, 3]

    episode = draw(0)
    x, y = next(episode.batches)
    theta, state = episode.model.theta.detach().flatten(), meta.init_state(10 * BATCH)

    def gradient(theta):
        theta = theta.view(BATCH, 10).requires_grad_()
        loss = ((x @ theta[..., None]).squeeze(-1) - y).square().sum(-1).mean()
        return loss.detach(), torch.autograd.grad(loss, theta)[0].flatten()

    for dphis, losses in unrolls:
        first, reads, judged, expected = state.clone(), [], [], []
        for _ in range(len(losses)):
            reads.append(gradient(theta.detach())[1])
            theta, state = equations.theta_step(
                theta.detach(), reads[-1], state.detach(), meta.phi(), **meta.form
            )
            loss, row = gradient(theta.detach())
            expected.append(loss)
            judged.append(row)
        dphi = equations.unroll_meta_gradient(
            torch.stack(reads), first.detach(),
            equations.update_cotangents(torch.stack(judged)), meta.phi(), **meta.form,
        )  # fmt: skip
        torch.testing.assert_close(losses, torch.stack(expected))
        torch.testing.assert_close(dphis["quadratic"], dphi)


def test_reads_one_loss_and_is_judged_by_another(small_digits):
    """read_alpha weighs the gradient that φ reads, alpha the losses and cotangents."""
    problem = problems.make("mnist")
    x, y = small_digits.train.batch(torch.arange(64))
    shift = lambda model, x, y: (x + 0.3).clamp(0, 1)  # noqa: E731  an attack easy to follow
    phi = phis.new_phi(problem.build(), generator=generator(0))

    def one(read_alpha, alpha):
        model = problem.draw(generator(0))
        episode = Episode(model, iter([(x, y)] * 9), shift)
        chosen = settings(steps=2, unroll=2, read_alpha=read_alpha, alpha=alpha)
        dphis, losses = next(truncated_unrolls(episode, phi, chosen))
        return dphis["linear"], losses

    model = problem.draw(generator(0))
    clean, adversarial = problem.loss(model, x, y), problem.loss(model, x + 0.3, y)
    adversarial = problem.loss(model, (x + 0.3).clamp(0, 1), y)
    # φ's head is zero, so θ does not move and every loss is that of θ₀
    torch.testing.assert_close(one(1, 1)[1], clean.detach().expand(2))
    torch.testing.assert_close(one(1, 0)[1], adversarial.detach().expand(2))
    torch.testing.assert_close(one(0, 0.5)[1], ((clean + adversarial) / 2).detach().expand(2))
    results = [one(*alphas)[0] for alphas in ((1, 1), (1, 0), (0, 1), (0, 0))]
    for i, a in enumerate(results):
        assert all(not torch.allclose(a, b, rtol=1e-3, atol=0) for b in results[:i])


def test_same_seed_same_bits():
    runs = []
    for _ in range(2):
        phi = new_phi(odd=True)
        runs.append((meta_train(phi, settings(), draw), phi))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_equals_uninterrupted(tmp_path, schedule):
    chosen = settings(schedule=schedule)
    whole, halves = new_phi(), new_phi()
    expected = meta_train(whole, chosen, draw)

    class Killed(Exception):
        pass

    def stop(episode, loss):
        if episode == 3:
            raise Killed

    path = tmp_path / "phi.pt"
    with pytest.raises(Killed):  # after the third of four episodes
        meta_train(halves, chosen, draw, checkpoint=path, on_episode=stop)
    assert read_checkpoint(path)["episodes"] == 3
    resumed = new_phi()
    history = meta_train(resumed, chosen, draw, checkpoint=path)
    assert same(resumed, whole) and history == expected
    again = new_phi()  # a finished one is not trained further
    assert meta_train(again, chosen, draw, checkpoint=path) == expected
    assert same(again, whole)


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "phi.pt"
    meta_train(new_phi(), settings(episodes=2), draw, checkpoint=path)
    before = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["phi.pt"]  # no partial file stays

    def half(value, to):
        to.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError):
        meta_train(new_phi(), settings(episodes=2), draw, checkpoint=tmp_path / "new.pt")
    assert path.read_bytes() == before and not (tmp_path / "new.pt").exists()


def test_other_settings_do_not_continue_a_checkpoint(tmp_path):
    path = tmp_path / "phi.pt"
    meta_train(new_phi(), settings(), draw, checkpoint=path)
    for chosen, phi in ((settings(meta_lr=0.1), new_phi()), (settings(), new_phi(p=5.0))):
        with pytest.raises(InputError, match="other settings"):
            meta_train(phi, chosen, draw, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_broken_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "phi.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="phi.pt"):
        read_checkpoint(path)


def test_loading_a_checkpoint_never_executes_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"settings": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="cannot be read"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_a_meta_gradient_that_is_not_finite_is_skipped_counted_and_survived():
    def poisoned(number):
        episode = draw(number)
        if number == 1:
            w, y = next(episode.batches)
            episode.batches = iter([(w, y)] * 3 + [(w * math.nan, y)] * 99)
        return episode

    phi = new_phi()
    history = meta_train(phi, settings(), poisoned)
    assert history.skipped == 1 and history.diverged == 1
    assert all(p.isfinite().all() for p in phi.parameters())
    unrolls = 3  # an episode; the poisoned one ends with its first
    assert len(history.loss) == 3 * unrolls + 1


def test_clipping_and_schedule():
    chosen = settings(episodes=4, schedule="cosine")
    assert chosen.rate(0, 0) == 1 and chosen.rate(2, 0) == pytest.approx(0.5)
    assert chosen.rate(3, 1) == pytest.approx(0) and chosen.rate(1, 1) == chosen.rate(2, 0)
    assert chosen.rate(0, 1 / 3) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 12))
    assert settings().rate(3, 1) == 1
    phi = new_phi()
    grads, rates = [], []
    adam_step = torch.optim.Adam.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        grads.append(torch.cat([p.grad.flatten() for p in phi.parameters()]).norm().item())
        return adam_step(self, *args)

    torch.optim.Adam.step = spy
    try:
        chosen = settings(clip=1e-3, schedule="cosine", meta_lr=2.0)
        history = meta_train(phi, chosen, draw)
    finally:
        torch.optim.Adam.step = adam_step
    assert max(history.norm) > 1e-2 and max(grads) <= 1e-3 * 1.001
    expected = [2.0 * chosen.rate(n, i / 3) for n in range(4) for i in range(3)]
    assert rates == expected and expected[:2] == [2.0, pytest.approx(1 + math.cos(math.pi / 12))]


class TestCurriculum:
    def test_strength_by_hand(self):
        def strengths(episodes, *shares):
            chosen = MetaSettings(episodes, curriculum=shares)
            return [chosen.strength(number) for number in range(episodes)]

        assert strengths(4, 0.0, 0.0) == [1, 1, 1, 1]
        assert strengths(9, 1 / 3, 2 / 3) == [0, 0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
        assert strengths(4, 0.0, 0.5) == [1 / 3, 2 / 3, 1, 1]
        assert strengths(4, 0.5, 0.5) == [0, 0, 1, 1]
        assert strengths(4, 1.0, 1.0) == [0, 0, 0, 0]
        assert strengths(10, 0.25, 0.45) == pytest.approx([0] * 3 + [1.5 / 3, 2.5 / 3] + [1] * 5)

    @pytest.mark.parametrize("strength, alphas", [(0, (1, 1)), (0.25, (0.9, 0.8)), (1, (0.6, 0.2))])
    def test_both_alphas_move_from_one(self, small_digits, strength, alphas):
        """What φ reads and is judged by at a strength is that of fixed α; both by hand."""
        problem = problems.make("mnist")
        x, y = small_digits.train.batch(torch.arange(64))
        shift = lambda model, x, y: (x + 0.3).clamp(0, 1)  # noqa: E731
        phi = phis.new_phi(problem.build(), generator=generator(0), hidden_size=3)
        calls = []

        def spy(gradients, state, cotangents, packed, *rest, **form):
            calls.append((gradients.clone(), cotangents.clone()))
            return torch.zeros_like(packed)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(equations, "unroll_meta_gradient", spy)
            chosen = settings(steps=2, unroll=2, read_alpha=0.6, alpha=0.2)
            model = problem.draw(generator(0))
            episode = Episode(model, iter([(x, y)] * 9), shift, strength=strength)
            ((_, losses),) = truncated_unrolls(episode, phi, chosen, "reference")
        model = problem.draw(generator(0))
        clean, attacked = problem.loss(model, x, y), problem.loss(model, shift(model, x, y), y)

        def gradient(alpha):  # φ's head is zero, so θ stays
            value = alpha * clean + (1 - alpha) * attacked
            parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            return value.detach(), torch.cat([part.flatten() for part in parts])

        (read, judging) = map(gradient, alphas)
        ((gradients, cotangents),) = calls
        torch.testing.assert_close(losses, judging[0].expand(2))
        torch.testing.assert_close(gradients, read[1].expand(2, -1))
        torch.testing.assert_close(cotangents, torch.stack((2 * judging[1], judging[1])))


class TestLengths:
    lengths = [7, 3, 12, 5]

    def draw(self, number: int) -> Episode:
        episode = draw(number)
        episode.steps, episode.strength = self.lengths[number], chosen_strength(number)
        return episode

    def test_an_episode_brings_its_own(self):
        for length in (1, 4, 5, 13):
            episode = draw(0)
            episode.steps = length
            found = list(truncated_unrolls(episode, new_phi(), settings(steps=6)))
            counts = [len(losses) for _, losses in found]
            assert sum(counts) == length and counts[:-1] == [5] * (len(counts) - 1)
        plain = list(truncated_unrolls(draw(0), new_phi(), settings(steps=6)))
        assert [len(losses) for _, losses in plain] == [5, 1]

    def test_the_rate_falls_by_episodes_whatever_their_lengths(self, monkeypatch):
        rates, step = [], torch.optim.Adam.step

        def spy(self, *args):
            rates.append([group["lr"] for group in self.param_groups])
            return step(self, *args)

        monkeypatch.setattr(torch.optim.Adam, "step", spy)
        chosen = settings(schedule="cosine", meta_lr=2.0, eta_lr=0.5)
        meta_train(new_phi(nominal=True), chosen, self.draw)
        shares = [n + i / k for n, k in enumerate((2, 1, 3, 1)) for i in range(k)]
        factors = [0.5 + 0.5 * math.cos(math.pi * share / 4) for share in shares]
        for rate, factor in zip(rates, factors, strict=True):
            assert rate == pytest.approx([2.0 * factor, 0.5 * factor])

    @pytest.mark.parametrize("form", [{}, {"odd": True, "theta_input": True}])
    @pytest.mark.parametrize("killed_at", [1, 2, 3])
    def test_resumed_equals_uninterrupted(self, tmp_path, form, killed_at):
        """With random lengths, the nominal term, a curriculum and a penalty."""
        chosen = settings(schedule="cosine", curriculum=(0.25, 0.75), meta_lr=0.01)
        whole, parts = new_phi(nominal=True, **form), new_phi(nominal=True, **form)
        expected = meta_train(whole, chosen, self.draw)
        assert len(expected.loss) == 2 + 1 + 3 + 1

        def stop(episode, loss):
            if episode == killed_at:
                raise KeyboardInterrupt

        path = tmp_path / "phi.pt"
        with pytest.raises(KeyboardInterrupt):
            meta_train(parts, chosen, self.draw, checkpoint=path, on_episode=stop)
        resumed = new_phi(nominal=True, **form)
        assert meta_train(resumed, chosen, self.draw, checkpoint=path) == expected
        assert same(resumed, whole)
        assert not same(whole, new_phi(nominal=True, **form))
        assert whole["quadratic"].log_eta != new_phi(nominal=True)["quadratic"].log_eta


def chosen_strength(number: int) -> float:
    return settings(curriculum=(0.25, 0.75)).strength(number)


class TestCheckpointsOfBefore:
    """Those written before there were a nominal term, a penalty, a curriculum and a watch."""

    def older(self, tmp_path, chosen, **form):
        """A checkpoint after two of four episodes, as it was written then."""
        path = tmp_path / "phi.pt"

        def stop(episode, loss):
            if episode == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            meta_train(new_phi(**form), chosen, draw, checkpoint=path, on_episode=stop)
        saved = torch.load(path, weights_only=True)
        for name in ("penalty", "curriculum", "eta_lr", "tasks"):
            del saved["settings"][name]
        for meta in saved["settings"]["meta_optimizers"].values():
            del meta["nominal"]
        for name in ("bad", "ended"):
            del saved["history"][name]
        torch.save(saved, path)
        return path

    @pytest.mark.parametrize("form", [{}, {"odd": True}])
    def test_they_continue(self, tmp_path, form):
        chosen = settings(schedule="cosine")
        whole, resumed = new_phi(**form), new_phi(**form)
        expected = meta_train(whole, chosen, draw)
        path = self.older(tmp_path, chosen, **form)
        assert meta_train(resumed, chosen, draw, checkpoint=path) == expected
        assert same(resumed, whole)

    @pytest.mark.parametrize(
        "changes", [{"penalty": 0.1}, {"curriculum": (0.0, 0.5)}, {"tasks": 2}, {"meta_lr": 0.1}]
    )
    def test_not_with_what_they_had_not(self, tmp_path, changes):
        path = self.older(tmp_path, settings())
        with pytest.raises(InputError, match="other settings"):
            meta_train(new_phi(), settings(**changes), draw, checkpoint=path)

    def test_not_with_a_nominal_term(self, tmp_path):
        path = self.older(tmp_path, settings())
        with pytest.raises(InputError, match="other settings"):
            meta_train(new_phi(nominal=True), settings(), draw, checkpoint=path)

    def test_a_rate_of_eta_belongs_to_the_settings(self, tmp_path):
        path = tmp_path / "phi.pt"
        meta_train(new_phi(nominal=True), settings(), draw, checkpoint=path)
        with pytest.raises(InputError, match="other settings"):
            meta_train(new_phi(nominal=True), settings(eta_lr=0.1), draw, checkpoint=path)


class TestWatch:
    def end(self, ends, episodes=20, **options):
        """The number of episodes that are watched until φ is given up, and why."""
        history, chosen = History(), MetaSettings(episodes, **options)
        for number, end in enumerate(ends):
            watch(history, chosen, number, end)
            if history.ended:
                return number + 1, history.ended
        return None

    def test_five_collapsed_or_three_not_finite(self):
        fine = ["ok"] * 4
        assert self.end([*fine, *["collapsed"] * 4]) is None
        assert self.end([*fine, *["collapsed"] * 5]) == (9, "collapsed")
        assert self.end([*fine, *["diverged"] * 2]) is None
        assert self.end([*fine, *["diverged"] * 3]) == (7, "diverged")

    def test_not_while_the_curriculum_is_clean(self):
        """There a φ that has not begun to move leaves its optimizees where they started."""
        idle = ["collapsed"] * 10
        assert self.end(idle) == (9, "collapsed")
        assert self.end(idle, curriculum=(0.5, 0.75)) is None
        assert self.end(idle * 2, curriculum=(0.5, 0.75)) == (15, "collapsed")

    def test_in_a_row(self):
        late = ["ok"] * 4
        assert self.end([*late, *(["collapsed"] * 4 + ["ok"]) * 3]) is None
        assert self.end([*late, *["diverged", "diverged", "ok", "diverged", "diverged"]]) is None
        # one bad end does not count for the other
        assert self.end([*late, *["collapsed", "collapsed", "diverged", "diverged"] * 4]) is None
        mixed = [*late, *["collapsed"] * 4, "diverged", *["collapsed"] * 4]
        assert self.end(mixed) is None and self.end([*mixed, "collapsed"]) == (14, "collapsed")

    def test_not_before_the_first_fifth_is_over(self):
        # of 20 episodes the first four do not count
        assert self.end(["diverged"] * 20) == (7, "diverged")
        assert self.end(["collapsed"] * 20) == (9, "collapsed")
        assert self.end(["diverged"] * 6) is None
        assert self.end(["diverged"] * 20, episodes=5) == (4, "diverged")

    def classify(self, logits, loss):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 10))
        model.forward = lambda x: logits
        batches = iter([(torch.rand(4, 1, 1, 2), torch.arange(4))])
        episode = Episode(model, batches, attacks.none, classes=10)
        return how_it_ended(episode, loss)

    def test_what_a_collapse_is(self):
        constant = torch.tensor([[0.1] + [0.0] * 9]).expand(4, 10)
        various = torch.eye(10)[:4]
        chance = math.log(10)
        for loss in (chance, 1.009 * chance, 0.991 * chance):
            assert self.classify(constant, loss) == "collapsed"
            assert self.classify(various, loss) == "ok"
        for loss in (1.011 * chance, 0.989 * chance, 0.1):
            assert self.classify(constant, loss) == "ok"
        for loss in (math.nan, math.inf):
            assert self.classify(various, loss) == self.classify(constant, loss) == "diverged"
        quadratic = draw(0)
        assert how_it_ended(quadratic, chance) == "ok"  # nothing to classify

    def test_the_judgement_leaves_the_optimizee_alone(self):
        problem = problems.make("cifar10")
        model = problem.draw(generator(0))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        batch = torch.rand(4, 3, 32, 32, generator=generator(1)), torch.arange(4)
        how_it_ended(Episode(model, iter([batch]), attacks.none, classes=10), math.log(10))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def poisoned(self, number):
        """Episodes from the third on meet a W that is not finite after three batches."""
        episode = draw(number)
        if number >= 2:
            w, y = next(episode.batches)
            episode.batches = iter([(w, y)] * 3 + [(w * math.nan, y)] * 99)
        return episode

    def test_meta_training_is_given_up_and_stays_so(self, tmp_path):
        path, done = tmp_path / "phi.pt", []
        chosen, phi = settings(episodes=12), new_phi()
        history = meta_train(
            phi, chosen, self.poisoned, checkpoint=path,
            on_episode=lambda number, loss: done.append(number),
        )  # fmt: skip
        # a fifth of 12 is 2.4, so numbers 3, 4 and 5 count
        assert history.ended == "diverged" and history.diverged == 4 and done == [1, 2, 3, 4, 5, 6]
        assert all(p.isfinite().all() for p in phi.parameters())
        again = new_phi()
        kept = meta_train(again, chosen, draw, checkpoint=path)
        assert repr(kept) == repr(history)  # nan is not nan, but reads so
        assert same(again, phi)  # no episode was added
        assert done == [1, 2, 3, 4, 5, 6]

    def test_the_count_goes_through_a_resume(self, tmp_path):
        path = tmp_path / "phi.pt"

        def stop(number, loss):
            if number == 5:  # after the second that counts
                raise KeyboardInterrupt

        chosen = settings(episodes=12)
        with pytest.raises(KeyboardInterrupt):
            meta_train(new_phi(), chosen, self.poisoned, checkpoint=path, on_episode=stop)
        history = meta_train(new_phi(), chosen, self.poisoned, checkpoint=path)
        assert history.ended == "diverged" and history.diverged == 4
        assert read_checkpoint(path)["episodes"] == 6
