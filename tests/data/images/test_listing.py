"""Which images there are: found, sorted, kept in mapped files, made anew when the data changes, and
parts of them selected.
"""

import gzip
import hashlib
import multiprocessing
import os
import pickle
import tarfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.images import listing as listing_module
from data.images import scans
from data.images.listing import Listing, Scan, cached_listing, exclude, read_names, reported, subset
from data.images.scans import scan_class_folders, scan_folder, scan_names, scan_tar
from data.store.keys import Keys
from tests.support.images import encoded, picture, write_files, write_tar

NAMES = ["b/2.jpg", "b/10.JPEG", "a-b/x.png", "a/deep/er/z.bmp", "a/Z.webp", "a/y.ppm", "é/ü.jpg"]
IN_ORDER = [
    "a/Z.webp",
    "a/deep/er/z.bmp",
    "a/y.ppm",
    "a-b/x.png",
    "b/10.JPEG",
    "b/2.jpg",
    "é/ü.jpg",
]
LABELS = [0, 0, 0, 1, 2, 2, 3]
CLASSES = ["a", "a-b", "b", "é"]


def listed(keys, labels, tmp_path: Path, class_names=("c0", "c1", "c2")) -> Listing:
    """A listing made of these keys."""
    scan = Scan(list(keys), np.array(labels), list(class_names))
    return cached_listing({"keys": list(keys)}, lambda: scan, str(tmp_path / "index"))


def by_class(count: int, classes: int = 3) -> tuple[list[str], list[int]]:
    """So many keys of each class, and their labels."""
    return [f"c{c}/{i:04d}.jpg" for c in range(classes) for i in range(count)], [
        c for c in range(classes) for _ in range(count)
    ]


# ---- what is found


def test_folders_are_listed_by_class_then_name_in_the_order_of_bytes(tmp_path):
    scan = scan_class_folders(write_files(tmp_path, NAMES), [])
    assert (list(scan.keys), scan.labels.tolist(), scan.class_names) == (IN_ORDER, LABELS, CLASSES)


@pytest.mark.parametrize("around", ["", "./", "train/", "some/where/train/"])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_has_the_keys_of_the_folder_it_was_made_of(tmp_path, around, format):
    contents = {f"{around}{name}": name.encode() for name in reversed(NAMES)}
    path = write_tar(
        tmp_path / "train.tar", {**contents, f"{around}a/readme.txt": b"x"}, format=format
    )
    scan = scan_tar(path, [])
    assert (list(scan.keys), scan.labels.tolist(), scan.class_names) == (IN_ORDER, LABELS, CLASSES)
    data = path.read_bytes()
    assert [data[offset : offset + size].decode() for offset, size in scan.places] == IN_ORDER


def test_a_tar_of_one_class_keeps_the_class(tmp_path):
    scan = scan_tar(
        write_tar(tmp_path / "a.tar", {"all/n01/1.jpg": b"1", "all/n01/2.jpg": b"2"}), []
    )
    assert scan.class_names == ["n01"] and list(scan.keys) == ["n01/1.jpg", "n01/2.jpg"]


def test_names_of_more_than_100_bytes_in_a_tar(tmp_path):
    long = "n01/" + "x" * 150 + ".jpg"
    path = write_tar(
        tmp_path / "a.tar", {long: b"123", "n02/a.jpg": b"45"}, format=tarfile.GNU_FORMAT
    )
    scan = scan_tar(path, [])
    assert list(scan.keys) == [long, "n02/a.jpg"]
    assert [path.read_bytes()[o : o + s] for o, s in scan.places] == [b"123", b"45"]


