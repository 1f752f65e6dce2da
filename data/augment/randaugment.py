"""RandAugment and AutoAugment: which effects, how strong, and what each does to an image."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps

from data.augment.ops import Interpolation, Say, resampling, silent
from data.augment.rng import choice, gauss, uniform
from data.augment.shift import Color, shear_x, shear_y, translate_x, translate_y

FULL_LEVEL = 10.0  # the magnitude at which an effect has its full strength


class Effect(NamedTuple):
    """How one change of an image is drawn, done and told."""

    draw: Callable[[float, Generator], float]  # (level: 1 is full strength, rng) -> argument
    apply: Callable[..., Image.Image]  # (image, argument), for a geometric one also (filter, fill)
    words: str
    geometric: bool = False


def _signed(strength: float) -> Callable[[float, Generator], float]:
    def draw(level: float, rng: Generator) -> float:
        return -(level * strength) if rng.random() > 0.5 else level * strength

    return draw


def _around_one(level: float, rng: Generator) -> float:
    return max(0.1, 1.0 + _signed(0.9)(level, rng))


def _rotate(
    image: Image.Image, degrees: float, filter: Image.Resampling, fill: Color
) -> Image.Image:
    return image.rotate(degrees, filter, fillcolor=fill)


def _translate_x(
    image: Image.Image, share: float, filter: Image.Resampling, fill: Color
) -> Image.Image:
    return translate_x(image, share * image.width, filter, fill)


def _translate_y(
    image: Image.Image, share: float, filter: Image.Resampling, fill: Color
) -> Image.Image:
    return translate_y(image, share * image.height, filter, fill)


def _by_table(table: Callable[[int], list[int]]) -> Callable[..., Image.Image]:
    table = lru_cache(maxsize=None)(table)
    return lambda image, argument: image.point(table(argument))


@_by_table
def _posterize(bits: int) -> list[int]:
    # no bits left is black: Pillow 13 has no answer
    kept = 0xFF & ~(0xFF >> bits) if bits > 0 else 0
    return [value & kept for value in range(256)] * 3


@_by_table
def _solarize(threshold: int) -> list[int]:
    return [value if value < threshold else 255 - value for value in range(256)] * 3


@_by_table
def _solarize_add(added: int) -> list[int]:
    return [min(255, value + added) if value < 128 else value for value in range(256)] * 3


def _enhance(enhancer: type) -> Callable[..., Image.Image]:
    return lambda image, factor: enhancer(image).enhance(factor)


def _nothing(level: float, rng: Generator) -> float:
    return 0.0


EFFECTS = {
    "AutoContrast": Effect(
        _nothing, lambda image, _: ImageOps.autocontrast(image), "auto-contrast"
    ),
    "Equalize": Effect(_nothing, lambda image, _: ImageOps.equalize(image), "equalize"),
    "Invert": Effect(_nothing, lambda image, _: _solarize(image, 0), "invert"),
    "Rotate": Effect(_signed(30.0), _rotate, "rotate by %.1f degrees", geometric=True),
    "Posterize": Effect(lambda level, _: int(level * 4), _posterize, "posterize to %d bits"),
    "PosterizeIncreasing": Effect(
        lambda level, _: 4 - int(level * 4), _posterize, "posterize to %d bits"
    ),
    "PosterizeOriginal": Effect(
        lambda level, _: int(level * 4) + 4, _posterize, "posterize to %d bits"
    ),
    "Solarize": Effect(lambda level, _: int(level * 256), _solarize, "solarize from %d"),
    "SolarizeIncreasing": Effect(
        lambda level, _: 256 - int(level * 256), _solarize, "solarize from %d"
    ),
    "SolarizeAdd": Effect(
        lambda level, _: int(level * 110), _solarize_add, "add %d to dark pixels"
    ),
    "Color": Effect(
        lambda level, _: level * 1.8 + 0.1, _enhance(ImageEnhance.Color), "color x %.2f"
    ),
    "ColorIncreasing": Effect(_around_one, _enhance(ImageEnhance.Color), "color x %.2f"),
    "Contrast": Effect(
        lambda level, _: level * 1.8 + 0.1, _enhance(ImageEnhance.Contrast), "contrast x %.2f"
    ),
    "ContrastIncreasing": Effect(_around_one, _enhance(ImageEnhance.Contrast), "contrast x %.2f"),
    "Brightness": Effect(
        lambda level, _: level * 1.8 + 0.1, _enhance(ImageEnhance.Brightness), "brightness x %.2f"
    ),
    "BrightnessIncreasing": Effect(
        _around_one, _enhance(ImageEnhance.Brightness), "brightness x %.2f"
    ),
    "Sharpness": Effect(
        lambda level, _: level * 1.8 + 0.1, _enhance(ImageEnhance.Sharpness), "sharpness x %.2f"
    ),
    "SharpnessIncreasing": Effect(
        _around_one, _enhance(ImageEnhance.Sharpness), "sharpness x %.2f"
    ),
    "ShearX": Effect(_signed(0.3), shear_x, "shear x by %.2f", geometric=True),
    "ShearY": Effect(_signed(0.3), shear_y, "shear y by %.2f", geometric=True),
    "TranslateXRel": Effect(
        _signed(0.45), _translate_x, "translate x by %.2f of the width", geometric=True
    ),
    "TranslateYRel": Effect(
        _signed(0.45), _translate_y, "translate y by %.2f of the height", geometric=True
    ),
}

RAND_EFFECTS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
# of 'w0'
RAND_WEIGHTS = (
    0.025,
    0.005,
    0.0,
    0.3,
    0.0,
    0.005,
    0.005,
    0.025,
    0.005,
    0.005,
    0.025,
    0.2,
    0.2,
    0.1,
    0.1,
)
POLICIES = {  # one sub-policy a line: effect, probability, magnitude
    "original": (
        """
        PosterizeOriginal 0.4 8, Rotate 0.6 9
        Solarize 0.6 5, AutoContrast 0.6 5
        Equalize 0.8 8, Equalize 0.6 3
        PosterizeOriginal 0.6 7, PosterizeOriginal 0.6 6
        Equalize 0.4 7, Solarize 0.2 4
        Equalize 0.4 4, Rotate 0.8 8
        Solarize 0.6 3, Equalize 0.6 7
        PosterizeOriginal 0.8 5, Equalize 1.0 2
        Rotate 0.2 3, Solarize 0.6 8
        Equalize 0.6 8, PosterizeOriginal 0.4 6
        Rotate 0.8 8, Color 0.4 0
        Rotate 0.4 9, Equalize 0.6 2
        Equalize 0.0 7, Equalize 0.8 8
        Invert 0.6 4, Equalize 1.0 8
        Color 0.6 4, Contrast 1.0 8
        Rotate 0.8 8, Color 1.0 2
        Color 0.8 8, Solarize 0.8 7
        Sharpness 0.4 7, Invert 0.6 8
        ShearX 0.6 5, Equalize 1.0 9
        Color 0.4 0, Equalize 0.6 3
        Equalize 0.4 7, Solarize 0.2 4
        Solarize 0.6 5, AutoContrast 0.6 5
        Invert 0.6 4, Equalize 1.0 8
        Color 0.6 4, Contrast 1.0 8
        Equalize 0.8 8, Equalize 0.6 3"""
    ),
    "v0": (
        """
        Equalize 0.8 1, ShearY 0.8 4
        Color 0.4 9, Equalize 0.6 3
        Color 0.4 1, Rotate 0.6 8
        Solarize 0.8 3, Equalize 0.4 7
        Solarize 0.4 2, Solarize 0.6 2
        Color 0.2 0, Equalize 0.8 8
        Equalize 0.4 8, SolarizeAdd 0.8 3
        ShearX 0.2 9, Rotate 0.6 8
        Color 0.6 1, Equalize 1.0 2
        Invert 0.4 9, Rotate 0.6 0
        Equalize 1.0 9, ShearY 0.6 3
        Color 0.4 7, Equalize 0.6 0
        Posterize 0.4 6, AutoContrast 0.4 7
        Solarize 0.6 8, Color 0.6 9
        Solarize 0.2 4, Rotate 0.8 9
        Rotate 1.0 7, TranslateYRel 0.8 9
        ShearX 0.0 0, Solarize 0.8 4
        ShearY 0.8 0, Color 0.6 4
        Color 1.0 0, Rotate 0.6 2
        Equalize 0.8 4, Equalize 0.0 8
        Equalize 1.0 4, AutoContrast 0.6 2
        ShearY 0.4 7, SolarizeAdd 0.6 7
        Posterize 0.8 2, Solarize 0.6 10
        Solarize 0.6 8, Equalize 0.6 1
        Color 0.8 6, Rotate 0.4 5"""
    ),
}


@dataclass(frozen=True)
class RandAugment:
    """`count` effects, drawn from all of them, each done with probability 0.5 at about the same
    magnitude.
    """

    magnitude: float = FULL_LEVEL
    count: int = 2
    std: float = 0.0  # of the magnitude; infinite draws it evenly between 0 and the given one
    limit: float = FULL_LEVEL  # of the magnitude drawn
    weighted: bool = False  # draw by RAND_WEIGHTS, none twice
    # effects that get stronger with the magnitude, where there is a choice
    increasing: bool = False
    fill: Color = (128, 128, 128)  # of pixels that geometric effects bring in
    interpolation: Interpolation = "bicubic"

    @classmethod
    def from_policy(cls, policy: str, fill: Color, interpolation: Interpolation) -> "RandAugment":
        """The op of timm's string: 'rand-m9-n2-mstd0.5-mmax10-w0-inc1', in any order; all but
        'rand' may be left out.
        """
        option = _options(policy, m=FULL_LEVEL, n=2, mstd=0.0, mmax=0, w=None, inc=0)
        if option["inc"] not in (0, 1):
            raise _fault(policy, "inc is 0 (off) or 1 (on)")
        if option["w"] not in (None, 0):
            raise _fault(policy, f"there are no weights w{option['w']:g}, give w0 or leave it out")
        weighted = option["w"] == 0
        most = np.count_nonzero(RAND_WEIGHTS) if weighted else inf
        if not 1 <= option["n"] <= most:
            raise _fault(
                policy,
                "n is at least"
                f" 1{f', and at most {most} with w0, which draws none twice' if weighted else ''}",
            )
        limit = option["mmax"] or FULL_LEVEL
        return cls(
            option["m"],
            int(option["n"]),
            option["mstd"],
            limit,
            weighted,
            option["inc"] == 1,
            fill,
            interpolation,
        )

    def __call__(self, image: Image.Image, rng: Generator, say: Say = silent) -> Image.Image:
        weights = np.array(RAND_WEIGHTS) / np.sum(RAND_WEIGHTS) if self.weighted else None
        for index in rng.choice(
            len(RAND_EFFECTS), self.count, replace=not self.weighted, p=weights
        ):
            name = RAND_EFFECTS[index]
            if self.increasing and f"{name}Increasing" in EFFECTS:
                name = f"{name}Increasing"
            image = _maybe(self, image, rng, say, name, 0.5, self.magnitude)
        return image


@dataclass(frozen=True)
class AutoAugment:
    """One of a policy's pairs of effects, each done with its own probability and magnitude."""

    policy: str
    std: float = 0.0
    limit: float = FULL_LEVEL
    fill: Color = (128, 128, 128)
    interpolation: Interpolation = "bicubic"

    @classmethod
    def from_policy(cls, policy: str, fill: Color, interpolation: Interpolation) -> "AutoAugment":
        """The op of timm's string: 'original' or 'v0', also with a deviation of the magnitudes, as
        in 'v0-mstd0.5'.
        """
        return cls(
            policy.split("-")[0],
            _options(policy, mstd=0.0)["mstd"],
            FULL_LEVEL,
            fill,
            interpolation,
        )

    def __call__(self, image: Image.Image, rng: Generator, say: Say = silent) -> Image.Image:
        for name, probability, magnitude in choice(rng, _sub_policies(self.policy)):
            image = _maybe(self, image, rng, say, name, probability, magnitude)
        return image


