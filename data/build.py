"""A configuration, and what only the data and the store know -> a resolved configuration, and
loaders over it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.augment.decoder import AugmentDecoder, eval_transform, mean_and_std
from data.identity import adopted_values, check_proof, excess_of
from data.images.datasets import build_dataset
from data.replay import ReplayDataset, Sample
from data.sampler import EpochBatches, EpochSampler, Wanted
from data.store.format import ranges
from data.store.original import UpstreamStoreReader
from data.store.reader import LogitsStoreReader, map_positions, store_epoch
from data.store.stage import EpochStager

# an original's store does not say how many there are
UPSTREAM_CLASSES = {"imagenet": 1000, "imagenet22k": 21841}


def resolve(cfg, model_classes: int = 0):
    """A frozen copy of `cfg` with what data and store know: class count, K, seeds, recipe, fill
    colour.

    `model_classes` is the class count of a teacher or of weights that are given, where there are
    such."""
    return cfg.replace(_resolved_values(cfg, model_classes))


def reads_store(cfg) -> bool:
    """Whether this run trains from a store (rather than writes one, evaluates, or trains without)."""
    return bool(cfg.DISTILL.TEACHER_LOGITS_PATH) and not (
        cfg.DISTILL.SAVE_TEACHER_LOGITS or cfg.EVAL_MODE or cfg.THROUGHPUT_MODE
    )


def open_store(cfg, keys) -> LogitsStoreReader | UpstreamStoreReader:
    """The store a run reads, in our layout or the original's."""
    root = Path(cfg.DISTILL.TEACHER_LOGITS_PATH)
    if (root / "manifest.json").is_file():
        return LogitsStoreReader(root)
    if not any(root.glob("logits_top*_epoch*")):
        raise ValueError(
            f"DISTILL.TEACHER_LOGITS_PATH = {root}: no store there (neither manifest.json nor"
            " logits_top*_epoch*/): write one with save_logits.py, or correct the path"
        )
    # of several stores in one folder it names one; else it may be a part of the columns
    k = cfg.DISTILL.LOGITS_TOPK
    return UpstreamStoreReader(
        root,
        keys,
        k if any(root.glob(f"logits_top{k}_epoch*")) else None,
        num_classes=_upstream_classes(cfg),
        order=cfg.DISTILL.UPSTREAM_ORDER,
    )


