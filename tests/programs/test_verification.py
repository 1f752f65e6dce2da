"""What happens to a store after it was sealed never becomes a target: each fault is one line."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.store import LogitsStoreReader, LogitsStoreWriter
from data.store import writer as store_writer
from tests.support import saving
from tests.support.training import checkpoint, job, run, updates

SHORT = "DATA.SHAPES.TRAIN_IMAGES 24 TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0"  # 3 updates an epoch
NAMED = "DISTILL.TEACHER_LOGITS_PATH"
RECORD = 44  # bytes, of top-10


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    """A store of two epochs of 24 images; nobody changes it."""
    root = tmp_path_factory.mktemp("sealed") / "store"
    assert saving.run(root, SHORT) == 0
    return root


@pytest.fixture
def store(sealed, tmp_path) -> Path:
    """That store for a test that spoils it."""
    return Path(shutil.copytree(sealed, tmp_path / "store"))


@pytest.fixture
def original(store, tmp_path) -> Path:
    """Its records in the original's layout."""
    reader = LogitsStoreReader(store)
    epochs = {epoch: np.array(reader.open_epoch(epoch)) for epoch in reader.epochs()}
    saving.write_upstream(tmp_path / "original", epochs)
    return tmp_path / "original"


def fault(capsys, *args, program=run, **how) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    assert program(*args, **how) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def change(path: Path, function) -> None:
    """Change the records of a sealed epoch and nothing else."""
    data = path.read_bytes()
    head, body = data[: -24 * RECORD], bytearray(data[-24 * RECORD :])
    path.write_bytes(head + bytes(function(body)))


def flip(body: bytearray) -> bytearray:
    body[100] ^= 1
    return body


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


