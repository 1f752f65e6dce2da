"""Members of tar and zip files, read at random by several processes."""

import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from data.images import archives
from data.images.archives import (
    NOWHERE,
    is_image,
    read_zip_member,
    tar_members,
    zip_spans,
)
from data.images.reading import CorruptImage
from data.store.files import FileBytes
from tests.support.images import in_processes, write_tar, write_zip

CONTENTS = {f"{i:03d}.jpeg": bytes([i % 256]) * (i * 37 % 2000 + 1) for i in range(120)}


def read_zip(path: Path, names=CONTENTS) -> dict[str, bytes]:
    spans = zip_spans(path)
    return {name: read_zip_member(path, name, spans.get(name, NOWHERE)) for name in names}


@pytest.fixture
def found_by_name(monkeypatch) -> list[str]:
    """The names of members for which zipfile had to be asked."""
    asked = []
    read = zipfile.ZipFile.read
    monkeypatch.setattr(
        archives.zipfile.ZipFile,
        "read",
        lambda file, name: asked.append(name) or read(file, name),
    )
    return asked


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("comment", [b"", b"x" * 65535])
@pytest.mark.parametrize("front", [b"", b"#!/bin/sh\n"])
def test_zip_members_of_any_kind(tmp_path, found_by_name, method, comment, front):
    path = write_zip(tmp_path / "a.zip", CONTENTS, method, comment)
    path.write_bytes(front + path.read_bytes())
    assert read_zip(path) == CONTENTS
    assert len(found_by_name) == (len(CONTENTS) if method == zipfile.ZIP_BZIP2 else 0)


class Pipe:
    """A file that can't be rewound, so that zipfile writes sizes and checksums behind the data."""

    def __init__(self, file) -> None:
        self.write = file.write
        self.flush = file.flush


@pytest.mark.parametrize("kind", ["64-bit sizes", "sizes behind the data"])
def test_unusual_zip_files_are_read_by_zipfile(tmp_path, found_by_name, kind):
    path = tmp_path / "a.zip"
    with open(path, "wb") as target:
        is_pipe = kind == "sizes behind the data"
        with zipfile.ZipFile(Pipe(target) if is_pipe else target, "w") as file:
            for name, data in CONTENTS.items():
                with file.open(name, "w", force_zip64=not is_pipe) as member:
                    member.write(data)
    assert read_zip(path) == CONTENTS and found_by_name == list(CONTENTS)


@pytest.mark.parametrize("first", [{}, {"a.jpeg.jpeg": b"3"}, {"a": b"3"}])
def test_a_zip_file_that_changed_is_still_read_by_name(tmp_path, found_by_name, first):
    before = {"a.jpeg": b"1" * 20, "b.jpeg": b"2" * 20}
    spans = zip_spans(write_zip(tmp_path / "a.zip", before))
    path = write_zip(tmp_path / "a.zip", {**first, **dict(reversed(before.items()))})
    assert {name: read_zip_member(path, name, spans[name]) for name in before} == before
    assert found_by_name == list(before)


def test_names_within_other_names_and_names_given_twice(tmp_path):
    members = {"1.jpeg": b"a", "x/1.jpeg": b"b", "11.jpeg": b"c", "1.jpeg.jpeg": b"d"}
    for order in (members, reversed(members)):
        path = write_zip(tmp_path / "a.zip", {name: members[name] for name in order})
        assert read_zip(path, members) == members
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("1.jpeg", b"new")
    assert read_zip(path, members) == {**members, "1.jpeg": b"new"}


def damaged(data: bytes, name: str) -> bytes:
    changed = bytearray(data)
    changed[data.find(CONTENTS[name], data.find(name.encode()))] ^= 1
    return bytes(changed)


def encrypted(data: bytes) -> bytes:
    changed = bytearray(data)
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        changed[data.find(signature) + flags] |= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (lambda data: data, "x.jpeg", "has no member x.jpeg: DATA.FNAME_FORMAT must fit"),
        (lambda data: damaged(data, "100.jpeg"), "100.jpeg", r"can't be read \(.*checksum"),
        (encrypted, "000.jpeg", r"can't be read \(.*encrypted"),
        (lambda data: data[: len(data) // 2], "119.jpeg", "can't be read"),
        (lambda data: b"", "001.jpeg", "can't be read"),
        (lambda data: b"not found" * 5000, "001.jpeg", "can't be read"),
    ],
    ids=["absent", "damaged", "encrypted", "cut", "empty", "text"],
)
def test_what_is_wrong_with_a_zip_file_is_named(tmp_path, damage, name, message):
    path = write_zip(tmp_path / "a.zip", CONTENTS)
    span = zip_spans(path).get(name, NOWHERE)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptImage, match=rf"a\.zip: .*{message}"):
        read_zip_member(path, name, span)


def test_damaged_deflated_data_is_named(tmp_path):
    name, method = "1.jpeg", zipfile.ZIP_DEFLATED
    path = write_zip(tmp_path / "a.zip", {name: os.urandom(500) + bytes(500)}, method)
    span = zip_spans(path)[name]
    data = path.read_bytes()
    path.write_bytes(data[:40] + b"\xff" * 160 + data[200:])
    with pytest.raises(CorruptImage, match=r"member 1.jpeg can't be read"):
        read_zip_member(path, name, span)