def test_the_last_of_two_tar_members_of_one_name_counts_as_when_unpacking(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a/1.jpg": b"old", "a/2.jpg": b"x"})
    with tarfile.open(path, "a") as tar:
        write_files(tmp_path / "more", {"a/1.jpg": b"newer"})
        tar.add(tmp_path / "more" / "a" / "1.jpg", "a/1.jpg")
    scan = scan_tar(path, [])
    assert list(scan.keys) == ["a/1.jpg", "a/2.jpg"]
    offset, size = scan.places[0]
    assert path.read_bytes()[offset : offset + size] == b"newer"


def test_images_without_classes(tmp_path):
    keys = ["a-b.jpg", "a.jpg", "a/x.jpg", "b/deep/1.png"]
    scan = scan_folder(write_files(tmp_path / "all", reversed(keys)))
    assert list(scan.keys) == keys and scan.labels.tolist() == [-1] * 4 and scan.class_names == []
    tar = scan_tar(write_tar(tmp_path / "a.tar", {f"photos/{key}": b"1" for key in keys}), None)
    assert list(tar.keys) == keys and tar.labels.tolist() == [-1] * 4 and tar.class_names == []


STRAY = [
    "readme.txt",
    "a/notes.md",
    "a/.hidden.jpg",
    "a/._1.jpg",
    ".cache/x.jpg",
    "a/.thumbs/1.jpg",
    "a/1.jpg.part",
    "a/no_suffix",
]


def test_stray_and_hidden_files_do_not_count(tmp_path):
    keys = ["a/1.jpg", "b/1.jpg"]
    root = write_files(tmp_path / "train", dict.fromkeys([*STRAY, *keys], b"1"))
    assert list(scan_class_folders(root, []).keys) == keys
    write_files(root, {"beside_the_classes.jpg": b"1"})
    assert list(scan_class_folders(root, []).keys) == keys
    tar = scan_tar(write_tar(tmp_path / "a.tar", dict.fromkeys([*STRAY, *keys], b"1")), [])
    assert list(tar.keys) == keys and tar.class_names == ["a", "b"]


def test_a_class_without_images_keeps_its_id_and_is_named(tmp_path, capsys):
    root = write_files(tmp_path / "train", ["a/1.jpg", "c/1.jpg"])
    (root / "b" / "empty").mkdir(parents=True)
    scan = scan_class_folders(root, [])
    assert scan.class_names == ["a", "b", "c"] and scan.labels.tolist() == [0, 2]
    assert "1 class folders hold no images (first: b)" in capsys.readouterr().err
    path = write_tar(
        tmp_path / "a.tar",
        {"train": None, "train/b": None, "train/a/1.jpg": b"1", "train/c/1.jpg": b"1"},
    )
    scan = scan_tar(path, [])
    assert scan.class_names == ["a", "b", "c"] and scan.labels.tolist() == [0, 2]
    assert "1 class folders hold no images (first: b)" in capsys.readouterr().err


@pytest.mark.parametrize("scan", [lambda root: scan_class_folders(root, []), scan_folder])
def test_an_empty_folder_is_an_error_that_names_it(tmp_path, scan):
    (tmp_path / "n01").mkdir()
    with pytest.raises(ValueError, match=r"no images .*correct the path") as error:
        scan(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path):
    root = write_files(tmp_path, ["a/1.jpg", "a/b/2.jpg"])
    (root / "a" / "b" / "loop").symlink_to(root / "a")
    (root / "c").symlink_to(root / "a" / "b")
    assert list(scan_class_folders(root, []).keys) == [
        "a/1.jpg",
        "a/b/2.jpg",
        "c/2.jpg",
        "c/loop/1.jpg",
    ]


def test_a_line_break_in_a_name_is_an_error(tmp_path):
    root = write_files(tmp_path / "train", {"a/1\n2.jpg": b""})
    with pytest.raises(ValueError, match="line break: rename"):
        cached_listing({}, lambda: scan_class_folders(root, []), str(tmp_path / "index"))


def test_names_that_are_no_utf8_are_kept_as_they_are(tmp_path):
    root = tmp_path / "train"
    (root / "a").mkdir(parents=True)
    try:
        (root / "a" / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system keeps names in UTF-8")
    found = cached_listing({}, lambda: scan_class_folders(root, []), str(tmp_path / "index"))
    assert (root / found.key(0)).read_bytes() == b"x"
    assert found.digest() == hashlib.sha256(b"a/\xff.jpg\n").hexdigest()


def test_an_unreadable_class_folder_is_named(tmp_path, monkeypatch):
    root = write_files(tmp_path / "train", ["a/1.jpg", "b/1.jpg"])
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError,
        match=(
            r"train/b: can't be read \(Permission denied\): see to its permissions, or move it away"
        ),
    ):
        cached_listing({}, lambda: scan_class_folders(root, []), str(tmp_path / "index"))


# ---- numberings


def test_ids_are_places_in_a_given_numbering(tmp_path):
    root = write_files(tmp_path, ["b/1.jpg", "d/1.jpg"])
    scan = scan_class_folders(root, [["a", "b", "c", "d"]])
    assert scan.labels.tolist() == [1, 3] and scan.class_names == ["a", "b", "c", "d"]


def test_the_first_numbering_that_has_all_classes_is_used(tmp_path):
    root = write_files(tmp_path, ["b/1.jpg", "d/1.jpg"])
    scan = scan_class_folders(root, [["a", "b", "c"], ["d", "b"], ["b", "d"]])
    assert scan.labels.tolist() == [1, 0] and scan.class_names == ["d", "b"]


def test_classes_without_a_place_are_named(tmp_path):
    root = write_files(tmp_path / "x", ["b/1.jpg", "d/1.jpg"])
    tar = write_tar(tmp_path / "x.tar", {"b/1.jpg": b"1", "d/1.jpg": b"1"})
    for place, scan in ((root, scan_class_folders), (tar, scan_tar)):
        message = (
            r"1 classes have no place in the numbering of 2 classes .*\(first: d\).*DATA.CLASS_LIST"
        )
        with pytest.raises(ValueError, match=message) as error:
            scan(place, [["a", "b"]])
        assert str(place) in str(error.value)


# ---- tar files that can't be used


@pytest.mark.parametrize("name", ["/etc/a/1.jpg", "../a/1.jpg", "a/../../1.jpg", "a/.."])
def test_a_tar_member_outside_of_the_archive_is_an_error(tmp_path, name):
    path = write_tar(tmp_path / "bad.tar", {"a/0.jpg": b"0", name: b"1"})
    with pytest.raises(
        ValueError,
        match=(
            r"bad.tar: member .* points outside of the archive: make the tar again with relative"
            r" paths"
        ),
    ):
        scan_tar(path, [])


def test_a_tar_cut_anywhere_is_an_error(tmp_path):
    path = write_tar(
        tmp_path / "cut.tar",
        {"a/0.jpg": b"0" * 700, "a/1.jpg": b"1" * 700},
        format=tarfile.USTAR_FORMAT,
    )
    data = path.read_bytes()
    end = 2 * (512 + 1024)  # two members: header and data in blocks of 512 bytes
    assert not any(data[end:])
    for length in [*range(0, end + 512, 100), 512, 1536, 1536 + 512, end]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut.tar: .*restore it"):
            scan_tar(path, [])
    path.write_bytes(data[: end + 512])
    assert len(scan_tar(path, []).keys) == 2


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "bad.tar", {"a/0.jpg": b"0", "a/1.jpg": b"1", "a/2.jpg": b"2"})
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 0xFF  # in the checksum of the second header
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"truncated or damaged at byte 1,024 .*restore it"):
        scan_tar(path, [])


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, bytes(100)])
def test_what_is_no_tar_is_an_error(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.tar: can't be read as a tar: .*restore it"):
        scan_tar(tmp_path / "x.tar", [])


def test_a_compressed_tar_is_to_be_unpacked(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/1.jpg": b"1"})
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x.tar.gz: .*it is compressed.*unpack it"):
        scan_tar(tmp_path / "x.tar.gz", [])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_sparse_members_are_named(tmp_path, kind):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a/link.jpg")
        info.type, info.linkname = kind, "0.jpg"
        tar.addfile(info)
    with pytest.raises(
        ValueError, match=r"member a/link.jpg is a link or has holes.*--hard-dereference"
    ):
        scan_tar(path, [])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["readme.txt"], r"no images .*expected <class>/"),
        (["train/a/1.jpg", "val/a/1.jpg"], r"holds train, val where class folders are expected"),
        (["1.jpg", "a/1.jpg"], r"1.jpg lies in no class folder.*DATA.DATASET folder"),
        (["1.jpg"], r"1.jpg lies in no class folder"),
    ],
)
def test_tars_of_another_layout_are_named(tmp_path, members, message):
    path = write_tar(tmp_path / "x.tar", dict.fromkeys(members, b"1"))
    with pytest.raises(ValueError, match=message) as error:
        scan_tar(path, [])
    assert str(path) in str(error.value)