def augment_from_policy(
    policy: str, fill: Color, interpolation: Interpolation
) -> RandAugment | AutoAugment:
    """The op that AUG.AUTO_AUGMENT names."""
    name = policy.split("-")[0]
    if name != "rand" and name not in POLICIES:
        raise _fault(
            policy,
            "cannot be replayed; use rand-m9-mstd0.5-inc1 (or with other numbers), original, v0 or"
            " none",
        )
    return (RandAugment if name == "rand" else AutoAugment).from_policy(policy, fill, interpolation)


def _maybe(
    op: RandAugment | AutoAugment,
    image: Image.Image,
    rng: Generator,
    say: Say,
    name: str,
    probability: float,
    magnitude: float,
) -> Image.Image:
    """The image after one effect, or as it was."""
    if probability < 1 and rng.random() > probability:
        return image
    if op.std == inf:
        magnitude = uniform(rng, 0, magnitude)
    elif op.std > 0:
        magnitude = gauss(rng, magnitude, op.std)
    effect = EFFECTS[name]
    argument = effect.draw(max(0.0, min(magnitude, op.limit)) / FULL_LEVEL, rng)
    say(effect.words, *[argument] * ("%" in effect.words))
    if effect.geometric:
        return effect.apply(image, argument, resampling(op.interpolation, rng, say), op.fill)
    return effect.apply(image, argument)


