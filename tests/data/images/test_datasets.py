"""The data sets: every layout, class lists, what is left out, and images that can't be read."""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import datasets as datasets_module
from data.images import layout
from data.images.datasets import ListedImages
from data.images.reading import CorruptImage
from tests.docs.documents import marked
from tests.support.helpers import ROOT
from tests.support.images import (
    built,
    encoded,
    in_processes,
    picture,
    write_files,
    write_tar,
    write_zip,
)

IMAGES = {
    f"{split}/{name}/{i}.png": encoded(picture(100 * number + i))
    for split in ("train", "val")
    for number, name in enumerate(("cat", "dog", "eel"))
    for i in range(4)
}
ONE = encoded(picture(1))


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def is_picture(image: Image.Image, number: int) -> bool:
    return digest(image) == digest(picture(number))


def contents(dataset: ListedImages) -> list[tuple[str, str, int]]:
    """Key, digest of the pixels and label of each image."""
    samples = ((key, dataset[i]) for i, key in enumerate(dataset.get_keys()))
    return [(key, digest(image), label) for key, (image, label) in samples]


def labels_of(dataset: ListedImages) -> list[int]:
    return dataset.listing.labels.tolist()


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "ImageNet", IMAGES)


def tar_of(folder: Path, split: str, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        tar.add(folder / split, split)
    return path


# ---- ImageNet: folders and tar files


def test_a_folder_of_class_folders(folder):
    dataset = built("train", DATA_PATH=folder)
    assert len(dataset) == 12 and dataset.num_classes == 3
    assert dataset.class_names == ["cat", "dog", "eel"]
    assert dataset.get_keys()[5] == "dog/1.png"
    image, label = dataset[5]
    assert image.mode == "RGB" and is_picture(image, 101) and label == 1 and type(label) is int
    assert is_picture(dataset[-1][0], 203) and is_picture(dataset[np.int64(5)][0], 101)
    with pytest.raises(IndexError):
        dataset[12]


@pytest.mark.parametrize("name", ["imagenet", "cifar10"])
@pytest.mark.parametrize("form", ["folder", "{split}.tar", "one tar each"])
def test_tar_files_hold_the_same_set_as_the_folder(folder, tmp_path, form, name):
    train = tar_of(folder, "train", tmp_path / "tars" / "train.tar")
    val = tar_of(folder, "val", tmp_path / "tars" / "val.tar")
    options = {
        "folder": {"DATA_PATH": folder},
        "{split}.tar": {"DATA_PATH": train.parent},
        "one tar each": {"DATA_PATH": train, "VAL_PATH": val},
    }
    expected = [
        (f"{name}/{i}.png", digest(picture(100 * label + i)), label)
        for label, name in enumerate(("cat", "dog", "eel"))
        for i in range(4)
    ]
    for split in ("train", "val"):
        assert contents(built(split, DATASET=name, **options[form])) == expected


def test_one_tar_is_read_by_evaluation_but_not_for_both_splits(folder, tmp_path):
    tar = tar_of(folder, "val", tmp_path / "some.tar")
    with pytest.raises(ValueError, match=r"some.tar: one file .*VAL_PATH, or .*DATA.HELD_OUT 0.2"):
        built("val", DATA_PATH=tar)
    dataset = built("val", "EVAL_MODE", True, DATA_PATH=tar)
    assert contents(dataset) == contents(built("val", DATA_PATH=folder))


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("train", {}, "DATA.DATA_PATH is empty: say where imagenet lies with --data-path"),
        ("train", {"DATA_PATH": "none"}, "none: no such file or folder; correct --data-path"),
        ("val", {"VAL_PATH": "none"}, "DATA.VAL_PATH = .*none: no such file or folder"),
        ("train", {"DATA_PATH": "empty"}, "has neither train/ nor train.tar: correct --data-path$"),
        ("train", {"DATA_PATH": "flat"}, "for images without labels set DATA.DATASET folder: corr"),
        (
            "train",
            {"DATA_PATH": "own"},
            r"classes, move them into \S+own/train and .* DATA.HELD_OUT 0.2",
        ),
        (
            "train",
            {"DATA_PATH": "owns/train"},
            "neither .*; give the folder around it: correct --da",
        ),
        ("val", {"DATA_PATH": "."}, r"unpack val.tar.gz, .*, or set DATA.VAL_PATH$"),
        (
            "val",
            {"DATA_PATH": "half"},
            r"half: has neither val/ nor val.tar: correct --data-path, or set DATA.VAL_PATH, or"
            r" hold some images of training out with DATA.HELD_OUT 0.2$",
        ),
        ("val", {"VAL_PATH": "flat"}, r"flat: no images .*: expected .*/<class>/\*.JPEG"),
    ],
)
def test_a_split_that_is_not_there_is_named(tmp_path, split, options, message):
    (tmp_path / "val.tar.gz").write_bytes(b"")
    write_files(tmp_path / "flat", ["1.png", "2.png"])
    write_files(tmp_path / "own", ["cat/1.png", "dog/1.png"])
    write_files(tmp_path / "owns", ["train/cat/1.png", "val/cat/1.png"])
    write_files(tmp_path / "half", ["train/cat/1.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        built(split, **{key: tmp_path / name for key, name in options.items()})


@pytest.mark.parametrize(
    ("file", "wanted", "found"),
    [
        ("all.parquet", "imagenet", "parquet"),
        ("data/train-0.parquet", "cifar100", "parquet"),
        ("train-0.tar", "imagenet22k", "webdataset"),
        ("in22k_image_names.txt", "imagenet", "imagenet22k"),
        ("cifar-10-batches-py/1", "folder", "cifar10"),
        ("train/cat/1.png", "webdataset", "imagenet"),
        ("train.tar", "parquet", "imagenet"),
    ],
)
def test_another_layout_is_recognised(file, wanted, found, tmp_path):
    write_files(tmp_path, {file: b""})
    with pytest.raises(ValueError, match=f"; what lies there looks like DATA.DATASET {found}[:;]"):
        built("train", DATASET=wanted, DATA_PATH=tmp_path)


def test_the_data_may_be_read_only_and_the_index_lies_elsewhere(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    built("train", DATA_PATH=folder, INDEX_DIR=tmp_path / "index", SUBSET=0.5)
    assert sorted(folder.rglob("*")) == before
    assert list((tmp_path / "index" / "listings").glob("*/keys.npy"))


def test_new_images_are_found_and_reindex_scans_again(folder):
    assert len(built("train", DATA_PATH=folder)) == 12
    write_files(folder, {"train/new/1.png": ONE})
    assert built("train", DATA_PATH=folder).class_names == ["cat", "dog", "eel", "new"]
    assert len(built("train", DATA_PATH=folder, REINDEX=True)) == 13


# ---- class lists


@pytest.mark.parametrize("form", ["folder", "train.tar", "folder of train.tar"])
def test_validation_classes_keep_the_ids_of_training(folder, tmp_path, form):
    write_files(folder, {"train/ape/1.png": ONE, "train/fox/1.png": ONE})
    tar = tar_of(folder, "train", tmp_path / "tars" / "train.tar")
    paths = {"folder": folder, "train.tar": tar, "folder of train.tar": tar.parent}
    dataset = built("val", DATA_PATH=paths[form], VAL_PATH=folder / "val")
    assert dataset.class_names == ["ape", "cat", "dog", "eel", "fox"]
    assert set(labels_of(dataset)) == {1, 2, 3} and dataset[0][1] == 1


def test_validation_classes_unknown_to_training_are_named(folder):
    write_files(folder, {"val/yak/1.png": ONE})
    with pytest.raises(ValueError, match=r"val: 1 classes have no place .* 3 .*\(first: yak\)"):
        built("val", DATA_PATH=folder)


def test_validation_alone_is_numbered_by_itself(folder):
    dataset = built("val", VAL_PATH=folder / "val")
    assert dataset.class_names == ["cat", "dog", "eel"]
    assert contents(dataset) == contents(built("val", VAL_PATH=folder))


def test_a_list_of_classes_in_a_file(folder, tmp_path):
    path = write_lines(tmp_path / "list.txt", "eel", "owl", "cat", "", "dog")
    for split in ("train", "val"):
        dataset = built(split, DATA_PATH=folder, CLASS_LIST=path)
        assert dataset.num_classes == 4 and labels_of(dataset)[::4] == [2, 3, 0]
    write_lines(path, "eel", "cat")  # the same file now says something else
    with pytest.raises(ValueError, match=r"\(first: dog\): set DATA.CLASS_LIST to a list that has"):
        built("train", DATA_PATH=folder, CLASS_LIST=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "neither imagenet1k nor imagenet22k, and no file"),
        ("", "it is empty"),
        ("a\nb\na\n", "a stands twice"),
    ],
)
def test_lists_of_classes_that_can_not_be_used(folder, tmp_path, text, message):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"DATA.CLASS_LIST = .*list.txt: {message}"):
        built("train", DATA_PATH=folder, CLASS_LIST=tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("split", "classes", "class_list", "expected"),
    [
        # n02110341 and n04399382 are classes 251 and 850 of 1k; the second has no place in 22k, and
        # n00007846 none in 1k
        ("train", ["n00007846", "n02110341"], "imagenet22k", 21841),
        ("train", ["n00007846", "n02110341"], "imagenet1k", "1000 classes.*first: n00007846"),
        ("val", ["n02110341", "n04399382"], "imagenet22k", 1000),
        ("val", ["n02110341", "n04399382"], "", "2 classes .*first: n04399382"),
        ("val", ["n04399382", "n99999999"], "imagenet22k", "21841 .*: n04399382, n99999999"),
        # all have a place in training's list
        ("val", ["n02110341"], "imagenet22k", 21841),
    ],
)
def test_class_folders_in_imagenets_class_lists(tmp_path, split, classes, class_list, expected):
    names = [f"train/{wnid}/1.png" for wnid in ("n00007846", "n02110341")]
    write_files(tmp_path, [*names, *(f"{split}/{wnid}/1.png" for wnid in classes)])
    options = {"DATA_PATH": tmp_path, **({"CLASS_LIST": class_list} if class_list else {})}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"no place in the numbering of {expected}"):
            built(split, **options)
    else:
        dataset = built(split, **options)
        numbering = layout.class_list("imagenet1k" if expected == 1000 else "imagenet22k")
        assert dataset.class_names == numbering and dataset.num_classes == expected
        assert labels_of(dataset) == list(map(numbering.index, classes))
        assert expected != 1000 or labels_of(dataset) == [251, 850]


