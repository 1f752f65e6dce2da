"""A configuration -> the list of augmentations; an image and a seed -> a training tensor, the same
bits for ever.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from data.augment import canary
from data.augment.ops import (
    RESAMPLING,
    ColorJitter,
    Flip,
    PaddedCrop,
    RandomErasing,
    RandomResizedCrop,
    Say,
    ToTensor,
    silent,
)
from data.augment.pairs import PairMix
from data.augment.randaugment import augment_from_policy
from data.augment.rng import SEED_LIMIT, generator
from data.augment.shift import Color

Op = Callable[..., Any]  # op(image, rng, say) -> image
Triple = tuple[float, float, float]

MEAN_AND_STD: dict[str, tuple[Triple, Triple]] = {
    "default": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # the original's name of `half`
}
# pixels a side up to which images are shifted in training and evaluated as they are, not resized
SMALL = 32


@dataclass(frozen=True)
class AugmentDecoder:
    """Turns (image, seed) into a training tensor; whatever is random comes from the seed."""

    ops: tuple[Op, ...]
    image_size: int
    interpolation: str
    auto_augment: str
    fill: Color
    # of pairs of decoded images: the decoder does not mix, its recipe and canary include it
    mix: PairMix | None = None

    @classmethod
    def from_config(cls, cfg) -> "AugmentDecoder":
        """The decoder of a config's training images."""
        mix = PairMix.from_config(cfg)
        return cls(
            ops=train_ops(cfg),
            image_size=int(cfg.DATA.IMG_SIZE),
            interpolation=cfg.DATA.INTERPOLATION,
            auto_augment=cfg.AUG.AUTO_AUGMENT,
            fill=fill_color(cfg),
            mix=mix if mix.enabled and cfg.AUG.MIXUP_MODE == "pair2" else None,
        )

    def decode(self, image: Image.Image, seed: int, say: Say = silent) -> Tensor:
        """The float32 tensor [3, H, W] of an image under a seed in [0, 2**31); `say` is told what
        was drawn.
        """
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(
                f"seed {seed} is out of range: seeds of images are whole numbers from 0 to"
                f" {SEED_LIMIT - 1} (int32)"
            )
        rng = generator(seed)
        value = image if image.mode == "RGB" else image.convert("RGB")
        for op in self.ops:
            value = op(value, rng, say)
        return value

    def describe(self, image: Image.Image, seed: int) -> list[str]:
        """What the seed does to the image, in words, in order."""
        words: list[str] = []
        self.decode(image, seed, lambda text, *values: words.append(text % values))
        return words

    def recipe(self) -> dict[str, Any]:
        """Everything that changes the bits of a decoded image, but for each model's own mean and
        standard deviation.
        """
        return {
            "image_size": self.image_size,
            "interpolation": self.interpolation,
            "auto_augment": self.auto_augment,
            "fill": list(self.fill),
            "ops": [repr(op) for op in self.ops],
            "mix": self.mix.recipe() if self.mix else {},
        }

    def canary(self) -> dict[str, str]:
        """Digests of built-in images under fixed seeds, not normalised: they change where Pillow or
        numpy do.
        """
        plain = replace(
            self, ops=tuple(ToTensor() if isinstance(op, ToTensor) else op for op in self.ops)
        )
        return canary.digests(plain.decode, self.mix)

    def __repr__(self) -> str:
        lines = [*map(repr, self.ops), *([f"PairMix({self.mix.recipe()})"] if self.mix else [])]
        return "".join(["AugmentDecoder(", *(f"\n    {line}," for line in lines), "\n)"])


@dataclass(frozen=True)
class EvalTransform:
    """An image to evaluate -> float32 tensor [3, size, size]: its centre, or all of it, or small
    ones as they are.
    """

    size: int
    # resize the shorter side to 256/224 of the size and cut the centre out; else resize to size x
    # size
    centre: bool
    interpolation: str
    to_tensor: ToTensor

    def __call__(self, image: Image.Image) -> Tensor:
        image = image if image.mode == "RGB" else image.convert("RGB")
        filter = RESAMPLING.get(self.interpolation, RESAMPLING["bicubic"])
        size = self.size
        if size > SMALL and self.centre:
            shorter = int(256 / 224 * size)
            scale = min(image.size)
            width, height = (
                shorter if side == scale else int(shorter * side / scale) for side in image.size
            )
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.resize((width, height), filter).crop((left, top, left + size, top + size))
        elif image.size != (size, size):
            image = image.resize((size, size), filter)
        return self.to_tensor(image)


