"""Locks, and files that appear whole or not at all."""

import contextlib
import errno
import os
import selectors
import socket
import subprocess
import sys

import pytest

from data.store import files as store_files
from data.store.files import (
    LockedError,
    lock_holder,
    sole_user,
    sync_folder,
    write_atomic,
    write_error,
)
from tests.support.helpers import ROOT

# Takes the lock, says so, waits for a line, and lets go.
HOLD = """
import sys
from data.store.files import sole_user
with sole_user(sys.argv[1], "wait", wait=sys.argv[2] == "wait"):
    print("in", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "epoch_0001.lock"


@contextlib.contextmanager
def holding(path, wait=""):
    """A process of its own that asks for a lock; leaving kills it, in the midst of its work."""
    command, pipe = [sys.executable, "-c", HOLD, str(path), wait], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        yield process
        process.kill()


def test_one_process_is_in_and_the_system_frees_the_lock_of_a_killed_one(path):
    with holding(path) as first:
        assert first.stdout.readline() == "in\n"
        assert lock_holder(path) == f"process {first.pid} on {socket.gethostname()}"
        with pytest.raises(LockedError, match=rf"in use by process {first.pid} on .*: wait for it"):
            with sole_user(path, "wait for it"):
                raise AssertionError("both are in")
    assert path.exists() and lock_holder(path) is None  # what the killed one left holds nobody off
    with sole_user(path):
        assert str(os.getpid()) in path.read_text()
    assert not path.exists()


def test_whoever_waits_enters_when_the_holder_has_gone(path):
    with holding(path) as first, contextlib.ExitStack() as stack:
        first.stdout.readline()
        waiting = [stack.enter_context(holding(path, "wait")) for _ in range(3)]
        first.communicate("go\n")
        while waiting:
            with selectors.DefaultSelector() as ready:
                for other in waiting:
                    ready.register(other.stdout, selectors.EVENT_READ, other)
                ((key, _),) = ready.select(30)  # one at a time, though each removes the file
            assert key.data.communicate("go\n")[0] == "in\n"
            waiting.remove(key.data)
    assert not path.exists()


def test_a_forked_child_holds_nothing(path):
    with sole_user(path):
        child = os.fork()
        if not child:
            try:
                with sole_user(path):
                    os._exit(1)
            except LockedError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert path.exists()


def test_without_locks_all_enter(path, monkeypatch):
    monkeypatch.setattr(store_files, "fcntl", None)
    with holding(path) as other:
        other.stdout.readline()
        with sole_user(path):
            pass


def failing(code):
    def function(*arguments):
        raise OSError(code, os.strerror(code))

    return function


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("code", "way_out"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "permissions")]
)
def test_write_errors_name_the_file_and_the_way_out(tmp_path, code, way_out):
    text = str(write_error(tmp_path / "x", OSError(code, os.strerror(code))))
    assert all(part in text for part in (str(tmp_path / "x"), os.strerror(code), way_out))


def test_some_file_systems_know_no_fsync_of_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)