def test_real_validation_images_keep_imagenets_ids(shared_data):
    path = shared_data / "imagenet_val_sample.tar"
    dataset = built("val", VAL_PATH=path, CLASS_LIST="imagenet1k")
    assert len(dataset) == 1369 and dataset.num_classes == 1000
    names = layout.class_list("imagenet1k")
    for i in range(0, 1369, 137):
        image, label = dataset[i]
        assert image.mode == "RGB"
        assert dataset.get_keys()[i].startswith(f"{names[label]}/ILSVRC2012_val_")


# ---- ImageNet-22k

WNIDS = ["n00007846", "n00012345", "n00099999"]
NAMES_22K = [f"{wnid}_{i}" for wnid in WNIDS for i in (10026, 1009, 3)]


@pytest.fixture
def folder_22k(tmp_path):
    """Three zip files and the list of what is in them; the i-th image is picture(i)."""
    root = tmp_path / "ImageNet-22k"
    root.mkdir()
    members = {f"{name}.jpeg": encoded(picture(i)) for i, name in enumerate(NAMES_22K)}
    for wnid in WNIDS:
        some = {name: data for name, data in members.items() if name.startswith(wnid)}
        write_zip(root / f"{wnid}.zip", some)
    write_lines(root / layout.NAME_LIST, *reversed(NAMES_22K))
    return root


