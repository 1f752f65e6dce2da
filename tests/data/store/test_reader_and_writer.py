"""The store as a whole: bytes, resuming, sealing, and all that a writer or a reader refuses."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.augment.plan import RECIPE_VERSION
from data.store import LogitsStoreReader, LogitsStoreWriter, record_dtype
from data.store import format as store_format
from data.store import reader as store_reader
from data.store import writer as store_writer
from data.store.files import LockedError, StoreError
from data.store.format import (
    again,
    disk_need,
    epoch_bytes,
    identity_digest,
    num_blocks,
    pack_records,
)
from tests.support.helpers import ROOT
from tests.support.store_samples import (
    CLASSES,
    IMAGES,
    KEYS,
    K,
    batches,
    manifest,
    records_of,
    write_store,
)

EVERYONE = np.arange(IMAGES)


@pytest.fixture
def root(tmp_path) -> Path:
    """A path with a space and a quote."""
    return tmp_path / "a store's folder"


def writer_of(root: Path, **identity) -> LogitsStoreWriter:
    return LogitsStoreWriter(root, manifest(**identity), KEYS)


def raising(error: BaseException):
    def function(*arguments, **named):
        raise error

    return function


@pytest.mark.parametrize(
    ("k", "classes", "index", "size"),
    [(10, 1000, "<u2", 44), (1, 10, "<u2", 8), (100, 65536, "<u2", 404), (100, 65537, "<u4", 604)],
)
def test_a_record(k, classes, index, size):
    dtype = record_dtype(k, classes)
    assert dtype == np.dtype([("seed", "<i4"), ("index", index, (k,)), ("prob", "<f2", (k,))])
    assert dtype.itemsize == size


def test_packed_records_keep_every_value():
    records = pack_records(
        np.array([2**31 - 1]), np.array([[65535, 0]]), np.array([[1.0, 2.0**-24]]), 65536
    )
    assert records.tobytes() == struct.pack("<i2H2e", 2**31 - 1, 65535, 0, 1.0, 2.0**-24)


def test_the_bytes_of_a_store(root):
    """What docs/REPLAY.md promises, built by hand."""
    records = pack_records(
        np.array([10, 11, 12]),
        np.array([[1, 2], [3, 4], [5, 6]]),
        np.array([[0.5, 0.25]] * 3),
        CLASSES,
    )
    keys = ["a/b.jpg", "a/ü.jpg", "c/d e.jpg"]
    with LogitsStoreWriter(root, manifest(k=2), keys) as writer:
        writer.begin_epoch(12, rank=3)
        writer.append(np.array([2, 0]), records[[2, 0]])
        writer.append(np.array([1]), records[[1]])
        writer.seal(12, {"top1": np.float32(81.5), "top5": 95.25})
    assert sorted(path.name for path in root.iterdir()) == [
        "epoch_0012.json",
        "epoch_0012.npy",
        "keys.txt",
        "manifest.json",
    ]
    assert (root / "keys.txt").read_bytes() == "a/b.jpg\na/ü.jpg\nc/d e.jpg\n".encode()
    body = b"".join(
        struct.pack("<i2H2e", seed, 2 * i + 1, 2 * i + 2, 0.5, 0.25)
        for i, seed in enumerate((10, 11, 12))
    )
    data = (root / "epoch_0012.npy").read_bytes()
    length = struct.unpack("<H", data[8:10])[0]
    assert data[:8] == b"\x93NUMPY\x01\x00" and data[10 + length :] == body
    descr = "[('seed', '<i4'), ('index', '<u2', (2,)), ('prob', '<f2', (2,))]"
    assert (
        data[10 : 10 + length].decode().split()
        == f"{{'descr': {descr}, 'fortran_order': False, 'shape': (3,), }}".split()
    )
    stored = json.loads((root / "manifest.json").read_bytes())
    digest = hashlib.sha256((root / "keys.txt").read_bytes()).hexdigest()
    assert stored["format"] == 1 and stored["identity"] == json.loads(
        json.dumps(manifest(k=2)["identity"])
    ) | {"num_images": 3, "keys_sha256": digest}
    assert {**stored, "format": 1, "identity": 0} == {**manifest(), "format": 1, "identity": 0}
    seal = json.loads((root / "epoch_0012.json").read_bytes())
    identity = {name: stored[name] for name in ("format", "identity", "teacher")}
    assert seal == {
        "format": 1,
        "epoch": 12,
        "records": 3,
        "record_bytes": 12,
        "block_records": 65536,
        "sha256": [hashlib.sha256(body).hexdigest()],
        "identity_sha256": (
            hashlib.sha256(
                json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
            ).hexdigest()
        ),
        "teacher": {"top1": 81.5, "top5": 95.25},
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[bytes]:
    """The bytes of three epochs of an uninterrupted run."""
    reader = write_store(tmp_path_factory.mktemp("reference"), epochs=3)
    for epoch in range(3):  # numpy alone reads them
        records = np.load(reader.root / f"epoch_{epoch:04d}.npy", mmap_mode="r")
        np.testing.assert_array_equal(records, records_of(epoch, EVERYONE))
    return [(reader.root / f"epoch_{epoch:04d}.npy").read_bytes() for epoch in range(3)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_world_size_leaves_no_trace(root, reference, world):
    write_store(root, epochs=1, world=world)
    assert (root / "epoch_0000.npy").read_bytes() == reference[0]


def test_an_epoch_alone_equals_one_after_others(root, reference):
    with writer_of(root) as writer:
        writer.begin_epoch(2)
        writer.append(EVERYONE, records_of(2, EVERYONE))
        writer.seal(2)
    assert (root / "epoch_0002.npy").read_bytes() == reference[2]


@pytest.mark.parametrize("stretch", [1, 100, 301, 302])
def test_sealing_in_several_passes(root, reference, monkeypatch, stretch):
    for module in (store_format, store_writer):
        monkeypatch.setattr(module, "SEAL_RECORDS", 1)
    monkeypatch.setattr(store_writer, "ASSEMBLE_BYTES", stretch * record_dtype(K, CLASSES).itemsize)
    write_store(root, world=2)
    assert (root / "epoch_0000.npy").read_bytes() == reference[0]


def test_the_first_record_in_rank_file_offset_order_wins(root):
    def say(positions, value):
        records = records_of(0, np.asarray(positions))
        records["seed"] = value
        return np.asarray(positions), records

    writers = {}
    for rank, value in ((2, 20), (0, 1), (1, 10)):
        writers[rank] = writer_of(root)
        writers[rank].begin_epoch(0, rank)
        writers[rank].append(*say([5, 6, 5], value))  # twice in one block
        writers[rank].append(*say([6, 7 + rank], value + 1))
    writers[1].begin_epoch(0, 1)  # a later file of the same rank
    writers[1].append(*say(EVERYONE, 12))
    for writer in writers.values():
        writer.end_epoch()
    writers[0].seal(0)
    seeds = LogitsStoreReader(root).open_epoch(0)["seed"]
    assert seeds[:11].tolist() == [12, 12, 12, 12, 12, 1, 1, 2, 11, 12, 12]
    for writer in writers.values():
        writer.close()


def test_within_a_block_the_first_record_wins(root):
    with writer_of(root) as writer:
        records = records_of(0, np.append(EVERYONE, 5))
        records["seed"][-1] = 1
        writer.begin_epoch(0)
        writer.append(np.append(EVERYONE, 5), records)
        writer.seal(0)
    assert LogitsStoreReader(root).open_epoch(0)["seed"][5] == records["seed"][5] != 1


def test_what_is_missing_is_computed_and_nothing_else(root, reference):
    plan = batches(0)
    with writer_of(root) as writer:
        assert writer.missing(0).tolist() == list(range(IMAGES))
        writer.begin_epoch(0)
        for positions in plan[:4]:
            writer.append(positions, records_of(0, positions))
        expected = np.sort(np.concatenate(plan[4:]))
        assert writer.missing(0).tolist() == expected.tolist()  # also while the part is open
    with writer_of(root) as writer:
        assert (
            writer.missing(0).dtype == np.int64 and writer.missing(0).tolist() == expected.tolist()
        )
        with pytest.raises(
            StoreError,
            match=(
                rf"epoch 0 lacks {len(expected)} of {IMAGES} images \(the first: .*run"
                r" save_logits.py again"
            ),
        ):
            writer.seal(0)
        assert not list(root.glob("epoch_0000.npy*"))
        writer.begin_epoch(0)
        writer.append(expected, records_of(0, expected))
        writer.seal(0)
        assert writer.missing(0).tolist() == [] and writer.is_sealed(0)
        writer.seal(0)  # done already
        with pytest.raises(
            StoreError, match=r"epoch 0 is sealed already.*delete epoch_0000.npy and .json"
        ):
            writer.begin_epoch(0)
    assert (root / "epoch_0000.npy").read_bytes() == reference[0]


@pytest.mark.parametrize(
    ("owner", "name", "sealed"),
    [(os, "replace", []), (store_writer, "write_atomic", []), (shutil, "rmtree", [0])],
)
def test_a_crash_while_sealing(root, reference, monkeypatch, owner, name, sealed):
    writer = writer_of(root)
    writer.begin_epoch(0)
    writer.append(EVERYONE, records_of(0, EVERYONE))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, raising(KeyboardInterrupt()))
        writer.seal(0)
    writer.close()
    assert LogitsStoreReader(root).epochs() == sealed
    if not sealed:
        with pytest.raises(StoreError, match="epoch 0 is not sealed"):
            LogitsStoreReader(root).open_epoch(0)
        (root / "epoch_0000.npy.tmp-dead").write_bytes(b"left by another crash")
    again = writer_of(root)
    assert again.missing(0).tolist() == []
    again.seal(0)
    assert (root / "epoch_0000.npy").read_bytes() == reference[0]
    kept = "epoch_0000.json epoch_0000.npy keys.txt manifest.json".split()
    assert sorted(path.name for path in root.iterdir()) == kept


def test_what_a_crash_left_beside_a_sealed_epoch_is_cleared(root):
    write_store(root)
    parts = root / "epoch_0000.parts"
    parts.mkdir()
    (parts / "0000-00.part").write_bytes(b"whatever")
    with writer_of(root) as writer:
        assert writer.missing(0).tolist() == [] and list(parts.iterdir())  # asking removes nothing
        writer.clean_up(range(2))
    assert not parts.exists() and LogitsStoreReader(root).epochs() == [0]


# Begins an epoch, says so, waits for a line, and finishes it.
WRITER = """
import sys
import numpy as np
from data.store import LogitsStoreWriter
from tests.support.store_samples import IMAGES, KEYS, manifest, records_of
with LogitsStoreWriter(sys.argv[1], manifest(), KEYS) as writer:
    writer.begin_epoch(0)
    writer.append(np.arange(200), records_of(0, np.arange(200)))
    print("in", flush=True)
    sys.stdin.readline()
    writer.append(np.arange(200, IMAGES), records_of(0, np.arange(200, IMAGES)))
    writer.seal(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_second_job_is_kept_off_an_epoch_and_removes_nothing(root, reference):
    command, pipe = [sys.executable, "-c", WRITER, str(root)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as first:
        first.stdout.readline()
        with writer_of(root) as second:
            assert len(second.missing(0)) == IMAGES - 200
            # as if it had been sealed this moment, and its parts were still needed
            for name in ("epoch_0000.npy", "epoch_0000.json"):
                (root / name).touch()
            second.clean_up([0])
            for name in ("epoch_0000.npy", "epoch_0000.json"):
                (root / name).unlink()
            for call in (second.begin_epoch, second.seal):
                with pytest.raises(LockedError, match=rf"0000.lock: in use by process {first.pid}"):
                    call(0)
            second.begin_epoch(1)  # machines may share the work by epochs
        first.communicate("go on\n")
    assert first.returncode == 0 and not list(root.glob("*.lock"))
    assert (root / "epoch_0000.npy").read_bytes() == reference[0]


def test_another_rank_joins_where_it_sees_the_manifest_of_rank_0(root, tmp_path, reference):
    waits: list[float] = []
    writer = writer_of(root)
    writer.begin_epoch(0)
    hidden = (root / "manifest.json").rename(tmp_path / "hidden")

    def show(seconds: float) -> None:  # a network file system that takes its time
        waits.append(seconds)
        if len(waits) == 2:
            hidden.rename(root / "manifest.json")

    other = LogitsStoreWriter.join(root, writer.digest, sleep=show)
    other.begin_epoch(0, rank=1)
    other.append(EVERYONE, records_of(0, EVERYONE))
    other.close()
    writer.seal(0)
    assert waits == [1.0, 1.0] and (root / "epoch_0000.npy").read_bytes() == reference[0]
    writer_of(tmp_path / "foreign", base_seed=8)
    for folder in ("nowhere", "foreign"):
        with pytest.raises(StoreError, match="not shared by all nodes"):
            LogitsStoreWriter.join(tmp_path / folder, writer.digest, attempts=3, sleep=waits.append)
    assert len(waits) == 6 and not (tmp_path / "nowhere").exists()


def test_leaving_a_writer_hides_no_error(root, monkeypatch):
    with pytest.raises(KeyError, match="under way"), writer_of(root) as writer:
        writer.begin_epoch(0)
        monkeypatch.setattr(os, "fsync", raising(OSError(errno.EIO, "Input/output error")))
        raise KeyError("under way")
    assert not (root / "epoch_0000.lock").exists()


OPS = ["Crop(size=224)", "Flip()"]


def recipe(**more) -> dict:
    return {"AUG.SCALE": [0.08, 1.0], "AUG.REPROB": 0.25, **more}


@pytest.mark.parametrize("given", [{"ops": ["Crop(224)"]}, {"version": 2}])
def test_a_manifest_of_an_earlier_version_goes_on_as_it_stands(root, reference, given):
    """Its recipe has the reprs of its operations; today's says its version."""
    before = write_store(root, recipe=recipe(ops=OPS))
    data = (root / "manifest.json").read_bytes()
    assert before.manifest["identity"]["recipe"] == recipe(version=2)
    assert json.loads(data)["identity"]["recipe"] == recipe(ops=OPS)
    with writer_of(root, recipe=recipe(**given)) as writer:
        writer.begin_epoch(1)
        writer.append(EVERYONE, records_of(1, EVERYONE))
        writer.seal(1)
    assert (root / "manifest.json").read_bytes() == data
    reader = LogitsStoreReader(root)
    reader.check_epochs([0, 1])
    digests = {reader.seal(epoch)["identity_sha256"] for epoch in (0, 1)}
    assert digests == {identity_digest(data)}
    with pytest.raises(StoreError, match="AUG.REPROB is 0.25 there and 0.5 here"):
        writer_of(root, recipe=recipe(**{**given, "AUG.REPROB": 0.5}))


def test_a_recipe_of_a_later_version_is_refused(root):
    assert store_format.RECIPE_VERSION == RECIPE_VERSION  # the store imports no augmentation
    write_store(root, recipe=recipe(version=2))
    rewrite(root / "manifest.json", lambda made: made["identity"]["recipe"].update(version=3))
    for call in (lambda: LogitsStoreReader(root), lambda: writer_of(root)):
        with pytest.raises(StoreError, match="version 3, .* version 2: update the program"):
            call()


def test_records_that_can_not_be_right_are_refused(root):
    writer = writer_of(root)
    writer.begin_epoch(0)
    four = EVERYONE[:4]
    good = records_of(0, four)
    writer.append(four[:0], good[:0])
    bad = []
    for name, value in (("seed", -1), ("index", CLASSES), ("prob", np.nan), ("prob", np.inf)):
        spoiled = good.copy()
        spoiled[name][2] = value
        bad.append((four, spoiled, "position 2 has .* or run it in float32"))
    for positions, records, message in (
        (four[:3], good, "use pack_records"),
        (four.astype(float), good, "use pack_records"),
        (four[:, None], good[:, None], "use pack_records"),
        (four, good["seed"], "use pack_records"),
        (four, records_of(0, four, k=K - 1), "use pack_records"),
        ([0, 1, 2, IMAGES], good, "not all among its 301 images"),
        ([-1, 0, 1, 2], good, "not all among its 301 images"),
        *bad,
    ):
        with pytest.raises(StoreError, match=message):
            writer.append(positions, records)
    assert len(writer.missing(0)) == IMAGES
    writer.close()


@pytest.mark.parametrize(
    ("given", "keys", "message"),
    [
        ({"num_images": 5}, KEYS, "num_images 5, but it is 301 here"),
        ({"keys_sha256": "00"}, KEYS, "keys_sha256 '00', but"),
        ({"k": None}, KEYS, "both are needed"),
        ({"k": 11, "num_classes": 10}, KEYS, "1 <= k <= num_classes"),
        ({"k": 0}, KEYS, "1 <= k <= num_classes"),
        ({}, [], "no keys"),
        ({}, ["a", "a"], "stands twice"),
        ({}, ["a", ""], "is empty"),
    ],
)
def test_the_writer_checks_what_it_is_given(root, given, keys, message):
    with pytest.raises(StoreError, match=message):
        LogitsStoreWriter(root, manifest(**given), keys)
    assert not root.exists()


def test_the_writer_checks_the_format_and_the_place(root):
    with pytest.raises(StoreError, match="format 2, but it is 1 here"):
        LogitsStoreWriter(root, {**manifest(), "format": 2}, KEYS)
    root.write_text("")
    with pytest.raises(StoreError, match="can't be written.*check the mount"):
        writer_of(root / "store")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("identity.recipe.AUG_REPROB", 0.0, "AUG_REPROB is nothing there and 0.0 here"),
        ("identity.num_classes", 10, "identity.num_classes is 1000 there and 10 here"),
        ("identity.k", 3, "identity.k is 5 there and 3 here"),
        ("identity.base_seed", 8, "identity.base_seed is 7 there and 8 here"),
        ("identity.paired", None, "identity.paired is true there and nothing here"),
        ("teacher.weights_sha256", "cd" * 32, "weights_sha256 is abab.* there and cdcd.*"),
        ("teacher.dtype", "float16", "teacher.dtype is float32 there and float16 here"),
        ("proof.canary.jpeg", "33", r"does not augment as .* \(jpeg of the canary differ\)"),
        ("proof.images.sha256", ["aa", "cc"], r"1 of 2 sampled images differ .*position 9\)"),
    ],
)
def test_a_resumed_writer_must_be_the_same(root, where, value, message):
    writer_of(root)
    made = manifest()
    *sections, name = where.split(".")
    section = made
    for key in sections:
        section = section[key]
    section[name] = value
    with pytest.raises(StoreError, match=message):
        LogitsStoreWriter(root, made, KEYS)


