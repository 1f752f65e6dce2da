"""Writing a store: parts that survive a crash, and their sealing into one file an epoch."""

import hashlib
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.store.files import (
    LockedError,
    StoreError,
    atomic_file,
    sole_user,
    write_atomic,
    write_error,
)
from data.store.format import (
    FORMAT,
    SEAL_RECORDS,
    again,
    block_digests,
    check_same,
    counted,
    data_path,
    decoded,
    disk_need,
    encoded,
    identity_digest,
    impossible,
    lock_path,
    normalised,
    other_choice,
    parts_path,
    record_dtype,
    seal_path,
    size_text,
    translated,
)
from data.store.keys import Keys, check_unique, difference
from data.store.parts import Block, PartWriter, part_files, read_blocks

# Memory for sealing: an epoch of ImageNet-22k with K = 100 (5.4 GiB) is put in order in one pass
# over its parts, a larger one in several.
ASSEMBLE_BYTES = 6 << 30


class LogitsStoreWriter:
    """Writes epochs of a store, resumes what a crash left, and seals.

    Rank 0 makes its writer first, from what the store is and the keys that name its images by
    position; then the others `join`. For an epoch: rank 0 calls `begin_epoch` first (it takes the
    epoch's lock), then the others; all `append` and `end_epoch`; then rank 0 seals.
    """

    def __init__(self, root: Path | str, manifest: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Make the folder this store's, or raise StoreError unless it is."""
        self.root = Path(root)
        names = Keys.of(keys)
        given = _completed(manifest, names)
        path = self.root / "manifest.json"
        try:
            if not path.exists():
                check_unique(names)
                self.root.mkdir(parents=True, exist_ok=True)
                write_atomic(self.root / "keys.txt", memoryview(np.ascontiguousarray(names.blob)))
                write_atomic(path, encoded(given, sort_keys=True))
            data = path.read_bytes()
        except OSError as error:
            raise write_error(path, error) from error
        self.manifest = decoded(data, str(path))
        self.digest = hashlib.sha256(data).hexdigest()  # of manifest.json, for `join`
        self.identity_sha256 = identity_digest(data)  # which seals and parts name
        identity = self.manifest["identity"]
        if identity["keys_sha256"] != given["identity"]["keys_sha256"]:
            found = difference(Keys.read(self.root / "keys.txt"), names)
            raise StoreError(
                f"{self.root} was begun with other images: {found}: restore the data set, or use"
                f" another folder{other_choice(self.manifest['info'], given['info'].get('images'))}"
            )
        check_same(self.manifest, translated(given, "the manifest"), str(self.root))
        self.k = int(identity["k"])
        self.num_classes = int(identity["num_classes"])
        self._num_images = int(identity["num_images"])
        self.dtype = record_dtype(self.k, self.num_classes)
        self._part: PartWriter | None = None
        self._locks: dict[int, ExitStack] = {}  # of the epochs that are this process's

    @classmethod
    def join(
        cls,
        root: Path | str,
        digest: str,
        attempts: int = 60,
        sleep: Callable[[float], None] = time.sleep,
    ) -> "LogitsStoreWriter":
        """The writer of a rank above 0; `digest` is that of rank 0's writer.

        A network file system gets a second for each attempt to show what rank 0 wrote.
        """
        path = Path(root) / "manifest.json"
        for attempt in range(attempts):
            if attempt:
                sleep(1.0)
            try:
                data = path.read_bytes()
            except OSError:
                continue
            if hashlib.sha256(data).hexdigest() == digest:
                return cls(root, decoded(data, str(path)), Keys.read(path.with_name("keys.txt")))
        raise StoreError(
            f"{root}: the store's folder is not shared by all nodes: {socket.gethostname()} does"
            " not see what rank 0 wrote there; give a folder on a file system that every node"
            " mounts"
        )

    def __len__(self) -> int:
        return self._num_images

    def is_sealed(self, epoch: int) -> bool:
        """Whether the epoch is finished."""
        return seal_path(self.root, epoch).exists() and data_path(self.root, epoch).exists()

    def missing(self, epoch: int) -> np.ndarray:
        """The positions that no whole block of the epoch's parts holds: int64, ascending."""
        if self.is_sealed(epoch):
            return np.empty(0, np.int64)
        is_missing = np.ones(len(self), bool)
        for block in self._blocks(epoch):
            is_missing[block.positions] = False
        return np.flatnonzero(is_missing)

    def clean_up(self, epochs: Iterable[int]) -> None:
        """Remove what a crash left beside sealed epochs, where no other process is at work."""
        for epoch in epochs:
            left_over = (parts_path(self.root, epoch), lock_path(self.root, epoch))
            if self.is_sealed(epoch) and any(path.exists() for path in left_over):
                with suppress(LockedError):
                    self.seal(epoch)

    def check_disk(self, epochs: Iterable[int]) -> None:
        """Raise StoreError unless there is room to write those of the epochs that aren't sealed."""
        unsealed = [epoch for epoch in epochs if not self.is_sealed(epoch)]
        written = 0
        for epoch in unsealed:
            for path in part_files(parts_path(self.root, epoch)):
                written += path.stat().st_size
        need = disk_need(len(self), self.k, self.num_classes, len(unsealed)) - written
        free = shutil.disk_usage(self.root).free
        if unsealed and need > free:
            raise StoreError(
                f"{self.root}: writing {counted(len(unsealed), 'epoch')} of {len(self):,} images"
                f" with top-{self.k} needs {size_text(need)}, {size_text(free)} are free: free some"
                " space, choose another folder, a smaller DISTILL.LOGITS_TOPK or fewer epochs"
            )

    def begin_epoch(self, epoch: int, rank: int = 0) -> None:
        """Start (or go on with) writing an epoch.

        Rank 0 takes the epoch's lock and looks at the disk; everyone opens a part.
        """
        self.end_epoch()
        if rank == 0:
            self._lock(epoch)
        if self.is_sealed(epoch):
            self._unlock(epoch)
            raise StoreError(
                f"{data_path(self.root, epoch)}: epoch {epoch} is sealed already: nothing is left"
                f" to write, or {again(epoch)}"
            )
        if rank == 0:
            self.check_disk([epoch])
        identity = bytes.fromhex(self.identity_sha256)
        self._part = PartWriter(parts_path(self.root, epoch), epoch, rank, self.dtype, identity)

    def append(self, positions: np.ndarray, records: np.ndarray) -> None:
        """Write the records [n] of one batch, and the positions of their images [n], as a block."""
        assert self._part is not None, "begin_epoch comes first"
        positions = np.asarray(positions)
        records = np.ascontiguousarray(records)
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
        fault = impossible(records, self.num_classes, lambda row: f"position {positions[row]}")
        if fault:
            raise StoreError(
                f"{self.root}: {fault}: check the teacher's weights, or run it in float32"
                " (AMP_ENABLE False)"
            )
        self._part.append(positions, records)

    def end_epoch(self) -> None:
        """Close this process's part of the epoch; all ranks do before rank 0 seals."""
        part = self._part
        self._part = None
        if part is not None:
            part.close()

    def seal(self, epoch: int, teacher: Mapping[str, Any] | None = None) -> None:
        """Turn the parts of a complete epoch into its sealed file, and remove them.

        `teacher` (e.g. its accuracy) is kept in the seal.
        """
        self.end_epoch()
        self._lock(epoch)  # only its holder removes parts: nobody can be writing them
        if not self.is_sealed(epoch):
            try:
                self._write_sealed(epoch, dict(teacher or {}))
            except OSError as error:
                raise write_error(data_path(self.root, epoch), error) from error
        shutil.rmtree(parts_path(self.root, epoch), ignore_errors=True)
        self._unlock(epoch)

    def close(self) -> None:
        """Close the part and give the locks back; an unfinished epoch can be resumed."""
        try:
            self.end_epoch()
        finally:
            for epoch in list(self._locks):
                self._unlock(epoch)

    def __enter__(self) -> "LogitsStoreWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # else the error under way matters more
                raise

    def _lock(self, epoch: int) -> None:
        if epoch in self._locks:
            return
        path = lock_path(self.root, epoch)
        lock = ExitStack()
        try:
            lock.enter_context(sole_user(path, "wait for it or stop it"))
        except OSError as error:
            raise write_error(path, error) from error
        self._locks[epoch] = lock

    def _unlock(self, epoch: int) -> None:
        lock = self._locks.pop(epoch, None)
        if lock is not None:
            lock.close()

    def _blocks(self, epoch: int) -> Iterator[Block]:
        identity = bytes.fromhex(self.identity_sha256)
        for path in part_files(parts_path(self.root, epoch)):
            yield from read_blocks(path, epoch, self.dtype, identity, len(self))

    def _write_sealed(self, epoch: int, teacher: dict[str, Any]) -> None:
        target = data_path(self.root, epoch)
        for left_over in self.root.glob(f"{target.name}.tmp-*"):
            left_over.unlink(missing_ok=True)
        digests: list[str] = []
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (len(self),),
        }
        with atomic_file(target) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for records in self._assembled(epoch):
                digests += block_digests(records)
                file.write(records.view(np.uint8))
        seal = {
            "format": FORMAT,
            "epoch": epoch,
            "records": len(self),
            "record_bytes": self.dtype.itemsize,
            "identity_sha256": self.identity_sha256,
            "block_records": SEAL_RECORDS,
            "sha256": digests,
            "teacher": teacher,
        }
        write_atomic(seal_path(self.root, epoch), encoded(seal))

    def _assembled(self, epoch: int) -> Iterator[np.ndarray]:
        """The epoch's records in order of position, in stretches of whole checksum blocks.

        A stretch takes one pass over the parts, whose bytes are read and checked once for it. Of
        several records of an image the first in (rank, file, offset) order counts.
        """
        stretch = max(1, ASSEMBLE_BYTES // self.dtype.itemsize // SEAL_RECORDS) * SEAL_RECORDS
        for low in range(0, len(self), stretch):
            records = np.empty(min(stretch, len(self) - low), self.dtype)
            is_filled = np.zeros(len(records), bool)
            for block in self._blocks(epoch):
                places = block.positions - low  # in the stretch: int64 [n]
                is_new = (places >= 0) & (places < len(records))
                is_new[is_new] = ~is_filled[places[is_new]]
                # In reverse: of several values assigned to one place numpy keeps the last, and the
                # first one is to win.
                records[places[is_new][::-1]] = block.records[is_new][::-1]
                is_filled[places[is_new]] = True
            if not is_filled.all():
                positions = self.missing(epoch)
                first = Keys.read(self.root / "keys.txt")[positions[0]]
                raise StoreError(
                    f"{self.root}: epoch {epoch} lacks {len(positions):,} of {len(self):,} images"
                    f" (the first: {first!r}): run save_logits.py again to finish it"
                )
            yield records


def _completed(manifest: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """The manifest with what the keys tell.

    A given value that disagrees, or none for K and C, is a StoreError.
    """
    complete = normalised(manifest)
    identity = complete["identity"]
    derived = {"num_images": len(keys), "keys_sha256": keys.digest()}
    pairs = [(name, identity.get(name, value), value) for name, value in derived.items()]
    for name, given, value in [*pairs, ("format", complete["format"], FORMAT)]:
        if given != value:
            raise StoreError(
                f"the manifest says {name} {given!r}, but it is {value!r} here: leave it out, it is"
                " filled in"
            )
    k = identity.get("k")
    num_classes = identity.get("num_classes")
    if not (isinstance(k, int) and isinstance(num_classes, int) and 1 <= k <= num_classes):
        raise StoreError(
            f"the manifest's identity says k {k!r} and num_classes {num_classes!r}: both are"
            " needed, 1 <= k <= num_classes"
        )
    return {**complete, "identity": identity | derived}
