"""Stores in the original's layout: what it wrote reads back exactly, and what is wrong with one is
told.
"""

import importlib.util
import json
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from data.store import original as upstream_store
from data.store.files import StoreError
from data.store.format import record_dtype
from data.store.keys import Keys, map_positions
from data.store.original import UpstreamStoreReader, natural_order


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache folder, for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tinyvit"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "an original's store"


def write(
    root: Path, ranks: list[list[str]], epoch: int = 0, k: int = 2, first: int = 100
) -> dict[str, int]:
    """An original's epoch with these keys per rank; the seeds count up from `first`. Returns the
    seed that each key should have.
    """
    folder = root / f"logits_top{k}_epoch{epoch}"
    folder.mkdir(parents=True, exist_ok=True)
    seeds, seed = {}, first
    for rank, keys in enumerate(ranks):
        values = b""
        for key in keys:
            values += struct.pack(
                f"<i{k}h{k}e", seed, *range(seed, seed + k), *[0.5 / (i + 1) for i in range(k)]
            )
            seeds.setdefault(key, seed)
            seed += 1
        (folder / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
        (folder / f"rank{rank}-values.bin").write_bytes(values)
    return seeds


def seeds_of(reader: UpstreamStoreReader, epoch: int = 0) -> list[int]:
    return [int(reader.open_epoch(epoch)[position]["seed"]) for position in range(len(reader))]


def test_what_the_original_wrote_reads_back_exactly(goldens):
    told = json.loads((goldens / "store.json").read_text())
    first: dict[str, dict] = {}
    for record in sorted(told["records"], key=lambda record: record["rank"]):
        first.setdefault(record["key"], record)
    assert len(first) < len(told["records"])  # one key stands in two ranks
    keys = list(first)
    random.Random(3).shuffle(keys)
    reader = UpstreamStoreReader(goldens / "store", keys)
    assert (reader.k, reader.epochs(), len(reader)) == (told["topk"], [0], len(keys))
    reader.check_epochs([0])
    records = reader.open_epoch(0)
    every = records[np.arange(len(keys))]
    assert every.dtype == record_dtype(10, 21841) and every.dtype.itemsize == told["item_size"]
    for position, key in enumerate(keys):
        expected = [first[key][name] for name in ("seed", "indices", "values_u16")]
        for record in (records[position], every[position]):
            seed, index, prob = record
            assert [seed, index.tolist(), prob.view("<u2").tolist()] == expected
    ranks = told["read_seed_of_duplicated_key_by_rank"]
    assert len(set(ranks.values())) == 2  # the original answers by reader
    (twice,) = {record["key"] for record in told["records"] if record["rank"] == 2}
    assert records[keys.index(twice)]["seed"] == ranks["0"]


def test_the_store_of_a_whole_training_is_indexed_by_position(goldens):
    root = goldens / "train"
    keys = sorted(
        path.relative_to(root / "data" / "train").as_posix()
        for path in (root / "data" / "train").rglob("*.jpg")
    )
    reader = UpstreamStoreReader(root / "store", keys)
    assert reader.epochs() == [0, 1] and len(reader) == 200
    reader.check_epochs(range(2))
    for epoch in range(2):
        folder = root / "store" / f"logits_top10_epoch{epoch}"
        names = (folder / "rank0-keys.txt").read_text().split()
        values = (folder / "rank0-values.bin").read_bytes()
        for row, name in enumerate(names):
            seed, *rest = struct.unpack_from("<i10h10e", values, 44 * row)
            record = reader.open_epoch(epoch)[int(name)]
            assert [record["seed"], *record["index"], *record["prob"]] == [seed, *rest]


def test_the_reading_surface(root):
    write(root, [["0", "2"], ["1", "3"]])
    write(root, [["0", "1", "2", "3"]], epoch=3, first=50)
    keys = ["a/0", "a/1", "b/0", "b/1"]
    reader = UpstreamStoreReader(root, keys, num_classes=1000)
    assert (reader.k, reader.num_classes, len(reader), reader.epochs()) == (2, 1000, 4, [0, 3])
    assert list(reader.keys) == keys and map_positions(reader, keys) is None
    assert reader.manifest["identity"]["shuffle_seed"] == 0 and reader.manifest["format"] == 0
    records = reader.open_epoch(0)
    seeds = np.array([100, 102, 101, 103])
    for chosen in (
        np.int64(2),
        -1,
        slice(1, 3),
        [3, 0],
        slice(0, 0),
        np.array([[0, 1], [2, 3]]),
        np.array([True, False, False, True]),
    ):
        np.testing.assert_array_equal(records[chosen]["seed"], seeds[chosen])
    assert len(records) == 4 and seeds_of(reader, 3) == [50, 51, 52, 53]


def test_names_come_before_positions(root):
    """A key that is a name means that image, also where names are numbers."""
    write(root, [["3", "n1_7", "0", "007"]])
    assert seeds_of(UpstreamStoreReader(root, ["n1_7", "3", "0", "007"])) == [101, 100, 102, 103]


def test_positions_of_a_tar_are_in_natural_order(root):
    # sorted by bytes
    keys = ["B/x_10026.JPEG", "B/x_1009.JPEG", "a/9.png", "a/i10.png", "a/i9b.png"]
    natural = ["a/9.png", "a/i9b.png", "a/i10.png", "B/x_1009.JPEG", "B/x_10026.JPEG"]
    assert [keys[i] for i in natural_order(keys)] == natural
    write(root, [["0", "1", "2"], ["3", "4"]])
    reader = UpstreamStoreReader(root, keys, order="tar")
    assert {keys[i]: seed for i, seed in enumerate(seeds_of(reader))} == {
        key: 100 + i for i, key in enumerate(natural)
    }
    assert seeds_of(UpstreamStoreReader(root, keys)) == [100, 101, 102, 103, 104]
    with pytest.raises(StoreError, match="DISTILL.UPSTREAM_ORDER 'zip': choose folder or tar"):
        UpstreamStoreReader(root, keys, order="zip")


def test_natural_order_is_timms():
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("timm is not installed")
    spec = importlib.util.spec_from_file_location(
        "misc", Path(package.origin).parent / "utils" / "misc.py"
    )
    # this file alone: all of timm takes seconds to import
    misc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(misc)
    rng = random.Random(1)
    names = [
        f"{rng.choice('aAbB')}{rng.randrange(10 ** rng.randrange(1, 6))}_{rng.randrange(30)}.JPEG"
        for _ in range(500)
    ]
    keys = [f"n{rng.randrange(3):08d}/{name}" for name in names]
    expected = sorted(range(len(keys)), key=lambda i: misc.natural_key(keys[i]))
    assert natural_order(keys).tolist() == expected


def test_of_several_records_of_a_key_the_first_in_rank_order_counts(root):
    """Also where more than ten ranks would sort otherwise as text."""
    ranks = [[str(rank), "n1_5", "11"] for rank in range(11)] + [["11", "n1_5"]]
    seeds = write(root, ranks)
    keys = [f"a/{i}" for i in range(12)] + ["n1_5"]
    assert seeds_of(UpstreamStoreReader(root, keys)) == [seeds[str(i)] for i in range(12)] + [
        seeds["n1_5"]
    ]
    assert seeds["n1_5"] == 101 and seeds["11"] == 102


def test_files_of_an_earlier_run_with_more_ranks_are_not_read_and_told(root):
    old = [[str(i) for i in range(rank, 12, 4)] for rank in range(4)]
    write(root, old, first=1000)
    new = [[str(i) for i in range(rank, 12, 2)] for rank in range(2)]
    seeds = write(root, new)  # the files of ranks 2 and 3 stay
    reader = UpstreamStoreReader(root, [f"a/{i:02d}" for i in range(12)])
    assert seeds_of(reader) == [seeds[str(i)] for i in range(12)]
    assert reader.redundant_ranks(0) == [2, 3]
    assert max(seeds.values()) < 1000


def test_the_index_is_built_once_and_mapped(root, cache, monkeypatch):
    write(root, [["0", "2"], ["1"]])
    keys = ["a", "b", "c"]
    reader = UpstreamStoreReader(root, keys)
    reader.check_epochs([0])
    (index,) = cache.glob("index-*.npy")
    assert not list(root.rglob("index*"))  # the store itself stays as it was
    monkeypatch.setattr(UpstreamStoreReader, "_built_rows", None)  # not needed any more
    assert seeds_of(UpstreamStoreReader(root, keys)) == [100, 102, 101]
    travelled = pickle.loads(pickle.dumps(reader))
    assert seeds_of(travelled) == [100, 102, 101] and b"['a'" not in pickle.dumps(reader)
    assert isinstance(travelled.open_epoch(0)._rows, np.memmap)
    with pytest.raises(TypeError):  # another listing needs an index of its own
        UpstreamStoreReader(root, ["a", "c", "b"]).open_epoch(0)
    assert index.stat().st_size == 128 + 3 * 8 + 32  # the digest


def test_the_index_follows_the_files(root):
    write(root, [["0", "1"]])
    reader = UpstreamStoreReader(root, ["a", "b"])
    assert seeds_of(reader) == [100, 101]
    write(root, [["1", "0"], ["0"]])
    assert seeds_of(reader) == [101, 100]


def test_a_read_only_store_is_indexed_in_the_cache(root, cache, tmp_path):
    write(root, [["0", "1"]])
    folder = root / "logits_top2_epoch0"
    folder.chmod(0o555)
    assert seeds_of(UpstreamStoreReader(root, ["a", "b"])) == [100, 101]
    assert len(list(cache.glob("index-*.npy"))) == 1
    assert seeds_of(UpstreamStoreReader(root, ["a", "b"], cache=tmp_path / "mine")) == [100, 101]
    assert len(list((tmp_path / "mine").glob("index-*.npy"))) == 1 and not list(
        folder.glob("index*")
    )
    (tmp_path / "file").write_text("")
    assert seeds_of(UpstreamStoreReader(root, ["a", "b"], cache=tmp_path / "file")) == [100, 101]
    folder.chmod(0o755)


def test_a_reader_without_its_index_in_another_process_is_told(root, tmp_path):
    write(root, [["0", "1"]])
    travelled = pickle.loads(pickle.dumps(UpstreamStoreReader(root, ["a", "b"])))
    with pytest.raises(
        StoreError, match="call check_epochs before the reader goes to other processes"
    ):
        travelled.open_epoch(0)


def test_images_without_a_record_are_told(root):
    write(root, [["0", "n1_7"]])
    reader = UpstreamStoreReader(root, ["n1_6", "n1_7", "n1_8"])
    with pytest.raises(
        StoreError,
        match=(
            r"has no record of 1 of 3 images, the first being position 2 \('n1_8'\): give the data"
        ),
    ):
        reader.check_epochs([0])
    records = reader.open_epoch(0)
    for chosen in (2, [0, 2], slice(None)):
        with pytest.raises(StoreError, match=r"has no record of position 2 \('n1_8'\)"):
            records[chosen]
    assert records[[0, 1]]["seed"].tolist() == [100, 101]


def test_positions_of_another_data_set_are_told(root):
    write(root, [["0", "1", "2"]])
    with pytest.raises(
        StoreError,
        match=r"counts positions up to 2, the data set has 2 images: .*leave DATA.SUBSET and",
    ):
        UpstreamStoreReader(root, ["a", "b"]).check_epochs([0])


def test_a_part_of_a_data_set_with_names_reads(root):
    seeds = write(root, [[f"n1_{i}" for i in range(9)]])
    keys = ["n1_7", "n1_2"]
    assert seeds_of(UpstreamStoreReader(root, keys)) == [seeds[key] for key in keys]


def test_missing_epochs_and_folders_are_told(root, tmp_path):
    write(root, [["0"]])
    write(root, [["0"]], epoch=2)
    reader = UpstreamStoreReader(root, ["a"])
    with pytest.raises(StoreError, match=r"epochs 1, 3 are missing with top-2 \(there: 0, 2\)"):
        reader.check_epochs(range(4))
    with pytest.raises(StoreError, match=r"epoch1: is missing \(epochs with top-2: 0, 2\)"):
        reader.open_epoch(1)
    with pytest.raises(StoreError, match=r"holds no folders logits_top\*_epoch\*"):
        UpstreamStoreReader(tmp_path / "nowhere", ["a"])
    write(root, [["0"]], k=3)
    with pytest.raises(StoreError, match=r"holds stores of top-2, top-3: set DISTILL.LOGITS_TOPK"):
        UpstreamStoreReader(root, ["a"])
    assert UpstreamStoreReader(root, ["a"], k=3).open_epoch(0)[0]["index"][2] == 102


WRONG_CLASS = struct.pack("<i2h2e", 1, 5, -9, 0, 0)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("rank1-values.bin", lambda data: data[:-1], "23 bytes are no whole number of top-2"),
        ("rank1-values.bin", lambda data: data[:-12], "holds 1 records .* has 2 keys"),
        ("rank1-values.bin", lambda data: WRONG_CLASS * 2, "bin: names class 65,527"),
        ("rank0-values.bin", None, "holds values of ranks 1, expected 0 up without a gap"),
        ("rank3-values.bin", lambda data: WRONG_CLASS, "ranks 0-1, 3, expected 0 up"),
        ("rank0-keys.txt", lambda data: data[:-2], "holds 2 records .* has 1 keys"),
        ("rank0-keys.txt", lambda data: data[:-1], "the last key b'1' has no end of line"),
        ("rank0-keys.txt", None, "can't be read"),
    ],
)
def test_damage_is_told(root, name, spoil, message):
    write(root, [["0", "1"], ["2", "3"]])
    path = root / "logits_top2_epoch0" / name
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes() if path.exists() else b""))
    with pytest.raises(StoreError, match=message):
        UpstreamStoreReader(root, ["a", "b", "c", "d"]).check_epochs([0])


