"""Made-up pictures in the shape of MNIST and CIFAR-10, for a machine that has neither.

`digits` draws handwriting from the strokes of the ten digits, `coloured_digits` the same in one
colour on another. Both are learnable without being trivial: a linear model stays well below a small
network. They stand in for the real sets so that everything runs; no result on them is a result on
MNIST or CIFAR-10.

The same seed is meant to give the same bytes on every machine. So the pictures are made of uniform
draws from a CPU generator, in float32, with elementwise + - * / sqrt and floor alone: IEEE 754
fixes how these round, while vectorised sines, Gaussians and matrix products differ between CPUs.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Generator, Tensor

CLASSES = 10
CHUNK = 250  # pictures drawn at a time, to keep the temporaries in cache

Draw = Callable[[Tensor, Generator], Tensor]  # labels [n], generator -> uint8 [n, c, side, side]
Stroke = list[tuple[float, float]]  # a polyline in the unit square, y downwards


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


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float) -> Stroke:
    """An elliptic arc as a polyline; angles in degrees, 0 to the right, clockwise on screen."""
    angles = [math.radians(start + (stop - start) * i / 12) for i in range(13)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


# Two ways to write each digit; a stroke is one movement of the pen.
GLYPHS: list[tuple[list[Stroke], list[Stroke]]] = [
    ([_arc(0.5, 0.5, 0.28, 0.42, 0, 360)], [_arc(0.5, 0.5, 0.36, 0.38, 0, 360)]),
    ([[(0.5, 0.08), (0.5, 0.92)]], [[(0.34, 0.26), (0.52, 0.08), (0.52, 0.92)]]),
    (
        [_arc(0.5, 0.32, 0.27, 0.24, -160, 40) + [(0.2, 0.92), (0.8, 0.92)]],
        [_arc(0.48, 0.3, 0.26, 0.22, -150, 60) + _arc(0.32, 0.8, 0.12, 0.11, 60, 380)
         + [(0.82, 0.92)]],
    ),
    (
        [_arc(0.46, 0.29, 0.25, 0.21, -150, 90) + _arc(0.46, 0.71, 0.29, 0.21, -90, 150)],
        [[(0.22, 0.1), (0.74, 0.1), (0.45, 0.45)] + _arc(0.44, 0.68, 0.3, 0.23, -80, 150)],
    ),
    (
        [[(0.3, 0.1), (0.22, 0.55), (0.8, 0.55)], [(0.68, 0.1), (0.64, 0.92)]],
        [[(0.64, 0.92), (0.64, 0.08), (0.18, 0.62), (0.84, 0.62)]],
    ),
    (
        [[(0.76, 0.1), (0.32, 0.1), (0.28, 0.46)] + _arc(0.46, 0.66, 0.3, 0.25, -125, 145)],
        [[(0.34, 0.1), (0.3, 0.42)] + _arc(0.46, 0.66, 0.26, 0.25, -110, 140),
         [(0.34, 0.12), (0.8, 0.08)]],
    ),
    (
        [_arc(0.7, 0.66, 0.46, 0.58, -95, -180) + _arc(0.5, 0.7, 0.26, 0.21, 180, 540)],
        [[(0.6, 0.08), (0.28, 0.6)] + _arc(0.48, 0.71, 0.22, 0.2, 200, 560)],
    ),
    (
        [[(0.2, 0.12), (0.8, 0.12), (0.4, 0.92)]],
        [[(0.2, 0.12), (0.78, 0.12), (0.44, 0.92)], [(0.36, 0.5), (0.76, 0.5)]],
    ),
    (
        [_arc(0.5, 0.29, 0.22, 0.2, 0, 360), _arc(0.5, 0.7, 0.27, 0.22, 0, 360)],
        [[(0.74, 0.16), (0.3, 0.78)] + _arc(0.48, 0.76, 0.2, 0.16, 170, 0)
         + [(0.3, 0.22)] + _arc(0.5, 0.22, 0.2, 0.13, 180, 340)],
    ),
    (
        [_arc(0.48, 0.32, 0.25, 0.23, 0, 360) + [(0.66, 0.92)]],
        [_arc(0.48, 0.3, 0.24, 0.21, 0, 360), _arc(0.3, 0.4, 0.43, 0.52, -10, 95)],
    ),
]  # fmt: skip

TABLE = 96  # cells along each side of the distance table, over [-1, 1]


@cache
def _distance_table() -> Tensor:
    """Distance from each cell to the nearest stroke, for all 20 glyphs: float32 [20 * TABLE**2].

    A glyph's unit square becomes [-0.75, 0.75]; the unit is half the picture's width.
    """
    x, y = _grid(TABLE)
    fields = []
    for strokes in (strokes for pair in GLYPHS for strokes in pair):
        ends = [(*p, *q) for stroke in strokes for p, q in zip(stroke, stroke[1:], strict=False)]
        px, py, qx, qy = (torch.tensor(ends, dtype=torch.float32).T[:, :, None] - 0.5) * 1.5
        dx, dy = qx - px, qy - py
        length2 = (dx * dx + dy * dy).clamp(min=1e-9)  # two curves may meet in a doubled point
        along = (((x - px) * dx + (y - py) * dy) / length2).clamp(0, 1)
        ex, ey = x - px - along * dx, y - py - along * dy
        fields.append((ex * ex + ey * ey).sqrt().amin(0))
    return torch.cat(fields)


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

    column = ((u + 1) * (TABLE / 2)).clamp(0, TABLE - 1).long()
    row = ((v + 1) * (TABLE / 2)).clamp(0, TABLE - 1).long()
    glyph = labels[:, None] * 2 + torch.randint(2, (n, 1), generator=generator)
    return _distance_table()[(glyph * TABLE + row) * TABLE + column]


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
