"""Networks that φ has not met, for `--optimizee` (the paper's section 5; ResNet-18 for CIFAR-10):

python run.py --load mnist-fgsm-0.1 --optimizee examples.networks:tanh
"""

from torch import nn


def perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Images -> logits, with hidden layers of these widths."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip((784, *widths), widths, strict=False):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def wide() -> nn.Module:
    return perceptron(40)


def deep() -> nn.Module:
    return perceptron(20, 20)


def tanh() -> nn.Module:
    return perceptron(20, activation=nn.Tanh)


def sigmoid() -> nn.Module:
    return perceptron(20, activation=nn.Sigmoid)


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)
