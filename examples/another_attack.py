"""A φ meta-trained under the attack of another library, foolbox's PGD (pip install foolbox).

python examples/another_attack.py [DATA_DIR]

An attack of any library is a function (model, x, y, eps) -> x_adv, which run.py takes by name:

python run.py --eval-attack examples.another_attack:auto_attack
"""

import sys
from functools import partial

import torch

import l2l_ref
from l2l_ref import data, problems


def foolbox_pgd(model, x, y, eps):
    import foolbox

    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    return foolbox.attacks.LinfPGD(steps=7)(bounded, x, y, epsilons=eps)[1]


def auto_attack(model, x, y, eps):
    import torchattacks

    return torchattacks.AutoAttack(model, eps=eps, n_classes=10)(x, y)


def main(data_dir: str = "data", episodes: int = 20, steps: int = 60) -> list[float]:
    images = data.load("mnist", data_dir).train
    problem = problems.make("mnist")
    attack = partial(foolbox_pgd, eps=0.1)

    def draw(number: int) -> l2l_ref.Episode:
        generator = torch.Generator().manual_seed(number)
        model = problem.draw(generator)
        return l2l_ref.Episode(model, images.batches(128, generator), attack)

    phi = l2l_ref.new_phi(problem.build(), generator=torch.Generator().manual_seed(0))
    settings = l2l_ref.MetaSettings(episodes, steps=steps, meta_lr=3e-3, alpha=0.5, input_alpha=0.5)
    history = l2l_ref.meta_train(
        phi, settings, draw,
        on_episode=lambda done, loss: print(f"episode {done}: meta-loss {loss:.3f}"),
    )  # fmt: skip
    return history.loss


if __name__ == "__main__":
    main(*sys.argv[1:])
