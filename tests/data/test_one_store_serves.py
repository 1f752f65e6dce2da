"""One paired store serves many students: other seeds, fewer columns, parts of the data, longer
runs; and refuses those it can't serve.
"""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

from configs import load_config
from data.augment.pairs import PairMix
from data.augment.rng import sample_seed
from data.build import open_run, open_store, resolve
from data.images import shapes
from data.images.datasets import build_dataset
from data.store import LogitsStoreReader
from data.store.keys import map_positions
from models.distill import encode
from tests.support.jobs import words
from tests.support.saving import OPTS, run
from tests.support.teachers import Glance

IMAGES, CLASSES, K, EPOCHS, BATCH = 61, 20, 10, 2, 6
DATA = ("DATA.SHAPES.TRAIN_IMAGES", IMAGES, "DATA.BATCH_SIZE", BATCH)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two epochs of top-10 of 20 classes, mixed in pairs, by a teacher with a fill colour of its
    own mean.
    """
    root = tmp_path_factory.mktemp("serves") / "store"
    assert (
        run(
            root,
            *DATA,
            "MODEL.NUM_CLASSES",
            CLASSES,
            "DISTILL.LOGITS_TOPK",
            K,
            "TRAIN.EPOCHS",
            EPOCHS,
            "DATA.SEED 11 DATA.MEAN_AND_STD_TYPE half",
        )
        == 0
    )
    return root


def unresolved(root: Path, *opts: object):
    """A student's configuration, in which nothing of the recipe is given: the store tells."""
    student = [
        "MODEL.TYPE tiny_vit DISTILL.TEACHER_LOGITS_PATH",
        root,
        "TRAIN.EPOCHS",
        EPOCHS,
        "TRAIN.WARMUP_EPOCHS 0 DATA.MEAN_AND_STD_TYPE half",
    ]
    own = dict(zip(OPTS[::2], OPTS[1::2]))
    kept = [
        item
        for key in "DATA.DATASET DATA.SHAPES.SIZE DATA.NUM_WORKERS DEVICE".split()
        for item in (key, own[key])
    ]
    return load_config(words("--opts", *kept, *DATA, *student, *opts))


def student(root: Path, *opts: object):
    cfg = resolve(unresolved(root, *opts))
    open_run(cfg).check_store()
    return cfg


def trained_on(cfg, epoch: int, step_images: int = BATCH) -> dict[int, tuple]:
    """What a student gets in an epoch: by position (key, label, seed, classes, probabilities,
    position of the partner, mixed image).
    """
    data = open_run(cfg).train_loader(BATCH, 0, step_images)
    dataset, mix, got = data.dataset, PairMix.from_config(cfg), {}
    keys = dataset.dataset.get_keys()
    for batch in data.batches(epoch):
        mixed, _ = mix(batch.image, None, batch.seed)
        positions = batch.position.tolist()
        partners = [positions[row ^ 1] for row in range(len(positions))]
        for row, position in enumerate(positions):
            key = keys[dataset.index(position)]
            got[position] = (
                key,
                int(batch.label[row]),
                int(batch.seed[row]),
                batch.indices[row].tolist(),
                batch.probs[row].tolist(),
                partners[row],
                mixed[row],
            )
    return got


def assert_right_targets(root: Path, got: dict[int, tuple], epoch: int, k: int = K) -> None:
    """Each record is the store's for that key, its seed the stored one, and the teacher says the
    same of the image the student saw.
    """
    reader = LogitsStoreReader(root)
    teacher = Glance(CLASSES)
    listed = (root / "keys.txt").read_text().splitlines()
    records = reader.open_epoch(epoch)
    assert got
    for position, (key, label, seed, classes, probs, _, image) in got.items():
        record = records[position]
        assert key == listed[position] == reader.keys[position]
        assert label == shapes.CLASS_NAMES.index(key.partition("/")[0])
        assert seed == record["seed"] == sample_seed(11, epoch, position)
        assert classes == record["index"][:k].tolist() and len(probs) == k
        assert probs == record["prob"][:k].tolist()
        answer = encode(teacher(image[None]), k)
        assert classes == answer[0][0].tolist() and probs == answer[1][0].tolist()


def assert_same(first: dict[int, tuple], second: dict[int, tuple]) -> None:
    """Equal samples in equal order, to the last bit."""
    assert list(first) == list(second)
    assert all(
        a[:6] == b[:6] and torch.equal(a[6], b[6]) for a, b in zip(first.values(), second.values())
    )


def test_students_of_other_seeds_see_the_same(store):
    """SEED is the student's own; DATA.SEED, fill colour and recipe come from the store."""
    first, second = (trained_on(student(store, "SEED", seed), 1) for seed in (0, 7))
    assert len(first) == 60  # whole steps
    assert_right_targets(store, first, 1)
    assert_same(first, second)


