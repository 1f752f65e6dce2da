"""The data set wrapper that replays: an image, the seed of its augmentation (drawn or stored), and
the teacher's record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from data.augment import AugmentDecoder
from data.augment.device import PackedBatch, apply_batch
from data.augment.pairs import numbers_of
from data.augment.rng import sample_seed


class Batch(NamedTuple):
    """What a step needs of one image; collated, of a batch: one tensor [B, ...] a field."""

    image: (
        torch.Tensor
    )  # [3, H, W] float32, augmented and normalised, not yet mixed (see `collate`)
    label: int  # -1 where there is none
    seed: int  # of the augmentation; neighbours' seeds together decide how they are mixed
    position: int  # the image's line in the store, or in the listing where there is no store
    indices: torch.Tensor  # [K] int64, the teacher's classes, most probable first; K = 0: no store
    probs: torch.Tensor  # [K] float32
    # [B / 2, n] of a batch that `collate` made for mixing, else empty: how its pairs are mixed
    mixes: torch.Tensor = torch.empty(0)


SENT = ("label", "indices", "probs", "mixes")  # beside the image; the rest stays on the CPU


class Images(Protocol):
    """Any map-style data set of (image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ReplayDataset(Dataset[Batch]):
    """Images augmented as their seeds say, drawn or stored, with the teacher's stored record.

    Index it with (epoch, position), as `EpochBatches` does, or with a position after `set_epoch`.
    Positions count the store's images (the data set's own without a store); `available` says which
    of them the data set holds.
    """

    def __init__(
        self,
        dataset: Images,
        decoder: AugmentDecoder,
        store=None,
        seed: int = 0,
        *,
        topk: int = 0,
        index_of: np.ndarray | None = None,
        executor: str = "pillow",
    ) -> None:
        """`topk` of the store's columns are read (0: all). `index_of` is the data set's index of
        the image at each position of the store, -1 where it has none; None: they are equal.

        With `executor` "bytes" or "device" images stay undecoded: `collate` packs them, as Pillow
        augments them or with their plans, and `on_device` makes the same tensors of them.
        """
        self.dataset = dataset
        self.decoder = decoder
        self.store = store
        self.seed = seed  # of the whole run; with a store each record has its image's own
        self.index_of = index_of
        self.executor = executor
        self.topk = 0 if store is None else topk or store.k
        self._epoch = 0
        self._opened: tuple[int, np.ndarray] | None = None  # the epoch that is open, its records
        if store is None:
            return
        if self.topk > store.k:
            raise ValueError(
                f"store {store.root} holds top-{store.k}, {topk} are asked for: set"
                f" DISTILL.LOGITS_TOPK {store.k} or less"
            )
        if index_of is None and len(store) != len(dataset):
            raise ValueError(
                f"store {store.root} was written for {len(store)} images, the data set has"
                f" {len(dataset)}: give the same data, or map a part of it with"
                " data.store.keys.map_positions"
            )

    def __len__(self) -> int:
        return len(self.dataset) if self.store is None else len(self.store)

    @property
    def available(self) -> np.ndarray | None:
        """Whether the data set holds the image of each position, bool [N]; None: it holds all."""
        return None if self.index_of is None else np.asarray(self.index_of) >= 0

    def index(self, position: int) -> int:
        """The data set's index of the image at a position."""
        return position if self.index_of is None else int(self.index_of[position])

    def keys_of(self, positions: Iterable[int]) -> list[str]:
        """The names of the images at some positions."""
        keys = self.dataset.get_keys()
        return [keys[self.index(position)] for position in positions]

    def set_epoch(self, epoch: int) -> None:
        """The epoch of plain integer indices, in this process alone: workers that outlive an epoch
        need (epoch, position).
        """
        self._epoch = epoch

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        epoch, position = index if isinstance(index, tuple) else (self._epoch, index)
        image, label = self.dataset[self.index(position)]
        if self.store is None:
            seed = sample_seed(self.seed, epoch, position)
            indices, probs = torch.empty(0, dtype=torch.int64), torch.empty(0)
        else:
            record = self._records(epoch)[position]
            seed = int(record["seed"])
            indices = torch.from_numpy(record["index"][: self.topk].astype(np.int64))
            probs = torch.from_numpy(record["prob"][: self.topk].astype(np.float32))
        if self.executor == "pillow":
            image = self.decoder.decode(image, seed)
        return Batch(image, int(label), seed, position, indices, probs)

    def collate(self, samples: list[Batch]) -> Batch:
        """A batch of samples: the `collate_fn` of a loader."""
        is_packed = self.executor != "pillow"
        images, seeds = [sample.image for sample in samples], [sample.seed for sample in samples]
        if is_packed:
            samples = [sample._replace(image=0) for sample in samples]
        batch = default_collate(samples)
        if self.decoder.mix and len(seeds) % 2 == 0:
            size = (self.decoder.size,) * 2
            mixes = numbers_of(self.decoder.mix.draw(seeds, *size), *size)
            batch = batch._replace(mixes=mixes)
        if is_packed:
            others = {name: getattr(batch, name) for name in SENT}
            by_pillow = self.executor == "bytes"
            packed = self.decoder.pack(images, seeds, by_pillow=by_pillow, others=others)
            batch = batch._replace(image=packed)
        return batch

    def _records(self, epoch: int) -> np.ndarray:
        """The store's records of an epoch, opened once for each process and epoch."""
        if self._opened is None or self._opened[0] != epoch:
            self._opened = (epoch, self.store.open_records(epoch))
        return self._opened[1]

    def __getstate__(self) -> dict:
        # An open file does not travel to a worker, its path does.
        return {**self.__dict__, "_opened": None}


def on_device(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The batches with images, labels, records and mixes on a device, packed images executed there.

    On CUDA the next batch is sent and executed on a stream of its own while one is used.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield _sent(batch, device)
        return
    stream = torch.cuda.Stream(device)
    ahead: list[tuple[Batch, Any]] = []
    for batch in batches:
        with torch.cuda.stream(stream):
            ahead.append((_sent(batch, device), stream.record_event()))
        if len(ahead) > 1:
            yield _arrived(*ahead.pop(0), device)
    for batch, event in ahead:
        yield _arrived(batch, event, device)


def _sent(batch: Batch, device: torch.device) -> Batch:
    image = batch.image.to(device, non_blocking=True)
    if isinstance(image, PackedBatch):
        sent = {name: image[place] for name, place in image.others.items()}
        return batch._replace(image=apply_batch(image), **sent)
    sent = {name: getattr(batch, name).to(device, non_blocking=True) for name in SENT}
    return batch._replace(image=image, **sent)


def _arrived(batch: Batch, event, device: torch.device) -> Batch:
    """A batch that was made on another stream, for use on the current one."""
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for tensor in (batch.image, *(getattr(batch, name) for name in SENT)):
        tensor.record_stream(current)  # else its memory may be given away while it is still used
    return batch
