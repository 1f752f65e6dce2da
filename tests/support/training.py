"""main.py for tests: small runs in this process, or as processes of their own that can be killed;
and what they leave behind.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.support.helpers import ROOT, free_port, quick_context

TINY_MODEL = [
    "MODEL.NAME",
    "tiny",
    "MODEL.TINY_VIT.DEPTHS",
    "[1,1,1,1]",
    "MODEL.TINY_VIT.NUM_HEADS",
    "[1,1,1,1]",
    "MODEL.TINY_VIT.WINDOW_SIZES",
    "[2,2,2,2]",
    "MODEL.TINY_VIT.EMBED_DIMS",
    "[8,16,16,16]",
]
OPTS = [
    *TINY_MODEL,
    "DATA.DATASET",
    "shapes",
    "DATA.SHAPES.TRAIN_IMAGES",
    43,
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
    2,
    "TRAIN.WARMUP_EPOCHS",
    1,
    "TRAIN.BASE_LR",
    0.1,
    "PRINT_FREQ",
    1,
    "DEVICE",
    "cpu",
    "TRAIN.CHECKPOINT_MINUTES",
    0,
]


def command(output: Path | str, *opts: object, flags: Sequence[object] = ()) -> list[str]:
    """The arguments of main.py for a small run on shapes; later `opts` win."""
    return [*map(str, flags), "--opts", *map(str, [*OPTS, "OUTPUT", output, *opts])]


def run(output: Path | str, *opts: object, flags: Sequence[object] = ()) -> int:
    """The exit code of main.py, run in this process."""
    from main import main

    return main(command(output, *opts, flags=flags))


class Job:
    """main.py as processes of its own, one a rank; the context kills those that are left."""

    def __init__(
        self,
        output: Path | str,
        *opts: object,
        flags: Sequence[object] = (),
        world: int = 1,
        prepare: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        """`prepare` is Python that each process runs first."""
        shared = {"OMP_NUM_THREADS": "1", **(env or {})}
        if world > 1:
            shared |= {
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
        arguments, self.log = (
            command(output, *opts, flags=flags),
            Path(output) / f"job-{time.monotonic_ns()}",
        )
        self.log.mkdir(parents=True)
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
            self.ranks.append(
                quick_context().Process(
                    target=_run_program, args=(arguments, own, str(self.log / str(rank)), prepare)
                )
            )
            self.ranks[-1].start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def text(self, rank: int = 0) -> str:
        """What a rank has written to its standard output and error so far."""
        path = self.log / str(rank)
        return path.read_text() if path.exists() else ""

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes of all ranks, when all have ended; after the first has failed the others
        are given little time.
        """
        deadline = time.monotonic() + seconds
        while any(process.exitcode is None for process in self.ranks):
            assert time.monotonic() < deadline, f"still running:\n{self.text()}"
            if any(process.exitcode not in (None, 0) for process in self.ranks):
                deadline = min(deadline, time.monotonic() + 20)
            time.sleep(0.01)
        return [process.exitcode for process in self.ranks]


def finish(output: Path | str, *opts: object, **how: Any) -> str:
    """Run a job to its good end; what rank 0 wrote."""
    with Job(output, *opts, **how) as job:
        codes = job.wait()
        assert not any(codes), f"{codes}\n" + "\n".join(
            job.text(rank) for rank in range(len(codes))
        )
        return job.text()


def folder(output: Path | str, tag: str = "default") -> Path:
    """The run's folder."""
    return Path(output) / "tiny" / tag


def metrics(output: Path | str, tag: str = "default") -> list[dict]:
    """The lines of metrics.jsonl."""
    return [
        json.loads(line)
        for line in (folder(output, tag) / "metrics.jsonl").read_text().splitlines()
    ]


def updates(output: Path | str, tag: str = "default") -> list[dict]:
    """The lines of metrics.jsonl that speak of updates, not of epochs."""
    return [line for line in metrics(output, tag) if "lr" in line]


def state(output: Path | str, name: str = "last.pth", tag: str = "default") -> dict[str, Any]:
    """A checkpoint."""
    return torch.load(folder(output, tag) / "checkpoints" / name, weights_only=True)


def recorded(step: Callable, folder: str, rank: int) -> Callable:
    """`main.train_step`, which also writes the images of each update, with their seeds, partners
    and records, to `folder`.
    """

    def recording(run, batches):
        seen = []

        def watched():
            for batch in batches:
                keys = run.loader.dataset.dataset.get_keys()
                names = [keys[position] for position in batch.position.tolist()]
                partners = [names[i ^ 1] if run.cfg.is_paired else "" for i in range(len(names))]
                records = zip(batch.indices.tolist(), batch.probs.tolist())
                seen.extend(map(list, zip(names, batch.seed.tolist(), partners, records)))
                yield batch

        update = run.progress.update
        result = step(run, watched())
        with open(Path(folder) / f"{rank}-{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps([update, seen]) + "\n")
        return result

    return recording


RECORD = (
    "import os\nfrom tests.support.training import recorded\nmain.train_step ="
    " recorded(main.train_step, os.environ['RECORD'], rank)"
)


def recorded_sets(folder: Path) -> dict[int, list]:
    """For each update the images of all ranks in a fixed order."""
    found: dict[int, list] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            update, images = json.loads(line)
            found.setdefault(update, []).extend(images)
    return {update: sorted(images) for update, images in sorted(found.items())}


def same_bits(a: Any, b: Any) -> bool:
    """Whether nested containers hold equal values, tensors and floats to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each weight to 1e-5 of its tensor's largest (1e-9 where a tensor has hardly left zero)."""
    for key, value in expected.items():
        error, largest = float((found[key] - value).abs().max()), float(value.abs().max())
        assert error <= 1e-5 * largest + 1e-9, f"{key} differs by {error:.3g} at {largest:.3g}"


def _run_program(arguments: list[str], env: dict[str, str], log: str, prepare: str) -> None:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    import main

    exec(prepare, {"main": main, "rank": int(env.get("RANK", 0))})
    code = main.main(arguments)
    sys.stdout.flush()
    sys.exit(code)
