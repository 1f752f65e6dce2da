"""Run a teacher over the augmented images of some epochs and keep its answers in a logits store.

    torchrun --nproc-per-node 8 save_logits.py --data-path ImageNet-22k \\
        --cfg configs/teacher/clip_vit_large_patch14_22k.yaml \\
        --resume clip_vit_large_patch14_22k.pth \\
        --opts DISTILL.TEACHER_LOGITS_PATH teacher_logits

With --check-saved-logits a store is compared with what its teacher says now. The same command goes
on where an earlier one ended. Exit codes: 0 done, 1 the check found differences, 2 an error that
one line explains, 75 stopped on request (SIGTERM, SIGUSR1, Ctrl-C); 130 a second Ctrl-C.
"""

from __future__ import annotations

import sys

from configs import commands

if __name__ == "__main__":  # before anything slow: --help, and what is wrong with a command line
    SETTINGS = commands.answered(lambda: commands.saving(None))

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import timm
import torch
from torch import Tensor
from yacs.config import CfgNode

import utils
from configs import run_folder
from data.augment.decoder import mean_and_std
from data.augment.rng import generator, run_seed, sample_seed
from data.build import EpochLoader, RunData, loader_processes, open_run
from data.identity import check_proof, choice_of, identity_of, proof_of
from data.replay import Batch, on_device
from data.store import LogitsStoreReader, LogitsStoreWriter
from data.store.format import counted, differing, epochs_text, pack_records, ranges, size_text
from data.store.keys import Keys
from logger import awaited, create_logger, no_trace_if_refused, progress
from models.agreement import Agreement, compare
from models.build import count_parameters
from models.class_map import LabelMap
from models.distill import encode
from models.teacher import Teacher
from utils import Distributed, Exit, Stopped, StopRequest, run_program

