"""The order of an epoch: which image comes when, who is paired with whom, and which rank takes it.

Nothing here depends on how a step is split. The epoch is one permutation of all positions, cut into
units (a pair of neighbours or a single image), and rank r of W takes the units r, r + W, r + 2W,
... So the first n units of all ranks together are always the first n * W units of the epoch: for
every split of the same number of images the steps hold the same images in the same pairs."""

from collections.abc import Callable, Iterator
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import Sampler

Wanted = Callable[[int, list[int]], bool]

CHUNK_UNITS = 1 << 14  # units turned into Python integers at a time


class EpochSampler(Sampler[int]):
    """One rank's positions of an epoch, in order; the epoch's order is a pure function of (seed,
    epoch, num_images).

    With `step_images` > 1 (images of one global step: world x batch x accumulation) the epoch is
    cut to whole steps; with 1 every image is kept and ranks may differ by one unit. Nothing is ever
    padded: the last image of an odd number of paired ones is its own partner. Positions where the
    boolean array `available` is False are skipped before cutting and dealing, in a paired order
    together with their partner; `skipped` counts them."""

    def __init__(
        self,
        num_images: int,
        world_size: int,
        rank: int,
        seed: int = 0,
        shuffle: bool = True,
        paired: bool = False,
        step_images: int = 1,
        *,
        available: np.ndarray | None = None,
    ) -> None:
        if num_images < 1:
            raise ValueError(f"an epoch of {num_images} images: there is nothing to sample")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes: a rank is in [0, world size)")
        if step_images < 1:
            raise ValueError(f"step_images {step_images}: a global step holds at least one image")
        self.unit = 2 if paired else 1
        if step_images > 1 and step_images % (world_size * self.unit):
            what = "pairs of images" if paired else "images"
            raise ValueError(
                f"a step of {step_images} images can't be dealt to {world_size} processes in whole"
                f" {what}"
            )
        if available is not None and (
            available.dtype != np.bool_ or available.shape != (num_images,)
        ):
            raise ValueError(
                f"available is {available.dtype}{list(available.shape)}, expected one bool for each"
                f" of {num_images} positions"
            )
        self.num_images, self.world_size, self.rank = num_images, world_size, rank
        self.seed, self.shuffle, self.paired, self.step_images = seed, shuffle, paired, step_images
        self.available = available
        self.epoch = self.start = 0
        # (epoch, positions it keeps): only counting them again would cost a permutation
        self._kept = (-1, 0)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and skip the first `start` positions of this rank (`len` goes on
        counting them).
        """
        length = self.length(epoch)
        if not 0 <= start <= length:
            raise ValueError(
                f"can't start at position {start}: rank {self.rank} has {length} positions in epoch"
                f" {epoch}"
            )
        if start % self.unit:
            raise ValueError(f"can't start at position {start}: it would split a pair")
        self.epoch, self.start = epoch, start

    def length(self, epoch: int) -> int:
        """Number of this rank's positions of a whole epoch (it varies with the epoch only if pairs
        are skipped).
        """
        return self.unit * len(range(self.rank, self._units(epoch), self.world_size))

    @property
    def skipped(self) -> int:
        """Number of positions of the current epoch that were left out because they or their partner
        are not available.
        """
        return self.num_images - self._count(self.epoch)

    def __len__(self) -> int:
        return self.length(self.epoch)

    def __iter__(self) -> Iterator[int]:
        return self._positions(self.epoch, self.start)

    def _positions(self, epoch: int, start: int) -> Iterator[int]:
        order, members = self._order(epoch), np.arange(self.unit)
        end = self._units(epoch)
        stride = CHUNK_UNITS * self.world_size
        for first in range(self.rank + start // self.unit * self.world_size, end, stride):
            units = np.arange(first, min(first + stride, end), self.world_size)
            places = (units[:, None] * self.unit + members).ravel()
            # Only the last place of an odd paired order lies outside, which makes that image its
            # own partner.
            yield from order[np.minimum(places, len(order) - 1)].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        """All positions that the epoch keeps, before cutting and dealing."""
        if self.shuffle:
            order = torch.randperm(
                self.num_images, generator=torch.Generator().manual_seed(self.seed + epoch)
            ).numpy()
        else:
            order = np.arange(self.num_images)
        if self.available is None:
            return order
        kept = self.available[order]
        if self.paired:
            even = len(kept) // 2 * 2
            pairs = kept[:even].reshape(-1, 2)
            pairs[:] = pairs.all(axis=1, keepdims=True)
        return order[kept]

    def _count(self, epoch: int) -> int:
        """Number of positions in `_order`."""
        if self.available is None:
            return self.num_images
        if not self.paired:
            return int(np.count_nonzero(self.available))
        if self._kept[0] != epoch:
            self._kept = (epoch, len(self._order(epoch)))
        return self._kept[1]

    def _units(self, epoch: int) -> int:
        """Number of pairs (or single images) of the epoch over all ranks, cut to whole steps."""
        count = self._count(epoch)
        units = -(-count // self.unit)
        if self.step_images == 1:
            return units
        step_units = self.step_images // self.unit
        if units < step_units:
            missing = ""
            if count < self.num_images:
                missing = f" ({self.num_images - count} of {self.num_images} are not available"
                if self.paired:
                    missing += (
                        ": pairs are mixed, and of most a partner is not in this data; save a store"
                        " for this part of it (with the same DATA.SUBSET and"
                        " DATA.HELD_OUT), or without mixing"
                    )
                missing += ")"
            fitting = units // self.world_size * self.world_size * self.unit
            way_out = "use fewer processes"
            if fitting:
                way_out = f"set TRAIN.GLOBAL_BATCH {fitting}, which wins over DATA.BATCH_SIZE"
            raise ValueError(
                f"epoch {epoch} has {units * self.unit} images{missing}, fewer than one global step"
                f" of {self.step_images}: {way_out}, or use more data"
            )
        return units // step_units * step_units


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """A batch sampler: lists of (epoch, position), so that loader workers need no shared state to
    know the epoch.

    The last batch is partial when the sampler's length is no multiple of `batch_size`: only where
    `step_images` is 1."""

    def __init__(self, sampler: EpochSampler, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch of {batch_size} images: it holds at least one")
        if batch_size % sampler.unit:
            raise ValueError(
                f"a batch of {batch_size} images splits a pair: use an even batch size when images"
                " are mixed in pairs"
            )
        self.sampler, self.batch_size = sampler, batch_size
        self.wanted: Wanted | None = None

    def set_epoch(self, epoch: int, start: int = 0, wanted: Wanted | None = None) -> None:
        """Choose the epoch, and skip the first `start` positions of this rank (`len` goes on
        counting their batches).

        Of the rest only those batches are dealt, composed as ever, for which `wanted(number,
        positions)` holds."""
        self.sampler.set_epoch(epoch, start)
        self.wanted = wanted

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.sampler.epoch, iter(self.sampler), self.wanted)

    def _batches(
        self, epoch: int, positions: Iterator[int], wanted: Wanted | None
    ) -> Iterator[list[tuple[int, int]]]:
        for number in count():
            batch = list(islice(positions, self.batch_size))
            if not batch:
                return
            if wanted is None or wanted(number, batch):
                yield [(epoch, position) for position in batch]
