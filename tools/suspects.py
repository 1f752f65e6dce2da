"""Images whose given label a stored teacher does not believe: `python -m tools.logits suspects`."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from configs import load_config
from data.build import open_run
from data.store.files import StoreError, write_atomic
from logger import progress
from models.class_map import find_label_map
from tools.replay_sheet import Tile, draw

BATCH_RECORDS = 1 << 14
SHOWN = 24  # on the sheet


def suspects(args: argparse.Namespace) -> int:
    """Write the list and its contact sheet."""
    words = ["--cfg", args.cfg] if args.cfg else []
    words += ["--data-path", args.data_path] if args.data_path else []
    words += ["--opts", *args.opts, "DISTILL.TEACHER_LOGITS_PATH", str(args.store)]
    # a recipe for saving may have fewer epochs than a training's warm-up
    data = open_run(load_config([*words, "TRAIN.WARMUP_EPOCHS", "0"]))
    store, images = data.store, data.images
    if data.cfg.is_paired:
        raise StoreError(
            f"{args.store}: its images are mixed in pairs, so no answer is about one label: save a"
            " store with AUG.MIXUP 0 AUG.CUTMIX 0 and name that"
        )
    label_map, reason = find_label_map(store.num_classes, images.num_classes)
    if label_map is None:
        raise StoreError(f"{args.store}: no label can be judged: {reason}")
    outside = args.outside or min(5 if store.num_classes >= 100 else 1, store.k)
    if not 1 <= outside <= store.k:
        raise StoreError(f"--outside {outside}: {args.store} keeps top-{store.k}: give 1 to that")
    positions = np.arange(len(store))
    indices = positions if data.index_of is None else np.asarray(data.index_of)
    labels = label_map.labels(torch.from_numpy(images.listing.labels.astype(np.int64))).numpy()
    labels = np.where(indices < 0, -1, labels[indices])  # by position
    positions = positions[labels >= 0]
    belief, times = answers(store, positions, labels[positions], outside)
    found = np.flatnonzero(2 * times > len(store.epochs()))
    found = found[np.argsort(belief[found], kind="stable")]
    keys = images.get_keys()
    names = [keys[indices[position]] for position in positions[found]]
    write_atomic(args.output, "".join(f"{n}\n" for n in names).encode(errors="surrogateescape"))
    print(
        f"{args.output}: {len(found):,} of {len(positions):,} images, the least believed first:"
        f" their label is not among the teacher's first {outside} in most of"
        f" {len(store.epochs())} epochs"
    )
    if len(found):
        first = positions[found[:SHOWN]]
        classes = dict(zip(label_map.outputs.tolist(), images.class_names))
        tiles = []
        for position, mean in zip(first, mean_answers(store, first)):
            best, given = mean.argmax(), labels[position]
            told = [f"teacher: {classes.get(best, best)}, {mean[best]:.3f}"]
            told.append(str(keys[indices[position]]))
            title = f"given: {classes[given]}, {belief[positions == position][0]:.3f}"
            tiles.append(Tile(images[int(indices[position])][0], title, told))
        sheet = args.output.with_suffix(".png")
        draw(tiles, f"{args.store}: the least believed labels, mean probabilities", str(sheet), 3.5)
        print(f"{sheet}: the first {len(tiles)}. Look at them, then train with DATA.EXCLUDE")
    return 0


def answers(
    store: Any, positions: np.ndarray, labels: np.ndarray, outside: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the labels of images [n]: mean probability, and in how many epochs not among the first.

    A label outside the K columns has its share of the rest.
    """
    epochs = store.epochs()
    if not epochs:
        raise StoreError(f"{store.root}: has no sealed epoch: run save_logits.py first")
    belief, times = np.zeros(len(positions)), np.zeros(len(positions), int)
    for epoch in progress(epochs, description="epochs read"):
        records = store.open_epoch(epoch)
        for low in range(0, len(positions), BATCH_RECORDS):
            part = slice(low, low + BATCH_RECORDS)
            rows = records[positions[part]]
            probs = rows["prob"].astype(np.float64)
            hits = rows["index"] == labels[part, None]
            rest = np.clip(1 - probs.sum(1), 0, None) / max(store.num_classes - store.k, 1)
            belief[part] += np.where(hits.any(1), (probs * hits).sum(1), rest) / len(epochs)
            times[part] += ~hits[:, :outside].any(1)
    return belief, times


def mean_answers(store: Any, positions: np.ndarray) -> np.ndarray:
    """The mean of the stored probabilities of a few images [n, classes], without the rest."""
    sums = np.zeros((len(positions), store.num_classes))
    for epoch in store.epochs():
        rows = store.open_epoch(epoch)[positions]
        np.add.at(sums, (np.arange(len(rows))[:, None], rows["index"].astype(int)), rows["prob"])
    return sums / len(store.epochs())
