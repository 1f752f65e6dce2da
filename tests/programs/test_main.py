"""main.py: what its flags do, what it measures and says, and how each fault ends."""

import contextlib
import csv
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import main
import save_logits
import utils
from configs import dump, load_config
from configs.continuation import FREE, check_continuation
from data.images import build_dataset, shapes
from data.images.listing import read_names
from models.class_map import imagenet_wnids, map_22k_to_1k
from models.teacher import Teacher
from tests.support import saving
from tests.support.images import config, write_files
from tests.support.jobs import words
from tests.support.mounts import alone, mount_small, needs_mounts
from tests.support.training import (
    TINY_MODEL,
    checkpoint,
    folder,
    job,
    metrics,
    run,
    same_bits,
    state,
    updates,
)

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
SHORT = "DATA.SHAPES.TRAIN_IMAGES 24 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"  # 3 updates


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The output of a run of 2 epochs with averaged weights and labels; nobody changes it."""
    output = tmp_path_factory.mktemp("trained")
    assert (
        run(output, "TRAIN.EMA_DECAY 0.9", flags=["--save-model", output / "weights.safetensors"])
        == 0
    )
    return output


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """That output for a test that goes on with it."""
    return Path(shutil.copytree(trained, tmp_path, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store of two epochs of 24 images."""
    root = tmp_path_factory.mktemp("store") / "store"
    assert saving.run(root, SHORT, "TRAIN.EPOCHS 2") == 0
    return root


def log_of(output: Path, tag: str = "default") -> str:
    return (folder(output, tag) / "log_rank0.txt").read_text()


def fault(capsys, *args, **how) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    assert run(*args, **how) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- the start


def test_a_start_is_four_lines_and_the_rest_is_in_the_file(trained, tmp_path, capsys):
    weights = trained / "weights.safetensors"
    assert run(tmp_path, SHORT, "TRAIN.BASE_LR 1", flags=["--pretrained", weights]) == 0
    lines = [line[9:] for line in capsys.readouterr().out.splitlines()]
    assert [line.partition(" ")[0] for line in lines[:5]] == [
        "run", "data:", "model", "training:", "epoch"
    ]  # fmt: skip
    assert max(map(len, lines[:5])) < 250
    assert f"; weights of {weights}: " in lines[2] and "tensors loaded" in lines[2]
    assert "each image: " in log_of(tmp_path) and "the model runs uncompiled" in log_of(tmp_path)


def test_rates_that_move_nothing_are_told(tmp_path, capsys):
    assert run(tmp_path, SHORT, "TRAIN.BASE_LR 0.01 TRAIN.MIN_LR 0.0 TRAIN.WARMUP_LR 0.0") == 0
    out = capsys.readouterr().out
    assert "rates up to 0.000156 (TRAIN.BASE_LR 0.01 x 8 / 512)" in out
    (line,) = (line for line in out.splitlines() if "LITTLE MAY BE LEARNT" in line)
    total = float(line.partition("which is ")[2].partition(":")[0])
    moved = sum(entry["lr"] for entry in updates(tmp_path))
    assert total == pytest.approx(moved, rel=0.5) and "raise TRAIN.BASE_LR 0.01" in line
    assert run(tmp_path, SHORT, "TRAIN.OPTIMIZER.NAME sgd TAG sgd TRAIN.BASE_LR 0.01") == 0
    assert "LITTLE" not in capsys.readouterr().out


def test_weights_that_are_given_may_move_little(trained, tmp_path, capsys):
    given = ["--pretrained", trained / "weights.safetensors"]
    small = f"{SHORT} TRAIN.BASE_LR 0.01 TRAIN.MIN_LR 0.0 TRAIN.WARMUP_LR 0.0"
    for tag, opts, flags, warns in (
        ("whole", "", given, False),
        ("head", "MODEL.NUM_CLASSES 11", given, True),
        ("head", "MODEL.NUM_CLASSES 11", given, False),  # finished
    ):
        assert run(tmp_path, small, opts, flags=[*flags, "--tag", tag]) == 0
        assert ("LITTLE MAY BE LEARNT" in capsys.readouterr().out) is warns, (tag, opts)


def test_a_batch_that_is_made_smaller_is_told(tmp_path, capsys):
    assert run(tmp_path, SHORT, "TRAIN.GLOBAL_BATCH 8", flags=["--batch-size", 12]) == 0
    text = "1 batch of 8, as TRAIN.GLOBAL_BATCH wins over DATA.BATCH_SIZE 12); rates"
    assert text in capsys.readouterr().out
    assert run(tmp_path, SHORT, "TRAIN.GLOBAL_BATCH 8 TAG same") == 0
    assert "wins over" not in capsys.readouterr().out


def test_classes_without_validation_images_are_named(tmp_path, capsys):
    assert run(tmp_path, SHORT, "DATA.SHAPES.VAL_IMAGES 4") == 0
    out = capsys.readouterr().out
    assert "data: 24 images of 10 classes, 4 of 4 to validate; no teacher" in out
    unseen = sorted(shapes.CLASS_NAMES[4:])
    assert f"classes without validation images: {', '.join(unseen[:5])} and 1 more\n" in out
    assert run(tmp_path, SHORT, "TAG all") == 0
    assert "without validation images" not in capsys.readouterr().out


@pytest.mark.parametrize("opts", ["", "TRAIN.KEEP_CHECKPOINTS 1 TRAIN.EMA_DECAY 0.9"])
def test_checkpoints_take_what_the_start_says(opts, tmp_path, capsys):
    assert run(tmp_path, SHORT, "TRAIN.EPOCHS 4", opts) == 0
    found = {path.stat().st_ino: path for path in checkpoint(tmp_path).parent.iterdir()}
    size = sum(path.stat().st_size for path in found.values())
    text = re.search(r"checkpoints of about ([\d.]+) (kB|MB) at most", capsys.readouterr().out)
    most = float(text[1]) * {"kB": 1e3, "MB": 1e6}[text[2]]
    names = {path.name for path in checkpoint(tmp_path).parent.iterdir()}
    if opts:
        assert names == {"last.pth", "best.pth", "epoch_0004.pth"}
    else:
        assert len(names) == 6
    # a tiny model's tensors are hardly more than their names and the configuration
    assert size - 120_000 * len(found) < most < 4 * size


@pytest.mark.parametrize(
    "opts",
    [
        "MODEL.PRETRAINED nowhere.pth",
        "MODEL.RESUME nowhere.pth",
        "DATA.DATASET imagenet DATA.DATA_PATH nowhere",
        "DISTILL.TEACHER_LOGITS_PATH nowhere",
        "DATA.BATCH_SIZE 64",
        "TRAIN.LAYER_LR_DECAY 0.5 MODEL.TYPE timm MODEL.NAME resnet18",
    ],
)
def test_what_is_refused_leaves_no_folder(opts, tmp_path, capsys):
    fault(capsys, tmp_path, opts)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_takes_nothing_away_that_was_there(trained, copy, capsys):
    before = log_of(copy)
    fault(capsys, copy, "TRAIN.EMA_DECAY 0.5")
    assert log_of(copy).startswith(before) and "ERROR" in log_of(copy)
    other = folder(copy, "other")
    other.mkdir()
    (other / "notes.txt").touch()
    fault(capsys, copy, "TAG other MODEL.PRETRAINED nowhere.pth")
    assert {path.name for path in other.iterdir()} == {"notes.txt", "log_rank0.txt"}


# ---- training


