"""What a seed means for an image: a plan of numbers and names, drawn before any pixel is read.

Each op is a frozen value whose `draw` takes from `rng` alone, in an order that never changes. What
the names in a plan do to pixels is written in data/augment/pillow.py.
"""

from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Literal, NamedTuple

from numpy.random import Generator

from data.augment.rng import choice, integer, shuffle, uniform

RECIPE_VERSION = 2  # counts changes in the meaning of the draws; a store's identity holds it

Interpolation = Literal["bicubic", "bilinear", "random"]

FILTERS = ("bilinear", "bicubic")
ATTEMPTS = 10  # at a box that fits, before a crop takes the centre and an erasure is left out
ERASE_FRAME = 224  # pixels a side of the frame that boxes to erase are drawn in, whatever the size


class Crop(NamedTuple):
    """A box of the image, resized to the result's size."""

    left: int
    top: int
    width: int
    height: int
    filter: str

    def __str__(self) -> str:
        return f"crop {self.width}x{self.height} at ({self.left}, {self.top}), {self.filter}"


class Shift(NamedTuple):
    """A box of the result's size from the image, which is resized to that size first if it has
    another; what lies outside is black.
    """

    left: int
    top: int
    filter: str

    def __str__(self) -> str:
        return f"shift by ({-self.left}, {-self.top})"


class Effect(NamedTuple):
    """One change of the whole image, by its name in data/augment/pillow.py."""

    name: str
    argument: float = 0.0
    filter: str = ""  # of a geometric one

    def __str__(self) -> str:
        words = WORDS.get(self.name, self.name)
        return words.format(self.argument) + (f", {self.filter}" if self.filter else "")


class Erasure(NamedTuple):
    """A box that is overwritten: with zeros (const), or normal noise, one value a channel (rand) or
    a pixel's channel (pixel).
    """

    top: int
    left: int
    height: int
    width: int
    mode: str
    seed: int  # of the noise, which has a generator of its own

    def __str__(self) -> str:
        return f"erase {self.width}x{self.height} at ({self.left}, {self.top})"


WORDS = {
    "AutoContrast": "auto-contrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Rotate": "rotate by {:.1f} degrees",
    "Posterize": "posterize to {:.0f} bits",
    "Solarize": "solarize from {:.0f}",
    "SolarizeAdd": "add {:.0f} to dark pixels",
    "Color": "color x {:.2f}",
    "Contrast": "contrast x {:.2f}",
    "Brightness": "brightness x {:.2f}",
    "Sharpness": "sharpness x {:.2f}",
    "ShearX": "shear x by {:.2f}",
    "ShearY": "shear y by {:.2f}",
    "TranslateXRel": "translate x by {:.2f} of the width",
    "TranslateYRel": "translate y by {:.2f} of the height",
}


@dataclass(frozen=True)
class Plan:
    """Everything that one seed means for an image, in the order in which it is done."""

    size: int  # pixels a side of the result
    crop: Crop | Shift
    flips: tuple[str, ...]  # horizontal, vertical
    effects: tuple[Effect, ...]
    erasures: tuple[Erasure, ...]

    def __str__(self) -> str:
        flips = [f"flip {axis}" for axis in self.flips]
        return "; ".join(
            [str(self.crop), *flips, *map(str, self.effects), *map(str, self.erasures)]
        )


def draw_filter(interpolation: Interpolation, rng: Generator) -> str:
    """The filter of that name; 'random' draws one of the two."""
    return choice(rng, FILTERS) if interpolation == "random" else interpolation


