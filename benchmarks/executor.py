"""Augmenting on the device against augmenting in the loader's processes: bits, then speed.

    python -m benchmarks.executor                    # on a GPU: about 5 minutes
    python -m benchmarks.executor --batch 8 --images 64 --workers 1 --steps 2 --model tiny

First every executed batch is compared with Pillow's bits. Then: milliseconds of a batch on the
device beside those of a training step; processor milliseconds that a worker spends on an image;
images a second of whole trainings by main.py's own `train_step`, from JPEG files, with both
executors in turn. The report goes to stdout as JSON.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import main
from benchmarks.augment import open_photo, photo
from benchmarks.model import step
from benchmarks.timing import machine, report
from configs import load_config
from data.augment import AugmentDecoder
from data.augment.device import apply_batch
from data.replay import Batch, on_device
from logger import create_logger
from utils import Distributed, StopRequest, choose_device, choose_kernels, time_calls

PHOTOS = 64  # different ones; further files hold the same
TINY = "MODEL.TINY_VIT.DEPTHS [1,1,1,1] MODEL.TINY_VIT.NUM_HEADS [1,1,1,1] DATA.IMG_SIZE 64"
TINY += " MODEL.TINY_VIT.WINDOW_SIZES [2,2,2,2] MODEL.TINY_VIT.EMBED_DIMS [8,16,16,16]"


def write_images(folder: Path, count: int) -> None:
    """JPEG files in the layout of ImageNet, ten classes."""
    photos = [photo(seed) for seed in range(min(PHOTOS, count))]
    for split, images in (("train", count), ("val", 10)):
        for i in range(images):
            path = folder / split / f"class{i % 10}" / f"{i:06d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < len(photos):
                path.write_bytes(photos[i])
            else:
                j = i % len(photos)
                path.hardlink_to(folder / split / f"class{j % 10}" / f"{j:06d}.JPEG")


def compare(decoder: AugmentDecoder, device: torch.device, batch: int) -> dict[str, object]:
    """Whether the device makes Pillow's bits, and what a worker spends with either executor."""
    images = [open_photo(photo(seed)) for seed in range(min(batch, PHOTOS))]
    images = [images[i % len(images)] for i in range(batch)]
    start = time.process_time()
    expected = torch.stack([decoder.decode(image, seed) for seed, image in enumerate(images)])
    decoding = time.process_time() - start
    start = time.process_time()
    packed = decoder.pack(images, range(batch))
    packing = time.process_time() - start
    data = photo(0)
    start = time.process_time()
    for _ in range(batch):
        open_photo(data)
    opening = time.process_time() - start
    found = decoder.decode_batch(images, range(batch), device).cpu()
    ready = packed.to(device)
    seconds = time_calls(lambda: apply_batch(ready), device, 20)
    return {
        "equal_bits": torch.equal(found, expected),
        "worker_ms_per_image": {
            "JPEG": 1000 * opening / batch,
            "decode": 1000 * decoding / batch,
            "cut_and_pack": 1000 * packing / batch,
        },
        "bytes_per_image": packed.buffer.numel() / batch,
        "apply_batch_ms": 1000 * statistics.median(seconds),
    }


def begin(words: list[str], device: torch.device) -> tuple[main.Training, Iterator[Batch]]:
    """A training by main.py before its first step, and its batches."""
    log = create_logger(None, rank=1)  # which has nothing to say
    world = Distributed(device=device)
    choose_kernels(False, device)
    run = main.build_training(load_config(words), world, log, StopRequest())
    main.set_training_mode(run.model, False, False)
    return run, on_device(run.loader.batches(0), device)


def train(words: list[str], device: torch.device, steps: int) -> dict[str, float]:
    """Images a second of a training and the share spent waiting, after the batches that workers
    can have made while the first step was slow.
    """
    run, batches = begin(words, device)
    warm_up = 1 + run.cfg.DATA.NUM_WORKERS * run.cfg.DATA.PREFETCH
    for index in range(warm_up + steps):
        if index == warm_up:
            wait(device)
            begun, waited = time.perf_counter(), run.loader.waited
        run.meters.add(main.train_step(run, batches))
        run.progress.step += 1
    wait(device)
    seconds = time.perf_counter() - begun
    waiting = (run.loader.waited - waited) / seconds
    images = steps * run.plan.per_update
    return {"images_per_second": images / seconds, "data_wait": waiting}


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_times(words: list[str], device: torch.device) -> dict[str, float]:
    """Milliseconds of a training step whose batch lies ready, and of the model's part in it."""
    run, batches = begin(words, device)
    batch = next(batches)
    size = run.cfg.DATA.IMG_SIZE
    images = torch.randn(run.plan.per_process, 3, size, size, device=device)
    if run.cfg.TRAIN.CHANNELS_LAST:
        images = images.contiguous(memory_format=torch.channels_last)
    dtype = "float32" if run.dtype is None else "bfloat16"
    parts = {
        "step_ms": lambda: main.train_step(run, iter([batch] * run.plan.accumulation)),
        "model_ms": step(run.network, images, "training step", dtype),
    }
    return {
        name: 1000 * statistics.median(time_calls(part, device, 20, 10.0))
        for name, part in parts.items()
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto")
    add("--batch", type=int, default=256)
    add("--images", type=int, default=16384, help="JPEG files that are trained on")
    add("--workers", type=int, nargs="+", default=[4, 8, 16])
    add("--steps", type=int, default=40, help="updates of each training that are timed")
    add("--compiled", action="store_true", help="then the device executor beside a compiled model")
    add("--model", choices=["5m", "11m", "21m", "tiny"], default="5m")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Bits and milliseconds, then each training."""
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", args.images)
        name = "5m" if args.model == "tiny" else args.model
        recipe = Path(main.__file__).parent / f"configs/1k/tiny_vit_{name}.yaml"
        words = ["--cfg", str(recipe), "--data-path", f"{folder}/images"]
        words += ["--batch-size", str(args.batch), "--output", f"{folder}/output"]
        words += ["--device", device.type, "--opts", "DATA.INDEX_DIR", f"{folder}/index"]
        words += ["TRAIN.AUTO_RESUME", "False", "AUG.MIXUP_MODE", "pair2"]
        words += TINY.split() if args.model == "tiny" else []
        one = [*words, "DATA.NUM_WORKERS", "0", "TRAIN.COMPILE", "False"]
        yield compare(AugmentDecoder.from_config(load_config(one)), device, args.batch)
        yield step_times(one, device)
        runs = [(e, workers, False) for workers in args.workers for e in ("pillow", "device")]
        if args.compiled:
            runs.append(("device", args.workers[len(args.workers) // 2], True))
        for executor, workers, is_compiled in runs:
            chosen = f"AUG.EXECUTOR {executor} DATA.NUM_WORKERS {workers}".split()
            chosen += ["TRAIN.COMPILE", str(is_compiled)]
            name = f"{executor}, {workers} workers{', compiled' if is_compiled else ''}"
            yield {name: train([*words, *chosen], device, args.steps)}


if __name__ == "__main__":
    options = parse()
    found = {"model": options.model, "batch": options.batch}
    for part in measure(options):
        found |= part
    report({**found, **machine()})