def test_information_may_differ_between_writers(root):
    writer_of(root)
    made = manifest()
    made["info"], made["proof"] = {"versions": {"numpy": "1.26"}}, {}
    assert LogitsStoreWriter(root, made, KEYS).manifest["info"] == manifest()["info"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([*KEYS, "new.jpg"], "1 added: 'new.jpg'"),
        (KEYS[:-1], '1 removed: "class 10'),
        ([KEYS[1], KEYS[0], *KEYS[2:]], "reordered"),
    ],
)
def test_a_resumed_writer_must_have_the_same_images(root, keys, message):
    writer_of(root)
    with pytest.raises(StoreError, match=f"was begun with other images: {message}"):
        LogitsStoreWriter(root, manifest(), keys)


def test_a_part_of_another_identity_is_never_mixed_in(root, tmp_path):
    for folder, seed in ((root, 7), (tmp_path / "other", 8)):
        writer = writer_of(folder, base_seed=seed)
        writer.begin_epoch(0)
        writer.append(EVERYONE, records_of(0, EVERYONE))
        writer.close()
    part = next((tmp_path / "other" / "epoch_0000.parts").iterdir())
    shutil.copy(part, root / "epoch_0000.parts" / part.name)
    with pytest.raises(StoreError, match="belongs to another store"):
        writer_of(root).seal(0)


