"""Which images are found, in which order, under which keys and labels."""

import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.images.listing import cached_listing
from data.images.scans import scan_folder, scan_names, scan_tar, scan_zips
from tests.support.images import write_files, write_tar, write_zip

NAMES = "b/2.jpg b/10.JPEG a-b/x.png a/deep/er/z.bmp a/Z.webp a/y.ppm é/ü.jpg".split()
IN_ORDER = "a/Z.webp a/deep/er/z.bmp a/y.ppm a-b/x.png b/10.JPEG b/2.jpg é/ü.jpg".split()
LABELS = [0, 0, 0, 1, 2, 2, 3]
CLASSES = ["a", "a-b", "b", "é"]


def found_in(scan) -> tuple[list[str], list[int], list[str]]:
    return list(scan.keys), scan.labels.tolist(), scan.class_names


def bytes_at(path: Path, scan) -> list[bytes]:
    data = path.read_bytes()
    return [data[offset : offset + size] for offset, size in scan.spans]


def tar_of_names(path: Path, names) -> Path:
    return write_tar(path, {name: name.encode() for name in names})


# ---- folders and tar files


def test_folders_are_listed_by_class_then_name_in_the_order_of_bytes(tmp_path):
    scan = scan_folder(write_files(tmp_path, NAMES), [])
    assert found_in(scan) == (IN_ORDER, LABELS, CLASSES)


@pytest.mark.parametrize("around", ["", "./", "train/", "some/where/train/"])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_has_the_keys_of_the_folder_it_was_made_of(tmp_path, around, format):
    contents = {f"{around}{name}": name.encode() for name in reversed(NAMES)}
    contents[f"{around}a/readme.txt"] = b"x"
    path = write_tar(tmp_path / "train.tar", contents, format=format)
    scan = scan_tar(path, [])
    assert found_in(scan) == (IN_ORDER, LABELS, CLASSES)
    assert bytes_at(path, scan) == [name.encode() for name in IN_ORDER]


def test_a_tar_of_one_class_keeps_the_class(tmp_path):
    path = tar_of_names(tmp_path / "a.tar", ["all/n01/1.jpg", "all/n01/2.jpg"])
    assert found_in(scan_tar(path, [])) == (["n01/1.jpg", "n01/2.jpg"], [0, 0], ["n01"])


def test_names_of_more_than_100_bytes_in_a_tar(tmp_path):
    contents = {f"n01/{'x' * 150}.jpg": b"123", "n02/a.jpg": b"45"}
    path = write_tar(tmp_path / "a.tar", contents, format=tarfile.GNU_FORMAT)
    scan = scan_tar(path, [])
    assert dict(zip(scan.keys, bytes_at(path, scan))) == contents


def test_the_last_of_two_tar_members_of_one_name_counts_as_when_unpacking(tmp_path):
    path = tar_of_names(tmp_path / "a.tar", ["a/1.jpg", "a/2.jpg"])
    with tarfile.open(path, "a") as tar:
        write_files(tmp_path, {"newer": b"newer"})
        tar.add(tmp_path / "newer", "a/1.jpg")
    scan = scan_tar(path, [])
    assert dict(zip(scan.keys, bytes_at(path, scan))) == {
        "a/1.jpg": b"newer",
        "a/2.jpg": b"a/2.jpg",
    }


def test_images_without_classes(tmp_path):
    keys = ["a-b.jpg", "a.jpg", "a/x.jpg", "b/deep/1.png"]
    folder = write_files(tmp_path / "all", reversed(keys))
    tar = tar_of_names(tmp_path / "a.tar", [f"photos/{key}" for key in keys])
    for scan in (scan_folder(folder, None), scan_tar(tar, None)):
        assert found_in(scan) == (keys, [-1] * 4, [])


def test_stray_and_hidden_files_do_not_count(tmp_path):
    keys = ["a/1.jpg", "b/1.jpg"]
    stray = (
        "readme.txt a/notes.md a/.hidden.jpg a/._1.jpg .cache/x.jpg a/.thumbs/1.jpg a/1.jpg.part"
        " a/no_suffix"
    ).split()
    tar = tar_of_names(tmp_path / "a.tar", [*stray, *keys])
    folder = write_files(tmp_path / "train", [*stray, *keys, "beside_the_classes.jpg"])
    for scan in (scan_tar(tar, []), scan_folder(folder, [])):
        assert found_in(scan) == (keys, [0, 1], ["a", "b"])