def built_22k(folder: Path, split: str = "train", **more) -> ListedImages:
    return built(split, DATASET="imagenet22k", DATA_PATH=folder, **more)


def test_zips_by_a_list_of_names(folder_22k):
    dataset = built_22k(folder_22k)
    assert dataset.class_names == WNIDS
    expected = [(name, digest(picture(i)), i // 3) for i, name in enumerate(NAMES_22K)]
    assert contents(dataset) == expected
    # a member that was not where it is now when the listing was made is found by its name
    members = {f"{name}.jpeg": encoded(picture(i)) for i, name in enumerate(NAMES_22K)}
    write_zip(folder_22k / "n00007846.zip", dict(reversed(members.items())))
    assert contents(built_22k(folder_22k)) == expected


def test_debug_uses_one_class_with_its_id_and_its_zip_alone(folder_22k):
    (folder_22k / "n00012345.zip").unlink()
    (folder_22k / "n00099999.zip").write_bytes(b"broken")
    write_lines(folder_22k / layout.NAME_LIST, *NAMES_22K, "n00001111_1")
    for _ in range(2):
        dataset = built_22k(folder_22k, DEBUG=True)
        assert list(dataset.get_keys()) == NAMES_22K[:3] and dataset.num_classes == 4
        assert dataset[0][1] == 1 and is_picture(dataset[0][0], 0)
    write_lines(folder_22k / layout.NAME_LIST, "n00001111_1")
    with pytest.raises(ValueError, match=r"has no images of the classes n00007846\*, which alone"):
        built_22k(folder_22k, DEBUG=True)


def test_names_of_members_follow_a_format(folder_22k):
    dataset = built_22k(folder_22k, FNAME_FORMAT="{}.JPEG")
    message = r"n00007846.zip: has no member n00007846_10026.JPEG: DATA.FNAME_FORMAT must fit"
    with pytest.raises(CorruptImage, match=message):
        dataset[0]
    assert dataset.listing.span(0) == (-1, 0) and built_22k(folder_22k).listing.span(0)[0] == 0


def test_a_missing_list_or_zip_is_named(folder_22k, tmp_path):
    dataset = built_22k(folder_22k, ON_CORRUPT="neighbour")
    (folder_22k / "n00007846.zip").unlink()
    with pytest.raises(ValueError, match=r"n00007846.zip: there is no such zip file"):
        dataset[0]
    with pytest.raises(ValueError, match=r"1 of its classes have no zip .*\(first: n00007846\)"):
        built_22k(folder_22k, INDEX_DIR=tmp_path / "other")
    (folder_22k / layout.NAME_LIST).unlink()
    with pytest.raises(ValueError, match=r"in22k_image_names.txt: no such file"):
        built_22k(folder_22k)


def test_a_corrupt_zip_member_is_named(folder_22k):
    write_zip(folder_22k / "n00012345.zip", {"n00012345_3.jpeg": b"no image"})
    with pytest.raises(CorruptImage, match=r"n00012345.zip: n00012345_3.jpeg: can't be decoded"):
        built_22k(folder_22k)[5]


def test_a_listed_class_that_a_class_list_lacks_is_named(folder_22k, tmp_path):
    path = write_lines(tmp_path / "list.txt", *WNIDS[:2])
    with pytest.raises(ValueError, match=r"names.txt: 1 classes have no place .*: n00099999"):
        built_22k(folder_22k, CLASS_LIST=path)


def test_22k_is_validated_on_the_folder_beside_it(folder_22k):
    with pytest.raises(ValueError, match=r"ImageNet: has neither val/ nor val.tar, .*VAL_PATH"):
        built_22k(folder_22k, "val")
    beside = write_files(folder_22k.parent / "ImageNet", ["val/n00012345/1.png"])
    dataset = built_22k(folder_22k, "val")
    assert dataset[0][1] == 1 and dataset.num_classes == 3
    write_files(beside, ["val/n04399382/1.png"])
    with pytest.raises(ValueError, match=r"1 classes have no place .* of 3 .*first: n04399382"):
        built_22k(folder_22k, "val")


@pytest.mark.parametrize(
    ("wnids", "has_training", "num_classes", "labels"),
    [
        (["n02110341", "n04399382"], True, 1000, [251, 850]),
        (["n02110341", "n04399382"], False, 1000, [251, 850]),
        (["n00007846"], True, 21841, [4]),  # no class of 1k
    ],
)
def test_with_all_of_22k_validation_labels_are_those_of_1k(
    folder_22k, wnids, has_training, num_classes, labels
):
    names = [f"val/{wnid}/1.png" for wnid in wnids]
    beside = write_files(folder_22k.parent / "ImageNet", names)
    options = {"VAL_PATH": beside}
    if has_training:
        options |= {"DATA_PATH": folder_22k, "CLASS_LIST": "imagenet22k"}
    dataset = built("val", DATASET="imagenet22k", **options)
    assert dataset.num_classes == num_classes and labels_of(dataset) == labels


# ---- images without classes


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_images_without_classes(tmp_path, form):
    files = {name: encoded(picture(i)) for i, name in enumerate(["b.png", "a/x.png", "a.png"])}
    path = tmp_path / "all"
    if form == "folder":
        write_files(path, files)
    else:
        write_tar(path, {f"all/{name}": data for name, data in files.items()})
    dataset = built("train", DATASET="folder", DATA_PATH=path)
    assert dataset.num_classes == 0 and dataset.class_names == []
    keys = ["a.png", "a/x.png", "b.png"]
    expected = [(key, digest(picture(number)), -1) for key, number in zip(keys, (2, 1, 0))]
    assert contents(dataset) == expected


def test_validation_images_without_classes_are_never_the_training_images(tmp_path, folder):
    root = write_files(tmp_path / "all", ["1.png"])
    write_files(root, ["any/2.png"])
    for more in ([], ["train/2.png"]):  # of which nothing that is held out has a label
        write_files(root, more)
        with pytest.raises(ValueError, match=r"all: has neither val/ nor val.*DATA.VAL_PATH$"):
            built("val", DATASET="folder", DATA_PATH=root)
    write_files(root, ["val/3.png"])
    for split, keys in (("train", ["2.png"]), ("val", ["3.png"])):
        assert list(built(split, DATASET="folder", DATA_PATH=root).get_keys()) == keys
    path = write_lines(tmp_path / "list.txt", "ape", "cat", "dog", "eel")
    val = built("val", DATASET="folder", DATA_PATH=root, VAL_PATH=folder, CLASS_LIST=path)
    assert val.num_classes == 4 and val[0][1] == 1


# ---- parts of the training images


def test_subset_and_exclude_apply_to_training_alone(folder, tmp_path):
    path = write_lines(tmp_path / "out.txt", "cat/0.png", "dog/3.png")
    more = {"DATA_PATH": folder, "SUBSET": 0.7, "EXCLUDE": path}
    train, whole = built("train", **more), built("train", DATA_PATH=folder)
    assert np.bincount(labels_of(train)).tolist() == [2, 2, 2] and train.num_classes == 3
    assert not {"cat/0.png", "dog/3.png"} & set(train.get_keys())
    assert set(contents(train)) < set(contents(whole)) and len(whole) == 12
    assert contents(built("val", **more)) == contents(built("val", DATA_PATH=folder))


def test_what_is_held_out_is_evaluated_on_and_never_trained_on(folder, tmp_path):
    """With the other selections, and under every fraction of the rest."""
    more = {"DATA_PATH": folder, "EXCLUDE": write_lines(tmp_path / "out.txt", "cat/0.png")}
    whole = set(built("train", **more).get_keys())
    more["HELD_OUT"] = 0.3
    train, held = built("train", **more), built("val", **more)
    assert np.bincount(labels_of(held)).tolist() == [1, 2, 2]  # of 3, 4 and 4 images
    keys = set(train.get_keys())
    assert keys | set(held.get_keys()) == whole and len(train) + len(held) == len(whole)
    small = built("train", **more, SUBSET=0.5)
    assert set(small.get_keys()) < keys and len(small) == 3
    assert set(built("val", **more, SUBSET=0.5).get_keys()) == set(held.get_keys())


# ---- images that can't be read


def corrupt(folder: Path, *keys: str) -> None:
    for key in keys:
        (folder / "train" / key).write_bytes(b"broken")


def with_neighbours(folder: Path, **more) -> ListedImages:
    return built("train", DATA_PATH=folder, ON_CORRUPT="neighbour", **more)


def test_the_page_lists_all_that_are_broken(folder, tmp_path, monkeypatch, capsys):
    corrupt(folder, "cat/2.png", "dog/1.png")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "flowers").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "work")
    exec(dict(marked(ROOT / "docs" / "PREPARATION.md", "run"))["broken"], {})
    assert Path("broken.txt").read_text() == "cat/2.png\ndog/1.png\n"
    assert capsys.readouterr().out.count("can't be decoded") == 2
    rest = built("train", DATA_PATH=folder, EXCLUDE="broken.txt")
    assert len(contents(rest)) == 10


