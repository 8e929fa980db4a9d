"""Made-up pictures in the shape of MNIST and CIFAR-10, for a machine that has neither.

`digits` draws those of a clock, slanted, bent and turned as by hand, `coloured_digits` the same in
one colour on another. Both are learnable without being trivial: a linear model stays below a small
network. They stand in for the real sets so that everything runs; no result on them is a result on
MNIST or CIFAR-10.

The same seed is meant to give the same bytes on every machine. So the pictures are made of uniform
draws from a CPU generator, in float32, with elementwise + - * / sqrt and floor alone: IEEE 754
fixes how these round, while vectorised sines, Gaussians and matrix products differ between CPUs.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

CLASSES = 10
CHUNK = 250  # pictures drawn at a time, to keep the temporaries in cache

Draw = Callable[[Tensor, Generator], Tensor]  # labels [n], generator -> uint8 [n, c, side, side]


def digits(n_train: int = 60_000, n_test: int = 10_000, seed: int = 0) -> tuple[Tensor, ...]:
    """Draw a stand-in for MNIST: jittered strokes of the ten digits on a black ground.

    Args:
        n_train, n_test: pictures in each set; every class has its tenth, up to rounding.
        seed: any integer; the training set does not depend on `n_test`.

    Returns:
        (train_images, train_labels, test_images, test_labels): uint8 [n, 1, 28, 28] and
        int64 [n] in 0..9, on the CPU.
    """
    return _two_sets(n_train, n_test, seed, _draw_digits)


def coloured_digits(
    n_train: int = 50_000, n_test: int = 10_000, seed: int = 0
) -> tuple[Tensor, ...]:
    """Paint a stand-in for CIFAR-10: the ten digits in random colours, with noise.

    As `digits`, but for images of [n, 3, 32, 32].
    """
    return _two_sets(n_train, n_test, seed, _paint_digits)


def _two_sets(n_train: int, n_test: int, seed: int, draw: Draw) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    # A second of work in one thread. Two would halve that, but on a busy machine they wait for each
    # other after every small operation, which has been seen to take a minute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (*_one_set(n_train, generator, draw), *_one_set(n_test, generator, draw))
    finally:
        torch.set_num_threads(threads)


def _one_set(n: int, generator: Generator, draw: Draw) -> tuple[Tensor, Tensor]:
    labels = (torch.arange(n) % CLASSES)[torch.randperm(n, generator=generator)]
    return torch.cat([draw(chunk, generator) for chunk in labels.split(CHUNK)]), labels


def _uniform(shape: tuple[int, ...], generator: Generator, low: float, high: float) -> Tensor:
    draws = torch.rand(shape, generator=generator, dtype=torch.float32)
    return draws * (high - low) + low


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Pixel centres in [-1, 1]: (x, y), each float32 [side * side], row by row."""
    centres = (torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1
    return centres.repeat(side), centres.repeat_interleave(side)


# Seven strokes, as of a digital clock: x and y of the middle, half the width, half the height; and
# for each digit those that it has.
STROKES = torch.tensor([
    [0.0, -0.7, 0.4, 0.0], [0.4, -0.35, 0.0, 0.35], [0.4, 0.35, 0.0, 0.35], [0.0, 0.7, 0.4, 0.0],
    [-0.4, 0.35, 0.0, 0.35], [-0.4, -0.35, 0.0, 0.35], [0.0, 0.0, 0.4, 0.0],
], dtype=torch.float32)  # fmt: skip
DIGITS = ("012345", "12", "01643", "01623", "5612", "05623", "056432", "012", "0123456", "012356")
HAS = torch.tensor([[str(stroke) in digit for stroke in range(7)] for digit in DIGITS])


def _distances(labels: Tensor, generator: Generator, side: int) -> Tensor:
    """Of each pixel from the strokes of a digit, jittered: [n, side²]."""
    n = len(labels)

    def draw(low: float, high: float) -> Tensor:
        return _uniform((n, 1), generator, low, high)

    # Every pixel asks where in the glyph it lies, so these are the inverse of the jitter: a larger
    # width here makes a narrower digit.
    width, height, slant, turn = draw(1.1, 1.8), draw(1.1, 1.6), draw(-0.2, 0.5), draw(-0.3, 0.3)
    x, y = _grid(side)
    x, y = x + draw(-0.13, 0.13), y + draw(-0.13, 0.13)
    u, v = (x + turn * y) * width, (y - turn * x) * height
    u = u + slant * v + draw(-0.3, 0.3) * v * v  # italics, and a bend of the whole digit

    found = torch.full_like(u, 9.0)
    for stroke, (cx, cy, half_width, half_height) in enumerate(STROKES):
        dx = ((u - cx).abs() - half_width).clamp(min=0)
        dy = ((v - cy).abs() - half_height).clamp(min=0)
        distance = (dx * dx + dy * dy).sqrt()
        found = torch.where(HAS[labels, stroke, None], torch.minimum(found, distance), found)
    return found


def _covered(distance: Tensor, generator: Generator) -> Tensor:
    """How much of each pixel a pen of random width covers, in [0, 1]."""
    pen = _uniform((len(distance), 1), generator, 0.08, 0.2)
    return ((pen - distance) * 10 + 0.5).clamp(0, 1)


def _draw_digits(labels: Tensor, generator: Generator) -> Tensor:
    n = len(labels)
    distance = _distances(labels, generator, 28)
    noise = _uniform((n, 28 * 28), generator, 0, 1)
    ink = _covered(distance, generator) * _uniform((n, 1), generator, 0.7, 1.1)
    # Dirt stays near the pen: as in MNIST, the border is black in almost every picture.
    dirt = (noise - 0.8).clamp(min=0) * (0.4 - distance).clamp(min=0) * 2
    picture = (ink * (1 - 0.25 * noise) + dirt) * 255
    return picture.clamp(0, 255).to(torch.uint8).view(n, 1, 28, 28)


def _paint_digits(labels: Tensor, generator: Generator) -> Tensor:
    n = len(labels)
    coverage = _covered(_distances(labels, generator, 32), generator)[:, None]
    ground = _uniform((n, 3, 1), generator, 0, 1)
    figure = ground + _uniform((n, 3, 1), generator, 0.35, 0.65)
    figure = figure - figure.floor()  # modulo 1: every channel differs from the ground's by >= 0.35
    noise = _uniform((n, 3, 32 * 32), generator, -0.15 * 255, 0.15 * 255)
    picture = ground * 255 + (figure - ground) * 255 * coverage + noise
    return picture.clamp(0, 255).to(torch.uint8).view(n, 3, 32, 32)
