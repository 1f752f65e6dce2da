"""save_logits.py: what it writes, that history leaves no trace in it, what its check finds, and
what it refuses.
"""

import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import save_logits
from configs import load_config
from data.augment.pairs import PairMix
from data.augment.rng import sample_seed
from data.build import open_run, resolve
from data.images import shapes
from data.store import LogitsStoreReader
from models.build import build_model
from models.class_map import imagenet_wnids
from models.distill import encode
from models.teacher import Teacher
from save_logits import Tally, main
from tests.support import training
from tests.support.helpers import torchrun
from tests.support.jobs import words
from tests.support.saving import IMAGES, command, finish, run, sealed_bytes, write_upstream
from tests.support.teachers import Glance

CHECK = ("--check-saved-logits",)
UNVERIFIED = ("DISTILL.VERIFY", "False")  # else damage is told before anything is compared


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "it's a store"


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """Epochs 0 to 3, written by one process."""
    folder = tmp_path_factory.mktemp("four") / "store"
    assert run(folder, "TRAIN.EPOCHS 4") == 0
    return folder


def copied(store: Path, target: Path) -> Path:
    return Path(shutil.copytree(store, target))


def spoil(path: Path, change) -> None:
    """Change the records of a sealed epoch in place."""
    records = np.load(path)
    change(records)
    np.save(path, records)


# ---- history


def test_every_image_has_its_seed_and_probabilities_in_order(four):
    reader = LogitsStoreReader(four)
    assert reader.epochs() == [0, 1, 2, 3] and (len(reader), reader.k, reader.num_classes) == (
        IMAGES,
        10,
        10,
    )
    for epoch in reader.epochs():
        records = reader.open_epoch(epoch)
        assert records["seed"].tolist() == [
            sample_seed(0, epoch, position) for position in range(IMAGES)
        ]
        assert (np.diff(records["prob"].astype(float), axis=1) <= 0).all() and (
            np.sort(records["index"]) == np.arange(10)
        ).all()
        assert (
            reader.seal(epoch)["teacher"].keys() == {"images", "top1", "top5"}
            and reader.seal(epoch)["teacher"]["images"] == IMAGES
        )


def test_an_epoch_written_alone_is_the_same(store, four):
    assert run(store, "TRAIN.START_EPOCH 3 TRAIN.EPOCHS 4 DATA.NUM_WORKERS 2") == 0
    assert sealed_bytes(store) == {"epoch_0003.npy": sealed_bytes(four)["epoch_0003.npy"]}


@pytest.mark.parametrize(("world", "batch", "workers"), [(2, 8, 1), (4, 6, 0)])
def test_other_processes_batches_and_workers_write_the_same(store, four, world, batch, workers):
    """The teacher looks at each image by itself: equal bytes mean equal seeds, pairs, pixels."""
    finish(
        command(store, "TRAIN.EPOCHS 2 DATA.BATCH_SIZE", batch, "DATA.NUM_WORKERS", workers), world
    ).expect([0] * world)
    expected = sealed_bytes(four)
    assert sealed_bytes(store) == {
        name: expected[name] for name in ("epoch_0000.npy", "epoch_0001.npy")
    }


def test_two_ranks_with_the_same_batches_write_the_same_bytes_whatever_their_workers(tmp_path):
    """Even where answers depend on the whole batch."""
    for workers in (0, 2):
        finish(
            command(
                tmp_path / str(workers),
                "MODEL.TYPE tests.support.teachers:crowd DATA.NUM_WORKERS",
                workers,
            ),
            2,
        ).expect([0, 0])
    assert sealed_bytes(tmp_path / "0") == sealed_bytes(tmp_path / "2")


def test_a_stored_answer_is_the_teachers_for_that_mixed_image(four):
    """Replayed by hand from nothing but the recipe, the seeds and the pairs."""
    cfg = resolve(
        load_config(
            command(four, "DISTILL.SAVE_TEACHER_LOGITS True TRAIN.WARMUP_EPOCHS 0", flags=())
        )
    )
    teacher, mix, records = (
        Teacher("glance", Glance(10), 10),
        PairMix.from_config(cfg),
        LogitsStoreReader(four).open_epoch(1),
    )
    seen = []
    for batch in open_run(cfg).train_loader(8).batches(1):
        images, _ = mix(batch.image, None, batch.seed)
        indices, probs = encode(teacher(images), 10)
        rows = records[batch.position.numpy()]
        assert (rows["index"] == indices.numpy()).all() and (rows["prob"] == probs.numpy()).all()
        assert (rows["seed"] == batch.seed.numpy()).all()
        seen += batch.position.tolist()
    assert sorted(set(seen)) == list(range(IMAGES)) and seen[-1] == seen[-2]


