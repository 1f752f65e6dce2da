"""Parts: the append-only files of an epoch that is being written, one per writing process.

A part is a header and blocks; a block is `magic | count | positions <i8 | records | crc32`, the
checksum being over all before it. Blocks count up to the first that is not whole or whose checksum
is wrong: so the torn tail that a crash leaves is cut off, and nothing ever has to be repaired."""

import os
import queue
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data.store.files import StoreError, sync_folder, write_error

SYNC_SECONDS = 30.0  # after a power cut at most this much work is gone
# magic, epoch, bytes of a record, digest of the store's identity
HEADER = struct.Struct("<8sII32s")
HEADER_MAGIC = b"TVPART\x01\n"
BLOCK = struct.Struct("<4sI")  # magic, number of records
BLOCK_MAGIC = b"BLK\n"
CHECKSUM = struct.Struct("<I")
POSITION = np.dtype("<i8")


class Block(NamedTuple):
    """What one append wrote."""

    positions: np.ndarray  # int64 [n]
    records: np.ndarray  # structured [n]
    end: int  # offset of the byte behind it


class PartWriter:
    """One part, open for appending."""

    def __init__(
        self,
        folder: Path,
        epoch: int,
        rank: int,
        dtype: np.dtype,
        identity: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # a rank's later parts sort behind its earlier ones
        unique = f"{time.time_ns():016x}{secrets.token_hex(4)}"
        self.path = folder / f"{rank:04d}-{unique}.part"
        self._clock, self._unsynced_since = clock, None
        self._lock = threading.Lock()  # the appending and the syncing thread
        self._broken: OSError | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle: int | None = os.open(
                self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
            )
            self._end = 0
            self._write([HEADER.pack(HEADER_MAGIC, epoch, dtype.itemsize, identity)])
            sync_folder(folder)
        except OSError as error:
            raise write_error(self.path, error) from error

    def append(self, positions: np.ndarray, records: np.ndarray) -> None:
        """Write one block, straight to the operating system: it survives the death of this process."""
        pieces = [
            BLOCK.pack(BLOCK_MAGIC, len(records)),
            positions.astype(POSITION).tobytes(),
            records.tobytes(),
        ]
        checksum = 0
        for piece in pieces:
            checksum = zlib.crc32(piece, checksum)
        with self._lock:
            assert self._handle is not None, "the part is closed"
            try:
                if self._broken is not None:
                    raise self._broken
                self._write([*pieces, CHECKSUM.pack(checksum)])
                self._sync(SYNC_SECONDS)
            except OSError as error:
                raise write_error(self.path, error) from error

    def tick(self) -> None:
        """Call now and then from another thread: syncs what has waited for long; an error surfaces
        at the next append or close.
        """
        with self._lock:
            try:
                self._sync(SYNC_SECONDS / 2)
            except OSError:
                pass  # kept in self._broken

    def close(self) -> None:
        """Make everything durable and close the file."""
        with self._lock:
            if self._handle is None:
                return
            try:
                if self._broken is not None:
                    raise self._broken
                self._sync(0.0)
            except OSError as error:
                raise write_error(self.path, error) from error
            finally:
                os.close(self._handle)
                self._handle = None

    def _write(self, pieces: list[bytes]) -> None:
        data = memoryview(b"".join(pieces))
        try:
            written = 0
            while written < len(data):
                written += os.write(self._handle, data[written:])
        except OSError:
            # Half a block would hide all later ones from readers.
            try:
                os.ftruncate(self._handle, self._end)
                os.lseek(self._handle, self._end, os.SEEK_SET)
            except OSError as error:
                self._broken = error
            raise
        self._end += len(data)
        if self._unsynced_since is None:
            self._unsynced_since = self._clock()

    def _sync(self, older_than: float) -> None:
        if (
            self._handle is None
            or self._unsynced_since is None
            or self._clock() - self._unsynced_since < older_than
        ):
            return
        try:
            os.fsync(self._handle)
        except OSError as error:
            self._broken = error  # a second fsync would succeed although the data is gone
            raise
        self._unsynced_since = None


def part_files(folder: Path) -> list[Path]:
    """The parts of an epoch in (rank, file) order."""
    return sorted(folder.glob("*.part"), key=lambda path: (int(path.name.split("-")[0]), path.name))


def read_blocks(
    path: Path, epoch: int, dtype: np.dtype, identity: bytes, num_images: int
) -> Iterator[Block]:
    """The valid blocks of a part in file order, up to the first one that is torn."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or header[:6] != HEADER_MAGIC[:6]:
            return  # cut off while it was created
        if header != HEADER.pack(HEADER_MAGIC, epoch, dtype.itemsize, identity):
            raise StoreError(
                f"{path}: belongs to another store, epoch or format: move it away, its images will"
                " be computed again"
            )
        size = os.fstat(file.fileno()).st_size
        end = HEADER.size
        while len(head := file.read(BLOCK.size)) == BLOCK.size:
            magic, count = BLOCK.unpack(head)
            length = count * (POSITION.itemsize + dtype.itemsize)
            if magic != BLOCK_MAGIC or end + BLOCK.size + length + CHECKSUM.size > size:
                return
            body, checksum = file.read(length), file.read(CHECKSUM.size)
            if len(checksum) < CHECKSUM.size or CHECKSUM.unpack(checksum)[0] != zlib.crc32(
                body, zlib.crc32(head)
            ):
                return
            end += BLOCK.size + length + CHECKSUM.size
            positions = np.frombuffer(body, POSITION, count)
            if count and not 0 <= positions.min() <= positions.max() < num_images:
                raise StoreError(
                    f"{path}: holds positions beyond the store's {num_images:,} images: move it"
                    " away"
                )
            yield Block(
                positions, np.frombuffer(body, dtype, count, offset=count * POSITION.itemsize), end
            )


class Appender(Protocol):
    """What an AsyncAppender feeds."""

    def append(self, positions: np.ndarray, records: np.ndarray) -> None: ...


class AsyncAppender:
    """Appends in a thread of its own, with at most `depth` batches waiting; an error there is
    raised by the next call here.

    `records` may be a function without arguments: it is called in that thread, e.g. to wait for a
    copy from the device."""

    def __init__(self, writer: Appender, depth: int = 8) -> None:
        self._writer = writer
        self._waiting: queue.Queue = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(
            target=self._work, name="store-append", daemon=True
        )
        self._thread.start()

    def append(self, positions: np.ndarray, records: np.ndarray | Callable[[], np.ndarray]) -> None:
        """Hand a batch over; waits only while the queue is full."""
        assert self._thread is not None, "the appender is closed"
        self._raise()
        self._waiting.put((positions, records))
        self._raise()

    def flush(self) -> None:
        """Wait until everything handed over is written."""
        self._waiting.join()
        self._raise()

    def close(self) -> None:
        """Write what is left and end the thread."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
        self._raise()

    def __enter__(self) -> "AsyncAppender":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except BaseException:
            if error is None:  # else the error under way matters more
                raise

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            item = self._waiting.get()
            try:
                # after an error batches are dropped, so that no caller waits for ever
                if item is not None and self._error is None:
                    positions, records = item
                    self._writer.append(positions, records() if callable(records) else records)
            except BaseException as error:
                self._error = error
            finally:
                self._waiting.task_done()
            if item is None:
                return
