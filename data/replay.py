"""The data set wrapper that replays: an image, the seed of its augmentation (drawn or stored), and
the teacher's record.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data.augment.decoder import AugmentDecoder
from data.augment.rng import sample_seed


class Sample(NamedTuple):
    """What a training step needs of one image (collated: of a batch, one tensor a field)."""

    image: torch.Tensor  # [3, H, W] float32, augmented and normalised, not yet mixed
    label: int  # -1 where there is none
    seed: int  # of the augmentation; neighbours' seeds together decide how they are mixed
    position: int  # the image's line in the store, or in the listing where there is no store
    # [K] int64, the teacher's classes, most probable first; K = 0 without a store
    indices: torch.Tensor
    probs: torch.Tensor  # [K] float32


class Images(Protocol):
    """Any map-style data set of (image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ReplayDataset(Dataset[Sample]):
    """Augmented images that come out the same for the same (epoch, position), with the teacher's
    record where a store is given.

    Index it with (epoch, position), as `EpochBatches` does, or with a position after `set_epoch`.
    Positions count the store's images (the data set's own without a store); `available` says which
    of them the data set holds."""

    def __init__(
        self,
        dataset: Images,
        decoder: AugmentDecoder,
        store=None,
        seed: int = 0,
        *,
        topk: int | None = None,
        local: np.ndarray | None = None,
    ) -> None:
        """`local` maps the store's positions to the data set's, -1 where it has none (None: they
        are equal); `topk` columns are read.
        """
        self.dataset, self.decoder, self.store, self.seed, self.local = (
            dataset,
            decoder,
            store,
            seed,
            local,
        )
        self.topk = 0 if store is None else topk or store.k
        if store is not None and self.topk > store.k:
            raise ValueError(
                f"store {store.root} holds top-{store.k}, {self.topk} are asked for: "
                f"set DISTILL.LOGITS_TOPK {store.k} or less"
            )
        if store is not None and local is None and len(store) != len(dataset):
            raise ValueError(
                f"store {store.root} was written for {len(store)} images, the data set has"
                f" {len(dataset)}: give the same data, or data.build.local_positions to map a part"
                " of it"
            )
        self._epoch = 0
        # the epoch whose records are mapped, and they
        self._opened: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.dataset) if self.store is None else len(self.store)

    @property
    def available(self) -> np.ndarray | None:
        """One bool for each position: whether the data set holds its image; None when it holds all."""
        return None if self.local is None else np.asarray(self.local) >= 0

    def keys_of(self, positions: Iterable[int]) -> list[str]:
        """The names of the images at some positions."""
        keys = self.dataset.get_keys()
        return [
            keys[position if self.local is None else int(self.local[position])]
            for position in positions
        ]

    def set_epoch(self, epoch: int) -> None:
        """The epoch of plain integer indices (in this process: loader workers that outlive an epoch
        need (epoch, position)).
        """
        self._epoch = epoch

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        epoch, position = index if isinstance(index, tuple) else (self._epoch, index)
        image, label = self.dataset[position if self.local is None else int(self.local[position])]
        if self.store is None:
            seed = sample_seed(self.seed, epoch, position)
            indices, probs = torch.empty(0, dtype=torch.int64), torch.empty(0)
        else:
            record = self.records(epoch)[position]
            seed = int(record["seed"])
            indices = torch.from_numpy(record["index"][: self.topk].astype(np.int64))
            probs = torch.from_numpy(record["prob"][: self.topk].astype(np.float32))
        return Sample(self.decoder.decode(image, seed), int(label), seed, position, indices, probs)

    def records(self, epoch: int) -> np.ndarray:
        """The store's records of an epoch, mapped once for each process and epoch."""
        if self._opened is None or self._opened[0] != epoch:
            self._opened = (epoch, self.store.open_epoch(epoch))
        return self._opened[1]

    def __getstate__(self) -> dict:
        # an open map does not travel to a worker, its path does
        return {**self.__dict__, "_opened": None}
