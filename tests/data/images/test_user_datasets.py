"""A user's own data set: package.module:function."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from tests.support.images import built

HERE = "tests.data.images.test_user_datasets"


class Own:
    """A user's data set: grey images whose label is their position, modulo 3."""

    def __init__(self, count: int = 6, **extra) -> None:
        self.count = count
        self.__dict__.update(extra)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        return Image.new("L", (4, 3), index), index % 3


def of_both(cfg, split):
    return Own(4 if split == "val" else 6, num_classes=3, class_names=["x", "y", "z"])


def of_config(cfg):
    return Own(cfg.DATA.SHAPES.VAL_IMAGES)


def with_defaults(cfg, count=4):
    return Own(count)


def by_name(cfg, split="train"):
    return Own(4 if split == "val" else 6)


def with_keys(cfg, split):
    keys = [f"image {i}" for i in range(6)]
    return Own(targets=[0, 1, 2, 0, 1, 2], classes=["x", "y", "z"], get_keys=lambda: keys)


def with_one_key(cfg, split):
    return Own(get_keys=lambda: ["a"])


def with_equal_keys(cfg, split):
    return Own(get_keys=lambda: ["a"] * 6)


def without_labels(cfg):
    return [(Image.new("RGB", (2, 2)), None)] * 3


def nothing(cfg):
    return None


def empty(cfg):
    return []


def that_fails(cfg):
    raise KeyError("a fault of the user's")


def arrays(cfg):
    return [(np.zeros((2, 2, 3), np.uint8), 1)] * 3


def without_pairs(cfg):
    return [Image.new("RGB", (2, 2))] * 3


def own(function: str, split: str = "train", **more):
    return built(split, DATASET=f"{HERE}:{function}", **more)


def test_a_data_set_of_the_users():
    train = own("of_both")
    assert (len(train), train.num_classes, train.class_names) == (6, 3, ["x", "y", "z"])
    image, label = train[5]
    assert image.mode == "RGB" and label == 2
    assert np.asarray(image).tolist() == [[[5] * 3] * 4] * 3
    assert list(train.get_keys()) == ["0", "1", "2", "3", "4", "5"]
    assert train.get_keys().digest() == hashlib.sha256(b"0\n1\n2\n3\n4\n5\n").hexdigest()
    unlabelled = own("without_labels")
    assert unlabelled[0][1] == -1 and unlabelled.num_classes == 0


@pytest.mark.parametrize(
    ("function", "lengths"),
    [("of_both", [6, 4]), ("by_name", [6, 4]), ("with_defaults", [4, 4]), ("of_config", [7, 7])],
)
def test_the_split_is_told_to_a_function_that_asks_for_it(function, lengths):
    options = {"SHAPES.VAL_IMAGES": 7}
    assert [len(own(function, split, **options)) for split in ("train", "val")] == lengths


def test_parts_of_a_data_set_of_the_users(tmp_path):
    (tmp_path / "out.txt").write_text("image 4\n")
    dataset = own("with_keys", EXCLUDE=tmp_path / "out.txt")
    assert list(dataset.get_keys()) == [f"image {i}" for i in (0, 1, 2, 3, 5)]
    assert dataset.num_classes == 3 and dataset[4][1] == 2
    assert [np.asarray(dataset[i][0])[0, 0, 0] for i in range(5)] == [0, 1, 2, 3, 5]
    half = own("with_keys", SUBSET=0.5)
    assert sorted(half[i][1] for i in range(len(half))) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"DATA.SUBSET needs .*:of_both a list `targets`"):
        own("of_both", SUBSET=0.5)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("no_such_module:f", "there is no module no_such_module .*PYTHONPATH"),
        ("tests.no_such:f", "there is no module tests.no_such"),
        (f"{HERE}:no_such", "test_user_datasets.py has no function 'no_such'"),
        (f"{HERE}:nothing", r"nothing: gave a NoneType, not a data set with a length and \[i\]"),
        (f"{HERE}:empty", "the data set for train is empty"),
        (f"{HERE}:with_one_key", "a data set of 6 images with 1 keys and 6 targets"),
        (f"{HERE}:with_equal_keys", "'a' stands twice"),
    ],
)
def test_data_sets_of_the_users_that_do_not_work(dataset, message):
    with pytest.raises(ValueError, match=message):
        built("train", DATASET=dataset)


@pytest.mark.parametrize("function", ["arrays", "without_pairs"])
def test_items_that_are_no_pairs_of_image_and_label_are_named(function):
    with pytest.raises(ValueError, match=r"item 1 of the data set list is no pair \(PIL image"):
        own(function)[1]


def test_a_fault_inside_of_the_users_function_or_module_is_left_as_it_is(tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="a fault of the user's"):
        own("that_fails")
    (tmp_path / "users_own_module.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        built("train", DATASET="users_own_module:f")