def test_a_class_without_images_keeps_its_id_and_is_named(tmp_path, capsys):
    root = write_files(tmp_path / "train", ["a/1.jpg", "c/1.jpg"])
    (root / "b" / "empty").mkdir(parents=True)
    members = {"train": None, "train/b": None, "train/a/1.jpg": b"1", "train/c/1.jpg": b"1"}
    tar = write_tar(tmp_path / "a.tar", members)
    for scan, path in ((scan_folder, root), (scan_tar, tar)):
        assert found_in(scan(path, [])) == (["a/1.jpg", "c/1.jpg"], [0, 2], ["a", "b", "c"])
        shown = capsys.readouterr().err
        assert "no images in 1 of 3 class folders (first: b), which keep their ids" in shown
        assert "remove the folder, or put images into it" in shown


@pytest.mark.parametrize("class_lists", [[], None])
def test_an_empty_folder_is_an_error_that_names_it(tmp_path, class_lists):
    (tmp_path / "n01").mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path}: no images .*correct the path"):
        scan_folder(tmp_path, class_lists)


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path):
    root = write_files(tmp_path, ["a/1.jpg", "a/b/2.jpg"])
    (root / "a" / "b" / "loop").symlink_to(root / "a")
    (root / "c").symlink_to(root / "a" / "b")
    keys = ["a/1.jpg", "a/b/2.jpg", "c/2.jpg", "c/loop/1.jpg"]
    assert list(scan_folder(root, []).keys) == keys


