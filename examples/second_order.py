"""What the first order leaves out: the meta-gradient of 20-step unrolls with and without the path
through the inputs of φ (∂∇/∂θ, the paper's section 5), and what φ learns by each. MNIST under FGSM.

python examples/second_order.py [DATA_DIR] [EPISODES]
"""

import sys
import time
from itertools import islice
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from examples import paper
from l2l_ref import MetaOptimizer, MetaSettings, data
from l2l_ref.meta_training import apply_meta_gradient, meta_adam

SEEDS, EVERY, P = 3, 10, 5.0  # EVERY: unrolls between two that are differentiated both ways


def unrolled(phi: MetaOptimizer, theta: Tensor, gradient: Tensor, state: Tensor, batches: list,
             alpha: float, eps: float, order: int) -> tuple[Tensor, ...]:  # fmt: skip
    """Eq. 3 to 6 along an unroll: the meta-loss, then θ, its gradient and state at the end."""
    total = torch.zeros(())
    for x, y in batches:
        theta, state = phi(theta, gradient, state)
        value = paper.robust_loss(theta, x, y, alpha, eps)
        (gradient,) = torch.autograd.grad(value, theta, retain_graph=True, create_graph=order == 2)
        total = total + value
    return total, theta, gradient, state


def meta_gradient(phi: MetaOptimizer, *inputs, order: int) -> tuple[Tensor, float, tuple]:
    """dφ as one vector, the seconds it took, and what `unrolled` returns, without a graph."""
    begin = time.perf_counter()
    left = unrolled(phi, *inputs, order)
    parts = torch.autograd.grad(left[0], list(phi.parameters()))
    seconds = time.perf_counter() - begin
    return torch.cat([p.flatten() for p in parts]), seconds, tuple(x.detach() for x in left)


def meta_train(order: int, episodes: int, batches, compare: bool) -> tuple[MetaOptimizer, list]:
    """φ after so many episodes, and of some unrolls (cosine, ratio of norms, both seconds)."""
    phi, compared = MetaOptimizer(p=P), []
    settings = MetaSettings(episodes, meta_lr=paper.META_LR)
    group = nn.ModuleDict({"linear": phi})
    adam, unrolls = meta_adam(group, settings), paper.STEPS // paper.UNROLL
    for number in range(episodes):
        share = min(1.0, 2 * (number + 1) / episodes)
        strength = 1 - share * (1 - paper.ALPHA), share * paper.EPS
        theta = paper.new_theta().requires_grad_()
        value = paper.robust_loss(theta, *next(batches), *strength)
        (gradient,) = torch.autograd.grad(value, theta)
        state = phi.init_state(len(theta))
        for index in range(unrolls):
            drawn = [next(batches) for _ in range(paper.UNROLL)]
            theta.requires_grad_()
            inputs = phi, theta, gradient, state, drawn, *strength
            dphi, seconds, left = meta_gradient(*inputs, order=order)
            if compare and (number * unrolls + index) % EVERY == EVERY - 1:
                other, others, _ = meta_gradient(*inputs, order=3 - order)
                ratio = (dphi.norm() / other.norm()).item()
                compared.append((cosine_similarity(dphi, other, 0).item(), ratio, seconds, others))
            _, theta, gradient, state = left
            rate = settings.rate(number, index / unrolls)
            apply_meta_gradient(group, {"linear": dphi}, adam, rate, settings)
    return phi, compared


@torch.no_grad()
def transfer(phi: MetaOptimizer, theta: Tensor, batches) -> Tensor:
    """θ after STEPS updates by φ on half attacked batches."""
    state = phi.init_state(len(theta))
    for x, y in islice(batches, paper.STEPS):
        with torch.enable_grad():
            leaf = theta.requires_grad_()
            value = paper.robust_loss(leaf, x, y, paper.ALPHA, paper.EPS)
            (gradient,) = torch.autograd.grad(value, leaf)
        theta, state = phi(theta.detach(), gradient, state)
    return theta


def main(data_dir: str = "data", episodes: int | str = 140) -> dict[int, list[float]]:
    """Prints both tables; returns the losses under PGD-7 by order."""
    torch.set_num_threads(1)
    mnist, result = data.load("mnist", data_dir), {}
    halves = mnist.train.halves(0)
    x, y = mnist.test.first(1000).all()

    def drawn(half: data.ImageSet, seed: int):
        for x, y in half.batches(paper.BATCH, torch.Generator().manual_seed(seed)):
            yield x.flatten(1), y

    words = f"p = {P:g}, {episodes} episodes of {paper.STEPS} steps"
    print(f"{mnist.source}, FGSM at {paper.EPS}, {words}")
    for order in (1, 2):
        losses, all_compared, begin = [], [], time.perf_counter()
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            phi, compared = meta_train(order, int(episodes), drawn(halves[0], seed), order == 1)
            all_compared += compared
            for number in range(SEEDS):
                torch.manual_seed(1000 + number)
                theta = transfer(phi, paper.new_theta(), drawn(halves[1], number))
                x_adv = paper.pgd(theta, x.flatten(1), y, paper.EPS, steps=7)
                losses.append(paper.loss(theta, x_adv, y).item())
        minutes = (time.perf_counter() - begin) / 60
        print(
            f"order {order}: loss under PGD-7 {fmean(losses):.3f} ± {stdev(losses):.3f} over "
            f"{SEEDS} φ of {SEEDS} seeds, {minutes:.1f} minutes",
            flush=True,
        )
        result[order] = losses
        for name, c in zip(
            (
                "cosine of both dφ",
                "norm, first over second",
                "seconds, first order",
                "seconds, second order",
            ),
            zip(*all_compared, strict=True),
            strict=False,
        ):
            low, *_, high = sorted(c)
            print(f"{name}: median {sorted(c)[len(c) // 2]:.3f}, from {low:.3f} to {high:.3f}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