class Epochs:
    """Batches of a data set, epoch by epoch, from loader processes that live as long as this
    object.
    """

    def __init__(
        self,
        cfg,
        dataset: Dataset,
        sampler: EpochSampler,
        batch_size: int,
        epoch_of: Callable[[int], int] = int,
        stager: EpochStager | None = None,
    ) -> None:
        """`epoch_of` says which epoch of the store (and of its order) serves an epoch of the run."""
        self.sampler, self._epoch_of = sampler, epoch_of
        self._stager, self._end = stager, cfg.TRAIN.EPOCHS
        self._batches = EpochBatches(sampler, batch_size)
        with _workers_unquestioned():
            self._loader = DataLoader(
                dataset,
                batch_sampler=self._batches,
                generator=torch.Generator(),
                **_loader_options(cfg),
            )

    def batches(self, epoch: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Any]:
        """The batches of an epoch for this rank, without its first `start` positions; of the rest
        those that are `wanted`.

        A fault in a loader process is a ValueError of one line here.
        """
        if self._stager:
            self._stager.advance(
                self._epoch_of(epoch), self._epoch_of(epoch + 1) if epoch + 1 < self._end else None
            )
        self._batches.set_epoch(self._epoch_of(epoch), start, wanted)
        # by loader processes that start here, until they know what to do
        with _plain_errors(), _workers_unquestioned(), _signals_held():
            batches = iter(self._loader)
        return _with_plain_errors(batches) if self._loader.num_workers else batches

    def count(self, epoch: int = 0) -> int:
        """Number of batches of a whole epoch for this rank."""
        return -(-self.sampler.length(self._epoch_of(epoch)) // self._batches.batch_size)

    @property
    def dataset(self) -> Dataset:
        return self._loader.dataset


def train_epochs(
    cfg,
    rank: int,
    batch_size: int,
    step_images: int,
    report: Callable[[str], None] = lambda text: None,
) -> Epochs:
    """The training data of one rank; `step_images` are those of an update over all ranks (1 keeps
    every image, for saving).
    """
    dataset = build_dataset(cfg, "train")
    decoder = AugmentDecoder.from_config(cfg)
    store, epoch_of, stager = _opened_store(cfg, dataset) if reads_store(cfg) else (None, int, None)
    local = local_positions(cfg, store, dataset) if store else None
    replay = ReplayDataset(
        dataset, decoder, store, cfg.DATA.SEED, topk=cfg.DISTILL.LOGITS_TOPK, local=local
    )
    sampler = EpochSampler(
        len(replay),
        cfg.WORLD_SIZE,
        rank,
        cfg.DATA.SEED,
        paired=cfg.is_paired,
        step_images=step_images,
        available=replay.available,
    )
    if sampler.skipped:
        report(
            f"{sampler.skipped:,} of the store's {len(replay):,} images are skipped in epoch 0: "
            "they or their partner are not in the data"
        )
    return Epochs(cfg, replay, sampler, batch_size, epoch_of, stager)


def check_store(cfg, wanted: Iterable[int] | None = None) -> str:
    """Everything that can be checked before the first batch, for one process to do; returns a line
    about the store, "" without one.

    `wanted` are the epochs to be read, by default all of the run.
    """
    if not reads_store(cfg):
        return ""
    dataset = build_dataset(cfg, "train")
    store = open_store(cfg, dataset.get_keys())
    wanted = range(cfg.TRAIN.START_EPOCH, cfg.TRAIN.EPOCHS) if wanted is None else wanted
    epochs = store.epochs()
    if cfg.DISTILL.REUSE_EPOCHS:
        wanted = sorted({store_epoch(epoch, len(epochs)) for epoch in wanted})
    store.check_epochs(wanted)
    if isinstance(store, LogitsStoreReader):
        local = local_positions(cfg, store, dataset)
        # DISTILL.OTHER_SIZE
        as_written = cfg.replace({"DATA.IMG_SIZE": store.manifest["identity"]["image_size"]})
        check_proof(
            store.manifest["proof"],
            dataset,
            AugmentDecoder.from_config(as_written),
            str(store.root),
            local,
        )
    return (
        f"store {store.root}: top-{store.k} of {store.num_classes} classes, {len(store):,} images,"
        f" epochs {ranges(epochs)}"
    )


def sources_of(cfg) -> dict[str, Any]:
    """Which images a training learns from, and which teacher's records: what must stay the same
    when it is continued.
    """
    dataset = build_dataset(cfg, "train")
    keys = dataset.get_keys()
    found = {"images": len(dataset), "keys_sha256": keys.digest()}
    store = open_store(cfg, keys) if reads_store(cfg) else None
    return found | (
        {"teacher": store.manifest["teacher"]} if store and store.manifest["teacher"] else {}
    )


def val_epochs(cfg, rank: int) -> Epochs:
    """The validation images of one rank, every image once over all ranks, as (image, label)."""
    dataset = TransformedDataset(build_dataset(cfg, "val"), eval_transform(cfg))
    sampler = EpochSampler(len(dataset), cfg.WORLD_SIZE, rank, shuffle=False)
    return Epochs(cfg, dataset, sampler, cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE)


def local_positions(cfg, store, dataset) -> np.ndarray | None:
    """For each position of the store the data set's index, -1 where it has none; None when they are
    the same.
    """
    return map_positions(store, dataset.get_keys(), cache=cfg.DATA.INDEX_DIR or None)


class TransformedDataset(Dataset):
    """(image, label) of a data set, by the (epoch, position) that samplers here deal."""

    def __init__(self, dataset, transform: Callable) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, int]:
        image, label = self.dataset[index[1]]
        return self.transform(image), int(label)


def _opened_store(
    cfg, dataset
) -> tuple[LogitsStoreReader | UpstreamStoreReader, Callable[[int], int], EpochStager | None]:
    """The store to read, which of its epochs serves an epoch of the run, and what copies epochs to
    local disk.
    """
    store = open_store(cfg, dataset.get_keys())
    count = len(store.epochs())
    stager = (
        EpochStager(store, cfg.DISTILL.STAGE_DIR)
        if cfg.DISTILL.STAGE_DIR and isinstance(store, LogitsStoreReader)
        else None
    )
    return (
        stager.reader if stager else store,
        (lambda epoch: store_epoch(epoch, count)) if cfg.DISTILL.REUSE_EPOCHS else int,
        stager,
    )


