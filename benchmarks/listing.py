"""Start-up and memory of a run on ImageNet-22k: a list of 14.2 million names, zip files beside it.

    python -m benchmarks.listing                     # some minutes, 1 GB of disk and 3 GB of memory
    python -m benchmarks.listing --images 1000000

The data is made up: as many names and classes as the real list has; each class's zip file is a link
to one small archive. The first start scans the list and all zip files; the second finds what it
needs cached. Each is a process of its own, timed from the end of its imports to the first batch
from loader processes. A worker's memory is its private dirty pages (pages of mapped files are the
page cache's, shared by all processes) after it has decoded some images from all over the list,
beside that of a worker on ten drawn images, which has the same imports. The report goes to stdout
as JSON.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import machine, report
from configs import load_config
from data.build import open_run, resolve

IMAGES = 14_197_122
CLASSES = 21_841
MEMBERS = 650  # of a zip file: the mean of the real ones
WORKERS = 2
DECODED = 500  # images of a worker
MEBIBYTE = 1 << 20


class Measured(Dataset):
    """A data set whose samples come with the private memory of the process that made them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return self.dataset[index].position, os.getpid(), private_bytes()


def private_bytes() -> int:
    """This process's private dirty pages."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:")
        )


def make_data(root: Path, images: int, shuffled: bool) -> None:
    """The list of names, and for each class a zip file."""
    root.mkdir()
    classes = min(CLASSES, images)
    numbers = np.arange(images)
    if shuffled:
        numbers = np.random.Generator(np.random.PCG64(0)).permutation(numbers)
    with open(root / "in22k_image_names.txt", "w") as file:
        for chunk in np.array_split(numbers, max(1, images // MEBIBYTE)):
            file.writelines(
                f"n{number * classes // images:08d}_{number}\n" for number in chunk.tolist()
            )
    first = root / "n00000000.zip"
    pixels = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with io.BytesIO() as buffer, zipfile.ZipFile(first, "w") as archive:
        Image.fromarray(pixels).save(buffer, "JPEG")
        for member in range(MEMBERS):
            archive.writestr(f"n00000000_{member}.jpeg", buffer.getvalue())
    for number in range(1, classes):
        os.link(first, root / f"n{number:08d}.zip")


def config(folder: Path, dataset: str = "imagenet22k", start: str = "auto"):
    """The configuration of a run on the made-up data; the format makes one member of all names."""
    options = {
        "DATA.DATASET": dataset,
        "DATA.INDEX_DIR": folder / "index",
        "DATA.FNAME_FORMAT": "n00000000_7{:.0}.jpeg",
        "DATA.IMG_SIZE": 64,
        "DATA.SHAPES.TRAIN_IMAGES": 10,
        "DATA.SHAPES.SIZE": 64,
        "DATA.BATCH_SIZE": 8,
        "DATA.NUM_WORKERS": WORKERS,
        "DATA.WORKER_START": start,
        "MODEL.NUM_CLASSES": CLASSES,
    }
    pairs = [str(part) for pair in options.items() for part in pair]
    return load_config(["--data-path", str(folder / "data"), "--opts", *pairs])


def start_run(folder: Path) -> dict[str, object]:
    """What a run does before its first step, and how long that takes."""
    begun = time.perf_counter()
    data = open_run(config(folder))
    opened = time.perf_counter()
    size = data.cfg.DATA.BATCH_SIZE
    epochs = data.train_loader(size, 0, size)
    batch = next(epochs.batches(0))
    ended = time.perf_counter()
    assert len(batch.image) == size, "a whole batch"
    return {
        "seconds": {
            "open_and_check": opened - begun,
            "order_and_first_batch": ended - opened,
            "all": ended - begun,
        },
        "images": len(epochs.dataset),
        "main_process_peak_mb": peak_bytes() / MEBIBYTE,
    }


def worker_memory(folder: Path, start: str) -> dict[str, object]:
    """Private memory of loader processes on the full list and on ten images, in MB."""
    measured = {}
    for dataset in ("shapes", "imagenet22k"):
        cfg = resolve(config(folder, dataset, start))
        replay = open_run(cfg).train_loader(cfg.DATA.BATCH_SIZE).dataset
        rng = np.random.Generator(np.random.PCG64(2))
        loader = DataLoader(
            Measured(replay),
            sampler=rng.integers(0, len(replay), WORKERS * DECODED).tolist(),
            num_workers=WORKERS,
            multiprocessing_context=start,
            batch_size=None,
        )
        sizes: dict[int, int] = {}
        for _, process, size in loader:
            sizes[process] = max(size, sizes.get(process, 0))
        measured[dataset] = max(sizes.values()) / MEBIBYTE
    grown = measured["imagenet22k"] - measured["shapes"]
    return {
        "ten_images_mb": measured["shapes"],
        "whole_list_mb": measured["imagenet22k"],
        "beyond_imports_mb": grown,
    }


def peak_bytes() -> int:
    """The largest resident size of this process so far, mapped pages included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_a_process(task: str, folder: Path) -> dict[str, object]:
    """The result of a task that runs in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.listing", "--task", task, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rounded(value):
    """Numbers to three digits after the point, all through."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    """Measure and print the report."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.listing", description=__doc__, formatter_class=formatter
    )
    parser.add_argument(
        "--images", type=int, default=IMAGES, help="names in the list (default: %(default)s)"
    )
    parser.add_argument(
        "--shuffled", action="store_true", help="names in no order: the scan has to sort them"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write the data (default: a temporary folder)"
    )
    parser.add_argument("--task", choices=["start", "fork", "spawn"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        if args.task == "start":
            result = start_run(args.folder)
        else:
            result = worker_memory(args.folder, args.task)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_data(folder / "data", args.images, args.shuffled)
        tasks = {
            "first_start": "start",
            "warm_start": "start",
            "worker_fork": "fork",
            "worker_spawn": "spawn",
        }
        results = {}
        for label, task in tasks.items():
            results[label] = in_a_process(task, folder)
            # pages of a file that was just written count as a process's own until they are on disk
            os.sync()
        size = sum(path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file())
    results = {
        "machine": machine(),
        "names": args.images,
        "cached_list_mb": size / MEBIBYTE,
        "workers": WORKERS,
        **results,
    }
    results["aims"] = {"warm_start_seconds": 10, "worker_beyond_imports_mb": 100}
    report(rounded(results))


if __name__ == "__main__":
    main()
