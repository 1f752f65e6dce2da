"""The executor that Pillow serves: a plan and an image become a training tensor. The reference."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.random import MT19937, Generator
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from data.augment.plan import Crop, Effect, Erasure, Plan, Shift
from data.augment.shift import Color, shear_x, shear_y, translate_x, translate_y

Statistics = tuple[float, float, float]  # one of each channel

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
FLIPS = {
    "horizontal": Image.Transpose.FLIP_LEFT_RIGHT,
    "vertical": Image.Transpose.FLIP_TOP_BOTTOM,
}


def apply(plan: Plan, image: Image.Image, fill: Color, mean: Statistics, std: Statistics) -> Tensor:
    """The float32 tensor [3, size, size] that a plan makes of an image.

    `fill` is the colour of pixels that geometric effects bring in.
    """
    tensor = to_float(augmented(plan, image, fill), mean, std)
    for erasure in plan.erasures:
        top, left, height, width = erasure[:4]
        tensor[:, top : top + height, left : left + width] = noise(erasure)
    return tensor


def augmented(plan: Plan, image: Image.Image, fill: Color) -> Image.Image:
    """The image of a plan before it is normalised and parts of it are erased."""
    image = cropped(as_rgb(image), plan.crop, plan.size)
    for axis in plan.flips:
        image = image.transpose(FLIPS[axis])
    for effect in plan.effects:
        image = EFFECTS[effect.name](image, effect, fill)
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """The image with three channels."""
    return image if image.mode == "RGB" else image.convert("RGB")


def cropped(image: Image.Image, crop: Crop | Shift, size: int) -> Image.Image:
    """The image's box, size x size pixels."""
    filter = RESAMPLING[crop.filter]
    if isinstance(crop, Crop):
        box = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        return resize(box, size, filter)
    if image.size != (size, size):
        image = resize(image, size, filter)
    return image.crop((crop.left, crop.top, crop.left + size, crop.top + size))


def resize(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    """Resize to a square, the width first.

    One call would let Pillow choose the order, and Pillow 13 chooses otherwise than 12, which
    changes pixels.
    """
    return image.resize((size, image.height), filter).resize((size, size), filter)


def to_float(image: Image.Image, mean: Statistics, std: Statistics) -> Tensor:
    """An RGB image as float32 [3, H, W]: (value / 255 - mean) / std."""
    values = np.empty((3, image.height, image.width), np.float32)
    # Band by band, each while it is in the cache: half the time of a transposed copy and three
    # passes over the whole.
    for plane, band, own_mean, own_std in zip(values.reshape(3, -1), "RGB", mean, std):
        plane[:] = np.frombuffer(image.tobytes("raw", band), np.uint8)
        plane /= np.float32(255)
        plane -= np.float32(own_mean)
        plane /= np.float32(own_std)
    return torch.from_numpy(values)


def noise(erasure: Erasure) -> Tensor:
    """What overwrites a box: float32 [3, height, width], or one value for all or a channel."""
    if erasure.mode == "const":
        return torch.zeros(1)
    rng = Generator(MT19937(erasure.seed))
    shape = (3, erasure.height, erasure.width) if erasure.mode == "pixel" else (3, 1, 1)
    # normal() is 0 + 1 * standard_normal(), at two thirds of the speed; the 0 turns -0 into 0, so
    # it is added here too.
    return torch.from_numpy((rng.standard_normal(shape) + 0.0).astype(np.float32))


def _by_table(table: Callable[[int], list[int]]) -> Callable[..., Image.Image]:
    """An effect that looks each value up in a table of 256, which its argument decides."""
    table = lru_cache(maxsize=None)(table)
    return lambda image, effect, fill: image.point(table(effect.argument) * 3)


@_by_table
def _posterize(bits: int) -> list[int]:
    # No bits left is black: Pillow 13 has no answer.
    kept = 0xFF & ~(0xFF >> bits) if bits > 0 else 0
    return [value & kept for value in range(256)]


@_by_table
def _solarize(threshold: int) -> list[int]:
    return [value if value < threshold else 255 - value for value in range(256)]


@_by_table
def _solarize_add(added: int) -> list[int]:
    return [min(255, value + added) if value < 128 else value for value in range(256)]


@_by_table
def _invert(argument: float) -> list[int]:
    return [255 - value for value in range(256)]


def _enhance(enhancer: type) -> Callable[..., Image.Image]:
    return lambda image, effect, fill: enhancer(image).enhance(effect.argument)


def _rotate(image: Image.Image, effect: Effect, fill: Color) -> Image.Image:
    return image.rotate(effect.argument, RESAMPLING[effect.filter], fillcolor=fill)


def _shear_x(image: Image.Image, effect: Effect, fill: Color) -> Image.Image:
    return shear_x(image, effect.argument, RESAMPLING[effect.filter], fill)


def _shear_y(image: Image.Image, effect: Effect, fill: Color) -> Image.Image:
    return shear_y(image, effect.argument, RESAMPLING[effect.filter], fill)


def _translate_x(image: Image.Image, effect: Effect, fill: Color) -> Image.Image:
    return translate_x(image, effect.argument * image.width, RESAMPLING[effect.filter], fill)


def _translate_y(image: Image.Image, effect: Effect, fill: Color) -> Image.Image:
    return translate_y(image, effect.argument * image.height, RESAMPLING[effect.filter], fill)


EFFECTS: dict[str, Callable[[Image.Image, Effect, Color], Image.Image]] = {
    "AutoContrast": lambda image, effect, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, effect, fill: ImageOps.equalize(image),
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
