"""RandAugment and AutoAugment: which effects, and how strong.

An effect is a row in DRAWS here, which draws its argument, and a function in EFFECTS of pillow.py,
which changes the pixels. RandAugment chooses among those of RAND_WEIGHTS.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from data.augment.plan import Effect, Interpolation, draw_filter
from data.augment.rng import choice, gauss, uniform

FULL_LEVEL = 10.0  # the magnitude at which an effect has its full strength


class Draw(NamedTuple):
    """How the argument of an effect is drawn."""

    effect: str  # its name in a plan
    argument: Callable[[float, Generator], float]  # (level: 1 is full strength, rng) -> argument
    geometric: bool = False


def _signed(strength: float) -> Callable[[float, Generator], float]:
    def draw(level: float, rng: Generator) -> float:
        return -(level * strength) if rng.random() > 0.5 else level * strength

    return draw


def _around_one(level: float, rng: Generator) -> float:
    return max(0.1, 1.0 + _signed(0.9)(level, rng))


def _factor(level: float, rng: Generator) -> float:
    return level * 1.8 + 0.1


def _whole(scale: int, offset: int = 0, sign: int = 1) -> Callable[[float, Generator], int]:
    return lambda level, rng: offset + sign * int(level * scale)


def _none(level: float, rng: Generator) -> float:
    return 0.0


DRAWS = {
    "AutoContrast": Draw("AutoContrast", _none),
    "Equalize": Draw("Equalize", _none),
    "Invert": Draw("Invert", _none),
    "Rotate": Draw("Rotate", _signed(30.0), geometric=True),
    "Posterize": Draw("Posterize", _whole(4)),
    "PosterizeIncreasing": Draw("Posterize", _whole(4, offset=4, sign=-1)),
    "PosterizeOriginal": Draw("Posterize", _whole(4, offset=4)),
    "Solarize": Draw("Solarize", _whole(256)),
    "SolarizeIncreasing": Draw("Solarize", _whole(256, offset=256, sign=-1)),
    "SolarizeAdd": Draw("SolarizeAdd", _whole(110)),
    "Color": Draw("Color", _factor),
    "ColorIncreasing": Draw("Color", _around_one),
    "Contrast": Draw("Contrast", _factor),
    "ContrastIncreasing": Draw("Contrast", _around_one),
    "Brightness": Draw("Brightness", _factor),
    "BrightnessIncreasing": Draw("Brightness", _around_one),
    "Sharpness": Draw("Sharpness", _factor),
    "SharpnessIncreasing": Draw("Sharpness", _around_one),
    "ShearX": Draw("ShearX", _signed(0.3), geometric=True),
    "ShearY": Draw("ShearY", _signed(0.3), geometric=True),
    "TranslateXRel": Draw("TranslateXRel", _signed(0.45), geometric=True),
    "TranslateYRel": Draw("TranslateYRel", _signed(0.45), geometric=True),
}

# RandAugment's effects, in the order that is drawn from, with their weights under 'w0'
RAND_WEIGHTS = {
    "AutoContrast": 0.025,
    "Equalize": 0.005,
    "Invert": 0.0,
    "Rotate": 0.3,
    "Posterize": 0.0,
    "Solarize": 0.005,
    "SolarizeAdd": 0.005,
    "Color": 0.025,
    "Contrast": 0.005,
    "Brightness": 0.005,
    "Sharpness": 0.025,
    "ShearX": 0.2,
    "ShearY": 0.2,
    "TranslateXRel": 0.1,
    "TranslateYRel": 0.1,
}
RAND_EFFECTS = tuple(RAND_WEIGHTS)
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
    """`count` effects of all, each done with probability 0.5 at about the same magnitude."""

    magnitude: float = FULL_LEVEL
    count: int = 2
    std: float = 0.0  # of the magnitude; infinite draws it evenly between 0 and the given one
    limit: float = FULL_LEVEL  # of the magnitude drawn
    weighted: bool = False  # draw by RAND_WEIGHTS, none twice
    increasing: bool = (
        False  # effects that get stronger with the magnitude, where there is a choice
    )
    interpolation: Interpolation = "bicubic"

    @classmethod
    def from_policy(cls, policy: str, interpolation: Interpolation = "bicubic") -> "RandAugment":
        """The op of timm's string: 'rand-m9-n2-mstd0.5-mmax10-w0-inc1', in any order; all but
        'rand' may be left out.
        """
        option = _options(policy, m=FULL_LEVEL, n=2, mstd=0.0, mmax=FULL_LEVEL, w=None, inc=0)
        weighted = option["w"] is not None
        most = sum(weight > 0 for weight in RAND_WEIGHTS.values())
        if weighted and option["n"] > most:
            raise _fault(policy, f"n is at most {most} with w0, which draws none twice")
        return cls(
            magnitude=option["m"],
            count=int(option["n"]),
            std=option["mstd"],
            limit=option["mmax"] or FULL_LEVEL,
            weighted=weighted,
            increasing=option["inc"] == 1,
            interpolation=interpolation,
        )

    def draw(self, rng: Generator) -> tuple[Effect, ...]:
        """The effects that are done, in order."""
        shares = None
        if self.weighted:
            weights = np.array(list(RAND_WEIGHTS.values()))
            shares = weights / weights.sum()
        chosen = rng.choice(len(RAND_EFFECTS), self.count, replace=not self.weighted, p=shares)
        effects = []
        for index in chosen:
            name = RAND_EFFECTS[index]
            if self.increasing and f"{name}Increasing" in DRAWS:
                name = f"{name}Increasing"
            effects += _maybe(self, rng, name, 0.5, self.magnitude)
        return tuple(effects)


@dataclass(frozen=True)
class AutoAugment:
    """One of a policy's pairs of effects, each done with its own probability and magnitude."""

    policy: str
    std: float = 0.0
    limit: float = FULL_LEVEL
    interpolation: Interpolation = "bicubic"

    @classmethod
    def from_policy(cls, policy: str, interpolation: Interpolation = "bicubic") -> "AutoAugment":
        """The op of timm's string: 'original' or 'v0', also with a deviation of the magnitudes, as
        in 'v0-mstd0.5'.
        """
        std = _options(policy, mstd=0.0)["mstd"]
        return cls(policy.split("-")[0], std, interpolation=interpolation)

    def draw(self, rng: Generator) -> tuple[Effect, ...]:
        """The effects that are done, in order."""
        effects = []
        for name, probability, magnitude in choice(rng, _sub_policies(self.policy)):
            effects += _maybe(self, rng, name, probability, magnitude)
        return tuple(effects)


