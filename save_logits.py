"""Run a teacher over the augmented images of some epochs and keep its answers in a logits store; or
check a store against its teacher.

    torchrun --nproc-per-node 8 save_logits.py --cfg configs/teacher/clip_vit_large_patch14_22k.yaml --data-path ImageNet-22k \\
        --resume clip_vit_large_patch14_22k.pth --opts DISTILL.TEACHER_LOGITS_PATH teacher_logits

It continues where an earlier run was interrupted. Exit codes: 0 done, 1 the check found
differences, 2 a fault, 75 stopped by a signal. """

from __future__ import annotations

import argparse
import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import timm
import torch
import torch.distributed as dist
from torch import Tensor

from configs import ConfigError, argument_parser, config_from_args, run_folder
from data.augment.decoder import AugmentDecoder, mean_and_std
from data.augment.pairs import PairMix
from data.augment.rng import generator, run_seed, sample_seed
from data.build import Epochs, check_store, open_store, resolve, train_epochs, val_epochs
from data.identity import check_proof, identity_of, proof_of
from data.images.datasets import build_dataset
from data.replay import Sample
from data.store.format import ranges
from data.store.keys import Keys
from data.store.reader import (
    AsyncAppender,
    LogitsStoreReader,
    LogitsStoreWriter,
    check_token,
    pack_records,
    remove_token,
    write_token,
)
from logger import create_logger, progress
from models.agreement import Agreement, compare
from models.distill import encode
from models.teacher import Teacher
from utils import (
    Distributed,
    ElsewhereError,
    StopRequest,
    evaluate,
    from_environment,
    init_distributed,
    seed_everything,
)

EXIT_DIFFERENT, EXIT_FAULT, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130
PATIENCE = timedelta(days=7)  # one process may wait while another computes a whole epoch
PEER_ENDED = "another process of this run has ended: see what it says, then run the same again"

Result = TypeVar("Result")


class Stopped(Exception):
    """The process was asked to stop."""


