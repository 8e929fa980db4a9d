"""Perturbations beyond one l∞ ball, the paper's future work, as attacks for `run.py`:

python run.py --attack examples.perturbations:norms
python -m bench.reevaluate FOLDER L2L "Adam (attacked)" --attack examples.perturbations:l2

Each grows with eps, the l∞ radius beside it. The l2 radius is 10·eps. Of two or more, each batch
draws one.
"""

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from l2l_ref import fgsm, pgd


def drawn(*attacks):
    """An attack that is one of these on each batch. It leaves the l∞ ball, as they do."""

    def attack(model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        return attacks[int(torch.randint(len(attacks), ()))](model, x, y, eps=eps)

    return outside(attack)


def outside(attack):
    """Marks an attack that leaves the l∞ ball of eps, or its x_adv would be refused."""
    attack.norm = "other"
    return attack


@outside
def l2(model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return pgd(model, x, y, eps=10 * eps, norm="l2")


@outside
def l2_step(model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return fgsm(model, x, y, eps=10 * eps, norm="l2")


@outside
def noise(model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    """Gaussian (Hendrycks & Dietterich 2019), as blur and brightness are."""
    return (x + 3 * eps * torch.randn_like(x)).clamp(0, 1)


@outside
def blur(model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return gaussian_blur(x, 7, 15 * eps)


@outside
def brightness(model, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return (x + 3 * eps).clamp(0, 1)


norms = drawn(fgsm, l2_step)
natural = drawn(noise, blur, brightness)