def test_a_run_leaves_its_configuration_log_metrics_and_checkpoints(trained):
    assert sorted(path.name for path in folder(trained).iterdir()) == [
        "checkpoints",
        "config.yaml",
        "log_rank0.txt",
        "metrics.jsonl",
    ]
    assert sorted(path.name for path in (folder(trained) / "checkpoints").iterdir()) == [
        "best.pth",
        "epoch_0001.pth",
        "epoch_0002.pth",
        "last.pth",
    ]
    cfg = load_config(["--cfg", str(folder(trained) / "config.yaml")])
    assert cfg.MODEL.NUM_CLASSES == 10 and cfg.AUG.FILL == [124, 116, 104]
    lines = metrics(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert (
        lines[1].keys() == {"step", "epoch", "norm", "loss", "top1", "lr", "lr_min", "skipped"}
        and lines[1]["epoch"] == 0.4
    )
    epoch = lines[5]
    assert epoch.keys() == {
        "step",
        "epoch",
        "train_norm",
        "train_loss",
        "train_top1",
        "val_loss",
        "val_top1",
        "val_top5",
        "average_loss",
        "average_top1",
        "average_top5",
        "best_top1",
    }
    assert epoch["train_loss"] == pytest.approx(
        np.mean([line["loss"] for line in lines[:5]]), rel=1e-12
    )
    for text in (
        "resolved configuration:",
        "code ",
        "14,074 parameters (14,074 train), 0.000 G multiply-adds at 40 px, 10 classes,"
        " uncompiled; random weights",
        "each image: 40 px: RandomResizedCrop(",
        "data: 43 images of 10 classes, 20 of 10 to validate; no teacher, labels alone; loader ",
        "training: 10 updates (2 epochs of 5) of 8 images (1 rank x 1 batch of 8); rates up to",
        " (TRAIN.BASE_LR 0.1 x 8 / 512), 0.005 in all; checkpoints of about ",
        "epoch 1/2, update 2/5: norm ",
        " images/s, data wait ",
        " GB, ",
        " left",
        "epoch 2, averaged weights: 20 validation images: top-1 ",
        "finished: 2 epochs, 10 updates, best top-1 ",
    ):
        assert text in log_of(trained), text


def test_checkpoints_hold_plain_values_and_the_weights_alone_are_the_averaged_ones(trained):
    last = state(trained)
    assert last["step"] == 10 and last["progress"]["epoch"] == 2 and last["progress"]["step"] == 0
    weights = safetensors.torch.load_file(trained / "weights.safetensors")
    assert same_bits(weights, dict(last["model_ema"])) and not same_bits(
        weights, dict(last["model"])
    )


def test_a_finished_run_says_so_and_ends_well(copy, capsys):
    before = (folder(copy) / "metrics.jsonl").read_bytes()
    assert run(copy, "TRAIN.EMA_DECAY 0.9") == 0
    out = capsys.readouterr().out
    assert "last.pth: 10 updates are done, all there are\n" in out
    assert (
        "nothing is left to train: raise TRAIN.EPOCHS to go on, or begin another run with --tag"
        in out
    )
    assert (folder(copy) / "metrics.jsonl").read_bytes() == before


def test_more_epochs_are_allowed_and_said_loudly(copy):
    assert run(copy, "TRAIN.EMA_DECAY 0.9 TRAIN.EPOCHS 3 PRINT_FREQ 5 DATA.NUM_WORKERS 1") == 0
    assert (
        "WARNING CHANGED SINCE THE CHECKPOINT: TRAIN.EPOCHS 2 -> 3; learning rates follow it"
        in log_of(copy)
    )
    assert [line["step"] for line in metrics(copy)][-2:] == [15, 15] and state(copy)["progress"][
        "epoch"
    ] == 3


def test_another_configuration_under_the_same_tag_is_refused_with_the_difference(copy, capsys):
    line = fault(capsys, copy, "TRAIN.EMA_DECAY 0.9 TRAIN.BASE_LR 0.2 AUG.REPROB 0.0")
    assert (
        "last.pth was written under another configuration (TRAIN.BASE_LR 0.1 -> 0.2; AUG.REPROB"
        " 0.25 -> 0.0): start anew" in line
    )
    assert "--tag <new name>" in line
    line = fault(capsys, copy, "TRAIN.EMA_DECAY 0.9", flags=["--batch-size 4"])
    assert (
        "DATA.BATCH_SIZE 8 -> 4" in line
        and "with TRAIN.GLOBAL_BATCH 8 any number of processes may go on" in line
    )
    assert run(copy, SHORT, "TRAIN.BASE_LR 0.2", flags=["--tag new"]) == 0


def continued(before: str, opts: str, world: int = 1) -> list[str]:
    """What has changed since a configuration of 30 epochs."""
    cfg = load_config(words("--opts TRAIN.EPOCHS 30 DATA.BATCH_SIZE 16", opts), world)
    return [str(change) for change in check_continuation(before, cfg, "c")]


@pytest.fixture(scope="module")
def thirty() -> str:
    return dump(load_config(words("--opts DATA.BATCH_SIZE 16 TRAIN.EPOCHS 30")))


def test_which_changes_a_continuation_allows(thirty):
    assert continued(thirty, "DATA.DATA_PATH x PRINT_FREQ 3") == []
    opts = "DATA.BATCH_SIZE 4 TRAIN.EPOCHS 40 TRAIN.GLOBAL_BATCH 16"
    changes = ["WORLD_SIZE 1 -> 2", "DATA.BATCH_SIZE 16 -> 4", "TRAIN.EPOCHS 30 -> 40"]
    assert continued(thirty, opts, world=2) == changes
    names = {key.rpartition(".")[2] for key in FREE}  # what is allowed to change exists
    assert all(re.search(rf"^ *{name}:", thirty, re.MULTILINE) for name in names)


@pytest.mark.parametrize(
    ("opts", "world", "text"),
    [
        ("DATA.BATCH_SIZE 8 TRAIN.GLOBAL_BATCH 32", 2, "images per update 16 -> 32"),
        ("", 2, "WORLD_SIZE 1 -> 2"),
        ("TRAIN.ACCUMULATION_STEPS 2", 1, "TRAIN.ACCUMULATION_STEPS 1 -> 2"),
        ("SEED 1", 1, "SEED 0 -> 1"),
    ],
)
def test_which_it_refuses(opts, world, text, thirty):
    with pytest.raises(ValueError, match=text):
        continued(thirty, opts, world)


def test_a_continuation_of_other_data_or_another_teacher_is_refused(store, tmp_path, capsys):
    images = draw_train(tmp_path / "images")
    shutil.copytree(images / "train", images / "val")
    opts = "DATA.DATASET imagenet TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
    assert run(tmp_path, opts, flags=["--data-path", images]) == 0
    next((images / "train" / "a").glob("*")).unlink()
    line = fault(capsys, tmp_path, opts, "TRAIN.EPOCHS 2", flags=["--data-path", images])
    assert (
        "last.pth comes from other data than this run would see (images 24 -> 23; keys_sha256"
        in line
        and "--tag <new name>" in line
    )
    # which chooses the teacher's weights
    assert saving.run(tmp_path / "other", SHORT, "TRAIN.EPOCHS 2 SEED 7") == 0
    assert run(tmp_path, SHORT, "DISTILL.TEACHER_LOGITS_PATH", store, flags=["--tag student"]) == 0
    line = fault(
        capsys,
        tmp_path,
        SHORT,
        "TRAIN.EPOCHS 2 DISTILL.TEACHER_LOGITS_PATH",
        tmp_path / "other",
        flags=["--tag student"],
    )
    assert "comes from other data than this run would see (teacher.weights_sha256 '" in line


def test_where_nothing_can_be_read_nothing_is_overwritten(copy, capsys, monkeypatch):
    checkpoints = folder(copy) / "checkpoints"
    lines = (folder(copy) / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            zipfile,
            "ZipFile",
            lambda path: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")),
        )
        assert "this checkpoint can't be read now ([Errno 116] Stale file handle)" in fault(
            capsys, copy, "TRAIN.EMA_DECAY 0.9"
        )
    for path in checkpoints.iterdir():
        path.write_bytes(b"")
    line = fault(capsys, copy, "TRAIN.EMA_DECAY 0.9")
    assert (
        f"{checkpoints}: none of the checkpoints there can be used" in line
        and "TRAIN.AUTO_RESUME False" in line
    )
    assert (folder(copy) / "metrics.jsonl").read_bytes() == lines


def test_a_run_goes_back_to_one_of_its_own_checkpoints(trained, copy):
    saved = checkpoint(copy, "epoch_0001.pth")
    assert run(copy, "TRAIN.EMA_DECAY 0.9 TRAIN.AUTO_RESUME False", flags=["--resume", saved]) == 0
    assert f"continuing from {saved}: 5 updates are done" in log_of(copy)
    assert len(list(folder(copy).glob("checkpoints_before_1/*.pth"))) == 4
    assert same_bits(state(copy)["model"], state(trained)["model"])


def test_weights_alone_or_another_model_are_no_state_to_go_on_from(trained, tmp_path, capsys):
    line = fault(capsys, tmp_path, flags=["--resume", trained / "weights.safetensors"])
    assert "so no training goes on from it: take its weights with --pretrained" in line
    changed = state(trained) | {"model": {"other.weight": torch.zeros(1)}}
    torch.save(changed, tmp_path / "changed.pth")
    line = fault(
        capsys, tmp_path, "TRAIN.EMA_DECAY 0.9", flags=["--resume", tmp_path / "changed.pth"]
    )
    assert "the checkpoint is of another TinyViT (Missing key(s) in state_dict: " in line


def test_where_a_run_begins(trained, tmp_path):
    weights = trained / "weights.safetensors"
    saved = checkpoint(trained, "epoch_0001.pth")
    opts = "TRAIN.EMA_DECAY 0.9"
    # the checkpoint wins
    assert run(tmp_path, opts, flags=["--resume", saved, "--pretrained", weights]) == 0
    assert f"continuing from {saved}: 5 updates are done" in log_of(
        tmp_path
    ) and f"not loaded: {weights}" in log_of(tmp_path)
    assert same_bits(state(tmp_path)["model"], state(trained)["model"])  # and goes on exactly
    assert [line["step"] for line in metrics(tmp_path)] == [6, 7, 8, 9, 10, 10]
    # the folder's own wins
    assert run(tmp_path, opts, "TRAIN.EPOCHS 3", flags=["--resume", saved]) == 0
    assert "last.pth: 10 updates are done, the next is in epoch 3\n" in log_of(
        tmp_path
    ) and f"not loaded: {saved}" in log_of(tmp_path)
    still = "TRAIN.BASE_LR 0.0 TRAIN.WARMUP_LR 0.0 TRAIN.MIN_LR 0.0"
    assert run(tmp_path, SHORT, still, flags=["--pretrained", weights, "--tag tuned"]) == 0
    tuned, start = state(tmp_path, tag="tuned")["model"], safetensors.torch.load_file(weights)
    assert all(
        torch.equal(tuned[name], value)
        for name, value in start.items()
        if "running" not in name and "num_batches" not in name
    )


def test_without_auto_resume_earlier_checkpoints_move_aside(tmp_path):
    for number in (1, 2, 3):
        assert run(tmp_path, SHORT, "TRAIN.AUTO_RESUME False") == 0
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 3]
        assert len(list(folder(tmp_path).glob("checkpoints_before_*/last.pth"))) == number - 1
    kept = folder(tmp_path) / "checkpoints_before_2"
    assert len((kept / "metrics.jsonl").read_text().splitlines()) == 4
    assert (kept / "config.yaml").is_file()


