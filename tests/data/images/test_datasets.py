"""The data sets: every layout, the numbering of classes, what is left out, and images that can't be
read.
"""

import contextlib
import hashlib
import http.server
import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import datasets as datasets_module
from data.images import layout
from data.images.datasets import CorruptImage, ListedImages, build_dataset
from tests.support.images import config, encoded, picture, write_files, write_tar

IMAGES = {
    f"{split}/{name}/{i}.png": encoded(picture(100 * number + i))
    for split in ("train", "val")
    for number, name in enumerate(("cat", "dog", "eel"))
    for i in range(4)
}


def built(split: str, *options: object, **more: object) -> ListedImages:
    """The data set of a config with these options; more: DATA.<KEY>=value."""
    pairs = [item for key, value in more.items() for item in (f"DATA.{key}", value)]
    return build_dataset(config(*options, *pairs), split)


def contents(dataset: ListedImages) -> dict[str, tuple[str, int]]:
    """Key -> digest of the pixels, label."""
    return {
        key: (hashlib.sha256(dataset[i][0].tobytes()).hexdigest(), dataset[i][1])
        for i, key in enumerate(dataset.get_keys())
    }


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.fixture
def folder(tmp_path):
    return write_files(tmp_path / "ImageNet", IMAGES)


def tar_of(folder: Path, split: str, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder / split, split)
    return path


# ---- ImageNet: folders and tar files


def test_a_folder_of_class_folders(folder):
    dataset = built("train", DATA_PATH=folder)
    assert (
        len(dataset) == 12
        and dataset.num_classes == 3
        and dataset.class_names == ["cat", "dog", "eel"]
    )
    assert dataset.get_keys()[5] == "dog/1.png" and dataset.listing.key(5) == "dog/1.png"
    image, label = dataset[5]
    assert (
        image.mode == "RGB"
        and digest(image) == digest(picture(101))
        and label == 1
        and type(label) is int
    )
    assert digest(dataset[-1][0]) == digest(dataset[11][0]) == digest(picture(203))
    assert digest(dataset[np.int64(5)][0]) == digest(image)
    with pytest.raises(IndexError):
        dataset[12]


@pytest.mark.parametrize("layout_of", ["{split}.tar", "one tar each", "folder"])
def test_tar_files_hold_the_same_set_as_the_folder(folder, tmp_path, layout_of):
    expected = contents(built("train", DATA_PATH=folder)), contents(built("val", DATA_PATH=folder))
    train = tar_of(folder, "train", tmp_path / "train.tar")
    val = tar_of(folder, "val", tmp_path / "val.tar")
    if layout_of == "{split}.tar":
        datasets = [built(split, DATA_PATH=tmp_path) for split in ("train", "val")]
    elif layout_of == "one tar each":
        datasets = [built("train", DATA_PATH=train), built("val", DATA_PATH=train, VAL_PATH=val)]
    else:
        datasets = [
            built("train", DATA_PATH=tmp_path),
            built("val", DATA_PATH=train, VAL_PATH=folder),
        ]
    assert tuple(map(contents, datasets)) == expected
    assert built("train", DATA_PATH=folder).get_keys().digest() == datasets[0].get_keys().digest()


def test_one_tar_is_read_by_evaluation_but_not_for_both_splits(folder, tmp_path):
    tar = tar_of(folder, "val", tmp_path / "some.tar")
    with pytest.raises(
        ValueError,
        match=(
            r"DATA.DATA_PATH = .*some.tar: one file can't hold training and"
            r" validation.*DATA.VAL_PATH"
        ),
    ):
        built("val", DATA_PATH=tar)
    dataset = built("val", "EVAL_MODE", True, DATA_PATH=tar)
    assert contents(dataset) == contents(built("val", DATA_PATH=folder))


def test_a_split_that_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match="DATA.DATA_PATH is empty: say where imagenet lies with --data-path"
    ):
        built("train")
    with pytest.raises(ValueError, match="none: no such file or folder; correct --data-path"):
        built("train", DATA_PATH=tmp_path / "none")
    with pytest.raises(ValueError, match="DATA.VAL_PATH = .*none: no such file or folder"):
        built("val", DATA_PATH=folder, VAL_PATH=tmp_path / "none")
    with pytest.raises(ValueError, match=r"has neither train/ nor train.tar: correct --data-path$"):
        built("train", DATA_PATH=tmp_path)
    (tmp_path / "val.tar.gz").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"nor val.tar; unpack val.tar.gz, .*: correct --data-path, or set DATA.VAL_PATH$",
    ):
        built("val", DATA_PATH=tmp_path)


def test_images_outside_of_class_folders_are_not_taken_for_a_set(tmp_path):
    write_files(tmp_path / "val", ["1.png", "2.png"])
    with pytest.raises(
        ValueError,
        match=r"val: no images .*: expected .*/<class>/\*.JPEG; correct the path, or DATA.DATASET",
    ):
        built("val", DATA_PATH=tmp_path)