def _options(policy: str, **defaults: float | None) -> dict[str, float]:
    """The numbers in 'name-key1-key2...' over their defaults; only mstd may be a fraction or
    infinite, as it is beyond 100.
    """
    given: dict[str, float] = {}
    for option in policy.split("-")[1:]:
        match = re.fullmatch(r"([a-z]+)(\d+)", option) or re.fullmatch(
            r"(mstd)(\d+\.\d+|inf)", option
        )
        if not match or match[1] not in defaults:
            raise _fault(
                policy,
                f"option {option!r} is not one of {', '.join(defaults)} with a whole number behind"
                " it (mstd: any number)",
            )
        if match[1] in given:
            raise _fault(policy, f"{match[1]} stands there twice, keep one")
        given[match[1]] = float(match[2])
    if given.get("mstd", 0) > 100:
        given["mstd"] = inf
    return defaults | given


def _fault(policy: str, reason: str) -> ValueError:
    return ValueError(f"AUG.AUTO_AUGMENT = {policy!r}: {reason}")


@lru_cache
def _sub_policies(policy: str) -> tuple[tuple[tuple[str, float, float], ...], ...]:
    lines = POLICIES[policy].strip().splitlines()
    words = [[effect.split() for effect in line.split(",")] for line in lines]
    return tuple(
        tuple((name, float(probability), float(magnitude)) for name, probability, magnitude in line)
        for line in words
    )