def test_online_is_the_same_thing(four):
    """What main.py asks of a teacher in the loop equals what was stored, bit for bit, densified
    target and all.
    """
    cfg = resolve(load_config(command(four, "TRAIN.WARMUP_EPOCHS 0", flags=())))
    mean_and_std = (0.5,) * 3, (0.2,) * 3
    teacher = Teacher("glance", Glance(10), 10).in_the_loop(
        cfg.DISTILL.LOGITS_TOPK, cfg.DISTILL.TEMPERATURE, mean_and_std, mean_and_std
    )
    mix = PairMix.from_config(cfg)
    for batch in open_run(cfg).train_loader(8, 0, 8).batches(0):
        indices, probs = teacher(mix(batch.image, None, batch.seed)[0])
        assert torch.equal(indices, batch.indices) and torch.equal(probs.float(), batch.probs)


def test_a_complete_store_is_left_alone(four, capsys):
    before = sealed_bytes(four)
    assert run(four, "TRAIN.EPOCHS 4") == 0
    assert f"{four}: epochs 0-3 are complete, nothing is left to do" in capsys.readouterr().out
    assert sealed_bytes(four) == before


def test_a_start_is_four_lines_and_the_rest_is_in_the_file(tmp_path, capsys):
    small = "DATA.SHAPES.TRAIN_IMAGES 8 TRAIN.EPOCHS 1 OUTPUT"
    assert run(tmp_path / "store", small, tmp_path, flags=()) == 0
    lines = [line[9:] for line in capsys.readouterr().out.splitlines()]
    firsts = [line.partition(" ")[0] for line in lines]
    assert firsts[:5] == ["run", "teacher", "data:", "store", "teacher:"]
    assert lines[2].startswith("data: 8 images of 8 classes; ")
    assert f"store {tmp_path}/store: epoch 0 of 8 images, top-10 of 10 classes, " in lines[3]
    assert lines[-1] == f"{tmp_path}/store: epoch 0 is sealed"