def test_the_data_may_be_read_only_and_the_index_lies_elsewhere(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    built("train", DATA_PATH=folder, INDEX_DIR=tmp_path / "index")
    assert sorted(folder.rglob("*")) == before and list(
        (tmp_path / "index" / "listings").glob("*/keys.txt")
    )


def test_new_images_are_found_and_reindex_scans_again(folder):
    assert len(built("train", DATA_PATH=folder)) == 12
    write_files(folder, {"train/new/1.png": encoded(picture(1))})
    assert built("train", DATA_PATH=folder).class_names == ["cat", "dog", "eel", "new"]
    assert len(built("train", DATA_PATH=folder, REINDEX=True)) == 13


# ---- numbering


def test_validation_classes_keep_the_ids_of_training(folder):
    for name in ("train/ape/1.png", "train/fox/1.png"):
        write_files(folder, {name: encoded(picture(1))})
    dataset = built("val", DATA_PATH=folder)
    assert dataset.class_names == ["ape", "cat", "dog", "eel", "fox"] and sorted(
        set(dataset.listing.labels)
    ) == [1, 2, 3]
    assert dataset[0][1] == 1


def test_validation_classes_keep_the_ids_of_a_training_tar(folder, tmp_path):
    write_files(folder, {"train/ape/1.png": encoded(picture(1))})
    tar = tar_of(folder, "train", tmp_path / "train.tar")
    for more in (
        {"DATA_PATH": tar, "VAL_PATH": folder / "val"},
        {"DATA_PATH": tmp_path, "VAL_PATH": folder / "val"},
    ):
        assert set(built("val", **more).listing.labels) == {1, 2, 3}


def test_validation_classes_unknown_to_training_are_named(folder):
    write_files(folder, {"val/yak/1.png": encoded(picture(1))})
    with pytest.raises(
        ValueError,
        match=r"val: 1 classes have no place in the numbering of 3 classes .*\(first: yak\)",
    ):
        built("val", DATA_PATH=folder)


def test_validation_alone_is_numbered_by_itself(folder):
    dataset = built("val", VAL_PATH=folder / "val")
    assert dataset.class_names == ["cat", "dog", "eel"] and contents(dataset) == contents(
        built("val", VAL_PATH=folder)
    )


def test_a_list_of_classes_in_a_file(folder, tmp_path):
    (tmp_path / "list.txt").write_text("eel\nowl\ncat\n\ndog\n")
    for split in ("train", "val"):
        dataset = built(split, DATA_PATH=folder, CLASS_LIST=tmp_path / "list.txt")
        assert dataset.num_classes == 4 and [dataset[i][1] for i in (0, 4, 8)] == [2, 3, 0]
    (tmp_path / "list.txt").write_text("eel\ncat\n")  # the same file now says something else
    with pytest.raises(
        ValueError, match=r"\(first: dog\): set DATA.CLASS_LIST to a list that has them"
    ):
        built("train", DATA_PATH=folder, CLASS_LIST=tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "neither imagenet1k nor imagenet22k, and no file"),
        ("", "it is empty: expected class names, one a line, each once"),
        ("a\nb\na\n", "a stands twice: expected class names, one a line, each once"),
    ],
)
def test_lists_of_classes_that_can_not_be_used(folder, tmp_path, text, message):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"DATA.CLASS_LIST = .*list.txt: {message}"):
        built("train", DATA_PATH=folder, CLASS_LIST=tmp_path / "list.txt")


def test_class_folders_in_imagenets_numberings(tmp_path):
    """n02110341 and n04399382 are classes 251 and 850 of 1k; the second has no place in 22k, and
    n00007846 none in 1k.
    """
    names = {
        f"{split}/{wnid}/1.png": encoded(picture(1))
        for split, wnid in (
            ("train", "n02110341"),
            ("train", "n00007846"),
            ("val", "n02110341"),
            ("val", "n04399382"),
        )
    }
    write_files(tmp_path, names)
    train = built("train", DATA_PATH=tmp_path, CLASS_LIST="imagenet22k")
    assert train.num_classes == 21841 and [train[i][1] for i in range(2)] == [
        layout.class_list("imagenet22k").index(name) for name in ("n00007846", "n02110341")
    ]
    val = built("val", DATA_PATH=tmp_path, CLASS_LIST="imagenet22k")
    assert val.num_classes == 1000 and [val[i][1] for i in range(2)] == [251, 850]
    assert val.class_names[251] == "n02110341"
    with pytest.raises(
        ValueError,
        match=r"1 classes have no place in the numbering of 1000 classes .*\(first: n00007846\)",
    ):
        built("train", DATA_PATH=tmp_path, CLASS_LIST="imagenet1k")
    with pytest.raises(
        ValueError,
        match=r"1 classes have no place in the numbering of 2 classes .*\(first: n04399382\)",
    ):
        built("val", DATA_PATH=tmp_path)
    write_files(tmp_path, {"val/n99999999/1.png": encoded(picture(1))})
    with pytest.raises(
        ValueError,
        match=(
            r"2 classes have no place in the numbering of 21841 classes .*\(first: n04399382,"
            r" n99999999\)"
        ),
    ):
        built("val", DATA_PATH=tmp_path, CLASS_LIST="imagenet22k")
    (tmp_path / "val" / "n04399382" / "1.png").unlink()
    (tmp_path / "val" / "n04399382").rmdir()
    (tmp_path / "val" / "n99999999" / "1.png").unlink()
    (tmp_path / "val" / "n99999999").rmdir()
    # all have a place in training's numbering
    val = built("val", DATA_PATH=tmp_path, CLASS_LIST="imagenet22k")
    assert val.num_classes == 21841 and val[0][1] == train[1][1]


