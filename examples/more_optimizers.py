"""Optimizers of others, as rows of the table (`pip install schedulefree`):

python run.py --compare examples.more_optimizers:schedule_free examples.more_optimizers:rmsprop
"""

import torch
from torch import nn


def schedule_free(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam with an average of its own in the place of a schedule (Defazio et al. 2024)."""
    import schedulefree

    return schedulefree.AdamWScheduleFree(model.parameters(), lr=lr)


def rmsprop(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=lr)
