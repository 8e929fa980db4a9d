"""Meta-training: it learns, it resumes to the same bits, and it survives what is not finite."""

import math

import pytest
import torch
from torch import nn

from l2l_ref import attacks, equations, problems
from l2l_ref.errors import InputError
from l2l_ref.files import read_checkpoint
from l2l_ref.meta_train import (
    Episode,
    MetaSettings,
    meta_train,
    new_meta_optimizers,
    truncated_unrolls,
)
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.transfer import Method, train

BATCH = 16
PROBLEM = problems.make("quadratic", batch_size=BATCH)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(number: int) -> Episode:
    model = PROBLEM.draw(generator(number))
    return Episode(model, problems.quadratics(BATCH, generator(10_000 + number)), attacks.none)


def new_phi(**settings) -> nn.ModuleDict:
    return new_meta_optimizers(PROBLEM, generator(1), "cpu", **settings)


def settings(**changes) -> MetaSettings:
    clean = {"read_alpha": 1.0, "alpha": 1.0}
    return MetaSettings(**{"episodes": 4, "steps": 12, "unroll": 5, **clean, **changes})


def same(a: nn.ModuleDict, b: nn.ModuleDict) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def test_learned_optimizer_beats_tuned_sgd_on_quadratics():
    phi = new_phi(output_scale=0.1)
    history = meta_train(
        PROBLEM, phi, settings(episodes=20, steps=60, unroll=20, meta_lr=0.01), draw
    )
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
    unrolls = list(truncated_unrolls(PROBLEM, draw(0), phi, settings(steps=7, unroll=4)))
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
    phi = new_meta_optimizers(problem, generator(0), "cpu")

    def one(read_alpha, alpha):
        model = problem.draw(generator(0))
        episode = Episode(model, iter([(x, y)] * 9), shift)
        chosen = settings(steps=2, unroll=2, read_alpha=read_alpha, alpha=alpha)
        dphis, losses = next(truncated_unrolls(problem, episode, phi, chosen))
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
        runs.append((meta_train(PROBLEM, phi, settings(), draw), phi))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_equals_uninterrupted(tmp_path, schedule):
    chosen = settings(schedule=schedule)
    whole, halves = new_phi(), new_phi()
    expected = meta_train(PROBLEM, whole, chosen, draw)

    class Killed(Exception):
        pass

    def stop(episode, loss):
        if episode == 3:
            raise Killed

    path = tmp_path / "phi.pt"
    with pytest.raises(Killed):  # after the third of four episodes
        meta_train(PROBLEM, halves, chosen, draw, checkpoint=path, on_episode=stop)
    assert read_checkpoint(path)["episodes"] == 3
    resumed = new_phi()
    history = meta_train(PROBLEM, resumed, chosen, draw, checkpoint=path)
    assert same(resumed, whole) and history == expected
    again = new_phi()  # a finished one is not trained further
    assert meta_train(PROBLEM, again, chosen, draw, checkpoint=path) == expected
    assert same(again, whole)


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "phi.pt"
    meta_train(PROBLEM, new_phi(), settings(episodes=2), draw, checkpoint=path)
    before = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["phi.pt"]  # no partial file stays

    def half(value, to):
        to.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError):
        meta_train(PROBLEM, new_phi(), settings(episodes=2), draw, checkpoint=tmp_path / "new.pt")
    assert path.read_bytes() == before and not (tmp_path / "new.pt").exists()


def test_other_settings_do_not_continue_a_checkpoint(tmp_path):
    path = tmp_path / "phi.pt"
    meta_train(PROBLEM, new_phi(), settings(), draw, checkpoint=path)
    for chosen, phi in ((settings(meta_lr=0.1), new_phi()), (settings(), new_phi(p=5.0))):
        with pytest.raises(InputError, match="other settings"):
            meta_train(PROBLEM, phi, chosen, draw, checkpoint=path)


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
    history = meta_train(PROBLEM, phi, settings(), poisoned)
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
        history = meta_train(PROBLEM, phi, chosen, draw)
    finally:
        torch.optim.Adam.step = adam_step
    assert max(history.norm) > 1e-2 and max(grads) <= 1e-3 * 1.001
    expected = [2.0 * chosen.rate(n, i / 3) for n in range(4) for i in range(3)]
    assert rates == expected and expected[:2] == [2.0, pytest.approx(1 + math.cos(math.pi / 12))]