def test_what_is_loaded_is_not_called_left_out(copy):
    own = checkpoint(copy)
    assert run(copy, "TRAIN.EMA_DECAY 0.9", flags=["--resume", own]) == 0
    assert f"continuing from {own}" in log_of(copy) and "not loaded" not in log_of(copy)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(trained, copy, capsys):
    for name, content in (
        ("last.pth", b""),
        ("epoch_0002.pth", b"PK\x03\x04 no"),
        ("best.pth", None),
    ):
        path = checkpoint(copy, name)
        path.unlink() if content is None else path.write_bytes(content)
    assert run(copy, "TRAIN.EMA_DECAY 0.9") == 0
    assert len(re.findall("WARNING skipped: .*checkpoint, or a damaged one", log_of(copy))) == 2
    assert "epoch_0001.pth: 5 updates are done" in log_of(copy)
    assert (folder(copy) / "metrics.jsonl").read_bytes() == (
        folder(trained) / "metrics.jsonl"
    ).read_bytes()
    (copy / "damaged.pth").write_bytes(b"no")
    line = fault(capsys, copy, flags=["--tag x --resume", copy / "damaged.pth"])
    assert f"{copy / 'damaged.pth'}: refused: it is no checkpoint, or a damaged one" in line
    torch.save({"model": {}}, copy / "weights.pth")
    line = fault(capsys, copy, flags=["--tag x --resume", copy / "weights.pth"])
    assert (
        "holds no config and no measured and no metric_lines and no model_ema and no optimizer"
        " and no"
        in line
        and "--pretrained" in line
    )


# so many lines that log and metrics need room as well
FULL = [SHORT, "TRAIN.EPOCHS 12 SAVE_FREQ 100"]


def on_a_full_disk(disk: str) -> dict:
    """In a process of its own: a training whose disk fills up after the first epoch, and its
    continuation when there is room again.
    """
    try:
        mount_small(Path(disk), 3000)
    except OSError as error:
        return {"skip": str(error)}
    output, filler, step = Path(disk) / "out", Path(disk) / "filler", main.train_step

    def filling(run, batches):
        if run.progress.update == 4:
            run.saver.wait()
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return step(run, batches)

    main.train_step = filling
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(io.StringIO()) as faults,
    ):
        code = run(output, *FULL)
    filler.unlink()
    left = {path.name for path in (folder(output) / "checkpoints").iterdir()}
    result = {
        "code": code,
        "said": said.getvalue(),
        "faults": faults.getvalue(),
        "left": left,
        "step": state(output)["step"],
    }
    main.train_step = step
    again = run(output, *FULL)
    return {
        **result,
        "again": again,
        "steps": [line["step"] for line in metrics(output)],
        "model": state(output)["model"],
    }


@needs_mounts
def test_a_full_disk_does_not_end_a_training(tmp_path):
    (tmp_path / "disk").mkdir()
    result = alone(on_a_full_disk, str(tmp_path / "disk"))
    assert result["code"] == 2  # the end of it could not be saved
    warning, error = result["faults"].splitlines()
    assert re.fullmatch(
        r"warning: .*log_rank0.txt can't be written \(.*No space left on device\) and lacks lines"
        r" from now on",
        warning,
    )
    assert re.fullmatch(
        r"error: all epochs are done, but their result is not saved in .*checkpoints: make room"
        r" and .*",
        error,
    )
    assert (
        len(
            re.findall(
                "NO CHECKPOINT WRITTEN: .*No space left on device.*Training goes on", result["said"]
            )
        )
        >= 2
    )
    assert (
        "could not be written" in result["said"]
        and "epoch 12: 20 validation images" in result["said"]
    )
    assert result["step"] == 3 and result["left"] == {"best.pth", "last.pth"}
    assert run(tmp_path, *FULL) == 0
    assert result["again"] == 0 and result["steps"] == [line["step"] for line in metrics(tmp_path)]
    assert same_bits(result["model"], state(tmp_path)["model"])


