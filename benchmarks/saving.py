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
from data.augment.pairs import PairMix
from data.augment.rng import generator, sample_seed
from data.replay import Batch
from data.store.reader import AsyncAppender, LogitsStoreWriter
from models.distill import as_teacher, teacher_dtype
from models.teacher import Teacher
from models.tiny_vit import TinyViT
from save_logits import Group, Run, Tally, answers
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


def main() -> None:
    """Measure and print."""
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
    args = parser.parse_args()
    world = init_distributed("auto")
    cfg = load_config(["--opts", "AUG.MIXUP_MODE", "pair2"])
    cfg = cfg.replace({"MODEL.NUM_CLASSES": args.classes, "DISTILL.LOGITS_TOPK": args.topk})
    model = as_teacher(TinyViT.from_config(args.model, num_classes=args.classes)).to(world.device)
    teacher = Teacher("teacher", model, args.classes, None, teacher_dtype(cfg, world.device))
    run = Run(
        cfg,
        Group(world),
        StopRequest(),
        logging.getLogger("saving"),
        teacher,
        PairMix.from_config(cfg),
        np.arange(args.classes),
    )
    batches = ready_batches(args.batches, args.batch_size, cfg.DATA.IMG_SIZE, args.classes)

    with tempfile.TemporaryDirectory() as folder:
        identity = {"k": args.topk, "num_classes": args.classes}
        writer = LogitsStoreWriter(
            Path(folder) / "store", {"identity": identity}, [f"image {i}" for i in range(IMAGES)]
        )
        writer.begin_epoch(0)

        in_thread: list[float] = []

        class Watched:
            """The writer, and after each batch the processor time that the writing thread has used
            in this turn.
            """

            def append(self, positions: np.ndarray, records: np.ndarray) -> None:
                writer.append(positions, records)
                in_thread[-1] = time.thread_time()

        def with_writing() -> None:
            in_thread.append(0.0)
            with AsyncAppender(Watched()) as appender:
                for positions, records in run.until_stopped(answers(run, batches, Tally())):
                    appender.append(positions, records)

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
    report(
        {
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
                "writing thread alone": statistics.median(in_thread),
            },
            "saving_adds": (
                f"{seconds['saving']['median'] / seconds['without writing']['median'] - 1:+.2%}"
            ),
            "saving_adds_at_best": (
                f"{seconds['saving']['best'] / seconds['without writing']['best'] - 1:+.2%}"
            ),
            "saving_adds_processor_time": f"{busy['saving'] / busy['without writing'] - 1:+.2%}",
            **machine(),
        }
    )


def counted(side: Callable[[], None], seconds: list[float]) -> None:
    """Run one side, and note the processor time of all threads: it tells the cost where other
    programs disturb the clock.
    """
    start = time.process_time()
    side()
    seconds.append(time.process_time() - start)


if __name__ == "__main__":
    main()
