"""Parts: what a crash leaves of them, and the thread that feeds them."""

import errno
import os
import struct
import threading
import zlib

import numpy as np
import pytest

from data.store.files import StoreError
from data.store.format import record_dtype
from data.store.parts import SYNC_SECONDS, AsyncAppender, PartWriter, part_files, read_blocks

DTYPE = record_dtype(2, 1000)
IDENTITY = bytes(range(32))
IMAGES = 100


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


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
    assert [path.name for path in part_files(folder)] == [
        names[2],
        names[1],
        names[3],
        names[0],
        names[4],
    ]


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


def test_if_a_failed_write_can_not_be_undone_nothing_more_is_appended(folder, monkeypatch):
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY)
    fail = lambda *arguments: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        patch.setattr(os, "ftruncate", fail)
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


@pytest.fixture
def synced(monkeypatch):
    """The handles that were synced."""
    handles: list[int] = []
    monkeypatch.setattr(os, "fsync", handles.append)
    return handles


def test_appending_syncs_when_it_is_due(folder, synced):
    clock = Clock()
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY, clock)
    synced.clear()
    for now, expected in (
        (1, 0),
        (SYNC_SECONDS - 1, 0),
        (SYNC_SECONDS, 1),
        (SYNC_SECONDS + 5, 1),
        (2 * SYNC_SECONDS + 5, 2),
    ):
        clock.now = now
        writer.append(*some(1))
        assert len(synced) == expected, now
    writer.append(*some(2))
    writer.close()
    assert len(synced) == 3


def test_ticking_syncs_also_while_nothing_is_appended(folder, synced):
    clock = Clock()
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY, clock)
    synced.clear()
    writer.append(*some(1))
    writer.tick()
    assert len(synced) == 0
    clock.now = SYNC_SECONDS / 2
    writer.tick()
    assert len(synced) == 1
    clock.now = 10 * SYNC_SECONDS
    writer.tick()  # nothing new to sync
    assert len(synced) == 1
    writer.close()
    writer.tick()
    assert len(synced) == 1


def test_a_sync_that_fails_in_the_background_surfaces_and_stays(folder, monkeypatch):
    clock = Clock()
    writer = PartWriter(folder, 4, 0, DTYPE, IDENTITY, clock)
    writer.append(*some(1))
    clock.now = SYNC_SECONDS
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            "fsync",
            lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
        )
        writer.tick()
    for call in (lambda: writer.append(*some(2)), lambda: writer.append(*some(3)), writer.close):
        with pytest.raises(StoreError, match="Input/output error"):
            call()


class Slow:
    """An appender that waits for a test, then notes or fails."""

    def __init__(self, fail_at: int = -1) -> None:
        self.go, self.seen, self.fail_at = threading.Event(), [], fail_at

    def append(self, positions, records) -> None:
        assert self.go.wait(30)
        if len(self.seen) == self.fail_at:
            raise StoreError("the disk is full")
        self.seen.append((positions, records))


def test_batches_are_written_in_order_by_another_thread():
    slow = Slow()
    slow.go.set()
    with AsyncAppender(slow, depth=2) as appender:
        for i in range(20):
            appender.append(
                i, (lambda i=i: ("made", i, threading.current_thread().name)) if i % 2 else i
            )
        appender.flush()
        assert [positions for positions, _ in slow.seen] == list(range(20))
    assert slow.seen[4][1] == 4 and slow.seen[5][1] == ("made", 5, "store-append")


def test_at_most_depth_batches_wait():
    slow = Slow()
    appender = AsyncAppender(slow, depth=2)
    appender.append(0, 0)
    handed_over: list[int] = []

    def feed() -> None:
        for i in range(1, 6):
            appender.append(i, i)
            handed_over.append(i)

    feeder = threading.Thread(target=feed)
    feeder.start()
    while len(handed_over) < 2:
        pass
    feeder.join(0.2)
    assert feeder.is_alive() and len(handed_over) <= 3  # one with the thread, two in the queue
    slow.go.set()
    feeder.join()
    appender.close()
    assert len(slow.seen) == 6


def test_an_error_in_the_thread_stops_the_caller_at_once():
    slow = Slow(fail_at=1)
    appender = AsyncAppender(slow, depth=1)
    slow.go.set()
    with pytest.raises(StoreError, match="the disk is full"):
        for i in range(1000):  # the queue never blocks, although nothing is written any more
            appender.append(i, i)
    for call in (appender.flush, appender.close, appender.close):
        with pytest.raises(StoreError, match="the disk is full"):
            call()
    assert len(slow.seen) == 1


def test_an_error_is_not_hidden_by_leaving_and_hides_none():
    slow = Slow(fail_at=0)
    slow.go.set()
    with (
        pytest.raises(StoreError, match="the disk is full"),
        AsyncAppender(slow, depth=4) as appender,
    ):
        appender.append(0, 0)
    slow = Slow(fail_at=0)
    slow.go.set()
    with pytest.raises(KeyError), AsyncAppender(slow, depth=4) as appender:
        appender.append(0, 0)
        raise KeyError("the error under way")