def test_a_disk_that_was_full_for_a_while_costs_no_best_checkpoint(tmp_path, monkeypatch):
    """The best epoch is the first, whose checkpoint could not be written: the best of those that
    can be is kept, and of two as good ones the later.
    """
    scores, write, written = iter([49.0, 48.0, 48.0]), main.checkpoints.save_atomic, []
    monkeypatch.setattr(
        main,
        "open_validation",
        lambda *args: lambda model: {"count": 20, "loss": 1.0, "top1": next(scores), "top5": 90.0},
    )

    def full_at_first(state, path):
        written.append(path)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, path)

    monkeypatch.setattr(main.checkpoints, "save_atomic", full_at_first)
    assert run(tmp_path, SHORT, "TRAIN.EPOCHS 3 SAVE_FREQ 100") == 0
    assert (
        state(tmp_path, "best.pth")["progress"]["best"] == 48.0
        and state(tmp_path, "best.pth")["step"] == 9
    )


def test_checkpoints_of_one_moment_are_one_file(tmp_path):
    assert run(tmp_path, SHORT) == 0
    files = list((folder(tmp_path) / "checkpoints").glob("*.pth"))
    assert len(files) == 3 and len({path.stat().st_ino for path in files}) == 1


def test_another_process_keeps_off_a_run_in_use(tmp_path, capsys):
    with job(
        tmp_path,
        SHORT,
        prepare=(
            "import time\nstep = main.train_step\nmain.train_step = lambda *args: (print('begun',"
            " flush=True), time.sleep(60), step(*args))[-1]"
        ),
    ) as started:
        while "begun" not in started.text():
            time.sleep(0.05)
            assert started.ranks[0].exitcode is None, started.text()
        line = fault(capsys, tmp_path, SHORT)
        assert f"{folder(tmp_path)}/lock: in use by process" in line and "--tag" in line
    assert run(tmp_path, SHORT) == 0  # when that process is dead


def test_a_stop_that_cannot_be_saved_is_a_fault(tmp_path, monkeypatch):
    step = main.train_step

    def asked(run, batches):
        run.stop.received = "SIGTERM"
        return step(run, batches)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(main, "train_step", asked)
    assert run(tmp_path, SHORT) == 75 and state(tmp_path)["step"] == 1
    monkeypatch.setattr(main.checkpoints.os, "fsync", full)
    assert run(tmp_path, SHORT) == 2 and state(tmp_path)["step"] == 1
    assert "NO CHECKPOINT WRITTEN" in log_of(tmp_path)