def test_real_validation_images_keep_imagenets_ids(shared_data):
    dataset = built(
        "val", VAL_PATH=shared_data / "imagenet_val_sample.tar", CLASS_LIST="imagenet1k"
    )
    assert len(dataset) == 1369 and dataset.num_classes == 1000
    names = layout.class_list("imagenet1k")
    for i in range(0, 1369, 137):
        image, label = dataset[i]
        assert image.mode == "RGB" and dataset.get_keys()[i].startswith(
            f"{names[label]}/ILSVRC2012_val_"
        )


# ---- ImageNet-22k


NAMES_22K = [
    f"{wnid}_{i}" for wnid in ("n00007846", "n00012345", "n00099999") for i in (3, 10026, 1009)
]


@pytest.fixture
def folder_22k(tmp_path):
    """Three zip files and the list of what is in them."""
    root = tmp_path / "ImageNet-22k"
    root.mkdir()
    for wnid in ("n00007846", "n00012345", "n00099999"):
        with zipfile.ZipFile(root / f"{wnid}.zip", "w") as file:
            for name in NAMES_22K:
                if name.startswith(wnid):
                    file.writestr(f"{name}.jpeg", encoded(picture(int(name[-3:]) + len(name))))
    (root / "in22k_image_names.txt").write_text("\n".join(reversed(NAMES_22K)) + "\n")
    return root


def test_zips_by_a_list_of_names(folder_22k):
    dataset = built("train", DATASET="imagenet22k", DATA_PATH=folder_22k)
    assert list(dataset.get_keys()) == sorted(NAMES_22K) and dataset.class_names == [
        "n00007846",
        "n00012345",
        "n00099999",
    ]
    for i, name in enumerate(sorted(NAMES_22K)):
        image, label = dataset[i]
        assert digest(image) == digest(picture(int(name[-3:]) + len(name))) and label == i // 3


def test_debug_uses_one_class_with_its_id_and_its_zip_alone(folder_22k):
    (folder_22k / "n00012345.zip").unlink()
    text = (folder_22k / "in22k_image_names.txt").read_text()
    (folder_22k / "in22k_image_names.txt").write_text(text + "n00001111_1\n")
    dataset = built("train", DATASET="imagenet22k", DATA_PATH=folder_22k, DEBUG=True)
    assert list(dataset.get_keys()) == ["n00007846_10026", "n00007846_1009", "n00007846_3"]
    assert dataset[0][1] == 1 and dataset.num_classes == 4
    (folder_22k / "in22k_image_names.txt").write_text("n00001111_1\n")
    with pytest.raises(
        ValueError, match=r"has no images of the classes n00007846\*, which alone DATA.DEBUG uses"
    ):
        built("train", DATASET="imagenet22k", DATA_PATH=folder_22k, DEBUG=True)


def test_names_of_members_follow_a_format(folder_22k):
    dataset = built("train", DATASET="imagenet22k", DATA_PATH=folder_22k, FNAME_FORMAT="{}.JPEG")
    with pytest.raises(
        CorruptImage,
        match=r"n00007846.zip: has no member n00007846_10026.JPEG: DATA.FNAME_FORMAT must fit",
    ):
        dataset[0]


def test_a_missing_list_or_zip_is_named(folder_22k):
    (folder_22k / "n00012345.zip").unlink()
    with pytest.raises(
        ValueError,
        match=r"1 of its classes have no zip file beside it \(first: n00012345\): restore",
    ):
        built("train", DATASET="imagenet22k", DATA_PATH=folder_22k)
    (folder_22k / "in22k_image_names.txt").unlink()
    with pytest.raises(
        ValueError, match=r"in22k_image_names.txt: no such file: imagenet22k needs this list"
    ):
        built("train", DATASET="imagenet22k", DATA_PATH=folder_22k)


def test_a_zip_that_goes_missing_later_is_named(folder_22k):
    dataset = built("train", DATASET="imagenet22k", DATA_PATH=folder_22k, ON_CORRUPT="neighbour")
    (folder_22k / "n00007846.zip").unlink()
    with pytest.raises(ValueError, match=r"n00007846.zip: there is no such zip file"):
        dataset[0]


