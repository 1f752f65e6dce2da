"""Mixup and CutMix: of neighbours in a batch, drawn from the two images' seeds, or of a whole batch
with one draw.

What is drawn are numbers on the CPU; the images may be on any device and are never waited for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor

from data.augment.rng import beta, generator, integer, pair_seed


@dataclass(frozen=True)
class Mix:
    """What happens to an image: it keeps the fraction `lam` of itself, the rest comes from its
    partner.

    Without a box all pixels are blended; with one (top, bottom, left, right), the pixels inside are
    the partner's."""

    lam: float
    box: tuple[int, int, int, int] | None = None

    def __str__(self) -> str:
        if self.box:
            top, bottom, left, right = self.box
            return (
                f"cutmix: rows {top}-{bottom}, columns {left}-{right} from the partner, keeps"
                f" {self.lam:.3f}"
            )
        return "not mixed" if self.lam == 1 else f"mixup: {self.lam:.3f} of itself"


UNMIXED = Mix(1.0)


@dataclass(frozen=True)
class Mixer:
    """The probabilities of mixing, and how labels become targets.

    The subclasses mix neighbours of a batch, or all of it; who is whose neighbour in an epoch is
    data/sampler.py's matter.
    """

    mixup_alpha: float
    cutmix_alpha: float
    # sides of the box, as fractions of the image's
    cutmix_minmax: tuple[float, float] | None = None
    probability: float = 1.0
    switch_probability: float = 0.5  # of cutmix where both are on
    num_classes: int = 0  # needed for labels only
    smoothing: float = 0.0

    @classmethod
    def from_config(cls, cfg) -> "Mixer":
        """The mixer of a config's AUG section."""
        minmax = cfg.AUG.CUTMIX_MINMAX
        return cls(
            mixup_alpha=float(cfg.AUG.MIXUP),
            cutmix_alpha=1.0 if minmax else float(cfg.AUG.CUTMIX),
            cutmix_minmax=(float(minmax[0]), float(minmax[1])) if minmax else None,
            probability=float(cfg.AUG.MIXUP_PROB),
            switch_probability=float(cfg.AUG.MIXUP_SWITCH_PROB),
            num_classes=int(cfg.MODEL.NUM_CLASSES),
            smoothing=float(cfg.MODEL.LABEL_SMOOTHING),
        )

    @property
    def enabled(self) -> bool:
        """Whether images are ever mixed."""
        return (self.mixup_alpha > 0 or self.cutmix_alpha > 0) and self.probability > 0

    def draw_one(self, rng: Generator, height: int, width: int) -> Mix:
        """One draw for images of height x width pixels."""
        if not self.enabled or rng.random() >= self.probability:
            return UNMIXED
        cut = self.cutmix_alpha > 0
        if cut and self.mixup_alpha > 0:
            cut = rng.random() < self.switch_probability
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        lam = beta(rng, alpha, alpha)
        if not cut:
            return Mix(lam)
        top, bottom, left, right = box = self._box(rng, lam, height, width)
        return Mix(1.0 - (bottom - top) * (right - left) / (height * width), box)

    def _box(
        self, rng: Generator, lam: float, height: int, width: int
    ) -> tuple[int, int, int, int]:
        if self.cutmix_minmax:
            low, high = self.cutmix_minmax
            box_height = integer(rng, int(height * low), int(height * high) - 1)
            box_width = integer(rng, int(width * low), int(width * high) - 1)
            top = integer(rng, 0, height - box_height - 1)
            left = integer(rng, 0, width - box_width - 1)
            return top, top + box_height, left, left + box_width
        side = (1.0 - lam) ** 0.5
        middle_y = integer(rng, 0, height - 1)
        middle_x = integer(rng, 0, width - 1)
        top, bottom = _around(middle_y, int(height * side) // 2, height)
        left, right = _around(middle_x, int(width * side) // 2, width)
        return top, bottom, left, right

    def _targets(self, labels: Tensor | None, mixes: Sequence[Mix]) -> Tensor | None:
        """Smoothed labels mixed with their partners' as the images were; labels come in len(mixes)
        groups of equal size.
        """
        if labels is None:
            return None
        if self.num_classes < 1:
            raise ValueError(
                "labels can't become targets without the number of classes: set MODEL.NUM_CLASSES"
            )
        targets = smooth_targets(labels, self.num_classes, self.smoothing)
        targets = targets.unflatten(0, (len(mixes), -1))
        lam = torch.tensor([mix.lam for mix in mixes]).to(labels.device, non_blocking=True)
        lam = lam[:, None, None]
        return (targets * lam + targets.flip(1) * (1 - lam)).flatten(0, 1)


class PairMix(Mixer):
    """Mixes neighbours (2i, 2i + 1) of a batch with each other, from the exclusive or of their
    seeds.
    """

    def draw(self, seeds: Sequence[int] | Tensor, height: int, width: int) -> list[Mix]:
        """The mix of each pair (seeds[2i], seeds[2i + 1]) of images of height x width pixels."""
        seeds = seeds.tolist() if isinstance(seeds, Tensor) else list(seeds)
        if len(seeds) % 2:
            raise ValueError(
                f"a batch of {len(seeds)} images can't be mixed in pairs: use an even batch size,"
                " and keep pairs whole"
            )
        return [
            self.draw_one(generator(pair_seed(*pair)), height, width)
            for pair in zip(seeds[::2], seeds[1::2])
        ]

    def __call__(
        self, images: Tensor, labels: Tensor | None, seeds: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed images [B, 3, H, W] (the given ones are left alone) and their targets [B, C], None
        without labels.
        """
        if len(seeds) != len(images):
            raise ValueError(f"{len(seeds)} seeds for {len(images)} images: each image has its own")
        if not self.enabled:
            return images, self._targets(labels, [UNMIXED])
        mixes = self.draw(seeds, *images.shape[-2:])
        mixed = images.clone()
        # a pair stays in the processor's cache: 5 times as fast as whole batches
        for pair, mix in zip(mixed.split(2), mixes):
            blend_(pair, mix)
        return mixed, self._targets(labels, mixes)


class BatchMix(Mixer):
    """Mixes a whole batch by one draw: image i with image B - 1 - i."""

    def __call__(
        self, images: Tensor, labels: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed images [B, 3, H, W] (the given ones are left alone) and their targets [B, C], None
        without labels.
        """
        mix = self.draw_one(generator(seed), *images.shape[-2:])
        if mix != UNMIXED:
            images = images.clone()
            blend_(images, mix)
        return images, self._targets(labels, [mix])


def _around(middle: int, half: int, length: int) -> tuple[int, int]:
    """Where a part of 2 * half of a side begins and ends, as far as it lies on the side."""
    return max(middle - half, 0), min(middle + half, length)


def blend_(images: Tensor, mix: Mix) -> None:
    """Mix images [B, C, H, W] in place with the same images in reverse order."""
    if mix.box:
        top, bottom, left, right = mix.box
        images = images[..., top:bottom, left:right]
        images.copy_(images.flip(0))
    elif mix.lam != 1:
        # These three roundings are the original's: a fused multiply-add or a lerp would change the
        # last bit.
        partners = images.flip(0).mul_(1 - mix.lam)
        images.mul_(mix.lam).add_(partners)


def smooth_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Float32 targets [B, C]: smoothing / C everywhere, the rest at the label; all zero where the
    label is negative (none).
    """
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    targets.scatter_(
        1, labels.long().clamp(min=0)[:, None], 1 - smoothing + smoothing / num_classes
    )
    return targets * (labels >= 0)[:, None]