def train_ops(cfg) -> tuple[Op, ...]:
    """What happens to a training image, in order."""
    size, interpolation = int(cfg.DATA.IMG_SIZE), _interpolation(cfg)
    scale, ratio = _pair(cfg.AUG.SCALE), _pair(cfg.AUG.RATIO)
    return (
        (
            RandomResizedCrop(size, scale, ratio, interpolation)
            if size > SMALL
            else PaddedCrop(size, 4, interpolation)
        ),
        Flip("horizontal", float(cfg.AUG.HFLIP)),
        Flip("vertical", float(cfg.AUG.VFLIP)),
        *_color_ops(cfg, interpolation),
        ToTensor(*mean_and_std(cfg)),
        *_erasing_ops(cfg),
    )


def eval_transform(cfg) -> EvalTransform:
    """What happens to an image that is evaluated."""
    return EvalTransform(
        int(cfg.DATA.IMG_SIZE),
        bool(cfg.TEST.CROP),
        _interpolation(cfg),
        ToTensor(*mean_and_std(cfg)),
    )


def mean_and_std(cfg) -> tuple[Triple, Triple]:
    """Mean and standard deviation per channel that a config's model expects, of values in [0, 1]."""
    if cfg.DATA.MEAN_AND_STD_TYPE not in MEAN_AND_STD:
        raise ValueError(
            f"DATA.MEAN_AND_STD_TYPE = {cfg.DATA.MEAN_AND_STD_TYPE!r}: use one of"
            f" {', '.join(MEAN_AND_STD)}"
        )
    mean, std = MEAN_AND_STD[cfg.DATA.MEAN_AND_STD_TYPE]
    return _triple(cfg.DATA.MEAN, "DATA.MEAN") or mean, _triple(cfg.DATA.STD, "DATA.STD") or std


def fill_color(cfg) -> Color:
    """The colour of pixels that geometric augmentations bring in: the config's, else the mean's."""
    return tuple(map(int, _triple(cfg.AUG.FILL, "AUG.FILL"))) or tuple(
        min(255, round(255 * value)) for value in mean_and_std(cfg)[0]
    )


def _color_ops(cfg, interpolation: str) -> tuple[Op, ...]:
    if cfg.AUG.AUTO_AUGMENT not in ("", "none"):
        return (augment_from_policy(cfg.AUG.AUTO_AUGMENT, fill_color(cfg), interpolation),)
    return (ColorJitter(float(cfg.AUG.COLOR_JITTER)),) if cfg.AUG.COLOR_JITTER > 0 else ()


def _erasing_ops(cfg) -> tuple[Op, ...]:
    if cfg.AUG.REMODE not in ("const", "rand", "pixel"):
        raise ValueError(f"AUG.REMODE = {cfg.AUG.REMODE!r}: use const, rand or pixel")
    return (
        (RandomErasing(float(cfg.AUG.REPROB), cfg.AUG.REMODE, int(cfg.AUG.RECOUNT)),)
        if cfg.AUG.REPROB > 0
        else ()
    )


def _interpolation(cfg) -> str:
    if cfg.DATA.INTERPOLATION not in (*RESAMPLING, "random"):
        raise ValueError(
            f"DATA.INTERPOLATION = {cfg.DATA.INTERPOLATION!r}: use bicubic, bilinear or random"
        )
    return cfg.DATA.INTERPOLATION


def _pair(values) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def _triple(values, key: str) -> tuple[float, ...]:
    if len(values) not in (0, 3):
        raise ValueError(
            f"{key} = {list(values)}: give three numbers, one per channel, or [] for the default"
        )
    return tuple(map(float, values))