def test_the_recipe_comes_from_the_store(store):
    cfg = student(store)
    assert (cfg.DATA.SEED, cfg.DATA.IMG_SIZE, cfg.MODEL.NUM_CLASSES, cfg.DISTILL.LOGITS_TOPK) == (
        11,
        40,
        CLASSES,
        K,
    )
    assert cfg.AUG.FILL == [128, 128, 128] and cfg.DISTILL.ENABLED and cfg.AUG.MIXUP_MODE == "pair2"
    # the student's normalisation is its own, the fill colour is not
    other = student(store, "DATA.MEAN_AND_STD_TYPE default")
    assert other.AUG.FILL == [128, 128, 128]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_fewer_columns(store, k):
    got = trained_on(student(store, "DISTILL.LOGITS_TOPK", k), 0)
    assert_right_targets(store, got, 0, k)


def test_a_part_of_the_data(store):
    """A tenth of each class: of the store's pairs those whose two images are there, with the
    partners that they had.
    """
    whole = trained_on(student(store), 1, step_images=1)
    cfg = student(store, "DATA.SUBSET 0.5 DATA.BATCH_SIZE 2")
    wanted = set(build_dataset(cfg, "train").get_keys())
    assert 25 < len(wanted) < 36
    got = trained_on(cfg, 1, step_images=1)
    assert_right_targets(store, got, 1)
    expected = {
        position: sample
        for position, sample in whole.items()
        if {sample[0], whole[sample[5]][0]} <= wanted
    }
    assert got.keys() == expected.keys() and len(got) > 4
    assert all(
        got[position][:6] == sample[:6] and torch.equal(got[position][6], sample[6])
        for position, sample in expected.items()
    )


def test_a_tenth_of_the_data(tmp_path):
    """Without mixing every image of the tenth is served; of pairs both must be there, and what is
    skipped is told.
    """
    images = "DATA.SHAPES.TRAIN_IMAGES 121"
    unmixed = "AUG.MIXUP 0.0 AUG.CUTMIX 0.0"
    own = ("MODEL.NUM_CLASSES", CLASSES, "DATA.SEED 11 DATA.MEAN_AND_STD_TYPE half")
    assert run(tmp_path / "single", *DATA, images, *own, unmixed) == 0
    assert run(tmp_path / "pairs", *DATA, images, *own) == 0
    tenth = (images, "DATA.SUBSET 0.1 DATA.BATCH_SIZE 2 TRAIN.EPOCHS 1")
    cfg = student(tmp_path / "single", *tenth)
    got = trained_on(cfg, 0, step_images=1)
    assert [sample[0] for sample in got.values()] != sorted(sample[0] for sample in got.values())
    assert (
        sorted(sample[0] for sample in got.values()) == list(build_dataset(cfg, "train").get_keys())
        and len(got) == 10
    )
    assert_right_targets(tmp_path / "single", got, 0)
    cfg = student(tmp_path / "pairs", *tenth)
    assert open_run(cfg).train_loader(2).sampler.skipped > 110


def test_a_list_of_images_to_leave_out(store, tmp_path):
    keys = (store / "keys.txt").read_text().splitlines()
    (tmp_path / "exclude").write_text("\n".join([keys[3], keys[40], keys[60]]) + "\n")
    got = trained_on(student(store, "DATA.EXCLUDE", tmp_path / "exclude"), 0, step_images=1)
    whole = trained_on(student(store), 0, step_images=1)
    gone = {3, 40, 60} | {whole[position][5] for position in (3, 40, 60)}
    assert got.keys() == whole.keys() - gone and len(gone) in (5, 6)
    assert_right_targets(store, got, 0)


def test_a_run_twice_as_long(store):
    """Epoch e is the store's epoch e modulo 2, in order and pairs too."""
    cfg = student(store, "TRAIN.EPOCHS 4 DISTILL.REUSE_EPOCHS True")
    for epoch in range(4):
        got, again = trained_on(cfg, epoch), trained_on(student(store), epoch % 2)
        assert_right_targets(store, got, epoch % 2)
        assert_same(got, again)


def test_a_long_run_on_the_first_epochs_alone(store):
    """As from a store that has no others."""
    cfg = student(store, "TRAIN.EPOCHS 3 DISTILL.REUSE_FIRST 1")
    for epoch in range(3):
        assert_same(trained_on(cfg, epoch), trained_on(student(store), 0))
    with pytest.raises(ValueError, match="epoch 2 is missing"):
        open_run(student(store, "TRAIN.EPOCHS 3 DISTILL.REUSE_FIRST 3")).check_store()


def test_epochs_differ(store):
    first, second = (trained_on(student(store), epoch) for epoch in range(2))
    assert list(first) != list(second) and first[0][2] != second[0][2]


