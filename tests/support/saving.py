"""save_logits.py for tests, in this process or as others; what it wrote; stores of the original."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.jobs import Ended, Job, words

IMAGES = 43  # odd, so that one image is its own partner
OPTS = words(
    "MODEL.TYPE tests.support.teachers:glance DATA.DATASET shapes DATA.SHAPES.VAL_IMAGES 20",
    f"DATA.SHAPES.TRAIN_IMAGES {IMAGES} DATA.SHAPES.SIZE 40 DATA.IMG_SIZE 40 DATA.BATCH_SIZE 8",
    "DATA.NUM_WORKERS 0 DATA.WORKER_START fork TRAIN.EPOCHS 1 DEVICE cpu",
)


def command(
    store: Path | str, *opts: object, flags: Sequence[object] = ("--skip-eval",)
) -> list[str]:
    """The arguments of save_logits.py for a small store of shapes; later `opts` win."""
    root = Path(store).parent
    places = ["OUTPUT", root / "output", "DISTILL.TEACHER_LOGITS_PATH", Path(store)]
    return words(*flags, "--opts", *OPTS, *places, *opts)


def run(store: Path | str, *opts: object, flags: Sequence[object] = ("--skip-eval",)) -> int:
    """The exit code of save_logits.py, run in this process."""
    from save_logits import main

    return main(command(store, *opts, flags=flags))


def finish(arguments: Sequence[str], world: int = 1, **how: Any) -> Ended:
    """Run save_logits.py as processes of its own to their end."""
    with Job("save_logits", arguments, world, **how) as job:
        return job.wait()


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