def test_the_disk_need(root, monkeypatch):
    size, position = 24, 8
    assert epoch_bytes(IMAGES, K, CLASSES) == IMAGES * size
    assert [disk_need(IMAGES, K, CLASSES, epochs) // IMAGES for epochs in range(3)] == [
        0,
        2 * size + position,
        3 * size + position,
    ]
    free = [10**9]
    usage = shutil.disk_usage(root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    writer = writer_of(root)
    writer.check_disk(range(100))
    free[0] = IMAGES * (2 * size + position)
    with pytest.raises(
        StoreError,
        match=(
            r"writing 2 epochs of 301 images with top-5 needs 24.08 kB, 16.86 kB are free: free"
            r" some"
        ),
    ):
        writer.check_disk(range(2))
    writer.begin_epoch(0)
    writer.append(EVERYONE[:200], records_of(0, EVERYONE[:200]))
    writer.end_epoch()
    free[0] -= sum(path.stat().st_size for path in (root / "epoch_0000.parts").iterdir())
    with pytest.raises(StoreError, match="writing 1 epoch of"):
        writer.begin_epoch(1)
    writer.begin_epoch(0)  # what is written already needs no room
    writer.append(EVERYONE, records_of(0, EVERYONE))
    free[0] = 0
    writer.seal(0)
    writer.check_disk([0])
    writer.close()


def test_a_full_disk_while_sealing(root, reference, monkeypatch):
    writer = writer_of(root)
    writer.begin_epoch(0)
    writer.append(EVERYONE, records_of(0, EVERYONE))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(
            StoreError,
            match=r"epoch_0000.npy: can't be written \(No space left on device\).*free some space",
        ):
            writer.seal(0)
    assert not list(root.glob("epoch_0000.npy*"))
    writer.seal(0)
    assert (root / "epoch_0000.npy").read_bytes() == reference[0]
    writer.close()


def test_reading(root):
    reader = write_store(root, epochs=2, world=2)
    assert (reader.k, reader.num_classes, len(reader)) == (K, CLASSES, IMAGES)
    assert reader.epochs() == [0, 1] and list(reader.keys) == KEYS
    records = reader.open_epoch(1)
    assert isinstance(records, np.memmap) and not records.flags.writeable
    expected = records_of(1, EVERYONE)
    for chosen in (5, slice(7, 30), np.array([[200, 3], [3, 300]]), -1):
        np.testing.assert_array_equal(records[chosen], expected[chosen])
    reader.check_epochs(range(2))
    reader.check_epochs([])
    assert not any(reader.faults(0)) and reader.seal(1)["teacher"] == {"top1": 51.0}


def test_a_reader_travels_as_its_path(root):
    reader = write_store(root)
    reader.open_epoch(0), reader.keys
    data = pickle.dumps(reader)
    assert len(data) < 300 + len(str(root))
    other = pickle.loads(data)
    np.testing.assert_array_equal(other.open_epoch(0), reader.open_epoch(0))
    assert other.manifest == reader.manifest


def test_opening_reads_neither_records_nor_keys(root, monkeypatch):
    write_store(root)
    (root / "keys.txt").unlink()  # not needed to read records
    assert (
        LogitsStoreReader(root).open_epoch(0)["seed"][3] == records_of(0, np.array([3]))["seed"][0]
    )


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_that_is_no_store(root, tmp_path):
    with pytest.raises(
        StoreError,
        match=(
            r"a store's folder is no logits store: manifest.json can't be read .*correct the path"
        ),
    ):
        LogitsStoreReader(root)
    (root / "logits_top10_epoch0").mkdir(parents=True)
    with pytest.raises(
        StoreError, match=r"the original's layout: read it with UpstreamStoreReader"
    ):
        LogitsStoreReader(root)


def test_a_newer_format_is_refused(root):
    write_store(root)
    message = "has format 2, this program knows format 1: update the program"
    rewrite(root / "epoch_0000.json", lambda seal: seal.update(format=2))
    with pytest.raises(StoreError, match=f"epoch_0000.json: {message}"):
        LogitsStoreReader(root).open_epoch(0)
    rewrite(root / "manifest.json", lambda made: made.update(format=2, identity="something new"))
    for call in (LogitsStoreReader, writer_of):
        with pytest.raises(StoreError, match=f"manifest.json: the store {message}"):
            call(root)


@pytest.mark.parametrize(
    ("name", "value"),
    [(None, ""), (None, "{"), (None, "[]"), (None, "{}"), ("k", 0), ("k", None)]
    + [("num_images", "many"), ("keys_sha256", ""), ("keys_sha256", "../../" * 11)]
    + [("k", CLASSES + 1), ("num_images", 10**30), ("num_images", 1e999), ("recipe", "none")]
    + [(None, "[" * 100_000), ("recipe", {"version": "two"})],
)
def test_a_spoiled_manifest_is_refused(root, name, value):
    write_store(root)
    if name is None:
        (root / "manifest.json").write_text(value)
    else:
        rewrite(root / "manifest.json", lambda made: made["identity"].update({name: value}))
    with pytest.raises(StoreError, match="is no manifest of a logits store .*restore the file"):
        LogitsStoreReader(root)


def test_a_truncated_or_longer_epoch_is_refused(root):
    reader = write_store(root)
    path = root / "epoch_0000.npy"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-24], whole[:100], b"", whole + b"\0"):
        path.write_bytes(data)
        for call in (
            lambda: reader.open_epoch(0),
            lambda: reader.check_epochs([0]),
            lambda: list(reader.faults(0)),
        ):
            with pytest.raises(
                StoreError,
                match=r"epoch_0000.npy: .*truncated or.*delete epoch_0000.npy and .json and",
            ):
                call()