def test_a_listed_class_that_a_numbering_lacks_is_named(folder_22k, tmp_path):
    (tmp_path / "list.txt").write_text("n00007846\nn00012345\n")
    with pytest.raises(
        ValueError, match=r"in22k_image_names.txt: 1 classes have no place .*\(first: n00099999\)"
    ):
        built(
            "train", DATASET="imagenet22k", DATA_PATH=folder_22k, CLASS_LIST=tmp_path / "list.txt"
        )


def test_22k_is_validated_on_the_folder_beside_it(folder_22k):
    with pytest.raises(
        ValueError,
        match=(
            r"ImageNet: has neither val/ nor val.tar, on which imagenet22k is validated: set"
            r" DATA.VAL_PATH"
        ),
    ):
        built("val", DATASET="imagenet22k", DATA_PATH=folder_22k)
    beside = folder_22k.parent / "ImageNet"
    write_files(beside, {"val/n00012345/1.png": encoded(picture(1))})
    dataset = built("val", DATASET="imagenet22k", DATA_PATH=folder_22k)
    assert dataset[0][1] == 1 and dataset.num_classes == 3
    write_files(beside, {"val/n04399382/1.png": encoded(picture(1))})
    with pytest.raises(
        ValueError,
        match=r"1 classes have no place in the numbering of 3 classes .*\(first: n04399382\)",
    ):
        built("val", DATASET="imagenet22k", DATA_PATH=folder_22k)


def test_with_all_of_22k_validation_labels_are_those_of_1k(folder_22k):
    beside = folder_22k.parent / "ImageNet"
    write_files(
        beside,
        {"val/n02110341/1.png": encoded(picture(1)), "val/n04399382/1.png": encoded(picture(2))},
    )
    for more in ({"CLASS_LIST": "imagenet22k", "DATA_PATH": folder_22k}, {"VAL_PATH": beside}):
        dataset = built("val", DATASET="imagenet22k", **more)
        assert dataset.num_classes == 1000 and [dataset[i][1] for i in range(2)] == [251, 850]


# ---- CIFAR


def cifar_files(
    classes: list[str], key: str, counts: dict[str, int]
) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """Files in the format of CIFAR's python version, and the images of each batch."""
    rng = np.random.Generator(np.random.PCG64(0))
    files, images = {}, {}
    for name, count in counts.items():
        images[name] = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = (np.arange(count) * 7 % len(classes)).tolist()
        files[name] = pickle.dumps({"data": images[name].reshape(count, 3072), key: labels})
    return files, images


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, monkeypatch, tmp_path):
    """A small CIFAR of the true format: (name, archive, what torchvision knows about it, train
    images, test images).
    """
    datasets = pytest.importorskip("torchvision.datasets")
    if request.param == "cifar10":
        kind, key, meta, meta_key = datasets.CIFAR10, "labels", "batches.meta", "label_names"
        classes = [f"kind{i}" for i in range(10)]
        counts = {"data_batch_1": 20, "data_batch_2": 15, "test_batch": 12}
    else:
        kind, key, meta, meta_key = datasets.CIFAR100, "fine_labels", "meta", "fine_label_names"
        classes = [f"kind{i:02d}" for i in range(100)]
        counts = {"train": 35, "test": 12}
    files, images = cifar_files(classes, key, counts)
    files[meta] = pickle.dumps({meta_key: classes})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def md5(data: bytes) -> str:
        return hashlib.md5(data).hexdigest()

    names = list(counts)
    monkeypatch.setattr(kind, "train_list", [[name, md5(files[name])] for name in names[:-1]])
    monkeypatch.setattr(kind, "test_list", [[names[-1], md5(files[names[-1]])]])
    monkeypatch.setattr(kind, "meta", {"filename": meta, "key": meta_key, "md5": md5(files[meta])})
    monkeypatch.setattr(kind, "tgz_md5", md5(buffer.getvalue()))
    train = np.concatenate([images[name] for name in names[:-1]])
    return request.param, kind, buffer.getvalue(), train, images[names[-1]], classes


@contextlib.contextmanager
def served(folder: Path):
    """The address of a server of this folder's files."""
    handler = partial(
        type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None}),
        directory=str(folder),
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_cifar_from_a_download(cifar, tmp_path, monkeypatch):
    name, kind, archive, train, test, classes = cifar
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / kind.filename).write_bytes(archive)
    root = tmp_path / "data"
    with pytest.raises(
        ValueError,
        match="no such file or folder; correct --data-path, or set DATA.DOWNLOAD True to fetch it",
    ):
        built("train", DATASET=name, DATA_PATH=root)
    root.mkdir()
    with pytest.raises(
        ValueError, match=rf"{name} is not there, or damaged .*set DATA.DOWNLOAD True to fetch it"
    ):
        built("train", DATASET=name, DATA_PATH=root)
    root.rmdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(tmp_path / "server") as address:
        monkeypatch.setattr(kind, "url", f"{address}/{kind.filename}")
        built("train", DATASET=name, DATA_PATH=root, DOWNLOAD=True)
    for split, images in (("train", train), ("val", test)):  # now without a server
        for place in (root, root / kind.base_folder):
            dataset = built(split, DATASET=name, DATA_PATH=place)
            assert len(dataset) == len(images) and dataset.class_names == classes
            keys = list(dataset.get_keys())
            assert keys == sorted(keys)
            for i, key in enumerate(keys):
                image, label = dataset[i]
                number = int(key.split("/")[1])
                assert (
                    key
                    == f"{classes[number_to_label(number, split, name, len(classes))]}/{number:05d}"
                )
                assert (np.asarray(image) == images[number].transpose(1, 2, 0)).all() and classes[
                    label
                ] == key.split("/")[0]
        assert (
            isinstance(pickle.loads(pickle.dumps(dataset))[0][0], Image.Image)
            and len(pickle.dumps(dataset)) < 1000
        )
    damaged = next(
        path
        for path in (root / kind.base_folder).iterdir()
        if path.name in ("train", "data_batch_2")
    )
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} is not there, or damaged"):
        built("train", DATASET=name, DATA_PATH=root)