# ---- ImageNet-22k's list of names


def names_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "in22k_image_names.txt"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_names_are_sorted_by_class_then_bytes(tmp_path, ending, last):
    rng = np.random.Generator(np.random.PCG64(0))
    names = sorted(
        {
            f"n{rng.integers(1, 30):08d}_{rng.integers(0, 10 ** rng.integers(1, 8))}"
            for _ in range(2000)
        }
    )
    shuffled = [names[i] for i in rng.permutation(len(names))]
    text = ending.join(shuffled[:100] + ["", ""] + shuffled[100:]) + (ending if last else "")
    for numberings in ([], [[f"n{i:08d}" for i in range(40)]]):
        scan = scan_names(names_file(tmp_path, text), numberings)
        classes = numberings[0] if numberings else sorted({name[:9] for name in names})
        assert list(scan.keys) == names
        assert [scan.class_names[label] for label in scan.labels] == [name[:9] for name in names]
        assert scan.class_names == classes


def test_a_sorted_list_is_taken_as_it_is(tmp_path):
    names = ["n00000001_1", "n00000001_10", "n00000001_9", "n00000003_2"]
    path = names_file(tmp_path, "\n".join(names) + "\n")
    scan = scan_names(path, [])
    assert bytes(scan.keys.blob) == path.read_bytes() and scan.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("\n\n", "lists no images"),
        ("n00000001_1\nn00000002\n", "line 2: 'n00000002' is no image name like n00007846_10001"),
        ("n00000001_1\n\nn0000002_12\n", "line 3: 'n0000002_12' is no"),
        ("n00000001_1\nx00000002_1\n", "line 2: 'x00000002_1' is no"),
        ("n00000001_1\nn0000000a_1\n", "line 2: 'n0000000a_1' is no"),
        ("n00000001_1\nn00000001_\n", "line 2: 'n00000001_' is no"),
        ("n00000001_" + "1" * 300, "line 1: .* is no"),
        ("n00000001_1\nn00000002_1\nn00000001_1\n", r"1 names stand twice \(first: n00000001_1\)"),
    ],
)
def test_lists_that_can_not_be_used(tmp_path, text, message):
    path = names_file(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        scan_names(path, [])
    assert str(path) in str(error.value)


def test_an_unknown_class_of_a_list_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"1 classes have no place .*\(first: n99999999\).*DATA.CLASS_LIST"
    ):
        scan_names(names_file(tmp_path, "n00000001_1\nn99999999_1\n"), [["n00000001", "n00000002"]])


