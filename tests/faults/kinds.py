"""The kinds of files that a run reads: how a whole one is made, and what is read of it."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch

from configs import load_config
from data.build import open_run
from data.store import LogitsStoreReader, LogitsStoreWriter
from data.store.keys import Keys, map_positions
from data.store.original import UpstreamStoreReader
from logger import MetricWriter, create_metric_writer
from models.checkpoints import load_state, newest_valid, save_atomic
from models.pretrained import read_state_dict, save_weights
from models.tiny_vit import TinyViT
from tests.data import test_one_store_serves as served
from tests.faults.mutations import exchanged, exchanged_alone
from tests.support import images, saving, store_samples
from tests.support.jobs import words


@dataclass(frozen=True)
class Kind:
    """A kind of file, and what is promised of it."""

    name: str
    make: Callable[[Path], None]  # files in a folder, all of them whole
    read: Callable[[Path], Any]  # everything that a run takes from them, to be compared
    files: str  # pattern of those that are spoiled
    promised: bool = True  # that no change is read silently
    more: tuple[Callable[[Path], None], ...] = ()  # else in a file's place
    may_be_pipe: bool = False  # a user may name one, as in --cfg <(...)


def plain(value: Any) -> Any:
    """A value that `==` compares: tensors and arrays as their types, shapes and bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


# ---- stores


def make_store(folder: Path) -> None:
    opts = (*served.DATA, "MODEL.NUM_CLASSES", 20, "DISTILL.LOGITS_TOPK 10 TRAIN.EPOCHS 2")
    assert saving.run(folder / "store", *opts, "DATA.MEAN_AND_STD_TYPE half") == 0


def read_store(folder: Path) -> Any:
    """What a student of half of the images learns from."""
    root, cache = folder / "store", folder / "cache"
    cfg = served.unresolved(root, "DATA.SUBSET", 0.5, "DATA.INDEX_DIR", cache)
    data = open_run(cfg)
    data.check_store()
    for epoch in range(2):
        data.verify(epoch, lambda blocks, *_: blocks)
    records = [
        [data.store.open_records(epoch)[i].tobytes() for i in range(len(data.store))]
        for epoch in range(2)
    ]
    return records, plain(data.index_of), plain(data.mix), str(data.decoder), data.cfg.DATA.SEED


def make_parts(folder: Path) -> None:
    root = folder / "store"
    with LogitsStoreWriter(root, store_samples.manifest(), store_samples.KEYS) as writer:
        writer.begin_epoch(0)
        for positions in store_samples.batches(0)[:6]:
            writer.append(positions, store_samples.records_of(0, positions))
        writer.end_epoch()


def finish_parts(folder: Path) -> Any:
    """The epoch, when what its parts lack has been computed again."""
    root = folder / "store"
    with LogitsStoreWriter(root, store_samples.manifest(), store_samples.KEYS) as writer:
        writer.begin_epoch(0)
        positions = writer.missing(0)
        if len(positions):
            writer.append(positions, store_samples.records_of(0, positions))
        writer.end_epoch()
        writer.seal(0)
    return LogitsStoreReader(root).open_epoch(0).tobytes()


def make_original(folder: Path) -> None:
    positions = np.arange(store_samples.IMAGES)
    epochs = {0: store_samples.records_of(0, positions)}
    saving.write_upstream(folder / "store", epochs, store_samples.KEYS)


def read_original(folder: Path) -> Any:
    store = UpstreamStoreReader(folder / "store", store_samples.KEYS, cache=folder / "cache")
    store.check_epochs([0])
    faults = [fault for fault in store.faults(0) if fault]
    if faults:
        raise ValueError(faults[0])
    records = store.open_records(0)
    return [records[position].tobytes() for position in range(store_samples.IMAGES)]


def make_index(folder: Path) -> None:
    make_original(folder)
    read_original(folder)


def make_map(folder: Path) -> None:
    store_samples.write_store(folder / "store")
    read_map(folder)


def read_map(folder: Path) -> Any:
    keys = Keys.of(store_samples.KEYS[::-1])
    return plain(map_positions(LogitsStoreReader(folder / "store"), keys, folder / "cache"))


# ---- images

NAMES = [f"class {i % 3}/image {i:02d}.png" for i in range(12)]