def test_an_epoch_of_another_k_is_refused(root, tmp_path):
    write_store(root)
    write_store(tmp_path / "other", k=4)
    shutil.copy(tmp_path / "other" / "epoch_0000.npy", root)
    with pytest.raises(
        StoreError,
        match=r"its records are .*\(4,\).*the manifest's top-5 are .*belongs to another store",
    ):
        LogitsStoreReader(root).open_epoch(0)


def test_missing_epochs_are_told_before_the_first_batch(root):
    reader = write_store(root, epochs=4)
    (root / "epoch_0002.json").unlink()
    assert reader.epochs() == [0, 1, 3]
    with pytest.raises(
        StoreError,
        match=r"epochs 2, 4-6 are missing \(sealed: 0-1, 3\): save .*REUSE_EPOCHS True, or train",
    ):
        reader.check_epochs(range(7))
    with pytest.raises(
        StoreError, match=r"epoch 2 is not sealed \(sealed: 0-1, 3\): run save_logits.py"
    ):
        reader.open_epoch(2)


def test_an_epoch_sealed_under_another_manifest_is_refused(root, tmp_path):
    write_store(root)
    write_store(tmp_path / "other", base_seed=8)
    for name in ("epoch_0000.npy", "epoch_0000.json"):
        shutil.copy(tmp_path / "other" / name, root)
    with pytest.raises(
        StoreError,
        match=(
            r"epoch_0000.json: the epoch was sealed under another manifest: restore manifest.json"
        ),
    ):
        LogitsStoreReader(root).check_epochs([0])