def augment_from_policy(
    policy: str, interpolation: Interpolation = "bicubic"
) -> RandAugment | AutoAugment:
    """The op that AUG.AUTO_AUGMENT names."""
    name = policy.split("-")[0]
    if name == "rand":
        return RandAugment.from_policy(policy, interpolation)
    if name in POLICIES:
        return AutoAugment.from_policy(policy, interpolation)
    raise _fault(policy, "cannot be replayed; use rand-m9-mstd0.5-inc1, original, v0 or none")


def _maybe(
    op: RandAugment | AutoAugment, rng: Generator, name: str, probability: float, magnitude: float
) -> list[Effect]:
    """One effect, or none."""
    if probability < 1 and rng.random() > probability:
        return []
    if op.std == inf:
        magnitude = uniform(rng, 0, magnitude)
    elif op.std > 0:
        magnitude = gauss(rng, magnitude, op.std)
    draw = DRAWS[name]
    argument = draw.argument(max(0.0, min(magnitude, op.limit)) / FULL_LEVEL, rng)
    filter = draw_filter(op.interpolation, rng) if draw.geometric else ""
    return [Effect(draw.effect, argument, filter)]


def _options(policy: str, **defaults: float | None) -> dict[str, float]:
    """The numbers in 'name-key1-key2...' over their defaults; mstd is infinite beyond 100."""
    given: dict[str, float] = {}
    for option in policy.split("-")[1:]:
        match = re.fullmatch(r"([a-z]+?)([\d.]+|inf)", option)
        if not match or match[1] not in defaults:
            raise _fault(policy, f"option {option!r} is not one of {', '.join(defaults)}")
        if match[1] in given:
            raise _fault(policy, f"{match[1]} stands there twice, keep one")
        given[match[1]] = float(match[2])
    if given.get("mstd", 0) > 100:
        given["mstd"] = inf
    return {**defaults, **given}


def _fault(policy: str, reason: str) -> ValueError:
    return ValueError(f"AUG.AUTO_AUGMENT = {policy!r}: {reason}")


@lru_cache
def _sub_policies(policy: str) -> tuple[tuple[tuple[str, float, float], ...], ...]:
    """A policy's pairs of (effect, probability, magnitude)."""
    pairs = []
    for line in POLICIES[policy].strip().splitlines():
        words = [effect.split() for effect in line.split(",")]
        pairs.append(tuple((name, float(chance), float(level)) for name, chance, level in words))
    return tuple(pairs)