def number_to_label(number: int, split: str, name: str, classes: int) -> int:
    """The label of the image `number`, by the rule of `cifar_files` and its batches."""
    return (
        (number - 20 if name == "cifar10" and split == "train" and number >= 20 else number)
        * 7
        % classes
    )


def test_decoded_images_that_can_not_be_kept_are_named(cifar, tmp_path, monkeypatch):
    name, kind, archive, *_ = cifar
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(tmp_path)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets_module, "save_array", refuse)
    with pytest.raises(
        ValueError,
        match=r"can't be kept there \(No space left on device\): name a folder in DATA.INDEX_DIR",
    ):
        built("train", DATASET=name, DATA_PATH=tmp_path)


def test_a_damaged_download_is_an_error(cifar, tmp_path, monkeypatch):
    name, kind, archive, *_ = cifar
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / kind.filename).write_bytes(archive[:-10])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with served(tmp_path / "server") as address:
        monkeypatch.setattr(kind, "url", f"{address}/{kind.filename}")
        with pytest.raises(ValueError, match=rf"{name} is not there, or damaged"):
            built("train", DATASET=name, DATA_PATH=tmp_path / "data", DOWNLOAD=True)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_as_class_folders(folder, tmp_path, packed):
    root = folder
    if packed:
        root = tmp_path / "tars"
        root.mkdir()
        for split in ("train", "val"):
            tar_of(folder, split, root / f"{split}.tar")
    for split in ("train", "val"):
        assert contents(built(split, DATASET="cifar10", DATA_PATH=root)) == contents(
            built(split, DATA_PATH=folder)
        )


# ---- images without classes, and a user's own data set


def test_images_without_classes(tmp_path):
    write_files(tmp_path / "all", ["b.png", "a/x.png", "a.png"])
    write_tar(
        tmp_path / "all.tar",
        {
            f"all/{name}": (tmp_path / "all" / name).read_bytes()
            for name in ("b.png", "a/x.png", "a.png")
        },
    )
    for place in (tmp_path / "all", tmp_path / "all.tar"):
        dataset = built("train", DATASET="folder", DATA_PATH=place)
        assert (
            list(dataset.get_keys()) == ["a.png", "a/x.png", "b.png"]
            and dataset.num_classes == 0
            and dataset.class_names == []
        )
        assert [dataset[i][1] for i in range(3)] == [-1] * 3 and digest(dataset[1][0]) == digest(
            picture(1)
        )


def test_validation_images_without_classes_are_never_the_training_images(tmp_path, folder):
    write_files(tmp_path / "all", ["1.png"])
    with pytest.raises(ValueError, match=r"all: has neither val/ nor val.tar: .*DATA.VAL_PATH"):
        built("val", DATASET="folder", DATA_PATH=tmp_path / "all")
    write_files(tmp_path / "all", ["train/2.png", "val/3.png"])
    assert list(built("train", DATASET="folder", DATA_PATH=tmp_path / "all").get_keys()) == [
        "2.png"
    ]
    assert list(built("val", DATASET="folder", DATA_PATH=tmp_path / "all").get_keys()) == ["3.png"]
    (tmp_path / "list.txt").write_text("ape\ncat\ndog\neel\n")
    val = built(
        "val",
        DATASET="folder",
        DATA_PATH=tmp_path / "all",
        VAL_PATH=folder,
        CLASS_LIST=tmp_path / "list.txt",
    )
    assert val.num_classes == 4 and val[0][1] == 1


class Own:
    """A user's data set: grey images whose label is their position, modulo 3."""

    def __init__(self, count: int = 6, **extra):
        self.count = count
        for name, value in extra.items():
            setattr(self, name, value)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Image.new("L", (4, 3), index), index % 3


def own_of_both(cfg, split):
    return Own(4 if split == "val" else 6, num_classes=3, class_names=["x", "y", "z"])


def own_of_config(cfg):
    return Own(cfg.DATA.SHAPES.VAL_IMAGES)