def test_a_zip_file_that_is_gone_is_no_corrupt_image(tmp_path):
    with pytest.raises(ValueError, match=r"b.zip: there is no such zip file") as error:
        read_zip_member(tmp_path / "b.zip", "x.jpeg", (0, 100))
    assert not isinstance(error.value, CorruptImage)


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "a.tar", CONTENTS)


def read_tar(reader: FileBytes, members: list) -> list[bytes]:
    return [reader.read(offset, size) for _, offset, size in members]


@pytest.mark.parametrize("has_pread", [True, False])
def test_tar_members_by_offset(tar, monkeypatch, has_pread):
    if not has_pread:
        monkeypatch.delattr(os, "pread", raising=False)
    members = list(tar_members(tar))
    assert [member.name for member in members] == list(CONTENTS)
    assert read_tar(FileBytes(tar), members) == list(CONTENTS.values())


def test_a_tar_that_became_shorter_is_named(tar):
    *_, last = tar_members(tar)
    os.truncate(tar, last.offset + last.size - 1)
    with pytest.raises(ValueError, match=r"a.tar: ends before byte .*truncated, restore it"):
        FileBytes(tar).read(last.offset, last.size)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_many_processes_read_one_tar_at_once(tar, start):
    members = list(tar_members(tar))
    reader, expected = FileBytes(tar), list(CONTENTS.values())
    assert read_tar(reader, members) == expected  # open before the processes start
    assert in_processes(read_tar, 3, reader, members * 5, start=start) == [expected * 5] * 3
    assert read_tar(reader, members) == expected
    assert len(pickle.dumps(reader)) < 300


@pytest.mark.parametrize("path", ["a/1.jpg", "1.JPEG", "a.b/1.PnG"])
def test_what_counts_as_an_image(path):
    assert is_image(path)


@pytest.mark.parametrize("path", [".a/1.jpg", "a/.1.jpg", "a/1.jpg.txt", "a/jpg"])
def test_what_does_not_count_as_an_image(path):
    assert not is_image(path)


# ---- tar files that can't be used


def all_members(path: Path) -> list:
    return list(tar_members(path))


@pytest.mark.parametrize("name", ["/etc/a/1.jpg", "../a/1.jpg", "a/../../1.jpg", "a/.."])
def test_a_tar_member_outside_of_the_archive_is_an_error(tmp_path, name):
    path = write_tar(tmp_path / "bad.tar", {"a/0.jpg": b"0", name: b"1"})
    with pytest.raises(ValueError, match=r"bad.tar: member .* points outside of the archive"):
        all_members(path)


def test_a_tar_cut_anywhere_is_an_error(tmp_path):
    members = {"a/0.jpg": b"0" * 700, "a/1.jpg": b"1" * 700}
    path = write_tar(tmp_path / "cut.tar", members, format=tarfile.USTAR_FORMAT)
    data = path.read_bytes()
    end = 2 * (512 + 1024)  # two members: header and data in blocks of 512 bytes
    assert not any(data[end:])
    for length in [*range(0, end + 512, 100), 512, 1536, 1536 + 512, end]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut.tar: .*restore it"):
            all_members(path)
    path.write_bytes(data[: end + 512])
    assert len(all_members(path)) == 2


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "bad.tar", {"a/0.jpg": b"0", "a/1.jpg": b"1", "a/2.jpg": b"2"})
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 0xFF  # in the checksum of the second header
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"truncated or damaged at byte 1,024 .*restore it"):
        all_members(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "restore it"),
        (b"no tar at all" * 100, "restore it"),
        (bytes(100), "restore it"),
        (b"\x1f\x8b" + bytes(600), "it is compressed.*unpack it"),
    ],
)
def test_what_is_no_plain_tar_is_an_error(tmp_path, data, message):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x.tar: can't be read as a tar: .*{message}"):
        all_members(tmp_path / "x.tar")


def sized(header: bytes, size: int, kind: bytes) -> bytes:
    """A member's header with another size (of any sign) and kind, and the checksum of that."""
    number = b"\xff" if size < 0 else b"\x80"
    changed = header[:124] + number + size.to_bytes(11, "big", signed=True)
    changed += b" " * 20 + kind + header[157:]  # time of change and checksum
    return changed[:148] + b"%06o\0 " % sum(changed) + changed[156:]


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (-512, tarfile.REGTYPE),  # the next member is the one before, for ever
        (-(1 << 60), tarfile.REGTYPE),
        (1 << 80, tarfile.XHDTYPE),
        (1 << 80, tarfile.GNUTYPE_LONGNAME),
        (1 << 50, tarfile.GNUTYPE_LONGNAME),
        (-1, tarfile.XHDTYPE),
    ],
)
def test_sizes_that_no_file_has_are_an_error(tmp_path, size, kind):
    path = write_tar(tmp_path / "bad.tar", {"a/0.jpg": b"0", "a/1.jpg": b"1"})
    data = path.read_bytes()
    path.write_bytes(data[:1024] + sized(data[1024:1536], size, kind) + data[1536:])
    with pytest.raises(ValueError, match=r"bad.tar: can't be read as a tar: .*: restore it"):
        for count, _ in enumerate(tar_members(path)):
            assert count < 9


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_sparse_members_are_named(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/link.jpg")
        info.type = kind
        info.linkname = "0.jpg"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"member a/link.jpg is a link or has holes"):
        all_members(tmp_path / "x.tar")
