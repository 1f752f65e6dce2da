"""Everything of a run that lies on disk, opened once: `open_run(cfg)`."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from data.augment import AugmentDecoder, PairMix, canary
from data.augment.decoder import eval_transform, mean_and_std
from data.augment.device import differing_operation, unsupported
from data.identity import PROOF_IMAGES, adopted_values, check_proof, choice_of, excess_of
from data.images.datasets import build_dataset
from data.replay import Batch, ReplayDataset
from data.sampler import EpochBatches, EpochSampler, Wanted
from data.store.files import StoreError
from data.store.format import epochs_text, other_choice
from data.store.keys import map_positions
from data.store.original import UpstreamStoreReader
from data.store.reader import LogitsStoreReader
from data.store.verify import Shown, Verifier

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container
ORIGINAL_CLASSES = {"imagenet22k": 21841}  # an original's store does not say how many it has


def open_run(cfg, num_outputs: int = 0) -> RunData:
    """The images and the store that a configuration names, and what it becomes with what only they
    know; `num_outputs` is the class count of a teacher or of weights that are given, if any.
    """
    images = build_dataset(cfg, "val" if cfg.EVAL_MODE else "train")
    store = open_store(cfg, images.get_keys(), num_outputs) if reads_store(cfg) else None
    cfg = cfg.replace(_resolved_values(cfg, images, store, num_outputs))
    index_of = None
    if store is not None:
        try:
            index_of = map_positions(store, images.get_keys(), cache=cfg.DATA.INDEX_DIR or None)
        except StoreError as error:
            other = other_choice(store.manifest["info"], choice_of(cfg))
            raise StoreError(f"{error}{other}") from None
    return RunData(cfg, images, store, index_of)


def resolve(cfg, num_outputs: int = 0):
    """A frozen copy of `cfg` with what data and store know: class count, K, seeds, recipe, fill."""
    return open_run(cfg, num_outputs).cfg


@dataclass(frozen=True)
class RunData:
    """What a run reads: open, and described by a resolved configuration."""

    cfg: Any
    images: Any  # what is trained on (with --eval: evaluated): [i] -> (PIL image, label)
    store: LogitsStoreReader | UpstreamStoreReader | None
    index_of: (
        np.ndarray | None
    )  # of the image at each position of the store, -1: not there; None: i

    @cached_property
    def decoder(self) -> AugmentDecoder:
        """(image, seed) -> training tensor."""
        return AugmentDecoder.from_config(self.cfg)

    @cached_property
    def mix(self) -> PairMix:
        """Mixes neighbours of a batch."""
        return PairMix.from_config(self.cfg)

    @cached_property
    def validation(self) -> Any:
        """The images to evaluate on; a ValueError says why there are none."""
        return self.images if self.cfg.EVAL_MODE else build_dataset(self.cfg, "val")

    def train_loader(
        self,
        batch_size: int,
        rank: int = 0,
        step_images: int = 1,
        topk: int = 0,
        executor: str = "pillow",
        verify: Callable[[int], object] = int,
    ) -> EpochLoader:
        """One rank's training batches.

        `step_images`: images of an update over all ranks, to a multiple of which an epoch is cut (1
        keeps every image, for saving). `topk` of the store's columns are read (0: as configured).
        The batches of `executor` "bytes" and "device" are for `data.replay.on_device`. `verify` is
        called with an epoch before anything of it is read.
        """
        cfg = self.cfg
        replay = ReplayDataset(
            self.images,
            self.decoder,
            self.store,
            cfg.DATA.SEED,
            topk=topk or cfg.DISTILL.LOGITS_TOPK,
            index_of=self.index_of,
            executor=executor,
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
        return EpochLoader(cfg, replay, sampler, batch_size, self.store_epoch, verify)

    def val_loader(self, rank: int = 0) -> EpochLoader:
        """One rank's share of the validation images, each once over all ranks: (images, labels)."""
        dataset = TransformedDataset(self.validation, eval_transform(self.cfg))
        sampler = EpochSampler(len(dataset), self.cfg.WORLD_SIZE, rank, shuffle=False)
        batch_size = self.cfg.TEST.BATCH_SIZE or self.cfg.DATA.BATCH_SIZE
        return EpochLoader(self.cfg, dataset, sampler, batch_size)

    def choose_executor(self, device: torch.device, log: Callable[[str], object]) -> str:
        """What carries out the plans, as ReplayDataset names it: AUG.EXECUTOR, if the proof allows.

        Before the device does so, it must make the same bits of the canary's and of own images.
        """
        wanted = self.cfg.AUG.EXECUTOR
        # A quarter of what finished images are; a CPU has them finished more quickly in workers.
        pillow = "bytes" if device.type == "cuda" else "pillow"
        if wanted == "pillow" or (wanted == "auto" and device.type != "cuda"):
            return pillow
        fault = None
        if device.type == "mps":
            fault = "MPS has no float64"
        elif name := unsupported(self.decoder):
            fault = f"{name} has no form on a device"
        elif name := differing_operation(self.decoder, self._proof_cases(), device):
            fault = f"{device} computes other bits than Pillow in {name}"
        if fault is None:
            return "device"
        if wanted == "device":
            raise ValueError(f"AUG.EXECUTOR = device: {fault}: set AUG.EXECUTOR pillow")
        log(f"IMAGES ARE AUGMENTED BY PILLOW, in the loader's processes: {fault}")
        return pillow

    def _proof_cases(self) -> list[tuple[Image.Image, int]]:
        """(image, seed): the canary's, whose seeds draw every effect of the default recipe, a drawn
        image under more seeds, and images of the run's own.
        """
        drawn, jpeg = canary.drawn_image(), canary.jpeg_image()
        cases = [(image, seed) for image in (drawn, jpeg) for seed in canary.SEEDS]
        cases += [(drawn, seed) for seed in range(PROOF_IMAGES)]
        count = min(PROOF_IMAGES, len(self.images))
        own = [self.images[i * len(self.images) // count][0] for i in range(count)]
        return cases + [(image, seed) for seed, image in enumerate(own)]

    def store_epoch(self, epoch: int) -> int:
        """The epoch whose seeds, records, pairs and order serve an epoch of the run."""
        distill = self.cfg.DISTILL
        if self.store is None or not (distill.REUSE_EPOCHS or distill.REUSE_FIRST):
            return epoch
        return epoch % (distill.REUSE_FIRST or self._num_stored)

    def verify(self, epoch: int, shown: Shown) -> None:
        """Return when the records of an epoch are verified, as `shown` shows; a StoreError if they
        are not what was sealed. Those of the next epoch are verified meanwhile.
        """
        if self.store is None or not self.cfg.DISTILL.VERIFY:
            return
        self._verifier.wait(self.store_epoch(epoch), shown)
        if epoch + 1 < self.cfg.TRAIN.EPOCHS:
            self._verifier.begin(self.store_epoch(epoch + 1))

    @cached_property
    def _verifier(self) -> Verifier:
        return Verifier(self.store)

    @cached_property
    def _num_stored(self) -> int:
        count = len(self.store.epochs())
        if not count:
            raise ValueError(f"{self.store.root}: no epoch is sealed: run save_logits.py first")
        return count

    def check_store(self, wanted: Iterable[int] | None = None) -> str:
        """Everything that can be checked before the first batch, for one process to do.

        `wanted` are the epochs to be read, by default all of the run. Returns a line about the
        store, "" without one.
        """
        store, cfg = self.store, self.cfg
        if store is None:
            return ""
        if wanted is None:
            wanted = range(cfg.TRAIN.START_EPOCH, cfg.TRAIN.EPOCHS)
        store.check_epochs(sorted({self.store_epoch(epoch) for epoch in wanted}))
        if isinstance(store, LogitsStoreReader):
            # A student of another size (DISTILL.OTHER_SIZE) proves the writer's decoder all the
            # same.
            size = store.manifest["identity"]["image_size"]
            decoder = AugmentDecoder.from_config(cfg.replace({"DATA.IMG_SIZE": size}))
            proof = store.manifest["proof"]
            check_proof(proof, self.images, decoder, str(store.root), self.index_of)
        return (
            f"store {store.root}: top-{store.k} of {store.num_classes} classes, {len(store):,}"
            f" images, {epochs_text(store.epochs())}"
        )

    def sources(self) -> dict[str, Any]:
        """Which images a training learns from, and which teacher's records: what must stay the same
        when it is continued.
        """
        found = {"images": len(self.images), "keys_sha256": self.images.get_keys().digest()}
        if self.store is not None and self.store.manifest["teacher"]:
            found["teacher"] = self.store.manifest["teacher"]
        return found


class EpochLoader:
    """Batches of a data set, epoch by epoch, from worker processes that live as long as it does.

    A fault in a worker is a ValueError of one line here; `waited` adds up the seconds that an
    epoch's batches were waited for.
    """

    def __init__(
        self,
        cfg,
        dataset: Dataset,
        sampler: EpochSampler,
        batch_size: int,
        store_epoch: Callable[[int], int] = int,
        verify: Callable[[int], object] = int,
    ) -> None:
        """`store_epoch` says which epoch of the order serves an epoch of the run; `verify` is told
        an epoch of the run before anything of it is read.
        """
        self.dataset = dataset
        self.sampler = sampler
        self.waited = 0.0
        self._store_epoch = store_epoch
        self._verify = verify
        self._batches = EpochBatches(sampler, batch_size)
        self._workers: list[multiprocessing.Process] = []
        self.num_workers = loader_processes(cfg)
        options: dict[str, Any] = {"num_workers": self.num_workers}
        if self.num_workers:
            options["persistent_workers"] = True
            options["prefetch_factor"] = cfg.DATA.PREFETCH
            if cfg.DATA.WORKER_START != "auto":
                options["multiprocessing_context"] = cfg.DATA.WORKER_START
        if cfg.DATA.PIN_MEMORY and cfg.DEVICE in ("auto", "cuda"):
            options["pin_memory"] = torch.cuda.is_available()
        with _quiet_about_cores():
            self._loader = DataLoader(
                _Guarded(dataset),
                batch_sampler=self._batches,
                collate_fn=partial(_collate, getattr(dataset, "collate", default_collate)),
                generator=torch.Generator(),  # else each epoch draws from the global one
                **options,
            )

    def count(self, epoch: int = 0) -> int:
        """Number of batches of a whole epoch for this rank."""
        return -(-self.sampler.length(self._store_epoch(epoch)) // self._batches.batch_size)

    def batches(self, epoch: int, start: int = 0, wanted: Wanted | None = None) -> Iterator[Batch]:
        """The batches of an epoch for this rank, without its first `start` positions; of the rest
        those that are `wanted`.
        """
        self.waited = 0.0
        self._verify(epoch)
        self._batches.set_epoch(self._store_epoch(epoch), start, wanted)
        return self._received(self._started())

    def _started(self) -> Iterator[Any]:
        """The loader's iterator; where it starts workers, they are remembered."""
        before = multiprocessing.active_children()
        with _quiet_about_cores(), _signals_held():
            iterator = iter(self._loader)
        started = [child for child in multiprocessing.active_children() if child not in before]
        if self._loader.num_workers and started:
            self._workers += started
            # Runs before multiprocessing asks them to end and waits, which would be for ever.
            multiprocessing.util.Finalize(None, _kill, (started,), exitpriority=1)
        return iterator

    def _received(self, iterator: Iterator[Any]) -> Iterator[Batch]:
        while True:
            begun = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # PyTorch has no type of its own for a lost worker, so the workers are looked at.
                # One that has just been killed may take a moment to be gone.
                wait([worker.sentinel for worker in self._workers], timeout=1.0)
                dead = [worker for worker in self._workers if worker.exitcode is not None]
                if not dead:
                    raise
                raise ValueError(
                    f"a loader process has died (pid {dead[0].pid}, exit code {dead[0].exitcode}):"
                    " was the memory used up? Try fewer DATA.NUM_WORKERS"
                ) from error
            finally:
                self.waited += time.perf_counter() - begun
            if isinstance(batch, ValueError):
                raise batch
            yield batch


class TransformedDataset(Dataset):
    """(image, label) of a data set, by the (epoch, position) that samplers here deal."""

    def __init__(self, dataset, transform: Callable) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, int]:
        image, label = self.dataset[index[1]]
        return self.transform(image), int(label)


class _Guarded(Dataset):
    """A data set whose faults travel as values: PyTorch would put a traceback into their text."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: tuple[int, int]) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return ValueError(str(error))


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """A batch of samples, in memory that processes share, or the first fault among them."""
    for sample in samples:
        if isinstance(sample, ValueError):
            return sample
    try:
        batch = collate(samples)
        if get_worker_info():
            # PyTorch would do so in a thread whose faults nobody hears of.
            for part in batch:
                part = getattr(part, "buffer", part)
                if isinstance(part, torch.Tensor):
                    part.share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return ValueError(
            "/dev/shm is full, where loader processes hand over their batches: give the container"
            " more (docker run --shm-size 16g), or set DATA.NUM_WORKERS 0"
        )
    return batch


@contextmanager
def _quiet_about_cores() -> Iterator[None]:
    """PyTorch warns of more workers than cores; how long training waits for data is told anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start processes that are deaf to signals: they keep the mask of signals they begin with.

    Batch systems and Ctrl-C signal all processes of a job at once, and the main process still needs
    its batches to come to an orderly end. PyTorch's handler for a worker's death, which would raise
    in the middle of whatever is done then, gives way: who waits for a batch notices.
    """
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    # Not SIGCHLD: a fork server, which keeps the mask too, would never learn of ended workers.
    asking = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill(workers: Iterable[multiprocessing.Process]) -> None:
    """End what is deaf to the SIGTERM that multiprocessing sends when this process exits."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def loader_processes(cfg) -> int:
    """DATA.NUM_WORKERS; -1 is this process's share of the cores but one, 16 at most."""
    if cfg.DATA.NUM_WORKERS >= 0:
        return cfg.DATA.NUM_WORKERS
    # what a batch system or a container allows, where the system says so
    has_mask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # none, or "max"
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, int(quota) // int(period))
    environment = os.environ
    if "LOCAL_WORLD_SIZE" in environment:  # torchrun's processes
        cores //= int(environment["LOCAL_WORLD_SIZE"])
    elif tasks := re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        # srun's, each of which may be bound to its share already
        on_node = int(environment.get("SLURM_CPUS_ON_NODE", cores))
        cores = min(cores, on_node // int(tasks[0]))
    return min(max(cores - 1, 1), 16)


def reads_store(cfg) -> bool:
    """Whether this run reads a store (rather than writes one, evaluates, or learns without)."""
    is_other = cfg.DISTILL.SAVE_TEACHER_LOGITS or cfg.EVAL_MODE or cfg.THROUGHPUT_MODE
    return bool(cfg.DISTILL.TEACHER_LOGITS_PATH) and not is_other


def open_store(cfg, keys, num_outputs: int = 0) -> LogitsStoreReader | UpstreamStoreReader:
    """The store a run reads, in our layout or the original's."""
    root = Path(cfg.DISTILL.TEACHER_LOGITS_PATH)
    if (root / "manifest.json").is_file():
        store = LogitsStoreReader(root)
        for epoch in store.epochs()[:1]:
            store.check_seal(epoch)  # before anything that the manifest says is believed
        return store
    if not any(root.glob("logits_top*_epoch*")):
        raise ValueError(
            f"DISTILL.TEACHER_LOGITS_PATH = {root}: no store there (neither manifest.json nor"
            " logits_top*_epoch*/): write one with save_logits.py, or correct the path"
        )
    # Of several stores in one folder LOGITS_TOPK names one; else it may be a part of the columns.
    k = cfg.DISTILL.LOGITS_TOPK
    is_named = any(root.glob(f"logits_top{k}_epoch*"))
    classes = num_outputs or cfg.MODEL.NUM_CLASSES or ORIGINAL_CLASSES.get(cfg.DATA.DATASET, 1000)
    return UpstreamStoreReader(
        root,
        keys,
        k if is_named else None,
        num_classes=classes,
        order=cfg.DISTILL.UPSTREAM_ORDER,
        cache=cfg.DATA.INDEX_DIR or None,
    )


def _resolved_values(cfg, images, store, num_outputs: int) -> dict[str, Any]:
    """What data and store decide, by key."""
    classes = num_outputs or cfg.MODEL.NUM_CLASSES or images.num_classes
    values: dict[str, Any] = {"MODEL.NUM_CLASSES": classes}
    if isinstance(store, LogitsStoreReader):
        values |= adopted_values(cfg, store.manifest["identity"], str(store.root))
    elif store is not None:
        values |= _values_of_original(cfg, store)
    classes = values["MODEL.NUM_CLASSES"]
    data = cfg.DATA.DATA_PATH or cfg.DATA.DATASET
    if classes < 1:
        way_out = "learn from a teacher (DISTILL.TEACHER_LOGITS_PATH), or name labelled data"
        if ":" in cfg.DATA.DATASET:
            way_out = "set MODEL.NUM_CLASSES"
        raise ValueError(
            f"DATA.DATASET = {cfg.DATA.DATASET}: no labels tell the number of classes: {way_out}"
        )
    if classes < images.num_classes:
        way_out = f"set MODEL.NUM_CLASSES {images.num_classes} or more, or leave it out"
        if classes != cfg.MODEL.NUM_CLASSES and (num_outputs or store is not None):
            whose = "the given weights" if store is None else f"the store {store.root}"
            way_out = f"they are those of {whose}: give the data that belongs to them"
        if cfg.DATA.CLASS_LIST:
            way_out = (
                f"of them DATA.CLASS_LIST {cfg.DATA.CLASS_LIST} names more: give a file of these"
                f" {classes} names alone, as that of DISTILL.CLASS_SUBSET is if it holds names"
            )
        raise ValueError(
            f"{classes} classes are fewer than the {images.num_classes} of the data {data}:"
            f" {way_out}"
        )
    if cfg.DISTILL.SAVE_TEACHER_LOGITS or cfg.DISTILL.ONLINE:
        topk = cfg.DISTILL.LOGITS_TOPK or default_topk(classes)
        values["DISTILL.LOGITS_TOPK"] = min(topk, classes)
    if not list(values.get("AUG.FILL", cfg.AUG.FILL)):
        mean, _ = mean_and_std(cfg)
        values["AUG.FILL"] = [min(255, round(255 * value)) for value in mean]
    return values


def default_topk(num_classes: int) -> int:
    """How many of the teacher's probabilities are kept where DISTILL.LOGITS_TOPK does not say."""
    return 100 if num_classes > 1000 else 10


def _values_of_original(cfg, store: UpstreamStoreReader) -> dict[str, Any]:
    """What a store of the original's decides, which has no manifest."""
    topk = cfg.DISTILL.LOGITS_TOPK
    if topk > store.k:
        raise ValueError(
            f"DISTILL.LOGITS_TOPK = {topk}, but the store {store.root} holds top-{store.k}: set"
            f" {store.k} or less"
        )
    if "DATA.SEED" in cfg.EXPLICIT and cfg.DATA.SEED != 0:
        raise ValueError(
            f"DATA.SEED = {cfg.DATA.SEED}, but the original wrote the store {store.root} in the"
            " order of seed 0: leave DATA.SEED out"
        )
    return {
        "MODEL.NUM_CLASSES": store.num_classes,
        "DISTILL.LOGITS_TOPK": topk or store.k,
        "DISTILL.EXCESS": excess_of(cfg, "subtract"),
        "DATA.SEED": 0,
    }