def test_a_corrupt_image_is_an_error_that_names_it(folder, tmp_path):
    corrupt(folder, "dog/1.png")
    tar = tar_of(folder, "train", tmp_path / "train.tar")
    for path, name in ((folder, "train/dog/1.png"), (tar, "train.tar: dog/1.png")):
        way_out = r"restore the file; or leave it out \(DATA.EXCLUDE\), or set DATA.ON_CORRUPT n"
        with pytest.raises(CorruptImage, match=rf"{name}: can't be decoded .*{way_out}"):
            built("train", DATA_PATH=path)[5]


def test_the_next_readable_image_takes_the_place_of_a_corrupt_one_with_one_warning(folder, capsys):
    corrupt(folder, "cat/3.png", "dog/0.png", "eel/3.png")
    dataset = with_neighbours(folder)
    for index, number, label in ((3, 101, 1), (4, 101, 1), (11, 0, 0), (5, 101, 1)):
        image, found = dataset[index]
        assert is_picture(image, number) and found == label
    [line] = capsys.readouterr().err.splitlines()
    assert "cat/3.png: can't be decoded" in line and "dog/1.png takes its place" in line


def test_the_neighbour_is_the_same_for_a_part_of_the_images(folder, tmp_path):
    """A student on a part of the data must see what the store's writer saw.

    That is so where that image is not in its part, too.
    """
    corrupt(folder, "cat/1.png")
    out = write_lines(tmp_path / "out.txt", "cat/2.png", "cat/3.png")
    tar = tar_of(folder, "train", tmp_path / "train.tar")
    for path, more in ((folder, {}), (folder, {"EXCLUDE": out}), (tar, {"EXCLUDE": out})):
        dataset = with_neighbours(path, **more)
        assert dataset.get_keys()[1] == "cat/1.png"
        assert is_picture(dataset[1][0], 2) and dataset[1][1] == 0


