"""Writing a store: parts that survive a crash, and their sealing into one file an epoch."""

import json
import os
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from data.store.files import FileLock, LockedError, StoreError, write_atomic, write_error
from data.store.format import (
    FORMAT,
    SEAL_RECORDS,
    again,
    block_digests,
    check_same,
    data_path,
    decoded,
    disk_need,
    encoded,
    identity_digest,
    lock_path,
    normalised,
    parts_path,
    raw_bytes,
    record_dtype,
    seal_path,
    size_text,
)
from data.store.keys import Keys, check_unique, compare_listings
from data.store.parts import Block, PartWriter, part_files, read_blocks

ASSEMBLE_BYTES = 1 << 30  # memory for sealing; larger epochs take several passes over their parts
TICK_SECONDS = 10.0


class LogitsStoreWriter:
    """Writes epochs of a store, resumes what a crash left, and seals.

    Each process of a job has its own writer. For an epoch: rank 0 calls `begin_epoch` first (it
    takes the epoch's lock), then the others; all `append` and `end_epoch`; then rank 0 seals. `job`
    is a text that all processes of a job share (rank 0's, broadcast). `keys` name the images by
    position."""

    def __init__(
        self,
        root: Path | str,
        manifest: Mapping[str, Any],
        keys: Sequence[str],
        *,
        job: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root, self.job, self._clock = Path(root), job, clock
        self.manifest = _completed(manifest, names := Keys.of(keys))
        identity = self.manifest["identity"]
        self.k, self.num_classes, self._num_images = (
            int(identity["k"]),
            int(identity["num_classes"]),
            int(identity["num_images"]),
        )
        self.dtype = record_dtype(self.k, self.num_classes)
        self._part: PartWriter | None = None
        self._epoch = -1
        self._locks: dict[int, FileLock] = {}
        self._sealing: list[Future] = []
        self._sealing_lock = threading.Lock()  # the appending thread looks at it too
        self._executor: ThreadPoolExecutor | None = None
        self._stop: threading.Event | None = None
        self._settle(names)
        self._identity = bytes.fromhex(identity_digest(self.manifest))

    def __len__(self) -> int:
        return self._num_images

    def is_sealed(self, epoch: int) -> bool:
        """Whether the epoch is finished."""
        return seal_path(self.root, epoch).exists() and data_path(self.root, epoch).exists()

    def missing(self, epoch: int) -> np.ndarray:
        """The positions that no whole block of the epoch's parts holds, ascending; none for a
        sealed epoch.
        """
        if self.is_sealed(epoch):
            self._clean_up(epoch)  # a crash may have come between seal and clean-up
            return np.empty(0, np.int64)
        is_missing = np.ones(len(self), bool)
        for block in self._blocks(epoch):
            is_missing[block.positions] = False
        return np.flatnonzero(is_missing)

    def check_disk(self, epochs: Iterable[int]) -> None:
        """Raise StoreError unless there is room to write those of the epochs that are not sealed
        yet.
        """
        unsealed = [epoch for epoch in epochs if not self.is_sealed(epoch)]
        written = sum(
            path.stat().st_size
            for epoch in unsealed
            for path in part_files(parts_path(self.root, epoch))
        )
        need = disk_need(len(self), self.k, self.num_classes, len(unsealed)) - written
        free = shutil.disk_usage(self.root).free
        if unsealed and need > free:
            raise StoreError(
                f"{self.root}: writing {len(unsealed)} epochs of {len(self):,} images with"
                f" top-{self.k} needs {size_text(need)}, {size_text(free)} are free: free some"
                " space, choose another folder, a smaller DISTILL.LOGITS_TOPK or fewer epochs"
            )

    def begin_epoch(self, epoch: int, rank: int = 0) -> None:
        """Start (or go on with) writing an epoch: rank 0 takes its lock and looks at the disk,
        everyone opens a part.
        """
        self._raise_background()
        self.end_epoch()
        if self.is_sealed(epoch):
            raise StoreError(
                f"{data_path(self.root, epoch)}: epoch {epoch} is sealed already: nothing is left"
                f" to write, or {again(epoch)}"
            )
        if rank == 0:
            self._take_lock(epoch)
            if not self._sealing:  # else the space of its parts is about to be free again
                self.check_disk([epoch])
        elif self.job is not None:
            lock = FileLock(lock_path(self.root, epoch), self.job)
            if not lock.is_held():
                raise LockedError(
                    f"{lock.path}: epoch {epoch} is not this job's: rank 0 begins it first, or"
                    " another job is at work on it"
                )
        part = PartWriter(
            parts_path(self.root, epoch), epoch, rank, self.dtype, self._identity, self._clock
        )
        self._part, self._epoch = part, epoch
        self._start_ticking()

    def append(self, positions: np.ndarray, records: np.ndarray) -> None:
        """Write the records of one batch as one block."""
        self._raise_background()
        assert self._part is not None, "begin_epoch comes first"
        positions, records = np.asarray(positions), np.ascontiguousarray(records)
        if (
            records.dtype != self.dtype
            or records.shape != positions.shape
            or positions.ndim != 1
            or positions.dtype.kind not in "iu"
        ):
            raise StoreError(
                f"{self.root}: got records {records.dtype}{list(records.shape)} for positions"
                f" {positions.dtype}{list(positions.shape)}, expected [n] of {self.dtype} and [n]"
                " whole numbers: use pack_records"
            )
        if not len(records):
            return
        if positions.min() < 0 or positions.max() >= len(self):
            raise StoreError(
                f"{self.root}: positions {positions.min()} to {positions.max()} are not all among"
                f" its {len(self):,} images: write them to a store with their keys"
            )
        is_bad = (
            ~np.isfinite(records["prob"]).all(axis=1)
            | (records["index"] >= self.num_classes).any(axis=1)
            | (records["seed"] < 0)
        )
        if is_bad.any():
            raise StoreError(
                f"{self.root}: the record of position {positions[is_bad.argmax()]} has a"
                f" probability that is no number, a class from {self.num_classes:,} up, or a"
                " negative seed: check the teacher's weights, or run it in float32 (AMP_ENABLE"
                " False)"
            )
        self._part.append(positions, records)

    def end_epoch(self) -> None:
        """Close this process's part of the epoch; all ranks do before rank 0 seals."""
        part, self._part, self._epoch = self._part, None, -1
        if part is not None:
            part.close()

    def seal(self, epoch: int, teacher: Mapping[str, Any] | None = None) -> None:
        """Turn the parts of a complete epoch into its sealed file; `teacher` (e.g. its accuracy) is
        kept in the seal.
        """
        if self._epoch == epoch:
            self.end_epoch()
        if not self.is_sealed(epoch):
            self._take_lock(epoch)
            try:
                self._write_sealed(epoch, dict(teacher or {}))
            except OSError as error:
                raise write_error(data_path(self.root, epoch), error) from error
        self._clean_up(epoch)

    def seal_in_background(self, epoch: int, teacher: Mapping[str, Any] | None = None) -> Future:
        """Seal while the next epoch runs; an error surfaces at the next call of this writer, at the
        latest at `close`.
        """
        self._raise_background()
        if self._epoch == epoch:
            self.end_epoch()
        self._executor = self._executor or ThreadPoolExecutor(1, "store-seal")
        future = self._executor.submit(self.seal, epoch, teacher)
        self._sealing.append(future)
        return future

    def tick(self) -> None:
        """What a thread does every TICK_SECONDS: syncs the part, and shows other machines that the
        locks' holder lives.
        """
        if (part := self._part) is not None:
            part.tick()
        for lock in list(self._locks.values()):
            try:
                lock.touch()
            except OSError:
                pass  # the next append tells

    def close(self) -> None:
        """Wait for sealing, close the part and give the locks back; an unfinished epoch can be
        resumed.
        """
        try:
            self.end_epoch()
            for future in list(self._sealing):
                wait([future])
                self._raise_background()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None
            if self._stop is not None:
                self._stop.set()
                self._stop = None
            for epoch in list(self._locks):
                self._release(epoch)

    def __enter__(self) -> "LogitsStoreWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # else the error under way matters more
                raise

    def _settle(self, keys: Keys) -> None:
        """Make the folder this store's, or check that it is."""
        path = self.root / "manifest.json"
        try:
            if not path.exists():
                check_unique(keys)
                self.root.mkdir(parents=True, exist_ok=True)
                write_atomic(self.root / "keys.txt", raw_bytes(keys.blob))
                write_atomic(path, encoded(self.manifest))
            stored = decoded(path.read_bytes(), str(path))
        except OSError as error:
            raise write_error(path, error) from error
        mine, theirs = self.manifest["identity"], stored["identity"]
        if mine["keys_sha256"] != theirs["keys_sha256"]:
            difference = compare_listings(Keys.read(self.root / "keys.txt"), keys).describe()
            raise StoreError(
                f"{self.root} was begun with other images: {difference}: restore the data set, or"
                " use another folder"
            )
        check_same(stored, self.manifest, str(self.root))
        self.manifest = stored

    def _blocks(self, epoch: int) -> Iterator[Block]:
        for path in part_files(parts_path(self.root, epoch)):
            yield from read_blocks(path, epoch, self.dtype, self._identity, len(self))

    def _write_sealed(self, epoch: int, teacher: dict[str, Any]) -> None:
        target = data_path(self.root, epoch)
        for left_over in self.root.glob(f"{target.name}.tmp-*"):
            left_over.unlink(missing_ok=True)
        temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        digests: list[str] = []
        try:
            with open(temporary, "wb") as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(self.dtype),
                    "fortran_order": False,
                    "shape": (len(self),),
                }
                np.lib.format.write_array_header_1_0(file, header)
                for records in self._assembled(epoch):
                    digests += block_digests(records)
                    file.write(raw_bytes(records))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        seal = {
            "format": FORMAT,
            "epoch": epoch,
            "records": len(self),
            "record_bytes": self.dtype.itemsize,
            "identity_sha256": self._identity.hex(),
            "block_records": SEAL_RECORDS,
            "sha256": digests,
            "teacher": teacher,
        }
        write_atomic(
            seal_path(self.root, epoch),
            (json.dumps(seal, indent=1, default=lambda value: value.item()) + "\n").encode(),
        )

    def _assembled(self, epoch: int) -> Iterator[np.ndarray]:
        """The epoch's records in order of position, in large stretches, each from one pass over the
        parts.
        """
        stretch = max(1, ASSEMBLE_BYTES // self.dtype.itemsize // SEAL_RECORDS) * SEAL_RECORDS
        for low in range(0, len(self), stretch):
            records = np.zeros(min(stretch, len(self) - low), self.dtype)
            is_filled = np.zeros(len(records), bool)
            for block in self._blocks(epoch):
                rows = np.flatnonzero(
                    (block.positions >= low) & (block.positions < low + len(records))
                )
                places = block.positions[rows] - low
                is_new = ~is_filled[places]
                # In reverse: of several values assigned to one place numpy keeps the last, and the
                # first one is to win.
                records[places[is_new][::-1]] = block.records[rows[is_new][::-1]]
                is_filled[places] = True
            if not is_filled.all():
                positions = self.missing(epoch)
                first = Keys.read(self.root / "keys.txt")[positions[0]]
                raise StoreError(
                    f"{self.root}: epoch {epoch} lacks {len(positions):,} of {len(self):,} images"
                    f" (the first: {first!r}): run save_logits.py again to finish it"
                )
            yield records

    def _take_lock(self, epoch: int) -> None:
        lock = FileLock(lock_path(self.root, epoch), self.job)
        try:
            lock.acquire()
        except OSError as error:
            raise write_error(lock.path, error) from error
        self._locks[epoch] = lock

    def _clean_up(self, epoch: int) -> None:
        """Remove what a sealed epoch needs no more."""
        shutil.rmtree(parts_path(self.root, epoch), ignore_errors=True)
        self._locks.pop(epoch, None)
        lock_path(self.root, epoch).unlink(missing_ok=True)

    def _release(self, epoch: int) -> None:
        lock = self._locks.pop(epoch, None)
        if lock is not None:
            try:
                lock.release()
            except OSError:
                pass  # it will be found stale

    def _raise_background(self) -> None:
        with self._sealing_lock:
            done = next((future for future in self._sealing if future.done()), None)
            if done is not None:
                self._sealing.remove(done)
        if done is not None:
            done.result()

    def _start_ticking(self) -> None:
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(
                target=_tick_until,
                args=(weakref.ref(self), self._stop),
                name="store-tick",
                daemon=True,
            ).start()


def _tick_until(writer: "weakref.ref[LogitsStoreWriter]", stop: threading.Event) -> None:
    while not stop.wait(TICK_SECONDS):
        if (alive := writer()) is None:
            return
        alive.tick()
        del alive


def _completed(manifest: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """The manifest with what the keys tell; a given value that disagrees, or none for K and C, is a
    StoreError.
    """
    complete = normalised(manifest)
    identity = complete["identity"]
    derived = {"num_images": len(keys), "keys_sha256": keys.digest()}
    for name, value in {**derived, "format": FORMAT}.items():
        given = (complete if name == "format" else identity).get(name, value)
        if given != value:
            raise StoreError(
                f"the manifest says {name} {given!r}, but it is {value!r} here: leave it out, it is"
                " filled in"
            )
    k, num_classes = (identity.get(name) for name in ("k", "num_classes"))
    if not (isinstance(k, int) and isinstance(num_classes, int) and 1 <= k <= num_classes):
        raise StoreError(
            f"the manifest's identity says k {k!r} and num_classes {num_classes!r}: both are"
            " needed, 1 <= k <= num_classes"
        )
    return {**complete, "identity": identity | derived}
