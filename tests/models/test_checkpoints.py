"""Checkpoints: on real files, damaged ones and full disks among them."""

import copy
import errno
import hashlib
import math
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoints import (
    Saver,
    load_checkpoint,
    load_state,
    newest_valid,
    restore,
    save_also,
    save_atomic,
    snapshot,
)
from models.pretrained import save_weights
from tests.support.fake_cuda import Watch, fake_cuda, on_fake
from utils import grad_scaler


def state(step: int = 3) -> dict:
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": grad_scaler(torch.device("cpu"), torch.float16).state_dict(),
        "step": step,
        "note": ["text", 1.5, None, True, (1, 2), b"bytes"],
    }


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and a.dtype == b.dtype
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for one, other in zip(a, b):
            assert_equal(one, other)
    else:
        assert a == b and type(a) is type(b)


def test_a_checkpoint_comes_back_equal_and_leaves_nothing_else(tmp_path):
    saved, path = state(), tmp_path / "a b.pth"
    save_atomic(saved, path)
    assert_equal(saved, load_checkpoint(path))
    save_atomic({"step": 4}, path)
    assert load_checkpoint(path) == {"step": 4}
    assert os.listdir(tmp_path) == ["a b.pth"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"model": nn.Linear(2, 2)}, r"state\['model'\] is a .*torch.nn.modules.linear.Linear"),
        ({"lr": [0.1, np.float64(0.1)]}, r"state\['lr'\]\[1\] is a .*numpy.float64"),
        (
            {"a": {"b": nn.Parameter(torch.ones(1))}},
            r"state\['a'\]\['b'\] is a .*torch.nn.parameter.Parameter",
        ),
        ({"path": Path("x")}, r"state\['path'\] is a .*pathlib"),
        ({(1, 2): 3}, r"state has the key \(1, 2\)"),
    ],
)
def test_only_plain_values_are_saved(value, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        save_atomic(value, tmp_path / "c.pth")
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import os, resource, signal, sys, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from models import checkpoints
checkpoints.save_atomic({"step": 1, "w": torch.zeros(1000)}, "c.pth")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("c.pth", "d.pth"):
    try:
        checkpoints.save_atomic({"step": 2, "w": torch.zeros(1_000_000)}, name)
    except OSError as error:
        print(error.errno, error, sep="|")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_failed_write_keeps_the_old_file_and_no_temporary(tmp_path, root):
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    message = f"{errno.EFBIG}|[Errno {errno.EFBIG}] can't write the checkpoint (File too large)"
    assert done.stdout.splitlines() == [
        f"{message}; the file that was there is unchanged: 'c.pth'",
        f"{message}: 'd.pth'",
    ], done.stderr
    assert os.listdir(tmp_path) == ["c.pth"]
    assert load_checkpoint(tmp_path / "c.pth")["step"] == 1


def test_a_full_disk_and_a_missing_folder_say_so(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="can't write the checkpoint .No such file or directory"):
        save_atomic({"step": 1}, tmp_path / "no" / "c.pth")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="can't write the checkpoint .No space left on device"
    ) as raised:
        save_atomic({"step": 1}, tmp_path / "c.pth")
    assert raised.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    save_atomic({"step": 1}, tmp_path / "c.pth")

    def fails(source, target):
        assert load_checkpoint(source) == {"step": 2}  # whole before it takes the name
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Permission denied.*; the file that was there is unchanged"):
        save_atomic({"step": 2}, tmp_path / "c.pth")
    assert os.listdir(tmp_path) == ["c.pth"] and load_checkpoint(tmp_path / "c.pth") == {"step": 1}


def test_other_failures_while_saving_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        save_atomic({"step": 1}, tmp_path / "c.pth")
    assert os.listdir(tmp_path) == []


def progressed(step: int, best: float) -> dict:
    return {"step": step, "progress": {"best": best}, "w": torch.full((1000,), float(step))}


