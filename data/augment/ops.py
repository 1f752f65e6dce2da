"""Augmentations as frozen values: `op(image, rng)` draws from `rng` alone, in an order that never
changes.

Each op tells `say` in words what it drew, printf-style; by default nobody listens. Its repr is part
of a store's recipe."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Literal

import numpy as np
import torch
from numpy.random import MT19937, Generator
from PIL import Image, ImageEnhance
from torch import Tensor

from data.augment.rng import choice, integer, shuffle, uniform

Say = Callable[..., None]
Interpolation = Literal["bicubic", "bilinear", "random"]

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ATTEMPTS = 10  # at a box that fits, before a crop takes the centre and an erasure is left out
# pixels a side of the frame that boxes to erase are drawn in, whatever the image's size
ERASE_FRAME = 224


def silent(text: str, *values: object) -> None:
    """Tell nobody."""


def resampling(interpolation: Interpolation, rng: Generator, say: Say = silent) -> Image.Resampling:
    """Pillow's filter of that name; 'random' draws one of the two."""
    if interpolation != "random":
        return RESAMPLING[interpolation]
    name = choice(rng, tuple(RESAMPLING))
    say("%s interpolation", name)
    return RESAMPLING[name]


def resize(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    """Resize to (width, height), the width first.

    One call would let Pillow choose the order, and Pillow 13 chooses otherwise than 12, which
    changes pixels."""
    return image.resize((size[0], image.height), filter).resize(size, filter)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to size x size."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)  # area, as fractions of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    interpolation: Interpolation = "bicubic"

    def __call__(self, image: Image.Image, rng: Generator, say: Say = silent) -> Image.Image:
        left, top, width, height = self.draw_box(*image.size, rng)
        say("crop %dx%d at (%d, %d)", width, height, left, top)
        filter = resampling(self.interpolation, rng, say)
        return resize(
            image.crop((left, top, left + width, top + height)), (self.size, self.size), filter
        )

    def draw_box(
        self, image_width: int, image_height: int, rng: Generator
    ) -> tuple[int, int, int, int]:
        """Left, top, width, height of a box inside the image."""
        low, high = self.ratio
        for _ in range(ATTEMPTS):
            area = uniform(rng, *self.scale) * (image_width * image_height)
            aspect = exp(uniform(rng, log(low), log(high)))
            # At least one pixel: the original crops nothing from images of a few pixels, and
            # crashes.
            width, height = max(1, round(sqrt(area * aspect))), max(1, round(sqrt(area / aspect)))
            if width <= image_width and height <= image_height:
                top = integer(rng, 0, image_height - height)
                return integer(rng, 0, image_width - width), top, width, height
        width, height = image_width, image_height
        if width / height < low:
            height = max(1, round(width / low))
        elif width / height > high:
            width = max(1, round(height * high))
        return (image_width - width) // 2, (image_height - height) // 2, width, height


@dataclass(frozen=True)
class PaddedCrop:
    """A random size x size box of the image with a black margin around it: the crop of images of 32
    pixels and less.
    """

    size: int
    padding: int = 4
    # for images of another size only; 'random' is bicubic there, without a draw
    interpolation: Interpolation = "bicubic"

    def __call__(self, image: Image.Image, rng: Generator, say: Say = silent) -> Image.Image:
        if image.size != (self.size, self.size):
            image = resize(
                image,
                (self.size, self.size),
                RESAMPLING.get(self.interpolation, RESAMPLING["bicubic"]),
            )
        top = integer(rng, 0, 2 * self.padding) - self.padding
        left = integer(rng, 0, 2 * self.padding) - self.padding
        say("shift by (%d, %d)", -left, -top)
        return image.crop((left, top, left + self.size, top + self.size))


@dataclass(frozen=True)
class Flip:
    """Mirror the image with a probability; one of 0 draws nothing."""

    axis: Literal["horizontal", "vertical"]
    probability: float = 0.5

    def __call__(self, image: Image.Image, rng: Generator, say: Say = silent) -> Image.Image:
        if self.probability <= 0 or rng.random() >= self.probability:
            return image
        if self.axis == "horizontal":
            say("flip left-right")
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        say("flip upside down")
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, each by a factor in [max(0, 1 - strength), 1 +
    strength], in random order.
    """

    strength: float

    def __call__(self, image: Image.Image, rng: Generator, say: Say = silent) -> Image.Image:
        low, high = max(0.0, 1.0 - self.strength), 1.0 + self.strength
        enhancers = (
            ("brightness", ImageEnhance.Brightness),
            ("contrast", ImageEnhance.Contrast),
            ("saturation", ImageEnhance.Color),
        )
        changes = [(name, enhancer, uniform(rng, low, high)) for name, enhancer in enhancers]
        for name, enhancer, factor in shuffle(rng, changes):
            say("%s x %.2f", name, factor)
            image = enhancer(image).enhance(factor)
        return image


@dataclass(frozen=True)
class ToTensor:
    """RGB image -> float32 tensor [3, H, W]: (value / 255 - mean) / std, per channel."""

    # each model's own, so no part of a recipe
    mean: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), repr=False)
    std: tuple[float, float, float] = field(default=(1.0, 1.0, 1.0), repr=False)

    def __call__(
        self, image: Image.Image, rng: Generator | None = None, say: Say = silent
    ) -> Tensor:
        values = np.empty((3, image.height, image.width), np.float32)
        # Band by band, each while it is in the cache: half the time of a transposed copy and three
        # passes over the whole.
        for plane, band, mean, std in zip(values.reshape(3, -1), "RGB", self.mean, self.std):
            plane[:] = np.frombuffer(image.tobytes("raw", band), np.uint8)
            plane /= np.float32(255)
            plane -= np.float32(mean)
            plane /= np.float32(std)
        return torch.from_numpy(values)


@dataclass(frozen=True)
class RandomErasing:
    """Overwrite up to `count` boxes of a normalised image, in place, with zeros or normal noise."""

    probability: float = 0.25
    # zeros | one normal per channel | one normal per value
    mode: Literal["const", "rand", "pixel"] = "pixel"
    count: int = 1

    def __call__(self, image: Tensor, rng: Generator, say: Say = silent) -> Tensor:
        if rng.random() > self.probability:
            return image
        count = integer(rng, 1, self.count) if self.count > 1 else 1
        for _ in range(count):
            box = self._draw_box(count, *image.shape[1:], rng)
            if box is None:
                continue
            top, left, height, width = box
            say("erase %dx%d at (%d, %d)", width, height, left, top)
            image[:, top : top + height, left : left + width] = self._fill(
                image.shape[0], height, width, rng
            )
        return image

    def _draw_box(
        self, count: int, image_height: int, image_width: int, rng: Generator
    ) -> tuple[int, int, int, int] | None:
        """Top, left, height, width, scaled from the frame to the image."""
        frame = ERASE_FRAME
        for _ in range(ATTEMPTS):
            area = uniform(rng, 0.02, 1 / 3) * (frame * frame) / count
            aspect = exp(uniform(rng, log(0.3), log(1 / 0.3)))
            height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if width < frame and height < frame:
                top, left = integer(rng, 0, frame - height), integer(rng, 0, frame - width)
                top = min(round(top * image_height / frame), image_height - 1)
                left = min(round(left * image_width / frame), image_width - 1)
                height = min(round(height * image_height / frame), image_height - top)
                width = min(round(width * image_width / frame), image_width - left)
                return top, left, height, width
        return None

    def _fill(self, channels: int, height: int, width: int, rng: Generator) -> Tensor:
        if self.mode == "const":
            return torch.zeros(1)
        # Noise has its own generator, so that its amount does not shift what is drawn after it.
        noise = Generator(MT19937(integer(rng, 0, 1 << 30)))
        shape = (channels, height, width) if self.mode == "pixel" else (channels, 1, 1)
        # normal() is 0 + 1 * standard_normal(), at two thirds of the speed; the 0 turns -0 into 0,
        # so it is added here too.
        return torch.from_numpy((noise.standard_normal(shape) + 0.0).astype(np.float32))