ENOUGH = 0.9  # of the probability: less of it is worth saying
GOES_ON = "what is written is kept, run the same again to go on"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Run:
    """What saving and checking have at hand."""

    cfg: CfgNode  # resolved
    world: Distributed
    stop: StopRequest
    log: Logger
    data: RunData
    teacher: Teacher
    labels: LabelMap | None  # which of its outputs each class of the training images is

    def ask(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's outputs [B, C] for a batch mixed as its seeds say, and the main label of
        each mixed image [B], -1 for none.
        """
        labels = None
        if self.labels is not None:
            labels = self.labels.labels(batch.label)
        mix = self.data.mix
        images, targets = mix(batch.image, labels, batch.seed, batch.mixes)  # [B, 3, H, W], [B, C]
        if targets is None:
            main_labels = torch.full((len(images),), -1)
        else:
            main_labels = targets.argmax(1).masked_fill_(targets.amax(1) <= 0, -1)
        return utils.outputs_of(self.teacher, images, self.rows), main_labels

    @property
    def rows(self) -> int:
        """Images of a whole batch of this process; whatever was computed before, as bits depend on
        it.
        """
        return min(self.cfg.DATA.BATCH_SIZE, len(self.data.images) // self.world.world_size)

    def open_loader(self, topk: int = 0) -> EpochLoader:
        """This rank's batches of an epoch, every image once over all ranks."""
        size = self.cfg.DATA.BATCH_SIZE
        return utils.open_loader(self.data, self.world, self.log, size, topk=topk)

    def watched(
        self, batches: Iterable[Item], total: int, what: str, note: Callable[[], str] = str
    ) -> Iterator[Item]:
        """The batches with their progress on rank 0, up to the moment of a request to stop."""
        shown = self.world.is_main
        for batch in progress(
            batches, total, what, "batches", self.log.info, enabled=shown, note=note
        ):
            yield batch
            if self.stop.received:
                raise Stopped(GOES_ON)


@dataclass
class Tally:
    """What was written of an epoch, and how often the teacher was right."""

    images: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    mass: float = 0.0  # what is stored of each image's probability, added up
    least: float = 1.0  # of any image
    enough: int = 0  # the K that holds ENOUGH of the first images, on average

    def add(self, labels: np.ndarray, indices: np.ndarray, probs: np.ndarray) -> None:
        """Count images with their labels [B], -1 for none, the teacher's classes [B, >= 5], the
        most probable first, and the probabilities that are stored [B, K].
        """
        mass = probs.sum(1, dtype=np.float64)
        self.mass += float(mass.sum())
        self.least = min(self.least, float(mass.min()))
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
        top1, top5 = 100 * self.top1 / self.labelled, 100 * self.top5 / self.labelled
        return {"images": self.labelled, "top1": top1, "top5": top5}

    def __str__(self) -> str:
        if not self.images:
            return "0 images"
        found = self.accuracy()
        rates = "".join(f", {key} {found[key]:.2f}%" for key in ("top1", "top5") if found)
        mass = self.mass / self.images
        stored = f", stored mass {100 * mass:.1f}%, of one image {100 * self.least:.1f}%"
        if mass < ENOUGH and self.enough:
            stored += f" (DISTILL.LOGITS_TOPK {self.enough} would keep {ENOUGH:.0%})"
        return f"{self.images:,} images{rates}{stored}"


def main(argv: list[str] | None = None) -> int:
    """Save or check as the command line says, and return the exit code."""
    return run_program(partial(commands.saving, argv), run)


def run(settings: tuple[argparse.Namespace, CfgNode], stop: StopRequest) -> int:
    """Save or check."""
    args, cfg = settings
    world = utils.init_distributed(cfg.DEVICE)
    utils.choose_kernels(cfg.TRAIN.DETERMINISTIC, world.device)
    with no_trace_if_refused(run_folder(cfg)):
        run = prepare(cfg, world, stop)
        if args.check_saved_logits:
            code = check(run, args.exact, args.percent)
    if not args.check_saved_logits:
        code = save(run, args.skip_eval)
    world.destroy()
    return code


def prepare(cfg: CfgNode, world: Distributed, stop: StopRequest) -> Run:
    """The teacher, the images, and the store that is checked."""
    log = world.everywhere(lambda: create_logger(run_folder(cfg), world.rank))
    utils.seed_everything(cfg.SEED)  # of what a user's function draws
    written = world.on_main(lambda: teacher_of_store(cfg.DISTILL.TEACHER_LOGITS_PATH))
    machine = f"{world.world_size} x {world.device.type}, torch {torch.__version__}"
    log.info(f"run {run_folder(cfg)}: {machine}")
    teacher = world.main_first(lambda: Teacher.from_config(cfg, world.device, log.debug, written))
    weights = cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED
    log.info(
        f"teacher {teacher.name}: {count_parameters(teacher):,} parameters,"
        f" {teacher.num_classes:,} classes, {teacher.precision}"
        + (f"; weights of {weights}" if weights else "")
    )
    if cfg.AMP_DTYPE == "bf16":
        log.warning(
            "AMP_DTYPE bf16 is too coarse for stored probabilities: the teacher runs in"
            f" {teacher.precision}"
        )
    with awaited("the list of images", log.info):
        data = world.main_first(lambda: open_run(cfg, teacher.num_classes))
    labels, _ = teacher.label_map(data.images.num_classes, data.images.class_names)
    if labels is not None:
        labels = labels.to(world.device)
    run = Run(data.cfg, world, stop, log, data, teacher, labels)
    classes = len(data.images.classes_present())
    log.info(
        f"data: {counted(len(data.images), 'image')}"
        + (f" of {classes:,} classes" if classes else "")
        + f"; loader processes: {loader_processes(cfg)}"
    )
    if cfg.TRAIN.COMPILE == "True":
        utils.compile_model(teacher.model, world, log.warning)
        # now, because the manifest says whether it could be compiled
        with awaited("the compiler", log.info):
            teacher(torch.zeros(run.rows, 3, *[cfg.DATA.IMG_SIZE] * 2, device=world.device))
    return run


def teacher_of_store(root: str) -> dict[str, Any] | None:
    """The identity of the teacher that began a store; None where there is no store of ours."""
    try:
        return LogitsStoreReader(root).manifest["teacher"]
    except ValueError:  # told when it is opened to be written or checked
        return None


def save(run: Run, skip_eval: bool) -> int:
    """Write the epochs that are not sealed yet."""
    cfg, world, log = run.cfg, run.world, run.log
    wanted = range(cfg.TRAIN.START_EPOCH, cfg.TRAIN.EPOCHS)
    with no_trace_if_refused(run_folder(cfg)):
        opened = open_writer(run)
    with opened as writer:
        root = writer.root
        world.on_main(lambda: writer.clean_up(wanted))
        pending = world.on_main(lambda: [e for e in wanted if not writer.is_sealed(e)])
        if not pending:
            log.info(f"{root}: {epochs_text(wanted, are=True)} complete, nothing is left to do")
            return Exit.DONE
        world.on_main(lambda: writer.check_disk(pending))
        size = size_text(len(pending) * len(writer) * writer.dtype.itemsize)
        log.info(
            f"store {root}: {epochs_text(pending)} of {counted(len(writer), 'image')},"
            f" top-{writer.k} of {writer.num_classes:,} classes, {size}"
        )
        if skip_eval:
            images = run.data.images
            _, reason = run.teacher.label_map(images.num_classes, images.class_names)
            log.info(
                "; ".join(filter(None, ["the teacher is not evaluated (--skip-eval)", reason]))
            )
        else:
            evaluate_teacher(run)
        loader = run.open_loader()
        for number, epoch in enumerate(pending):
            bits = world.on_main(partial(begin, writer, epoch))
            if bits is None:
                log.info(f"epoch {epoch} was sealed by another job meanwhile")
                continue
            if world.rank:
                writer.begin_epoch(epoch, world.rank)
            is_missing = np.unpackbits(bits, count=len(writer)).view(bool)
            epochs_left = len(pending) - number - 1
            written, pace = write_epoch(run, loader, writer, epoch, is_missing, epochs_left)
            *sums, least, enough = zip(*world.gather_objects(astuple(written)))
            total = Tally(*map(sum, sums), min(least), max(enough))
            log.info(f"epoch {epoch}: {total}; {pace}")
            world.on_main(partial(writer.seal, epoch, teacher=total.accuracy()))
    log.info(f"{root}: {epochs_text(wanted, are=True)} sealed")
    return Exit.DONE


def open_writer(run: Run) -> LogitsStoreWriter:
    """The store's writer: rank 0 makes the store or finds it, the others join it there."""
    world, data, root = run.world, run.data, Path(run.cfg.DISTILL.TEACHER_LOGITS_PATH)
    manifest = world.on_main(lambda: manifest_of(run))
    if world.world_size > 1:  # all machines must have the same data, and augment alike
        proof, name = manifest["proof"], f"{root} (rank 0)"
        world.everywhere(lambda: check_proof(proof, data.images, data.decoder, name))
    keys = data.images.get_keys()
    writer = world.on_main_alone(lambda: LogitsStoreWriter(root, manifest, keys))
    digest = world.on_main(lambda: writer.digest)

    def joined() -> LogitsStoreWriter:
        return writer if world.is_main else LogitsStoreWriter.join(root, digest)

    return world.everywhere(joined)


def begin(writer: LogitsStoreWriter, epoch: int) -> np.ndarray | None:
    """Rank 0: lock an epoch and tell, as packed bits, which images it lacks; None if it is sealed
    by now.
    """
    if writer.is_sealed(epoch):
        return None
    writer.begin_epoch(epoch)
    is_missing = np.zeros(len(writer), bool)
    is_missing[writer.missing(epoch)] = True
    return np.packbits(is_missing)


def write_epoch(
    run: Run,
    loader: EpochLoader,
    writer: LogitsStoreWriter,
    epoch: int,
    is_missing: np.ndarray,
    epochs_left: int,
) -> tuple[Tally, str]:
    """Append this rank's batches of an epoch that are not whole; what was written, and how fast."""
    begun, share, tally = time.monotonic(), float(is_missing.mean()), Tally()
    to_come = len(writer) * (share + epochs_left) / run.world.world_size

    def is_wanted(number: int, positions: list[int]) -> bool:
        return bool(is_missing[positions].any())

    def pace() -> str:
        rate = tally.images / (time.monotonic() - begun)
        left = timedelta(seconds=round((to_come - tally.images) / rate)) if rate else "unknown"
        size = size_text(tally.images * writer.dtype.itemsize)
        return f"rank 0: {size}, {rate:,.0f} images/s, all epochs done in {left}"

    batches = on_device(loader.batches(epoch, wanted=is_wanted), run.world.device)
    count = round(loader.count(epoch) * share)
    batches = run.watched(batches, count, f"epoch {epoch}", lambda: f"{tally}; {pace()}")
    for positions, records in one_late(answers(run, batches, tally)):
        writer.append(positions, records())
    writer.end_epoch()
    return tally, pace()


def answers(
    run: Run, batches: Iterable[Batch], tally: Tally
) -> Iterator[tuple[np.ndarray, Callable[[], np.ndarray]]]:
    """For each batch the positions [n] and a function that waits for the device and gives the
    records [n], which it counts in `tally`.
    """
    k, temperature = run.cfg.DISTILL.LOGITS_TOPK, run.cfg.DISTILL.TEMPERATURE
    for number, batch in enumerate(batches):
        logits, labels = run.ask(batch)  # [B, C], [B]
        indices, probs = encode(logits, max(k, 5), temperature)  # [B, >= K]
        positions, seeds = batch.position.numpy(), batch.seed.numpy()
        count = len(positions) - has_own_partner(positions)
        whole = [] if number else [logits[:count]]
        arrive = to_host(labels[:count], indices[:count], probs[:count, :k], *whole)
        num_classes = run.cfg.MODEL.NUM_CLASSES
        settings = (k, num_classes, temperature)
        yield positions[:count], partial(records_of, arrive, seeds[:count], *settings, tally)


def records_of(
    arrive: Callable[[], list[np.ndarray]],
    seeds: np.ndarray,
    k: int,
    num_classes: int,
    temperature: float,
    tally: Tally,
) -> np.ndarray:
    """The records [n] of a batch whose answers are on their way."""
    labels, indices, probs, *logits = arrive()
    tally.add(labels, indices, probs)
    for whole in logits:
        tally.enough = classes_for(whole / temperature)
    return pack_records(seeds, indices[:, :k], probs, num_classes)


def classes_for(logits: np.ndarray) -> int:
    """How many classes hold ENOUGH of the probability of logits [B, C], on average over images."""
    probs = np.sort(np.exp(logits - logits.max(1, keepdims=True)), 1)[:, ::-1]
    held = (probs / probs.sum(1, keepdims=True)).cumsum(1).mean(0)
    return 1 + int((held < ENOUGH).sum())


def one_late(items: Iterable[Item]) -> Iterator[Item]:
    """The items, each given out when the next one has begun: the device works meanwhile."""
    nothing = object()
    before: Any = nothing
    for item in items:
        if before is not nothing:
            yield before
        before = item
    if before is not nothing:
        yield before


def to_host(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin to copy tensors to the CPU; the function that is returned waits for them."""
    if not any(tensor.is_cuda for tensor in tensors):
        return lambda: [tensor.cpu().numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors):
        copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record()

    def wait() -> list[np.ndarray]:
        arrived.synchronize()
        return [copy.numpy() for copy in copies]

    return wait


def has_own_partner(positions: Tensor | np.ndarray) -> bool:
    """Whether a batch ends with the last image of an odd paired epoch, which stands there twice."""
    return len(positions) > 1 and bool(positions[-1] == positions[-2])


def manifest_of(run: Run) -> dict[str, Any]:
    """What the store is, as rank 0 tells it."""
    cfg, device, data = run.cfg, run.world.device, run.data
    mean, std = mean_and_std(cfg)
    modules = (torch, timm, np, PIL)
    is_gpu = device.type == "cuda"
    info = {
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in modules},
        "mean": mean,
        "std": std,
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "classes": run.teacher.classes,
        "images": choice_of(cfg),
    }
    digest = Keys.of(data.images.get_keys()).digest()
    return {
        "identity": identity_of(cfg, len(data.images), digest),
        "teacher": run.teacher.identity(),
        "proof": proof_of(cfg, data.images, data.decoder),
        "info": info,
    }


def evaluate_teacher(run: Run) -> None:
    """Log the teacher's accuracy on the validation images, with a warning where it says that labels
    and outputs do not belong together.
    """
    log, teacher, world = run.log, run.teacher, run.world
    try:
        images = world.main_first(lambda: run.data.validation)
    except ValueError as error:
        log.warning(f"the teacher is not evaluated, there are no validation images: {error}")
        return
    labels, reason = teacher.label_map(images.num_classes, images.class_names)
    if labels is None:
        log.warning(f"the teacher is not evaluated: {reason}")
        return
    loader = run.data.val_loader(world.rank)
    batches = run.watched(loader.batches(0), loader.count(), "evaluation of the teacher")
    batches = utils.in_step(batches, loader.count(), world, run.stop)
    device = world.device
    labels = labels.to(device)
    result = utils.evaluate(teacher, batches, device, world=world, label_map=labels)
    if "top1" not in result:
        log.info("the teacher is not evaluated: the validation images have no labels")
        return
    log.info(
        f"teacher: top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}% of"
        f" {result['count']:,} validation images"
    )
    chance = 1 / images.num_classes
    deviation = (chance * (1 - chance) / result["count"]) ** 0.5
    if result["top1"] / 100 <= chance + 3 * deviation:
        log.warning(
            "THE TEACHER IS NO BETTER THAN CHANCE: are these its weights, are mean and std its own,"
            " and are the data's classes numbered as its outputs are (DATA.CLASS_LIST)? Its answers"
            " are saved all the same"
        )


def check(run: Run, exact: bool, percent: float | None) -> int:
    """Compare sealed epochs with what the teacher says now; models/agreement.py judges."""
    cfg, world, log, store = run.cfg, run.world, run.log, run.data.store
    first, end = cfg.TRAIN.START_EPOCH, cfg.TRAIN.EPOCHS
    if run.teacher.num_classes != store.num_classes:
        raise ValueError(
            f"{store.root}: the store is of {store.num_classes} classes, this teacher of"
            f" {run.teacher.num_classes}: give the one that wrote it, with the same"
            " DISTILL.CLASS_SUBSET"
        )
    epochs = [epoch for epoch in store.epochs() if first <= epoch < end]
    if not epochs:
        raise ValueError(
            f"{store.root}: of the epochs {first} to {end - 1} none is there (there:"
            f" {ranges(store.epochs()) or 'none'}): set TRAIN.START_EPOCH and TRAIN.EPOCHS"
        )
    log.info(world.on_main(lambda: run.data.check_store(epochs)))
    if world.is_main and is_ours(store):
        found = differing(store.manifest["teacher"], run.teacher.identity())
        if found:
            log.warning(
                f"the store was written by another teacher, or in another precision: {found}"
            )
    # All columns are checked, however few the recipe would read.
    loader = run.open_loader(topk=store.k)
    total, left_out = Agreement(), 0
    for found, unknown in world.gather_objects(compare_all(run, epochs, loader, percent)):
        total.merge(found)
        left_out += unknown
    share = "" if percent is None else f"{percent:g}% of the batches of "
    log.info(f"checked {share}{epochs_text(epochs)}: {total}")
    if left_out:
        log.info(
            f"left out: {left_out} images whose partner's seed the original did not keep (the last"
            " ones of odd epochs)"
        )
    for _, text in total.worst:
        log.info(f"worst: {text}")
    faults = total.faults(exact)
    for fault in faults:
        log.error(f"FAILED: {fault}")
    if faults:
        return Exit.DIFFERENT
    log.info("PASSED: the store holds what the teacher says")
    return Exit.DONE


def compare_all(
    run: Run, epochs: list[int], loader: EpochLoader, percent: float | None
) -> tuple[Agreement, int]:
    """What this rank's batches show, and how many images could not be compared."""
    found, left_out = Agreement(), 0
    for epoch in epochs:
        number = loader.count(epoch)
        chosen = set(range(number))
        if percent is not None:
            rng = generator(run_seed(run.cfg.SEED, epoch, 0, run.world.rank))
            most = max(1, round(number * percent / 100))
            chosen = set(rng.permutation(number)[:most].tolist())
        batches = loader.batches(epoch, wanted=lambda index, _, chosen=chosen: index in chosen)
        batches = on_device(batches, run.world.device)
        for batch in run.watched(batches, len(chosen), f"check of epoch {epoch}"):
            left_out += compare_batch(run, epoch, batch, found)
    return found, left_out


def compare_batch(run: Run, epoch: int, batch: Batch, found: Agreement) -> int:
    """Count a batch in `found`; how many of its images could not be compared."""
    store = run.data.store
    logits, _ = run.ask(batch)  # [B, C]
    is_odd = has_own_partner(batch.position)
    # The original gave that image another partner, and did not keep its seed.
    is_unknown = is_odd and not is_ours(store)
    count = len(batch.position) - is_odd - is_unknown
    positions, seeds = batch.position[:count].tolist(), batch.seed[:count].tolist()
    right_seeds = seeds
    if is_ours(store):
        right_seeds = [sample_seed(run.cfg.DATA.SEED, epoch, place) for place in positions]
    wrong_seeds = torch.tensor([a != b for a, b in zip(seeds, right_seeds)], dtype=torch.bool)
    record = batch.indices[:count], batch.probs[:count]
    comparison = compare(*record, logits[:count], run.cfg.DISTILL.TEMPERATURE)
    found.add(comparison, wrong_seeds, lambda row: f"epoch {epoch}, {store.keys[positions[row]]}")
    return int(is_unknown)


def is_ours(store) -> bool:
    """Whether a store has our layout: then all of its seeds are known."""
    return isinstance(store, LogitsStoreReader)


if __name__ == "__main__":
    sys.exit(run_program(lambda: SETTINGS, run))