def own_with_keys(cfg, split):
    dataset = Own(6, targets=[0, 1, 2, 0, 1, 2], classes=["x", "y", "z"])
    dataset.get_keys = lambda: [f"image {i}" for i in range(6)]
    return dataset


def own_with_wrong_keys(cfg, split):
    dataset = Own(6)
    dataset.get_keys = lambda: ["a"] * 6 if cfg.DATA.DEBUG else ["a"]
    return dataset


def own_without_labels(cfg):
    return [(Image.new("RGB", (2, 2)), None)] * 3


def own_nothing(cfg):
    return None


def own_with_defaults(cfg, count=4):
    return Own(count)


def own_by_name(cfg, split="train"):
    return Own(4 if split == "val" else 6)


def own_that_fails(cfg):
    raise KeyError("a fault of the user's")


def own_arrays(cfg):
    return [(np.zeros((2, 2, 3), np.uint8), 1)] * 3


def own_without_pairs(cfg):
    return [Image.new("RGB", (2, 2))] * 3


def own_empty(cfg):
    return []


def test_a_data_set_of_the_users():
    train = built("train", DATASET="tests.data.images.test_datasets:own_of_both")
    val = built("val", DATASET="tests.data.images.test_datasets:own_of_both")
    assert (
        (len(train), len(val)) == (6, 4)
        and train.num_classes == 3
        and train.class_names == ["x", "y", "z"]
    )
    image, label = train[5]
    assert image.mode == "RGB" and np.asarray(image).tolist() == [[[5] * 3] * 4] * 3 and label == 2
    assert list(train.get_keys()) == ["0", "1", "2", "3", "4", "5"]
    assert train.get_keys().digest() == hashlib.sha256(b"0\n1\n2\n3\n4\n5\n").hexdigest()
    assert (
        len(
            built(
                "train",
                DATASET="tests.data.images.test_datasets:own_of_config",
                **{"SHAPES.VAL_IMAGES": 7},
            )
        )
        == 7
    )
    unlabelled = built("train", DATASET="tests.data.images.test_datasets:own_without_labels")
    assert unlabelled[0][1] == -1 and unlabelled.num_classes == 0


def test_parts_of_a_data_set_of_the_users(tmp_path):
    (tmp_path / "out.txt").write_text("image 4\n")
    dataset = built(
        "train",
        DATASET="tests.data.images.test_datasets:own_with_keys",
        EXCLUDE=tmp_path / "out.txt",
    )
    assert (
        list(dataset.get_keys()) == [f"image {i}" for i in (0, 1, 2, 3, 5)]
        and dataset.num_classes == 3
    )
    assert [np.asarray(dataset[i][0])[0, 0, 0] for i in range(5)] == [0, 1, 2, 3, 5] and dataset[4][
        1
    ] == 2
    half = built("train", DATASET="tests.data.images.test_datasets:own_with_keys", SUBSET=0.5)
    assert sorted(half[i][1] for i in range(len(half))) == [0, 1, 2]
    with pytest.raises(
        ValueError,
        match=(
            r"DATA.SUBSET needs the class of each image:"
            r" .*tests.data.images.test_datasets:own_of_both a list `targets`"
        ),
    ):
        built("train", DATASET="tests.data.images.test_datasets:own_of_both", SUBSET=0.5)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (
            "no_such_module:f",
            {},
            (
                r"no_such_module:f: there is no module no_such_module \(its folder must be on"
                r" PYTHONPATH\)"
            ),
        ),
        ("tests.no_such:f", {}, "there is no module tests.no_such"),
        (
            "tests.data.images.test_datasets:no_such",
            {},
            "test_datasets.py has no function 'no_such'",
        ),
        (
            "tests.data.images.test_datasets:own_nothing",
            {},
            r"own_nothing: gave a NoneType, not a data set with a length and \[i\]",
        ),
        ("tests.data.images.test_datasets:own_empty", {}, "the data set for train is empty"),
        (
            "tests.data.images.test_datasets:own_with_wrong_keys",
            {},
            "a data set of 6 images with 1 keys and ",
        ),
        (
            "tests.data.images.test_datasets:own_with_wrong_keys",
            {"DEBUG": True},
            "'a' stands twice",
        ),
    ],
)
def test_data_sets_of_the_users_that_do_not_work(function, options, message):
    with pytest.raises(ValueError, match=message):
        built("train", DATASET=function, **options)


def test_the_split_is_told_to_a_function_that_asks_for_it():
    assert [
        len(built(split, DATASET="tests.data.images.test_datasets:own_by_name"))
        for split in ("train", "val")
    ] == [6, 4]
    assert [
        len(built(split, DATASET="tests.data.images.test_datasets:own_with_defaults"))
        for split in ("train", "val")
    ] == [4, 4]


