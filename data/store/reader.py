"""The logits store: for every epoch and image the seed of its augmentation and the teacher's top-K
probabilities.

A folder of `manifest.json` (what the store is), `keys.txt` (line i names the image of record i)
and, for each sealed epoch, `epoch_0000.npy` (N records) and `epoch_0000.json` (its seal, written
last). An epoch being written is a folder of parts.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.store.files import StoreError
from data.store.format import (
    FORMAT,
    SEAL_RECORDS,
    Records,
    again,
    data_path,
    decoded,
    epochs_text,
    identity_digest,
    impossible,
    num_blocks,
    ranges,
    record_dtype,
    seal_path,
)
from data.store.keys import Keys


class LogitsStoreReader:
    """A store to read: holds no more than its manifest, and pickles as its path."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        path = self.root / "manifest.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            way_out = "correct the path"
            if any(self.root.glob("logits_top*_epoch*")):
                way_out = "it has the original's layout: read it with UpstreamStoreReader"
            raise StoreError(
                f"{self.root} is no logits store: {path.name} can't be read ({error.strerror});"
                f" {way_out}"
            ) from error
        self.manifest: dict[str, Any] = decoded(data, str(path))
        self.identity_sha256 = identity_digest(data)  # which seals and parts name
        identity = self.manifest["identity"]
        self.k = int(identity["k"])
        self.num_classes = int(identity["num_classes"])
        self._num_images = int(identity["num_images"])
        self.dtype = record_dtype(self.k, self.num_classes)
        self._keys: Keys | None = None

    def __reduce__(self):
        return type(self), (self.root,)

    def __len__(self) -> int:
        """Number of images, which is that of an epoch's records."""
        return self._num_images

    @property
    def keys(self) -> Keys:
        """The names of the images, by position: a sequence of str over the mapped file.

        Before they are used their digest is compared with the manifest's.
        """
        if self._keys is None:
            path = self.root / "keys.txt"
            keys = Keys.read(path)
            if len(keys) != len(self) or keys.digest() != self.keys_digest:
                raise StoreError(
                    f"{path}: is not the file that the manifest names (its {len(keys):,} lines or"
                    " their sha256 differ): restore it"
                )
            self._keys = keys
        return self._keys

    @property
    def keys_digest(self) -> str:
        """The sha256 of keys.txt, as the manifest tells it."""
        return self.manifest["identity"]["keys_sha256"]

    def epochs(self) -> list[int]:
        """The sealed epochs."""
        return sealed_epochs(self.root)

    def open_epoch(self, epoch: int) -> np.memmap:
        """The records of a sealed epoch, mapped: `records[position]["seed" | "index" | "prob"]`."""
        path = data_path(self.root, epoch)
        self.check_seal(epoch)
        try:
            records = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # a damaged header makes numpy fail in many ways
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

    def open_records(self, epoch: int) -> Records:
        """The records of a sealed epoch by position, each read when it is asked for."""
        return Records(data_path(self.root, epoch), self.dtype, self.open_epoch(epoch).offset)

    def seal(self, epoch: int) -> dict[str, Any]:
        """The seal of an epoch: counts, checksums, and the teacher's accuracy under "teacher"."""
        path = seal_path(self.root, epoch)
        try:
            seal = json.loads(path.read_bytes())
            if not isinstance(seal["sha256"], list) or not isinstance(seal["teacher"], dict):
                raise TypeError("no checksums")
            seal["format"] = int(seal.get("format", 0))
            return seal
        except FileNotFoundError:
            sealed = ranges(self.epochs())
            raise StoreError(
                f"{self.root}: epoch {epoch} is not sealed (sealed: {sealed}): run save_logits.py"
                " until it is"
            ) from None
        except (
            ValueError,
            LookupError,
            TypeError,
            ArithmeticError,
            RecursionError,
            OSError,
        ) as error:
            raise StoreError(f"{path}: can't be understood ({error!r}): {again(epoch)}") from None

    def check_epochs(self, epochs: Iterable[int]) -> None:
        """Before a run's first batch: raise StoreError unless all these epochs can be read.

        They must be sealed, of the right size and of this store.
        """
        wanted = set(epochs)
        check_sealed(self.root, wanted)
        for epoch in sorted(wanted):
            self.open_epoch(epoch)

    def faults(self, epoch: int) -> Iterator[str]:
        """What is wrong with each block of an epoch, "" with one that holds the sealed bytes and
        records that a teacher can give.

        All of the file is read, and not mapped: one that is cut short meanwhile is a fault too.
        """
        offset = self.open_epoch(epoch).offset
        path = data_path(self.root, epoch)
        with open(path, "rb") as file:
            file.seek(offset)
            for number, digest in enumerate(self.seal(epoch)["sha256"]):
                low = number * SEAL_RECORDS
                data = file.read(SEAL_RECORDS * self.dtype.itemsize)
                if hashlib.sha256(data).hexdigest() != digest:
                    high = min(low + SEAL_RECORDS, len(self))
                    yield (
                        f"{path}: block {number} is damaged (records {low:,} to {high - 1:,}):"
                        f" {again(epoch)}"
                    )
                    continue
                records = np.frombuffer(data, self.dtype)
                fault = impossible(
                    records, self.num_classes, lambda row, low=low: self.keys[low + row]
                )
                yield fault and f"{path}: {fault}: {again(epoch)}"

    def check_seal(self, epoch: int) -> None:
        """Raise StoreError unless an epoch was sealed under this manifest."""
        seal = self.seal(epoch)
        path = seal_path(self.root, epoch)
        if seal["format"] > FORMAT:
            raise StoreError(
                f"{path}: has format {seal['format']}, this program knows format {FORMAT}: update"
                " the program"
            )
        if seal.get("identity_sha256") != self.identity_sha256:
            raise StoreError(
                f"{path}: the epoch was sealed under another manifest: restore manifest.json, or"
                f" {again(epoch)}"
            )
        if (seal.get("records"), seal.get("epoch")) != (len(self), epoch) or len(
            seal["sha256"]
        ) != num_blocks(len(self)):
            raise StoreError(
                f"{path}: seals {seal.get('records')} records of epoch {seal.get('epoch')}, the"
                f" manifest says {len(self):,}: {again(epoch)}"
            )


def sealed_epochs(root: Path) -> list[int]:
    """The epochs of a store's folder that are sealed."""
    found = (re.fullmatch(r"epoch_(\d{4,})\.json", name) for name in os.listdir(root))
    numbers = sorted(int(match[1]) for match in found if match)
    places = (data_path, seal_path)  # opening a FIFO there would wait for ever
    return [e for e in numbers if all(place(root, e).is_file() for place in places)]


def check_sealed(root: Path, wanted: Iterable[int]) -> None:
    """Raise StoreError unless all these epochs of a store's folder are sealed."""
    sealed = set(sealed_epochs(root))
    missing = set(wanted) - sealed
    if missing:
        raise StoreError(
            f"{root}: {epochs_text(missing, are=True)} missing (sealed: {ranges(sealed)}): save"
            " with save_logits.py, set DISTILL.REUSE_EPOCHS True, or train fewer epochs"
        )