# ---- kept in files


def test_a_listing_says_what_was_found_and_pickles_as_its_path(tmp_path):
    keys, labels = by_class(400)
    found = listed(keys, labels, tmp_path)
    assert (
        len(found) == 1200
        and list(found.keys) == keys
        and found.labels.tolist() == labels
        and found.num_classes == 3
    )
    assert [found.key(700), found.label(700)] == ["c1/0300.jpg", 1]
    text = "".join(f"{key}\n" for key in keys).encode()
    assert (
        found.digest() == hashlib.sha256(text).hexdigest()
        and (found.folder / "keys.txt").read_bytes() == text
    )
    packed = pickle.dumps(found)
    assert len(packed) < 300
    again = pickle.loads(packed)
    assert list(again.keys) == keys and again.digest() == found.digest()
    assert (
        isinstance(again.labels, np.memmap)
        and isinstance(again.keys.blob, np.memmap)
        and isinstance(again.keys.ends, np.memmap)
    )
    keys_again = pickle.loads(pickle.dumps(found.keys))
    assert keys_again[5] == keys[5] and len(pickle.dumps(found.keys)) < 400


def test_digests_of_folder_and_tar_are_equal(tmp_path):
    root = write_files(tmp_path / "train", NAMES)
    tar = write_tar(tmp_path / "train.tar", {f"train/{name}": b"1" for name in NAMES})
    index = str(tmp_path / "index")
    a = cached_listing({"kind": 1}, lambda: scan_class_folders(root, []), index)
    b = cached_listing({"kind": 2}, lambda: scan_tar(tar, []), index)
    assert a.digest() == b.digest() and a.labels.tolist() == b.labels.tolist()


class Counted:
    """A scan that counts how often it is run."""

    def __init__(self, scan):
        self.scan, self.count = scan, 0

    def __call__(self):
        self.count += 1
        return self.scan()