def test_the_help_names_no_flag_that_is_of_no_use(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--check-saved-logits" in shown and "--resume" in shown
    for flag in ("--throughput", "--eval", "--accumulation-steps", "--use-wandb", "--use-sync-bn"):
        assert f"{flag} " not in shown and f"{flag}]" not in shown


def test_what_a_crash_left_beside_a_sealed_epoch_is_cleared_away(store, four):
    copied(four, store)
    (store / "epoch_0002.parts").mkdir()
    (store / "epoch_0002.parts" / "0000-1.part").write_bytes(b"rest")
    (store / "epoch_0002.lock").write_text("{}")
    assert run(store, "TRAIN.EPOCHS 4") == 0
    assert (
        not list(store.glob("*.parts"))
        and not list(store.glob("*.lock"))
        and sealed_bytes(store) == sealed_bytes(four)
    )


def test_progress_tells_speed_size_and_accuracy(store, monkeypatch, capsys):
    monkeypatch.setattr(save_logits, "progress", partial(save_logits.progress, interval=0))
    assert run(store, "TRAIN.EPOCHS 2") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/6 [" in line]
    assert len(lines) == 12
    shown = (
        r"epoch \d: .*\d/6 \[.*batches/s, (0 images|\d+ images, top1 \S+%, top5 \S+%, stored mass"
        r" \S+%, of one image \S+%); rank 0: (\d\.\d+ kB|\d+ bytes), [\d,]+ images/s, all epochs"
        r" done in (\S+|unknown)\]$"
    )
    assert all(re.search(shown, line) for line in lines), lines[0]


def test_temperature_and_k(store, four):
    assert run(store, "DISTILL.TEMPERATURE 4.0 DISTILL.LOGITS_TOPK 3") == 0
    hot, cold = LogitsStoreReader(store).open_epoch(0), LogitsStoreReader(four).open_epoch(0)
    assert hot["index"].shape == (IMAGES, 3) and (hot["index"][:, 0] == cold["index"][:, 0]).all()
    powered = cold["prob"].astype(float) ** (1 / 4)
    expected = np.sort(powered / powered.sum(1, keepdims=True))[:, ::-1][:, :3]
    assert (
        np.abs(hot["prob"] - expected).max() < 2e-3
        and (hot["prob"][:, 0] < cold["prob"][:, 0]).mean() > 0.95
    )
    assert run(store, flags=CHECK) == 0


def test_end_to_end_with_two_ranks(store, tmp_path, capsys):
    """torchrun as a user calls it, a TinyViT with weights from a file, an odd number of images,
    mixing on; then the check.
    """
    tiny = "MODEL.TINY_VIT."
    shape = [
        "MODEL.TYPE tiny_vit MODEL.NAME small",
        tiny + "DEPTHS",
        [1, 1, 1, 1],
        tiny + "NUM_HEADS",
        [1, 1, 1, 1],
        tiny + "WINDOW_SIZES",
        [3, 3, 3, 2],
        tiny + "EMBED_DIMS",
        [16, 32, 32, 32],
        "DATA.SHAPES.TRAIN_IMAGES",
        75,
        "DATA.IMG_SIZE",
        48,
    ]
    weights = tmp_path / "teacher's weights.pth"
    torch.manual_seed(3)
    model = build_model(load_config(words("--opts", *shape, "MODEL.NUM_CLASSES 10")), load=False)
    torch.save({"model": model.state_dict()}, weights)
    done = torchrun(
        ["save_logits.py", *command(store, *shape, "TRAIN.EPOCHS 2", flags=("--resume", weights))],
        2,
    )
    assert done.returncode == 0, done.stderr
    assert "teacher: top-1" in done.stdout and "75 images" in done.stdout
    reader = LogitsStoreReader(store)
    assert reader.epochs() == [0, 1] and len(reader) == 75
    assert run(store, *shape, "TRAIN.EPOCHS 2", flags=(*CHECK, "--resume", weights)) == 0
    shown = capsys.readouterr().out
    assert (
        "checked epochs 0-1: 150 images: 0 wrong seeds, 0 other top-1 classes, 0 other classes"
        in shown
        and "PASSED" in shown
    )
    finish(
        command(store, *shape, "TRAIN.EPOCHS 2", flags=(*CHECK, "--exact --resume", weights)), 2
    ).expect([0, 0], "PASSED")


# ---- the check


def test_the_check_passes_exactly_on_what_was_just_written(four, capsys):
    assert run(four, "TRAIN.EPOCHS 4 DATA.BATCH_SIZE 6", flags=(*CHECK, "--exact")) == 0
    shown = capsys.readouterr().out
    assert (
        f"{4 * IMAGES} images: 0 wrong seeds" in shown
        and "0 not exactly equal" in shown
        and "PASSED" in shown
    )


def test_the_check_reports_what_is_not_there(four, capsys):
    assert run(four, "TRAIN.EPOCHS 90", flags=CHECK) == 0
    assert "checked epochs 0-3" in capsys.readouterr().out
    assert run(four, "TRAIN.START_EPOCH 4 TRAIN.EPOCHS 6", flags=CHECK) == 2
    assert (
        "of the epochs 4 to 5 none is there (there: 0-3): set TRAIN.START_EPOCH and TRAIN.EPOCHS"
        in capsys.readouterr().err
    )


def test_a_share_of_the_batches(four, capsys):
    assert run(four, "TRAIN.EPOCHS 4", flags=(*CHECK, "--percent 34")) == 0
    counted = int(
        re.search(
            r"checked 34% of the batches of epochs 0-3: (\d+) images", capsys.readouterr().out
        )[1]
    )
    assert 4 * 8 * 2 - 20 <= counted <= 4 * 8 * 2  # of 6 batches 2; the last one is smaller


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("seeds", lambda r: r["seed"].__setitem__(5, r["seed"][5] ^ 1), "1 of 43 seeds are wrong"),
        (
            "classes",
            lambda r: r["index"].__setitem__(7, r["index"][7][::-1]),
            "have the same top-1 class",
        ),
        (
            "values",
            lambda r: r["prob"].__setitem__((3, 0), r["prob"][3, 0] + 0.0063),
            "a probability is off by 0.006",
        ),
        (
            "many values",
            lambda r: r["prob"].__imul__(np.float16(0.97)),
            "the mean KL divergence is",
        ),
        (
            "no number",
            lambda r: r["prob"].__setitem__((3, 4), np.nan),
            "a probability is off by inf",
        ),
        (
            "no class",
            lambda r: r["index"].__setitem__((3, 9), 60000),
            "a probability is off by inf",
        ),
    ],
)
def test_the_check_finds(store, four, capsys, name, change, fault):
    spoil(copied(four, store) / "epoch_0000.npy", change)
    assert run(store, *UNVERIFIED, flags=CHECK) == 1
    shown = capsys.readouterr().out
    assert f"FAILED: {fault}" in shown.replace("only 97.674% ", "") and "PASSED" not in shown
    if name in ("seeds", "classes", "values"):  # the worst image is named
        position = {"seeds": 5, "classes": 7, "values": 3}[name]
        assert f"worst: epoch 0, {LogitsStoreReader(four).keys[position]}: off by" in shown


