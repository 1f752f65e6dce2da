"""Keys as one blob of lines, looked up exactly, and how a run's listing is mapped to a store's."""

import hashlib
import re

import numpy as np
import pytest

from data.store import keys as store_keys
from data.store.files import StoreError
from data.store.keys import Keys, check_unique, difference, locate, map_positions
from tests.support.store_samples import KEYS, write_store

ODD_KEYS = [
    "",
    " ",
    "a",
    "a ",
    "aa",
    "é/ü.png",
    "日本/猫.jpg",
    "x" * 3000,
    'it\'s "quoted"\t',
    "bad\udcff",
    "ends with \\n",
    "\r",
]


@pytest.fixture
def rng():
    return np.random.Generator(np.random.PCG64(5))


@pytest.fixture
def short_chunks(monkeypatch):
    """So few keys a chunk that small lists have many."""
    monkeypatch.setattr(store_keys, "CHUNK_KEYS", 3)


@pytest.mark.usefixtures("short_chunks")
def test_keys_are_a_sequence_of_texts(tmp_path):
    keys = Keys.of(ODD_KEYS)
    assert len(keys) == len(ODD_KEYS) and list(keys) == ODD_KEYS and Keys.of(keys) is keys
    assert [keys[i] for i in range(-len(keys), len(keys))] == ODD_KEYS * 2 and keys[
        2:5
    ] == ODD_KEYS[2:5]
    assert "日本/猫.jpg" in keys and keys.index("aa") == 4
    with pytest.raises(IndexError):
        keys[len(keys)]
    data = b"".join(key.encode("utf-8", "surrogateescape") + b"\n" for key in ODD_KEYS)
    assert bytes(keys.blob) == data and keys.digest() == hashlib.sha256(data).hexdigest()
    (tmp_path / "keys.txt").write_bytes(data)
    mapped = Keys.read(tmp_path / "keys.txt")
    assert (
        list(mapped) == ODD_KEYS
        and mapped.digest() == keys.digest()
        and isinstance(mapped.blob, np.memmap)
    )


def test_no_keys(tmp_path):
    (tmp_path / "keys.txt").write_bytes(b"")
    for keys in (Keys.of([]), Keys.read(tmp_path / "keys.txt")):
        assert list(keys) == [] and keys.digest() == hashlib.sha256(b"").hexdigest()
        assert (
            locate(keys, Keys.of(["a"])).tolist() == [-1]
            and locate(Keys.of(["a"]), keys).tolist() == []
        )
        with pytest.raises(StoreError, match="no keys"):
            check_unique(keys)


def test_faulty_lists_are_told(tmp_path):
    with pytest.raises(StoreError, match=r"'b\\nc' holds a line break: rename that image"):
        Keys.of(["a", "b\nc"])
    (tmp_path / "keys.txt").write_bytes(b"a\nb")
    with pytest.raises(
        StoreError,
        match=r"keys.txt: the last key b'b' has no end of line: the list is cut off; copy it again",
    ):
        Keys.read(tmp_path / "keys.txt")
    with pytest.raises(StoreError, match=r"none.txt: can't be read .*restore the file"):
        Keys.read(tmp_path / "none.txt")
    with pytest.raises(StoreError, match="key 1 is empty"):
        check_unique(Keys.of(["a", "", "b"]))
    with pytest.raises(StoreError, match="the key 'b' stands twice, at positions 1 and 3"):
        check_unique(Keys.of(["a", "b", "c", "b"]))
    check_unique(Keys.of(KEYS))


@pytest.mark.usefixtures("short_chunks")
def test_locating_equals_a_dictionary(rng):
    # few letters: many near misses and repetitions; bytes that numpy's strings drop at their end
    letters = list("ab/\0")
    texts = ["".join(rng.choice(letters, rng.integers(0, 9))) for _ in range(60)] + ODD_KEYS
    stored = [texts[i] for i in rng.integers(0, 50, 90)] + ODD_KEYS[2:]
    wanted = [texts[i] for i in rng.permutation(len(texts))]
    first: dict[str, int] = {}
    for position, text in enumerate(stored):
        first.setdefault(text, position)
    found = locate(Keys.of(stored), Keys.of(wanted))
    assert found.dtype == np.int64 and found.tolist() == [first.get(text, -1) for text in wanted]
    assert -1 in found and len(set(found.tolist())) > 30


NAMES = [f"cat/{i}.jpg" for i in range(6)] + [f"dog/{i}.jpg" for i in range(10, 16)]