SPOILED = {
    "flipped": lambda root: change(root / "epoch_0000.npy", flip),
    "rolled": lambda root: change(root / "epoch_0000.npy", lambda b: b[RECORD:] + b[:RECORD]),
    "swapped": lambda root: exchange(root / "epoch_0000.npy", root / "epoch_0001.npy"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_epoch_ends_a_training_before_its_first_step(name, store, tmp_path, capsys):
    SPOILED[name](store)
    line = fault(capsys, tmp_path, SHORT, NAMED, store)
    assert f"{store}/epoch_0000.npy: block 0 is damaged (records 0 to 23): delete" in line
    assert not checkpoint(tmp_path).exists()


def test_the_next_epoch_is_verified_meanwhile_and_not_read(store, tmp_path, capsys):
    change(store / "epoch_0001.npy", flip)
    line = fault(capsys, tmp_path, SHORT, NAMED, store, "DATA.NUM_WORKERS 1")
    assert "epoch_0001.npy: block 0 is damaged" in line and len(updates(tmp_path)) == 3


def test_who_does_not_want_it_reads_what_is_there(store, tmp_path):
    change(store / "epoch_0000.npy", flip)
    assert run(tmp_path, SHORT, NAMED, store, "DISTILL.VERIFY False") == 0


def test_each_epoch_is_verified_once(store, tmp_path, monkeypatch):
    seen, faults = [], LogitsStoreReader.faults
    monkeypatch.setattr(
        LogitsStoreReader,
        "faults",
        lambda self, epoch: (seen.append(epoch), faults(self, epoch))[1],
    )
    opts = "TRAIN.EPOCHS 5 DISTILL.REUSE_EPOCHS True"
    assert run(tmp_path, SHORT, NAMED, store, opts) == 0
    assert seen == [0, 1]


# A rank that read an epoch before rank 0 is through with it would not find the file.
ORDERED = """
import os, time
from pathlib import Path
from data.replay import ReplayDataset
from data.store import LogitsStoreReader
faults, opened = LogitsStoreReader.faults, LogitsStoreReader.open_records

def slow(self, epoch):
    assert rank == 0
    time.sleep(0.5)
    yield from faults(self, epoch)
    Path(os.environ["DONE"], str(epoch)).touch()

def checked(self, epoch):
    assert Path(os.environ["DONE"], str(epoch)).exists(), f"epoch {epoch} is read too early"
    return opened(self, epoch)

LogitsStoreReader.faults, LogitsStoreReader.open_records = slow, checked
"""


def test_one_process_verifies_for_all_and_a_fault_ends_all_with_one_line(store, tmp_path):
    change(store / "epoch_0001.npy", flip)
    opts = [SHORT, NAMED, store, "DATA.BATCH_SIZE 4"]
    env = {"DONE": str(tmp_path)}
    with job(tmp_path, *opts, world=2, prepare=ORDERED, env=env) as started:
        assert started.wait().codes == [2, 2], started.text()
    assert (tmp_path / "0").exists() and len(updates(tmp_path)) == 3
    told = [line for line in started.text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "epoch_0001.npy: block 0 is damaged" in told[0], told
    assert "Traceback" not in started.text()


def test_a_record_that_no_teacher_gives_is_told_with_its_image(
    store, tmp_path, capsys, monkeypatch
):
    reader = LogitsStoreReader(store)
    records = np.array(reader.open_epoch(0))
    records["index"][5, 3] = reader.num_classes
    with monkeypatch.context() as patch:  # as a writer with a fault would seal it
        patch.setattr(store_writer, "impossible", lambda *given: "")
        for path in store.glob("epoch_0000.*"):
            path.unlink()
        with LogitsStoreWriter(store, reader.manifest, reader.keys) as writer:
            writer.begin_epoch(0)
            writer.append(np.arange(24), records)
            writer.seal(0)
    line = fault(capsys, tmp_path, SHORT, NAMED, store)
    assert f"epoch_0000.npy: the record of {reader.keys[5]} has a class from 10 up" in line


def test_keys_in_another_order_map_nothing(store, tmp_path, capsys):
    names = (store / "keys.txt").read_text().splitlines()
    (tmp_path / "bad.txt").write_text(names[3])
    opts = [SHORT, NAMED, store, "DATA.EXCLUDE", tmp_path / "bad.txt", "DATA.BATCH_SIZE 2"]
    names[7], names[11] = names[11], names[7]
    (store / "keys.txt").write_text("\n".join(names) + "\n")
    line = fault(capsys, tmp_path, *opts)
    assert f"{store}/keys.txt: is not the file that the manifest names" in line
    names[7], names[11] = names[11], names[7]
    (store / "keys.txt").write_text("\n".join(names) + "\n")
    assert run(tmp_path, *opts) == 0


def test_the_check_of_saved_logits_verifies_too(store, capsys):
    assert saving.run(store, SHORT, flags=["--check-saved-logits", "--exact"]) == 0
    change(store / "epoch_0001.npy", lambda body: body[RECORD:] + body[:RECORD])
    line = fault(capsys, store, SHORT, program=saving.run, flags=["--check-saved-logits"])
    assert "epoch_0001.npy: block 0 is damaged" in line


# Once an epoch is verified and open its file is cut short.
CUT = """
import os
from data.store import format as store_format
read = store_format.Records.__getitem__

def cut(self, row):
    record = read(self, row)
    os.truncate(self._bytes.path, 200)
    return record

store_format.Records.__getitem__ = cut
"""


@pytest.mark.parametrize(("kind", "workers"), [("store", 1), ("original", 0)])
def test_a_file_cut_short_while_it_is_in_use_is_told(kind, workers, request, tmp_path):
    root = request.getfixturevalue(kind)
    opts = [SHORT, "DATA.NUM_WORKERS", workers, NAMED, root]
    with job(tmp_path, *opts, prepare=CUT) as started:
        assert started.wait().codes == [2], started.text()
    told = [line for line in started.text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "ends before byte" in told[0] and str(root) in told[0], told
    assert "Traceback" not in started.text()


def test_an_original_store_is_left_as_it_is_and_its_records_are_looked_at(
    original, tmp_path, capsys
):
    before = {path: path.stat() for path in [original, *original.rglob("*")]}
    assert run(tmp_path / "a", SHORT, NAMED, original, "DATA.INDEX_DIR", tmp_path / "index") == 0
    assert list((tmp_path / "index").glob("index-*.npy"))
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("index-*.npy"))
    after = {path: path.stat() for path in [original, *original.rglob("*")]}
    assert {path: (found.st_size, found.st_mtime_ns) for path, found in before.items()} == {
        path: (found.st_size, found.st_mtime_ns) for path, found in after.items()
    }
    path = original / "logits_top10_epoch1" / "rank0-values.bin"
    data = bytearray(path.read_bytes())
    data[5 * RECORD + 4 + 20 : 5 * RECORD + 4 + 22] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    line = fault(capsys, tmp_path / "b", SHORT, NAMED, original, "MODEL.NUM_CLASSES 10")
    assert f"{path}: the record of 5 has a class from 10 up, probabilities that" in line
    assert len(updates(tmp_path / "b")) == 3