def test_a_checkpoint_holds_the_moment_it_was_begun_at_and_is_whole_or_the_old_one(
    tmp_path, monkeypatch
):
    gate, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: gate.wait(20) and sync(descriptor))
    saver, path = Saver(tmp_path, print), tmp_path / "last.pth"
    assert saver.wait() == (True, -1.0)
    gate.set()
    saver.begin(progressed(1, 10.0), ["last.pth"])
    assert saver.wait() == (True, 10.0)
    gate.clear()
    live = progressed(2, 20.0)
    moment = copy.deepcopy(live)
    saver.begin(live, ["best.pth", "last.pth"])
    live["w"].zero_()  # training goes on
    live["progress"]["best"] = live["step"] = 3
    assert_equal(load_checkpoint(path), progressed(1, 10.0))
    gate.set()
    assert saver.wait() == saver.wait() == (True, 20.0)
    saver.close()
    assert_equal(load_checkpoint(path), moment)
    assert path.samefile(tmp_path / "best.pth") and len(os.listdir(tmp_path)) == 2


def test_a_checkpoint_that_is_not_written_is_told_and_changes_nothing(tmp_path, monkeypatch):
    lines: list[str] = []
    saver = Saver(tmp_path / "none yet", lines.append)
    saver.begin(progressed(1, 10.0), ["last.pth"])
    assert saver.wait() == (False, -1.0)
    (line,) = lines
    assert line.startswith("NO CHECKPOINT WRITTEN: ") and "No such file" in line
    (tmp_path / "none yet").mkdir()
    saver.begin(progressed(2, 20.0), ["last.pth"])
    assert saver.wait() == (True, 20.0)
    saver.begin(progressed(3, 30.0) | {"path": Path("x")}, ["last.pth"])
    with pytest.raises(AssertionError, match="pathlib"):  # a fault of the program
        saver.wait()
    saver.close()
    assert load_checkpoint(tmp_path / "none yet" / "last.pth")["step"] == 2


def test_a_snapshot_of_a_gpu_is_not_waited_for():
    with fake_cuda() as device:
        model = on_fake(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), device)
        with Watch(device) as watch:
            taken = snapshot({"model": model.state_dict(), "steps": [torch.ones(()), 3]})
    assert watch.blocking == watch.waits == []
    assert {tensor.device.type for tensor in taken["model"].values()} == {"cpu"}
    assert taken["steps"][1] == 3