def test_a_seal_that_says_something_else_is_refused(root):
    reader = write_store(root)
    path = root / "epoch_0000.json"
    whole = path.read_bytes()
    rewrite(path, lambda seal: seal.update(records=300))
    with pytest.raises(StoreError, match="seals 300 records of epoch 0, the manifest says 301"):
        reader.open_epoch(0)
    nested = b"[" * 100_000
    number = whole.replace(b'"format": 1', b'"format": 1e999')
    text = whole.replace(b'"format": 1', b'"format": "one"')
    for data in (b"", whole[:20], b"[]", b'{"sha256": 5}', nested, number, text):
        path.write_bytes(data)
        with pytest.raises(
            StoreError, match=r"epoch_0000.json: can't be understood .*save that epoch again"
        ):
            reader.open_epoch(0)


@pytest.mark.parametrize("position", [0, 99, 100, 300])
def test_a_flipped_bit_is_found_and_its_block_named(root, monkeypatch, position):
    for module in (store_format, store_writer, store_reader):
        monkeypatch.setattr(module, "SEAL_RECORDS", 100)
    reader = write_store(root)
    path = root / "epoch_0000.npy"
    data = bytearray(path.read_bytes())
    data[len(data) - (IMAGES - position) * 24 + 13] ^= 4
    path.write_bytes(data)
    low = position // 100 * 100
    found = list(reader.faults(0))
    assert len(found) == num_blocks(IMAGES) == 4
    (message,) = filter(None, found)
    assert message.startswith(
        f"{path}: block {position // 100} is damaged (records {low} to {min(low + 99, 300)}):"
        " delete epoch_0000.npy"
    )


