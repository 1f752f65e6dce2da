"""What writing costs: save_logits.py's loop against the same loop of the same teacher without a
store, turn by turn in one run.

    python -m benchmarks.saving [--model 21m] [--batch-size 128] [--classes 21841] [--topk 100]

The batches lie ready in memory, so that no waiting for images hides the cost. Prints JSON: seconds
of both sides and what saving adds."""

import argparse
import logging
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import alternate, machine, report
from configs import load_config
from data.augment.rng import generator, sample_seed
from data.build import RunData
from data.replay import Batch
from data.store import LogitsStoreWriter
from models.class_map import LabelMap
from models.teacher import Teacher, teacher_dtype
from models.tiny_vit import TinyViT
from save_logits import Run, Tally, answers, one_late
from utils import StopRequest, init_distributed

IMAGES = 1 << 20  # in the store; each turn writes some of them


def ready_batches(number: int, size: int, pixels: int, num_classes: int) -> list[Batch]:
    """Batches of noise, as a loader gives them: on the CPU, pinned where there is a GPU."""
    rng = generator(0)
    made = []
    for index in range(number):
        positions = np.arange(index * size, (index + 1) * size)
        image = torch.from_numpy(rng.standard_normal((size, 3, pixels, pixels), dtype=np.float32))
        made.append(
            Batch(
                image.pin_memory() if torch.cuda.is_available() else image,
                torch.from_numpy(rng.integers(0, num_classes, size)),
                torch.tensor([sample_seed(0, 0, int(position)) for position in positions]),
                torch.from_numpy(positions),
                torch.empty(0),
                torch.empty(0),
            )
        )
    return made


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--model",
        default="21m" if on_gpu else "5m",
        help="TinyViT variant: writing shows most beside a fast teacher",
    )
    parser.add_argument("--batch-size", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--batches", type=int, default=40 if on_gpu else 4, help="per turn")
    parser.add_argument("--classes", type=int, default=21841)
    parser.add_argument("--topk", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Time both sides in turn."""
    world = init_distributed(args.device)
    cfg = load_config(["--opts", "AUG.MIXUP_MODE", "pair2"])
    cfg = cfg.replace(
        {
            "MODEL.NUM_CLASSES": args.classes,
            "DISTILL.LOGITS_TOPK": args.topk,
            "DATA.BATCH_SIZE": args.batch_size,
        }
    )
    model = TinyViT.from_config(args.model, num_classes=args.classes)
    dtype = teacher_dtype(cfg, world.device)
    teacher = Teacher("teacher", model, args.classes, dtype=dtype).to(world.device)
    labels = LabelMap(torch.arange(args.classes)).to(world.device)
    data = RunData(cfg, range(IMAGES), None, None)
    run = Run(cfg, world, StopRequest(), logging.getLogger("saving"), data, teacher, labels)
    batches = ready_batches(args.batches, args.batch_size, cfg.DATA.IMG_SIZE, args.classes)

    with tempfile.TemporaryDirectory() as folder:
        identity = {"k": args.topk, "num_classes": args.classes}
        writer = LogitsStoreWriter(
            Path(folder) / "store", {"identity": identity}, [f"image {i}" for i in range(IMAGES)]
        )
        writer.begin_epoch(0)

        in_appending: list[float] = []  # processor seconds of each turn

        def with_writing() -> None:
            in_appending.append(0.0)
            for positions, ready in one_late(answers(run, batches, Tally())):
                records = ready()
                begun = time.process_time()
                writer.append(positions, records)
                in_appending[-1] += time.process_time() - begun

        def without_writing() -> None:
            ((_, records),) = deque(answers(run, batches, Tally()), maxlen=1)
            records()  # waits for the device

        processor: dict[str, list[float]] = {"without writing": [], "saving": []}
        sides = {"without writing": without_writing, "saving": with_writing}
        seconds = alternate(
            {name: partial(counted, side, processor[name]) for name, side in sides.items()},
            args.repeats,
        )
        writer.end_epoch()
        written = len(writer) - len(writer.missing(0))
        assert written == args.batches * args.batch_size
        writer.close()
        bytes_per_image = writer.dtype.itemsize
    images = args.batches * args.batch_size
    # the first two rounds are warm-up
    busy = {name: statistics.median(times[2:]) for name, times in processor.items()}
    return {
        "teacher": f"TinyViT-{args.model}, {teacher.precision}",
        "images_per_turn": images,
        "batch_size": args.batch_size,
        "top_k": f"{args.topk} of {args.classes}",
        "bytes_per_image": bytes_per_image,
        "images_per_second": {
            name: round(images / times["median"], 1) for name, times in seconds.items()
        },
        "seconds_per_turn": seconds,
        "processor_seconds_per_turn": {
            **busy,
            "appending alone": statistics.median(in_appending),
        },
        "saving_adds": (
            f"{seconds['saving']['median'] / seconds['without writing']['median'] - 1:+.2%}"
        ),
        "saving_adds_at_best": (
            f"{seconds['saving']['best'] / seconds['without writing']['best'] - 1:+.2%}"
        ),
        "saving_adds_processor_time": f"{busy['saving'] / busy['without writing'] - 1:+.2%}",
    }


def counted(side: Callable[[], None], seconds: list[float]) -> None:
    """Run one side, and note the processor time of all threads: it tells the cost where other
    programs disturb the clock.
    """
    start = time.process_time()
    side()
    seconds.append(time.process_time() - start)


if __name__ == "__main__":
    report({**measure(parse()), **machine()})
