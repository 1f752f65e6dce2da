"""Augmentation: a seed becomes a plan, a plan and an image become pixels."""

from data.augment.decoder import AugmentDecoder
from data.augment.pairs import PairMix

__all__ = ["AugmentDecoder", "PairMix"]
