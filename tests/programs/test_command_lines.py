"""Command lines are answered before anything slow is imported, and with all that is wrong."""

import subprocess
import sys

import pytest

from configs import commands
from data.store.reader import check_sealed
from tests.support import saving, training
from tests.support.helpers import ROOT

ANSWER = """
import runpy, sys
sys.path.insert(0, ".")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code or 0
print("imported:", sorted({"torch", "timm", "torchvision", "PIL"} & sys.modules.keys()))
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("main.py --help", 0, "--save-model FILE"),
        ("main.py --unknown", 2, "unrecognized arguments: --unknown"),
        ("main.py --opts DEVICE gpu", 2, "error: --opts: DEVICE = 'gpu': it is one of auto"),
        ("main.py --opts MODEL.TYPE timm TAG a/b", 2, "error: --opts: TAG = 'a/b'"),
        ("save_logits.py --help", 0, "--check-saved-logits"),
        ("save_logits.py --exact", 2, "--exact and --percent go with --check-saved-logits"),
        ("save_logits.py", 2, "error: DISTILL.TEACHER_LOGITS_PATH: name the store's folder"),
    ],
)
def test_a_command_line_is_answered_before_anything_slow_is_imported(words, code, text):
    program = f"import sys; sys.argv = {words.split()!r}\n{ANSWER}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == code and text in told and "imported: []" in told, told


def test_a_store_that_is_too_short_is_told_with_what_else_is_wrong(tmp_path, capsys, monkeypatch):
    assert saving.run(tmp_path / "store", "TRAIN.EPOCHS 1") == 0
    wrong = ["DISTILL.TEACHER_LOGITS_PATH", tmp_path / "store", "TRAIN.EPOCHS 3"]
    assert training.run(tmp_path, *wrong, "TRAIN.WARMUP_EPOCHS 4") == 2
    line = capsys.readouterr().err
    assert "warm-up is longer than training" in line and "epochs 1-2 are missing" in line
    monkeypatch.setenv("RANK", "1")  # rank 0 alone looks, as its folder is the one that counts
    assert training.run(tmp_path, *wrong, "TRAIN.WARMUP_EPOCHS 4") == 2
    assert capsys.readouterr().err == ""


def test_only_a_store_that_is_named_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("another program's")
    monkeypatch.chdir(tmp_path)
    cfg, _ = commands.training(["--opts", "DATA.DATASET", "shapes"], check_sealed)
    assert cfg.DISTILL.TEACHER_LOGITS_PATH == ""


def test_a_part_that_a_store_of_pairs_was_saved_for_trains_from_it(tmp_path, capsys):
    part = "DATA.SUBSET 0.5 DATA.BATCH_SIZE 4"
    assert saving.run(tmp_path / "store", part, "TRAIN.EPOCHS 1") == 0
    student = ["TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 DISTILL.TEACHER_LOGITS_PATH"]
    student.append(tmp_path / "store")
    assert training.run(tmp_path, *student, part) == 0
    assert "skipped" not in capsys.readouterr().out
    assert training.run(tmp_path, *student, "DATA.SUBSET 1.0", flags=("--tag", "whole")) == 2
    assert "it was saved with DATA.SUBSET 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("mixing", ["", "AUG.MIXUP 0 AUG.CUTMIX 0"])
def test_a_store_of_what_is_not_held_out(mixing, tmp_path, capsys):
    """Whoever holds out less is told; whoever holds out more, what is skipped."""
    part = "DATA.HELD_OUT 0.3 DATA.BATCH_SIZE 2"
    assert saving.run(tmp_path / "store", part, mixing, "TRAIN.EPOCHS 1") == 0
    student = ["TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 DATA.BATCH_SIZE 2"]
    student += ["DISTILL.TEACHER_LOGITS_PATH", tmp_path / "store"]
    assert training.run(tmp_path, *student) == 2
    assert "it was saved with DATA.HELD_OUT 0.3\n" in capsys.readouterr().err
    assert training.run(tmp_path, *student, "DATA.HELD_OUT 0.5") == 0
    skipped = "skipped in epoch 0: they are not in the data)"
    if not mixing:
        skipped = skipped.replace("they", "they or their partner")
    assert skipped in capsys.readouterr().out