def test_one_bit_matters_to_exact_alone(store, four, capsys):
    spoil(
        copied(four, store) / "epoch_0000.npy",
        lambda r: r["prob"].view(np.uint16)[:, 2].__iadd__(1),
    )
    assert run(store, *UNVERIFIED, flags=CHECK) == 0
    assert run(store, *UNVERIFIED, flags=(*CHECK, "--exact")) == 1
    assert "FAILED: 43 of 43 records are not exactly equal" in capsys.readouterr().out


def test_all_columns_are_checked_whatever_the_recipe_reads(store, four):
    spoil(
        copied(four, store) / "epoch_0000.npy", lambda r: r["prob"].__setitem__((slice(None), 3), 0)
    )
    assert run(store, "DISTILL.LOGITS_TOPK 2", *UNVERIFIED, flags=CHECK) == 1
    assert run(store, flags=CHECK) == 2


def test_another_teacher_does_not_pass(four, capsys):
    assert run(four, "SEED 1", flags=CHECK) == 1
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "written by another teacher" in line]
    digest = LogitsStoreReader(four).manifest["teacher"]["weights_sha256"]
    theirs, mine = re.search(r"weights_sha256 is (\w+) there and (\w+) here$", line).groups()
    assert digest.startswith(theirs) and not digest.startswith(mine) and len(mine) == 12
    assert "FAILED" in shown
    assert run(four, "MODEL.NUM_CLASSES 12", flags=CHECK) == 2
    assert "MODEL.NUM_CLASSES" in capsys.readouterr().err


@pytest.mark.parametrize(("classes", "k"), [(10, 10), (300, 100)])
def test_a_store_of_the_original_is_checked(tmp_path, capsys, classes, k):
    """Real answers of a teacher in the original's layout pass, and fail once their seeds are
    spoiled.
    """
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert run(ours, "MODEL.NUM_CLASSES", classes, "DISTILL.LOGITS_TOPK", k, "TRAIN.EPOCHS 2") == 0
    reader = LogitsStoreReader(ours)
    epochs = {epoch: np.array(reader.open_epoch(epoch)) for epoch in reader.epochs()}
    write_upstream(
        theirs, epochs, order=np.random.Generator(np.random.PCG64(0)).permutation(IMAGES)
    )
    assert run(theirs, "MODEL.NUM_CLASSES", classes, "TRAIN.EPOCHS 2", flags=CHECK) == 0
    shown = capsys.readouterr().out
    assert (
        f"checked epochs 0-1: {2 * IMAGES - 2} images: 0 wrong" in shown
        and "left out: 2 images" in shown
        and "PASSED" in shown
    )
    for records in epochs.values():
        records["seed"] = np.roll(records["seed"], 1)
    shutil.rmtree(theirs)
    write_upstream(theirs, epochs)
    assert run(theirs, "MODEL.NUM_CLASSES", classes, "TRAIN.EPOCHS 2", flags=CHECK) == 1
    assert "FAILED" in capsys.readouterr().out


