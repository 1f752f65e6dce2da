"""Locks, tokens and files that appear whole or not at all."""

import contextlib
import errno
import json
import os
import selectors
import socket
import subprocess
import sys
import threading

import pytest

from data.store import files as store_files
from data.store.files import (
    STALE_SECONDS,
    FileLock,
    Holder,
    LockedError,
    StoreError,
    check_token,
    is_alive,
    is_stale,
    lock_holder,
    remove_token,
    sole_user,
    this_process,
    write_atomic,
    write_error,
    write_token,
)
from tests.support.helpers import ROOT


@pytest.fixture
def path(tmp_path):
    return tmp_path / "epoch_0001.lock"


# Takes the lock, says so, waits for a line, and lets go.
HOLD = """
import sys
from data.store.files import sole_user
with sole_user(sys.argv[1], "wait", wait=sys.argv[2] == "wait"):
    print("in", flush=True)
    sys.stdin.readline()
"""


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
        others = [stack.enter_context(holding(path, "wait")) for _ in range(3)]
        first.communicate("go\n")
        for _ in others:
            ready = selectors.DefaultSelector()
            for other in others:
                ready.register(other.stdout, selectors.EVENT_READ, other)
            ((key, _),) = ready.select(30)  # one at a time, though each holder removes the file
            assert key.data.communicate("go\n")[0] == "in\n"
            others = [other for other in others if other is not key.data]
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


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave(path, holder: Holder | None, age: float = 0.0) -> None:
    """A lock file as another process left it."""
    path.write_text(json.dumps(holder._asdict()) if holder else "")
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))


def test_a_lock_names_its_holder_and_is_given_back(path):
    lock = FileLock(path)
    lock.acquire()
    assert lock.is_held() and lock.holder()[:4] == this_process()[:4]
    lock.acquire()  # the same process may again
    lock.release()
    assert not path.exists() and not lock.is_held()
    lock.release()
    lock.touch()
    assert not path.exists()


def test_a_second_job_is_refused_and_told_by_whom(path):
    FileLock(path, "first").acquire()
    with pytest.raises(LockedError) as error:
        FileLock(path, "second").acquire()
    text = str(error.value)
    assert str(path) in text and f"process {os.getpid()} on {this_process().host}" in text
    assert "wait for it" in text and "delete the file" in text
    other = FileLock(path, "second")
    other.release()
    assert FileLock(path, "first").is_held() and isinstance(error.value, StoreError)


def test_processes_of_one_job_share_a_lock(path):
    FileLock(path, "job").acquire()
    code = f"from data.store.files import FileLock; FileLock({str(path)!r}, 'job').acquire()"
    subprocess.run([sys.executable, "-c", code], check=True)
    failed = subprocess.run(
        [sys.executable, "-c", code.replace("'job'", "None")], capture_output=True, text=True
    )
    assert failed.returncode != 0 and "LockedError" in failed.stderr


def test_a_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(path):
    leave(path, this_process("old")._replace(pid=dead_pid()))
    FileLock(path, "new").acquire()
    assert FileLock(path, "new").is_held()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_lock_of_another_machine_is_taken_over_without_a_heartbeat_only(path):
    there = this_process("old")._replace(machine="another", host="node7", pid=dead_pid())
    leave(path, there, age=STALE_SECONDS - 60)
    with pytest.raises(LockedError, match="on node7"):
        FileLock(path, "new").acquire()
    leave(path, there, age=STALE_SECONDS + 60)
    FileLock(path, "new").acquire()
    assert FileLock(path, "new").is_held()


def test_a_lock_file_that_says_nothing_is_respected_for_a_while(path):
    leave(path, None, age=1)
    with pytest.raises(LockedError, match="an unknown process"):
        FileLock(path).acquire()
    leave(path, None, age=STALE_SECONDS + 60)
    FileLock(path).acquire()


