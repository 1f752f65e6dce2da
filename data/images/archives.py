"""Archives read at random by many processes: members of one tar file by offset, members of many zip
files by name.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.images.reading import IMAGE_SUFFIXES, CorruptImage

TAR_BLOCK = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstandard
OPEN_ZIPS = 64  # a process; ImageNet-22k has 21,841
# signature, disks and entry counts, size and offset of the directory, length of the comment
ZIP_END = struct.Struct("<4s4H2LH")
ZIP_ENTRY = struct.Struct("<4s6H3L5H2L")  # an entry of the directory; its name follows
ZIP_LOCAL = struct.Struct("<4s5H3L2H")  # what stands before a member's data
ZIP_COMMENT = 65535  # the longest
STORED, DEFLATED, ENCRYPTED = 0, 8, 1


def is_image(path: str) -> bool:
    """Whether a path names an image; hidden files and what lies in hidden folders do not count."""
    return path.lower().endswith(IMAGE_SUFFIXES) and not path.startswith(".") and "/." not in path


class Member(NamedTuple):
    """An image or a folder in a tar file."""

    name: str
    offset: int  # of the data, in bytes
    size: int  # -1 for a folder


def tar_members(path: Path) -> Iterator[Member]:
    """The images and folders of a plain tar file; one that is damaged, compressed or unsafe is an
    error.
    """
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else a large archive fills the memory
                name = str(PurePosixPath(member.name))
                if member.name.startswith("/") or ".." in PurePosixPath(name).parts:
                    raise ValueError(
                        f"{path}: member {member.name!r} points outside of the archive: "
                        "make the tar again with relative paths"
                    )
                if member.isdir():
                    yield Member(name, 0, -1)
                elif is_image(name):
                    _check_image(path, member, length)
                    yield Member(name, member.offset_data, member.size)
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            # the library takes a damaged header for the end
            if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
                raise ValueError(
                    f"{path}: the tar is truncated or damaged at byte {end:,} of {length:,}:"
                    " restore it"
                )
    except (tarfile.TarError, EOFError) as error:
        with open(path, "rb") as file:
            packed = file.read(6).startswith(COMPRESSED)
        why = (
            "it is compressed, and single images can't be read from it: unpack it"
            if packed
            else f"{error}: restore it"
        )
        raise ValueError(f"{path}: can't be read as a tar: {why}") from None


def _check_image(path: Path, member: tarfile.TarInfo, length: int) -> None:
    if not member.isreg() or member.issparse():
        raise ValueError(
            f"{path}: member {member.name} is a link or has holes: make the tar again with"
            " --dereference --hard-dereference"
        )
    if member.offset_data + member.size > length:
        raise ValueError(
            f"{path}: the tar is truncated: member {member.name} ends at byte"
            f" {member.offset_data + member.size:,}, the file at {length:,}: restore it"
        )


class TarBytes:
    """Members of a tar file by offset, from any number of threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle, self._owner = -1, 0

    def __getstate__(self) -> dict:
        return {"path": self.path, "_handle": -1, "_owner": 0}

    def __del__(self) -> None:
        if self._owner == os.getpid():
            os.close(self._handle)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; a file that has become shorter is an error."""
        if self._owner != os.getpid():
            self._handle, self._owner = _open(self.path), os.getpid()
        data = _read(self._handle, offset, size)
        if len(data) != size:
            raise ValueError(
                f"{self.path}: ends before byte {offset + size:,}: the tar is truncated, restore it"
            )
        return data


class ZipFolder:
    """Members of many zip files in one folder; for each process the most recently used ones stay
    open.

    With many more files than stay open nearly every read opens one, so a file's directory is
    searched as bytes (zipfile parses all of its entries, which takes as long as decoding an image).
    """

    def __init__(self, folder: Path, limit: int = OPEN_ZIPS) -> None:
        self.folder, self.limit = folder, limit
        # handle and directory, b"" for zipfile to parse
        self._open: OrderedDict[str, tuple[int, bytes]] = OrderedDict()
        self._owner = os.getpid()

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "limit": self.limit, "_open": OrderedDict(), "_owner": 0}

    def __del__(self) -> None:
        if self._owner == os.getpid():
            for handle, _ in self._open.values():
                os.close(handle)

    def read(self, archive: str, member: str) -> bytes:
        """The bytes of a member of `archive`."""
        path = self.folder / archive
        try:
            handle, directory = self._opened(archive)
            data = _zip_member(handle, directory, member) if directory else None
            if data is None:  # an unusual file: 64-bit sizes, another compression
                with zipfile.ZipFile(path) as file:
                    data = file.read(member)
            return data
        except FileNotFoundError:
            raise ValueError(
                f"{path}: there is no such zip file: restore it, or take its class out of the list"
                " of names"
            ) from None
        except KeyError:
            raise CorruptImage(
                f"{path}: has no member {member}: DATA.FNAME_FORMAT must fit, or the name must"
                " leave the list"
            ) from None
        except (
            OSError,
            ValueError,
            NotImplementedError,
            RuntimeError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
        ) as error:
            raise CorruptImage(
                f"{path}: member {member} can't be read ({error}): restore the zip file"
            ) from None

    def _opened(self, archive: str) -> tuple[int, bytes]:
        if self._owner != os.getpid():
            self._open, self._owner = OrderedDict(), os.getpid()
        if archive not in self._open:
            handle = _open(self.folder / archive)
            self._open[archive] = handle, _zip_directory(handle)
        self._open.move_to_end(archive)
        if len(self._open) > self.limit:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[archive]


def _zip_directory(handle: int) -> bytes:
    """The directory of a zip file, b"" if it is not of the simple kind."""
    length = os.fstat(handle).st_size
    begin = max(0, length - ZIP_COMMENT - ZIP_END.size)
    tail = _read(handle, begin, length - begin)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + ZIP_END.size:
        return b""
    _, disk, first, entries, total, size, offset, _ = ZIP_END.unpack_from(tail, at)
    if (
        disk
        or first
        or entries != total
        or 0xFFFF in (entries, total)
        or offset + size != begin + at
    ):
        return b""
    return tail[offset - begin : at] if offset >= begin else _read(handle, offset, size)


def _zip_member(handle: int, directory: bytes, member: str) -> bytes | None:
    """The bytes of a member; None if it has to be looked for, or unpacked, in another way."""
    name = member.encode()
    at = directory.rfind(name)  # of two members of one name the last counts
    if at < ZIP_ENTRY.size:
        return None
    (
        signature,
        _,
        _,
        flags,
        method,
        _,
        _,
        checksum,
        packed,
        size,
        name_length,
        _,
        _,
        _,
        _,
        _,
        offset,
    ) = ZIP_ENTRY.unpack_from(directory, at - ZIP_ENTRY.size)
    is_plain = (
        signature == b"PK\1\2"
        and name_length == len(name)
        and method in (STORED, DEFLATED)
        and not flags & ENCRYPTED
    )
    if not is_plain or 0xFFFFFFFF in (packed, size, offset):
        return None
    local = _read(handle, offset, ZIP_LOCAL.size)
    signature, *_, name_length, extra_length = ZIP_LOCAL.unpack(local)
    data = _read(handle, offset + ZIP_LOCAL.size + name_length + extra_length, packed)
    data = zlib.decompress(data, -zlib.MAX_WBITS) if method == DEFLATED else data
    if signature != b"PK\3\4" or len(data) != size or zlib.crc32(data) != checksum:
        raise zipfile.BadZipFile("its bytes do not fit the directory's checksum")
    return data


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def _read(handle: int, offset: int, size: int) -> bytes:
    """Bytes at an offset: fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(handle, size, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, size)
