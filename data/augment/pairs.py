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


def numbers_of(mixes: Sequence[Mix]) -> Tensor:
    """What mixing needs to know, float32 [n, 6]: lam, the part of the partner that is blended in,
    top, bottom, left, right.
    """
    # Both parts are rounded from float64: 1 - lam in float32 is another number.
    rows = [(mix.lam, 0 if mix.box else 1 - mix.lam, *(mix.box or (0,) * 4)) for mix in mixes]
    return torch.tensor(rows, dtype=torch.float32)


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

    def _mixed(
        self, images: Tensor, labels: Tensor | None, mixes: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Images and targets, given what `numbers_of` says of each of len(mixes) equal groups."""
        targets = None if labels is None else self._targets(labels, mixes[:, 0])
        if not self.enabled:
            return images, targets
        groups = images.unflatten(0, (len(mixes), -1))  # [n, images, C, H, W]
        if images.device.type == "cpu":
            groups = groups.clone()
            # a pair stays in the processor's cache: 5 times as fast as whole batches
            for group, mix in zip(groups, mixes.tolist()):
                blend_(group, *mix)
        else:
            groups = blended(groups, mixes.to(images.device, non_blocking=True))
        return groups.flatten(0, 1), targets

    def _targets(self, labels: Tensor, lam: Tensor) -> Tensor:
        """Smoothed labels mixed with their partners' as the images were, in len(lam) groups."""
        if self.num_classes < 1:
            raise ValueError(
                "labels can't become targets without the number of classes: set MODEL.NUM_CLASSES"
            )
        targets = smooth_targets(labels, self.num_classes, self.smoothing)
        targets = targets.unflatten(0, (len(lam), -1))
        lam = lam.to(labels.device, non_blocking=True)[:, None, None]
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
        self,
        images: Tensor,
        labels: Tensor | None,
        seeds: Sequence[int] | Tensor,
        mixes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed images [B, 3, H, W] (the given ones are left alone) and their targets [B, C], None
        without labels.

        `mixes` are the numbers of what the seeds draw, where they are known already.
        """
        if len(seeds) != len(images):
            raise ValueError(f"{len(seeds)} seeds for {len(images)} images: each image has its own")
        if not self.enabled:
            mixes = numbers_of([UNMIXED])
        elif mixes is None or not mixes.numel():
            mixes = numbers_of(self.draw(seeds, *images.shape[-2:]))
        return self._mixed(images, labels, mixes)


class BatchMix(Mixer):
    """Mixes a whole batch by one draw: image i with image B - 1 - i."""

    def __call__(
        self, images: Tensor, labels: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed images [B, 3, H, W] (the given ones are left alone) and their targets [B, C], None
        without labels.
        """
        mix = self.draw_one(generator(seed), *images.shape[-2:])
        return self._mixed(images, labels, numbers_of([mix]))


def _around(middle: int, half: int, length: int) -> tuple[int, int]:
    """Where a part of 2 * half of a side begins and ends, as far as it lies on the side."""
    return max(middle - half, 0), min(middle + half, length)


def blend_(
    images: Tensor, lam: float, given: float, top: float, bottom: float, left: float, right: float
) -> None:
    """Mix images [B, C, H, W] in place with the same images in reverse order."""
    if given:
        # These three roundings are the original's: a fused multiply-add or a lerp would change the
        # last bit.
        partners = images.flip(0).mul_(given)
        images.mul_(lam).add_(partners)
    elif bottom:
        images = images[..., int(top) : int(bottom), int(left) : int(right)]
        images.copy_(images.flip(0))


def blended(groups: Tensor, mixes: Tensor) -> Tensor:
    """`blend_` of many groups [n, B, C, H, W] at once, in a dozen operations; mixes: [n, 6]."""
    height, width = groups.shape[-2:]
    places = torch.arange(max(height, width), device=groups.device)
    # [n, 2, places]: of the box, which rows and which columns
    is_inside = (places >= mixes[:, 2::2, None]) & (places < mixes[:, 3::2, None])
    is_cut = is_inside[:, 0, :height, None] & is_inside[:, 1, None, :width]
    lam, given = mixes[:, :2, None, None, None, None].unbind(1)
    partners = groups.flip(1)
    # in the images' type after each operation, as `blend_` has it
    mixed = (groups * lam).to(groups.dtype) + (partners * given).to(groups.dtype)
    mixed = torch.where(given > 0, mixed, groups)
    return torch.where(is_cut[:, None, None], partners, mixed)


def smooth_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Float32 targets [B, C]: smoothing / C everywhere, the rest at the label; all zero where the
    label is negative (none).
    """
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    targets.scatter_(
        1, labels.long().clamp(min=0)[:, None], 1 - smoothing + smoothing / num_classes
    )
    return targets * (labels >= 0)[:, None]