def test_it_is_scanned_once_and_again_when_the_data_changes(tmp_path):
    root = write_files(tmp_path / "train", ["a/1.jpg", "a/deep/1.jpg", "b/1.jpg"])
    scan = Counted(lambda: scan_class_folders(root, []))

    def keys(**options):
        return list(
            cached_listing({"root": str(root)}, scan, str(tmp_path / "index"), **options).keys
        )

    before = ["a/1.jpg", "a/deep/1.jpg", "b/1.jpg"]
    assert keys() == keys() == before and scan.count == 1
    time.sleep(0.02)  # the clock of file times is coarser than this program is fast
    write_files(root, {"a/deep/0.jpg": b"1"})
    assert (
        keys() == keys() == ["a/1.jpg", "a/deep/0.jpg", "a/deep/1.jpg", "b/1.jpg"]
        and scan.count == 2
    )
    time.sleep(0.02)
    write_files(root, {"c/1.jpg": b"1"})
    assert (
        keys() == ["a/1.jpg", "a/deep/0.jpg", "a/deep/1.jpg", "b/1.jpg", "c/1.jpg"]
        and scan.count == 3
    )
    time.sleep(0.02)
    (root / "b" / "1.jpg").rename(root / "b" / "2.jpg")
    assert "b/2.jpg" in keys() and scan.count == 4


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_tar_or_list_is_scanned_again(tmp_path, change):
    for path, scan in (
        (
            write_tar(tmp_path / "a.tar", {"a/1.jpg": b"1"}),
            Counted(lambda: scan_tar(tmp_path / "a.tar", [])),
        ),
        (
            names_file(tmp_path, "n00000001_1\n"),
            Counted(lambda: scan_names(tmp_path / "in22k_image_names.txt", [])),
        ),
    ):
        for _ in range(2):
            cached_listing({"path": str(path)}, scan, str(tmp_path / "index"))
        assert scan.count == 1
        status = path.stat()
        if change == "size":
            path.write_bytes(
                b"n00000001_1\nn00000001_2\n"
                if path.suffix == ".txt"
                else path.read_bytes() + bytes(10240)
            )
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (change == "time")))
        cached_listing({"path": str(path)}, scan, str(tmp_path / "index"))
        assert scan.count == 2


def test_asked_again_it_is_scanned_once_for_each_process(tmp_path, monkeypatch):
    scan = Counted(lambda: Scan(["a"], np.array([0]), ["a"]))
    for _ in range(3):
        cached_listing({}, scan, str(tmp_path))
    assert scan.count == 1
    monkeypatch.setattr(listing_module, "_SCANNED_HERE", set())  # as in a new process
    for _ in range(3):
        cached_listing({}, scan, str(tmp_path), again=True)
    assert scan.count == 2


def test_other_data_has_another_listing(tmp_path):
    a = cached_listing({"root": "a"}, lambda: Scan(["a"], np.array([0]), ["a"]), str(tmp_path))
    b = cached_listing({"root": "b"}, lambda: Scan(["b"], np.array([0]), ["b"]), str(tmp_path))
    assert [a.key(0), b.key(0)] == ["a", "b"]


def test_a_listing_in_use_outlives_a_new_one_and_old_ones_go(tmp_path, monkeypatch):
    def again(key):
        monkeypatch.setattr(listing_module, "_SCANNED_HERE", set())
        return cached_listing(
            {}, lambda: Scan([key], np.array([0]), ["a"]), str(tmp_path), again=True
        )

    first = again("a")
    second = again("b")
    assert pickle.loads(pickle.dumps(first)).key(0) == "a"  # as a worker that starts late opens it
    old = time.time() - 31 * 24 * 3600
    os.utime(first.folder / "listing.json", (old, old))
    (first.folder.parent / f".{first.folder.name}-left").mkdir()
    os.utime(first.folder.parent / f".{first.folder.name}-left", (old, old))
    third = again("c")
    assert sorted(path for path in third.folder.parent.iterdir() if path.is_dir()) == sorted(
        [second.folder, third.folder]
    )


def test_a_damaged_listing_is_made_anew(tmp_path):
    scan = Counted(lambda: Scan(["a", "b"], np.array([0, 0]), ["a"]))
    for name, data in (
        ("keys.txt", b"a\n"),
        ("ends.npy", b""),
        ("labels.npy", b""),
        ("listing.json", b"{"),
        ("watched.json", b""),
    ):
        folder = cached_listing({}, scan, str(tmp_path)).folder
        before = scan.count
        (folder / name).write_bytes(data)
        assert (
            list(cached_listing({}, scan, str(tmp_path)).keys) == ["a", "b"]
            and scan.count == before + 1
        )


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"file/listings: the list of images can't be kept there .*DATA.INDEX_DIR"
    ):
        cached_listing({}, lambda: Scan(["a"], np.array([0]), ["a"]), str(tmp_path / "file"))


def test_the_users_cache_is_used_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cached_listing({}, lambda: Scan(["a"], np.array([0]), ["a"]), "")
    assert found.folder.parent == tmp_path / "tinyvit" / "listings"