def test_records_that_changed_their_places_are_found(root):
    reader = write_store(root)
    path = root / "epoch_0000.npy"
    data = path.read_bytes()
    path.write_bytes(data[: -IMAGES * 24] + data[-24:] + data[-IMAGES * 24 : -24])
    reader.open_epoch(0)
    assert "block 0 is damaged" in next(reader.faults(0))


def test_epochs_that_changed_their_names_are_found(root):
    reader = write_store(root, epochs=2)
    exchange(root / "epoch_0000.npy", root / "epoch_0001.npy")
    assert all(reader.faults(0)) and all(reader.faults(1))
    exchange(root / "epoch_0000.json", root / "epoch_0001.json")
    with pytest.raises(StoreError, match="epoch_0000.json: seals 301 records of epoch 1"):
        next(reader.faults(0))


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index", CLASSES),
        ("prob", np.nan),
        ("prob", -0.25),
        ("prob", 1.5),
        ("prob", np.inf),
        ("prob", [0.25, 0.5, 0, 0, 0]),
        ("seed", -1),
    ],
)
def test_a_sealed_record_that_no_teacher_gives_is_found_with_its_image(
    root, monkeypatch, name, value
):
    """Its checksum is right: so a writer with a fault of its own would seal it."""
    for module in (store_format, store_writer, store_reader):
        monkeypatch.setattr(module, "SEAL_RECORDS", 100)
    monkeypatch.setattr(store_writer, "impossible", lambda *given: "")
    with writer_of(root) as writer:
        writer.begin_epoch(0)
        records = records_of(0, EVERYONE)
        records[name][207] = value
        writer.append(EVERYONE, records)
        writer.seal(0)
    path = root / "epoch_0000.npy"
    assert list(LogitsStoreReader(root).faults(0)) == [
        "",
        "",
        f"{path}: the record of {KEYS[207]} has a class from {CLASSES:,} up, probabilities that do"
        f" not descend from 1 to 0, or a negative seed: {again(0)}",
        "",
    ]


