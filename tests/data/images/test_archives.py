"""Members of tar and zip files, read at random by several processes."""

import multiprocessing
import os
import pickle
import zipfile
from pathlib import Path

import pytest

from data.images.archives import TarBytes, ZipFolder, is_image, tar_members
from data.images.reading import CorruptImage
from tests.support.images import write_tar

CONTENTS = {f"{i:03d}.jpeg": bytes([i % 256]) * (i * 37 % 2000 + 1) for i in range(120)}


def write_zip(
    path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.comment = comment
        for name, data in members.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("comment", [b"", b"of class n00007846", b"x" * 65535])
def test_zip_members_of_any_kind(tmp_path, method, comment):
    write_zip(tmp_path / "a.zip", CONTENTS, method, comment)
    folder = ZipFolder(tmp_path)
    assert {name: folder.read("a.zip", name) for name in reversed(CONTENTS)} == CONTENTS


def test_a_name_within_other_names_is_not_confused(tmp_path):
    members = {
        "1.jpeg": b"a",
        "x/1.jpeg": b"b",
        "11.jpeg": b"c",
        "1.jpeg.jpeg": b"d",
        "x/x/1.jpeg": b"e",
    }
    for order in (list(members), list(reversed(members))):
        write_zip(tmp_path / "a.zip", {name: members[name] for name in order})
        folder = ZipFolder(tmp_path)
        assert {name: folder.read("a.zip", name) for name in members} == members


def test_the_last_of_two_zip_members_of_one_name_counts(tmp_path):
    write_zip(tmp_path / "a.zip", {"1.jpeg": b"old", "2.jpeg": b"x"})
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "a") as file,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        file.writestr("1.jpeg", b"new")
    assert ZipFolder(tmp_path).read("a.zip", "1.jpeg") == b"new"


