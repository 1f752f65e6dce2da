"""Evaluates the official checkpoints on ImageNet-1k's validation images and compares with the
published accuracies.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from configs import load_config
from data.build import open_run
from logger import progress
from models.pretrained import load_weights, zoo_url
from models.tiny_vit import TinyViT
from utils import amp_dtype, choose_device, evaluate

TOLERANCE = 0.1  # points of top-1


class Published(NamedTuple):
    """A checkpoint of the model zoo and its published top-1 on ImageNet-1k, in percent."""

    variant: str
    which: str
    top1: float


ZOO = (
    Published("5m", "1k", 79.1),
    Published("11m", "1k", 81.5),
    Published("21m", "1k", 83.1),
    Published("5m", "22kto1k_distill", 80.7),
    Published("11m", "22kto1k_distill", 83.2),
    Published("21m", "22kto1k_distill", 84.8),
    Published("21m_384", "22kto1k_distill", 86.2),
    Published("21m_512", "22kto1k_distill", 86.5),
)


def measure(variant: str, weights: str, args: argparse.Namespace) -> float:
    """Top-1 of a checkpoint, in percent, with the evaluation of the recipe it came from."""
    model = TinyViT.from_config(variant)
    load_weights(model, weights, exact=True, log=lambda text: None)
    words = f"--eval --device {args.device} --batch-size {args.batch_size} --opts".split()
    words += f"DATA.CLASS_LIST imagenet1k DATA.IMG_SIZE {model.img_size}".split()
    words += f"TEST.CROP {model.img_size == 224} DATA.NUM_WORKERS {args.workers}".split()
    cfg = load_config([*words, "DATA.VAL_PATH", str(args.val)])
    device = choose_device(args.device)
    loader = open_run(cfg).val_loader()
    batches = progress(loader.batches(0), total=loader.count(), description=Path(weights).name)
    return evaluate(model.to(device).eval(), batches, device, amp_dtype(cfg, device))["top1"]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 if a checkpoint is off by more than the tolerance or
    none was found.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify_zoo", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    help = "ImageNet-1k's validation images: class folders, or a tar of them"
    add("val", metavar="VAL", type=Path, help=help)
    help = "where official checkpoints lie (checkpoints)"
    add("--checkpoints", metavar="FOLDER", type=Path, default=Path("checkpoints"), help=help)
    help = "fetch those that are missing from the authors' model zoo"
    add("--download", action="store_true", help=help)
    add("--batch-size", type=int, default=64, metavar="N", help="images per forward pass (64)")
    add("--workers", type=int, default=4, metavar="N", help="loader processes (4)")
    devices = ["auto", "cuda", "mps", "cpu"]
    add("--device", choices=devices, default="auto", help="where to run (auto)")
    args = parser.parse_args(argv)
    agrees = []
    try:
        if not args.val.exists():
            raise ValueError(
                f"{args.val}: no such file or folder; give ImageNet-1k's validation images"
            )
        for entry in ZOO:
            weights = zoo_url(entry.variant, entry.which)
            name = Path(weights).name
            if (args.checkpoints / name).is_file():
                weights = str(args.checkpoints / name)
            elif not args.download:
                why = f"not in {args.checkpoints}, left out (--download fetches it)"
                print(f"{name}: {why}", flush=True)
                continue
            top1 = measure(entry.variant, weights, args)
            agrees.append(abs(top1 - entry.top1) <= TOLERANCE)
            verdict = "agrees" if agrees[-1] else "DIFFERS"
            compared = f"top-1 {top1:.2f}%, published {entry.top1:.1f}%"
            print(f"{name}: {compared}: {verdict}", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{sum(agrees)} of {len(agrees)} checkpoints agree within {TOLERANCE} points")
    return 0 if agrees and all(agrees) else 1


if __name__ == "__main__":
    sys.exit(main())
