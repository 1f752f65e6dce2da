"""A configuration -> the list of augmentations; an image and a seed -> a training tensor, the same
bits for ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.augment import canary, pillow
from data.augment.device import PackedBatch, apply_batch, pack, unsupported
from data.augment.pairs import PairMix
from data.augment.pillow import RESAMPLING, Statistics, as_rgb, to_float
from data.augment.plan import (
    ColorJitter,
    Crop,
    Flip,
    PaddedCrop,
    Plan,
    RandomErasing,
    RandomResizedCrop,
)
from data.augment.randaugment import augment_from_policy
from data.augment.rng import SEED_LIMIT, generator
from data.augment.shift import Color

MEAN_AND_STD: dict[str, tuple[Statistics, Statistics]] = {
    "default": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # the original's name of `half`
}
SMALL = 32  # pixels a side up to which images are shifted in training and evaluated as they are


@dataclass(frozen=True)
class AugmentDecoder:
    """Turns (image, seed) into a training tensor: *d = E^-1(d0)*, then d applied to the image."""

    size: int  # pixels a side of the result
    crop: RandomResizedCrop | PaddedCrop
    flips: tuple[Flip, ...]
    # what draws effects on the whole image: RandAugment, AutoAugment, ColorJitter
    effects: tuple[Any, ...]
    erasing: RandomErasing | None
    fill: Color  # of pixels that geometric effects bring in
    mean: Statistics  # of values in [0, 1]; each model's own
    std: Statistics
    # of pairs of decoded images: the canary covers it, `decode` does not
    mix: PairMix | None = None

    @classmethod
    def from_config(cls, cfg) -> "AugmentDecoder":
        """The decoder of a config's training images, in the order in which things are done."""
        size, interpolation = int(cfg.DATA.IMG_SIZE), cfg.DATA.INTERPOLATION
        crop = PaddedCrop(interpolation=interpolation)
        if size > SMALL:
            scale, ratio = tuple(map(float, cfg.AUG.SCALE)), tuple(map(float, cfg.AUG.RATIO))
            crop = RandomResizedCrop(scale, ratio, interpolation)
        effects = ()
        if cfg.AUG.AUTO_AUGMENT not in ("", "none"):
            effects = (augment_from_policy(cfg.AUG.AUTO_AUGMENT, interpolation),)
        elif cfg.AUG.COLOR_JITTER > 0:
            effects = (ColorJitter(float(cfg.AUG.COLOR_JITTER)),)
        erasing = None
        if cfg.AUG.REPROB > 0:
            erasing = RandomErasing(float(cfg.AUG.REPROB), cfg.AUG.REMODE, int(cfg.AUG.RECOUNT))
        mean, std = mean_and_std(cfg)
        mix = PairMix.from_config(cfg)
        return cls(
            size=size,
            crop=crop,
            flips=(
                Flip("horizontal", float(cfg.AUG.HFLIP)),
                Flip("vertical", float(cfg.AUG.VFLIP)),
            ),
            effects=effects,
            erasing=erasing,
            fill=fill_color(cfg),
            mean=mean,
            std=std,
            mix=mix if mix.enabled and cfg.AUG.MIXUP_MODE == "pair2" else None,
        )

    def plan(self, width: int, height: int, seed: int) -> Plan:
        """What a seed in [0, 2**31) means for an image of width x height pixels: every draw."""
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(
                f"seed {seed} is out of range: seeds of images are whole numbers from 0 to"
                f" {SEED_LIMIT - 1} (int32)"
            )
        rng = generator(seed)
        crop = self.crop.draw(rng, width, height)
        flips = tuple(flip.axis for flip in self.flips if flip.draw(rng))
        effects = tuple(effect for op in self.effects for effect in op.draw(rng))
        erasures = self.erasing.draw(rng, self.size) if self.erasing else ()
        return Plan(self.size, crop, flips, effects, erasures)

    def apply(self, plan: Plan, image: Image.Image) -> Tensor:
        """The float32 tensor [3, size, size] that a plan makes of an image."""
        return pillow.apply(plan, image, self.fill, self.mean, self.std)

    def decode(self, image: Image.Image, seed: int) -> Tensor:
        """The float32 tensor [3, size, size] of an image under a seed in [0, 2**31)."""
        return self.apply(self.plan(image.width, image.height, seed), image)

    def pack(
        self,
        images: Sequence[Image.Image],
        seeds: Sequence[int],
        *,
        by_pillow: bool = False,
        others: Mapping[str, Tensor] | None = None,
    ) -> PackedBatch:
        """What `device.apply_batch` needs of images to decode them on any torch device.

        With `by_pillow` only normalising and erasing are left to it. `others` travel along.
        """
        sizes = [image.size for image in images]
        plans = [self.plan(*size, seed) for size, seed in zip(sizes, seeds, strict=True)]
        if by_pillow:
            images = [pillow.augmented(*pair, self.fill) for pair in zip(plans, images)]
            whole = Crop(0, 0, self.size, self.size, "bilinear")
            plans = [replace(plan, crop=whole, flips=(), effects=()) for plan in plans]
        elif name := unsupported(self):
            raise ValueError(f"{name} cannot be executed on a device, only by Pillow")
        return pack(plans, images, self.fill, self.mean, self.std, others or {})

    def decode_batch(
        self,
        images: Sequence[Image.Image],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """`decode` of many images at once, with the same bits: float32 [B, 3, size, size]."""
        return apply_batch(self.pack(images, seeds).to(device))

    def canary(self) -> dict[str, str]:
        """Digests of built-in images under fixed seeds, not normalised: they change where Pillow or
        numpy do.
        """
        plain = replace(self, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return canary.digests(plain.decode, self.mix)

    def __str__(self) -> str:
        ops = [self.crop, *self.flips, *self.effects, self.erasing, self.mix]
        return f"{self.size} px: " + "; ".join(str(op) for op in ops if op)


@dataclass(frozen=True)
class EvalTransform:
    """An image to evaluate -> float32 tensor [3, size, size]: its centre, or all of it, or small
    ones as they are.
    """

    size: int
    centre: bool  # resize the shorter side to 256/224 of the size and cut the centre out; else all
    interpolation: str
    mean: Statistics
    std: Statistics

    def __call__(self, image: Image.Image) -> Tensor:
        image = as_rgb(image)
        filter = RESAMPLING.get(self.interpolation, RESAMPLING["bicubic"])
        size = self.size
        if size > SMALL and self.centre:
            shorter, scale = int(256 / 224 * size), min(image.size)
            width, height = (
                shorter if side == scale else int(shorter * side / scale) for side in image.size
            )
            left, top = round((width - size) / 2), round((height - size) / 2)
            image = image.resize((width, height), filter)
            image = image.crop((left, top, left + size, top + size))
        elif image.size != (size, size):
            image = image.resize((size, size), filter)
        return to_float(image, self.mean, self.std)


def eval_transform(cfg) -> EvalTransform:
    """What happens to an image that is evaluated."""
    size, centre = int(cfg.DATA.IMG_SIZE), bool(cfg.TEST.CROP)
    return EvalTransform(size, centre, cfg.DATA.INTERPOLATION, *mean_and_std(cfg))


def mean_and_std(cfg) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation per channel that a config's model expects, of values up to 1."""
    mean, std = MEAN_AND_STD[cfg.DATA.MEAN_AND_STD_TYPE]
    return _floats(cfg.DATA.MEAN) or mean, _floats(cfg.DATA.STD) or std


def fill_color(cfg) -> Color:
    """The colour of pixels that geometric augmentations bring in: the config's, else the mean's."""
    mean, _ = mean_and_std(cfg)
    return tuple(map(int, cfg.AUG.FILL)) or tuple(min(255, round(255 * value)) for value in mean)


def _floats(values) -> tuple[float, ...]:
    return tuple(map(float, values))
