"""Parts: the append-only files of an epoch that is being written, one per writing process.

A part is a header and blocks; a block is `magic | count | positions <i8 | records | crc32`, the
checksum being over all before it. Blocks count up to the first that is not whole or whose checksum
is wrong: so the torn tail that a crash leaves is cut off, and nothing ever has to be repaired.
"""

import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.store.files import StoreError, sync_folder, write_error

SYNC_SECONDS = 30.0  # an append after this long syncs: what a power cut may take
# magic, epoch, bytes of a record, sha256 of the store's identity
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


class PartWriter:
    """One part, open for appending."""

    def __init__(
        self, folder: Path, epoch: int, rank: int, dtype: np.dtype, identity: bytes
    ) -> None:
        # a rank's later parts sort behind its earlier ones
        unique = f"{time.time_ns():016x}{secrets.token_hex(4)}"
        self.path = folder / f"{rank:04d}-{unique}.part"
        self._handle: int | None = None
        self._end = 0  # bytes of whole blocks
        self._synced_at = time.monotonic()
        self._broken: OSError | None = None  # after which nothing more may be appended
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # O_BINARY, which Windows alone has, keeps line ends as they are
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
            self._handle = os.open(self.path, flags)
            self._write(HEADER.pack(HEADER_MAGIC, epoch, dtype.itemsize, identity))
            sync_folder(folder)
        except OSError as error:
            raise write_error(self.path, error) from error

    def append(self, positions: np.ndarray, records: np.ndarray) -> None:
        """Write one block, straight to the operating system: it survives the process."""
        assert self._handle is not None, "the part is closed"
        head = BLOCK.pack(BLOCK_MAGIC, len(records))
        data = head + positions.astype(POSITION).tobytes() + records.tobytes()
        try:
            self._raise_broken()
            self._write(data + CHECKSUM.pack(zlib.crc32(data)))
            if time.monotonic() - self._synced_at >= SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        """Make everything durable and close the file."""
        if self._handle is None:
            return
        try:
            self._raise_broken()
            self._sync()
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            os.close(self._handle)
            self._handle = None

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._handle, left) :]
        except OSError:
            # Half a block would hide all later ones from readers.
            try:
                os.ftruncate(self._handle, self._end)
                os.lseek(self._handle, self._end, os.SEEK_SET)
            except OSError as error:
                self._broken = error
            raise
        self._end += len(data)

    def _sync(self) -> None:
        try:
            os.fsync(self._handle)
        except OSError as error:
            self._broken = error  # a second fsync would succeed although the data is gone
            raise
        self._synced_at = time.monotonic()


def part_files(folder: Path) -> list[Path]:
    """The parts of an epoch in (rank, file) order."""
    # opening a FIFO would wait for ever
    found = (path for path in folder.glob("*.part") if path.is_file())
    return sorted(found, key=lambda path: (int(path.name.split("-")[0]), path.name))


def read_blocks(
    path: Path, epoch: int, dtype: np.dtype, identity: bytes, num_images: int
) -> Iterator[Block]:
    """The valid blocks of a part in file order, up to the first one that is torn."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        # the version, behind the name, is judged below
        if len(header) < HEADER.size or header[:6] != HEADER_MAGIC[:6]:
            return  # cut off while it was created
        if header != HEADER.pack(HEADER_MAGIC, epoch, dtype.itemsize, identity):
            raise StoreError(
                f"{path}: belongs to another store, epoch or format: move it away, its images will"
                " be computed again"
            )
        left = os.fstat(file.fileno()).st_size - HEADER.size
        while len(head := file.read(BLOCK.size)) == BLOCK.size:
            magic, count = BLOCK.unpack(head)
            length = count * (POSITION.itemsize + dtype.itemsize)
            left -= BLOCK.size + length + CHECKSUM.size
            if magic != BLOCK_MAGIC or left < 0:  # a torn length is never allocated
                return
            body = file.read(length)
            if file.read(CHECKSUM.size) != CHECKSUM.pack(zlib.crc32(body, zlib.crc32(head))):
                return
            positions = np.frombuffer(body, POSITION, count)
            if count and not 0 <= positions.min() <= positions.max() < num_images:
                raise StoreError(
                    f"{path}: holds positions beyond the store's {num_images:,} images: move it"
                    " away"
                )
            yield Block(
                positions, np.frombuffer(body, dtype, count, offset=count * POSITION.itemsize)
            )