def test_what_float16_makes_of_probabilities_is_no_fault(root):
    records = records_of(0, EVERYONE)
    records["prob"][:4] = [[1, 0, 0, 0, 0], [0.5] * 5, [2**-24] * 5, [0] * 5]
    with writer_of(root) as writer:
        writer.begin_epoch(0)
        writer.append(EVERYONE, records)
        writer.seal(0)
    assert not any(LogitsStoreReader(root).faults(0))


def test_a_file_that_is_cut_short_while_it_is_read_is_told(root):
    reader = write_store(root)
    records, faults = reader.open_records(0), reader.faults(0)
    assert records[300].tobytes() == records_of(0, EVERYONE[300:]).tobytes()
    os.truncate(root / "epoch_0000.npy", 4096)
    assert records[3] == records_of(0, EVERYONE)[3]
    with pytest.raises(StoreError, match=r"epoch_0000.npy: ends before .* truncated, restore it"):
        records[300]
    with pytest.raises(StoreError, match="truncated"):
        next(faults)


HEADERS = {
    "unfinished": lambda data: data.replace(b"}", b"("),
    "nested": lambda data: data[:10] + b"(" * 118 + data[128:],
    "no text": lambda data: data[:10] + bytes(118) + data[128:],
    "a key": lambda data: data.replace(b"'descr'", b"'desct'"),
    "another type": lambda data: data.replace(b"'<f2'", b"'|O'"),
    "more": lambda data: data.replace(b"'shape': (301,)", b"'shape': (9e9)"),
    "version": lambda data: data[:6] + b"\7" + data[7:],
    "a zip file": lambda data: b"PK\3\4" + data[4:],
    "a pickle": lambda data: b"\x80\4N." + data[4:],
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_is_told_in_a_line(root, name):
    reader = write_store(root)
    path = root / "epoch_0000.npy"
    spoiled = HEADERS[name](path.read_bytes())
    assert spoiled != path.read_bytes()
    path.write_bytes(spoiled)
    for call in (lambda: reader.check_epochs([0]), lambda: next(reader.faults(0))):
        with pytest.raises(StoreError, match=r"epoch_0000.npy: .*delete epoch_0000.npy and"):
            call()


def test_spoiled_keys_are_refused(root):
    reader = write_store(root)
    path = root / "keys.txt"
    path.write_text(path.read_text().replace("00005.jpg", "00005.jpe"))
    with pytest.raises(
        StoreError, match=r"keys.txt: is not the file that the manifest names .*restore it"
    ):
        len(reader.keys)
    path.write_text("a\nb\n")
    with pytest.raises(StoreError, match=r"keys.txt: is not .* \(its 2 lines or .*restore it"):
        len(reader.keys)