def _scan_and_report(folder: Path, barrier, index: str) -> None:
    def scan():
        (folder / f"scanned-{os.getpid()}").touch()
        time.sleep(0.2)
        return Scan(["a", "b"], np.array([0, 1]), ["a", "b"])

    barrier.wait(60)
    assert list(cached_listing({}, scan, index).keys) == ["a", "b"]


def test_of_several_processes_one_scans(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    started = [
        context.Process(target=_scan_and_report, args=(tmp_path, barrier, str(tmp_path / "index")))
        for _ in range(4)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 4
    assert len(list(tmp_path.glob("scanned-*"))) == 1


def test_without_locks_several_may_scan_and_all_get_a_whole_listing(tmp_path, monkeypatch):
    monkeypatch.setattr(listing_module, "fcntl", None)
    results, barrier = [], threading.Barrier(4)

    def ask():
        barrier.wait()
        found = cached_listing(
            {}, lambda: Scan(["a", "b"], np.array([0, 1]), ["a", "b"]), str(tmp_path)
        )
        results.append((list(found.keys), found.labels.tolist()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(["a", "b"], [0, 1])] * 4


def test_what_another_process_removes_meanwhile_is_no_fault(tmp_path):
    (tmp_path / "there").mkdir()
    assert [path for _, path in listing_module._dated([tmp_path / "gone", tmp_path / "there"])] == [
        tmp_path / "there"
    ]


def test_a_long_scan_says_how_far_it_is(capsys, monkeypatch):
    clock = iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(listing_module.time, "monotonic", lambda: next(clock))
    assert list(reported(range(60), "listing /data")) == list(range(60))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and lines[0].startswith("listing /data: 11 images so far (")
    assert list(reported([], "x")) == [] and capsys.readouterr().err == ""


def test_a_long_list_of_names_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "names.txt").write_text("n00007846_1\nn00007846_2\n")
    scan_names(tmp_path / "names.txt", [])
    assert not capsys.readouterr().err
    monkeypatch.setattr(scans, "MANY_NAMES", 2)
    scan_names(tmp_path / "names.txt", [])
    assert (
        capsys.readouterr().err
        == f"listing {tmp_path}/names.txt: 2 lines, which takes seconds for each million (once)\n"
    )


# ---- selections


def hashes_of(keys: list[str]) -> np.ndarray:
    return Keys.of(keys).hashes(listing_module.SUBSET_SALT)


@pytest.mark.parametrize("fraction", [0.5, 0.29, 0.1, 0.01])
def test_a_subset_takes_the_same_share_of_each_class(tmp_path, fraction):
    counts = [100, 200, 1300]
    keys = [f"c{c}/{i:04d}.jpg" for c, count in enumerate(counts) for i in range(count)]
    labels = np.repeat(np.arange(3), counts)
    found = listed(keys, labels, tmp_path)
    part = subset(found, fraction)
    assert np.bincount(part.labels).tolist() == [
        round(count * fraction * 100) // 100 for count in counts
    ]
    ranks = hashes_of(keys)
    expected = sorted(
        i
        for c, count in enumerate(counts)
        for i in sorted(np.flatnonzero(labels == c), key=lambda i: ranks[i])[
            : round(count * fraction * 100) // 100
        ]
    )
    assert list(part.keys) == [keys[i] for i in expected]
    assert [
        part.position(i) for i in range(len(part))
    ] == expected and part.whole.digest() == found.digest()
    assert (
        part.digest()
        == hashlib.sha256("".join(f"{key}\n" for key in part.keys).encode()).hexdigest()
    )
    assert part.class_names == found.class_names


def test_a_smaller_subset_is_part_of_a_larger_one_and_stays_the_same(tmp_path):
    found = listed(*by_class(200), tmp_path)
    sizes = [1, 0.7, 0.5, 0.333, 0.1, 0.02]
    parts = [set(subset(found, fraction).keys) for fraction in sizes]
    assert all(small < large for large, small in pairwise(parts))
    assert list(subset(found, 0.02).keys) == PINNED


PINNED = [
    "c0/0027.jpg",
    "c0/0062.jpg",
    "c0/0085.jpg",
    "c0/0141.jpg",
    "c1/0020.jpg",
    "c1/0061.jpg",
    "c1/0113.jpg",
    "c1/0148.jpg",
    "c2/0025.jpg",
    "c2/0086.jpg",
    "c2/0147.jpg",
    "c2/0154.jpg",
]


def test_a_selection_is_never_taken_for_the_whole(tmp_path):
    keys, labels = by_class(20)
    for _ in range(2):
        found = listed(keys, labels, tmp_path)
        assert len(found) == 60 and found.whole is found and found.position(7) == 7
        assert len(subset(found, 0.5)) == 30


def test_a_selection_of_a_selection_knows_the_whole(tmp_path):
    keys, labels = by_class(20)
    found = listed(keys, labels, tmp_path)
    (tmp_path / "out.txt").write_text("c0/0003.jpg\nc2/0019.jpg\n")
    part = pickle.loads(pickle.dumps(subset(exclude(found, str(tmp_path / "out.txt")), 0.5)))
    assert np.bincount(part.labels).tolist() == [9, 10, 9] and not {
        "c0/0003.jpg",
        "c2/0019.jpg",
    } & set(part.keys)
    assert list(part.whole.keys) == keys
    assert [keys[part.position(i)] for i in range(len(part))] == list(part.keys)


def test_selected_images_keep_their_places(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {f"c{c}/{i}.jpg": f"{c}{i}".encode() for c in range(2) for i in range(10)},
    )
    part = subset(cached_listing({}, lambda: scan_tar(path, []), str(tmp_path / "index")), 0.3)
    data = path.read_bytes()
    for i in range(len(part)):
        offset, size = part.place(i)
        assert data[offset : offset + size].decode() == part.key(i)[1] + part.key(i)[3]


def test_unlabelled_images_have_subsets_too(tmp_path):
    found = listed([f"{i:03d}.jpg" for i in range(100)], [-1] * 100, tmp_path, ())
    assert len(subset(found, 0.25)) == 25
    with pytest.raises(
        ValueError, match="less than one image of class the unlabelled images, which has 100"
    ):
        subset(found, 0.001)


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.3333), (7, 0.1), (200, 0.001)])
def test_a_subset_of_less_than_one_image_says_what_would_do(tmp_path, count, fraction):
    keys, labels = by_class(count)
    found = listed(
        [*keys, *(f"z/{i}" for i in range(2 * count))],
        [*labels, *[3] * (2 * count)],
        tmp_path,
        ("c0", "c1", "c2", "z"),
    )
    message = (
        rf"DATA.SUBSET = {fraction}: less than one image of class c0, which has {count}: use at"
        r" least"
    )
    with pytest.raises(ValueError, match=message) as error:
        subset(found, fraction)
    enough = float(str(error.value).rpartition(" ")[2])
    assert np.bincount(subset(found, enough).labels).tolist()[:3] == [1, 1, 1]