SLOW_DISK = """
import os, time
from pathlib import Path
sync, folder = os.fsync, Path({folder!r})
def slow(descriptor):
    (folder / "begun").touch()
    while not (folder / "gate").exists():
        time.sleep(0.01)
    sync(descriptor)
main.checkpoints.os = type("os", (), dict(vars(os), fsync=staticmethod(slow)))
step = main.train_step
def waiting(run, batches):
    if run.progress.update == 2:
        print("third update", flush=True)
        while not run.stop.received:
            time.sleep(0.01)
    return step(run, batches)
main.train_step = waiting
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals as a terminal sends them")
def test_a_second_ctrl_c_ends_a_stop_without_a_traceback_and_no_half_checkpoint(tmp_path):
    with job(tmp_path, SHORT, prepare=SLOW_DISK.format(folder=str(tmp_path))) as started:
        started.wait_for(lambda: "third update" in started.text())
        os.kill(started.ranks[0].pid, signal.SIGINT)
        started.wait_for(lambda: (tmp_path / "begun").exists())
        os.kill(started.ranks[0].pid, signal.SIGINT)
        time.sleep(0.1)
        (tmp_path / "gate").touch()
        ended = started.wait()
    assert ended.codes == [130] and "Traceback" not in ended.text, ended.text
    assert "SIGINT: stopping" in ended.text and "ended without saving" in ended.text
    assert [path.name for path in checkpoint(tmp_path).parent.iterdir()] == ["last.pth"]
    assert state(tmp_path)["step"] == 3


def test_checkpoints_within_an_epoch_come_by_the_clock(tmp_path, monkeypatch):
    names = []
    save = main.save
    monkeypatch.setattr(
        main,
        "save",
        lambda run, *files: (names.append((run.progress.update, files)), save(run, *files))[1],
    )
    assert run(tmp_path, SHORT, "TRAIN.CHECKPOINT_MINUTES 1e-09") == 0
    assert names == [
        (1, ("last.pth",)),
        (2, ("last.pth",)),
        (3, ("last.pth",)),
        (3, ("best.pth", "epoch_0001.pth", "last.pth")),
    ]


def test_a_loss_or_gradient_that_is_not_finite_moves_nothing(tmp_path, monkeypatch):
    forward, step, snapshots = main.forward, main.train_step, []

    def broken(run, batch, index):
        values, update = forward(run, batch, index), run.progress.update
        loss = values["loss"]
        if update == 1:
            return values | {"loss": loss * torch.nan}
        if update == 2:
            return values | {"loss": loss + torch.inf}
        if update == 3:  # a finite loss with a gradient that is not
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return values

    monkeypatch.setattr(main, "forward", broken)

    def watched(run, batches):
        result = step(run, batches)
        states = (
            run.model.state_dict(),
            run.optimizer.state_dict()["state"],
            run.ema.model.state_dict(),
        )
        snapshots.append(json.loads(json.dumps(states, default=lambda tensor: tensor.tolist())))
        return result

    monkeypatch.setattr(main, "train_step", watched)
    assert run(tmp_path, "TRAIN.EPOCHS 1 TRAIN.EMA_DECAY 0.9 TRAIN.WARMUP_EPOCHS 0") == 0
    assert snapshots[0] == snapshots[1] == snapshots[2] == snapshots[3] != snapshots[4]
    lines = updates(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 2, 3, 3]
    assert ["loss" in line for line in lines] == [True, False, False, False, True]
    assert lines[4]["lr"] < lines[3]["lr"] < lines[2]["lr"] < lines[1]["lr"]  # the schedule goes on
    assert metrics(tmp_path)[-1]["train_loss"] == pytest.approx(
        (lines[0]["loss"] + lines[4]["loss"]) / 2
    )
    assert "3 updates skipped" in log_of(tmp_path)


@pytest.mark.parametrize("every", [1, 100])
def test_too_many_in_a_row_end_the_run_with_the_images_names(every, tmp_path, monkeypatch, capsys):
    forward, seen = main.forward, []

    def broken(run, batch, index):
        values = forward(run, batch, index)
        keys = run.loader.dataset.dataset.get_keys()
        seen.append([keys[position] for position in batch.position.tolist()])
        return values | {"loss": values["loss"] * (1.0 if index in (0, 2) else torch.nan)}

    monkeypatch.setattr(main, "forward", broken)
    opts = ["TRAIN.EPOCHS 2 TRAIN.MAX_BAD_STEPS 2 PRINT_FREQ", every]
    line = fault(capsys, tmp_path, *opts)
    listed = folder(tmp_path) / "bad_images.txt"
    assert (
        "2 updates in a row had a non-finite loss or gradient, up to number 5 (epoch 1)" in line
        and str(listed) in line
    )
    names = listed.read_text().splitlines()
    assert (
        set(names) == {name for batch in seen[-2:] for name in batch}
        and f"(first: {', '.join(names[:3])})" in line
    )
    seen.clear()
    assert (
        run(
            tmp_path,
            *opts,
            "DATA.EXCLUDE",
            listed,
            "TRAIN.EPOCHS 1",
            flags=["--tag cleaned --batch-size 12"],
        )
        == 0
    )
    # of 27 images that are left
    assert len(seen) == 2 and not {name for batch in seen for name in batch} & set(names)


def test_images_whose_names_are_no_text_are_listed_so_that_they_can_be_left_out(
    tmp_path, monkeypatch, capsys
):
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is
    names = [os.fsdecode(b"%s/\xff%d.png" % (c, i)) for c in (b"a", b"b") for i in range(8)]
    for split in ("train", "val"):
        write_files(tmp_path / "data" / split, names)
    forward = main.forward

    def broken(run, batch, index):
        values = forward(run, batch, index)
        return values | {"loss": values["loss"] * torch.nan}

    monkeypatch.setattr(main, "forward", broken)
    opts = "DATA.DATASET imagenet TRAIN.MAX_BAD_STEPS 1 PRINT_FREQ 1 TRAIN.WARMUP_EPOCHS 0"
    line = fault(capsys, tmp_path, opts, flags=["--data-path", tmp_path / "data"])
    listed = folder(tmp_path) / "bad_images.txt"
    left_out = read_names(str(listed), "DATA.EXCLUDE")
    assert set(left_out) < set(names) and f"\\udcff{left_out[0][-5:]}" in line
    cfg = config("DATA.DATA_PATH", tmp_path / "data", "DATA.EXCLUDE", listed)
    assert set(build_dataset(cfg, "train").get_keys()) == set(names) - set(left_out)


def test_a_frozen_backbone_stays_as_it_is_and_layers_learn_at_their_own_rates(trained, tmp_path):
    weights = trained / "weights.safetensors"
    assert run(tmp_path, SHORT, "TRAIN.FREEZE backbone", flags=["--pretrained", weights]) == 0
    tuned, start = state(tmp_path)["model"], safetensors.torch.load_file(weights)
    assert {name for name, value in start.items() if not torch.equal(tuned[name], value)} == {
        "head.weight",
        "head.bias",
    }
    assert "(170 train)" in log_of(tmp_path)
    opts = "TRAIN.LAYER_LR_DECAY 0.5 TRAIN.EVAL_BN_WHEN_TRAINING True"
    assert run(tmp_path, SHORT, opts, flags=["--pretrained", weights, "--tag decay"]) == 0
    tuned = state(tmp_path, tag="decay")["model"]
    changed = {name for name, value in start.items() if not torch.equal(tuned[name], value)}
    assert (
        not any("running" in name or "num_batches" in name for name in changed)
        and "patch_embed.seq.0.c.weight" in changed
    )
    first, *others = updates(tmp_path, "decay")
    # as in the original, whose layer decay begins with the second update
    assert first["lr_min"] == first["lr"]
    # 4 blocks: the first has 0.5^3
    assert others and all(line["lr_min"] == pytest.approx(line["lr"] / 8) for line in others)


def test_recomputed_activations_change_nothing(trained, tmp_path):
    assert (
        run(tmp_path, "TRAIN.EMA_DECAY 0.9 MODEL.DROP_PATH_RATE 0.1", flags=["--use-checkpoint"])
        == 0
    )
    for ours, theirs in zip(updates(tmp_path), updates(trained), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6) and ours[
            "norm"
        ] == pytest.approx(theirs["norm"], rel=1e-5)
    ours, theirs = state(tmp_path)["model"], state(trained)["model"]
    assert all(
        torch.equal(ours[name], theirs[name])
        for name in ours
        if name.endswith("num_batches_tracked")
    )


def test_recomputation_moves_no_statistics_of_any_model(tmp_path):
    found = []
    for tag, flags in {"plain": [], "recomputed": ["--use-checkpoint"]}.items():
        assert (
            run(
                tmp_path,
                SHORT,
                "MODEL.TYPE timm MODEL.NAME resnet10t",
                flags=["--tag", tag, *flags],
            )
            == 0
        )
        found.append(
            torch.load(
                tmp_path / "resnet10t" / tag / "checkpoints" / "last.pth", weights_only=True
            )["model"]
        )
    assert all(
        torch.allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-4)
        for name in found[0]
        if "running" in name
    )
    assert all(
        torch.equal(found[0][name], found[1][name]) for name in found[0] if "num_batches" in name
    )


def test_labels_alone_never_see_a_pair_split_and_mixing_has_two_modes(tmp_path):
    losses = set()
    for tag, opts in {
        "batch": "",
        "pairs": "AUG.MIXUP_MODE pair2",
        "none": "AUG.MIXUP 0.0 AUG.CUTMIX 0.0",
    }.items():
        assert run(tmp_path, SHORT, opts, flags=["--tag", tag]) == 0
        losses.add(updates(tmp_path, tag)[0]["loss"])
    assert len(losses) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_is_continued_exactly(dtype, tmp_path, monkeypatch):
    """As on a GPU, whose types the CPU can compute in as well; the first scale of 65536 is too much
    for float16.
    """
    monkeypatch.setattr(utils, "amp_dtype", lambda cfg, device: dtype)
    seen = []
    forward = main.label_cross_entropy
    monkeypatch.setattr(
        main,
        "label_cross_entropy",
        lambda logits, targets: (seen.append(logits.dtype), forward(logits, targets * 30))[1],
    )
    opts = "TRAIN.EPOCHS 2 TRAIN.CLIP_GRAD 1000000000.0"
    assert run(tmp_path, opts) == 0 and set(seen) == {dtype}
    scaler, lines = state(tmp_path)["scaler"], updates(tmp_path)
    if dtype is torch.float16:
        assert scaler["scale"] < 65536 and 1 <= lines[-1]["skipped"] < 5
    else:
        assert scaler == {} and not lines[-1]["skipped"]
    saved = checkpoint(tmp_path, "epoch_0001.pth")
    assert run(tmp_path, opts, flags=["--resume", saved, "--tag again"]) == 0
    assert (
        same_bits(state(tmp_path)["model"], state(tmp_path, tag="again")["model"])
        and state(tmp_path, tag="again")["scaler"] == scaler
    )
    # another device, or another type, may go on: with a loss scale of its own, or none
    other = torch.bfloat16 if dtype is torch.float16 else torch.float16
    monkeypatch.setattr(utils, "amp_dtype", lambda cfg, device: other)
    assert run(tmp_path, opts, flags=["--resume", saved, "--tag other"]) == 0
    assert bool(state(tmp_path, tag="other")["scaler"]) == (other is torch.float16)


def test_a_run_may_begin_at_a_later_epoch(tmp_path, trained):
    assert run(tmp_path, "TRAIN.START_EPOCH 1 TRAIN.EMA_DECAY 0.9") == 0
    later = [line for line in updates(trained) if line["step"] > 5]
    assert [(line["step"], line["epoch"], line["lr"]) for line in updates(tmp_path)] == [
        (x["step"], x["epoch"], x["lr"]) for x in later
    ]


def test_on_a_terminal_there_is_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(tmp_path, SHORT) == 0
    assert "epoch 1/1" in (err := capsys.readouterr().err) and "/3" in err
    assert "evaluation" in err
    assert re.search(r"loss \d\.\d+, 0:\d\d:\d\d left in all", err)


def test_a_compiler_that_fails_is_a_warning(tmp_path, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fails)
    assert run(tmp_path, SHORT, "TRAIN.COMPILE True") == 0
    assert "the model runs compiled (TRAIN.COMPILE as asked)" in log_of(tmp_path)
    assert (
        "WARNING torch.compile unavailable (no C++ compiler more): the model runs uncompiled"
        in log_of(tmp_path)
    )


@pytest.mark.proof
def test_a_compiled_model_trains_like_the_plain_one(trained, tmp_path):
    assert run(tmp_path, "TRAIN.EMA_DECAY 0.9 TRAIN.COMPILE True") == 0
    assert "unavailable" not in log_of(tmp_path)
    for ours, theirs in zip(updates(tmp_path), updates(trained), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert state(tmp_path)["model"].keys() == state(trained)["model"].keys()


def test_without_wandb_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(tmp_path, SHORT, flags=["--use-wandb"]) == 0
    assert "WARNING wandb could not start" in log_of(tmp_path) and len(metrics(tmp_path)) == 4


# ---- distillation


def test_a_student_says_how_good_its_teacher_is_and_what_it_reads(store, tmp_path):
    assert run(tmp_path, SHORT, "DISTILL.TEACHER_LOGITS_PATH", store) == 0
    assert f"store {store}: top-10 of 10 classes, 24 images, epochs 0-1; load" in log_of(tmp_path)
    assert (
        all("teacher_top1" in line for line in updates(tmp_path))
        and "train_teacher_top1" in metrics(tmp_path)[-1]
    )
    assert any(0 < line["teacher_top1"] < 100 for line in updates(tmp_path))
    fewer = "DISTILL.LOGITS_TOPK 3 TAG fewer DISTILL.TEACHER_LOGITS_PATH"
    assert run(tmp_path, SHORT, fewer, store) == 0
    assert "images, epochs 0-1; its top-3 are read; load" in log_of(tmp_path, "fewer")


@pytest.mark.parametrize(
    ("opts", "text"),
    [
        ("AUG.REPROB 0.5", "AUG.REPROB = 0.5, but the store"),
        ("DISTILL.LOGITS_TOPK 11", "DISTILL.LOGITS_TOPK = 11, but the store"),
        ("TRAIN.EPOCHS 4", "epochs 2-3 are missing (sealed: 0-1)"),
        (
            "DATA.SHAPES.TRAIN_IMAGES 26",
            "save a store for this data set; it was saved with DATA.SHAPES.TRAIN_IMAGES 24",
        ),
        ("DATA.IMG_SIZE 48", "DISTILL.OTHER_SIZE"),
        ("DATA.BATCH_SIZE 32", "fewer than one global step of 32"),
    ],
)
def test_a_store_that_does_not_fit_is_told_before_the_first_step(
    opts, text, store, tmp_path, capsys
):
    line = fault(capsys, tmp_path, SHORT, "DISTILL.TEACHER_LOGITS_PATH", store, opts)
    assert text in line and not checkpoint(tmp_path).exists()


def test_labels_and_teacher_can_both_be_learnt_from(store, tmp_path, capsys):
    first = {}
    ways = {"both": "ALPHA 0.5", "teacher": "ALPHA 1.0", "labels": "ALPHA 0.0", "hard": "HARD True"}
    for tag, way in ways.items():
        opts = f"DISTILL.{way}"
        assert (
            run(tmp_path, SHORT, "DISTILL.TEACHER_LOGITS_PATH", store, opts, flags=["--tag", tag])
            == 0
        )
        first[tag] = updates(tmp_path, tag)[0]["loss"]
        if tag == "both":  # before the first update all see the same
            apart = updates(tmp_path, tag)[0]
    assert (
        first["both"] == pytest.approx((first["teacher"] + first["labels"]) / 2, rel=1e-6)
        and len(set(first.values())) == 4
    )
    assert apart["label_loss"] == pytest.approx(first["labels"], rel=1e-6)
    assert 0 < apart["kl"] < first["teacher"]
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    line = fault(
        capsys,
        tmp_path,
        "DATA.DATASET folder MODEL.NUM_CLASSES 10",
        flags=["--data-path", draw(images, 9)],
    )
    assert "this run learns from labels, but those of" in line and "the data has no labels" in line


def test_unlabelled_images_need_no_validation(tmp_path):
    images = tmp_path / "images" / "train"
    images.mkdir(parents=True)
    place, store = draw(images, 9), tmp_path / "store"
    opts = ["DATA.DATASET folder DATA.DATA_PATH", place]
    assert saving.run(store, *opts, "MODEL.NUM_CLASSES 10") == 0
    assert run(tmp_path, *opts, "DISTILL.TEACHER_LOGITS_PATH", store, "TRAIN.EPOCHS 1") == 0
    assert "WARNING nothing is evaluated: " in log_of(tmp_path) and "set DATA.VAL_PATH" in log_of(
        tmp_path
    )
    assert [set(line) for line in metrics(tmp_path)] == [
        {"step", "epoch", "norm", "loss", "kl", "lr", "lr_min", "skipped"},
        {"step", "epoch", "train_norm", "train_loss", "train_kl"},
    ]


def draw(root: Path, count: int) -> Path:
    """Small images of one colour below a folder that ends in train; its parent."""
    for number in range(count):
        Image.new("RGB", (48, 44), (number * 20, 99, 255 - number * 20)).save(
            root / f"{number}.png"
        )
    return root.parent


def test_the_teacher_in_the_loop_sees_its_own_normalisation():
    cfg = load_config(["--opts", "MODEL.TYPE", "tests.support.teachers:glance"])
    teacher = Teacher.from_config(cfg, torch.device("cpu"))
    pixels = torch.rand(4, 3, 40, 40)
    own, other = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))

    def normalised(statistics):
        mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
        return (pixels - mean) / std

    indices, probs = teacher.in_the_loop(3, 2.0, own, own)(normalised(own))
    expected = torch.softmax(teacher.model(normalised(own)) / 2, -1).sort(descending=True)
    assert torch.equal(indices, expected.indices[:, :3]) and torch.allclose(
        probs.float(), expected.values[:, :3], atol=1e-3
    )
    again = teacher.in_the_loop(3, 2.0, other, own)(normalised(other))
    assert torch.equal(again[0], indices) and torch.allclose(
        again[1].float(), probs.float(), atol=1e-3
    )


def test_an_online_teacher_of_another_size_is_refused(tmp_path, capsys):
    (tmp_path / "teacher.yaml").write_text(
        "MODEL: {TYPE: 'tests.support.teachers:glance'}\nDATA: {IMG_SIZE: 64}\n"
    )
    line = fault(
        capsys,
        tmp_path,
        SHORT,
        "DISTILL.ONLINE True DISTILL.TEACHER_CFG",
        tmp_path / "teacher.yaml",
    )
    assert "DATA.IMG_SIZE = 40, but the teacher" in line and "64 pixels" in line


# ---- evaluation and throughput


def test_evaluation_at_another_size_than_training_is_told(trained, tmp_path, capsys):
    saved = checkpoint(trained)
    assert run(tmp_path, *TINY_MODEL, "DATA.IMG_SIZE 64", flags=["--eval --resume", saved]) == 0
    assert f"{saved} was trained at 40 px and is measured at 64: " in capsys.readouterr().out
    assert run(tmp_path, *TINY_MODEL, flags=["--eval --resume", saved]) == 0
    assert "was trained at" not in capsys.readouterr().out


def test_evaluation_finds_what_training_printed_and_each_class_by_itself(trained, tmp_path, capsys):
    path = tmp_path / "classes.csv"
    saved = checkpoint(trained)
    opts = TINY_MODEL
    flags = [
        "--eval --resume",
        saved,
        "--per-class-csv",
        path,
        "--save-model",
        tmp_path / "out.safetensors",
    ]
    assert run(tmp_path, *opts, flags=flags) == 0
    out = capsys.readouterr().out
    last = metrics(trained)[-1]
    for label, prefix in ((f"{saved}: ", "val"), (f"{saved}, averaged weights: ", "average")):
        found = re.search(
            re.escape(label)
            + r"20 validation images: top-1 ([\d.]+)%, top-5 ([\d.]+)%, loss ([\d.]+)",
            out,
        )
        for text, name in zip(found.groups(), ("top1", "top5", "loss")):
            assert float(text) == pytest.approx(last[f"{prefix}_{name}"], abs=1e-3)
    rows = list(csv.DictReader(path.open()))
    assert (
        len(rows) == 10
        and {row["images"] for row in rows} == {"2"}
        and all(row["name"] for row in rows)
    )
    assert sum(int(row["right"]) for row in rows) / 20 * 100 == pytest.approx(last["val_top1"])
    assert not (tmp_path / "tiny").exists()  # evaluation writes no run
    assert same_bits(
        safetensors.torch.load_file(tmp_path / "out.safetensors"), dict(state(trained)["model_ema"])
    )


@pytest.fixture(scope="module")
def wnid_images(tmp_path_factory) -> Path:
    """ImageNet's layout with 5 of its classes, one of which ImageNet-22k lacks."""
    root = tmp_path_factory.mktemp("wnids")
    missing = int(np.flatnonzero(map_22k_to_1k() < 0)[0])
    for label in (0, 5, missing, 700, 999):
        place = root / "val" / imagenet_wnids(1000)[label]
        place.mkdir(parents=True)
        draw_label(place, label)
    return root


