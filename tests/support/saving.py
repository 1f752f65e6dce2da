"""save_logits.py for tests: in this process, or as processes that can be killed; what it wrote; and
stores in the original's layout.
"""

import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.support.helpers import ROOT, free_port, quick_context

IMAGES = 43  # odd, so that one image is its own partner
OPTS = [
    "MODEL.TYPE",
    "tests.support.teachers:glance",
    "DATA.DATASET",
    "shapes",
    "DATA.SHAPES.TRAIN_IMAGES",
    IMAGES,
    "DATA.SHAPES.VAL_IMAGES",
    20,
    "DATA.SHAPES.SIZE",
    40,
    "DATA.IMG_SIZE",
    40,
    "DATA.BATCH_SIZE",
    8,
    "DATA.NUM_WORKERS",
    0,
    "DATA.WORKER_START",
    "fork",
    "TRAIN.EPOCHS",
    1,
    "DEVICE",
    "cpu",
]


def command(store: Path | str, *opts: object, flags: Sequence[str] = ("--skip-eval",)) -> list[str]:
    """The arguments of save_logits.py for a small store of shapes; later `opts` win."""
    root = Path(store).parent
    opts = [*OPTS, "OUTPUT", root / "output", "DISTILL.TEACHER_LOGITS_PATH", store, *opts]
    return [*map(str, flags), "--opts", *map(str, opts)]


def run(store: Path | str, *opts: object, flags: Sequence[str] = ("--skip-eval",)) -> int:
    """The exit code of save_logits.py, run in this process."""
    from save_logits import main

    return main(command(store, *opts, flags=flags))


class Ended(NamedTuple):
    """How the processes of a job ended."""

    codes: list[int]
    text: str  # all that they wrote, one process after the other

    def expect(self, codes: list[int], *texts: str) -> None:
        """Assert the exit codes, that all these texts were written, and that nobody saw a traceback
        of ours.
        """
        assert self.codes == codes, f"{self.codes}:\n{self.text}"
        missing = [text for text in (*texts,) if text not in self.text]
        assert not missing and 'save_logits.py", line' not in self.text, (
            f"without {missing}:\n{self.text}"
        )


class Job:
    """save_logits.py as processes of its own, one a rank, killed at the latest when the context is
    left.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        world: int = 1,
        folders: Sequence[Path] = (),
        env: dict[str, str] | None = None,
        prepare: str = "",
    ) -> None:
        """`folders` are where each rank starts, `prepare` is Python that each process runs first."""
        context, self.log = quick_context(), Path(arguments[arguments.index("OUTPUT") + 1])
        self.log.mkdir(parents=True, exist_ok=True)
        self.log /= f"job-{time.monotonic_ns()}"
        shared = {"OMP_NUM_THREADS": "1", **(env or {})}
        if world > 1:
            shared |= {
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
            folder = str(folders[rank]) if folders else str(ROOT)
            self.ranks.append(
                context.Process(
                    target=_run_program,
                    args=(list(arguments), own, folder, f"{self.log}.{rank}", prepare),
                )
            )
            self.ranks[-1].start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def text(self) -> str:
        """What has been written so far."""
        paths = (Path(f"{self.log}.{rank}") for rank in range(len(self.ranks)))
        return "\n".join(path.read_text() for path in paths if path.exists())

    def wait(self, seconds: float = 60) -> Ended:
        """Wait for all processes to end by themselves."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        assert all(process.exitcode is not None for process in self.ranks), (
            f"still running after {seconds} s:\n{self.text()}"
        )
        return Ended([process.exitcode for process in self.ranks], self.text())


def finish(arguments: Sequence[str], world: int = 1, **how) -> Ended:
    """Run a job to its end."""
    with Job(arguments, world, **how) as job:
        return job.wait()


def wait_for(condition, job: Job, seconds: float = 60) -> None:
    """Wait until something holds while a job runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and any(process.is_alive() for process in job.ranks), (
            f"in vain:\n{job.text()}"
        )
        time.sleep(0.01)


def sealed_bytes(store: Path) -> dict[str, bytes]:
    """The sealed epochs by file name."""
    return {path.name: path.read_bytes() for path in sorted(store.glob("epoch_*.npy"))}


def write_upstream(
    root: Path, epochs: dict[int, np.ndarray], keys: Sequence[str] | None = None, order=None
) -> None:
    """Records of whole epochs in the original's layout; keys are positions as text unless given."""
    for epoch, records in epochs.items():
        k = records["index"].shape[1]
        folder = root / f"logits_top{k}_epoch{epoch}"
        folder.mkdir(parents=True)
        rows = np.arange(len(records)) if order is None else np.asarray(order)
        plain = np.empty(
            len(rows), np.dtype([("seed", "<i4"), ("index", "<i2", (k,)), ("prob", "<f2", (k,))])
        )
        for name in plain.dtype.names:
            plain[name] = records[name][rows]
        (folder / "rank0-values.bin").write_bytes(plain.tobytes())
        (folder / "rank0-keys.txt").write_text(
            "".join(f"{keys[row] if keys else row}\n" for row in rows)
        )


def _run_program(
    arguments: list[str], env: dict[str, str], folder: str, log: str, prepare: str
) -> None:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    exec(prepare, {"__name__": "prepare"})
    from save_logits import main

    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)
