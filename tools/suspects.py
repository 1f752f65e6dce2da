"""Images whose given label a stored teacher does not believe: `python -m tools.logits suspects`."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from configs import load_config
from data.build import open_run
from data.store.files import StoreError, write_atomic
from data.store.format import counted
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
    epochs = len(store.epochs())
    found = np.flatnonzero(2 * times > epochs)
    found = found[np.argsort(belief[found], kind="stable")]
    among = f"in the first {outside}" if outside > 1 else "first"
    keys = images.get_keys()
    names = [keys[indices[position]] for position in positions[found]]
    write_atomic(args.output, "".join(f"{n}\n" for n in names).encode(errors="surrogateescape"))
    print(
        f"{args.output}: {len(found):,} of {counted(len(positions), 'image')}, the least believed"
        f" first: their label is not {among} of the teacher's classes in most of"
        f" {counted(epochs, 'epoch')}"
    )
    if len(found):
        shown = found[:SHOWN]
        classes = dict(zip(label_map.outputs.tolist(), images.class_names))
        tiles = []
        for place, (first, mean) in zip(shown, first_answers(store, positions[shown])):
            position = positions[place]
            index, given = int(indices[position]), labels[position]
            first[given] = -1  # suspected, so it is first in half of the epochs at most
            best = (first + mean).argmax()
            told = [
                f"{among} in {epochs - times[place]} of {epochs}, {belief[place]:.3f}",
                f"teacher: {classes.get(best, best)}",
                f"first in {first[best]:.0f} of {epochs}, {mean[best]:.3f}",
                str(keys[index]),
            ]
            tiles.append(Tile(images[index][0], f"given: {classes[given]}", told))
        sheet = args.output.with_suffix(".png")
        heading = f"{args.store.resolve().name}: the least believed labels"
        heading += f"; in how many of {counted(epochs, 'epoch')}, mean probability"
        draw(tiles, heading, str(sheet), 4.0)
        told = f"{counted(len(tiles), 'image')} from its start. Look at it, then train with"
        print(f"{sheet}: {told} DATA.EXCLUDE {args.output}")
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


def first_answers(store: Any, positions: np.ndarray) -> np.ndarray:
    """Of a few images, for each class, in how many epochs it is the teacher's first and the mean of
    its stored probabilities [n, 2, classes].
    """
    found = np.zeros((len(positions), 2, store.num_classes))
    epochs, images = store.epochs(), np.arange(len(positions))
    for epoch in epochs:
        rows = store.open_epoch(epoch)[positions]
        indices, probs = rows["index"].astype(int), rows["prob"].astype(np.float64)
        found[images, 0, indices[:, 0]] += 1
        np.add.at(found, (images[:, None], 1, indices), probs / len(epochs))
    return found