def draw_label(place: Path, label: int) -> None:
    for number in range(3):
        pixels = np.random.default_rng([label, number]).integers(
            0, 256, (50, 50, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(place / f"{label}-{number}.png")


def test_a_model_of_22k_classes_is_judged_on_1k_through_the_class_map(
    wnid_images, tmp_path, capsys
):
    from models.build import build_model

    torch.manual_seed(0)
    opts = words("--opts", *TINY_MODEL, "MODEL.NUM_CLASSES 21841 DATA.IMG_SIZE 40")
    model = build_model(load_config(opts)).eval()
    mapping = torch.from_numpy(map_22k_to_1k())
    with torch.no_grad():  # class 5 of the 1k wins among them, another of the 22k among all
        model.head.bias[mapping[5]] = 50
        model.head.bias[next(i for i in range(21841) if i not in set(mapping.tolist()))] = 100
    torch.save(model.state_dict(), tmp_path / "model.pth")
    opts = "DATA.DATASET imagenet DATA.CLASS_LIST imagenet1k"
    flags = [
        "--eval --resume",
        tmp_path / "model.pth",
        "--data-path",
        wnid_images,
        "--per-class-csv",
        tmp_path / "c.csv",
    ]
    assert run(tmp_path, opts, flags=flags) == 0
    assert "15 validation images: top-1 20.000%" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert len(rows) == 1000 and [int(row["class"]) for row in rows if row["right"] == "3"] == [5]
    # the class that the 22k lack has none that count
    assert sum(int(row["images"]) for row in rows) == 12


def test_where_nothing_says_which_class_is_which_accuracies_are_absent(
    wnid_images, trained, tmp_path, capsys
):
    weights = checkpoint(trained)
    flags = ["--eval --resume", weights, "--data-path", wnid_images]
    assert run(tmp_path, "DATA.DATASET imagenet", flags=flags) == 0
    out = capsys.readouterr().out
    assert (
        "accuracies are absent: the data has 5 classes and the model 10, and nothing says which is"
        " which" in out
    )
    assert "15 validation images\n" in out and "top-1" not in out
    flags += ["--per-class-csv", tmp_path / "c.csv"]
    assert "there are no accuracies" in fault(
        capsys, tmp_path, "DATA.DATASET imagenet", flags=flags
    )


def test_classes_are_those_that_the_checkpoint_names(wnid_images, trained, tmp_path, capsys):
    """Folders that were numbered otherwise, or renamed, are no other classes of the model."""
    saved = state(trained)
    saved["model"]["head.bias"][1] = 1e6  # so it always answers output 1
    saved["class_names"] = [f"other {output}" for output in range(10)]
    names = sorted(path.name for path in (wnid_images / "val").iterdir())
    saved["class_names"][:5] = names[::-1]
    torch.save(saved, tmp_path / "named.pth")
    flags = ["--eval --resume", tmp_path / "named.pth", "--data-path", wnid_images]
    flags += ["--per-class-csv", tmp_path / "c.csv"]
    assert run(tmp_path, "DATA.DATASET imagenet", flags=flags) == 0
    rows = csv.DictReader((tmp_path / "c.csv").open())
    assert [row["name"] for row in rows if int(row["right"])] == [names[3]]
    saved["class_names"][1] = "renamed"
    torch.save(saved, tmp_path / "named.pth")
    assert run(tmp_path, "DATA.DATASET imagenet", flags=flags[:-2]) == 0
    out = capsys.readouterr().out
    assert f"the data's class {names[3]} is none of those that the weights were trained on" in out
    assert "15 validation images\n" in out


def test_throughput_is_measured_without_data(trained, tmp_path, capsys, monkeypatch):
    """On a clock of a twentieth of a second between two looks, with a path at which no data is."""
    clock = itertools.count()
    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(clock) / 20)
    flags = ["--throughput --batch-size 5 --data-path", tmp_path / "nowhere", "--resume"]
    checkpoints = folder(trained) / "checkpoints"
    assert run(tmp_path, "DATA.DATASET imagenet", flags=[*flags, checkpoints / "last.pth"]) == 0
    expected = (
        "tiny: 100.0 images/s (middle half 100.0 to 100.0; 30 batches of 5 at 40 px, float32)"
    )
    assert expected in capsys.readouterr().out
    assert not (tmp_path / "tiny").exists()
    assert "no such checkpoint" in fault(capsys, tmp_path, flags=[*flags, checkpoints / "no.pth"])


# ---- faults


@pytest.mark.parametrize(
    ("opts", "flags", "text"),
    [
        ("DATA.DATASET imagenet", "--data-path {tmp}/nowhere", "nowhere"),
        ("DATA.DATASET imagenet", "--data-path {tmp}/half", "neither val/ nor val.tar"),
        (
            "MODEL.NUM_CLASSES 7",
            "",
            "7 classes are fewer than the 10 of the data shapes: set MODEL.NUM_CLASSES 10 or more",
        ),
        ("", "--eval", "--eval measures weights: name them"),
        ("", "--eval --resume {tmp}/none.pth", "there is no such checkpoint file"),
        ("", "--eval --resume {last.parent}/lst.pth", "/checkpoints/last.pth?"),
        (
            "",
            "--pretrained 22kto1k_distil",
            "did you mean 22kto1k_distill (of MODEL.TYPE tiny_vit)",
        ),
        ("MODEL.NUM_CLASSES 12", "--eval --resume {last}", "head.weight is [10, 16], the model's"),
        ("MODEL.NUM_CLASSES 12", "--eval --resume {last}", "MODEL.NUM_CLASSES as well, is the"),
        (
            "MODEL.TINY_VIT.DEPTHS [1,2,1,1]",
            "--eval --resume {last}",
            "layers.1.blocks.1.attn.attention_biases is missing",
        ),
        ("DATA.BATCH_SIZE 64", "", "fewer than one global step of 64"),
        ("DISTILL.ENABLED True", "", "a student needs a teacher: name its store in DISTILL."),
        ("", "--eval --resume {last.parent}", "is a folder, name a checkpoint in it, such as"),
        ("", "--output {tmp}/file/runs", "is a file, choose another folder"),
        ("", "--save-model {tmp}/file/w", "name a file in a folder of yours"),
        ("", "--eval --resume {last} --per-class-csv {tmp}", "can't be written there"),
        ("", "--use-sync-bn", "need CUDA"),
        ("TRAIN.LR_SCHEDULER.NAME cosin", "", "did you mean cosine?"),
    ],
)
def test_faults_of_the_command_line(opts, flags, text, trained, tmp_path, capsys):
    last = checkpoint(trained)
    (tmp_path / "file").write_text("")
    draw_train(tmp_path / "half")
    flags = flags.format(tmp=tmp_path, last=last)
    assert text in fault(capsys, tmp_path / "out", opts, flags=[flags])


@pytest.mark.parametrize(
    ("opts", "env", "text"),
    [
        ("", "WORLD_SIZE=two", "WORLD_SIZE is 'two', not a number"),
        ("TRAIN.GLOBAL_BATCH 16", "WORLD_SIZE=3", "use one of 1, 2, 4, 8, 16 processes"),
        ("", "", "If the port is in use, give torchrun another --master-port"),
        pytest.param("DEVICE cuda", "LOCAL_RANK=1", "no GPU for LOCAL_RANK 1", marks=WITHOUT_GPU),
        pytest.param(
            "DEVICE auto TRAIN.SYNC_BN True", "WORLD_SIZE=1", "need CUDA", marks=WITHOUT_GPU
        ),
    ],
)
def test_faults_of_the_environment(opts, env, text, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        place = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={busy.getsockname()[1]}"
        for setting in f"WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 {place} {env}".split():
            monkeypatch.setenv(*setting.split("="))
        assert text in fault(capsys, tmp_path / "out", opts)


def draw_train(root: Path) -> Path:
    """Class folders for training, and none for validation."""
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
        for number in range(4):
            draw_label(root / "train" / name, number)
    return root


def test_a_fault_of_the_command_line_is_told_by_one_rank(tmp_path, capsys, monkeypatch):
    for key, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(key, value)
    assert run(tmp_path, "TRAIN.GLOBAL_BATCH 16") == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert "TRAIN.GLOBAL_BATCH" in fault(capsys, tmp_path, "TRAIN.GLOBAL_BATCH 16")


BROKEN = """
step = main.train_step
def broken(run, batches):
    if run.progress.update == 2 and rank == 1:
        raise ValueError("something is wrong")
    return step(run, batches)
main.train_step = broken
"""


def test_a_fault_of_one_process_ends_all_with_one_line_each(tmp_path):
    with job(tmp_path, "DATA.BATCH_SIZE 4", world=2, prepare=BROKEN) as started:
        assert started.wait().codes == [2, 2], started.text()
    assert "Traceback" not in started.text(0) + started.text(1)  # PyTorch's own warnings are there
    told = [
        [line for line in started.text(rank).splitlines() if line.startswith("error: ")]
        for rank in (0, 1)
    ]
    assert told[1] == ["error: something is wrong (rank 1)"]
    assert len(told[0]) == 1 and told[0][0].startswith(
        "error: the connection to another process is lost"
    )
    assert told[0][0].replace("error: ", "ERROR ") in log_of(tmp_path)
    assert "ERROR something is wrong\n" in (folder(tmp_path) / "log_rank1.txt").read_text()


def test_a_split_that_batch_norm_would_notice_is_a_warning(tmp_path):
    assert run(tmp_path, SHORT, "TRAIN.GLOBAL_BATCH 8") == 0
    assert (
        "WARNING batch norm sees the 8 images of a pass: another number of processes will change"
        " its statistics" in log_of(tmp_path)
    )
    assert (
        run(
            tmp_path,
            SHORT,
            "TRAIN.GLOBAL_BATCH 8 TRAIN.EVAL_BN_WHEN_TRAINING True",
            flags=["--tag fixed"],
        )
        == 0
    )
    assert "batch norm sees" not in log_of(
        tmp_path, "fixed"
    ) and "WARNING images are mixed within a pass" in log_of(tmp_path, "fixed")
    assert (
        run(tmp_path, SHORT, "TRAIN.GLOBAL_BATCH 8 AUG.MIXUP_MODE pair2", flags=["--tag pairs"])
        == 0
    )
    assert "mixed within a pass" not in log_of(tmp_path, "pairs")


# ---- the documented way from ImageNet-22k to higher resolutions, in small


@pytest.fixture(scope="module")
def two_imagenets(tmp_path_factory) -> Path:
    """ImageNet-22k's layout of three classes with ImageNet's beside it, of two of these."""
    root = tmp_path_factory.mktemp("data")
    (root / "ImageNet-22k").mkdir()
    of_1k = imagenet_wnids(1000)
    added = next(wnid for wnid in imagenet_wnids(21841) if wnid not in of_1k)
    wnids = [of_1k[5], of_1k[700], added]
    names = []
    for number, wnid in enumerate(sorted(wnids)):
        with zipfile.ZipFile(root / "ImageNet-22k" / f"{wnid}.zip", "w") as archive:
            for index in range(5):
                place = root / f"{index}.jpeg"
                pixels = np.random.default_rng([number, index]).integers(
                    0, 256, (44, 44, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(place)
                archive.write(place, f"{wnid}_{index}.jpeg")
                names.append(f"{wnid}_{index}")
    (root / "ImageNet-22k" / "in22k_image_names.txt").write_text(
        "".join(f"{name}\n" for name in names)
    )
    for split, count in (("train", 4), ("val", 2)):
        for wnid in wnids[:2]:
            place = root / "ImageNet" / split / wnid
            place.mkdir(parents=True)
            for index in range(count):
                shutil.copy(root / f"{index}.jpeg", place / f"{index}.JPEG")
    return root


def test_from_22k_to_1k_and_to_a_higher_resolution(two_imagenets, tmp_path, capsys):
    alone = [
        *TINY_MODEL[2:],  # the recipes have names of their own
        "DATA.IMG_SIZE 40 DATA.NUM_WORKERS 0 TRAIN.WARMUP_EPOCHS 0 TRAIN.EPOCHS 1",
    ]
    in22k = two_imagenets / "ImageNet-22k"
    in1k = two_imagenets / "ImageNet"
    store = tmp_path / "logits"

    def command(recipe: str, data: Path, *opts, flags=(), program=main) -> None:
        places = ["--data-path", data, "--output", tmp_path]
        recipe = f"--only-cpu --batch-size 4 --cfg configs/{recipe}.yaml"
        assert program.main(words(recipe, *places, *flags, "--opts", *alone, *opts)) == 0

    every = "DATA.CLASS_LIST imagenet22k"  # the real 22k has all of its classes
    teacher = [
        "MODEL.TYPE tests.support.teachers:glance MODEL.NUM_CLASSES 21841",
        "DISTILL.TEACHER_LOGITS_PATH",
        store,
    ]
    command(
        "22k_distill/tiny_vit_5m_22k_distill",
        in22k,
        every,
        *teacher,
        flags=["--skip-eval"],
        program=save_logits,
    )
    command(
        "22k_distill/tiny_vit_5m_22k_distill", in22k, every, "DISTILL.TEACHER_LOGITS_PATH", store
    )
    pretrained = tmp_path / "TinyViT-5M-22k-distill" / "default" / "checkpoints" / "last.pth"
    head = state_of(pretrained)["model"]["head.weight"]
    assert head.shape == (21841, 16)
    capsys.readouterr()
    command(
        "22k_distill/tiny_vit_5m_22k_distill", in22k, every, flags=["--eval --resume", pretrained]
    )
    # 1k labels, through the class map
    assert re.search(r"last.pth: 4 validation images: top-1 [\d.]+%", capsys.readouterr().out)
    ids = "DATA.CLASS_LIST imagenet1k"
    command(
        "22kto1k/tiny_vit_5m_22kto1k",
        in1k,
        ids,
        "MODEL.NUM_CLASSES 1000",
        flags=["--pretrained", pretrained],
    )
    log = (tmp_path / "TinyViT-5M-22kto1k" / "default" / "log_rank0.txt").read_text()
    assert "adapted: head.weight ([21841, 16] in the file, [1000, 16] here)" in log
    assert f"; weights of {pretrained}: " in (out := capsys.readouterr().out)
    assert "tensors loaded, adapted\n" in out
    tuned = tmp_path / "TinyViT-5M-22kto1k" / "default" / "checkpoints" / "last.pth"
    start = head[torch.from_numpy(map_22k_to_1k())[5]]
    assert (
        torch.allclose(state_of(tuned)["model"]["head.weight"][5], start, atol=0.05)
        and start.abs().max() > 0
    )
    larger = "DATA.IMG_SIZE 64 MODEL.TINY_VIT.WINDOW_SIZES [4,4,4,2]"
    command(
        "higher_resolution/tiny_vit_21m_224to384",
        in1k,
        ids,
        larger,
        flags=["--pretrained", tuned, "--accumulation-steps 2"],
    )
    log = (tmp_path / "TinyViT-21M-224to384" / "default" / "log_rank0.txt").read_text()
    assert "attn.attention_biases (window 2 to 4)" in log
    assert "2 batches of 4" in capsys.readouterr().out


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)