def test_a_fault_inside_of_the_users_function_or_module_is_left_as_it_is(tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="a fault of the user's"):
        built("train", DATASET="tests.data.images.test_datasets:own_that_fails")
    (tmp_path / "users_own_module.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        built("train", DATASET="users_own_module:f")


@pytest.mark.parametrize("function", ["own_arrays", "own_without_pairs"])
def test_items_that_are_no_pairs_of_image_and_label_are_named(function):
    with pytest.raises(
        ValueError,
        match=r"item 1 of the data set list is no pair \(PIL image, label\): leave transforms",
    ):
        built("train", DATASET=f"tests.data.images.test_datasets:{function}")[1]


# ---- parts of the training images


def test_subset_and_exclude_apply_to_training_alone(folder, tmp_path):
    (tmp_path / "out.txt").write_text("cat/0.png\ndog/3.png\n")
    more = {"DATA_PATH": folder, "SUBSET": 0.7, "EXCLUDE": tmp_path / "out.txt"}
    train = built("train", **more)
    assert np.bincount(train.listing.labels).tolist() == [2, 2, 2] and train.num_classes == 3
    assert not {"cat/0.png", "dog/3.png"} & set(train.get_keys())
    assert contents(train).items() < contents(built("train", DATA_PATH=folder)).items()
    assert contents(built("val", **more)) == contents(built("val", DATA_PATH=folder))
    assert len(built("train", DATA_PATH=folder)) == 12


def test_parts_that_can_not_be_made(folder, tmp_path):
    (tmp_path / "out.txt").write_text("cat/0.png\ncat/9.png\n")
    with pytest.raises(
        ValueError,
        match=r"1 of 2 keys are not in the data \(first: cat/9.png\); a key looks like cat/0.png",
    ):
        built("train", DATA_PATH=folder, EXCLUDE=tmp_path / "out.txt")
    with pytest.raises(
        ValueError,
        match=(
            r"DATA.SUBSET = 0.2: less than one image of class cat, which has 4: use at least 0.25"
        ),
    ):
        built("train", DATA_PATH=folder, SUBSET=0.2)
    assert len(built("train", DATA_PATH=folder, SUBSET=0.25)) == 3


# ---- images that can't be read


def test_a_corrupt_image_is_an_error_that_names_it(folder, tmp_path):
    (folder / "train" / "dog" / "1.png").write_bytes(IMAGES["train/dog/1.png"][:50])
    tar = tar_of(folder, "train", tmp_path / "train.tar")
    with pytest.raises(CorruptImage, match=r"train/dog/1.png: can't be decoded"):
        built("train", DATA_PATH=folder)[5]
    with pytest.raises(CorruptImage, match=r"train.tar: dog/1.png: can't be decoded"):
        built("train", DATA_PATH=tar)[5]


def test_a_corrupt_zip_member_is_named(folder_22k):
    with zipfile.ZipFile(folder_22k / "n00012345.zip", "w") as file:
        file.writestr("n00012345_3.jpeg", b"no image")
    dataset = built("train", DATASET="imagenet22k", DATA_PATH=folder_22k)
    with pytest.raises(CorruptImage, match=r"n00012345.zip: n00012345_3.jpeg: can't be decoded"):
        dataset[list(dataset.get_keys()).index("n00012345_3")]


def corrupt(folder: Path, *keys: str) -> None:
    for key in keys:
        (folder / "train" / key).write_bytes(b"broken")


def test_the_next_readable_image_takes_the_place_of_a_corrupt_one_with_one_warning(folder, capsys):
    corrupt(folder, "cat/3.png", "dog/0.png", "eel/3.png")
    dataset = built("train", DATA_PATH=folder, ON_CORRUPT="neighbour")
    for index, number, label in ((3, 101, 1), (4, 101, 1), (11, 0, 0), (5, 101, 1)):
        image, found = dataset[index]
        assert digest(image) == digest(picture(number)) and found == label
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert (
        "cat/3.png: can't be decoded" in lines[0]
        and "dog/1.png takes its place (DATA.ON_CORRUPT neighbour" in lines[0]
    )


def test_the_neighbour_is_the_same_for_a_part_of_the_images(folder, tmp_path):
    """A student on a part of the data must see what the store's writer saw, also where that image
    is not in its part.
    """
    corrupt(folder, "cat/1.png")
    (tmp_path / "out.txt").write_text("cat/2.png\ncat/3.png\n")
    whole = built("train", DATA_PATH=folder, ON_CORRUPT="neighbour")
    part = built("train", DATA_PATH=folder, ON_CORRUPT="neighbour", EXCLUDE=tmp_path / "out.txt")
    assert part.get_keys()[1] == whole.get_keys()[1] == "cat/1.png"
    assert digest(part[1][0]) == digest(whole[1][0]) == digest(picture(2)) and part[1][1] == 0
    tar = tar_of(folder, "train", tmp_path / "train.tar")
    packed = built("train", DATA_PATH=tar, ON_CORRUPT="neighbour", EXCLUDE=tmp_path / "out.txt")
    assert digest(packed[1][0]) == digest(picture(2))


def test_a_single_corrupt_image_has_no_neighbour(tmp_path):
    write_files(tmp_path, {"train/a/1.png": b"broken"})
    with pytest.raises(
        CorruptImage, match=r"a/1.png: can't be decoded .*; nor can the 0 images after it"
    ):
        built("train", DATA_PATH=tmp_path, ON_CORRUPT="neighbour")[0]


def test_nothing_but_corrupt_images_is_an_error(folder):
    corrupt(folder, *(key.removeprefix("train/") for key in IMAGES if key.startswith("train")))
    with pytest.raises(CorruptImage, match=r"dog/1.png: can't be decoded"):
        built("train", DATA_PATH=folder, ON_CORRUPT="neighbour")[5]


def test_a_neighbour_is_not_looked_for_without_end(folder, monkeypatch):
    """A wrong DATA.FNAME_FORMAT makes all of 14 million images corrupt."""
    corrupt(folder, "cat/1.png", "cat/2.png", "cat/3.png")
    dataset = built("train", DATA_PATH=folder, ON_CORRUPT="neighbour")
    monkeypatch.setattr(datasets_module, "NEIGHBOURS", 2)
    with pytest.raises(
        CorruptImage, match=r"cat/1.png: can't be decoded .*; nor can the 2 images after it"
    ):
        dataset[1]
    assert digest(dataset[2][0]) == digest(picture(100))


def test_a_debugged_part_is_selected_once(folder_22k, monkeypatch):
    first = built("train", DATASET="imagenet22k", DATA_PATH=folder_22k, DEBUG=True)
    monkeypatch.setattr(
        datasets_module, "_rows_of_debug", lambda *args: pytest.fail("computed again")
    )
    assert list(
        built("train", DATASET="imagenet22k", DATA_PATH=folder_22k, DEBUG=True).get_keys()
    ) == list(first.get_keys())


def test_a_lost_file_is_never_replaced(folder):
    dataset = built("train", DATA_PATH=folder, ON_CORRUPT="neighbour")
    (folder / "train" / "dog" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"dog/1.png: the file is gone"):
        dataset[5]


def test_an_image_of_too_many_pixels(folder):
    with pytest.raises(
        CorruptImage, match="cat/0.png: 9 x 7 pixels are more than DATA.MAX_PIXELS = 62"
    ):
        built("train", DATA_PATH=folder, MAX_PIXELS=62)[0]
    assert built("train", DATA_PATH=folder, MAX_PIXELS=63)[0][0].size == (9, 7)


# ---- in other processes


def read_backwards(dataset, queue) -> None:
    queue.put(
        [
            (digest(dataset[i][0]), dataset[i][1], dataset.get_keys()[i])
            for i in reversed(range(len(dataset)))
        ]
    )


@pytest.fixture(params=["folder", "tar", "22k", "shapes", "part of a tar"])
def any_dataset(request, folder, folder_22k, tmp_path):
    if request.param == "folder":
        return built("train", DATA_PATH=folder)
    if request.param == "tar":
        return built("train", DATA_PATH=tar_of(folder, "train", tmp_path / "train.tar"))
    if request.param == "part of a tar":
        return built("train", DATA_PATH=tar_of(folder, "train", tmp_path / "train.tar"), SUBSET=0.5)
    if request.param == "22k":
        return built("train", DATASET="imagenet22k", DATA_PATH=folder_22k)
    return built("train", DATASET="shapes", **{"SHAPES.TRAIN_IMAGES": 20})


def in_processes(dataset, start: str, count: int) -> list:
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    processes = [
        context.Process(target=read_backwards, args=(dataset, queue)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120)[::-1] for _ in processes]
    for process in processes:
        process.join(60)
    return results


def test_forked_processes_read_the_same(any_dataset):
    expected = [
        (digest(any_dataset[i][0]), any_dataset[i][1], any_dataset.get_keys()[i])
        for i in range(len(any_dataset))
    ]
    assert in_processes(any_dataset, "fork", 3) == [expected] * 3


def test_every_set_pickles_small_and_reads_the_same(any_dataset):
    before = [(digest(any_dataset[i][0]), any_dataset[i][1]) for i in range(len(any_dataset))]
    packed = pickle.dumps(any_dataset)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert [(digest(again[i][0]), again[i][1]) for i in range(len(again))] == before
    assert (
        list(again.get_keys()) == list(any_dataset.get_keys())
        and again.class_names == any_dataset.class_names
    )


def test_a_spawned_process_reads_the_same(folder, tmp_path, root):
    dataset = built("train", DATA_PATH=tar_of(folder, "train", tmp_path / "train.tar"), SUBSET=0.5)
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(dataset))
    code = f"""
import hashlib, json, pickle, sys
dataset = pickle.load(open({str(tmp_path / "dataset.pickle")!r}, "rb"))
images = [(hashlib.sha256(dataset[i][0].tobytes()).hexdigest(), dataset[i][1], dataset.get_keys()[i]) for i in range(len(dataset))]
print(json.dumps(images))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        [digest(dataset[i][0]), dataset[i][1], dataset.get_keys()[i]] for i in range(len(dataset))
    ]
