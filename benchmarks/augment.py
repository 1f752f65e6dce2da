"""Training images per second on one core, JPEG to tensor: `AugmentDecoder.decode` against timm's
transform with the same recipe.

    python -m benchmarks.augment

Prints JSON: both rates and their ratio with and without opening the JPEG, and where the decoder's
time goes."""

import io
import random
import time
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from timm.data import create_transform

from benchmarks.timing import alternate, machine, report
from configs import load_config
from data.augment.decoder import AugmentDecoder, mean_and_std
from data.augment.rng import generator, sample_seed

IMAGES = 64
SIZE = (500, 375)


@cache
def photo(seed: int) -> bytes:
    """A JPEG with detail at every scale, about as large as ImageNet's at these dimensions."""
    rng = generator(seed)
    width, height = SIZE
    pixels = np.full((height, width, 3), 128.0)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
        pixels += (
            np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), np.float64) - 128
        ) * cells**-0.5
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def open_photo(data: bytes) -> Image.Image:
    """The decoded picture, from its JPEG."""
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    image.load()
    return image


class Epochs:
    """Both ways of making a tensor, over the same pictures with new draws in every turn."""

    def __init__(self, cfg) -> None:
        self.decoder = AugmentDecoder.from_config(cfg)
        mean, std = mean_and_std(cfg)
        self.transform = create_transform(
            cfg.DATA.IMG_SIZE,
            is_training=True,
            auto_augment=cfg.AUG.AUTO_AUGMENT,
            interpolation=cfg.DATA.INTERPOLATION,
            mean=mean,
            std=std,
            re_prob=cfg.AUG.REPROB,
            re_mode=cfg.AUG.REMODE,
            re_count=cfg.AUG.RECOUNT,
        )
        self.files = [photo(seed) for seed in range(IMAGES)]
        self.pictures = [open_photo(data) for data in self.files]
        self.turn = self.failures = 0

    def ours(self, with_jpeg: bool) -> None:
        """One turn of the decoder."""
        self.turn += 1
        for position in range(IMAGES):
            image = open_photo(self.files[position]) if with_jpeg else self.pictures[position]
            self.decoder.decode(image, sample_seed(0, self.turn, position))

    def packed(self) -> None:
        """One turn of what a worker does for the device executor: JPEG, plan, cut, packing."""
        self.turn += 1
        seeds = [sample_seed(0, self.turn, position) for position in range(IMAGES)]
        self.decoder.pack([open_photo(data) for data in self.files], seeds)

    def timm(self, with_jpeg: bool) -> None:
        """One turn of timm's transform."""
        for position in range(IMAGES):
            image = open_photo(self.files[position]) if with_jpeg else self.pictures[position]
            try:
                self.transform(image)
            except ValueError:  # Pillow 13 refuses to posterize to 0 bits, about once in 600 images
                self.failures += 1

    def split(self, rounds: int) -> dict[str, float]:
        """Milliseconds per image of opening the JPEG, drawing the plan, and applying it."""
        seconds = dict.fromkeys(("JPEG", "plan", "apply"), 0.0)
        for turn in range(rounds):
            for position, data in enumerate(self.files):
                marks = [time.perf_counter()]
                image = open_photo(data)
                marks.append(time.perf_counter())
                plan = self.decoder.plan(*image.size, sample_seed(1, turn, position))
                marks.append(time.perf_counter())
                self.decoder.apply(plan, image)
                marks.append(time.perf_counter())
                for name, (start, end) in zip(seconds, pairwise(marks)):
                    seconds[name] += end - start
        return {name: round(1000 * total / (rounds * IMAGES), 4) for name, total in seconds.items()}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    random.seed(0)  # timm draws from the global generators
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    cfg = load_config([])
    epochs = Epochs(cfg)
    sides = {
        "decode_with_jpeg": lambda: epochs.ours(True),
        "timm_with_jpeg": lambda: epochs.timm(True),
        "worker_of_device_executor_with_jpeg": epochs.packed,
        "decode": lambda: epochs.ours(False),
        "timm": lambda: epochs.timm(False),
    }
    seconds = alternate(sides, repeats=30)
    report(
        {
            "recipe": str(epochs.decoder),
            "pictures": (
                f"{IMAGES} of {SIZE[0]}x{SIZE[1]}, {sum(map(len, epochs.files)) // IMAGES} bytes"
                " each"
            ),
            "images_per_second": {
                name: round(IMAGES / times["median"], 1) for name, times in seconds.items()
            },
            "spread_seconds_per_turn": {
                name: round(times["spread"], 4) for name, times in seconds.items()
            },
            "ratio_with_jpeg": round(
                seconds["timm_with_jpeg"]["median"] / seconds["decode_with_jpeg"]["median"], 3
            ),
            "ratio_of_device_executors_worker": round(
                seconds["timm_with_jpeg"]["median"]
                / seconds["worker_of_device_executor_with_jpeg"]["median"],
                3,
            ),
            "ratio": round(seconds["timm"]["median"] / seconds["decode"]["median"], 3),
            "timm_failures": epochs.failures,
            "split_ms_per_image": epochs.split(rounds=5),
            "pillow": pillow_version,
            "numpy": np.__version__,
            **machine(),
        }
    )


if __name__ == "__main__":
    main()
