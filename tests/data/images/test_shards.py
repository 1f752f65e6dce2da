"""Images in webdataset's tars and in parquet are those of class folders, under the same keys."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from data.build import open_run
from data.images.shards import key_of
from tests.data.test_one_store_serves import unresolved
from tests.docs.documents import marked
from tests.support.helpers import ROOT
from tests.support.images import built, encoded, picture, write_files, write_parquet, write_tar
from tests.support.saving import run, sealed_bytes

pyarrow = pytest.importorskip("pyarrow")
WNIDS = ["n01440764", "n01443537", "n01484850"]
TRAIN = {
    f"{wnid}/{wnid}_{10 * i + 7}.JPEG": encoded(picture(10 * number + i, (40, 36)), "JPEG")
    for number, wnid in enumerate(WNIDS)
    for i in range(5)
}
VAL = {
    f"{wnid}/ILSVRC2012_val_0000000{i}.JPEG": encoded(picture(100 + i, (40, 36)), "JPEG")
    for i, wnid in enumerate(WNIDS)
}


def shuffled(images: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    order = np.random.Generator(np.random.PCG64(3)).permutation(len(images))
    return [list(images.items())[i] for i in order]


def write_shards(root: Path, split: str, images: Mapping[str, bytes], labels=True) -> Path:
    """Two tars of NAME.jpg and NAME.cls, as ImageNet's webdatasets are."""
    rows = shuffled(images)
    for number, some in enumerate((rows[:4], rows[4:])):
        members = {}
        for key, data in some:
            wnid, _, file = key.partition("/")
            stem = file.removesuffix(".JPEG") + ("_" + wnid if split == "val" else "")
            if labels:
                members[f"{stem}.cls"] = str(WNIDS.index(wnid)).encode()
            members[f"{stem}.jpg"] = data
        if members:
            write_tar(root / f"imagenet-{split}-{number:04d}.tar", members)
    return root


def write_imagenet_parquet(root: Path) -> Path:
    """Files called as those of Hugging Face's imagenet-1k, with its names of images and classes."""
    for split, images in (("train", TRAIN), ("validation", VAL)):
        rows = shuffled(images)
        half = len(rows) // 2
        for number, some in enumerate((rows[:half], rows[half:])):
            wnids = [key.partition("/")[0] for key, _ in some]
            files = [key.partition("/")[2].removesuffix(".JPEG") for key, _ in some]
            write_parquet(
                root / f"data/{split}-0000{number}-of-00002.parquet",
                [f"{file}_{wnid}.JPEG" for file, wnid in zip(files, wnids)],
                [data for _, data in some],
                [WNIDS.index(wnid) for wnid in wnids],
                ["tench", "goldfish", "great white shark"],
            )
    return root


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> dict[str, Path]:
    """The same images as folders, as shards, as parquet: by DATA.DATASET."""
    root = tmp_path_factory.mktemp("copies")
    for split, images in (("train", TRAIN), ("val", VAL)):
        write_files(root / "folders" / split, images)
        write_shards(root / "shards", split, images)
    return {
        "imagenet": root / "folders",
        "webdataset": root / "shards",
        "parquet": write_imagenet_parquet(root / "parquet"),
    }


def sample_bits(dataset) -> list[tuple[bytes, int]]:
    samples = [dataset[i] for i in range(len(dataset))]
    return [(image.tobytes(), label) for image, label in samples]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_copy_is_the_folders_bit_for_bit(copies, kind, split):
    folders = built(split, DATASET="imagenet", DATA_PATH=copies["imagenet"])
    copy = built(split, DATASET=kind, DATA_PATH=copies[kind])
    assert list(copy.get_keys()) == list(folders.get_keys())
    assert sample_bits(copy) == sample_bits(folders)
    assert copy.num_classes == 3
    first = copy[0]  # with files open
    assert pickle.loads(pickle.dumps(copy))[0][0].tobytes() == first[0].tobytes()


