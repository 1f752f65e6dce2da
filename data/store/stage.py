"""Staging: local copies of the epochs in use, for a store on a slow or object-like file system."""

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from data.store.files import FileLock, LockedError, StoreError, write_atomic, write_error
from data.store.format import (
    block_digests,
    data_path,
    epoch_bytes,
    identity_digest,
    lock_path,
    seal_path,
    size_text,
)
from data.store.reader import LogitsStoreReader

CHUNK_BYTES = 1 << 23
POLL_SECONDS = 0.2


class EpochStager:
    """Copies the next epoch in the background and deletes those before; the processes of a machine
    share one copy.

    `reader` reads from the copies, and from the store what is not copied. `on_chunk` is told the
    bytes copied."""

    def __init__(
        self,
        store: LogitsStoreReader,
        folder: Path | str,
        on_chunk: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.folder = Path(folder) / f"store-{identity_digest(store.manifest)[:16]}"
        self.reader = LogitsStoreReader(store.root, stage=self.folder)
        self._on_chunk = on_chunk
        self._copies: dict[int, Future] = {}
        self._stop = threading.Event()

    def advance(self, epoch: int, following: int | None = None) -> None:
        """Wait until an epoch is staged, delete all others and begin to copy the following one."""
        wanted = {epoch} if following is None else {epoch, following}
        self._copies = {kept: copy for kept, copy in self._copies.items() if kept in wanted}
        self._start(epoch).result()
        for path in self.folder.glob("epoch_*.npy"):
            if path not in {data_path(self.folder, kept) for kept in wanted}:
                _remove(path.with_suffix(".json"))
                _remove(path)
        if following is not None:
            self._start(following)

    def close(self) -> None:
        """End a copy that is under way."""
        self._stop.set()

    def is_staged(self, epoch: int) -> bool:
        """Whether a verified copy of the store's epoch is there."""
        try:
            return seal_path(self.folder, epoch).read_bytes() == seal_path(
                self.reader.root, epoch
            ).read_bytes() and (
                data_path(self.folder, epoch).stat().st_size
                == data_path(self.reader.root, epoch).stat().st_size
            )
        except FileNotFoundError:
            return False

    def _start(self, epoch: int) -> Future:
        copy = self._copies.get(epoch)
        if copy is None or (copy.done() and not self.is_staged(epoch)):
            copy = self._copies[epoch] = Future()
            threading.Thread(
                target=self._run, args=(epoch, copy), name="store-stage", daemon=True
            ).start()
        return copy

    def _run(self, epoch: int, copy: Future) -> None:
        try:
            copy.set_result(self._stage(epoch))
        except OSError as error:
            copy.set_exception(write_error(data_path(self.folder, epoch), error))
        except BaseException as error:
            copy.set_exception(error)

    def _stage(self, epoch: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path(self.folder, epoch), f"stage-{secrets.token_hex(8)}")
        while not self.is_staged(epoch) and not self._stop.is_set():
            try:
                lock.acquire()
            except LockedError:  # another process of this machine is copying
                time.sleep(POLL_SECONDS)
                continue
            try:
                if not self.is_staged(epoch):
                    self._copy(epoch, lock)
            finally:
                lock.release()

    def _copy(self, epoch: int, lock: FileLock) -> None:
        seal = self.reader.seal(epoch)
        source, target = data_path(self.reader.root, epoch), data_path(self.folder, epoch)
        for left_over in self.folder.glob(f"{target.name}.tmp-*"):
            left_over.unlink(missing_ok=True)
        need, free = (
            epoch_bytes(len(self.reader), self.reader.k, self.reader.num_classes),
            shutil.disk_usage(self.folder).free,
        )
        if need > free:
            raise StoreError(
                f"{self.folder}: an epoch of the store takes {size_text(need)}, {size_text(free)}"
                " are free (two epochs are kept): free some space, or give another"
                " DISTILL.STAGE_DIR"
            )
        temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        try:
            with open(source, "rb") as reading, open(temporary, "wb") as writing:
                while chunk := reading.read(CHUNK_BYTES):
                    writing.write(chunk)
                    lock.touch()
                    self._on_chunk(len(chunk))
                    if self._stop.is_set():
                        return
            if list(block_digests(np.load(temporary, mmap_mode="r"))) != seal["sha256"]:
                raise StoreError(
                    f"{source}: the copy in {self.folder} is not what was sealed: run `python -m"
                    " tools.logits verify` on it"
                )
            os.replace(temporary, target)
            write_atomic(
                seal_path(self.folder, epoch), seal_path(self.reader.root, epoch).read_bytes()
            )
        finally:
            temporary.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # still mapped, on systems that mind: the next call tries again