def test_one_of_two_stores_of_the_original_in_a_folder(tmp_path, capsys):
    """LOGITS_TOPK tells which; what is neither is a number of columns."""
    for k in (4, 10):
        assert run(tmp_path / f"ours {k}", "DISTILL.LOGITS_TOPK", k) == 0
        write_upstream(
            tmp_path / "theirs",
            {0: np.array(LogitsStoreReader(tmp_path / f"ours {k}").open_epoch(0))},
        )
    for k in (4, 10):
        assert run(tmp_path / "theirs", "DISTILL.LOGITS_TOPK", k, flags=CHECK) == 0
        assert f"store {tmp_path / 'theirs'}: top-{k} of 10 classes" in capsys.readouterr().out
    assert run(tmp_path / "theirs", flags=CHECK) == 2
    assert (
        "holds stores of top-4, top-10: set DISTILL.LOGITS_TOPK to one of them"
        in capsys.readouterr().err
    )
    shutil.rmtree(tmp_path / "theirs" / "logits_top4_epoch0")
    assert run(tmp_path / "theirs", "DISTILL.LOGITS_TOPK 3", flags=CHECK) == 0


def test_the_originals_own_store_is_read(goldens, tmp_path, capsys):
    """The teacher that wrote it is not at hand: another one of as many classes must not pass."""
    opts = (
        "DATA.DATASET imagenet DATA.DATA_PATH",
        goldens / "train" / "data",
        "DATA.IMG_SIZE 64 MODEL.NUM_CLASSES 1000 TRAIN.EPOCHS 2 OUTPUT",
        tmp_path,
    )
    store = copied(goldens / "train" / "store", tmp_path / "store")
    assert run(store, *opts, flags=CHECK) == 1
    shown = capsys.readouterr().out
    assert (
        "checked epochs 0-1: 400 images: 0 wrong seeds" in shown
        and "FAILED: only" in shown
        and "worst: epoch" in shown
    )


# ---- evaluation


def test_the_teacher_is_evaluated_first(store, tmp_path, monkeypatch, capsys):
    """A teacher that knows: it is shown, as the first pixel, the label itself."""

    class Knows(nn.Module):
        num_classes = 10

        def forward(self, images):
            return 9.0 * nn.functional.one_hot(
                (images[:, 0, 0, 0] * 10).round().long().clamp(0, 9), 10
            )

    class Loader:
        def batches(self, epoch):
            labels = torch.arange(20) % 10
            images = torch.zeros(20, 3, 4, 4)
            images[:, 0, 0, 0] = torch.where(torch.arange(20) < 15, labels, (labels + 1) % 10) / 10
            yield images, labels

        def count(self):
            return 1

    monkeypatch.setattr("tests.support.teachers.glance", lambda cfg: Knows())
    monkeypatch.setattr("data.build.RunData.val_loader", lambda self, rank: Loader())
    assert run(store, flags=()) == 0
    shown = capsys.readouterr().out
    assert (
        "teacher: top-1 75.00%, top-5 " in shown
        and "of 20 validation images" in shown
        and "CHANCE" not in shown
    )
    assert shown.index("teacher: top-1") < shown.index("epoch 0: ")


def test_a_teacher_at_chance_is_told(store, capsys):
    # the original's command has --eval in it
    assert run(store, "SEED 3 DATA.SHAPES.VAL_IMAGES 100", flags=("--eval",)) == 0
    assert "THE TEACHER IS NO BETTER THAN CHANCE" in capsys.readouterr().out


def test_a_teacher_of_other_classes_is_not_evaluated(store, capsys):
    assert run(store, "MODEL.NUM_CLASSES 12", flags=()) == 0
    shown = capsys.readouterr().out
    why = "the data has 10 classes and the model 12"
    assert f"not evaluated: {why}" in shown
    assert LogitsStoreReader(store).seal(0)["teacher"] == {}
    assert run(store.with_name("unevaluated"), "MODEL.NUM_CLASSES 12") == 0
    assert f"not evaluated (--skip-eval); {why}" in capsys.readouterr().out


def test_without_validation_images_or_by_request_nothing_is_evaluated(store, tmp_path, capsys):
    images = tmp_path / "images"
    write_images(images / "train", 9)
    opts = ("DATA.DATASET imagenet DATA.DATA_PATH", images, "DATA.BATCH_SIZE 4")
    assert run(store, *opts, flags=()) == 0
    assert "the teacher is not evaluated, there are no validation images" in capsys.readouterr().out
    assert run(tmp_path / "other", *opts) == 0
    assert "the teacher is not evaluated (--skip-eval)" in capsys.readouterr().out