def test_workers_map_the_store_themselves(store):
    """Persistent loader processes read the right records of one epoch after the other."""
    data = open_run(student(store, "DATA.NUM_WORKERS 2")).train_loader(BATCH, 0, BATCH)
    reader = LogitsStoreReader(store)
    for epoch in (0, 1, 0):
        records = reader.open_epoch(epoch)
        for batch in data.batches(epoch):
            rows = records[batch.position.numpy()]
            assert (rows["index"] == batch.indices.numpy()).all() and (
                rows["seed"] == batch.seed.numpy()
            ).all()


# ---- what docs/REPLAY.md says of the format


def test_the_four_lines_of_the_documentation(store, root, monkeypatch, capsys):
    code = re.search(
        r"```python\n(.*?)```", (root / "docs" / "REPLAY.md").read_text(encoding="utf-8"), re.DOTALL
    )[1]
    monkeypatch.chdir(store.parent)
    exec(code, {})
    record = LogitsStoreReader(store).open_epoch(0)[5]
    assert len(code.splitlines()) == 4
    assert capsys.readouterr().out.startswith(
        f"{Path(store / 'keys.txt').read_text().splitlines()[5]} {record['seed']} {record['index']}"
    )


def test_the_table_of_bytes(store):
    data = (store / "epoch_0001.npy").read_bytes()[-IMAGES * 44 :]
    records = LogitsStoreReader(store).open_epoch(1)
    for position in (0, 1, IMAGES - 1):
        seed, *rest = struct.unpack("<i10H10e", data[44 * position : 44 * position + 44])
        assert seed == sample_seed(11, 1, position) == records[position]["seed"]
        assert rest == [*records[position]["index"], *records[position]["prob"]]


# ---- refusals


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("DISTILL.LOGITS_TOPK 11", "11, but the store {store} holds top-10: set"),
        ("MODEL.NUM_CLASSES 30", "30, but the store {store} was written with 20"),
        (
            "AUG.REPROB 0.5",
            "0.5, but the store {store} was written with 0.25: set AUG.REPROB 0.25 as",
        ),
        ("AUG.MIXUP 0.0", "0.0, but the store {store} was written with 0.8"),
        ("AUG.FILL [1,2,3]", "[1, 2, 3], but the store {store} was written with [128, 128, 128]"),
        ("DATA.SEED 12", "12, but the store {store} was written with 11"),
        (
            "DATA.IMG_SIZE 48",
            "48, but the store {store} was written with 40: set DATA.IMG_SIZE 40,",
        ),
        ("DISTILL.TEMPERATURE 2.0", "2.0, but the store {store} was written with 1.0: leave"),
        ("DATA.INTERPOLATION bilinear", "'bilinear', but the store {store} was written with 'bic"),
    ],
)
def test_an_explicit_value_that_differs(store, opts, message):
    with pytest.raises(ValueError) as refused:
        student(store, opts)
    key = opts.split()[0]
    assert f"{key} = {message.format(store=store)}" in str(refused.value)


def test_all_values_that_differ_are_told_at_once(store):
    with pytest.raises(ValueError, match=r"^AUG.REPROB = .*; ALSO: AUG.MIXUP = 0.0, but"):
        student(store, "AUG.MIXUP 0.0 AUG.REPROB 0.5")


def test_values_that_are_equal_or_allowed_to_differ(store):
    cfg = student(
        store, "AUG.REPROB 0.25 AUG.SCALE", (0.08, 1), "DATA.IMG_SIZE 56 DISTILL.OTHER_SIZE True"
    )
    assert cfg.DATA.IMG_SIZE == 56
    other, same = trained_on(cfg, 0), trained_on(student(store), 0)
    assert other[5][6].shape == (3, 56, 56) and [sample[:6] for sample in other.values()] == [
        sample[:6] for sample in same.values()
    ]
    with pytest.raises(ValueError, match="DATA.IMG_SIZE = 32"):  # there the draws are others
        student(store, "DATA.IMG_SIZE 32 DISTILL.OTHER_SIZE True")


def test_epochs_that_are_missing(store):
    with pytest.raises(
        ValueError,
        match=(
            r"epochs 2-4 are missing \(sealed: 0-1\): save with save_logits.py, set"
            r" DISTILL.REUSE"
        ),
    ):
        student(store, "TRAIN.EPOCHS 5")


@pytest.fixture
def own(store, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(store, tmp_path / "own"))


def test_a_truncated_epoch(own):
    with open(own / "epoch_0001.npy", "r+b") as file:
        file.truncate((own / "epoch_0001.npy").stat().st_size - 3)
    with pytest.raises(ValueError, match="epoch_0001.npy: truncated or damaged"):
        student(own)