class Group:
    """The processes of a run as a group that shares its faults: where one fails, none is left
    waiting.
    """

    def __init__(self, world: Distributed) -> None:
        self.world = world

    def gather(self, obj: Any) -> list[Any]:
        """Every process's object, in the order of ranks; a process that has ended is noticed at
        once.
        """
        try:
            return self.world.gather_objects(obj)
        except RuntimeError as error:
            raise ElsewhereError(PEER_ENDED) from error

    def everywhere(self, function: Callable[[], Result]) -> Result:
        """What `function` gives here, once it has succeeded on all processes."""
        result, fault = _attempt(function)
        self._share(fault)
        return result

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` gives on rank 0."""
        result, fault = _attempt(function) if self.world.is_main else (None, None)
        self._share(fault)
        return self.gather(result)[0]

    def main_first(self, function: Callable[[], Result]) -> Result:
        """What `function` gives here; rank 0 calls it first, the others find the files that it
        made.
        """
        for is_my_turn in (self.world.is_main, not self.world.is_main):
            if is_my_turn:
                result = self.everywhere(function)
            else:
                self._share(None)
        return result

    def _share(self, fault: Exception | None) -> None:
        """Raise the fault of this process, or else the first one of another."""
        texts = self.gather(None if fault is None else str(fault))
        if fault is not None:
            raise fault
        for rank, text in enumerate(texts):
            if text is not None:
                raise ElsewhereError(f"rank {rank} has failed: {text}")


@dataclass(frozen=True)
class Run:
    """What saving and checking have at hand."""

    cfg: Any  # resolved
    group: Group
    stop: StopRequest
    log: logging.Logger
    teacher: Teacher
    mix: PairMix
    label_map: np.ndarray | None  # of the training data

    @property
    def world(self) -> Distributed:
        return self.group.world

    def ask(self, batch: Sample) -> tuple[Tensor, Tensor]:
        """The teacher's outputs [B, C] for a batch mixed as its seeds say, and the main label of
        each mixed image [B], -1 for none.
        """
        device = self.world.device
        labels = None
        if self.label_map is not None:
            labels = (
                torch.from_numpy(self.label_map)[batch.label]
                .masked_fill_(batch.label < 0, -1)
                .to(device, non_blocking=True)
            )
        images, targets = self.mix(batch.image.to(device, non_blocking=True), labels, batch.seed)
        main_labels = (
            torch.full((len(images),), -1)
            if targets is None
            else targets.argmax(1).masked_fill_(targets.amax(1) <= 0, -1)
        )
        return self.teacher.logits(images), main_labels

    def until_stopped(self, batches: Iterable[Result]) -> Iterator[Result]:
        """The batches, up to the moment that a signal asks the process to stop."""
        for batch in batches:
            yield batch
            if self.stop.received:
                raise Stopped

    def watched(
        self, batches: Iterable[Result], total: int, what: str, note: Callable[[], str] = str
    ) -> Iterator[Result]:
        """The batches, with their progress on rank 0."""
        return progress(
            batches, total, what, "batches", self.log.info, enabled=self.world.is_main, note=note
        )


@dataclass
class Tally:
    """What was written of an epoch, and how often the teacher was right."""

    images: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0

    def add(self, labels: np.ndarray, indices: np.ndarray) -> None:
        """Count images with their labels [B], -1 for none, and the teacher's classes [B, 5 or
        more], the most probable first.
        """
        is_right = (indices[:, :5] == labels[:, None]) & (labels >= 0)[:, None]
        self.images += len(labels)
        self.labelled += int((labels >= 0).sum())
        self.top1 += int(is_right[:, 0].sum())
        self.top5 += int(is_right.any(1).sum())

    def accuracy(self) -> dict[str, float]:
        """The teacher's accuracies in percent, and over how many images: of an epoch that was
        resumed those of the last run.
        """
        if not self.labelled:
            return {}
        return {
            "images": self.labelled,
            "top1": 100 * self.top1 / self.labelled,
            "top5": 100 * self.top5 / self.labelled,
        }

    def __str__(self) -> str:
        return f"{self.images:,} images" + "".join(
            f", {key} {value:.2f}%" for key, value in self.accuracy().items() if key != "images"
        )


def main(argv: list[str]) -> int:
    """Save or check as the command line says and return the exit code; a fault that a user can mend
    is one line on stderr.
    """
    args = _parse(argv)
    rank = os.environ.get("RANK", "0")
    own = {
        "EVAL_MODE": False,
        "DISTILL.ENABLED": True,
        "TRAIN.WARMUP_EPOCHS": 0,
        "DISTILL.REUSE_EPOCHS": False,
        "DISTILL.SAVE_TEACHER_LOGITS": not args.check_saved_logits,
    }
    with StopRequest() as stop:
        try:
            cfg = config_from_args(args, from_environment("WORLD_SIZE", 1), own)
            group = Group(init_distributed(cfg.DEVICE, timeout=PATIENCE))
            run = _prepare(cfg, group, stop)
            code = (
                _check(run, args.exact, args.percent)
                if args.check_saved_logits
                else _save(run, args.skip_eval)
            )
            group.world.destroy()
            return code
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except Exception as error:
            if stop.received:  # what fails while processes end is their ending
                print(
                    f"stopped by {stop.received}: what is written is kept, run the same again to"
                    " go on",
                    file=sys.stderr,
                )
                return EXIT_STOPPED
            text = _one_line(error)
            if text is None:
                raise
            if rank == "0" or not isinstance(error, ConfigError):  # which is the same on all
                print(
                    f"error: {text}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr
                )
            return EXIT_FAULT


def answers(
    run: Run, batches: Iterable[Sample], tally: Tally
) -> Iterator[tuple[np.ndarray, Callable[[], np.ndarray]]]:
    """For each batch the positions [n] and a function that waits for the device and gives the
    records [n].

    The function also counts the records in `tally`; it may be called in another thread.
    """
    k = run.cfg.DISTILL.LOGITS_TOPK
    for batch in batches:
        logits, labels = run.ask(batch)
        indices, probs = encode(logits, max(k, 5), run.cfg.DISTILL.TEMPERATURE)
        count = len(batch.position) - has_own_partner(batch.position)
        arrive = _to_host(labels[:count], indices[:count], probs[:count, :k])
        yield (
            batch.position[:count].numpy(),
            partial(
                _records, arrive, batch.seed[:count].numpy(), k, run.cfg.MODEL.NUM_CLASSES, tally
            ),
        )


def has_own_partner(positions: Tensor) -> bool:
    """Whether a batch ends with the last image of an odd paired epoch, which stands there twice."""
    return len(positions) > 1 and bool(positions[-1] == positions[-2])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argument_parser("Save a teacher's answers to a logits store, or check them.")
    parser.add_argument(
        "--check-saved-logits",
        action="store_true",
        help="compare the store with what the teacher says now, and judge",
    )
    parser.add_argument(
        "--exact", action="store_true", help="with --check-saved-logits: every bit must be equal"
    )
    parser.add_argument(
        "--percent",
        type=float,
        metavar="P",
        help="with --check-saved-logits: a share of the batches, drawn by SEED",
    )
    parser.add_argument(
        "--skip-eval", action="store_true", help="do not evaluate the teacher before saving"
    )
    args = parser.parse_args(argv)
    if "THROUGHPUT_MODE" in args:
        parser.error("--throughput belongs to main.py")
    if (args.exact or args.percent is not None) and not args.check_saved_logits:
        parser.error("--exact and --percent go with --check-saved-logits")
    if args.percent is not None and not 0 < args.percent <= 100:
        parser.error(f"--percent {args.percent:g}: expected more than 0 and at most 100")
    return args


def _prepare(cfg, group: Group, stop: StopRequest) -> Run:
    """The teacher, and what it decides."""
    world, path, is_saving = (
        group.world,
        cfg.DISTILL.TEACHER_LOGITS_PATH,
        cfg.DISTILL.SAVE_TEACHER_LOGITS,
    )
    if not path:
        raise ValueError(
            "DISTILL.TEACHER_LOGITS_PATH: name the store's folder, e.g. --opts"
            " DISTILL.TEACHER_LOGITS_PATH teacher_logits"
        )
    log = group.everywhere(lambda: create_logger(run_folder(cfg), world.rank, "save_logits"))
    if is_saving:
        _check_shared(Path(path), group)
    if world.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    seed_everything(cfg.SEED)  # of what a user's function draws
    teacher = group.main_first(lambda: Teacher.from_config(cfg, world.device, log.info))
    if cfg.AMP_DTYPE == "bf16":
        log.warning(
            "AMP_DTYPE bf16 is too coarse for stored probabilities: the teacher runs in %s",
            teacher.precision,
        )
    if not is_saving:  # the original's stores do not say how many classes they have
        cfg = cfg.replace({"MODEL.NUM_CLASSES": teacher.num_classes})
    cfg = group.on_main(partial(resolve, cfg, teacher.num_classes))
    dataset = build_dataset(cfg, "train")
    if not is_saving:  # all columns are checked, however few the recipe would read
        cfg = cfg.replace({"DISTILL.LOGITS_TOPK": open_store(cfg, dataset.get_keys()).k})
    label_map = teacher.label_map(dataset.num_classes)
    return Run(cfg, group, stop, log, teacher, PairMix.from_config(cfg), label_map)


def _check_shared(root: Path, group: Group) -> None:
    """Raise unless all processes see the same folder."""
    token = group.on_main(lambda: secrets.token_hex(8))
    group.on_main(lambda: write_token(root, token))
    try:
        group.everywhere(lambda: check_token(root, token))
    finally:
        if group.world.is_main:
            remove_token(root, token)


def _save(run: Run, skip_eval: bool) -> int:
    """Write the epochs that are not sealed yet."""
    cfg, group, log = run.cfg, run.group, run.log
    root, rank = Path(cfg.DISTILL.TEACHER_LOGITS_PATH), run.world.rank
    wanted = range(cfg.TRAIN.START_EPOCH, cfg.TRAIN.EPOCHS)
    manifest = group.on_main(lambda: _manifest(run))
    job = group.on_main(lambda: secrets.token_hex(8))
    dataset = build_dataset(cfg, "train")
    if run.world.world_size > 1:  # all machines must have the same data, and augment alike
        group.everywhere(
            lambda: check_proof(
                manifest["proof"], dataset, AugmentDecoder.from_config(cfg), f"{root} (rank 0)"
            )
        )
    with group.main_first(
        lambda: LogitsStoreWriter(root, manifest, dataset.get_keys(), job=job)
    ) as writer:
        # Asking a sealed epoch what it lacks clears away what a crash may have left beside it.
        pending = group.on_main(
            lambda: [
                epoch
                for epoch in wanted
                if not writer.is_sealed(epoch) or len(writer.missing(epoch))
            ]
        )
        if not pending:
            log.info("%s: epochs %s are complete, nothing is left to do", root, ranges(wanted))
            return 0
        group.on_main(lambda: writer.check_disk(pending))
        log.info(
            "%s: epochs %s of %s images, top-%d of %s classes",
            root,
            ranges(pending),
            f"{len(writer):,}",
            writer.k,
            f"{writer.num_classes:,}",
        )
        if skip_eval:
            log.info("the teacher is not evaluated (--skip-eval)")
        else:
            _evaluate(run)
        data = group.everywhere(lambda: train_epochs(cfg, rank, cfg.DATA.BATCH_SIZE, step_images=1))
        for left, epoch in zip(reversed(range(len(pending))), pending):
            bits = group.on_main(partial(_begin, writer, epoch))
            if bits is None:
                log.info("epoch %d was sealed by another job meanwhile", epoch)
                continue
            if rank:
                writer.begin_epoch(epoch, rank)
            written = _write_epoch(
                run, data, writer, epoch, np.unpackbits(bits, count=len(writer)).view(bool), left
            )
            total = Tally(*map(sum, zip(*map(astuple, group.gather(written)))))
            if run.world.is_main:
                writer.seal_in_background(epoch, teacher=total.accuracy())
        group.on_main(writer.close)
    log.info("%s: epochs %s are sealed", root, ranges(wanted))
    return 0


def _begin(writer: LogitsStoreWriter, epoch: int) -> np.ndarray | None:
    """Rank 0: lock an epoch and tell, as packed bits, which images it lacks; None if it is sealed
    by now.
    """
    if writer.is_sealed(epoch):
        return None
    writer.begin_epoch(epoch)
    is_missing = np.zeros(len(writer), bool)
    is_missing[writer.missing(epoch)] = True
    return np.packbits(is_missing)


def _write_epoch(
    run: Run,
    data: Epochs,
    writer: LogitsStoreWriter,
    epoch: int,
    is_missing: np.ndarray,
    epochs_left: int,
) -> Tally:
    """Append this rank's batches of an epoch that are not whole; returns what was written."""
    start, share, tally = time.monotonic(), float(is_missing.mean()), Tally()
    wanted = None if share == 1 else lambda number, positions: bool(is_missing[positions].any())
    to_come = len(writer) * (share + epochs_left) / run.world.world_size

    def note() -> str:
        rate = tally.images / (time.monotonic() - start)
        left = timedelta(seconds=round((to_come - tally.images) / rate)) if rate else "unknown"
        megabytes = tally.images * writer.dtype.itemsize / 1e6
        return (
            f"rank 0: {tally}, {megabytes:,.1f} MB, {rate:,.0f} images/s; all epochs done in {left}"
        )

    batches = run.watched(
        data.batches(epoch, wanted=wanted), round(data.count(epoch) * share), f"epoch {epoch}", note
    )
    with AsyncAppender(writer) as appender:
        for positions, records in run.until_stopped(answers(run, batches, tally)):
            appender.append(positions, records)
    writer.end_epoch()
    run.log.info("epoch %d; %s", epoch, note())
    return tally


def _records(
    arrive: Callable[[], list[np.ndarray]],
    seeds: np.ndarray,
    k: int,
    num_classes: int,
    tally: Tally,
) -> np.ndarray:
    labels, indices, probs = arrive()
    tally.add(labels, indices)
    return pack_records(seeds, indices[:, :k], probs, num_classes)


def _to_host(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin to copy tensors to the CPU; the function that is returned waits for them."""
    if not any(tensor.is_cuda for tensor in tensors):
        return lambda: [tensor.cpu().numpy() for tensor in tensors]
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )
        for tensor in tensors
    ]
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()

    def wait() -> list[np.ndarray]:
        arrived.synchronize()
        return [copy.numpy() for copy in copies]

    return wait


def _manifest(run: Run) -> dict[str, Any]:
    """What the store is, as rank 0 tells it."""
    cfg, device = run.cfg, run.world.device
    dataset = build_dataset(cfg, "train")
    mean, std = mean_and_std(cfg)
    versions = {"python": platform.python_version()} | {
        module.__name__: module.__version__ for module in (torch, timm, np, PIL)
    }
    return {
        "identity": identity_of(cfg, len(dataset), Keys.of(dataset.get_keys()).digest()),
        "teacher": run.teacher.identity(),
        "proof": proof_of(cfg, dataset, AugmentDecoder.from_config(cfg)),
        "info": {
            "versions": versions,
            "mean": mean,
            "std": std,
            "device": (
                torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
            ),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "classes": run.teacher.classes,
        },
    }


def _evaluate(run: Run) -> None:
    """The teacher's accuracy on the validation images, and a warning where it says that labels and
    outputs do not belong together.
    """
    cfg, log, teacher = run.cfg, run.log, run.teacher
    fault = run.group.on_main(lambda: _attempt(lambda: build_dataset(cfg, "val"))[1])
    if fault is not None:
        log.warning("the teacher is not evaluated, there are no validation images: %s", fault)
        return
    data = run.group.everywhere(lambda: val_epochs(cfg, run.world.rank))
    num_classes = build_dataset(cfg, "val").num_classes
    label_map = teacher.label_map(num_classes)
    if label_map is None:
        log.warning(
            "the teacher is not evaluated: no map is known from its %d outputs to the data's %d"
            " classes; DATA.CLASS_LIST can number the data's classes as its outputs",
            teacher.num_classes,
            num_classes,
        )
        return
    batches = run.until_stopped(
        run.watched(data.batches(0), data.count(), "evaluation of the teacher")
    )
    result = evaluate(
        teacher.model,
        batches,
        run.world.device,
        teacher.dtype,
        world=run.world,
        map_outputs=lambda logits: teacher.in_data_classes(logits, label_map),
    )
    if "top1" not in result:
        log.info("the teacher is not evaluated: the validation images have no labels")
        return
    log.info(
        "teacher: top-1 %.2f%%, top-5 %.2f%% of %s validation images",
        result["top1"],
        result["top5"],
        f"{result['count']:,}",
    )
    chance = 1 / num_classes
    if result["top1"] / 100 <= chance + 3 * (chance * (1 - chance) / result["count"]) ** 0.5:
        log.warning(
            "THE TEACHER IS NO BETTER THAN CHANCE: are these its weights, are mean and std its own,"
            " and are the data's classes numbered as its outputs are (DATA.CLASS_LIST)? Its answers"
            " are saved all the same"
        )


def _check(run: Run, exact: bool, percent: float | None) -> int:
    """Compare sealed epochs with what the teacher says now; 0 if models/agreement.py finds them the
    same.
    """
    cfg, group, log = run.cfg, run.group, run.log
    root, first, end = (
        Path(cfg.DISTILL.TEACHER_LOGITS_PATH),
        cfg.TRAIN.START_EPOCH,
        cfg.TRAIN.EPOCHS,
    )
    store = open_store(cfg, build_dataset(cfg, "train").get_keys())
    if run.teacher.num_classes != store.num_classes:
        raise ValueError(
            f"{root}: the store is of {store.num_classes} classes, this teacher of"
            f" {run.teacher.num_classes}: give the one that wrote it, with the same"
            " DISTILL.CLASS_SUBSET"
        )
    epochs = [epoch for epoch in store.epochs() if first <= epoch < end]
    if not epochs:
        raise ValueError(
            f"{root}: of the epochs {first} to {end - 1} none is there (there:"
            f" {ranges(store.epochs()) or 'none'}): set TRAIN.START_EPOCH and TRAIN.EPOCHS"
        )
    log.info("%s", group.on_main(lambda: check_store(cfg, epochs)))
    if (
        run.world.is_main
        and isinstance(store, LogitsStoreReader)
        and store.manifest["teacher"] != run.teacher.identity()
    ):
        log.warning(
            "the store was written by another teacher, or in another precision: %s",
            store.manifest["teacher"],
        )
    data = group.everywhere(
        lambda: train_epochs(
            cfg, run.world.rank, cfg.DATA.BATCH_SIZE, step_images=1, report=log.info
        )
    )
    total, left_out = Agreement(), 0
    for found, unknown in group.gather(_compare(run, store, epochs, data, percent)):
        total.merge(found)
        left_out += unknown
    log.info(
        "checked %sepochs %s: %s",
        "" if percent is None else f"{percent:g}% of the batches of ",
        ranges(epochs),
        total,
    )
    if left_out:
        log.info(
            "left out: %d images whose partner's seed the original did not keep (the last ones of"
            " odd epochs)",
            left_out,
        )
    for _, text in total.worst:
        log.info("worst: %s", text)
    faults = total.faults(exact)
    for fault in faults:
        log.error("FAILED: %s", fault)
    if not faults:
        log.info("PASSED: the store holds what the teacher says")
    return EXIT_DIFFERENT if faults else 0


def _compare(
    run: Run, store, epochs: list[int], data: Epochs, percent: float | None
) -> tuple[Agreement, int]:
    """What this rank's batches show, and how many images could not be compared."""
    is_ours = isinstance(store, LogitsStoreReader)
    found, left_out = Agreement(), 0
    for epoch in epochs:
        number = data.count(epoch)
        rng = generator(run_seed(run.cfg.SEED, epoch, 0, run.world.rank))
        chosen = set(
            range(number)
            if percent is None
            else rng.permutation(number)[: max(1, round(number * percent / 100))].tolist()
        )
        batches = data.batches(
            epoch, wanted=lambda index, positions, chosen=chosen: index in chosen
        )
        for batch in run.until_stopped(
            run.watched(batches, len(chosen), f"check of epoch {epoch}")
        ):
            logits, _ = run.ask(batch)
            is_odd = has_own_partner(batch.position)
            # the original gave that image another partner, and did not keep the seed
            is_unknown = is_odd and not is_ours
            left_out += is_unknown
            count = len(batch.position) - is_odd - is_unknown
            positions, seeds = batch.position[:count].tolist(), batch.seed[:count].tolist()
            right_seeds = (
                [sample_seed(run.cfg.DATA.SEED, epoch, position) for position in positions]
                if is_ours
                else seeds
            )
            indices, probs = (
                values[:count].to(logits.device) for values in (batch.indices, batch.probs)
            )
            found.add(
                compare(indices, probs, logits[:count], run.cfg.DISTILL.TEMPERATURE),
                torch.tensor([a != b for a, b in zip(seeds, right_seeds)], dtype=torch.bool),
                lambda row, epoch=epoch, positions=positions: (
                    f"epoch {epoch}, {store.keys[positions[row]]}"
                ),
            )
    return found, left_out


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """(result, None) or (None, the error)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _one_line(error: Exception) -> str | None:
    """What to tell a user of an error; None if it is a fault of the program."""
    text = " ".join(str(error).splitlines())
    if isinstance(error, (ValueError, OSError)):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is used up: use a smaller --batch-size ({text})"
    if "DataLoader worker" in text:
        return (
            f"a loader process has died ({text}): was the memory used up? Try fewer"
            " DATA.NUM_WORKERS"
        )
    if "gloo" in text or isinstance(error, dist.DistError):
        return PEER_ENDED
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
