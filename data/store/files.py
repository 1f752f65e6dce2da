"""How processes and machines share the folder of a store: durable files, locks that outlive no job,
and a token all nodes must see.
"""

import errno
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# a lock whose holder can't be asked counts as left behind after this long without a heartbeat
STALE_SECONDS = 300.0


class StoreError(ValueError):
    """A store, its folder or a request to it is at fault; the message names the file or value and
    the way out.
    """


class LockedError(StoreError):
    """Another job holds the lock."""


@contextmanager
def sole_user(path: Path | str, way_out: str = "", wait: bool = False) -> Iterator[None]:
    """Keep out all other processes that ask for the same file: a LockedError, or `wait` for it.

    The system frees the lock of a process that ends, however it ends; where the system or the file
    system has no locks, all enter. The file is the lock's own: it names its holder, and goes with
    it. Processes are kept apart, not threads, and a process that opens and closes the file a second
    time loses its lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
                with suppress(OSError):  # Windows removes no open file
                    path.unlink()
            return


def lock_holder(path: Path) -> str | None:
    """Who holds the lock on a file, for people; None if nobody does. For processes without it."""
    try:
        with open(path, "rb+", buffering=0) as file:
            return None if _lock(file, wait=False) else _holder(file)
    except OSError:
        return None


def _lock(file: BinaryIO, wait: bool) -> bool:
    if fcntl is None:
        return True
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


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is either absent, old or whole, whatever happens meanwhile."""
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_error(path: Path, error: OSError) -> StoreError:
    """What to tell a user whose file system refused a write."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    way_out = "free some space" if full else "check the mount and its permissions"
    return StoreError(
        f"{path}: can't be written ({error.strerror or error}): what is there stays usable;"
        f" {way_out} and run the same again"
    )


class Holder(NamedTuple):
    """Who holds a lock."""

    job: str
    host: str
    # tells kernels and process namespaces apart that share a host name: a pid means something
    # within one of them only
    machine: str
    pid: int
    since: float  # seconds since 1970


def this_process(job: str | None = None) -> Holder:
    """The holder that this process would be; without a job's name all locks taken by one process
    belong to one job.
    """
    host = socket.gethostname()
    machine = f"{host}/{_read_first_line('/proc/sys/kernel/random/boot_id')}/{_process_namespace()}"
    return Holder(job or f"{machine}/{os.getpid()}", host, machine, os.getpid(), time.time())


def is_stale(
    holder: Holder | None, here: Holder, age: float, is_alive: Callable[[int], bool]
) -> bool:
    """Whether a lock was left behind: its process is gone from this machine, or no heartbeat came
    for `age` > STALE_SECONDS.
    """
    if holder is not None and holder.machine == here.machine and not is_alive(holder.pid):
        return True
    return age > STALE_SECONDS


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; True where asking is not possible."""
    if sys.platform == "win32":  # there os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a process that ended but was not waited for (in a container without an init) is dead
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return True


class FileLock:
    """A lock file that names its holder; taking it again under the same job's name succeeds."""

    def __init__(self, path: Path, job: str | None = None) -> None:
        self.path, self.job = Path(path), job

    def acquire(self) -> None:
        """Take the lock, also from a holder that is gone, or raise LockedError."""
        here = this_process(self.job)
        for _ in range(100):  # each turn another process may have come first
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                holder = self.holder()
                if holder is not None and holder.job == here.job:
                    return self.touch()
                age = self._age()
                if age is None:
                    continue
                if not is_stale(holder, here, age, is_alive):
                    raise LockedError(self._refusal(holder, age)) from None
                self._remove_stale(holder)
            else:
                with os.fdopen(handle, "w") as file:
                    json.dump(here._asdict(), file)
                return None
        raise LockedError(f"{self.path}: other jobs keep taking this lock")

    def release(self) -> None:
        """Give the lock back, if it is still this job's."""
        if self.is_held():
            self.path.unlink(missing_ok=True)

    def touch(self) -> None:
        """The heartbeat: tell other machines that the holder lives."""
        if self.is_held():
            try:
                os.utime(self.path)
            except FileNotFoundError:
                pass

    def is_held(self) -> bool:
        """Whether the lock is this job's."""
        holder = self.holder()
        return holder is not None and holder.job == this_process(self.job).job

    def holder(self) -> Holder | None:
        """Who holds the lock; None if nobody does, or the file can't be understood (yet)."""
        try:
            return Holder(**json.loads(self.path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _age(self) -> float | None:
        """Seconds since the last heartbeat by the clock of the file system, which may differ from
        ours.
        """
        probe = self.path.with_name(f"{self.path.name}.probe-{secrets.token_hex(4)}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _remove_stale(self, judged: Holder | None) -> None:
        aside = self.path.with_name(f"{self.path.name}.stale-{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        moved = FileLock(aside, self.job)
        # another process took the stale lock over between our look and the rename: give it back
        if moved.holder() != judged:
            try:
                os.link(aside, self.path)
            except OSError:
                pass
        aside.unlink(missing_ok=True)

    def _refusal(self, holder: Holder | None, age: float) -> str:
        who = f"process {holder.pid} on {holder.host}" if holder else "an unknown process"
        return (
            f"{self.path}: {who} is at work here (last sign of life {max(age, 0):.0f} s ago): wait"
            " for it or stop it; a lock left behind by another machine is taken over after"
            f" {STALE_SECONDS / 60:.0f} minutes, or delete the file"
        )


def write_token(root: Path | str, token: str) -> None:
    """Rank 0: leave a token in the store's folder, which every rank then looks for with
    `check_token`.
    """
    path = _token_path(root, token)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, token.encode())
    except OSError as error:
        raise write_error(path, error) from error


def check_token(
    root: Path | str, token: str, attempts: int = 60, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Every rank: raise StoreError unless rank 0's token can be read here; a network file system
    gets `attempts` seconds to show it.
    """
    path = _token_path(root, token)
    for attempt in range(attempts):
        try:
            os.listdir(path.parent)  # makes network file systems ask their server
            if path.read_bytes() == token.encode():
                return
        except OSError:
            pass
        if attempt + 1 < attempts:
            sleep(1.0)
    raise StoreError(
        f"{root}: the store's folder is not shared by all nodes: {socket.gethostname()} does not"
        " see what rank 0 wrote there; give a folder on a file system that every node mounts"
    )


def remove_token(root: Path | str, token: str) -> None:
    """Rank 0, after every rank has read the token."""
    _token_path(root, token).unlink(missing_ok=True)


def _token_path(root: Path | str, token: str) -> Path:
    assert token and all(c.isalnum() or c in "-_" for c in token), (
        f"a token becomes a file name: {token!r}"
    )
    return Path(root) / f".token-{token}"


def _read_first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
