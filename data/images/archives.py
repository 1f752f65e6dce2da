"""Archives read at random by many processes: members of tar and zip files at offsets."""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.images.reading import IMAGE_SUFFIXES, CorruptImage
from data.store.files import read_at

TAR_BLOCK = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstandard

# What stands before a zip member's data: signature, version, flags, method, time, date, checksum,
# sizes packed and unpacked, lengths of the name and of the extra field, which follow.
ZIP_HEADER = struct.Struct("<4s5H3L2H")
ENCRYPTED = 1  # flags
SIZES_BEHIND = 8
NOWHERE = (-1, 0)  # the span of a member that was not found


def is_image(path: str) -> bool:
    """Whether a path names an image; hidden files and what lies in hidden folders do not count."""
    return path.lower().endswith(IMAGE_SUFFIXES) and not path.startswith(".") and "/." not in path


class Member(NamedTuple):
    """An image or a folder in a tar file."""

    name: str
    offset: int  # of the data, in bytes
    size: int  # -1 for a folder


def tar_members(path: Path, is_wanted: Callable[[str], bool] = is_image) -> Iterator[Member]:
    """The images, or what else is wanted, and the folders of a plain tar file.

    One that is damaged, compressed or unsafe is an error.
    """
    length = path.stat().st_size
    for member in _tar_entries(path, length):
        name = str(PurePosixPath(member.name))
        if member.name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(
                f"{path}: member {member.name!r} points outside of the archive: make the"
                " tar again with relative paths"
            )
        if member.isdir():
            yield Member(name, 0, -1)
        elif is_wanted(name):
            _check_member(path, member, length)
            yield Member(name, member.offset_data, member.size)


def _tar_entries(path: Path, length: int) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else a large archive fills the memory
                if member.size < 0:  # then the next member is one that was read already
                    raise tarfile.ReadError(f"member {member.name!r} has a negative size")
                yield member
            end = tar.offset
    # the library believes whatever sizes a damaged header names
    except (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:
        reason = f"{str(error) or 'no memory holds a member'}: restore it"
        if read_at(path, 0, 6).startswith(COMPRESSED):
            reason = "it is compressed, and single images can't be read from it: unpack it"
        raise ValueError(f"{path}: can't be read as a tar: {reason}") from None
    # the library takes a damaged header for the end
    if read_at(path, end, TAR_BLOCK) != bytes(TAR_BLOCK):
        raise ValueError(
            f"{path}: the tar is truncated or damaged at byte {end:,} of {length:,}: restore it"
        )


def _check_member(path: Path, member: tarfile.TarInfo, length: int) -> None:
    if not member.isreg() or member.issparse():
        raise ValueError(
            f"{path}: member {member.name} is a link or has holes: make the tar again with"
            " --dereference --hard-dereference"
        )
    end = member.offset_data + member.size
    if end > length:
        raise ValueError(
            f"{path}: the tar is truncated: member {member.name} ends at byte {end:,}, the file at"
            f" {length:,}: restore it"
        )


def zip_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each member of a zip file lies: offset of its header, bytes from there to the next."""
    with _opened_zip(path) as file:
        members = sorted(file.infolist(), key=lambda member: member.header_offset)
    borders = [*(member.header_offset for member in members), path.stat().st_size]
    return {
        member.filename: (start, end - start)
        for member, (start, end) in zip(members, pairwise(borders))
    }


def read_zip_member(path: Path, name: str, span: tuple[int, int]) -> bytes:
    """The bytes of a zip file's member, which lies in this span as `zip_spans` found it.

    A member that does not lie there, or is of an unusual kind, is looked for by name, which takes
    as long as decoding an image.
    """
    try:
        data = None if span == NOWHERE else _unpacked(read_at(path, *span), name.encode())
        if data is None:
            with _opened_zip(path) as file:
                data = file.read(name)
        return data
    except FileNotFoundError:
        raise ValueError(
            f"{path}: there is no such zip file: restore it, or take its class out of the list of"
            " names"
        ) from None
    except KeyError:
        raise CorruptImage(
            f"{path}: has no member {name}: DATA.FNAME_FORMAT must fit, or the name must leave the"
            " list"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise CorruptImage(
            f"{path}: member {name} can't be read ({error}): restore the zip file"
        ) from None


def _opened_zip(path: Path) -> zipfile.ZipFile:
    if path.is_fifo():  # opening one would wait for ever
        raise zipfile.BadZipFile("it is a pipe")
    return zipfile.ZipFile(path)


def _unpacked(block: bytes, name: bytes) -> bytes | None:
    """The data of a zip member that begins with its header; None if zipfile has to look into it."""
    if len(block) < ZIP_HEADER.size:
        return None
    signature, _, flags, method, _, _, checksum, packed, size, name_length, extra_length = (
        ZIP_HEADER.unpack_from(block)
    )
    begin = ZIP_HEADER.size + name_length + extra_length
    is_plain = (
        signature == b"PK\3\4"
        and block.startswith(name, ZIP_HEADER.size)
        and name_length == len(name)
        and not flags & (ENCRYPTED | SIZES_BEHIND)
        and method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        and begin + packed <= len(block)  # not so where the sizes have 64 bits
    )
    if not is_plain:
        return None
    data = block[begin : begin + packed]
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    if len(data) != size or zlib.crc32(data) != checksum:
        raise zipfile.BadZipFile("its bytes do not fit their checksum")
    return data