def test_one_store_serves_all(copies, tmp_path):
    def place(kind: str) -> tuple[object, ...]:
        return "DATA.DATASET", kind, "DATA.DATA_PATH", copies[kind]

    for kind in copies:
        assert run(tmp_path / kind, *place(kind)) == 0
    written = [sealed_bytes(tmp_path / kind) for kind in copies]
    assert written[0] == written[1] == written[2]
    seen = []
    for kind in copies:
        opened = open_run(unresolved(tmp_path / "imagenet", *place(kind), "TRAIN.EPOCHS 1"))
        opened.check_store()
        batches = opened.train_loader(4).batches(0)
        seen.append([(batch.image.numpy().tobytes(), batch.label.tolist()) for batch in batches])
    assert seen[0] == seen[1] == seen[2]


def test_images_encoded_again_are_told_from_the_stores(copies, tmp_path):
    assert run(tmp_path / "store", "DATA.DATASET imagenet DATA.DATA_PATH", copies["imagenet"]) == 0
    other = {
        f"{wnid}/{wnid}_{10 * i + 7}.JPEG": encoded(
            picture(10 * n + i, (40, 36)), "JPEG", quality=60
        )
        for n, wnid in enumerate(WNIDS)
        for i in range(5)
    }
    root = write_shards(tmp_path / "shards", "train", other)
    write_shards(root, "val", VAL)
    cfg = unresolved(
        tmp_path / "store", "DATA.DATASET webdataset TRAIN.EPOCHS 1", "DATA.DATA_PATH", root
    )
    with pytest.raises(ValueError, match="15 of 15 sampled images differ from those the store"):
        open_run(cfg).check_store()


