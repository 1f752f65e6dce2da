"""main.py for tests: small runs in this process, or as processes of their own that can be killed;
and what they leave behind.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.jobs import Job, words

TINY_MODEL = words(
    "MODEL.NAME tiny MODEL.TINY_VIT.DEPTHS [1,1,1,1] MODEL.TINY_VIT.NUM_HEADS [1,1,1,1]",
    "MODEL.TINY_VIT.WINDOW_SIZES [2,2,2,2] MODEL.TINY_VIT.EMBED_DIMS [8,16,16,16]",
)
OPTS = words(
    *TINY_MODEL,
    "DATA.DATASET shapes DATA.SHAPES.TRAIN_IMAGES 43 DATA.SHAPES.VAL_IMAGES 20 DATA.IMG_SIZE 40",
    "DATA.SHAPES.SIZE 40 DATA.BATCH_SIZE 8 DATA.NUM_WORKERS 0 DATA.WORKER_START fork DEVICE cpu",
    "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 TRAIN.BASE_LR 0.1 TRAIN.CHECKPOINT_MINUTES 0",
    "PRINT_FREQ 1",
)


def command(output: Path | str, *opts: object, flags: Sequence[object] = ()) -> list[str]:
    """The arguments of main.py for a small run on shapes; later `opts` win."""
    return words(*flags, "--opts", *OPTS, "OUTPUT", Path(output), *opts)


def run(output: Path | str, *opts: object, flags: Sequence[object] = ()) -> int:
    """The exit code of main.py, run in this process."""
    from main import main

    return main(command(output, *opts, flags=flags))


def job(
    output: Path | str, *opts: object, flags: Sequence[object] = (), world: int = 1, **how: Any
) -> Job:
    """main.py as processes of its own, one a rank."""
    return Job("main", command(output, *opts, flags=flags), world, **how)


def finish(output: Path | str, *opts: object, **how: Any) -> str:
    """Run a job to its good end; what rank 0 wrote."""
    with job(output, *opts, **how) as started:
        codes, text = started.wait()
        assert not any(codes), f"{codes}\n{text}"
        return started.text(0)


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


def checkpoint(output: Path | str, name: str = "last.pth", tag: str = "default") -> Path:
    """The path of a checkpoint."""
    return folder(output, tag) / "checkpoints" / name


def state(output: Path | str, name: str = "last.pth", tag: str = "default") -> dict[str, Any]:
    """A checkpoint."""
    return torch.load(checkpoint(output, name, tag), weights_only=True)


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


RECORD = """
import os
from tests.support.training import recorded
main.train_step = recorded(main.train_step, os.environ["RECORD"], rank)
"""


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
