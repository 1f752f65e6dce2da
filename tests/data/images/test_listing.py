"""Listings: kept in mapped files, made anew when the data changes, and parts of them selected."""

import hashlib
import os
import pickle
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.images import listing as listing_module
from data.images.listing import Listing, Scan, cached_listing, exclude, read_names, reported, subset
from data.images.scans import scan_folder, scan_names, scan_tar
from data.store import files
from data.store.keys import Keys
from tests.support.images import in_processes, write_files, write_tar


def listed(keys, labels, tmp_path: Path, class_names=("c0", "c1", "c2")) -> Listing:
    """A listing made of these keys."""
    scan = Scan(list(keys), np.array(labels), list(class_names))
    return cached_listing({"keys": list(keys)}, lambda: scan, str(tmp_path / "index"))


def by_class(*counts: int) -> tuple[list[str], list[int]]:
    """So many keys of each class, and their labels."""
    keys = [f"c{c}/{i:04d}.jpg" for c, count in enumerate(counts) for i in range(count)]
    return keys, np.repeat(np.arange(len(counts)), counts).tolist()


def file_of(tmp_path: Path, data: bytes | str) -> str:
    path = tmp_path / "out.txt"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


class Counted:
    """A scan that counts how often it is run."""

    def __init__(self, scan=lambda: Scan(["a", "b"], np.array([0, 0]), ["a"])) -> None:
        self.scan = scan
        self.count = 0

    def __call__(self) -> Scan:
        self.count += 1
        return self.scan()


# ---- kept in files


def test_a_listing_says_what_was_found_and_pickles_as_its_path(tmp_path):
    keys, labels = by_class(400, 400, 400)
    found = listed(keys, labels, tmp_path)
    assert len(found) == found.total == 1200 and found.class_names == ["c0", "c1", "c2"]
    assert list(found.keys) == keys and found.labels.tolist() == labels
    assert (found.position(700), found.key(700), found.label(700)) == (700, "c1/0300.jpg", 1)
    text = "".join(f"{key}\n" for key in keys).encode()
    assert found.keys.digest() == hashlib.sha256(text).hexdigest()
    assert np.load(found.folder / "keys.npy").tobytes() == text
    packed = pickle.dumps(found)
    again = pickle.loads(packed)
    assert len(packed) < 300 and list(again.keys) == keys
    assert again.keys.digest() == found.keys.digest()
    for array in (again.keys.blob, again.keys.ends):
        assert isinstance(array, np.memmap)
    assert len(pickle.dumps(found.keys)) < 400
    assert pickle.loads(pickle.dumps(found.keys))[5] == keys[5]


def test_it_is_scanned_once_and_again_when_the_data_changes(tmp_path):
    root = write_files(tmp_path / "train", ["a/1.jpg", "a/deep/1.jpg", "b/1.jpg"])
    scan = Counted(lambda: scan_folder(root, []))

    def keys() -> list[str]:
        return list(cached_listing({"root": "train"}, scan, str(tmp_path / "index")).keys)

    expected = ["a/1.jpg", "a/deep/1.jpg", "b/1.jpg"]
    assert keys() == keys() == expected and scan.count == 1
    for count, new in enumerate(("a/deep/0.jpg", "c/1.jpg"), 2):
        time.sleep(0.02)  # the clock of file times is coarser than this program is fast
        write_files(root, {new: b"1"})
        expected = sorted([*expected, new])
        assert keys() == keys() == expected and scan.count == count
    time.sleep(0.02)
    (root / "b" / "1.jpg").rename(root / "b" / "2.jpg")
    assert "b/2.jpg" in keys() and scan.count == 4