def test_excluded_keys_are_left_out(tmp_path):
    keys, labels = by_class(5)
    found = listed(keys, labels, tmp_path)
    out = tmp_path / "out.txt"
    out.write_bytes(b"c1/0002.jpg\r\n\r\nc0/0000.jpg\nc1/0002.jpg")
    part = exclude(found, str(out))
    assert list(part.keys) == [key for key in keys if key not in ("c1/0002.jpg", "c0/0000.jpg")]
    out.write_text("\n")
    assert exclude(found, str(out)) is found and exclude(found, "") is found
    out.write_text("c2/0000.jpg\n")  # another list under the same name
    assert list(exclude(found, str(out)).keys) == [key for key in keys if key != "c2/0000.jpg"]


def test_unknown_keys_to_exclude_are_named(tmp_path):
    found = listed(*by_class(5), tmp_path)
    (tmp_path / "out.txt").write_text("c0/0001.jpg\n" + "".join(f"x{i}.jpg\n" for i in range(9)))
    with pytest.raises(
        ValueError,
        match=(
            r"out.txt: 9 of 10 keys are not in the data \(first: x0.jpg, x1.jpg, x2.jpg, x3.jpg,"
            r" x4.jpg\); "
            "a key looks like c0/0000.jpg"
        ),
    ):
        exclude(found, str(tmp_path / "out.txt"))


def test_lists_of_keys_that_leave_nothing_or_are_not_there(tmp_path):
    keys, labels = by_class(2)
    found = listed(keys, labels, tmp_path)
    (tmp_path / "all.txt").write_text("\n".join(keys))
    with pytest.raises(ValueError, match=r"DATA.EXCLUDE = .*all.txt: names every image"):
        exclude(found, str(tmp_path / "all.txt"))
    with pytest.raises(ValueError, match=r"DATA.EXCLUDE = .*none.txt: can't be read"):
        exclude(found, str(tmp_path / "none.txt"))


