"""Staging: copies that are verified, shared by the processes of a machine, and deleted when they
are no longer needed.
"""

import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from data.store import stage as store_stage
from data.store.files import this_process
from data.store.reader import LogitsStoreReader, StoreError
from data.store.stage import EpochStager
from tests.support.store_samples import IMAGES, records_of, write_store

EVERYONE = np.arange(IMAGES)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "a slow store's folder", epochs=4)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "local disk"


def staged(stager: EpochStager) -> list[str]:
    return sorted(path.name for path in stager.folder.iterdir())


def files(*epochs: int) -> list[str]:
    return sorted(f"epoch_{epoch:04d}.{ending}" for epoch in epochs for ending in ("json", "npy"))


def wait(stager: EpochStager, epoch: int) -> None:
    stager._copies[epoch].result(timeout=30)


def test_the_current_and_the_next_epoch_are_kept(store, folder):
    stager = EpochStager(store, folder)
    for epoch in range(4):
        following = epoch + 1 if epoch < 3 else None
        stager.advance(epoch, following)
        records = stager.reader.open_epoch(epoch)
        assert Path(records.filename).is_relative_to(folder) and stager.is_staged(epoch)
        np.testing.assert_array_equal(records, records_of(epoch, EVERYONE))
        if following is not None:
            wait(stager, following)
        assert staged(stager) == files(*([epoch, following] if following is not None else [epoch]))
    stager.advance(0)  # a longer run begins again
    assert staged(stager) == files(0)


def test_the_reader_falls_back_to_the_store_and_travels(store, folder):
    stager = EpochStager(store, folder)
    stager.advance(0)
    other = pickle.loads(pickle.dumps(stager.reader))
    for epoch, place in ((0, folder), (1, store.root)):
        records = other.open_epoch(epoch)
        assert Path(records.filename).is_relative_to(place)
        np.testing.assert_array_equal(records, records_of(epoch, EVERYONE))


def test_copies_of_an_earlier_run_are_used_again(store, folder):
    copied: list[int] = []
    EpochStager(store, folder, copied.append).advance(0)
    EpochStager(store, folder, copied.append).advance(0)
    assert len(copied) == 1


def test_two_stores_do_not_meet(store, folder, tmp_path):
    other = write_store(tmp_path / "other", base_seed=8)
    first, second = EpochStager(store, folder), EpochStager(other, folder)
    first.advance(0)
    second.advance(0)
    assert first.folder != second.folder and staged(first) == staged(second) == files(0)


def test_processes_of_a_machine_copy_once(store, folder, monkeypatch):
    monkeypatch.setattr(store_stage, "POLL_SECONDS", 0.001)
    copied: list[int] = []
    stagers = [EpochStager(store, folder, copied.append) for _ in range(4)]
    threads = [threading.Thread(target=stager.advance, args=(1, 2)) for stager in stagers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stager in stagers:
        wait(stager, 2)
    assert copied == [(store.root / "epoch_0001.npy").stat().st_size] * 2
    assert staged(stagers[0]) == files(1, 2)


def test_a_lock_that_a_dead_process_left_is_no_hindrance(store, folder):
    stager = EpochStager(store, folder)
    stager.folder.mkdir(parents=True)
    holder = this_process("dead")._replace(pid=2**22 + 1)
    (stager.folder / "epoch_0000.lock").write_text(json.dumps(holder._asdict()))
    (stager.folder / "epoch_0000.npy.tmp-dead").write_bytes(b"half a copy")
    (stager.folder / "epoch_0000.npy").write_bytes(b"a copy without its seal")
    stager.advance(0)
    assert staged(stager) == files(0)


def test_the_copy_runs_in_the_background_and_is_waited_for(store, folder):
    go, chunks = threading.Event(), []

    def gate(size: int) -> None:
        if len(chunks) == 1:
            assert go.wait(30)
        chunks.append(size)

    stager = EpochStager(store, folder, gate)
    stager.advance(0, 1)
    assert not stager.is_staged(1)  # advance came back, although the copy is held up
    waiting = threading.Thread(target=stager.advance, args=(1,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    go.set()
    waiting.join(30)
    assert stager.is_staged(1) and staged(stager) == files(1)


def test_a_damaged_epoch_is_not_staged(store, folder):
    path = store.root / "epoch_0001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    stager = EpochStager(store, folder)
    stager.advance(0, 1)
    for _ in range(2):  # each try copies again
        with pytest.raises(
            StoreError,
            match=(
                r"epoch_0001.npy: the copy in .* is not what was sealed: run `python -m"
                r" tools.logits verify`"
            ),
        ):
            stager.advance(1, 2)
    shutil.copy(write_store(store.root.parent / "again", epochs=2).root / "epoch_0001.npy", path)
    stager.advance(1)
    assert stager.is_staged(1)


def test_a_full_or_unwritable_disk_is_told(store, folder, monkeypatch):
    usage = shutil.disk_usage(folder.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
        with pytest.raises(
            StoreError,
            match=(
                r"an epoch of the store takes 7.22 kB, 0.01 kB are free \(two .*DISTILL.STAGE_DIR"
            ),
        ):
            EpochStager(store, folder).advance(0)
    (folder.parent / "file").write_text("")
    with pytest.raises(StoreError, match="file.*can't be written"):
        EpochStager(store, folder.parent / "file").advance(0)


def test_closing_ends_a_copy_under_way(store, folder, monkeypatch):
    monkeypatch.setattr(store_stage, "CHUNK_BYTES", 100)
    stager = EpochStager(store, folder, lambda size: stager.close())
    stager.advance(0)
    assert not stager.is_staged(0) and staged(stager) == []


def test_the_staged_reader_still_checks_the_store(store, folder):
    stager = EpochStager(store, folder)
    with pytest.raises(StoreError, match="epochs 4 are missing"):
        stager.reader.check_epochs(range(5))
    with pytest.raises(StoreError, match="epoch 9 is not sealed"):
        stager.advance(9)
    assert isinstance(stager.reader, LogitsStoreReader)