def write_images(folder: Path, count: int) -> None:
    for i in range(count):
        (folder / f"c{i % 10}").mkdir(parents=True, exist_ok=True)
        shapes.draw("train", i % 10, i, 40).save(folder / f"c{i % 10}" / f"{i:03d}.png")


# ---- teachers


def test_a_part_of_the_classes(store, tmp_path, four, capsys):
    """Outputs are cut and renormalised; labels find their place in the smaller numbering."""
    (tmp_path / "classes").write_text("7\n2\n5\n")
    opts = (
        "DISTILL.CLASS_SUBSET",
        tmp_path / "classes",
        "DATA.DATASET folder DATA.DATA_PATH",
        tmp_path / "images",
    )
    write_images(tmp_path / "images", 12)
    assert run(store, *opts) == 0
    assert (
        run(
            tmp_path / "whole",
            "DATA.DATASET folder DATA.DATA_PATH",
            tmp_path / "images",
            "MODEL.NUM_CLASSES 10",
        )
        == 0
    )
    part, whole = (
        LogitsStoreReader(folder).open_epoch(0) for folder in (store, tmp_path / "whole")
    )
    assert LogitsStoreReader(store).num_classes == 3 and LogitsStoreReader(store).manifest["info"][
        "classes"
    ] == [7, 2, 5]
    dense = np.zeros((12, 10))
    np.put_along_axis(dense, whole["index"].astype(int), whole["prob"].astype(float), axis=1)
    expected = dense[:, [7, 2, 5]] / dense[:, [7, 2, 5]].sum(1, keepdims=True)
    assert np.allclose(
        np.take_along_axis(expected, part["index"].astype(int), axis=1), part["prob"], atol=2e-3
    )
    assert run(store, *opts, flags=CHECK) == 0
    assert run(store, *opts[2:], flags=CHECK) == 2
    shown = capsys.readouterr().err
    assert (
        "the store is of 3 classes, this teacher of 10: give the one that wrote it, with the same"
        " DISTILL.CLASS_SUBSET" in shown
    )
    (tmp_path / "classes").write_text("2\n7\n5\n")
    assert run(store, *opts, "TRAIN.EPOCHS 2") == 2
    assert "teacher.classes_sha256 is" in capsys.readouterr().err


def test_a_part_of_the_classes_by_names_numbers_the_data_too(tmp_path, capsys):
    """The file of DISTILL.CLASS_SUBSET is what DATA.CLASS_LIST must be, as the refusal says."""
    names = [imagenet_wnids(1000)[number] for number in (700, 5, 999)]
    (tmp_path / "classes").write_text("\n".join(names) + "\n")
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                picture = shapes.draw("train", number, i, 40)
                picture.save(tmp_path / "images" / split / name / f"{split}{i}.png")
    data = ["DATA.DATASET imagenet DATA.DATA_PATH", tmp_path / "images"]
    cut = ["MODEL.NUM_CLASSES 1000 DISTILL.CLASS_SUBSET", tmp_path / "classes"]
    store = tmp_path / "store"
    assert run(store, *data, *cut, "DATA.CLASS_LIST imagenet1k") == 2
    shown = capsys.readouterr().err
    assert "3 classes are fewer than the 1000 of the data" in shown
    assert "give a file of these 3 names alone, as that of DISTILL.CLASS_SUBSET is" in shown
    listed = ["DATA.CLASS_LIST", tmp_path / "classes"]
    assert run(store, *data, *cut, *listed, "DATA.BATCH_SIZE 4", flags=()) == 0
    assert "of 12 validation images" in capsys.readouterr().out
    student = ["DISTILL.TEACHER_LOGITS_PATH", store, "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"]
    assert training.run(tmp_path, *data, *listed, *student, "DATA.BATCH_SIZE 4") == 0
    assert "val_top1" in training.metrics(tmp_path)[-1]


def test_bfloat16_is_declined_aloud(store, capsys):
    assert run(store, "AMP_DTYPE bf16") == 0
    assert (
        "AMP_DTYPE bf16 is too coarse for stored probabilities: the teacher runs in float32"
        in capsys.readouterr().out
    )
    assert LogitsStoreReader(store).manifest["teacher"]["dtype"] == "float32"


