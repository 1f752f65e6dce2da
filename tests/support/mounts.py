"""A small file system of a process's own, for tests of disks that are full or can't be written."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.helpers import run_ranks

NEW_NAMESPACE, NEW_USER, READ_ONLY, REMOUNT, RECURSIVE_PRIVATE = 0x20000, 0x10000000, 1, 32, 0x44000

needs_mounts = pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")


def call(function, *args) -> None:
    if function(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def mount_small(folder: Path, kilobytes: int) -> Callable[[int], None]:
    """Give this process a tmpfs of its own on a folder; returns a function that changes its flags."""
    system = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    try:
        call(system.unshare, NEW_NAMESPACE)
    except OSError:
        call(system.unshare, NEW_NAMESPACE | NEW_USER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text)
    call(system.mount, None, b"/", None, RECURSIVE_PRIVATE, None)
    options = f"size={kilobytes}k".encode()
    call(system.mount, b"tmpfs", bytes(folder), b"tmpfs", 0, options)
    return lambda flags: call(
        system.mount, b"tmpfs", bytes(folder), b"tmpfs", REMOUNT | flags, options
    )


def alone(function: Callable, *args: object) -> dict:
    """What a function gives in a process of its own; skips where that may not mount."""
    result = run_ranks(function, 1, *args)[0]
    if "skip" in result:
        pytest.skip(
            f"no file system can be mounted here, also not in a user namespace: {result['skip']}"
        )
    return result