def listed(folder: Path) -> Any:
    return images.built("train", DATA_PATH=folder / "data", INDEX_DIR=folder / "cache")


def make_listing(folder: Path) -> None:
    images.write_files(folder / "data" / "train", NAMES)
    read_listing(folder)


def read_listing(folder: Path) -> Any:
    found = listed(folder)
    labels = [found.listing.label(i) for i in range(len(found))]
    return list(found.get_keys()), labels, list(found.class_names), found.listing.total


def make_images(folder: Path) -> None:
    files = {name: images.encoded(images.picture(i)) for i, name in enumerate(NAMES[:6])}
    for i, kind in enumerate(("JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")):
        files[f"class 0/other {i}.jpg"] = images.encoded(images.picture(i), kind)
    images.write_files(folder / "data" / "train", files)


def make_tar(folder: Path) -> None:
    members = {name: images.encoded(images.picture(i)) for i, name in enumerate(NAMES)}
    images.write_tar(folder / "data" / "train.tar", members)


def make_zips(folder: Path) -> None:
    names = [f"{wnid}_{i}" for wnid in ("n00007846", "n00015388") for i in range(4)]
    for wnid in ("n00007846", "n00015388"):
        own = {f"{name}.jpeg": images.encoded(images.picture(i)) for i, name in enumerate(names)}
        own = {name: data for name, data in own.items() if name.startswith(wnid)}
        (folder / "data").mkdir(exist_ok=True)
        images.write_zip(folder / "data" / f"{wnid}.zip", own)
    (folder / "data" / "in22k_image_names.txt").write_text("\n".join(names) + "\n")


def read_zips(folder: Path) -> Any:
    options = {"DATA_PATH": folder / "data", "INDEX_DIR": folder / "cache"}
    found = images.built("train", **options, DATASET="imagenet22k")
    return [(plain(np.asarray(found[i][0])), found[i][1]) for i in range(len(found))]


def read_images(folder: Path) -> Any:
    found = listed(folder)
    return [(plain(np.asarray(found[i][0])), found[i][1]) for i in range(len(found))]


# ---- weights

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = TinyViT(embed_dims=(8, 16, 16, 16), depths=(1,) * 4, num_heads=(1,) * 4, num_classes=5)
WEIGHTS = MODEL.state_dict()
STATE = {"optimizer": {}, "scaler": {}, "progress": {"epoch": 1}, "measured": {}, "step": 5}
STATE |= {"metric_lines": 3, "model_ema": None, "model": WEIGHTS, "config": "TAG: default\n"}


def make_pinned(save: Callable[[Path], None], suffix: str) -> Callable[[Path], None]:
    """Weights without checksums, beside a note of their name and digest."""

    def make(folder: Path) -> None:
        path = folder / f"weights{suffix}"
        save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "pin").write_text(f"{path.name}@sha256={digest[:16]}")

    return make


def read_pinned(folder: Path) -> Any:
    return plain(read_state_dict(f"{folder}/{(folder / 'pin').read_text()}"))


def save_zip(path: Path) -> None:
    torch.save({"model": WEIGHTS}, path)


def save_legacy(path: Path) -> None:
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False)


def save_foreign(path: Path) -> None:
    safetensors.torch.save_file({name: part.contiguous() for name, part in WEIGHTS.items()}, path)


def make_checkpoints(folder: Path) -> None:
    save_atomic(STATE, folder / "last.pth")
    save_atomic(STATE | {"step": 4}, folder / "epoch_0001.pth")
    save_atomic(STATE | {"step": 3}, folder / "mine.pth")


def read_newest(folder: Path) -> Any:
    path, state = newest_valid(folder, lambda line: None)
    return path.name, plain(state)


# ---- settings and notes

RECIPE = """# a recipe
MODEL: {NAME: mine, TYPE: tiny_vit, DROP_PATH_RATE: 0.1}
DATA:
  DATASET: shapes
  IMG_SIZE: 64
TRAIN: {EPOCHS: 5, WARMUP_EPOCHS: 1, BASE_LR: 1e-3, OPTIMIZER: {BETAS: [0.9, 0.99]}}
AUG: {SCALE: [0.3, 1.0], MIXUP: 0.8}
"""
LINES = "".join(f'{{"step": {i}, "loss": {i / 7}}}\n' for i in range(40))