def test_a_snapshot_keeps_strides_and_shares_nothing():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    flat = torch.arange(10.0)
    taken = snapshot({"a": weight, "b": (flat[2:4], flat[4:])})
    assert_equal(taken, {"a": weight, "b": (flat[2:4], flat[4:])})
    assert taken["a"].stride() == weight.stride()
    assert len(taken["b"][0].untyped_storage()) == 8


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_damaged_and_foreign_files_are_errors_that_name_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_atomic(state(), "good.pth")
    whole = Path("good.pth").read_bytes()
    flipped = bytearray(whole)
    flipped[
        whole.index(load_checkpoint("good.pth")["model"]["0.weight"].numpy().tobytes()) + 17
    ] ^= 1
    damaged = {
        "empty": b"",
        "short": whole[: len(whole) // 2],
        "almost": whole[:-3],
        "text": b"not a checkpoint at all",
        "flipped": bytes(flipped),
    }
    for name, content in damaged.items():
        Path(f"{name}.pth").write_bytes(content)
    torch.save({"step": Evil()}, "evil.pth")
    torch.save([1, 2], "list.pth")
    for name in (*damaged, "evil"):
        with pytest.raises(
            ValueError,
            match=rf"{name}\.pth: (not a|refused: it .*) checkpoint, or a damaged one|asks for",
        ):
            load_checkpoint(f"{name}.pth")
    assert not Path("executed").exists()
    with pytest.raises(
        ValueError, match=r"list\.pth is a list instead of a training state: use another one"
    ):
        load_checkpoint("list.pth")
    with pytest.raises(ValueError, match=r"none\.pth: there is no such checkpoint file"):
        load_checkpoint("none.pth")


def test_a_state_is_more_than_weights_and_belongs_to_one_model(tmp_path):
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    save_weights(model, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match="model.safetensors holds no .*: take its weights with --pretrained"
    ):
        load_state(tmp_path / "model.safetensors")
    restore(model, other.state_dict())
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(
        ValueError,
        match=r"the checkpoint is of another Linear \(Missing key.*: begin another run with --tag",
    ):
        restore(model, {"weight": other.weight})


@pytest.mark.parametrize("has_links", [True, False])
def test_a_second_name_is_a_link_or_a_copy(has_links, tmp_path, monkeypatch):
    save_atomic({"step": 1}, tmp_path / "last.pth")
    (tmp_path / "best.pth").write_bytes(b"an older one")
    if not has_links:
        monkeypatch.setattr(
            os,
            "link",
            lambda source, target: (_ for _ in ()).throw(
                PermissionError(errno.EPERM, "no links here")
            ),
        )
    save_also(tmp_path / "last.pth", tmp_path / "best.pth")
    assert load_checkpoint(tmp_path / "best.pth") == {"step": 1} and sorted(
        os.listdir(tmp_path)
    ) == ["best.pth", "last.pth"]
    assert (tmp_path / "best.pth").samefile(tmp_path / "last.pth") == has_links


def whole_state(step: int) -> dict:
    plain = {key: {} for key in ("optimizer", "scaler", "progress", "measured")}
    numbers = {"step": step, "metric_lines": 0}
    weights = {"model": {"w": torch.arange(10_000)}, "model_ema": None}
    return {**plain, **numbers, **weights, "config": "TAG: a"}


def test_the_newest_valid_checkpoint_is_the_furthest_one_that_is_whole(tmp_path):
    lines: list[str] = []
    assert newest_valid(tmp_path / "no such folder", lines.append)[0] is None
    assert newest_valid(tmp_path, lines.append)[0] is None
    # written, so dated, in another order than that of the steps
    for number, step in (("9", 90), ("10", 100), ("2", 20)):
        save_atomic(whole_state(step), tmp_path / f"epoch_{number}.pth")
    assert newest_valid(tmp_path, lines.append)[0] == tmp_path / "epoch_10.pth"
    save_atomic(whole_state(100), tmp_path / "a_copy.pth")
    os.utime(tmp_path / "a_copy.pth", (1, 1))
    assert newest_valid(tmp_path, lines.append)[0] == tmp_path / "epoch_10.pth"
    (tmp_path / "a_copy.pth").unlink()
    assert lines == []
    whole = (tmp_path / "epoch_10.pth").read_bytes()
    (tmp_path / "epoch_10.pth").write_bytes(whole[:-1])
    (tmp_path / "epoch_11.pth").write_bytes(b"")
    save_atomic({"model": {}}, tmp_path / "best.pth")
    assert newest_valid(tmp_path, lines.append)[0] == tmp_path / "epoch_9.pth"
    assert {line.split(".pth")[0].split("/")[-1] for line in lines} == {
        "epoch_10",
        "epoch_11",
        "best",
    }
    assert all(line.startswith("skipped: ") for line in lines)
    for name in ("epoch_9", "epoch_2"):
        (tmp_path / f"{name}.pth").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="none of the checkpoints there can be used"):
        newest_valid(tmp_path, lines.append)


def test_a_flipped_bit_in_the_newest_checkpoint_is_noticed(tmp_path):
    save_atomic(whole_state(1), tmp_path / "old.pth")
    save_atomic(whole_state(2), tmp_path / "new.pth")
    content = bytearray((tmp_path / "new.pth").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "new.pth").write_bytes(content)
    lines: list[str] = []
    assert newest_valid(tmp_path, lines.append)[0] == tmp_path / "old.pth"
    assert len(lines) == 1 and "new.pth" in lines[0] and "checksum" in lines[0]


def test_old_safe_containers_are_read_too(tmp_path):
    save_atomic({"model": OrderedDict(a=torch.ones(2))}, tmp_path / "c.pth")
    assert torch.equal(load_checkpoint(tmp_path / "c.pth")["model"]["a"], torch.ones(2))


