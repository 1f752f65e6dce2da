"""Shears and translations: Pillow's bicubic transform, bit for bit, in less than half the time.

Pillow interpolates sixteen pixels for each of the output's. Where pixels move along one axis only,
four of them decide, and the rest of its arithmetic is exact: it adds multiples of zero."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

Color = tuple[int, int, int]
TRANSPOSE = Image.Transpose.TRANSPOSE
# pixels worked on at a time: what is made of them stays in the cache, and below malloc's threshold
# for fresh pages
BLOCK = 14_000


def shear_x(
    image: Image.Image, factor: float, filter: Image.Resampling, fill: Color
) -> Image.Image:
    """An RGB image whose row y comes from y * factor further right."""
    return _move_rows(image, factor * _centres(image.height), (1, factor, 0, 0, 1, 0), filter, fill)


def shear_y(
    image: Image.Image, factor: float, filter: Image.Resampling, fill: Color
) -> Image.Image:
    """An RGB image whose column x comes from x * factor further down."""
    return shear_x(image.transpose(TRANSPOSE), factor, filter, fill).transpose(TRANSPOSE)


def translate_x(
    image: Image.Image, pixels: float, filter: Image.Resampling, fill: Color
) -> Image.Image:
    """An RGB image that comes from `pixels` further right."""
    return _move_rows(
        image, np.full(image.height, float(pixels)), (1, 0, pixels, 0, 1, 0), filter, fill
    )


def translate_y(
    image: Image.Image, pixels: float, filter: Image.Resampling, fill: Color
) -> Image.Image:
    """An RGB image that comes from `pixels` further down."""
    return translate_x(image.transpose(TRANSPOSE), pixels, filter, fill).transpose(TRANSPOSE)


def _centres(count: int) -> np.ndarray:
    return np.arange(count) + 0.5


def _move_rows(
    image: Image.Image,
    moves: np.ndarray,
    matrix: tuple[float, ...],
    filter: Image.Resampling,
    fill: Color,
) -> Image.Image:
    """Each row from `moves` further right, as Pillow's affine transform by `matrix` does it, which
    also takes what cannot go this way.
    """
    moved = _bicubic_rows(image, moves, fill) if filter == Image.Resampling.BICUBIC else None
    return moved or image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=filter, fillcolor=fill
    )


def _bicubic_rows(image: Image.Image, moves: np.ndarray, fill: Color) -> Image.Image | None:
    width, height = image.size
    columns, lines, centres = np.arange(width), np.arange(height), _centres(width)
    steps = np.floor(centres[0] + moves - 0.5).astype(np.int64)  # whole pixels that each row moves
    margin = min(int(np.abs(steps).max()), width) + 3
    # of the four neighbours; rows that move farther are outside altogether
    starts = steps.clip(2 - margin, margin - 3) + (margin - 1)
    windows = [_windows(image, band, margin) for band in "RGB"]
    moved = [np.empty((height, width), np.uint8) for _ in "RGB"]
    for start in range(0, height, max(1, BLOCK // width)):
        block = slice(start, start + max(1, BLOCK // width))
        sources = centres + moves[block, None]
        parts = sources - 0.5
        parts -= columns + steps[block, None]
        # by rounding: within this row pixels do not all move by one number of steps
        if parts.min() < 0 or parts.max() >= 1:
            return None
        outside = (sources < 0) | (sources >= width)
        for window, plane, color in zip(windows, moved, fill):
            plane[block] = _interpolate(window[lines[block], starts[block]].astype(np.int16), parts)
            np.copyto(plane[block], np.uint8(color), where=outside)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in moved])


def _windows(image: Image.Image, band: str, margin: int) -> np.ndarray:
    """Views [height, 2 * margin - 2, width + 3] of a band's rows, which go on by `margin` with the
    pixel at each end.
    """
    width, height = image.size
    padded = np.empty((height, width + 2 * margin), np.uint8)
    plane = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(height, width)
    padded[:, margin:-margin] = plane
    padded[:, :margin] = plane[:, :1]
    padded[:, -margin:] = plane[:, -1:]
    return sliding_window_view(padded, width + 3, axis=1)


def _interpolate(windows: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Values between the second and third of four neighbours: int16 [h, w + 3], float64 [h, w] in
    [0, 1) -> int16 [h, w].
    """
    a, b, c, d = (windows[:, i : windows.shape[1] - 3 + i] for i in range(4))
    left, right = b - a, d - c
    cubic = left + right
    # The order of these operations is Pillow's: b + t * (c - a + t * (t * cubic - (cubic + left))).
    values = np.multiply(cubic, parts)
    values -= cubic + left
    values *= parts
    values += c - a
    values *= parts
    values += b
    return values.astype(np.int16).clip(0, 255)