def test_a_compiled_teacher_is_another(store, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert run(store, "TRAIN.COMPILE True") == 0
    assert LogitsStoreReader(store).manifest["teacher"]["compiled"] is True
    assert run(store, "TRAIN.COMPILE True", flags=CHECK) == 0
    assert run(store, "TRAIN.EPOCHS 2") == 2
    assert "teacher.compiled is true there and nothing here" in capsys.readouterr().err


def test_a_teacher_that_cannot_be_compiled_is_saved_as_it_is(store, four, monkeypatch, capsys):
    def compiler(graph, inputs):
        if len(inputs) > 1:  # which the trial has not
            raise RuntimeError("no kernel")
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    assert run(store, "TRAIN.COMPILE True") == 0
    shown = capsys.readouterr().out
    assert shown.count("no kernel") == 1 and "the model runs uncompiled" in shown
    assert sealed_bytes(store)["epoch_0000.npy"] == sealed_bytes(four)["epoch_0000.npy"]
    plain, mine = (LogitsStoreReader(root).manifest["teacher"] for root in (four, store))
    assert mine == plain and set(plain) == {"name", "weights_sha256", "dtype"}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_last_batch_is_filled_up_for_a_compiled_teacher_alone(
    is_compiled, store, four, monkeypatch
):
    """43 images and the partner of the last, in batches of 8."""
    missing, outputs_of = [], save_logits.utils.outputs_of

    def noted(model, images, rows):
        return outputs_of(model, images, missing.append(rows - len(images)) or rows)

    monkeypatch.setattr(save_logits.utils, "outputs_of", noted)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    assert run(store, f"TRAIN.COMPILE {is_compiled}") == 0
    assert missing == [0] * 5 + [4]
    assert len(graphs) == 2 * is_compiled  # the compiler's trial, and the one size of batches
    assert sealed_bytes(store)["epoch_0000.npy"] == sealed_bytes(four)["epoch_0000.npy"]


class Pairs(Glance):
    """Answers with more than its classes."""

    def forward(self, images):
        return super().forward(images), images


def pairs(cfg) -> nn.Module:
    return Pairs(10)


def test_a_teacher_that_answers_with_a_tuple_is_refused(store, capsys):
    assert run(store, "MODEL.TYPE", f"{__name__}:pairs") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "answered 8 images with ['tuple']" in error
    assert LogitsStoreReader(store).epochs() == []


def test_a_tally_counts():
    tally = Tally()
    tally.add(
        np.array([1, 5, -1, 9]),
        np.array([[1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 9]]),
        np.array([[0.5, 0.25], [0.5, 0.5], [0.25, 0.25], [0.5, 0.25]], np.float32),
    )
    assert tally == Tally(4, 3, 1, 2, 3.0, 0.5) and tally.accuracy() == {
        "images": 3,
        "top1": 100 / 3,
        "top5": 200 / 3,
    }
    assert Tally(7).accuracy() == {}
    text = "4 images, top1 33.33%, top5 66.67%, stored mass 75.0%, of one image 50.0%"
    assert str(tally) == text
    tally.enough = 4
    assert str(tally).endswith(" 50.0% (DISTILL.LOGITS_TOPK 4 would keep 90%)")
    tally.mass = 3.8
    assert str(tally).endswith(", stored mass 95.0%, of one image 50.0%")


def test_the_k_that_would_hold_enough(four, store, capsys):
    """Told where the stored mass is low; the mass is that of the sealed records."""
    assert run(store, "DISTILL.LOGITS_TOPK 2") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "epoch 0: " in line)
    found = re.search(r"mass (\S+)%, of one image (\S+)% \(DISTILL.LOGITS_TOPK (\d) would", line)
    mass, whole = (
        LogitsStoreReader(root).open_epoch(0)["prob"].astype(float) for root in (store, four)
    )
    assert float(found[1]) == pytest.approx(100 * mass.sum(1).mean(), abs=0.1)
    assert float(found[2]) == pytest.approx(100 * mass.sum(1).min(), abs=0.1)
    k = int(found[3])  # of the first images, so nearly that of all
    held = whole.cumsum(1).mean(0)
    assert held[k - 1] > 0.88 and held[k - 3] < 0.92 and k > 2
    logits = np.log([[0.1, 0.6, 0.3], [1e-9, 1e-9, 1.0]]) + [[700.0], [-900.0]]
    assert save_logits.classes_for(logits) == 2
    assert save_logits.classes_for(np.zeros((2, 8))) == 8


