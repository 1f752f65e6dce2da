"""A small file system of a process's own, for tests of disks that are full or can't be written."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.helpers import run_ranks

NEW_NAMESPACE = 0x20000  # of mounts; flags of unshare(2)
NEW_USER = 0x10000000
READ_ONLY = 1  # flags of mount(2)
REMOUNT = 32
RECURSIVE_PRIVATE = 0x44000

needs_mounts = pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")


def call(function, *args) -> None:
    if function(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def mount_small(folder: Path, kilobytes: int) -> Callable[[int], None]:
    """Give this process a tmpfs of its own on a folder; returns what changes its flags."""
    system = ctypes.CDLL(None, use_errno=True)
    # before they become those of nobody
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    try:
        call(system.unshare, NEW_NAMESPACE)
    except OSError:
        call(system.unshare, NEW_NAMESPACE | NEW_USER)
        for name, text in maps.items():
            Path(f"/proc/self/{name}").write_text(text)
    call(system.mount, None, b"/", None, RECURSIVE_PRIVATE, None)
    options = f"size={kilobytes}k".encode()

    def mount(flags: int) -> None:
        call(system.mount, b"tmpfs", bytes(folder), b"tmpfs", flags, options)

    mount(0)
    return lambda flags: mount(REMOUNT | flags)


def alone(function: Callable, *args: object) -> dict:
    """What a function gives in a process of its own; skips where that may not mount."""
    result = run_ranks(function, 1, *args)[0]
    if "skip" in result:
        pytest.skip(
            f"no file system can be mounted here, also not in a user namespace: {result['skip']}"
        )
    return result
