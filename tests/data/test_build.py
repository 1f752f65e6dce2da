"""What a run opens: everything once; and what its loader does with faults in its workers."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from configs import load_config
from data.build import loader_processes, open_run
from tests.support import saving, training
from tests.support.helpers import ROOT
from tests.support.jobs import words
from tests.support.mounts import alone, mount_small, needs_mounts

COUNTED = """
from pathlib import Path
from PIL import Image

class Drawn:
    class_names = ["dark", "light"]
    def __init__(self, count): self.targets = [i % 2 for i in range(count)]
    def __len__(self): return len(self.targets)
    def __getitem__(self, i): return Image.new("RGB", (48, 40), (255 * (i % 2), i, 0)), i % 2

def drawn(cfg, split):
    with open(cfg.DATA.DATA_PATH, "a") as file:
        file.write(split + "\\n")
    return Drawn(24)
"""


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Path:
    """The file in which a user's function notes for which split it was called."""
    (tmp_path / "theirs.py").write_text(COUNTED)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("theirs", None)
    return tmp_path / "calls.txt"


def test_a_training_opens_everything_once(calls, tmp_path):
    flags = ["--data-path", calls]
    assert training.run(tmp_path, "DATA.DATASET theirs:drawn", flags=flags) == 0
    assert sorted(calls.read_text().split()) == ["train", "val"]


def test_saving_and_reading_a_store_open_everything_once(calls, tmp_path):
    opts = ["DATA.DATASET theirs:drawn DATA.DATA_PATH", calls, "TRAIN.EPOCHS 2"]
    store = tmp_path / "store"
    assert saving.run(store, *opts, flags=()) == 0
    assert sorted(calls.read_text().split()) == ["train", "val"]
    calls.unlink()
    opened = []
    from data.store.reader import LogitsStoreReader

    init = LogitsStoreReader.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LogitsStoreReader,
            "__init__",
            lambda self, root: (opened.append(1), init(self, root))[1],
        )
        opts += ["DISTILL.TEACHER_LOGITS_PATH", store]
        assert training.run(tmp_path, *opts) == 0
    assert sorted(calls.read_text().split()) == ["train", "val"]
    assert len(opened) == 1


class Faulty:
    """A data set whose third image can't be read."""

    class_names = ("a", "b")
    num_classes = 2

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            raise ValueError("image 2: broken\nin two lines")
        return Image.new("RGB", (40, 40)), 0


def faulty(cfg, split):
    return Faulty()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_a_worker_keeps_all_of_its_text(workers, tmp_path):
    opts = ["DATA.DATASET tests.data.test_build:faulty DATA.NUM_WORKERS", workers]
    opts += ["DATA.INDEX_DIR", tmp_path, "DATA.IMG_SIZE 40"]
    loader = open_run(load_config(words("--opts", *opts))).train_loader(2)
    with pytest.raises(ValueError, match=r"^image 2: broken\nin two lines$"):
        list(loader.batches(0))
    assert loader.waited > 0


def test_a_worker_that_dies_is_told_by_its_number(tmp_path):
    opts = ["DATA.DATASET shapes DATA.NUM_WORKERS 1 DATA.INDEX_DIR", tmp_path]
    loader = open_run(load_config(words("--opts", *opts))).train_loader(64)
    batches = loader.batches(0)
    next(batches)
    worker = loader._workers[0]
    worker.kill()
    with pytest.raises(ValueError, match=f"a loader process has died .pid {worker.pid}"):
        list(batches)


def pass_over_little_shared_memory(kilobytes: int, executor: str, opts: list[object]) -> dict:
    """With a process's own /dev/shm: the number of an epoch's batches, or the fault."""
    multiprocessing.current_process()._config["daemon"] = False  # so that it may start the loader's
    try:
        mount_small(Path("/dev/shm"), kilobytes)
    except OSError as error:
        return {"skip": str(error)}
    data = open_run(load_config(words("--opts", *opts)))
    try:
        return {"found": len(list(data.train_loader(32, executor=executor).batches(0)))}
    except ValueError as error:
        return {"found": str(error)}


@needs_mounts
@pytest.mark.parametrize("executor", ["pillow", "device"])
def test_shared_memory_that_is_too_small_is_told_in_one_line(executor, tmp_path):
    opts = ["DATA.DATASET shapes DATA.SHAPES.TRAIN_IMAGES 64 DATA.SHAPES.SIZE 40 DATA.IMG_SIZE 40"]
    opts += ["DATA.NUM_WORKERS 1 DATA.WORKER_START fork DATA.INDEX_DIR", tmp_path]
    found = alone(pass_over_little_shared_memory, 100, executor, opts)["found"]
    assert found.startswith("/dev/shm is full") and "--shm-size" in found and "\n" not in found
    assert alone(pass_over_little_shared_memory, 4000, executor, opts) == {"found": 2}


@pytest.mark.parametrize(
    ("cores", "environment", "quota", "expected"),
    [
        (1, {}, None, 1),
        (2, {}, None, 1),
        (8, {}, None, 7),
        (64, {}, None, 16),
        (64, {"LOCAL_WORLD_SIZE": 8}, None, 7),
        (2, {"LOCAL_WORLD_SIZE": 4}, None, 1),
        (64, {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, None, 7),  # not bound to cores
        (8, {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": 64}, None, 7),  # bound
        (64, {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "LOCAL_WORLD_SIZE": 8}, None, 7),
        (64, {}, "max 100000\n", 16),
        (64, {}, "450000 100000\n", 3),
        (64, {}, "50000 100000\n", 1),
    ],
)
def test_loader_processes_follow_from_the_cores_at_hand(
    cores, environment, quota, expected, monkeypatch, tmp_path
):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("data.build.CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    opts = ["--opts", "DATA.DATASET", "shapes"]
    assert loader_processes(load_config(opts)) == expected
    assert loader_processes(load_config([*opts, "DATA.NUM_WORKERS", "0"])) == 0
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)  # where nothing is known
    assert loader_processes(load_config(opts)) == 1


RUN = """
from configs import load_config
from data.build import open_run

if __name__ == "__main__":
    opts = "DATA.DATASET shapes DATA.SHAPES.TRAIN_IMAGES 8 DATA.NUM_WORKERS 1 DATA.WORKER_START {}"
    loader = open_run(load_config(["--opts", *opts.split()])).train_loader(4)
    print(sum(len(batch.seed) for epoch in range(2) for batch in loader.batches(epoch)))
"""


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no fork server"
)
def test_a_program_ends_whose_loader_processes_a_fork_server_started(tmp_path):
    (tmp_path / "run.py").write_text(RUN.format("forkserver"))
    words = [sys.executable, str(tmp_path / "run.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(words, env=env, text=True, capture_output=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "16\n"), ended.stderr