def test_the_heartbeat_touches_our_lock_only(path):
    lock = FileLock(path, "mine")
    lock.acquire()
    os.utime(path, (1, 1))
    FileLock(path, "other").touch()
    assert path.stat().st_mtime == 1
    lock.touch()
    assert path.stat().st_mtime > 1e9


@pytest.mark.parametrize(
    ("machine", "alive", "age", "expected"),
    [
        ("here", True, 0, False),
        ("here", False, 0, True),
        ("here", True, STALE_SECONDS + 1, True),
        ("there", False, 0, False),
        ("there", False, STALE_SECONDS + 1, True),
        (None, False, 0, False),
        (None, False, STALE_SECONDS + 1, True),
    ],
)
def test_when_a_lock_is_stale(machine, alive, age, expected):
    here = Holder("job", "host", "here", 1, 0.0)
    holder = here._replace(machine=machine) if machine else None
    assert is_stale(holder, here, age, lambda pid: alive) is expected


def test_a_fresh_lock_that_another_process_took_meanwhile_is_given_back(path):
    judged = this_process("dead")._replace(pid=dead_pid())
    leave(path, this_process("quick"))  # between our look at the stale lock and its removal
    FileLock(path, "slow")._remove_stale(judged)
    assert FileLock(path, "quick").is_held()
    with pytest.raises(LockedError):
        FileLock(path, "slow").acquire()


def test_of_many_that_take_over_a_stale_lock_one_holds_it(path):
    leave(path, this_process("dead")._replace(pid=dead_pid()))
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def take(job: str) -> None:
        barrier.wait()
        try:
            FileLock(path, job).acquire()
            outcomes.append(job)
        except LockedError:
            pass

    threads = [threading.Thread(target=take, args=(f"job{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert FileLock(path).holder().job in outcomes


def test_alive_dead_and_unwaited():
    assert is_alive(os.getpid()) and is_alive(1) and not is_alive(dead_pid())
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True)"], stdout=subprocess.PIPE)
    child.stdout.read()  # its end: the process is over or about to be
    if os.path.exists(f"/proc/{child.pid}/stat"):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # over, but still in the table
        assert not is_alive(child.pid)
    child.wait()
    child.stdout.close()


def test_every_rank_reads_the_token_back(tmp_path):
    root = tmp_path / "a store's folder"
    write_token(root, "a1b2")
    check_token(root, "a1b2")
    remove_token(root, "a1b2")
    assert list(root.iterdir()) == []
    remove_token(root, "a1b2")


def test_a_folder_that_is_not_shared_is_told(tmp_path):
    waits: list[float] = []
    write_token(tmp_path / "here", "a1b2")
    for elsewhere in ("there", "here"):
        with pytest.raises(StoreError, match="not shared by all nodes.*every node mounts"):
            check_token(
                tmp_path / elsewhere,
                "a1b2" if elsewhere == "there" else "another",
                attempts=3,
                sleep=waits.append,
            )
    assert waits == [1.0] * 4


def test_a_slow_network_file_system_gets_time(tmp_path):
    check_token(tmp_path, "late", attempts=3, sleep=lambda seconds: write_token(tmp_path, "late"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(
        os,
        "replace",
        lambda *names: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
    )
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_write_errors_name_the_file_and_the_way_out(tmp_path):
    full = write_error(tmp_path / "x", OSError(errno.ENOSPC, "No space left on device"))
    assert (
        str(tmp_path / "x") in str(full)
        and "No space left" in str(full)
        and "free some space" in str(full)
    )
    assert "permissions" in str(
        write_error(tmp_path / "x", OSError(errno.EROFS, "Read-only file system"))
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be written"):
        write_token(tmp_path / "file" / "folder", "a")


def test_some_file_systems_know_no_fsync_of_folders(tmp_path, monkeypatch):
    def refuse(code):
        return lambda handle: (_ for _ in ()).throw(OSError(code, "refused"))

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    store_files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="refused"):
        store_files.sync_folder(tmp_path)