def test_a_neighbour_is_not_looked_for_without_end(folder, monkeypatch):
    """A wrong DATA.FNAME_FORMAT makes all of 14 million images corrupt."""
    corrupt(folder, "cat/1.png", "cat/2.png", "cat/3.png")
    dataset = with_neighbours(folder)
    monkeypatch.setattr(datasets_module, "NEIGHBOURS", 2)
    message = r"cat/1.png: can't be decoded .*; nor can the 2 images after it"
    with pytest.raises(CorruptImage, match=message):
        dataset[1]
    assert is_picture(dataset[2][0], 100)


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_but_corrupt_images_is_an_error(tmp_path, count):
    write_files(tmp_path, {f"train/a/{i}.png": b"broken" for i in range(count)})
    with pytest.raises(CorruptImage, match=rf"a/0.png: .*; nor can the {count - 1} images after"):
        with_neighbours(tmp_path)[0]


def test_a_lost_file_is_never_replaced(folder):
    dataset = with_neighbours(folder)
    (folder / "train" / "dog" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"dog/1.png: the file is gone"):
        dataset[5]


def test_an_image_of_too_many_pixels(folder):
    with pytest.raises(CorruptImage, match="9 x 7 pixels are more than DATA.MAX_PIXELS = 62"):
        built("train", DATA_PATH=folder, MAX_PIXELS=62)[0]
    assert built("train", DATA_PATH=folder, MAX_PIXELS=63)[0][0].size == (9, 7)