def test_a_flipped_bit_is_found_by_verifying(own):
    path = own / "epoch_0000.npy"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    reader = LogitsStoreReader(own)
    assert any(reader.faults(0)) and not any(reader.faults(1))


def test_a_newer_format(own):
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(
        ValueError, match="the store has format 2, this program knows format 1: update the program"
    ):
        student(own)


def test_a_decoder_that_has_drifted(own):
    manifest = json.loads((own / "manifest.json").read_text())
    name = sorted(manifest["proof"]["canary"])[0]
    manifest["proof"]["canary"][name] = "0" * 64
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError,
        match=(
            rf"this machine does not augment as the writer of the store .* did \({name} differ\):"
            r" install"
        ),
    ):
        student(own)


@pytest.mark.parametrize(
    "proof",
    [
        {"canary": 1.5},
        {"images": None},
        {"images": {"positions": [0]}},
        *(
            {"images": {"positions": [place], "sha256": [""]}}
            for place in ("one", [], -1, 61, 1e999)
        ),
    ],
)
def test_a_proof_that_is_none(own, proof):
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**manifest, "proof": proof}))
    with pytest.raises(ValueError, match=r"manifest.json: its proof can't be understood .*restore"):
        student(own)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", [2]), ("image_size", "large"), ("base_seed", 12)]
)
def test_a_manifest_that_its_seals_do_not_know(own, key, value):
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["identity"][key] = value
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was sealed under another manifest: restore manifest"):
        student(own)
    del manifest["identity"][key]
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was sealed under another manifest: restore manifest"):
        student(own)


# ---- images that have changed


@pytest.fixture(scope="module")
def photographed(tmp_path_factory) -> tuple[Path, Path]:
    """(store, images) of files in folders."""
    folder = tmp_path_factory.mktemp("photographed")
    for i in range(30):
        path = folder / "images" / "train" / shapes.CLASS_NAMES[i % 10] / f"{i // 10:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.draw("train", i % 10, i, 40).save(path)
    assert run(folder / "store", "DATA.DATASET imagenet DATA.DATA_PATH", folder / "images") == 0
    return folder / "store", folder / "images"


def refusal(store: Path, images: Path) -> str:
    with pytest.raises(ValueError) as refused:
        student(store, "DATA.DATASET imagenet DATA.DATA_PATH", images, "TRAIN.EPOCHS 1")
    return str(refused.value)


def changed(photographed, tmp_path) -> tuple[Path, Path]:
    store, images = photographed
    copy = Path(shutil.copytree(images, tmp_path / "images"))
    return store, copy


def test_unchanged_images_elsewhere_are_welcome(photographed, tmp_path):
    store, images = changed(photographed, tmp_path)
    student(store, "DATA.DATASET imagenet DATA.DATA_PATH", images, "TRAIN.EPOCHS 1")


def test_an_image_that_was_added(photographed, tmp_path):
    store, images = changed(photographed, tmp_path)
    shutil.copy(images / "train/star/000000.png", images / "train/star/new.png")
    assert "the store lacks images of this data set: 1 added: 'star/new.png'" in refusal(
        store, images
    )


def test_an_image_that_was_removed_is_skipped(photographed, tmp_path):
    """A cleaned list uses the full store: the image and its partner are left out."""
    store, images = changed(photographed, tmp_path)
    (images / "train/star/000001.png").unlink()
    cfg = student(store, "DATA.DATASET imagenet DATA.DATA_PATH", images, "TRAIN.EPOCHS 1")
    assert open_run(cfg).train_loader(2).sampler.skipped == 2


def test_an_image_that_was_renamed(photographed, tmp_path):
    store, images = changed(photographed, tmp_path)
    (images / "train/star/000002.png").rename(images / "train/star/other.png")
    assert "1 added: 'star/other.png'; 1 removed: 'star/000002.png'" in refusal(store, images)


def test_images_in_another_order_are_found_by_name(photographed, tmp_path):
    """A data set of the user's that lists the same keys backwards."""
    store, images = photographed
    cfg = unresolved(store, "DATA.DATASET imagenet DATA.DATA_PATH", images, "TRAIN.EPOCHS 1")
    keys = list(build_dataset(cfg, "train").get_keys())
    reader = open_store(cfg, keys)
    assert (
        map_positions(reader, keys[::-1], cache=tmp_path).tolist() == list(range(len(keys)))[::-1]
    )


def test_an_image_replaced_under_the_same_name(photographed, tmp_path):
    store, images = changed(photographed, tmp_path)
    shutil.copy(images / "train/star/000000.png", images / "train/ring/000000.png")
    text = refusal(store, images)
    assert (
        "1 of 30 sampled images differ from those the store" in text
        and "(first: ring/000000.png): restore the data" in text
    )
