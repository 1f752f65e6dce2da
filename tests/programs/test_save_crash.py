"""Saving with real processes that are killed, starved or set against each other: clear errors, no
half epoch, and a rerun that finishes.
"""

import contextlib
import io
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import save_logits
from data.augment.rng import sample_seed
from data.images import shapes
from data.store import LogitsStoreReader, LogitsStoreWriter
from tests.support.jobs import Job
from tests.support.mounts import READ_ONLY, alone, mount_small, needs_mounts
from tests.support.saving import IMAGES, command, finish, run, sealed_bytes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
SCRIPTED = "MODEL.TYPE tests.support.teachers:scripted"
SLOW = {"TEACHER_SCRIPT": "import time; time.sleep(0.1)"}


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "it's a store"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """Two epochs of the scripted teacher, written by one process without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    assert run(folder, SCRIPTED, "TRAIN.EPOCHS 2") == 0
    return sealed_bytes(folder)


def parts_size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.glob("epoch_*.parts/*"))


def kill_at_random(arguments: list[str], times: int, seed: int) -> None:
    """Start and SIGKILL a job again and again, each time at another moment of its work."""
    rng = random.Random(seed)
    for _ in range(times):
        with Job("save_logits", arguments, env=SLOW) as job:
            job.wait_for(lambda: "epochs" in job.text())
            time.sleep(rng.uniform(0.0, 2.4 / times))  # all the work takes about 1.2 s
            job.ranks[0].kill()


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.proof)])
def test_killed_again_and_again_the_bytes_are_the_same(store, tmp_path, times):
    """Even with a teacher whose answers depend on the whole batch: what is missing is computed in
    the batches that it belongs to.
    """
    arguments = command(store, "MODEL.TYPE tests.support.teachers:crowd TRAIN.EPOCHS 2")
    kill_at_random(arguments, times, seed=times)
    assert parts_size(store) > 0 or sealed_bytes(store)
    finish(arguments).expect([0])
    assert (
        run(tmp_path / "undisturbed", "MODEL.TYPE tests.support.teachers:crowd TRAIN.EPOCHS 2") == 0
    )
    assert sealed_bytes(store) == sealed_bytes(tmp_path / "undisturbed")
    assert (
        run(
            tmp_path / "other batches",
            "MODEL.TYPE tests.support.teachers:crowd TRAIN.EPOCHS 2 DATA.BATCH_SIZE 6",
        )
        == 0
    )
    assert sealed_bytes(store) != sealed_bytes(tmp_path / "other batches")
    assert not list(store.glob("*.parts")) and not list(store.glob("*.lock"))


def test_another_world_size_finishes_what_a_killed_job_began(store, undisturbed):
    """The seeds are the same; and so are the bytes, with a teacher that looks at each image by
    itself.
    """
    arguments = command(store, SCRIPTED, "TRAIN.EPOCHS 2")
    with Job("save_logits", arguments, 2, env=SLOW) as job:
        job.wait_for(lambda: parts_size(store) > 2000)
    ended = finish([*arguments, "DATA.BATCH_SIZE", "6"], 3)
    ended.expect([0, 0, 0])
    reader = LogitsStoreReader(store)
    for epoch in reader.epochs():
        assert reader.open_epoch(epoch)["seed"].tolist() == [
            sample_seed(0, epoch, i) for i in range(IMAGES)
        ]
    assert sealed_bytes(store) == undisturbed


def test_a_torn_tail_is_computed_again(store, undisturbed):
    arguments = command(store, SCRIPTED, "TRAIN.EPOCHS 2")
    with Job("save_logits", arguments, env=SLOW) as job:
        job.wait_for(lambda: parts_size(store) > 1500)
        job.ranks[0].kill()
        job.ranks[0].join()
    part = max(store.glob("epoch_*.parts/*"), key=lambda path: path.stat().st_size)
    with open(part, "r+b") as file:
        file.truncate(part.stat().st_size - 7)
    with open(store / "epoch_0000.parts" / "0001-garbage.part", "wb") as file:
        file.write(b"TV")
    whole = len(
        LogitsStoreWriter(
            store, LogitsStoreReader(store).manifest, LogitsStoreReader(store).keys
        ).missing(0)
    )
    ended = finish(arguments)
    ended.expect([0], f"epoch 0: {whole} images")  # no other batch is computed again
    assert sealed_bytes(store) == undisturbed and 8 <= whole < IMAGES


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_request_to_stop_keeps_what_is_written(store, undisturbed, name):
    arguments = command(store, SCRIPTED, "TRAIN.EPOCHS 2 DATA.NUM_WORKERS 1")
    with Job("save_logits", arguments, env=SLOW) as job:
        job.wait_for(lambda: parts_size(store) > 1000)
        os.kill(job.ranks[0].pid, getattr(signal, name))
        ended = job.wait()
    ended.expect([75], "stopped on request: what is written is kept")
    assert parts_size(store) > 1000 and not list(store.glob("*.lock"))
    finish(arguments).expect([0])
    assert sealed_bytes(store) == undisturbed


def test_a_killed_rank_ends_the_others(store, undisturbed):
    arguments = command(store, SCRIPTED, "TRAIN.EPOCHS 2")
    script = (
        "import os, signal\nif call == 1 and os.environ['RANK'] == '1': os.kill(os.getpid(),"
        " signal.SIGKILL)"
    )
    ended = finish(arguments, 2, env={"TEACHER_SCRIPT": script})
    ended.expect([2, -signal.SIGKILL], "error: the connection to another process is lost")
    assert not sealed_bytes(store) and parts_size(store) > 0
    finish(arguments, 2).expect([0, 0])
    assert sealed_bytes(store) == undisturbed


def test_a_killed_loader_process_is_named(store, undisturbed):
    arguments = command(store, SCRIPTED, "TRAIN.EPOCHS 2 DATA.NUM_WORKERS 2 DATA.PREFETCH 1")
    # so early that batches are left which nobody has prepared
    script = "import multiprocessing\nif call == 1: multiprocessing.active_children()[0].kill()"
    ended = finish(arguments, env={"TEACHER_SCRIPT": script})
    ended.expect([2], "error: a loader process has died")
    assert not sealed_bytes(store)
    finish(arguments).expect([0])
    assert sealed_bytes(store) == undisturbed


def image_folder(root: Path, count: int = 21) -> Path:
    for split in ("train", "val"):
        for i in range(count):
            path = root / split / shapes.CLASS_NAMES[i % 3] / f"it is {i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shapes.draw(split, i % 3, i, 40).save(path)
    return root


def test_a_corrupt_image_is_named_and_stops_all_ranks(store, tmp_path):
    data = image_folder(tmp_path / "some images")
    broken = data / "train" / shapes.CLASS_NAMES[1] / "it is 010.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    arguments = command(
        store,
        SCRIPTED,
        "DATA.DATASET imagenet DATA.DATA_PATH",
        data,
        "MODEL.NUM_CLASSES 3 DATA.NUM_WORKERS 1",
    )
    ended = finish(arguments, 2)
    ended.expect([2, 2], f"{broken}: can't be decoded")
    assert not sealed_bytes(store)
    broken.write_bytes(whole)
    finish(arguments, 2).expect([0, 0])
    assert len(LogitsStoreReader(store).open_epoch(0)) == 21


def test_an_image_that_breaks_while_the_epoch_runs(store, tmp_path):
    data = image_folder(tmp_path / "images", 24)
    images = sorted((data / "train").rglob("*.png"))
    # rank 1 opens it last of all
    victim = images[torch.randperm(24, generator=torch.Generator().manual_seed(0))[-1]]
    whole = victim.read_bytes()
    arguments = command(
        store,
        SCRIPTED,
        "DATA.DATASET imagenet DATA.DATA_PATH",
        data,
        "MODEL.NUM_CLASSES 3 DATA.NUM_WORKERS 2 DATA.PREFETCH 1 DATA.BATCH_SIZE 2",
    )
    script = (
        f"import os\nif call == 0 and os.environ['RANK'] == '1': open({str(victim)!r},"
        " 'wb').write(b'x')"
    )
    finish(arguments, 2, env={"TEACHER_SCRIPT": script}).expect(
        [2, 2], f"error: {victim}: can't be decoded", "the connection to another process is lost"
    )
    assert not sealed_bytes(store) and parts_size(store) > 300
    victim.write_bytes(whole)
    finish(arguments, 2).expect([0, 0])


def test_a_second_job_keeps_off_an_epoch(store, tmp_path, undisturbed):
    gate = tmp_path / "gate"
    arguments = command(store, SCRIPTED, "TRAIN.EPOCHS 2")
    waiting = {
        "TEACHER_SCRIPT": (
            f"import os, time\nwhile call == 1 and not os.path.exists({str(gate)!r}):"
            " time.sleep(0.01)"
        )
    }
    with Job("save_logits", arguments, env=waiting) as first:
        first.wait_for(lambda: parts_size(store) > 0)
        second = finish(arguments)
        second.expect([2], "epoch_0000.lock: in use by", f"process {first.ranks[0].pid} on")
        third = finish([*arguments, "TRAIN.START_EPOCH", "1"])  # another epoch may be shared out
        third.expect([0])
        gate.touch()
        first.wait().expect([0])
    assert sealed_bytes(store) == undisturbed


def test_ranks_that_do_not_see_the_same_folder(tmp_path):
    """Each rank starts in a folder of its own, where the relative path of the store means another
    place.
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    arguments = command("store", SCRIPTED, "OUTPUT", tmp_path / "output")
    impatient = (
        "import functools, save_logits; join = save_logits.LogitsStoreWriter.join;"
        " save_logits.LogitsStoreWriter.join = functools.partial(join, attempts=2)"
    )
    ended = finish(arguments, 2, folders=folders, prepare=impatient)
    ended.expect([2, 2], "error: store: the store's folder is not shared by all nodes")
    assert not list(tmp_path.glob("b/store/*")) and not list(tmp_path.glob("a/store/epoch*"))


