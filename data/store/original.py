"""Reading the original's layout: `logits_top{K}_epoch{E}/rank{R}-keys.txt` and
`rank{R}-values.bin`.

A record of a values file is an int32 seed, K int16 indices and K float16 values: the same bytes as
ours. A key is an image's name, or its position in the data set as decimal text. An index from
position to row, over all ranks one behind the other, is built once for each epoch with numpy and
kept in a cache folder; so loader processes parse nothing. A key that stands more than once counts
where it stands first in rank order: so files that an earlier run with more ranks left behind are
never read for what the later run wrote too.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.store.files import StoreError
from data.store.format import SEAL_RECORDS, Records, epochs_text, impossible, ranges, record_dtype
from data.store.keys import Keys, default_cache, load_array, locate, save_array

MOST_CLASSES = 1 << 15  # int16 can't name more
MOST_DIGITS = 18  # of a position, which then fits int64
PROBED_RECORDS = 1000  # of each rank, for classes that can't be


class UpstreamEpoch:
    """The records of one epoch by position of the image, as LogitsStoreReader's.

    So `epoch[5]`, `epoch[[3, 1]]` and `epoch[10:20]`.
    """

    def __init__(
        self, folder: Path, rows: np.ndarray, values: list[np.ndarray], keys: Sequence[str] | None
    ) -> None:
        self.folder = folder
        self.dtype = values[0].dtype
        self._rows = rows  # int64 [N]: over all ranks, one behind the other; -1 for none
        self._values = values  # of each rank
        self._files = [Records(_values_path(folder, i), self.dtype) for i in range(len(values))]
        self._keys = keys
        # row of each rank's first record
        self._starts = np.cumsum([0] + [len(value) for value in values])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(
        self, positions: int | slice | Sequence[int] | np.ndarray
    ) -> np.ndarray | np.void:
        rows = np.asarray(self._rows[positions])
        if (rows < 0).any():
            position = np.arange(len(self))[positions].reshape(-1)[rows.reshape(-1) < 0][0]
            raise StoreError(
                f"{self.folder}: has no record of {_named(position, self._keys)}: give the data set"
                " it was saved from"
            )
        ranks = np.searchsorted(self._starts, rows, "right") - 1
        if rows.ndim == 0:
            return self._files[ranks][int(rows - self._starts[ranks])]
        records = np.empty(rows.shape, self.dtype)
        for rank in np.unique(ranks):
            mine = ranks == rank
            records[mine] = self._values[rank][rows[mine] - self._starts[rank]]
        return records


class UpstreamStoreReader:
    """The reading surface of LogitsStoreReader over the original's layout.

    `keys` are those of the whole data set, in the order of its folders; `order` says what a
    position in the store counts: the images in that order ("folder") or in timm's natural order of
    a tar's members ("tar"). Pickles without the keys: `check_epochs` builds the indices that other
    processes then find.
    """

    def __init__(
        self,
        root: Path | str,
        keys: Keys | Sequence[str],
        k: int | None = None,
        *,
        num_classes: int = MOST_CLASSES,
        order: str = "folder",
        cache: Path | str | None = None,
    ) -> None:
        if order not in ("folder", "tar"):
            raise StoreError(f"DISTILL.UPSTREAM_ORDER {order!r}: choose folder or tar")
        if num_classes > MOST_CLASSES:
            raise StoreError(
                f"{root}: the original's layout names {MOST_CLASSES:,} classes at most, not"
                f" {num_classes:,}: correct MODEL.NUM_CLASSES"
            )
        self.root = Path(root)
        self.num_classes = num_classes
        self.order = order
        self.cache = Path(cache) if cache else None
        self.k = k or self._only_k()
        self.dtype = record_dtype(self.k, num_classes)
        self._keys: Keys | None = Keys.of(keys)
        self._num_images = len(self._keys)
        self.keys_digest = self._keys.digest()
        identity = {
            "k": self.k,
            "num_classes": num_classes,
            "num_images": len(self),
            "keys_sha256": self.keys_digest,
            "shuffle_seed": 0,
        }
        self.manifest: dict[str, Any] = {
            "format": 0,
            "identity": identity,
            "teacher": {},
            "proof": {},
            "info": {},
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None}

    def __len__(self) -> int:
        return self._num_images

    @property
    def keys(self) -> Keys:
        """The names of the images, by position."""
        if self._keys is None:
            raise StoreError(
                f"{self.root}: its index is not in place: call check_epochs before the reader goes"
                " to other processes"
            )
        return self._keys

    def epochs(self) -> list[int]:
        """The epochs that are there."""
        found = (
            re.fullmatch(rf"logits_top{self.k}_epoch(\d+)", path.name)
            for path in self.root.glob(f"logits_top{self.k}_epoch*")
        )
        return sorted(int(match[1]) for match in found if match)

    def open_epoch(self, epoch: int) -> UpstreamEpoch:
        """The records of an epoch, mapped, and by position."""
        folder = self._folder(epoch)
        values = self._values(folder)
        return UpstreamEpoch(folder, self._rows(folder, values), values, self._keys)

    open_records = open_epoch

    def check_epochs(self, epochs: Iterable[int]) -> None:
        """Before a run's first batch: raise StoreError unless all these epochs can be read.

        They must be there and hold every image. Builds their indices.
        """
        wanted = set(epochs)
        found = set(self.epochs())
        if wanted - found:
            raise StoreError(
                f"{self.root}: {epochs_text(wanted - found, are=True)} missing with top-{self.k}"
                f" (there: {ranges(found)}): copy them there, set DISTILL.REUSE_EPOCHS True, or"
                " train fewer epochs"
            )
        for epoch in sorted(wanted):
            records = self.open_epoch(epoch)
            self._check_classes(records)
            lacking = np.flatnonzero(np.asarray(records._rows) < 0)
            if len(lacking):
                raise StoreError(
                    f"{records.folder}: has no record of {len(lacking):,} of {len(self):,} images,"
                    f" the first being {_named(lacking[0], self._keys)}: give the data set it was"
                    " saved from"
                )

    def faults(self, epoch: int) -> Iterator[str]:
        """As LogitsStoreReader's; but there are no checksums, so that only records which no teacher
        can give are found.
        """
        folder = self._folder(epoch)
        for rank, values in enumerate(self._values(folder)):
            path, keys = _values_path(folder, rank), Keys.read(_keys_path(folder, rank))
            for low in range(0, len(values), SEAL_RECORDS):
                offset = low * self.dtype.itemsize
                records = np.fromfile(path, self.dtype, SEAL_RECORDS, offset=offset)
                fault = impossible(
                    records, self.num_classes, lambda row, low=low, keys=keys: keys[low + row]
                )
                yield fault and f"{path}: {fault}: copy the file again"

    def _check_classes(self, records: UpstreamEpoch) -> None:
        for rank, values in enumerate(records._values):
            probed = values[:: max(1, len(values) // PROBED_RECORDS)]["index"]
            if probed.size and probed.max() >= self.num_classes:
                raise StoreError(
                    f"{_values_path(records.folder, rank)}: names class {probed.max():,} of"
                    f" {self.num_classes:,}: correct MODEL.NUM_CLASSES, or copy the file again if"
                    " it is damaged"
                )

    def redundant_ranks(self, epoch: int) -> list[int]:
        """Ranks whose every key also stands in a lower rank's file.

        An earlier run with more ranks has left them behind, most likely.
        """
        folder = self._folder(epoch)
        lists = [Keys.read(_keys_path(folder, rank)) for rank in self._ranks(folder)]
        merged = _joined(lists)
        first = locate(merged, merged)
        starts = np.cumsum([0] + [len(keys) for keys in lists])
        return [
            rank
            for rank, (low, high) in enumerate(pairwise(starts))
            if high > low and (first[low:high] < low).all()
        ]

    def _only_k(self) -> int:
        matches = (
            re.fullmatch(r"logits_top(\d+)_epoch\d+", path.name)
            for path in self.root.glob("logits_top*_epoch*")
        )
        found = sorted({int(match[1]) for match in matches if match})
        if not found:
            raise StoreError(f"{self.root}: holds no folders logits_top*_epoch*: correct the path")
        if len(found) > 1:
            raise StoreError(
                f"{self.root}: holds stores of top-{', top-'.join(map(str, found))}: set"
                " DISTILL.LOGITS_TOPK to one of them"
            )
        return found[0]

    def _folder(self, epoch: int) -> Path:
        folder = self.root / f"logits_top{self.k}_epoch{epoch}"
        if not folder.is_dir():
            raise StoreError(
                f"{folder}: is missing (epochs with top-{self.k}: {ranges(self.epochs())}): copy it"
                " there"
            )
        return folder

    def _ranks(self, folder: Path) -> list[int]:
        ranks = sorted(
            int(match[1])
            for path in folder.iterdir()
            if (match := re.fullmatch(r"rank(\d+)-values\.bin", path.name))
        )
        if ranks != list(range(len(ranks))) or not ranks:
            raise StoreError(
                f"{folder}: holds values of ranks {ranges(ranks)}, expected 0 up without a gap:"
                " copy the rest"
            )
        return ranks

    def _values(self, folder: Path) -> list[np.ndarray]:
        values: list[np.ndarray] = []
        for rank in self._ranks(folder):
            path = _values_path(folder, rank)
            size = path.stat().st_size
            if size % self.dtype.itemsize:
                raise StoreError(
                    f"{path}: {size:,} bytes are no whole number of top-{self.k} records of"
                    f" {self.dtype.itemsize} bytes: truncated, or of another K; copy it again"
                )
            values.append(np.memmap(path, self.dtype, "r") if size else np.empty(0, self.dtype))
        return values

    def _rows(self, folder: Path, values: list[np.ndarray]) -> np.ndarray:
        """Row of each image, int64 [N], -1 where there is none: from the cache, or built."""
        path = (self.cache or default_cache()) / f"index-{self._fingerprint(folder)}.npy"
        if (kept := load_array(path)) is not None:
            return kept
        rows = self._built_rows(folder, values)
        try:
            save_array(path, rows)
            return np.load(path, mmap_mode="r")
        except OSError:
            return rows

    def _fingerprint(self, folder: Path) -> str:
        """Changes with the listing, the order and the files of an epoch."""
        files = [
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(folder.glob("rank*"))
        ]
        found = repr((self.keys_digest, self.order, str(folder.resolve()), files))
        return hashlib.sha256(found.encode()).hexdigest()[:32]

    def _built_rows(self, folder: Path, values: list[np.ndarray]) -> np.ndarray:
        lists = []
        for rank, records in enumerate(values):
            path = _keys_path(folder, rank)
            lists.append(Keys.read(path))
            if len(lists[-1]) != len(records):
                raise StoreError(
                    f"{_values_path(folder, rank)}: holds {len(records):,} records of top-{self.k},"
                    f" {path.name} has {len(lists[-1]):,} keys: one of them is truncated, or K is"
                    " another; copy both again"
                )
        stored = _joined(lists)
        numbers = _decimals(stored)
        has_names = (numbers < 0).any() or (_decimals(self.keys) >= 0).any()
        rows = locate(stored, self.keys) if has_names else np.full(len(self), -1)
        if (numbers >= 0).any() and (rows < 0).any():
            if numbers.max() >= len(self):
                raise StoreError(
                    f"{folder}: counts positions up to {numbers.max():,}, the data set has"
                    f" {len(self):,} images: positions are those of the whole data set; leave"
                    " DATA.SUBSET and DATA.EXCLUDE out, or convert the store (python -m"
                    " tools.logits)"
                )
            by_number = np.full(len(self), -1, np.int64)
            # in reverse, so that the first of several stays
            with_number = np.flatnonzero(numbers >= 0)[::-1]
            by_number[numbers[with_number]] = with_number
            if self.order == "tar":
                by_number[natural_order(self.keys)] = by_number.copy()
            rows = np.where(rows < 0, by_number, rows)
        return rows


def natural_order(keys: Sequence[str]) -> np.ndarray:
    """Positions of the keys sorted as timm sorts a tar's members.

    That is case folded, runs of digits by value ('_1009' before '_10026').
    """
    parts = [
        [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key.lower())]
        for key in keys
    ]
    return np.array(sorted(range(len(parts)), key=parts.__getitem__), np.int64)


def _decimals(keys: Keys) -> np.ndarray:
    """The number that each key spells in decimal digits: int64, -1 for other texts."""
    numbers = np.full(len(keys), -1, np.int64)
    lengths = keys.lengths()
    for length in range(1, MOST_DIGITS + 1):
        rows = np.flatnonzero(lengths == length)
        texts = keys.lines(rows, length).astype(f"S{length}")  # without the newline
        is_number = np.char.isdigit(texts)
        numbers[rows[is_number]] = texts[is_number].astype(np.int64)
    return numbers


def _joined(lists: list[Keys]) -> Keys:
    return Keys(np.concatenate([keys.blob for keys in lists]))


def _keys_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}-keys.txt"


def _values_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}-values.bin"


def _named(position: int, keys: Sequence[str] | None) -> str:
    return f"position {position}" + (f" ({keys[position]!r})" if keys is not None else "")