@pytest.mark.parametrize(
    ("listing", "told"),
    [
        (NAMES, "no difference"),
        ([*NAMES, "dog/99.jpg"], "1 added: 'dog/99.jpg'"),
        (NAMES[:3] + NAMES[4:], "1 removed: 'cat/3.jpg'"),
        (NAMES[::-1], "reordered: .*"),
        (
            [*NAMES[:1:-1], "new/a.jpg"],
            "1 added: 'new/a.jpg'; 2 removed: 'cat/0.jpg', 'cat/1.jpg'; reordered: .*",
        ),
        (
            [f"cat/{i}.jpg" for i in range(20, 40)] + NAMES[:5],
            "20 added: 'cat/20.jpg', .*'cat/24.jpg', ...; 7 removed: 'cat/5.jpg', 'dog/10.jpg'.*",
        ),
    ],
)
def test_differences_are_told_apart(listing, told):
    assert re.fullmatch(told, difference(Keys.of(NAMES), Keys.of(listing)))


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "a store's folder")


def test_the_same_listing_needs_no_map(store, tmp_path):
    assert map_positions(store, KEYS, tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("chosen", [slice(None, None, 10), slice(None, None, -1), slice(17, 18)])
def test_a_part_or_another_order_maps_by_key(store, tmp_path, chosen):
    listing = KEYS[chosen]
    mapped = map_positions(store, listing, tmp_path / "cache")
    assert mapped.dtype == np.int64 and len(mapped) == len(store)
    for position, key in enumerate(KEYS):
        assert mapped[position] == (listing.index(key) if key in listing else -1)


def test_the_map_is_built_once_and_mapped(store, tmp_path, monkeypatch):
    built = map_positions(store, KEYS[5:9], tmp_path / "cache")
    monkeypatch.setattr(store_keys, "locate", None)  # not needed any more
    again = map_positions(store, KEYS[5:9], tmp_path / "cache")
    assert isinstance(again, np.memmap) and again.tolist() == built.tolist()
    with pytest.raises(TypeError):
        map_positions(store, KEYS[5:10], tmp_path / "cache")


SPOILED = {
    "flipped": lambda data: data[:140] + bytes([data[140] ^ 1]) + data[141:],
    "rolled": lambda data: data[:128] + data[136:-32] + data[128:136] + data[-32:],
    "header": lambda data: data.replace(b"'shape': (", b"'shape': (9"),
    "no header": lambda data: b"\x93NUMPY\1\0" + bytes(len(data) - 8),
    "unfinished header": lambda data: data.replace(b"}", b"("),
    "pickled": lambda data: data.replace(b"'<i8'", b"'|O' "),
    "shorter": lambda data: data[:-8],
    "longer": lambda data: data + bytes(8),
    "cut": lambda data: data[:20],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("fault", [*SPOILED, "another's"])
def test_a_map_that_is_not_as_it_was_written_is_made_again(store, tmp_path, fault, capsys):
    built = map_positions(store, KEYS[5:9], tmp_path).tolist()
    (path,) = tmp_path.glob("store-map-*.npy")
    if fault == "another's":
        map_positions(store, KEYS[6:10], tmp_path)
        (other,) = {*tmp_path.glob("store-map-*.npy")} - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(SPOILED[fault](path.read_bytes()))
    assert map_positions(store, KEYS[5:9], tmp_path).tolist() == built
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: ") and line.endswith("it is made again")
    assert map_positions(store, KEYS[5:9], tmp_path).tolist() == built
    assert capsys.readouterr().err == "", "it was written whole"


def test_without_a_cache_that_can_be_written_it_works_too(store, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert (map_positions(store, KEYS[5:9], tmp_path / "file") >= 0).sum() == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert (map_positions(store, KEYS[5:9]) >= 0).sum() == 4
    assert len(list((tmp_path / "home" / "tinyvit").iterdir())) == 1


def test_images_that_the_store_lacks_are_an_error(store, tmp_path):
    with pytest.raises(
        StoreError,
        match=(
            r"a store's folder: the store lacks images of this data set: 1 added: 'new.jpg';"
            r" .*DATA.EXCLUDE"
        ),
    ):
        map_positions(store, [*KEYS, "new.jpg"], tmp_path)
    with pytest.raises(StoreError, match=r"1 added: 'other.jpg'; 301 removed: .*00000.jpg"):
        map_positions(store, ["other.jpg"], tmp_path)
    with pytest.raises(StoreError, match="stands twice, at positions 0 and 2"):
        map_positions(store, [KEYS[4], KEYS[5], KEYS[4]], tmp_path)
