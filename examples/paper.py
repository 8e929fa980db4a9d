"""The whole paper on one page: MNIST under FGSM, Eq. 3 to 8, autograd through the unroll.

    python examples/paper.py [DATA_FOLDER]

It needs torch and torchvision alone, and two minutes. A test holds the package to its φ and θ."""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets

EPS, ALPHA, P = 0.1, 0.5, 10.0  # radius of the attacks; clean share of Eq. 6; range of Eq. 5
EPISODES, STEPS, UNROLL, BATCH, META_LR = 40, 100, 20, 128, 3e-3
SHAPES = (20, 784), (20,), (10, 20), (10,)  # θ: a network of one hidden layer
SIZES = [math.prod(shape) for shape in SHAPES]


def new_theta() -> Tensor:
    """θ₀ [15,910], as nn.Linear draws it."""
    layers = nn.Linear(784, 20), nn.Linear(20, 10)
    return torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])


def network(theta: Tensor, x: Tensor) -> Tensor:
    """Images [b, 784] -> logits [b, 10]."""
    w1, b1, w2, b2 = (part.view(s) for part, s in zip(theta.split(SIZES), SHAPES, strict=True))
    return F.linear(F.linear(x, w1, b1).relu(), w2, b2)


class MetaOptimizer(nn.Module):
    """m with its weights φ: an LSTM that all coordinates of θ share, each with its own state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 20, 2), nn.Linear(20, 1)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, gradient: Tensor, state):
        """Eq. 4: a gradient [N] -> its update u [N], and the next state."""
        h, state = self.lstm(preprocess(gradient)[None], state)
        return 0.01 * self.head(h).flatten(), state


def preprocess(g: Tensor) -> Tensor:
    """Eq. 5: [N] -> [N, 2]."""
    large = g.abs() >= math.exp(-P)
    log = torch.where(large, torch.where(large, g.abs(), 1.0).log() / P, -1.0)
    return torch.stack((log, torch.where(large, g.sign(), math.exp(P) * g)), dim=1)


def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(network(theta, x), y)


def robust_loss(theta: Tensor, x: Tensor, y: Tensor, alpha: float, eps: float) -> Tensor:
    """Eq. 6."""
    x_adv = fgsm(theta.detach(), x, y, eps)
    return alpha * loss(theta, x, y) + (1 - alpha) * loss(theta, x_adv, y)


def fgsm(theta: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Eq. 7."""
    return (x + eps * input_gradient(theta, x, y).sign()).clamp(0, 1)


def pgd(theta: Tensor, x: Tensor, y: Tensor, eps: float, steps: int = 20) -> Tensor:
    """Eq. 8."""
    x_adv = x + eps * (2 * torch.rand_like(x) - 1)
    for _ in range(steps):
        x_adv = x_adv + 2.5 * eps / steps * input_gradient(theta, x_adv, y).sign()
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
    return x_adv


def input_gradient(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(theta, x, y), x)[0]


def episode(phi: MetaOptimizer, schedule, theta: Tensor, batches, alpha: float, eps: float):
    """Train a θ with φ, and φ after each unroll. First order: its inputs are constants."""
    theta, state = theta.requires_grad_(), None
    gradient = torch.autograd.grad(robust_loss(theta, *next(batches), alpha, eps), theta)[0]
    for _ in range(STEPS // UNROLL):
        meta_loss = torch.zeros(())
        for _ in range(UNROLL):
            update, state = phi(gradient, state)
            theta = theta + update  # Eq. 3
            value = robust_loss(theta, *next(batches), alpha, eps)
            gradient = torch.autograd.grad(value, theta, retain_graph=True)[0]
            meta_loss = meta_loss + value
        phi.zero_grad()
        meta_loss.backward()
        nn.utils.clip_grad_norm_(phi.parameters(), 1.0)
        schedule.optimizer.step()
        schedule.step()
        theta = theta.detach().requires_grad_()
        state = tuple(part.detach() for part in state)
    return meta_loss.detach() / UNROLL


def train(theta: Tensor, batches, alpha: float, phi: MetaOptimizer | None = None) -> Tensor:
    """θ after STEPS updates by φ, or by Adam, on the loss of Eq. 6 (α = 1: on clean batches)."""
    theta, state = theta.clone().requires_grad_(), None
    adam = torch.optim.Adam([theta], 1e-3)
    for _ in range(STEPS):
        theta.grad = torch.autograd.grad(robust_loss(theta, *next(batches), alpha, EPS), theta)[0]
        if phi is None:
            adam.step()
            continue
        with torch.no_grad():
            update, state = phi(theta.grad, state)
            theta += update
    return theta.detach()


def draw(x: Tensor, y: Tensor):
    while True:
        for index in torch.randperm(len(x)).split(BATCH)[:-1]:
            yield x[index], y[index]


def main(folder: str = "data") -> None:
    torch.manual_seed(0)
    sets = [datasets.MNIST(folder, train=part, download=True) for part in (True, False)]
    (x, y), (x_test, y_test) = ((one.data.flatten(1) / 255, one.targets) for one in sets)
    halves = torch.randperm(len(x)).chunk(2)  # one meta-trains, the other trains what is compared
    batches, phi = draw(x[halves[0]], y[halves[0]]), MetaOptimizer()
    adam = torch.optim.Adam(phi.parameters(), META_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, EPISODES * STEPS // UNROLL)
    for number in range(1, EPISODES + 1):
        share = min(1.0, 2 * number / EPISODES)  # at once, φ would learn to predict a constant
        alpha, eps = 1 - share * (1 - ALPHA), share * EPS
        end = episode(phi, schedule, new_theta(), batches, alpha, eps)
        print(f"episode {number} of {EPISODES}: loss {end:.3f}, α {alpha:.2f}, ε {eps:.2f}")
    theta, x, y = new_theta(), x[halves[1]], y[halves[1]]
    print(f"\nafter {STEPS} steps               clean accuracy    under PGD-20 at {EPS}")
    rows = ("Adam, clean", 1.0, None), ("φ, attacked", ALPHA, phi), ("φ, clean", 1.0, phi)
    for name, alpha, by in rows:
        trained = train(theta, draw(x, y), alpha, by)
        images = x_test, pgd(trained, x_test, y_test, EPS)
        right = [(network(trained, z).argmax(1) == y_test).float().mean().item() for z in images]
        print(f"{name + ' batches':28} {right[0]:14.3f} {right[1]:18.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