def test_the_documents_copy_to_tars_keeps_keys_and_bytes(copies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("imagenet-1k").symlink_to(copies["parquet"])
    exec(dict(marked(ROOT / "docs" / "PREPARATION.md", "run"))["parquet-to-tar"], {})
    folders = built("train", DATASET="imagenet", DATA_PATH=copies["imagenet"])
    tar = built("train", DATA_PATH="ImageNet-train.tar", VAL_PATH="ImageNet-val.tar")
    assert list(tar.get_keys()) == list(folders.get_keys())
    assert sample_bits(tar) == sample_bits(folders)


@pytest.mark.parametrize(
    ("name", "class_name", "key"),
    [
        ("n01440764_10026_n01440764.JPEG", "tench", "n01440764/n01440764_10026.JPEG"),
        ("n01440764_10026.jpg", "", "n01440764/n01440764_10026.JPEG"),
        ("train/n01440764/n01440764_10026.jpeg", "", "n01440764/n01440764_10026.JPEG"),
        (
            "ILSVRC2012_val_00000293_n01440764.JPEG",
            "",
            "n01440764/ILSVRC2012_val_00000293.JPEG",
        ),
        ("ILSVRC2012_val_00000293.jpg", "n01440764", "n01440764/ILSVRC2012_val_00000293.JPEG"),
        ("ILSVRC2012_val_00000293.jpg", "", "ILSVRC2012_val_00000293.jpg"),
        ("17.png", "cat", "cat/17.png"),
        ("cats/17.png", "cat", "cats/17.png"),
        ("17.png", "", "17.png"),
    ],
)
def test_keys_follow_a_rule(name, class_name, key):
    assert key_of(name, class_name) == key


def test_rows_without_a_path_are_known_by_their_number(tmp_path):
    images = [encoded(picture(i)) for i in range(3)]
    write_parquet(tmp_path / "train-0.parquet", [None, None], images[:2], [1, 0], ["cat", "dog"])
    write_parquet(tmp_path / "train-1.parquet", ["x.png"], images[2:], [1], ["cat", "dog"])
    dataset = built("train", DATASET="parquet", DATA_PATH=tmp_path)
    assert list(dataset.get_keys()) == ["dog/x.png", "row/000000", "row/000001"]
    assert [label for _, label in sample_bits(dataset)] == [1, 1, 0]
    assert dataset.class_names == ["cat", "dog"]


def test_a_column_of_keys(tmp_path):
    images = [encoded(picture(i)) for i in range(2)]
    path = write_parquet(tmp_path / "a.parquet", [None, None], images, number=["b", "a"])
    dataset = built("train", DATASET="parquet", DATA_PATH=path, VAL_PATH=path, KEY_COLUMN="number")
    assert list(dataset.get_keys()) == ["a", "b"]
    assert sample_bits(dataset) == [(picture(i).tobytes(), -1) for i in (1, 0)]
    with pytest.raises(ValueError, match=r"DATA.KEY_COLUMN = id: .*a.parquet has the columns"):
        built("train", DATASET="parquet", DATA_PATH=path, KEY_COLUMN="id")


def test_tars_of_class_folders_need_no_numbers(tmp_path):
    members = {f"all/{name}/{i}.png": encoded(picture(i)) for name in "ba" for i in range(2)}
    write_tar(tmp_path / "train-0.tar", members)
    dataset = built("train", DATASET="webdataset", DATA_PATH=tmp_path)
    assert list(dataset.get_keys()) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert [label for _, label in sample_bits(dataset)] == [0, 0, 1, 1]


def test_tars_without_labels(tmp_path):
    write_tar(tmp_path / "train-0.tar", {f"{i}.png": encoded(picture(i)) for i in range(2)})
    dataset = built("train", DATASET="webdataset", DATA_PATH=tmp_path)
    assert list(dataset.get_keys()) == ["0.png", "1.png"]
    assert dataset.num_classes == 0


PICTURE = encoded(picture(1))
FAULTS = {
    "an image without a label": (
        {"1.png": PICTURE, "1.cls": b"0", "2.png": PICTURE},
        "1 of 2 imag",
    ),
    "a label that is no number": ({"1.png": PICTURE, "1.cls": b"cat"}, "1.cls: b'cat' is no num"),
    "a name that stands twice": ({"1.png": PICTURE, "./1.png": PICTURE}, "'1.png' stands twice"),
    "no images": ({"1.cls": b"3"}, "no images"),
    "another numbering": (
        {
            **{f"n01440764_{i}.jpg": PICTURE for i in range(2)},
            **{f"n01440764_{i}.cls": b"%d" % i for i in range(2)},
        },
        "has the label of class n01443537: its labels follow another numbering",
    ),
    "a label too many": ({"1.png": PICTURE, "1.cls": b"1000"}, "there are 1000 class names"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_of_shards(tmp_path, what):
    members, message = FAULTS[what]
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(ValueError, match=message):
        built("train", DATASET="webdataset", DATA_PATH=tmp_path, CLASS_LIST="imagenet1k")


def test_files_that_are_no_shards(tmp_path):
    with pytest.raises(ValueError, match=r"no \.tar file has 'train' in its name"):
        built("train", DATASET="webdataset", DATA_PATH=tmp_path)
    write_tar(tmp_path / "a.tar", {"1.png": PICTURE})
    with pytest.raises(ValueError, match=r"a\.tar and 0 others are of no split"):
        built("train", DATASET="webdataset", DATA_PATH=tmp_path)
    (tmp_path / "train.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match="compressed"):
        built("train", DATASET="webdataset", DATA_PATH=tmp_path)
    (tmp_path / "train.parquet").write_bytes(bytes(600))
    with pytest.raises(ValueError, match=r"train\.parquet: can't be read as parquet"):
        built("train", DATASET="parquet", DATA_PATH=tmp_path)


def test_a_damaged_row_group_names_the_file(tmp_path):
    images = [encoded(picture(i)) for i in range(4)]
    path = write_parquet(tmp_path / "train.parquet", list("abcd"), images, [0] * 4)
    dataset = built("train", DATASET="parquet", DATA_PATH=tmp_path)
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train\.parquet: row 0 can't be read"):
        dataset[0]


def test_without_pyarrow_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="needs pyarrow, which is not installed: pip install"):
        built("train", DATASET="parquet", DATA_PATH=tmp_path)