@dataclass(frozen=True)
class RandomResizedCrop:
    """A box of random area and aspect ratio, resized to a square."""

    scale: tuple[float, float] = (0.08, 1.0)  # area, as fractions of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    interpolation: Interpolation = "bicubic"

    def draw(self, rng: Generator, width: int, height: int) -> Crop:
        """A box in an image of width x height pixels."""
        box = self._draw_box(rng, width, height)
        return Crop(*box, draw_filter(self.interpolation, rng))

    def _draw_box(
        self, rng: Generator, image_width: int, image_height: int
    ) -> tuple[int, int, int, int]:
        low, high = self.ratio
        for _ in range(ATTEMPTS):
            area = uniform(rng, *self.scale) * (image_width * image_height)
            aspect = exp(uniform(rng, log(low), log(high)))
            # At least one pixel: the original crops nothing from images of a few pixels, and fails.
            width = max(1, round(sqrt(area * aspect)))
            height = max(1, round(sqrt(area / aspect)))
            if width <= image_width and height <= image_height:
                top = integer(rng, 0, image_height - height)
                left = integer(rng, 0, image_width - width)
                return left, top, width, height
        width, height = image_width, image_height
        if width / height < low:
            height = max(1, round(width / low))
        elif width / height > high:
            width = max(1, round(height * high))
        return (image_width - width) // 2, (image_height - height) // 2, width, height


@dataclass(frozen=True)
class PaddedCrop:
    """A random box of the image with a black margin around it: the crop of small images."""

    padding: int = 4
    interpolation: Interpolation = "bicubic"  # for images of another size; 'random' is bicubic then

    def draw(self, rng: Generator, width: int, height: int) -> Shift:
        """Where the box begins, whatever the image's size."""
        top = integer(rng, 0, 2 * self.padding) - self.padding
        left = integer(rng, 0, 2 * self.padding) - self.padding
        return Shift(left, top, "bilinear" if self.interpolation == "bilinear" else "bicubic")


@dataclass(frozen=True)
class Flip:
    """Mirror the image with a probability; one of 0 draws nothing."""

    axis: Literal["horizontal", "vertical"]
    probability: float = 0.5

    def draw(self, rng: Generator) -> bool:
        """Whether the image is mirrored."""
        return self.probability > 0 and rng.random() < self.probability


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation in random order, each by a factor drawn from
    [max(0, 1 - strength), 1 + strength].
    """

    strength: float

    def draw(self, rng: Generator) -> tuple[Effect, ...]:
        """The three effects."""
        low, high = max(0.0, 1.0 - self.strength), 1.0 + self.strength
        names = ("Brightness", "Contrast", "Color")
        return tuple(shuffle(rng, [Effect(name, uniform(rng, low, high)) for name in names]))


@dataclass(frozen=True)
class RandomErasing:
    """Overwrite up to `count` boxes of the normalised image."""

    probability: float = 0.25
    mode: Literal["const", "rand", "pixel"] = "pixel"
    count: int = 1

    def draw(self, rng: Generator, size: int) -> tuple[Erasure, ...]:
        """The boxes of an image of size x size pixels."""
        if rng.random() > self.probability:
            return ()
        count = integer(rng, 1, self.count) if self.count > 1 else 1
        erasures = []
        for _ in range(count):
            box = self._draw_box(rng, count, size)
            if box is not None:
                seed = 0 if self.mode == "const" else integer(rng, 0, 1 << 30)
                erasures.append(Erasure(*box, self.mode, seed))
        return tuple(erasures)

    def _draw_box(self, rng: Generator, count: int, size: int) -> tuple[int, int, int, int] | None:
        """Top, left, height, width, scaled from the frame to the image."""
        frame = ERASE_FRAME
        for _ in range(ATTEMPTS):
            area = uniform(rng, 0.02, 1 / 3) * (frame * frame) / count
            aspect = exp(uniform(rng, log(0.3), log(1 / 0.3)))
            height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if width < frame and height < frame:
                top, left = integer(rng, 0, frame - height), integer(rng, 0, frame - width)
                top = min(round(top * size / frame), size - 1)
                left = min(round(left * size / frame), size - 1)
                height = min(round(height * size / frame), size - top)
                width = min(round(width * size / frame), size - left)
                return top, left, height, width
        return None
