"""The map between ImageNet's two numberings."""

import hashlib
import json

import numpy as np
import pytest
import torch

from models.class_map import (
    LabelMap,
    class_map,
    find_label_map,
    imagenet_wnids,
    map_22k_to_1k,
    read_class_subset,
)

ABSENT = 850  # n04399382, the one class of the 1,000 that the 21,841 lack


def test_map_equals_the_originals_table(goldens):
    mapping = map_22k_to_1k()
    case = json.loads((goldens / "model.json").read_text())["remap_layer"]
    outputs = torch.arange(2 * 21841).view(2, -1).float()[:, mapping]
    outputs[:, mapping < 0] = 0  # what the original gives an absent class
    assert hashlib.sha256(outputs.numpy().tobytes()).hexdigest() == case["out_sha"]
    assert (mapping < 0).sum() == case["minus1"]


def test_map_follows_the_names():
    mapping = map_22k_to_1k()
    assert mapping.dtype == np.int64 and mapping.shape == (1000,)
    assert np.flatnonzero(mapping < 0).tolist() == [ABSENT]
    small, large = imagenet_wnids(1000), imagenet_wnids(21841)
    assert all(
        large[position] == small[index] for index, position in enumerate(mapping) if position >= 0
    )
    assert small[ABSENT] not in large
    back = class_map(1000, 21841)
    assert back.shape == (21841,) and (back >= 0).sum() == 999
    assert all(mapping[index] == position for position, index in enumerate(back) if index >= 0)


def test_equal_numberings_map_to_themselves_and_others_not_at_all():
    assert class_map(10, 10).tolist() == list(range(10))
    assert class_map(1000, 10) is None
    assert class_map(21841, 100) is None


@pytest.mark.parametrize(
    ("outputs", "classes", "options", "expected"),
    [
        (10, 10, {}, list(range(10))),
        (10, 10, {"subset": [4, 2, 9]}, [-1, -1, 1, -1, 0, -1, -1, -1, -1, 2]),
        (12, 3, {"subset": [4, 2, 9]}, [0, 1, 2]),
        (12, 10, {"data_numbers_outputs": True}, list(range(10))),
        (12, 10, {}, "the data has 10 classes and the model 12"),
        (12, 10, {"subset": [4, 2, 9]}, "the data has 10 classes and the model 3"),
        (12, 0, {"data_numbers_outputs": True}, "the data has no labels"),
        # names decide, where both sides have some of them
        (3, 3, {"names": ["cat", "dog", "owl"], "data_names": ["owl", "cat", "dog"]}, [2, 0, 1]),
        (3, 2, {"names": ["cat", "dog", "owl"], "data_names": ["owl", "dog"]}, [2, 1]),
        (3, 3, {"names": ["cat", "dog", "owl"], "data_names": ["a", "b", "c"]}, [0, 1, 2]),
        (2, 2, {"names": ["crane", "crane"], "data_names": ["crane", "crane"]}, [0, 1]),
        (
            *(3, 2),
            {"names": ["cat", "dog", "owl"], "data_names": ["owl", "dog"], "subset": [1, 2]},
            [1, 0],
        ),
        (
            *(3, 3),
            {"names": ["cat", "dog", "owl"], "data_names": ["cat", "dog", "owls"]},
            "the data's class owls is none of those that the weights were trained on (cat, dog,",
        ),
    ],
)
def test_where_the_datas_classes_stand_among_the_outputs(outputs, classes, options, expected):
    label_map, reason = find_label_map(outputs, classes, **options)
    if label_map is None:
        assert reason.startswith(expected)
    else:
        assert label_map.outputs.tolist() == expected and reason == ""


def test_labels_and_logits_follow_the_map():
    label_map = LabelMap(torch.tensor([2, -1, 0]))
    labels = torch.tensor([0, 1, 2, -1])
    assert not label_map.is_identity and "is_identity" in vars(label_map.to(torch.device("cpu")))
    assert label_map.labels(labels).tolist() == [2, -1, 0, -1]
    assert label_map.known(labels).tolist() == [0, -1, 2, -1]
    logits = torch.tensor([[3.0, -1.0, 2.0], [0.5, 7.0, 4.0]], requires_grad=True)
    # an absent class gets its row's minimum
    assert label_map.logits(logits).tolist() == [[2.0, -1.0, 3.0], [4.0, 0.5, 0.5]]


def test_an_absent_class_never_wins():
    logits = -torch.rand(4, 21841, generator=torch.Generator().manual_seed(0)) - 5  # all negative
    in_1k = find_label_map(21841, 1000)[0].logits(logits)
    assert torch.equal(in_1k[:, ABSENT], logits.amin(1))
    assert (in_1k.argmax(1) != ABSENT).all()


def test_a_model_with_more_outputs_than_classes_keeps_them_all():
    label_map, _ = find_label_map(12, 10, data_numbers_outputs=True)
    logits = torch.randn(2, 12)
    assert label_map.is_identity and torch.equal(label_map.logits(logits), logits)


def test_unknown_numbering():
    with pytest.raises(
        ValueError, match="no WordNet ids are known for 10 classes, only for 1000 and 21841"
    ):
        imagenet_wnids(10)


def test_class_subsets_are_read_by_index_and_by_name(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("n01440764\n\n7\nn04399382\n")
    assert read_class_subset(path, 1000) == [0, 7, ABSENT]
    path.write_text("cat\n0\n")
    assert read_class_subset(path, 3, ["dog", "owl", "cat"]) == [2, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0\ncat\n1000\n-1\nx\n",
            (
                r"classes.txt: cat, 1000, -1, \.\.\.: neither class names of the teacher nor"
                r" indices below 1000"
            ),
        ),
        ("", "classes.txt: expected some classes, one a line, each once"),
        ("0\nn01440764\n", "classes.txt: expected some classes, one a line, each once"),
        (None, "classes.txt: the list of classes cannot be read"),
    ],
)
def test_bad_class_subsets(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_subset(path, 1000)
