"""Robust learned optimizers: the reference implementation of "Learning to Learn from Mistakes:
Robust Optimization for Adversarial Noise" (Serban, Poll and Visser 2020).

A φ that has been meta-trained under attack trains any model, on clean batches:

    phi = l2l_ref.load("mnist-fgsm-0.1-robust")  # or the meta_optimizer.pt of a run
    optimizer = l2l_ref.LearnedOptimizer.for_model(model, phi)
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    attack = functools.partial(l2l_ref.pgd, eps=0.1, steps=20)
    l2l_ref.robust_accuracy(model, images, attack)

`meta_train` makes a φ: an `Episode` brings an optimizee, its batches and an attack.
"""

from l2l_ref.attacks import fgsm, pgd
from l2l_ref.episode import Episode, MetaSettings
from l2l_ref.errors import InputError
from l2l_ref.evaluate import robust_accuracy
from l2l_ref.meta_optimizer import MetaOptimizer, new_phi
from l2l_ref.meta_training import meta_train
from l2l_ref.optimizer import LearnedOptimizer
from l2l_ref.pretrained import list_pretrained, load

__version__ = "0.1.0"
__all__ = [
    "Episode",
    "InputError",
    "LearnedOptimizer",
    "MetaOptimizer",
    "MetaSettings",
    "fgsm",
    "list_pretrained",
    "load",
    "meta_train",
    "new_phi",
    "pgd",
    "robust_accuracy",
]
