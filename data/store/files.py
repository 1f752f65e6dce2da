"""Files that several processes and machines share: written whole or not at all, used by one."""

import errno
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class StoreError(ValueError):
    """A store, its folder or a request to it is at fault; the message names the way out."""


class LockedError(StoreError):
    """Another process holds the lock."""


class FileBytes:
    """The bytes of a file; it stays open in each process, on network drives that is quicker.

    They are read, not mapped: to a map a file that has become shorter is the end of the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def __getstate__(self) -> dict:
        return {"path": self.path, "_handle": None}

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; a file that has become shorter is a StoreError."""
        if not hasattr(os, "pread"):  # as on Windows
            data = read_at(self.path, offset, size)
        else:
            if self._handle is None:
                self._handle = os.open(self.path, os.O_RDONLY)
            # moves no position, which threads and forked processes would share
            data = os.pread(self._handle, size, offset)
        if len(data) != size:
            raise StoreError(
                f"{self.path}: ends before byte {offset + size:,}: it is truncated, restore it"
            )
        return data


@contextmanager
def sole_user(path: Path | str, way_out: str = "", wait: bool = False) -> Iterator[None]:
    """Keep out all other processes that ask for the same file: a LockedError, or `wait` for it.

    The system frees the lock of a process that ends, however it ends; where the system or the file
    system has no locks, all enter. The file is the lock's own: it names its holder, and goes with
    it; its folder is made. Processes are kept apart, not threads, and a process that opens and
    closes the file a second time loses its lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    while True:
        with open(path, "ab+", buffering=0) as file:
            if not _lock(file, wait):
                raise LockedError(f"{path}: in use by {_holder(file)}: {way_out}")
            if not _is_at(file, path):  # its holder removed it while we came
                continue
            with suppress(OSError):  # a full disk: the name is for people alone
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            try:
                yield
            finally:
                with suppress(OSError):  # a file that stays hinders nobody
                    path.unlink()
            return


def lock_holder(path: Path) -> str | None:
    """Who holds the lock on a file, for people; None if nobody does. For processes without it."""
    if fcntl is None:
        return None
    try:
        with open(path, "rb+", buffering=0) as file:
            return None if _lock(file, wait=False) else _holder(file)
    except OSError:
        return None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no such call
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, under a temporary name until it is whole and durable."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is either absent, old or whole, whatever happens meanwhile."""
    with atomic_file(path) as file:
        file.write(data)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Bytes at an offset: fewer at the end of the file."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def write_error(path: Path, error: OSError) -> StoreError:
    """What to tell a user whose file system refused a write."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    way_out = "free some space" if full else "check the mount and its permissions"
    return StoreError(
        f"{path}: can't be written ({error.strerror or error}): what is there stays usable;"
        f" {way_out} and run the same again"
    )


def _lock(file: BinaryIO, wait: bool) -> bool:
    try:
        # a record lock: forked children do not inherit it, and NFS knows it
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace") or "another process"
