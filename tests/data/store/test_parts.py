"""Parts: what a crash leaves of them, and when they are durable."""

import errno
import os
import struct
import zlib

import numpy as np
import pytest

from data.store import parts as store_parts
from data.store.files import StoreError
from data.store.format import record_dtype
from data.store.parts import PartWriter, part_files, read_blocks

DTYPE = record_dtype(2, 1000)
IDENTITY = bytes(range(32))
IMAGES = 100


def some(*positions: int) -> tuple[np.ndarray, np.ndarray]:
    records = np.zeros(len(positions), DTYPE)
    records["seed"] = np.array(positions) * 3
    records["prob"] = 0.25
    return np.array(positions), records


def written(folder, *blocks, rank=0, epoch=4) -> PartWriter:
    writer = PartWriter(folder, epoch, rank, DTYPE, IDENTITY)
    for block in blocks:
        writer.append(*some(*block))
    writer.close()
    return writer


def positions_in(path, epoch=4, identity=IDENTITY, images=IMAGES) -> list[list[int]]:
    blocks = list(read_blocks(path, epoch, DTYPE, identity, images))
    for block in blocks:
        np.testing.assert_array_equal(block.records, some(*block.positions)[1])
    return [block.positions.tolist() for block in blocks]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "epoch's parts"


def test_the_bytes_of_a_part(folder):
    path = written(folder, (5, 1)).path
    head = b"BLK\n" + struct.pack("<I", 2) + struct.pack("<qq", 5, 1)
    body = b"".join(struct.pack("<i2H2e", seed, 0, 0, 0.25, 0.25) for seed in (15, 3))
    expected = (
        b"TVPART\x01\n"
        + struct.pack("<II", 4, 12)
        + IDENTITY
        + head
        + body
        + struct.pack("<I", zlib.crc32(head + body))
    )
    assert path.read_bytes() == expected
    assert path.name.startswith("0000-") and path.suffix == ".part"


def test_blocks_come_back_in_order(folder):
    assert positions_in(written(folder, (5, 1), (7,), (99, 0, 3)).path) == [[5, 1], [7], [99, 0, 3]]
    assert positions_in(written(folder).path) == []


def test_parts_are_sorted_by_rank_then_age(folder):
    names = [written(folder, rank=rank).path.name for rank in (10, 2, 0, 2, 12345)]
    assert [path.name for path in part_files(folder)] == [names[i] for i in (2, 1, 3, 0, 4)]


def test_a_torn_tail_is_cut_wherever_it_was_torn(folder):
    path = written(folder, (5, 1), (7, 8)).path
    whole = path.read_bytes()
    second = len(whole) - (8 + 2 * (8 + DTYPE.itemsize) + 4)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        expected = [] if length < second else [[5, 1]]
        assert positions_in(path) == expected, length


def test_what_follows_damage_does_not_count(folder):
    path = written(folder, (5, 1), (7, 8), (9,)).path
    whole = path.read_bytes()
    header, block = 48, 8 + 2 * (8 + DTYPE.itemsize) + 4
    for offset in range(header, header + 2 * block):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        assert positions_in(path) == ([] if offset < header + block else [[5, 1]]), offset
    path.write_bytes(whole + bytes(4096))  # blocks of the file system that were never filled
    assert positions_in(path) == [[5, 1], [7, 8], [9]]
    # a length beyond the file is not allocated
    path.write_bytes(whole[:header] + struct.pack("<4sI", b"BLK\n", 2**32 - 1))
    assert positions_in(path) == []


@pytest.mark.parametrize("wrong", [{"epoch": 5}, {"identity": bytes(32)}])
def test_a_part_of_another_store_is_an_error(folder, wrong):
    path = written(folder, (5,)).path
    with pytest.raises(
        StoreError, match=r"belongs to another store, epoch or format: move it away"
    ):
        positions_in(path, **wrong)


def test_positions_beyond_the_images_are_an_error(folder):
    with pytest.raises(StoreError, match="beyond the store's 5 images"):
        positions_in(written(folder, (5,)).path, images=5)


def test_after_a_failed_write_the_part_goes_on(folder, monkeypatch):
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY)
    writer.append(*some(1, 2))
    true_write = os.write

    def half(handle, data):
        true_write(handle, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StoreError, match="No space left on device.*free some space"):
        writer.append(*some(3, 4))
    # short writes are no errors
    monkeypatch.setattr(os, "write", lambda handle, data: true_write(handle, data[:7]))
    writer.append(*some(5, 6))
    writer.close()
    assert positions_in(writer.path) == [[1, 2], [5, 6]]


def failing(*arguments):
    raise OSError(errno.EIO, "Input/output error")


def test_if_a_failed_write_can_not_be_undone_nothing_more_is_appended(folder, monkeypatch):
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        patch.setattr(os, "ftruncate", failing)
        with pytest.raises(StoreError, match="Input/output error"):
            writer.append(*some(1))
    for call in (lambda: writer.append(*some(2)), writer.close):
        with pytest.raises(StoreError, match="Input/output error"):
            call()
    writer.close()


def test_a_folder_that_can_not_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't be written"):
        PartWriter(tmp_path / "file", 4, 0, DTYPE, IDENTITY)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, [1, 2, 3]), (1e9, [0, 0, 1])])
def test_appending_syncs_when_it_is_due_and_closing_always(folder, monkeypatch, seconds, expected):
    monkeypatch.setattr(store_parts, "SYNC_SECONDS", seconds)
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    counts = []
    for call in (lambda: writer.append(*some(1)), lambda: writer.append(*some(2)), writer.close):
        call()
        counts.append(len(synced))
    assert counts == expected


def test_a_sync_that_fails_stays_an_error(folder, monkeypatch):
    """A second sync would succeed although the data is gone."""
    monkeypatch.setattr(store_parts, "SYNC_SECONDS", 0.0)
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StoreError, match="Input/output error"):
            writer.append(*some(1))
    for call in (lambda: writer.append(*some(2)), writer.close):
        with pytest.raises(StoreError, match="Input/output error"):
            call()
