"""The built-in data set: ten kinds of shapes, drawn by code: tests and a first try need no files.

Only additions, products, quotients and square roots of float64 decide a pixel, which every machine
computes alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator, SeedSequence
from PIL import Image

from data.augment.rng import choice, generator, integer, uniform

SPLITS = ("train", "val")
# corners of a pentagon
_STAR = (
    (0.0, -1.0),
    (0.951057, -0.309017),
    (0.587785, 0.809017),
    (-0.587785, 0.809017),
    (-0.951057, -0.309017),
)


def _disc(x, y):
    return x * x + y * y < 0.72


def _ring(x, y):
    distance = x * x + y * y
    return (distance < 0.9) & (distance > 0.34)


def _half_disc(x, y):
    return (x * x + y * y < 1.0) & (y > -0.05)


def _square(x, y):
    return np.maximum(abs(x), abs(y)) < 0.72


def _frame(x, y):
    side = np.maximum(abs(x), abs(y))
    return (side < 0.78) & (side > 0.44)


def _triangle(x, y):
    return (y < 0.5) & (1.732051 * x - y < 1.0) & (-1.732051 * x - y < 1.0)


def _cross(x, y):
    return (np.minimum(abs(x), abs(y)) < 0.24) & (np.maximum(abs(x), abs(y)) < 0.95)


def _bars(x, y):
    return (abs(x) < 0.85) & (abs(abs(y) - 0.45) < 0.2)


def _star(x, y):
    """Inside at least four of the five half planes whose borders join every second corner."""
    count = np.zeros(x.shape, np.int8)
    for i in range(5):
        (ax, ay), (bx, by) = _STAR[i], _STAR[(i + 2) % 5]
        count += (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0
    return count >= 4


def _crescent(x, y):
    return (x * x + y * y < 0.9) & ((x - 0.45) ** 2 + y * y > 0.62)


KINDS: dict[str, Callable] = {
    "bars": _bars,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "frame": _frame,
    "half_disc": _half_disc,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLASS_NAMES = list(KINDS)
REACH = 1.2  # no kind has a point farther than this from its middle


def draw(split: str, label: int, number: int, size: int) -> Image.Image:
    """The image `number` of a class: an RGB square of `size` pixels a side."""
    sequence = SeedSequence(SPLITS.index(split), spawn_key=(label, number))
    rng = generator(int(sequence.generate_state(1, "uint64")[0]))
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    behind = _color(rng, 0.0, 0.6)
    canvas = _background(rng, axis, behind)
    _clutter(rng, canvas, axis, integer(rng, 2, 4), largest=0.16)
    scale = uniform(rng, 0.35, 0.65)
    color = _color(rng, 0.3, 1.0, above=behind)
    _paint(rng, canvas, axis, KINDS[CLASS_NAMES[label]], scale, color, edge=0.4)
    _clutter(rng, canvas, axis, integer(rng, 1, 2), largest=0.2)
    canvas += uniform(rng, 0.02, 0.2) * (rng.random(canvas.shape) - 0.5)
    return Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))


def _clutter(
    rng: Generator, canvas: np.ndarray, axis: np.ndarray, count: int, largest: float
) -> None:
    """Shapes of any kind and color anywhere, too small to be the image's."""
    for _ in range(count):
        kind = choice(rng, list(KINDS.values()))
        scale = uniform(rng, 0.06, largest)
        _paint(rng, canvas, axis, kind, scale, _color(rng, 0.0, 1.0), edge=0.95)


def _color(rng: Generator, low: float, high: float, above: np.ndarray | None = None) -> np.ndarray:
    """An RGB color of channels in [low, high), on the whole lighter than `above`."""
    while True:
        color = np.array([uniform(rng, low, high) for _ in range(3)])
        if above is None or (color - above).sum() > 0.5:
            return color


def _background(rng: Generator, axis: np.ndarray, color: np.ndarray) -> np.ndarray:
    """A gradient with stripes of a random direction and width: [size, size, 3]."""
    x = axis[None, :]
    y = axis[:, None]
    dx, dy = _direction(rng)
    change = np.array([uniform(rng, -0.25, 0.25) for _ in range(3)])
    gradient = (x * dx + y * dy)[..., None] * change
    stripes = np.floor((x * dy - y * dx) * uniform(rng, 1.0, 6.0)) % 2
    return color + gradient + stripes[..., None] * uniform(rng, 0.0, 0.15)


def _paint(
    rng: Generator,
    canvas: np.ndarray,
    axis: np.ndarray,
    kind: Callable,
    scale: float,
    color: np.ndarray,
    edge: float,
) -> None:
    """Fill a shape, turned and stretched at random, its centre at most `edge` from the middle."""
    dx, dy = _direction(rng)
    center_x = uniform(rng, -edge, edge)
    center_y = uniform(rng, -edge, edge)
    stretch = uniform(rng, 0.8, 1.25)
    tint = uniform(rng, -0.15, 0.15)
    # the rest of the canvas need not be looked at
    reach = REACH * scale * max(stretch, 1 / stretch)
    columns = slice(*np.searchsorted(axis, (center_x - reach, center_x + reach)))
    rows = slice(*np.searchsorted(axis, (center_y - reach, center_y + reach)))
    x = axis[None, columns]
    y = axis[rows, None]
    u = x - center_x
    v = y - center_y
    inside = kind((u * dx + v * dy) / (scale * stretch), (v * dx - u * dy) * stretch / scale)
    canvas[rows, columns][inside] = color + tint * (x + y)[inside][:, None]


def _direction(rng: Generator) -> tuple[float, float]:
    """A unit vector; no angle function is used, whose last bit may differ between machines."""
    while True:
        dx = uniform(rng, -1, 1)
        dy = uniform(rng, -1, 1)
        length = dx * dx + dy * dy
        if 0.01 < length <= 1:
            return dx / np.sqrt(length), dy / np.sqrt(length)