# ---- in other processes


@pytest.fixture(params=["folder", "tar", "22k", "shapes", "part of a tar"])
def any_dataset(request, folder, folder_22k, tmp_path):
    if request.param == "folder":
        return built("train", DATA_PATH=folder)
    if request.param == "22k":
        return built_22k(folder_22k)
    if request.param == "shapes":
        return built("train", DATASET="shapes", **{"SHAPES.TRAIN_IMAGES": 20})
    tar = tar_of(folder, "train", tmp_path / "train.tar")
    return built("train", DATA_PATH=tar, SUBSET=0.5 if request.param == "part of a tar" else 1.0)


def test_every_set_pickles_small_and_other_processes_read_the_same(any_dataset):
    expected = contents(any_dataset)
    assert in_processes(contents, 3, any_dataset) == [expected] * 3
    packed = pickle.dumps(any_dataset)
    again = pickle.loads(packed)
    assert len(packed) < 1000 and contents(again) == expected
    assert again.class_names == any_dataset.class_names


def test_a_spawned_process_reads_the_same(folder, tmp_path):
    tar = tar_of(folder, "train", tmp_path / "train.tar")
    dataset = built("train", DATA_PATH=tar, SUBSET=0.5)
    assert in_processes(contents, 1, dataset, start="spawn") == [contents(dataset)]