def test_zip_files_with_something_in_front_and_with_64_bit_sizes(tmp_path):
    write_zip(tmp_path / "a.zip", CONTENTS)
    (tmp_path / "front.zip").write_bytes(b"#!/bin/sh\n" + (tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as file:
        for name, data in CONTENTS.items():
            with file.open(name, "w", force_zip64=True) as member:
                member.write(data)
    folder = ZipFolder(tmp_path)
    for archive in ("front.zip", "large.zip"):
        assert all(folder.read(archive, name) == data for name, data in CONTENTS.items())


def test_only_the_most_recently_used_zip_files_stay_open(tmp_path):
    for i in range(8):
        write_zip(tmp_path / f"{i}.zip", {"1.jpeg": bytes([i])})
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    folder = ZipFolder(tmp_path, limit=3)
    for i in [0, 1, 2, 0, 3, 4, 0, 5, 6, 7, 0]:
        assert folder.read(f"{i}.zip", "1.jpeg") == bytes([i])
    assert list(folder._open) == ["6.zip", "7.zip", "0.zip"]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 3
    del folder
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_wrong_with_a_zip_file_is_named(tmp_path):
    write_zip(tmp_path / "a.zip", CONTENTS)
    folder = ZipFolder(tmp_path)
    with pytest.raises(
        CorruptImage,
        match=(
            r"a.zip: has no member x.jpeg: DATA.FNAME_FORMAT must fit, or the name must leave the"
            r" list"
        ),
    ):
        folder.read("a.zip", "x.jpeg")
    with pytest.raises(
        ValueError, match=r"b.zip: there is no such zip file: restore it, or take its class out"
    ) as error:
        folder.read("b.zip", "x.jpeg")
    assert not isinstance(error.value, CorruptImage)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.find(CONTENTS["100.jpeg"])
    data[place] ^= 1
    (tmp_path / "damaged.zip").write_bytes(data)
    with pytest.raises(
        CorruptImage,
        match=r"damaged.zip: member 100.jpeg can't be read \(.*checksum.*\): restore the zip file",
    ):
        folder.read("damaged.zip", "100.jpeg")
    assert folder.read("damaged.zip", "099.jpeg") == CONTENTS["099.jpeg"]
    for name, content in (
        ("cut.zip", data[:-3000]),
        ("empty.zip", b""),
        ("text.zip", b"not found" * 50),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            CorruptImage,
            match=rf"{name}: member 001.jpeg can't be read \(.*\): restore the zip file",
        ):
            folder.read(name, "001.jpeg")


def test_damaged_deflated_data_is_named(tmp_path):
    write_zip(tmp_path / "a.zip", {"1.jpeg": os.urandom(500) + bytes(500)}, zipfile.ZIP_DEFLATED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[40:200] = b"\xff" * 160
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(CorruptImage, match=r"member 1.jpeg can't be read"):
        ZipFolder(tmp_path).read("a.zip", "1.jpeg")


def test_an_encrypted_member_is_named(tmp_path):
    data = bytearray(write_zip(tmp_path / "a.zip", {"1.jpeg": b"secret"}).read_bytes())
    data[6] |= 1
    data[data.find(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(CorruptImage, match=r"member 1.jpeg can't be read \(.*encrypted.*\)"):
        ZipFolder(tmp_path).read("a.zip", "1.jpeg")


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "a.tar", CONTENTS)


def test_tar_members_by_offset(tar):
    reader = TarBytes(tar)
    assert {name: reader.read(offset, size) for name, offset, size in tar_members(tar)} == CONTENTS


def test_a_tar_that_became_shorter_is_named(tar):
    *_, last = tar_members(tar)
    os.truncate(tar, last.offset + last.size - 1)
    with pytest.raises(ValueError, match=r"a.tar: ends before byte .*truncated, restore it"):
        TarBytes(tar).read(last.offset, last.size)


def test_systems_without_reads_at_an_offset(tar, monkeypatch):
    monkeypatch.delattr(os, "pread", raising=False)
    reader = TarBytes(tar)
    assert all(
        reader.read(offset, size) == CONTENTS[name] for name, offset, size in tar_members(tar)
    )


def read_all(reader, places, queue) -> None:
    queue.put([reader.read(*place) for _ in range(5) for place in places])


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["tar", "zip", "tar without pread"])
def test_many_processes_read_at_once(tmp_path, tar, start, kind, monkeypatch):
    if "without" in kind:
        if start == "spawn":
            pytest.skip("a patch does not reach a spawned process")
        monkeypatch.delattr(os, "pread", raising=False)
    if kind == "zip":
        write_zip(tmp_path / "a.zip", CONTENTS)
        reader, places = ZipFolder(tmp_path), [("a.zip", name) for name in CONTENTS]
    else:
        reader, places = TarBytes(tar), [member[1:] for member in tar_members(tar)]
    expected = list(CONTENTS.values())
    assert reader.read(*places[0]) == expected[0]  # open before the processes start
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    count = 4 if start == "fork" else 2
    processes = [
        context.Process(target=read_all, args=(reader, places, queue)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert results == [expected * 5] * count
    assert reader.read(*places[7]) == expected[7]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_readers_pickle_as_their_paths(tmp_path, tar, kind):
    write_zip(tmp_path / "a.zip", CONTENTS)
    reader, place = (
        (TarBytes(tar), (1024 + 512, 38))
        if kind == "tar"
        else (ZipFolder(tmp_path), ("a.zip", "001.jpeg"))
    )
    first = reader.read(*place)
    packed = pickle.dumps(reader)
    assert len(packed) < 400 and pickle.loads(packed).read(*place) == first


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("a/1.jpg", True),
        ("1.JPEG", True),
        ("a.b/1.PnG", True),
        (".a/1.jpg", False),
        ("a/.1.jpg", False),
        ("a/1.jpg.txt", False),
        ("a/jpg", False),
    ],
)
def test_what_counts_as_an_image(path, is_one):
    assert is_image(path) is is_one