def test_a_selection_is_made_once(tmp_path, monkeypatch):
    """Opening one again computes nothing: with 14 million images that would take each process of
    each run half a minute.
    """
    found = listed(*by_class(20), tmp_path)
    out = tmp_path / "out.txt"
    out.write_text("c1/0007.jpg\n")
    expected = list(subset(exclude(found, str(out)), 0.5).keys)
    monkeypatch.setattr(Keys, "hashes", lambda *args: pytest.fail("computed again"))
    out.write_bytes(b"\r\nc1/0007.jpg")  # the same choice
    assert list(subset(exclude(listed(*by_class(20), tmp_path), str(out)), 0.5).keys) == expected
    monkeypatch.undo()
    out.write_text("c1/0008.jpg\n")
    assert "c1/0007.jpg" in exclude(found, str(out)).keys


def test_a_damaged_selection_is_made_anew(tmp_path):
    found = listed(*by_class(20), tmp_path)
    part = subset(found, 0.5)
    expected, keys = list(part.keys), part.folder / "keys.txt"
    for data in (b"", keys.read_bytes()[:-1]):
        keys.write_bytes(data)
        assert list(subset(found, 0.5).keys) == expected
    (part.folder / "listing.json").unlink()
    assert list(subset(found, 0.5).keys) == expected


def test_a_selection_that_can_not_be_kept_is_named(tmp_path):
    found = listed(*by_class(20), tmp_path)
    (found.folder / "selected").write_text("a file where a folder should be")
    with pytest.raises(
        ValueError,
        match=rf"{found.folder}: the list of images can't be kept there \(.*\): name a folder in",
    ):
        subset(found, 0.5)


def select_in_process(folder, queue) -> None:
    made = []
    part = Listing(folder).select("some", lambda: made.append(1) or time.sleep(0.2) or np.arange(5))
    queue.put((len(made), list(part.keys)))


def test_of_several_processes_one_selects(tmp_path):
    found = listed(*by_class(20), tmp_path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=select_in_process, args=(found.folder, queue)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sum(made for made, _ in results) == 1 and all(
        keys == list(found.keys)[:5] for _, keys in results
    )


def test_names_in_a_users_file(tmp_path):
    path = tmp_path / "names.txt"
    # as some editors and file systems make them
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n a b \nnext\xc2\x85line\n\xff\xfe.jpg")
    assert read_names(str(path), "KEY") == [
        "first",
        " a b ",
        "next\x85line",
        os.fsdecode(b"\xff\xfe.jpg"),
    ]
    with pytest.raises(
        ValueError,
        match=(
            r"KEY = .*none: can't be read \(No such file or directory\): name a file, one name a"
            r" line"
        ),
    ):
        read_names(str(tmp_path / "none"), "KEY")


def test_keys_that_are_no_utf8_can_be_excluded(tmp_path):
    names = [os.fsdecode(b"a/\xff.jpg"), "a/x\u2028y.jpg", "a/z.jpg"]
    found = listed(names, [0, 0, 0], tmp_path)
    (tmp_path / "out.txt").write_bytes(b"a/\xff.jpg\n" + "a/x\u2028y.jpg\n".encode())
    assert list(exclude(found, str(tmp_path / "out.txt")).keys) == ["a/z.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_a_pipe_is_no_image_but_a_broken_link_is_one(tmp_path):
    """Opening a pipe waits for ever; an image that a link should lead to is missed when it is
    opened.
    """
    write_files(tmp_path, ["a/1.jpg"])
    os.mkfifo(tmp_path / "a" / "2.jpg")
    (tmp_path / "a" / "3.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "a" / "4.jpg").symlink_to("1.jpg")
    assert list(scan_class_folders(tmp_path, []).keys) == ["a/1.jpg", "a/3.jpg", "a/4.jpg"]


def test_real_images_in_a_tar(shared_data, tmp_path):
    found = cached_listing(
        {}, lambda: scan_tar(shared_data / "imagenet_val_sample.tar", []), str(tmp_path)
    )
    assert len(found) == 1369 and found.num_classes == 730
    assert all(
        key.split("/")[0] == found.class_names[label]
        for key, label in zip(found.keys, found.labels)
    )


def test_the_files_here_are_images():
    assert encoded(picture(1)) != encoded(picture(2))
