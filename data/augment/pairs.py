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


def numbers_of(mixes: Sequence[Mix], height: int, width: int) -> Tensor:
    """What mixing images of height x width pixels needs to know, float32 [n, 9 + height + width]:
    for labels lam, 1 - lam, lam; for pixels the parts of the image and of its partner that are
    blended, and top, bottom, left, right of the box; whether each row, and each column, is in it.
    """
    lam = torch.tensor([[mix.lam] for mix in mixes])
    # Both parts are rounded from float64: 1 - lam in float32 is another number.
    parts = [(1, 0) if mix.box else (mix.lam, 1 - mix.lam) for mix in mixes]
    boxes = torch.tensor([mix.box or (0,) * 4 for mix in mixes])
    places = torch.arange(max(height, width))
    # [n, 2, places]
    is_inside = (places >= boxes[:, ::2, None]) & (places < boxes[:, 1::2, None])
    inside = is_inside[:, 0, :height], is_inside[:, 1, :width]
    return torch.cat([lam, 1 - lam, lam, torch.tensor(parts), boxes, *inside], 1)


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

    def draw(self, seeds, height: int, width: int) -> list[Mix]:
        """The mix of each group of images of height x width pixels that are mixed alike."""
        raise NotImplementedError

    def numbers(self, images: Tensor, seeds, mixes: Tensor | None = None) -> Tensor:
        """`numbers_of` what the seeds draw for images [B, 3, H, W], where these are; `mixes` are
        what the loader knows of them.
        """
        if not self.enabled:
            mixes = numbers_of([UNMIXED], 0, 0)
        elif mixes is None or not mixes.numel():
            size = images.shape[-2:]
            mixes = numbers_of(self.draw(seeds, *size), *size)
        if images.is_cuda and not mixes.is_cuda:
            mixes = mixes.pin_memory()  # a copy from other memory may wait for the device
        return mixes.to(images.device, non_blocking=True)

    def __call__(
        self, images: Tensor, labels: Tensor | None, seeds, mixes: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed images [B, 3, H, W] (the given ones are left alone) and their targets [B, C], None
        without labels.

        `mixes` are the numbers of what the seeds draw, where they are known already.
        """
        mixes = self.numbers(images, seeds, mixes)
        targets = None if labels is None else self._targets(labels, mixes)
        if not self.enabled:
            return images, targets
        groups = images.unflatten(0, (len(mixes), -1))  # [n, images, C, H, W]
        if images.device.type == "cpu":
            groups = groups.clone()
            # a pair stays in the processor's cache: 5 times as fast as whole batches
            for group, mix in zip(groups, mixes[:, 3:9].tolist()):
                blend_(group, *mix)
        else:
            groups = blended(groups, mixes)
        return groups.flatten(0, 1), targets

    def _targets(self, labels: Tensor, mixes: Tensor) -> Tensor:
        """Smoothed labels mixed with their partners' as the images were."""
        if self.num_classes < 1:
            raise ValueError(
                "labels can't become targets without the number of classes: set MODEL.NUM_CLASSES"
            )
        targets = smooth_targets(labels, self.num_classes, self.smoothing)
        targets = targets.unflatten(0, (len(mixes), -1))
        own, others = mixes[:, :2, None, None].unbind(1)
        return (targets * own + targets.flip(1) * others).flatten(0, 1)


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

    def numbers(
        self, images: Tensor, seeds: Sequence[int] | Tensor, mixes: Tensor | None = None
    ) -> Tensor:
        """As a mixer's; each image has a seed."""
        if len(seeds) != len(images):
            raise ValueError(f"{len(seeds)} seeds for {len(images)} images: each image has its own")
        return super().numbers(images, seeds, mixes)


class BatchMix(Mixer):
    """Mixes a whole batch by one draw: image i with image B - 1 - i."""

    def draw(self, seeds: int, height: int, width: int) -> list[Mix]:
        """The one mix of a batch, from its one seed."""
        return [self.draw_one(generator(seeds), height, width)]


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
    """`blend_` of many groups [n, B, C, H, W] at once, in six operations, given their numbers.

    Finite pixels come out equal to the last bit (a negative zero may lose its sign): of an image
    or a partner that has no part in a pixel 0 times its value is added.
    """
    kept, given = mixes[:, 3:5, None, None].unbind(1)
    rows, columns = mixes[:, 9:].split(groups.shape[-2:], 1)
    box = rows[:, :, None], columns[:, None]
    kept = torch.addcmul(kept, *box, value=-1)[:, None, None]  # [n, 1, 1, H, W]
    given = torch.addcmul(given, *box)[:, None, None]
    # in the images' type after each operation, as `blend_` has it
    return (groups * kept).to(groups.dtype) + (groups.flip(1) * given).to(groups.dtype)


def share_right(labels: Tensor, answers: Tensor, mixes: Tensor) -> Tensor:
    """Percent of mixed images that show the class answered, for each column of answers [B, m],
    given their own labels [B], -1 for none, and the numbers of their mixes.
    """
    labels = labels.unflatten(0, (len(mixes), 1, -1))  # [n, 1, images]
    parts = mixes[:, :3].unfold(1, 2, 1)  # [n, 2, 2]: of each image, the parts of both labels
    if labels.shape[-1] != 2:
        labels = torch.stack([labels, labels.flip(-1)], -1)[:, 0]
        parts = parts[:, :1]
    is_right = labels[..., None] == answers.unflatten(0, (len(mixes), -1))[:, :, None]
    return (is_right * parts[..., None]).sum((0, 1, 2)) * (100 / len(answers))


def smooth_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Float32 targets [B, C]: smoothing / C everywhere, the rest at the label; all zero where the
    label is negative (none).
    """
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    targets.scatter_(
        1, labels.long().clamp(min=0)[:, None], 1 - smoothing + smoothing / num_classes
    )
    return targets * (labels >= 0)[:, None]
