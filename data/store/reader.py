"""The logits store: for every epoch and image the seed of its augmentation and the teacher's top-K
probabilities.

A folder of `manifest.json` (what the store is), `keys.txt` (line i names the image of record i)
and, for each sealed epoch, `epoch_0000.npy` (N records) and `epoch_0000.json` (its seal, written
last). An epoch being written is a folder of parts."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.store.files import LockedError, StoreError, check_token, remove_token, write_token
from data.store.format import (
    FORMAT,
    SEAL_RECORDS,
    again,
    block_digests,
    data_path,
    decoded,
    disk_need,
    epoch_bytes,
    identity_digest,
    pack_records,
    ranges,
    record_dtype,
    seal_path,
)
from data.store.keys import Keys, map_positions
from data.store.parts import AsyncAppender
from data.store.writer import LogitsStoreWriter

__all__ = [
    "AsyncAppender",
    "LockedError",
    "LogitsStoreReader",
    "LogitsStoreWriter",
    "StoreError",
    "check_token",
    "disk_need",
    "epoch_bytes",
    "map_positions",
    "pack_records",
    "record_dtype",
    "remove_token",
    "store_epoch",
    "write_token",
]


def store_epoch(epoch: int, num_epochs: int) -> int:
    """The sealed epoch that serves `epoch` of a longer run, in seeds, records, pairs and order
    (DISTILL.REUSE_EPOCHS).
    """
    if num_epochs < 1:
        raise StoreError("the store has no sealed epoch: run save_logits.py first")
    return epoch % num_epochs


class LogitsStoreReader:
    """A store to read: holds no more than its manifest, and pickles as its path.

    `stage` is a folder with copies of some epochs, which are preferred; an EpochStager keeps it.
    """

    def __init__(self, root: Path | str, stage: Path | str | None = None) -> None:
        self.root, self.stage = Path(root), Path(stage) if stage else None
        path = self.root / "manifest.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            original = any(self.root.glob("logits_top*_epoch*"))
            way_out = (
                "it has the original's layout: read it with UpstreamStoreReader"
                if original
                else "correct the path"
            )
            raise StoreError(
                f"{self.root} is no logits store: {path.name} can't be read ({error.strerror});"
                f" {way_out}"
            ) from error
        self.manifest: dict[str, Any] = decoded(data, str(path))
        identity = self.manifest["identity"]
        self.k, self.num_classes, self._num_images = (
            int(identity["k"]),
            int(identity["num_classes"]),
            int(identity["num_images"]),
        )
        self.dtype = record_dtype(self.k, self.num_classes)
        self._keys: Keys | None = None

    def __reduce__(self):
        return type(self), (self.root, self.stage)

    def __len__(self) -> int:
        """Number of images, which is that of an epoch's records."""
        return self._num_images

    @property
    def keys(self) -> Keys:
        """The names of the images, by position: a sequence of str over the mapped file."""
        if self._keys is None:
            keys = Keys.read(self.root / "keys.txt")
            if len(keys) != len(self):
                raise StoreError(
                    f"{self.root / 'keys.txt'}: has {len(keys):,} lines, the manifest says"
                    f" {len(self):,}: restore the file"
                )
            self._keys = keys
        return self._keys

    @property
    def keys_blob(self) -> np.ndarray:
        """The bytes of keys.txt, mapped."""
        return self.keys.blob

    @property
    def keys_digest(self) -> str:
        """The sha256 of keys.txt, as the manifest tells it."""
        return self.manifest["identity"]["keys_sha256"]

    def epochs(self) -> list[int]:
        """The sealed epochs."""
        found = (re.fullmatch(r"epoch_(\d{4,})\.json", name) for name in os.listdir(self.root))
        return sorted(
            int(match[1])
            for match in found
            if match and data_path(self.root, int(match[1])).exists()
        )

    def open_epoch(self, epoch: int) -> np.memmap:
        """The records of a sealed epoch, mapped: `records[position]["seed" | "index" | "prob"]`."""
        root = self.stage if self.stage and seal_path(self.stage, epoch).exists() else self.root
        path = data_path(root, epoch)
        self._check_seal(epoch, self.seal(epoch))
        try:
            records = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: truncated or damaged ({error}): {again(epoch)}") from error
        if records.dtype != self.dtype:
            raise StoreError(
                f"{path}: its records are {records.dtype}, the manifest's top-{self.k} are"
                f" {self.dtype}: it belongs to another store; move it there, or restore the"
                " manifest"
            )
        size = path.stat().st_size
        if records.shape != (len(self),) or size != records.offset + records.nbytes:
            raise StoreError(
                f"{path}: holds {records.shape} records in {size:,} bytes, expected {len(self):,}"
                f" in {records.offset + len(self) * self.dtype.itemsize:,}: truncated or of another"
                f" data set; {again(epoch)}"
            )
        return records

    def seal(self, epoch: int) -> dict[str, Any]:
        """The seal of an epoch: counts, checksums, and the teacher's accuracy under "teacher"."""
        path = seal_path(self.root, epoch)
        try:
            seal = json.loads(path.read_bytes())
            if not isinstance(seal["sha256"], list):
                raise KeyError("sha256")
            return seal
        except FileNotFoundError:
            sealed = ranges(self.epochs())
            raise StoreError(
                f"{self.root}: epoch {epoch} is not sealed (sealed: {sealed}): run save_logits.py"
                " until it is"
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StoreError(f"{path}: can't be understood ({error!r}): {again(epoch)}") from None

    def check_epochs(self, epochs: Iterable[int]) -> None:
        """Before a run's first batch: raise StoreError unless all these epochs are sealed, of the
        right size and of this store.
        """
        wanted, sealed = set(epochs), set(self.epochs())
        if wanted - sealed:
            raise StoreError(
                f"{self.root}: epochs {ranges(wanted - sealed)} are missing (sealed:"
                f" {ranges(sealed)}): save them with save_logits.py, set DISTILL.REUSE_EPOCHS True,"
                " or train fewer epochs"
            )
        for epoch in sorted(wanted):
            self.open_epoch(epoch)

    def check_keys(self) -> None:
        """Raise StoreError unless keys.txt is the file that the manifest names."""
        if self.keys.digest() != self.keys_digest:
            raise StoreError(
                f"{self.root / 'keys.txt'}: is not the file that the manifest names (its sha256"
                " differs): restore it"
            )

    def damaged_blocks(
        self, epoch: int, progress: Callable[[int], None] = lambda size: None
    ) -> Iterator[str]:
        """One line for each block of an epoch whose bytes are not the sealed ones; `progress` is
        told the bytes read.
        """
        records, digests = self.open_epoch(epoch), self.seal(epoch)["sha256"]
        for number, digest in enumerate(block_digests(records)):
            low, high = number * SEAL_RECORDS, min((number + 1) * SEAL_RECORDS, len(records))
            if digest != digests[number]:
                yield (
                    f"{records.filename}: block {number} is damaged (records {low:,} to"
                    f" {high - 1:,}): {again(epoch)}"
                )
            progress((high - low) * self.dtype.itemsize)

    def _check_seal(self, epoch: int, seal: Mapping[str, Any]) -> None:
        path = seal_path(self.root, epoch)
        if seal.get("format", 0) > FORMAT:
            raise StoreError(
                f"{path}: has format {seal['format']}, this program knows format {FORMAT}: update"
                " the program"
            )
        if seal.get("identity_sha256") != identity_digest(self.manifest):
            raise StoreError(
                f"{path}: the epoch was sealed under another manifest: restore manifest.json, or"
                f" {again(epoch)}"
            )
        if seal.get("records") != len(self) or len(seal["sha256"]) != -(-len(self) // SEAL_RECORDS):
            raise StoreError(
                f"{path}: seals {seal.get('records')} records, the manifest says {len(self):,}:"
                f" {again(epoch)}"
            )