# ---- refusals


@pytest.mark.parametrize(
    ("opts", "flags"),
    [
        ("SEED 1", ()),
        ("DATA.DATASET imagenet DATA.DATA_PATH nowhere", ()),
        ("TRAIN.START_EPOCH 8 TRAIN.EPOCHS 9", CHECK),
    ],
)
def test_what_is_refused_leaves_no_folder(four, tmp_path, opts, flags):
    assert run(four, "OUTPUT", tmp_path / "output", opts, flags=flags) == 2
    assert not any((tmp_path / "output").glob("*"))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("SEED 1", "is another store: teacher.weights_sha256 is"),
        (
            "AUG.REPROB 0.5",
            "is another store: identity.recipe.AUG.REPROB is 0.25 there and 0.5 here",
        ),
        ("DATA.SEED 5", "identity.base_seed is 0 there and 5 here"),
        ("DISTILL.LOGITS_TOPK 4", "identity.k is 10 there and 4 here"),
        ("MODEL.NUM_CLASSES 12", "identity.num_classes is 10 there and 12 here"),
        ("DATA.IMG_SIZE 48", "identity.image_size is 40 there and 48 here"),
        ("AUG.MIXUP 0.0 AUG.CUTMIX 0.0", "identity.paired is true there and false here"),
        ("DATA.SHAPES.TRAIN_IMAGES 41", "was begun with other images: 2 removed: "),
        ("DATA.HELD_OUT 0.2", "or use another folder; it was saved with DATA.HELD_OUT 0.0"),
    ],
)
def test_a_store_of_other_settings_is_not_continued(four, capsys, opts, message):
    assert run(four, "TRAIN.EPOCHS 5", opts) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and message in shown
    assert (
        "use the same settings and teacher, or another folder" in shown
        or "restore the data set, or use another folder" in shown
    )


@pytest.mark.parametrize(
    ("opts", "flags", "message"),
    [
        (
            "DISTILL.TEACHER_LOGITS_PATH ''",
            (),
            "DISTILL.TEACHER_LOGITS_PATH: name the store's folder",
        ),
        (
            "DISTILL.TEACHER_LOGITS_PATH ''",
            CHECK,
            "DISTILL.TEACHER_LOGITS_PATH: name the store's folder",
        ),
        (
            "MODEL.TYPE tiny_vit",
            (),
            "MODEL.RESUME: name the weights of the teacher tiny_vit (--resume or --pretrained)",
        ),
        (
            "MODEL.TYPE tests.support.teachers:glanse",
            (),
            "has no function glanse; did you mean glance?",
        ),
        ("DATA.BATCH_SIZE 7", (), "images are mixed in pairs, the batch must be even (e.g. 8)"),
        ("DISTILL.LOGITS_TOPKK 7", (), "did you mean DISTILL.LOGITS_TOPK?"),
        ("MODEL.NUM_CLASSES 7", (), "7 classes are fewer than the 10 of the data"),
        ("", CHECK, "no store there (neither manifest.json nor logits_top*_epoch*/)"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(store, capsys, opts, flags, message):
    assert run(store, opts, flags=flags) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and message in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--throughput", "--throughput belongs to main.py"),
        ("--exact", "--exact and --percent go with --check-saved-logits"),
        ("--percent 3", "--exact and --percent go with --check-saved-logits"),
        ("--check-saved-logits --percent 0", "--percent 0: expected more than 0 and at most 100"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(words(flags))
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_disk_must_be_large_enough(store, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 1000))
    assert run(store, "TRAIN.EPOCHS 3") == 2
    assert "writing 3 epochs of 43 images with top-10 needs" in capsys.readouterr().err


def test_a_teacher_that_answers_nonsense_stops_the_run(store, monkeypatch, capsys):
    monkeypatch.setattr(
        Glance, "forward", lambda self, images: torch.full((len(images), 10), torch.nan)
    )
    assert run(store) == 2
    assert "probabilities that do not descend from 1 to 0" in capsys.readouterr().err
    assert not sealed_bytes(store)


def test_a_bug_is_no_fault_of_the_user(store, monkeypatch):
    monkeypatch.setattr(Glance, "forward", lambda self, images: images.nonsense)
    with pytest.raises(AttributeError, match="nonsense"):
        run(store)
