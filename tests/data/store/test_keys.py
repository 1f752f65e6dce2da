"""Keys as one blob of lines, looked up exactly, and how a run's listing is mapped to a store's."""

import hashlib

import numpy as np
import pytest

from data.store import keys as store_keys
from data.store.files import StoreError
from data.store.keys import Keys, check_unique, compare_listings, locate, map_positions
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


def few_hashes(bits: int):
    """Keys.hashes with so few different values that most keys collide; another salt gives other
    collisions.
    """
    true_hashes = Keys.hashes
    return lambda self, salt: (true_hashes(self, salt) >> np.uint64(3)) & np.uint64(2**bits - 1)


@pytest.mark.parametrize("bits", [None, 7])
@pytest.mark.usefixtures("short_chunks")
def test_locating_equals_a_dictionary(rng, monkeypatch, bits):
    # few letters: many near misses and repetitions
    texts = ["".join(rng.choice(list("ab/"), rng.integers(0, 9))) for _ in range(30)]
    stored = [texts[i] for i in rng.integers(0, 20, 50)]
    wanted = [texts[i] for i in rng.integers(0, 30, 60)]
    if bits is not None:
        monkeypatch.setattr(Keys, "hashes", few_hashes(bits))
        monkeypatch.setattr(store_keys, "SALTS", tuple(range(40)))
    first: dict[str, int] = {}
    for position, text in enumerate(stored):
        first.setdefault(text, position)
    found = locate(Keys.of(stored), Keys.of(wanted))
    assert found.dtype == np.int64 and found.tolist() == [first.get(text, -1) for text in wanted]
    assert -1 in found and len(set(found.tolist())) > 10


def test_hashes_spread():
    keys = Keys.of([f"n{i // 1000:08d}_{i}" for i in range(50_000)])
    hashes = keys.hashes(1)
    assert len(np.unique(hashes)) == len(keys) and not (hashes == keys.hashes(2)).any()
    for bit in range(64):
        assert 0.45 < ((hashes >> np.uint64(bit)) & np.uint64(1)).mean() < 0.55, bit


def differences(store: list[str], listing: list[str]) -> str:
    return compare_listings(Keys.of(store), Keys.of(listing)).describe()


def test_differences_are_told_apart():
    names = [f"cat/{i}.jpg" for i in range(6)] + [f"dog/{i}.jpg" for i in range(10, 16)]
    assert differences(names, names) == "no difference"
    assert differences(names, [*names, "dog/99.jpg"]) == "1 added: 'dog/99.jpg'"
    assert differences(names, names[:3] + names[4:]) == "1 removed: 'cat/3.jpg'"
    assert (
        differences(names, names[:3] + ["cat/3a.jpg"] + names[4:])
        == "1 renamed (it seems): 'cat/3.jpg' -> 'cat/3a.jpg'"
    )
    assert (
        differences(names, names[1:6] + names[6:] + ["pets/0.jpg"])
        == "1 renamed (it seems): 'cat/0.jpg' -> 'pets/0.jpg'"
    )
    assert differences(names, names[::-1]) == "reordered: the same images in another order"
    assert (
        differences(names, [*names[:1:-1], "new/a.jpg"])
        == "1 added: 'new/a.jpg'; 2 removed: 'cat/0.jpg', 'cat/1.jpg'; the order of the others is"
        " another"
    )
    many = differences(names, [f"cat/{i}.jpg" for i in range(20, 40)] + names[:5])
    assert (
        many.startswith("20 added: 'cat/20.jpg', 'cat/21.jpg'")
        and "'cat/24.jpg', ...; 7 removed: 'cat/5.jpg', 'dog/10.jpg'" in many
    )
    assert (
        differences(names, ["x/y.jpg"])
        == "no image of this data set is in the store (the first: 'x/y.jpg', the store's:"
        " 'cat/0.jpg')"
    )


def test_a_mass_of_differences_is_not_paired(monkeypatch):
    monkeypatch.setattr(store_keys, "PAIRED_RENAMES", 1)
    assert (
        differences(["a/1", "a/2", "a/3"], ["a/1", "a/4", "a/5"])
        == "2 added: 'a/4', 'a/5'; 2 removed: 'a/2', 'a/3'"
    )


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "a store's folder")


def test_the_same_listing_needs_no_map(store, tmp_path):
    assert map_positions(store, KEYS, tmp_path / "cache") is None

    class Listed:
        def digest(self):
            return Keys.of(KEYS).digest()

    assert map_positions(store, Listed()) is None
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
    with pytest.raises(
        StoreError, match=r"1 renamed \(it seems\): .*image 00000.jpg.* -> 'class 00/renamed.jpg'"
    ):
        map_positions(store, ["class 00/renamed.jpg", *KEYS[1:]], tmp_path)
    with pytest.raises(StoreError, match="no image of this data set is in the store"):
        map_positions(store, ["other.jpg"], tmp_path)
    with pytest.raises(StoreError, match="stands twice, at positions 0 and 2"):
        map_positions(store, [KEYS[4], KEYS[5], KEYS[4]], tmp_path)
