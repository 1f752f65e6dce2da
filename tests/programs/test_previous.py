"""Stores and checkpoints that the program wrote before its redesign are read and gone on with."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.store import LogitsStoreReader
from tests.support.helpers import ROOT

DATA = "DATA.SHAPES.TRAIN_IMAGES 40 DATA.SHAPES.VAL_IMAGES 20 DATA.SUBSET 1.0 DATA.NUM_WORKERS 0"
TINY = (
    "MODEL.TINY_VIT.DEPTHS [1,1,1,1] MODEL.TINY_VIT.NUM_HEADS [1,1,1,1]"
    " MODEL.TINY_VIT.WINDOW_SIZES [3,3,3,2] MODEL.TINY_VIT.EMBED_DIMS [4,8,8,8]"
)
TEACHER = (
    f"--cfg {ROOT}/configs/shapes/save_logits.yaml --batch-size 8 --output runs"
    f" --resume runs/teacher/default/checkpoints/last.pth"
)
TEACHER_OPTS = f"--opts {DATA} {TINY} MODEL.NAME teacher DISTILL.LOGITS_TOPK 5 TRAIN.EPOCHS 2"
STUDENT = (
    f"--cfg {ROOT}/configs/shapes/student_distill.yaml --batch-size 8 --output runs"
    f" --opts {DATA} {TINY} MODEL.NAME student TRAIN.EPOCHS 2 TRAIN.EMA_DECAY 0.9"
    " DISTILL.TEACHER_LOGITS_PATH store"
)


@pytest.fixture
def files(goldens, tmp_path) -> Path:
    """A folder with the files of before."""
    with tarfile.open(goldens / "previous" / "previous.tar.gz") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def run(folder: Path, *words: str) -> str:
    """The output of a program that succeeds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *" ".join(words).split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def close(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two epochs hold the same answers, but for another machine's arithmetic."""
    assert (left["seed"] == right["seed"]).all()
    same_classes = (left["index"] == right["index"]).mean()
    return same_classes > 0.98 and np.allclose(left["prob"], right["prob"], atol=2e-3)


def test_an_old_store_verifies_and_passes_its_check(files):
    run(files, "-m tools.logits verify store --epochs 2")
    said = run(
        files,
        f"{ROOT}/save_logits.py --check-saved-logits",
        TEACHER,
        TEACHER_OPTS,
        "DISTILL.TEACHER_LOGITS_PATH store",
    )
    assert "PASSED" in said


def test_an_old_store_is_finished_as_it_was_begun(files):
    before = (files / "half" / "manifest.json").read_bytes()
    first = (files / "half" / "epoch_0000.npy").read_bytes()
    parts = list((files / "half" / "epoch_0001.parts").glob("*.part"))
    assert len(parts) == 1
    said = run(
        files, f"{ROOT}/save_logits.py", TEACHER, TEACHER_OPTS, "DISTILL.TEACHER_LOGITS_PATH half"
    )
    assert "24 images" in said  # of 40: two batches of eight were there
    half, whole = LogitsStoreReader(files / "half"), LogitsStoreReader(files / "store")
    assert half.epochs() == [0, 1]
    assert close(half.open_epoch(1), whole.open_epoch(1))
    assert (files / "half" / "manifest.json").read_bytes() == before
    assert (files / "half" / "epoch_0000.npy").read_bytes() == first
    assert half.seal(1)["identity_sha256"] == half.seal(0)["identity_sha256"]


def test_an_old_training_goes_on_from_its_checkpoint(files):
    said = run(files, f"{ROOT}/main.py", STUDENT)
    assert "7 updates are done" in said
    states = [
        torch.load(files / "runs/student" / tag / "checkpoints/last.pth", weights_only=True)
        for tag in ("default", "whole")
    ]
    for part in ("model", "model_ema"):
        mine, theirs = (state[part] for state in states)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)
    lines = [
        (files / "runs/student" / tag / "metrics.jsonl").read_text().splitlines()
        for tag in ("default", "whole")
    ]
    assert len(lines[0]) == len(lines[1])