def make_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text(LINES)


def read_metrics(folder: Path) -> Any:
    writer = create_metric_writer(folder)
    writer.cut_back(20, 20)
    return writer.lines


def read_id(folder: Path) -> Any:
    """The id that wandb is given; the real one wants a network."""
    given: list[str] = []

    def init(**settings: Any) -> SimpleNamespace:
        given.append(settings["id"])
        return SimpleNamespace(define_metric=lambda *names, **options: None)

    stand_in = SimpleNamespace(init=init, Settings=dict)
    with mock.patch.dict(sys.modules, {"wandb": stand_in}):
        MetricWriter(folder, warn=str).start_wandb("project", "name", {})
    return given


def make_excluded(folder: Path) -> None:
    make_listing(folder)
    (folder / "out.txt").write_text("\n".join(NAMES[:3]) + "\n")


def read_excluded(folder: Path) -> Any:
    options = {"DATA_PATH": folder / "data", "INDEX_DIR": folder / "cache"}
    found = images.built("train", **options, EXCLUDE=folder / "out.txt")
    return list(found.get_keys())


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def read_recipe(folder: Path) -> Any:
    return str(load_config(words("--cfg", folder / "recipe.yaml")))


def make_pth(folder: Path) -> None:
    save_zip(folder / "weights")


def read_weights(folder: Path) -> Any:
    return plain(read_state_dict(folder / "weights"))


def make_own(folder: Path) -> None:
    save_weights(MODEL, folder / "weights.safetensors")


def read_own(folder: Path) -> Any:
    return plain(read_state_dict(folder / "weights.safetensors"))


def make_checkpoint(folder: Path) -> None:
    save_atomic(STATE, folder / "last.pth")


def read_checkpoint(folder: Path) -> Any:
    return plain(load_state(folder / "last.pth"))


SWAPS = (exchanged, exchanged_alone) * 2  # of one or the other epoch

KINDS = (
    Kind("store: manifest", make_store, read_store, "store/manifest.json"),
    Kind("store: names of the images", make_store, read_store, "store/keys.txt"),
    Kind("store: records of an epoch", make_store, read_store, "store/epoch_*.npy", more=SWAPS),
    Kind("store: seal of an epoch", make_store, read_store, "store/epoch_*.json", more=SWAPS),
    Kind("store: parts of an unsealed epoch", make_parts, finish_parts, "store/*.parts/*"),
    Kind("cache: map from data to store", make_map, read_map, "cache/*.npy"),
    Kind("cache: index of an original's store", make_index, read_original, "cache/*.npy"),
    Kind("cache: list of images", make_listing, read_listing, "cache/listings/**/*"),
    Kind("checkpoint", make_checkpoint, read_checkpoint, "last.pth"),
    Kind("checkpoints beside last.pth", make_checkpoints, read_newest, "[em]*.pth"),
    Kind("weights: .pth", make_pth, read_weights, "weights"),
    Kind("weights: our .safetensors", make_own, read_own, "weights.safetensors"),
    Kind("weights: legacy .pth, pinned", make_pinned(save_legacy, ".pth"), read_pinned, "weights*"),
    Kind(
        "weights: .safetensors, pinned",
        make_pinned(save_foreign, ".safetensors"),
        read_pinned,
        "weights*",
    ),
    Kind("original's store", make_original, read_original, "store/*/*", promised=False),
    Kind("image files", make_images, read_images, "data/train/*/*", promised=False),
    Kind("images in a class's zip", make_zips, read_zips, "data/*.zip", more=(exchanged_alone,)),
    Kind("images in a tar", make_tar, read_images, "data/train.tar", promised=False),
    Kind(
        "recipe",
        written("recipe.yaml", RECIPE),
        read_recipe,
        "recipe.yaml",
        False,
        may_be_pipe=True,
    ),
    Kind("list of bad images", make_excluded, read_excluded, "out.txt", False, may_be_pipe=True),
    Kind("metrics.jsonl", make_metrics, read_metrics, "metrics.jsonl", False, may_be_pipe=True),
    Kind("wandb_id.txt", written("wandb_id.txt", "4f2a"), read_id, "wandb_id.txt", False, (), True),
)
