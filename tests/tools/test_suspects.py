"""python -m tools.logits suspects: who is suspected, in which order, against a naive loop in
float64 over a store that save_logits.py wrote.
"""

import itertools
from pathlib import Path

import pytest
from PIL import Image

from configs import load_config
from data.build import open_run
from data.store import LogitsStoreReader
from tests.support.jobs import words
from tests.support.saving import IMAGES, OPTS, run
from tools import suspects
from tools.logits import main

K, CLASSES, EPOCHS = 3, 10, 3
UNMIXED = "AUG.MIXUP 0 AUG.CUTMIX 0 DISTILL.LOGITS_TOPK".split()
DATA = words("--opts", *OPTS[2:-2], "TRAIN.EPOCHS 3 TRAIN.WARMUP_EPOCHS 0")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Three epochs of top-3 of 10 classes, unmixed."""
    root = tmp_path_factory.mktemp("suspects") / "store"
    assert run(root, *UNMIXED, K, "TRAIN.EPOCHS", EPOCHS) == 0
    return root


@pytest.fixture(scope="module")
def labels(store) -> list[int]:
    images = open_run(load_config(DATA)).images
    return [images.listing.label(position) for position in range(IMAGES)]


def called(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(word) for word in ("suspects", *argv)])
    told = capsys.readouterr()
    return code, told.out, told.err


def naive(store: Path, labels: list[int], outside: int) -> list[int]:
    """Positions of the suspects in their order, and a check that ties do not decide it."""
    reader = LogitsStoreReader(store)
    means, times = [0.0] * IMAGES, [0] * IMAGES
    for epoch in range(EPOCHS):
        for position, record in enumerate(reader.open_epoch(epoch)):
            classes = [int(index) for index in record["index"]]
            probs = [float(prob) for prob in record["prob"]]
            if labels[position] in classes:
                means[position] += probs[classes.index(labels[position])] / EPOCHS
            else:
                means[position] += max(0.0, 1 - sum(probs)) / (CLASSES - K) / EPOCHS
            times[position] += labels[position] not in classes[:outside]
    found = [position for position in range(IMAGES) if times[position] >= 2]
    ordered = sorted(found, key=lambda position: means[position])
    gaps = [means[b] - means[a] for a, b in itertools.pairwise(ordered)]
    assert min(gaps) > 1e-12
    return ordered


@pytest.mark.parametrize(("flags", "outside"), [((), 1), (("--outside", 2), 2)])
def test_the_list_is_ranked_as_stated(store, labels, flags, outside, tmp_path, capsys):
    output = tmp_path / "list.txt"
    code, out, err = called(capsys, store, *flags, "-o", output, *DATA)
    assert code == 0, err
    keys = LogitsStoreReader(store).keys
    expected = [keys[position] for position in naive(store, labels, outside)]
    assert output.read_text().splitlines() == expected and 3 < len(expected) < IMAGES
    assert f"{len(expected)} of {IMAGES} images" in out
    picture = Image.open(tmp_path / "list.png")
    assert picture.width > 900 and picture.height > 300


@pytest.mark.parametrize("outside", [1, 2])
def test_captions_tell_what_the_list_goes_by(store, labels, outside, tmp_path, monkeypatch, capsys):
    """Of the label and of the class that stands against it: in how many epochs, and the mean."""
    shown = []
    monkeypatch.setattr(suspects, "draw", lambda tiles, *_: shown.extend(tiles))
    flags = ("--outside", outside, "-o", tmp_path / "list.txt")
    assert called(capsys, store, *flags, *DATA)[0] == 0
    reader, names = LogitsStoreReader(store), open_run(load_config(DATA)).images.class_names
    expected = naive(store, labels, outside)[: len(shown)]
    assert len(shown) == 24
    for position, tile in zip(expected, shown):
        records = [reader.open_epoch(epoch)[position] for epoch in range(EPOCHS)]
        ranked = [record["index"].tolist() for record in records]
        believed = sum(labels[position] in classes[:outside] for classes in ranked)
        assert believed < 2  # of 3: so it is listed
        among = "first" if outside == 1 else "in the first 2"
        told, teacher, against, key = tile.words
        assert tile.title == f"given: {names[labels[position]]}" and key == reader.keys[position]
        assert told.startswith(f"{among} in {believed} of 3, ")
        other = names.index(teacher.removeprefix("teacher: "))
        firsts = [classes[0] for classes in ranked if classes[0] != labels[position]]
        most = max(firsts.count(name) for name in firsts)
        mean = sum(
            float(prob) / EPOCHS
            for record in records
            for index, prob in zip(record["index"], record["prob"])
            if index == other
        )
        assert firsts.count(other) == most and other != labels[position]
        assert against == f"first in {most} of 3, {mean:.3f}"


def test_training_takes_the_list(store, tmp_path, capsys):
    """And what it leaves out is judged no more."""
    output = tmp_path / "list.txt"
    assert called(capsys, store, "-o", output, *DATA)[0] == 0
    names = output.read_text().splitlines()
    again = [*DATA, "DATA.EXCLUDE", str(output)]
    assert len(open_run(load_config(again)).images) == IMAGES - len(names)
    code, out, _ = called(capsys, store, "-o", tmp_path / "rest.txt", *again)
    assert code == 0 and f"0 of {IMAGES - len(names)} images" in out
    assert (tmp_path / "rest.txt").read_bytes() == b"" and not (tmp_path / "rest.png").exists()


def test_mixed_pairs_are_refused(tmp_path, capsys):
    assert run(tmp_path / "store", "DISTILL.LOGITS_TOPK", K) == 0
    code, _, err = called(capsys, tmp_path / "store", "-o", tmp_path / "list.txt", *DATA)
    assert code == 2 and "mixed in pairs" in err and "AUG.MIXUP 0 AUG.CUTMIX 0" in err
    assert err.count("\n") == 1 and not (tmp_path / "list.txt").exists()


def test_what_cannot_be_judged_is_told_in_one_line(store, tmp_path, capsys):
    flags = ("-o", tmp_path / "list.txt", "--outside", 4)
    code, _, err = called(capsys, store, *flags, *DATA)
    assert code == 2 and "keeps top-3" in err and err.count("\n") == 1
    wide = tmp_path / "wide"
    assert run(wide, *UNMIXED, K, "MODEL.NUM_CLASSES", 20) == 0
    code, _, err = called(capsys, wide, *flags[:2], *DATA)
    assert code == 2 and "no label can be judged: the data has 10 classes" in err