def spoil(path: Path, how: str) -> None:
    """Put something at a path that is no checkpoint a training could go on from."""
    whole = whole_state(7)
    changes = {
        "a step of 10^30": {"step": 10**30},
        "a step that is no number": {"step": math.nan},
        "an endless step": {"step": math.inf},
        "a step below 0": {"step": -1},
        "a step in words": {"step": "12"},
        "a step that is true": {"step": True},
        "a step that is a tensor": {"step": torch.tensor(9)},
        "no weights": {"model": None},
        "numbered weights": {"model": {1: torch.ones(2)}},
        "averages in words": {"model_ema": {"w": "text"}},
        "a configuration that is no text": {"config": 5},
        "a list as progress": {"progress": []},
    }
    if how in changes:
        torch.save({**whole, **changes[how]}, path)
    elif how == "a FIFO":
        os.mkfifo(path)
    elif how == "a dangling link":
        path.symlink_to("nowhere")
    elif how == "a link to itself":
        path.symlink_to(path.name)
    elif how == "a folder":
        path.mkdir()
    elif how == "an old file":
        torch.save({**whole, "step": 99}, path, _use_new_zipfile_serialization=False)
    elif how == "a list":
        torch.save([1, 2], path)
    else:
        assert how == "weights alone"
        torch.save({"model": {"w": torch.ones(2)}}, path)


SPOILT = [
    *("a step of 10^30", "a step that is no number", "an endless step", "a step below 0"),
    *("a step in words", "a step that is true", "a step that is a tensor", "no weights"),
    *("numbered weights", "averages in words", "a FIFO", "a dangling link", "a link to itself"),
    *("a configuration that is no text", "a list as progress"),
    *("a folder", "an old file", "a list", "weights alone"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs and links")
@pytest.mark.parametrize("how", SPOILT)
def test_nothing_in_the_folder_blocks_a_good_checkpoint(how, tmp_path):
    save_atomic(whole_state(5), tmp_path / "last.pth")
    for name in ("best", "epoch_0009", "epoch_0001", "foreign"):
        spoil(tmp_path / f"{name}.pth", how)
    lines: list[str] = []
    assert newest_valid(tmp_path, lines.append)[0] == tmp_path / "last.pth"
    assert all(line.startswith("skipped: ") and "\n" not in line for line in lines)
    (tmp_path / "last.pth").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints there can be used"):
        newest_valid(tmp_path, lines.append)  # rather than begin anew: they may be work
    assert len({line.split(".pth")[0] for line in lines}) == 4


def test_checkpoints_of_other_names_come_after_a_trainings_own(tmp_path):
    save_atomic(whole_state(5), tmp_path / "last.pth")
    save_atomic(whole_state(8), tmp_path / "another_run.pth")
    assert newest_valid(tmp_path, pytest.fail)[0] == tmp_path / "last.pth"
    (tmp_path / "last.pth").write_bytes(b"")
    assert newest_valid(tmp_path, lambda line: None)[0] == tmp_path / "another_run.pth"


def test_a_checkpoint_can_be_pinned(tmp_path):
    path = tmp_path / "last.pth"
    save_atomic(whole_state(5), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_state(f"{path}@sha256={digest[:8]}")["step"] == 5
    with pytest.raises(ValueError, match=f"last.pth: its sha256 is {digest}, not '0123456789'"):
        load_state(f"{path}@sha256=0123456789")


def test_the_newest_numbered_checkpoints_are_kept_once_one_is_whole(tmp_path, monkeypatch):
    """And the one that the run goes on from, and what another run may have left beyond them."""

    def kept() -> list[int]:
        return sorted(int(path.stem[6:]) for path in tmp_path.glob("epoch_*.pth"))

    for number in (2, 3, 30, 9999, 12345):
        save_atomic(progressed(number, 0.0), tmp_path / f"epoch_{number:04d}.pth")
    saver = Saver(tmp_path, print, 2, tmp_path / "epoch_0003.pth")
    saver.begin(progressed(31, 0.0), ["last.pth"])
    assert saver.wait()[0] and kept() == [2, 3, 30, 9999, 12345]
    saver.begin(progressed(31, 0.0), ["epoch_0031.pth", "last.pth"])
    assert saver.wait()[0] and kept() == [3, 30, 31, 9999, 12345]

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        saver.begin(progressed(32, 0.0), ["best.pth", "epoch_0032.pth", "last.pth"])
        assert not saver.wait()[0] and kept() == [3, 30, 31, 9999, 12345]
    saver.begin(progressed(10000, 1.0), ["best.pth", "epoch_10000.pth", "last.pth"])
    assert saver.wait()[0] and kept() == [3, 9999, 10000, 12345]
    saver.close()