def _resolved_values(cfg, model_classes: int) -> dict[str, Any]:
    """What `resolve` sets, by key."""
    if cfg.THROUGHPUT_MODE:
        return {"MODEL.NUM_CLASSES": model_classes or cfg.MODEL.NUM_CLASSES or 1000}
    dataset = build_dataset(cfg, "val" if cfg.EVAL_MODE else "train")
    values: dict[str, Any] = {
        "MODEL.NUM_CLASSES": model_classes or cfg.MODEL.NUM_CLASSES or dataset.num_classes
    }
    if reads_store(cfg):
        store = open_store(cfg, dataset.get_keys())
        if isinstance(store, LogitsStoreReader):
            values |= adopted_values(cfg, store.manifest["identity"], str(store.root))
        else:
            topk = cfg.DISTILL.LOGITS_TOPK
            if topk > store.k:
                raise ValueError(
                    f"DISTILL.LOGITS_TOPK = {topk}, but the store {store.root} holds top-{store.k}:"
                    f" set {store.k} or less"
                )
            values |= {
                "MODEL.NUM_CLASSES": store.num_classes,
                "DISTILL.LOGITS_TOPK": topk or store.k,
                "DATA.SEED": 0,
                "DISTILL.EXCESS": excess_of(cfg, "subtract"),
            }
    classes = values["MODEL.NUM_CLASSES"]
    if classes < 1:
        raise ValueError(
            f"DATA.DATASET = {cfg.DATA.DATASET}: no labels tell the number of classes: set"
            " MODEL.NUM_CLASSES"
        )
    if classes < dataset.num_classes:
        data = cfg.DATA.DATA_PATH or cfg.DATA.DATASET
        raise ValueError(
            f"{classes} classes are fewer than the {dataset.num_classes} of the data {data}: "
            "set MODEL.NUM_CLASSES, or give the data that these weights or this store belong to"
        )
    if cfg.DISTILL.SAVE_TEACHER_LOGITS or cfg.DISTILL.ONLINE:
        values["DISTILL.LOGITS_TOPK"] = min(
            cfg.DISTILL.LOGITS_TOPK or (100 if classes > 1000 else 10), classes
        )
    if not list(values.get("AUG.FILL", cfg.AUG.FILL)):
        values["AUG.FILL"] = [min(255, round(255 * value)) for value in mean_and_std(cfg)[0]]
    return values


def _upstream_classes(cfg) -> int:
    return cfg.MODEL.NUM_CLASSES or UPSTREAM_CLASSES.get(cfg.DATA.DATASET, 1000)


def _with_plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of loader processes, with `_plain_errors`."""
    with _plain_errors():
        yield from batches


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise an error that a loader process met without the traceback that PyTorch puts in its text,
    and the death of one in words.
    """
    try:
        yield
    except (ValueError, OSError, EOFError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if (
            len(lines) > 1
            and "Original Traceback" in str(error)
            and isinstance(error, (ValueError, OSError))
        ):
            raise ValueError(lines[-1].partition(": ")[2]) from error
        if "DataLoader worker" not in lines[0] and not isinstance(
            error, (ConnectionError, EOFError)
        ):
            raise
        what = lines[0].rstrip(".")
        raise ValueError(
            f"a loader process has died ({what}): was the memory used up? Try fewer"
            " DATA.NUM_WORKERS"
        ) from error


@contextmanager
def _workers_unquestioned() -> Iterator[None]:
    """PyTorch warns of more loader processes than cores each time it makes some; how long training
    waits for data is told anyway.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals wait, here and in processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_parent_alone(worker: int) -> None:
    """Make a loader process deaf to signals but its parent's SIGTERM: batch systems and Ctrl-C
    signal all processes of a job at once, and the parent still needs its batches to come to an
    orderly end."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # here and in the threads that start from now on
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(
            target=_end_when_told, args=(multiprocessing.parent_process().pid,), daemon=True
        ).start()
    elif hasattr(signal, "pthread_sigmask"):  # as on macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _loader_options(cfg) -> dict[str, Any]:
    """DataLoader options that follow from the configuration."""
    options: dict[str, Any] = {
        "num_workers": cfg.DATA.NUM_WORKERS,
        "worker_init_fn": _obey_parent_alone,
    }
    options["pin_memory"] = (
        cfg.DATA.PIN_MEMORY and cfg.DEVICE in ("auto", "cuda") and torch.cuda.is_available()
    )
    if cfg.DATA.NUM_WORKERS:
        start = None if cfg.DATA.WORKER_START == "auto" else cfg.DATA.WORKER_START
        options |= {
            "persistent_workers": True,
            "prefetch_factor": cfg.DATA.PREFETCH,
            "multiprocessing_context": start,
        }
    return options


__all__ = [
    "Epochs",
    "Sample",
    "check_store",
    "local_positions",
    "open_store",
    "reads_store",
    "resolve",
    "sources_of",
    "train_epochs",
    "val_epochs",
]