@pytest.mark.parametrize("class_lists", [[], None])
def test_links_to_folders_are_announced_for_their_images_count_twice(tmp_path, class_lists, capsys):
    root = write_files(tmp_path / "train", ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "here").symlink_to(root)  # this one is what the user named
    assert len(scan_folder(tmp_path / "here", class_lists).keys) == 2
    assert capsys.readouterr().err == ""
    (root / "b" / "other").symlink_to(root / "a")
    (root / "c").symlink_to(root / "a")
    assert len(scan_folder(root, class_lists).keys) == 4
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {root}: 2 folders are links (first: {root}/")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_a_pipe_is_no_image_but_a_broken_link_is_one(tmp_path):
    """Opening a pipe waits for ever; what a link should lead to is missed when it is opened."""
    write_files(tmp_path, ["a/1.jpg"])
    os.mkfifo(tmp_path / "a" / "2.jpg")
    (tmp_path / "a" / "3.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "a" / "4.jpg").symlink_to("1.jpg")
    assert list(scan_folder(tmp_path, []).keys) == ["a/1.jpg", "a/3.jpg", "a/4.jpg"]


def test_a_line_break_in_a_name_is_an_error(tmp_path):
    root = write_files(tmp_path / "train", {"a/1\n2.jpg": b""})
    with pytest.raises(ValueError, match="line break: rename"):
        cached_listing({}, lambda: scan_folder(root, []), str(tmp_path / "index"))


def test_names_that_are_no_utf8_are_kept_as_they_are(tmp_path):
    try:
        root = write_files(tmp_path / "train", {os.fsdecode(b"a/\xff.jpg"): b"x"})
    except OSError:
        pytest.skip("a file system of names that are text")
    found = cached_listing({}, lambda: scan_folder(root, []), str(tmp_path / "index"))
    assert (root / found.key(0)).read_bytes() == b"x"
    assert found.keys.digest() == hashlib.sha256(b"a/\xff.jpg\n").hexdigest()


def test_an_unreadable_class_folder_is_named(tmp_path, monkeypatch):
    root = write_files(tmp_path / "train", ["a/1.jpg", "b/1.jpg"])
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"train/b: can't be read \(Permission denied\): see to"):
        cached_listing({}, lambda: scan_folder(root, []), str(tmp_path / "index"))


@pytest.mark.parametrize(
    ("class_lists", "labels"),
    [([["a", "b", "c", "d"]], [1, 3]), ([["a", "b", "c"], ["d", "b"], ["b", "d"]], [1, 0])],
)
def test_labels_follow_the_first_class_list_that_has_all_classes(tmp_path, class_lists, labels):
    scan = scan_folder(write_files(tmp_path, ["b/1.jpg", "d/1.jpg"]), class_lists)
    assert scan.labels.tolist() == labels
    assert [scan.class_names[label] for label in labels] == ["b", "d"]


def test_classes_that_no_class_list_has_are_named(tmp_path):
    names = ["b/1.jpg", "d/1.jpg"]
    root = write_files(tmp_path / "x", names)
    tar = tar_of_names(tmp_path / "x.tar", names)
    for path, scan in ((root, scan_folder), (tar, scan_tar)):
        message = rf"{path}: 1 classes have no place in the numbering of 2 classes .*\(first: d\)"
        with pytest.raises(ValueError, match=message):
            scan(path, [["a", "b"]])


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
    path = tar_of_names(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        scan_tar(path, [])


# ---- ImageNet-22k's list of names


def names_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "in22k_image_names.txt"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_names_are_sorted_by_class_then_bytes(tmp_path, ending, last):
    rng = np.random.Generator(np.random.PCG64(0))
    numbers = rng.integers(0, 10 ** rng.integers(1, 8, 2000))
    names = sorted({f"n{rng.integers(1, 30):08d}_{number}" for number in numbers})
    shuffled = [names[i] for i in rng.permutation(len(names))]
    text = ending.join(shuffled[:100] + ["", ""] + shuffled[100:]) + (ending if last else "")
    path = names_file(tmp_path, text)
    for class_lists in ([], [[f"n{i:08d}" for i in range(40)]]):
        scan = scan_names(path, class_lists)
        assert list(scan.keys) == names
        assert [scan.class_names[label] for label in scan.labels] == [name[:9] for name in names]
        classes = sorted({name[:9] for name in names})
        assert scan.class_names == (class_lists[0] if class_lists else classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("\n\n", "lists no images"),
        ("n00000001_1\nn00000002\n", "'n00000002' is no image name like n00007846_10001"),
        ("n00000001_1\n\nn0000002_12\n", "'n0000002_12' is no"),
        ("n00000001_1\nx00000002_1\n", "'x00000002_1' is no"),
        ("n00000001_1\nn0000000a_1\n", "'n0000000a_1' is no"),
        ("n00000001_1\nn00000001_\n", "'n00000001_' is no"),
        ("n00000001_" + "1" * 300, "'n00000001_11.* is no"),
        ("n00000001_1\nn00000002_1\nn00000001_1\n", r"1 names stand twice \(first: n00000001_1\)"),
    ],
)
def test_lists_that_can_not_be_used(tmp_path, text, message):
    path = names_file(tmp_path, text)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        scan_names(path, [])


def test_an_unknown_class_of_a_list_is_named(tmp_path):
    path = names_file(tmp_path, "n00000001_1\nn99999999_1\n")
    with pytest.raises(ValueError, match=r"1 classes have no place .*\(first: n99999999\)"):
        scan_names(path, [["n00000001", "n00000002"]])


def test_members_of_zip_files_are_found(tmp_path, capsys):
    names = [f"n0000000{c}_{i}" for c in range(4) for i in range(3)]
    for c in range(3):
        members = {f"{name}.png": name.encode() for name in names if name[8] == str(c)}
        write_zip(tmp_path / f"n0000000{c}.zip", members)
    (tmp_path / "n00000003.zip").write_bytes(b"broken")
    path = names_file(tmp_path, "\n".join([*names, "n00000001_9"]))
    scan = scan_zips(path, [], "{}.png")
    assert "n00000003.zip: can't be read" in capsys.readouterr().err
    spans = dict(zip(scan.keys, scan.spans.tolist()))
    for name in names[:9]:
        offset, size = spans[name]
        data = (tmp_path / f"{name[:9]}.zip").read_bytes()[offset : offset + size]
        assert data.startswith(b"PK\3\4") and name.encode() + b".png" + name.encode() in data
    unknown = [name for name, (offset, _) in spans.items() if offset == -1]
    assert unknown == ["n00000001_9", *names[9:]]
    (tmp_path / "n00000002.zip").unlink()
    with pytest.raises(ValueError, match=r"1 of its classes have no zip .*\(first: n00000002\)"):
        scan_zips(path, [], "{}.png")
    some = scan_zips(path, [], "{}.png", only="n00000001")
    assert (some.spans[:, 0] >= 0).tolist() == [3 <= i < 6 for i in range(13)]