def test_an_empty_rank_is_fine(root):
    write(root, [["1"], [], ["0"]])
    assert seeds_of(UpstreamStoreReader(root, ["a", "b"])) == [101, 100]
    assert UpstreamStoreReader(root, ["a", "b"]).redundant_ranks(0) == []


def test_classes_beyond_the_layout_are_refused(root):
    write(root, [["0"]])
    with pytest.raises(StoreError, match="names 32,768 classes at most, not 40,000"):
        UpstreamStoreReader(root, ["a"], num_classes=40_000)
    with pytest.raises(StoreError, match="names class 101 of 101: correct MODEL.NUM_CLASSES"):
        UpstreamStoreReader(root, ["a"], num_classes=101).check_epochs([0])
    UpstreamStoreReader(root, ["a"], num_classes=102).check_epochs([0])


def test_decimal_texts():
    numbers = {"0": 0, "12": 12, "007": 7, "5": 5, "9" * 18: 10**18 - 1}
    others = ["", "1x", "x1", " 3", "-4", "1.0", "９", "1" + "0" * 18]
    texts = [*others, *numbers, *others]
    expected = [numbers.get(text, -1) for text in texts]
    assert upstream_store._decimals(Keys.of(texts)).tolist() == expected
    assert upstream_store._decimals(Keys.of([])).tolist() == []