@pytest.mark.parametrize("change", ["size", "time"])
@pytest.mark.parametrize("kind", ["tar", "list"])
def test_a_changed_tar_or_list_is_scanned_again(tmp_path, change, kind):
    path = tmp_path / kind
    if kind == "tar":
        write_tar(path, {"a/1.jpg": b"1"})
    else:
        path.write_text("n00000001_1\n")
    scan = Counted(lambda: (scan_tar if kind == "tar" else scan_names)(path, []))
    for _ in range(2):
        cached_listing({}, scan, str(tmp_path / "index"))
    assert scan.count == 1
    status = path.stat()
    if change == "size":
        path.write_bytes(path.read_bytes() + (bytes(10240) if kind == "tar" else b"n00000001_2"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
    cached_listing({}, scan, str(tmp_path / "index"))
    assert scan.count == 2


def test_asked_again_it_is_scanned_once_for_each_process(tmp_path, monkeypatch):
    scan = Counted()
    for _ in range(3):
        cached_listing({}, scan, str(tmp_path))
    assert scan.count == 1
    monkeypatch.setattr(listing_module, "PROCESS_BEGAN", time.time_ns())  # as in a new process
    for _ in range(3):
        cached_listing({}, scan, str(tmp_path), again=True)
    assert scan.count == 2


def test_other_data_has_another_listing(tmp_path):
    assert [listed([key], [0], tmp_path).key(0) for key in ("a", "b", "a")] == ["a", "b", "a"]


def test_a_listing_in_use_outlives_a_new_one(tmp_path):
    first = cached_listing({}, Counted(), str(tmp_path))
    (first.folder.parent / f"{first.folder.name.partition('.')[0]}.npy").unlink()
    second = cached_listing({}, Counted(), str(tmp_path))
    assert second.folder != first.folder
    # as a worker that starts late opens it
    assert list(pickle.loads(pickle.dumps(first)).keys) == ["a", "b"]


def scan_spans(last: str = "b") -> Scan:
    return Scan(["a", last], np.array([0, 1]), ["x", "y"], np.array([[0, 5], [5, 7]]))


def content_of(found: Listing) -> tuple:
    places = [found.span(position) for position in range(len(found))]
    return list(found.keys), found.labels.tolist(), found.class_names, places, found.keys.digest()


SPOILED = {
    "flipped": lambda data: data[:-33] + bytes([data[-33] ^ 1]) + data[-32:],
    "swapped": lambda data: data[:128] + data[128:-32][::-1] + data[-32:],
    "pickled": lambda data: re.sub(rb"'[<|].\d'", b"'|O' ", data),
    "unfinished header": lambda data: data.replace(b"}", b"(", 1),
    "endless": lambda data: data.replace(b"'shape': (", b"'shape': (99999999999"),
    "cut": lambda data: data[: len(data) // 2],
    "text": lambda data: b"a\n",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("name", ["keys", "ends", "labels", "spans", "info", "pointer"])
@pytest.mark.parametrize("fault", [*SPOILED, "another's"])
def test_a_listing_that_is_not_as_it_was_written_is_made_anew(
    tmp_path, name, fault, capsys, monkeypatch
):
    """What is read teaches: with two labels swapped a run would learn wrong targets in silence."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # half a minute in all

    def files(source: dict, scan: Counted) -> Path:
        folder = cached_listing(source, scan, str(tmp_path)).folder
        pointer = folder.with_name(f"{folder.name.partition('.')[0]}.npy")
        return pointer if name == "pointer" else folder / f"{name}.npy"

    scan = Counted(scan_spans)
    expected = content_of(cached_listing({}, scan, str(tmp_path)))
    path = files({}, scan)
    other = files({"other": 1}, Counted(lambda: scan_spans("c"))).read_bytes()
    spoiled = other if fault == "another's" else SPOILED[fault](path.read_bytes())
    assert spoiled != path.read_bytes() or name in ("ends", "labels", "spans")
    path.write_bytes(spoiled)
    for _ in range(2):
        assert content_of(cached_listing({}, scan, str(tmp_path))) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: ") and scan.count == 2


def test_a_pipe_or_folder_in_the_place_of_a_listing_hinders_nobody(tmp_path):
    folder = cached_listing({}, Counted(), str(tmp_path)).folder
    (folder / "labels.npy").unlink()
    (folder / "labels.npy").mkdir()
    again = cached_listing({}, Counted(), str(tmp_path)).folder
    (again / "labels.npy").unlink()
    os.mkfifo(again / "labels.npy")
    assert list(cached_listing({}, Counted(), str(tmp_path)).keys) == ["a", "b"]


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/listings: .* can't be kept there .*INDEX_DIR"):
        cached_listing({}, Counted(), str(tmp_path / "file"))


def test_nothing_is_left_of_a_listing_that_could_not_be_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(listing_module.np, "save", refuse)
    with pytest.raises(ValueError, match=r"can't be kept there \(No space left on device\)"):
        cached_listing({}, Counted(), str(tmp_path))
    assert list((tmp_path / "listings").iterdir()) == []


def test_the_users_cache_is_used_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cached_listing({}, Counted(), "").folder.parent == tmp_path / "tinyvit" / "listings"


def scan_slowly(folder: Path, index: str) -> list[str]:
    def scan() -> Scan:
        (folder / f"scanned-{os.getpid()}").touch()
        time.sleep(0.3)
        return Scan(["a", "b"], np.array([0, 1]), ["a", "b"])

    return list(cached_listing({}, scan, index).keys)


def select_slowly(folder: Path, listing: Path) -> list[str]:
    def choose() -> np.ndarray:
        (folder / f"scanned-{os.getpid()}").touch()
        time.sleep(0.3)
        return np.arange(2)

    return list(Listing(listing).select("some", choose).keys)


def test_of_several_processes_one_scans_and_one_selects(tmp_path):
    assert in_processes(scan_slowly, 4, tmp_path, str(tmp_path / "index")) == [["a", "b"]] * 4
    assert len(list(tmp_path.glob("scanned-*"))) == 1
    folder = listed(["x", "y", "z"], [0, 0, 0], tmp_path).folder
    assert in_processes(select_slowly, 4, tmp_path, folder) == [["x", "y"]] * 4
    assert len(list(tmp_path.glob("scanned-*"))) == 2


def test_without_locks_several_may_scan_and_all_get_a_whole_listing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    assert in_processes(scan_slowly, 4, tmp_path, str(tmp_path / "index")) == [["a", "b"]] * 4


def test_a_long_scan_says_how_far_it_is(capsys, monkeypatch):
    clock = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(listing_module.time, "monotonic", lambda: next(clock))
    assert list(reported(range(60), "listing /data")) == list(range(60))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and lines[0].startswith("listing /data: 11 images so far (")
    assert list(reported([], "x")) == [] and capsys.readouterr().err == ""


# ---- selections


@pytest.mark.parametrize("fraction", [0.5, 0.29, 0.1, 0.01])
def test_a_subset_takes_the_same_share_of_each_class(tmp_path, fraction):
    counts = [100, 200, 1300]
    wanted = [round(count * fraction * 100) // 100 for count in counts]
    keys, labels = by_class(*counts)
    found = listed(keys, labels, tmp_path)
    part = subset(found, fraction)
    assert np.bincount(part.labels).tolist() == wanted
    ranks = listing_module.subset_ranks(Keys.of(keys))
    ranked = [sorted(np.flatnonzero(np.equal(labels, c)), key=ranks.__getitem__) for c in range(3)]
    expected = sorted(i for rows, count in zip(ranked, wanted) for i in rows[:count])
    assert list(part.keys) == [keys[i] for i in expected]
    assert [part.position(i) for i in range(len(part))] == expected and part.total == len(keys)
    assert part.keys.digest() == Keys.of([keys[i] for i in expected]).digest()
    assert part.class_names == found.class_names


def test_a_smaller_subset_is_part_of_a_larger_one_and_stays_the_same(tmp_path):
    found = listed(*by_class(200, 200, 200), tmp_path)
    sizes = [1, 0.7, 0.5, 0.333, 0.1, 0.02]
    parts = [set(subset(found, fraction).keys) for fraction in sizes]
    assert all(small < large for large, small in pairwise(parts))
    numbers = [[27, 62, 85, 141], [20, 61, 113, 148], [25, 86, 147, 154]]
    pinned = [f"c{c}/{number:04d}.jpg" for c, some in enumerate(numbers) for number in some]
    assert list(subset(found, 0.02).keys) == pinned


def test_a_selection_of_a_selection_knows_the_whole_and_is_not_taken_for_it(tmp_path):
    keys, labels = by_class(20, 20, 20)
    left_out = ["c0/0003.jpg", "c2/0019.jpg"]
    for _ in range(2):
        found = listed(keys, labels, tmp_path)
        assert len(found) == 60
        part = subset(exclude(found, file_of(tmp_path, "\n".join(left_out))), 0.5)
        part = pickle.loads(pickle.dumps(part))
        assert np.bincount(part.labels).tolist() == [9, 10, 9]
        assert not set(left_out) & set(part.keys)
        assert part.total == 60 and [part.key(i) for i in range(60)] == keys
        positions = [part.position(i) for i in range(len(part))]
        assert [keys[position] for position in positions] == list(part.keys)


def test_unlabelled_images_have_subsets_too(tmp_path):
    found = listed([f"{i:03d}.jpg" for i in range(100)], [-1] * 100, tmp_path, ())
    assert len(subset(found, 0.25)) == 25
    assert len(subset(found, 0.001)) == 1


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.3333), (7, 0.1), (200, 0.001)])
def test_a_subset_has_an_image_of_every_class(tmp_path, count, fraction):
    found = listed(*by_class(count, 2 * count), tmp_path)
    part, larger = subset(found, fraction), subset(found, 0.5)
    assert np.bincount(part.labels).tolist() == [1, max(1, int(2 * count * fraction))]
    assert set(part.keys) <= set(larger.keys)


def test_excluded_keys_are_left_out(tmp_path):
    keys, labels = by_class(5, 5, 5)
    found = listed(keys, labels, tmp_path)
    for text in (b"c1/0002.jpg\r\n\r\nc0/0000.jpg\nc1/0002.jpg", b"c2/0000.jpg\n"):
        left_out = text.decode().split()
        part = exclude(found, file_of(tmp_path, text))
        assert list(part.keys) == [key for key in keys if key not in left_out]
    assert exclude(found, file_of(tmp_path, "\n")) is found and exclude(found, "") is found


def test_keys_that_can_not_be_excluded_are_named(tmp_path):
    keys, labels = by_class(5, 5, 5)
    found = listed(keys, labels, tmp_path)
    text = "c0/0001.jpg\n" + "".join(f"x{i}.jpg\n" for i in range(9))
    first = "x0.jpg, x1.jpg, x2.jpg, x3.jpg, x4.jpg"
    message = rf"9 of 10 keys are not in the data \(first: {first}\); a key looks like c0/0000.jpg"
    with pytest.raises(ValueError, match=rf"out.txt: {message}"):
        exclude(found, file_of(tmp_path, text))
    with pytest.raises(ValueError, match=r"DATA.EXCLUDE = .*out.txt: names every image"):
        exclude(found, file_of(tmp_path, "\n".join(keys)))


def test_keys_that_are_no_utf8_can_be_excluded(tmp_path):
    found = listed([os.fsdecode(b"a/\xff.jpg"), "a/x\u2028y.jpg", "a/z.jpg"], [0, 0, 0], tmp_path)
    text = b"a/\xff.jpg\n" + "a/x\u2028y.jpg\n".encode()
    assert list(exclude(found, file_of(tmp_path, text)).keys) == ["a/z.jpg"]


def test_a_selection_is_made_once_and_anew_where_it_is_damaged(tmp_path, monkeypatch):
    """With 14 million images choosing would take each process of each run half a minute."""
    keys, labels = by_class(20, 20, 20)

    def part(text: str) -> Listing:
        return subset(exclude(listed(keys, labels, tmp_path), file_of(tmp_path, text)), 0.5)

    first = part("c1/0007.jpg\n")
    expected = list(first.keys)
    with monkeypatch.context() as patch:
        patch.setattr(listing_module, "subset_ranks", lambda keys: pytest.fail("computed again"))
        assert list(part("\r\nc1/0007.jpg").keys) == expected  # the same choice
    assert list(part("c1/0008.jpg\n").keys) != expected
    for file in first.folder.glob("rows-*.npy"):
        whole = file.read_bytes()
        twin = next(other for other in first.folder.glob("rows-*.npy") if other != file)
        shifted = whole[:128] + whole[136:-32] + whole[128:136] + whole[-32:]
        for data in (b"", whole[:-1], shifted, twin.read_bytes()):
            file.write_bytes(data)
            assert list(part("c1/0007.jpg\n").keys) == expected


def test_a_selection_that_can_not_be_kept_is_named(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    found = listed(*by_class(20, 20, 20), tmp_path)
    monkeypatch.setattr(listing_module, "save_array", refuse)
    with pytest.raises(ValueError, match=rf"{found.folder}: the list of images can't be kept"):
        subset(found, 0.5)


def test_names_in_a_users_file(tmp_path):
    # as some editors and file systems make them
    text = b"\xef\xbb\xbffirst\r\n\r\n a b \nnext\xc2\x85line\n\xff\xfe.jpg"
    names = ["first", " a b ", "next\x85line", os.fsdecode(b"\xff\xfe.jpg")]
    assert read_names(file_of(tmp_path, text), "KEY") == names
    with pytest.raises(ValueError, match=r"KEY = .*none: can't be read \(No such file"):
        read_names(str(tmp_path / "none"), "KEY")