def test_a_rank_on_a_machine_that_augments_otherwise(store):
    drifted = (
        "import os, data.augment.decoder\nif os.environ['RANK'] == '1':"
        " data.augment.decoder.AugmentDecoder.canary = lambda self: {}"
    )
    ended = finish(command(store, SCRIPTED), 2, prepare=drifted)
    ended.expect(
        [2, 2],
        f"error: this machine does not augment as the writer of the store {store} (rank 0) did",
    )
    assert not list(store.glob("*"))


# ---- file systems of a test's own, seen by one process alone


def said(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a run in this process."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as text,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        return save_logits.main(arguments), text.getvalue()


def on_a_full_disk(folder: str, arguments: list[str]) -> dict:
    """In a process of its own: what happens when the disk fills up during an epoch, and after room
    was made again.
    """
    try:
        mount_small(Path(folder), 512)
    except OSError as error:
        return {"skip": str(error)}
    filler, store = Path(folder) / "filler", Path(folder) / "store"
    os.environ["TEACHER_SCRIPT"] = (
        f"if call == 2: open({str(filler)!r}, 'wb', buffering=0).write(bytes(1 << 20))"
    )
    full = said(arguments)
    left = parts_size(store), list(sealed_bytes(store))
    filler.unlink()
    os.environ["TEACHER_SCRIPT"] = ""
    return {"full": full, "left": left, "again": said(arguments), "bytes": sealed_bytes(store)}


def on_a_read_only_disk(folder: str, arguments: list[str]) -> dict:
    """In a process of its own: what happens on a disk that can't be written, and after it can."""
    try:
        remount = mount_small(Path(folder), 512)
    except OSError as error:
        return {"skip": str(error)}
    remount(READ_ONLY)
    refused = said(arguments)
    remount(0)
    return {"refused": refused, "again": said(arguments)}


@needs_mounts
def test_a_disk_that_fills_up(tmp_path):
    (tmp_path / "disk").mkdir()
    large = (SCRIPTED, "MODEL.NUM_CLASSES 1000 DISTILL.LOGITS_TOPK 100 OUTPUT", tmp_path)
    result = alone(
        on_a_full_disk, str(tmp_path / "disk"), command(tmp_path / "disk" / "store", *large)
    )
    assert run(tmp_path / "undisturbed", *large) == 0
    code, text = result["full"]
    assert (
        code == 2
        and text.startswith("error: ")
        and "can't be written (No space left on device)" in text
        and "free some space" in text
    )
    assert result["left"][0] > 0 and result["left"][1] == []
    assert result["again"][0] == 0 and result["bytes"] == sealed_bytes(tmp_path / "undisturbed")


@needs_mounts
def test_a_folder_that_is_read_only(tmp_path):
    (tmp_path / "disk").mkdir()
    result = alone(
        on_a_read_only_disk,
        str(tmp_path / "disk"),
        command(tmp_path / "disk" / "store", SCRIPTED, "OUTPUT", tmp_path),
    )
    code, text = result["refused"]
    assert (
        code == 2
        and text.startswith("error: ")
        and text.count("\n") == 1
        and "can't be written (Read-only file system)" in text
    )
    assert result["again"][0] == 0


def test_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "store", "OUTPUT", tmp_path) == 2
    assert "can't be written (Not a directory)" in capsys.readouterr().err
