"""Train a student: from labels, from a teacher's stored logits, or with the teacher in the loop.

    torchrun --nproc-per-node 8 main.py --cfg configs/1k/tiny_vit_21m.yaml --data-path ImageNet

The same command goes on where an earlier one ended. With --eval or --throughput a model is measured
instead. Exit codes: 0 done, 2 an error that one line explains, 75 stopped on request (SIGTERM,
SIGUSR1, Ctrl-C) with its state saved; 130 a second Ctrl-C.
"""

import sys

from configs import commands
from data.store.reader import check_sealed

if __name__ == "__main__":  # before anything slow: --help, and what is wrong with a command line
    SETTINGS = commands.answered(lambda: commands.training(None, check_sealed))

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from logging import Logger, getLogger
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from yacs.config import CfgNode

import utils
from configs import (
    BatchPlan,
    batch_plan,
    choices_in_words,
    dump,
    run_folder,
    teacher_config,
)
from configs.continuation import check_continuation, check_sources
from data.augment.decoder import mean_and_std
from data.augment.pairs import BatchMix, Mixer, PairMix, share_right
from data.augment.rng import run_seed
from data.build import EpochLoader, RunData, open_run
from data.replay import Batch, on_device
from data.store.files import sole_user
from data.store.format import counted, size_text
from logger import (
    NullWriter,
    TrainingLog,
    awaited,
    create_logger,
    create_metric_writer,
    evaluation_in_words,
    git_state,
    no_trace_if_refused,
    progress,
    write_classes,
)
from lr_scheduler import LearningRateScheduler, build_scheduler
from models import checkpoints
from models.build import (
    build_model,
    build_teacher,
    count_parameters,
    load_named_weights,
    multiply_adds_in_words,
    num_outputs,
    separate_heads,
)
from models.class_map import LabelMap, find_label_map
from models.distill import DistillLoss, label_cross_entropy
from models.param_groups import build_optimizer, load_optimizer
from models.pretrained import (
    LoadReport,
    load_weights,
    read_notes,
    read_state_dict,
    save_weights,
)
from models.teacher import Teacher
from models.update import (
    EMA,
    batch_norms,
    frozen_statistics,
    guarded_step,
    in_one,
    restore_unless,
    running_statistics,
    set_training_mode,
)
from utils import Distributed, Exit, Meters, Stopped, StopRequest, run_program

IN_USE = "wait for its end, or give this run another --tag"
GOES_ON = "the same command goes on from here"
LEAST_SUM = 0.01  # of learning rates


@dataclass
class Progress:
    """How far a run is.

    With the states of model, EMA, optimizer and scaler it is all that an exact continuation needs.
    """

    epoch: int = 0
    step: int = 0  # updates of this epoch that are done
    update: int = 0  # updates that are done in all
    best: float = -1.0  # highest validation top-1 so far, in percent


@dataclass(frozen=True)
class Training:
    """Everything that a training is made of."""

    cfg: CfgNode
    world: Distributed
    log: Logger
    writer: NullWriter
    stop: StopRequest
    plan: BatchPlan
    loader: EpochLoader
    validate: Callable[[nn.Module], dict[str, Any]] | None
    model: nn.Module
    network: nn.Module  # the model, or the wrapper that averages its gradients over processes
    ema: EMA | None
    teacher: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # in the loop: images -> target
    distill_loss: DistillLoss
    mix: Mixer
    labels: LabelMap | None  # which output each class of the data is; None: labels are of no use
    optimizer: torch.optim.Optimizer
    scheduler: LearningRateScheduler
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None  # of autocast; None is float32
    is_compiled: bool
    has_new_part: bool  # weights, if only of a head, that no file gave
    progress: Progress
    sources: dict[str, Any]  # which images and which teacher it learns from
    meters: Meters
    recent: deque[Tensor]  # positions of the images of the latest updates, to name bad ones
    saver: checkpoints.Saver  # of rank 0


def train_step(run: Training, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """One update from as many batches as it accumulates; what it measures, still on the device."""
    passes = run.plan.accumulation
    norms = running_statistics(run.model)  # of batch norm, which the forward pass moves
    before = in_one(norms)
    measured, positions = [], []
    for index in range(run.progress.step * passes, (run.progress.step + 1) * passes):
        batch = next(batches)
        # Dropout and drop path depend on nothing else, so that there is no generator to save.
        torch.manual_seed(run_seed(run.cfg.SEED, run.progress.epoch, index, run.world.rank))
        is_last = (index + 1) % passes == 0
        averages_later = run.network is not run.model and not is_last
        with run.network.no_sync() if averages_later else nullcontext():
            values = forward(run, batch, index)
            loss = values["loss"]
            # A loss that is not finite makes all gradients so, on every process: the norm alone
            # then decides for all of them. This is 1 / passes, or not a number.
            weight = torch.rsub(loss.detach(), 1 / passes, alpha=0)
            recomputes = run.cfg.TRAIN.USE_CHECKPOINT
            with frozen_statistics(run.model) if recomputes else nullcontext():
                loss.backward(run.scaler.scale(weight))
        measured.append(values)
        positions.append(batch.position)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.TRAIN.CLIP_GRAD or math.inf)
    is_good = norm < math.inf  # also not where it is not a number
    # A bad update moves nothing; whether it is bad only the device knows.
    guarded_step(run.optimizer, is_good)
    run.scaler.update()
    restore_unless(is_good, norms, before)
    if run.ema:
        run.ema.update(run.progress.update, is_good)
    run.optimizer.zero_grad()
    run.recent.append(torch.cat(positions))
    means = measured[0]
    if passes > 1:
        means = {name: torch.stack([v[name] for v in measured]).mean() for name in means}
    return {"norm": norm, **means}


def forward(run: Training, batch: Batch, index: int) -> dict[str, Tensor]:
    """The loss of one pass, and how often student and teacher are right in percent.

    Supervision alone decides where the target comes from: labels [B, C], stored or online [B, K].
    """
    cfg, device = run.cfg, run.world.device
    labels = None
    if run.labels is not None:
        labels = run.labels.labels(batch.label)
    seeds = batch.seed  # of pairs; a whole batch is mixed from its step's own seed
    if isinstance(run.mix, BatchMix):
        seeds = run_seed(cfg.DATA.SEED, run.progress.epoch, index, run.world.rank)
    mixes = run.mix.numbers(batch.image, seeds, batch.mixes)
    learns_labels = not cfg.DISTILL.ENABLED or cfg.DISTILL.ALPHA < 1
    known = labels if learns_labels else None
    images, targets = run.mix(batch.image, known, seeds, mixes)  # [B, 3, H, W], [B, C]
    channels_last = cfg.TRAIN.CHANNELS_LAST
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=memory_format)
    with utils.autocast(device, run.dtype):
        logits = run.network(images)  # [B, C], or a pair of them where there are two heads
    if cfg.DISTILL.ENABLED:
        indices, probs = run.teacher(images) if run.teacher else (batch.indices, batch.probs)
        losses = run.distill_loss(logits, indices, probs, targets)
    else:
        losses = {"loss": label_cross_entropy(logits, targets)}
    if labels is None:  # nothing says what is right
        return losses
    if cfg.DISTILL.TWO_HEADS:
        logits = sum(logits)  # the mean of both heads is the model's answer
    names, answers = ["top1"], logits.argmax(1, keepdim=True)
    if cfg.DISTILL.ENABLED:
        names.append("teacher_top1")
        answers = torch.cat([answers, indices[:, :1]], 1)
    return losses | dict(zip(names, share_right(labels, answers, mixes)))


def train(run: Training, has_begun: Callable[[], object]) -> None:
    """Train to the end of the last epoch; Stopped if a request comes first.

    After each update `has_begun` is called.
    """
    cfg, now, passes = run.cfg, run.progress, run.plan.accumulation
    training_log = TrainingLog(
        run.log.info, run.writer, cfg.TRAIN.EPOCHS, run.plan.per_update, now.update
    )
    agreement, saved = utils.Agreement(run.world), time.monotonic()
    run.saver.best = now.best
    while now.epoch < cfg.TRAIN.EPOCHS:
        keeps_statistics = cfg.TRAIN.EVAL_BN_WHEN_TRAINING
        set_training_mode(run.model, cfg.TRAIN.FREEZE == "backbone", keeps_statistics)
        steps = run.loader.count(now.epoch) // passes
        batches = run.loader.batches(now.epoch, now.step * passes * run.plan.per_process)
        has_bar = run.world.is_main and sys.stderr.isatty()
        to_come = (steps - now.step) * passes
        batches = on_device(batches, run.world.device)
        shown = f"epoch {now.epoch + 1}/{cfg.TRAIN.EPOCHS}"
        batches = progress(
            batches, to_come, shown, enabled=has_bar, note=lambda: training_log.brief
        )
        training_log.begin_epoch(now.update)
        while now.step < steps:
            run.meters.add(train_step(run, batches))
            has_begun()
            now.step += 1
            now.update += 1
            minutes = (time.monotonic() - saved) / 60
            is_due = run.world.is_main and 0 < cfg.TRAIN.CHECKPOINT_MINUTES <= minutes
            is_asked = run.stop.received is not None
            is_logged = now.update % cfg.PRINT_FREQ == 0  # when all wait anyway
            must_stop, must_save = agreement.any_of(is_asked, is_due, now=is_logged)
            if is_logged or must_stop or must_save or now.step == steps:
                collect(run)
            if is_logged:
                training_log.report(
                    now.update,
                    now.epoch,
                    now.step,
                    steps,
                    run.meters.take_window(),
                    [group["lr"] for group in run.optimizer.param_groups],
                    run.meters.state["skipped"],
                    run.loader.waited,
                    utils.peak_memory(run.world.device),
                )
            run.scheduler.step_update(now.update - 1)
            if must_stop:
                stop(run)
            if must_save:
                settle(run)
                save(run, "last.pth")
                saved = time.monotonic()
        end_epoch(run)
        saved = time.monotonic()
    if settle(run):
        return
    save(run, "last.pth")
    if not settle(run):
        raise OSError(
            f"all epochs are done, but their result is not saved in {run_folder(cfg)}/checkpoints:"
            " make room and start the same command again, which goes on from the newest checkpoint"
        )


def stop(run: Training) -> None:
    """End the run as it was asked to, with its state saved."""
    settle(run)
    save(run, "last.pth")
    if not settle(run):
        raise OSError("stopped on request, and nothing could be saved")
    raise Stopped(GOES_ON)


def collect(run: Training) -> None:
    """Wait for what the updates so far have measured; too many bad ones in a row are an error."""
    run.meters.collect()
    limit = run.cfg.TRAIN.MAX_BAD_STEPS
    if run.meters.state["skipped_in_a_row"] < limit:
        return
    parts = run.world.gather_objects(torch.cat([*run.recent]).tolist())
    names = run.loader.dataset.keys_of(sorted({place for part in parts for place in part}))
    listed = run_folder(run.cfg) / "bad_images.txt"
    if run.world.is_main:
        text = "".join(f"{name}\n" for name in names)
        listed.write_text(text, encoding="utf-8", errors="surrogateescape")
    raise ValueError(
        f"{limit} updates in a row had a non-finite loss or gradient, up to number"
        f" {run.progress.update} (epoch {run.progress.epoch + 1}). Their images are listed in"
        f" {listed} (first: {', '.join(names[:3])}): leave broken ones out with DATA.EXCLUDE, or"
        " try a lower TRAIN.BASE_LR or --disable_amp; with a new --tag, and --pretrained last.pth"
    )


def end_epoch(run: Training) -> None:
    """Evaluate, write the epoch's metrics and checkpoints, and move on to the next epoch."""
    settle(run)
    cfg, now, done = run.cfg, run.progress, run.progress.epoch + 1
    is_due = done % cfg.TEST.EVERY == 0 or done == cfg.TRAIN.EPOCHS
    results = evaluate_all(run) if run.validate and is_due else {}
    scores = [results[name] for name in ("val_top1", "average_top1") if name in results]
    now.best = max([now.best, *scores])
    if now.best >= 0:
        results["best_top1"] = now.best
    means = {f"train_{name}": value for name, value in run.meters.take_epoch().items()}
    run.writer.write(now.update, done, **means, **results)
    now.epoch, now.step = done, 0
    names = ["last.pth"]
    if done % cfg.SAVE_FREQ == 0:
        names.insert(0, f"epoch_{done:04d}.pth")
    if now.best in scores:  # of equal ones the later
        names.insert(0, "best.pth")
    save(run, *names)


def evaluate_all(run: Training) -> dict[str, float]:
    """Loss and accuracies of the model, and of its EMA, by the names they have in the metrics."""
    models = {"val": run.model}
    if run.ema:
        models["average"] = run.ema.model
    results: dict[str, float] = {}
    for name, model in models.items():
        try:
            found = run.validate(model)
        except Stopped:
            stop(run)  # the same command goes on with this evaluation
        numbers = {key: value for key, value in found.items() if isinstance(value, float)}
        results |= {f"{name}_{key}": value for key, value in numbers.items()}
        which = ", averaged weights" if name == "average" else ""
        run.log.info(f"epoch {run.progress.epoch + 1}{which}: {evaluation_in_words(found)}")
    return results


def save(run: Training, *names: str) -> None:
    """Begin to write the state of a run as it is now under some names."""
    if run.world.is_main:
        run.saver.begin(state_of(run), names)


def settle(run: Training) -> bool:
    """Wait for the checkpoint that is being written: whether it was. What was not is not the best
    that is kept, so that a later epoch can still become it.
    """
    saved, run.progress.best = run.world.on_main(run.saver.wait)
    return saved


def state_of(run: Training) -> dict[str, Any]:
    """What a checkpoint holds: plain values and tensors."""
    classes = run.loader.dataset.dataset.class_names
    are_outputs = run.labels is not None and len(classes) == run.cfg.MODEL.NUM_CLASSES
    return {
        "model": run.model.state_dict(),
        "model_ema": run.ema.model.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": asdict(run.progress),
        "measured": run.meters.state,
        "step": run.progress.update,
        "metric_lines": run.writer.lines,
        "config": dump(run.cfg),
        "sources": run.sources,
        "class_names": list(classes) if are_outputs else [],
    }


def find_state(cfg: CfgNode, log: Logger, sources: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from: the newest valid one of the run's folder, else --resume's.

    `sources` are this run's data and teacher, which must be those that the state comes from.
    """
    folder = run_folder(cfg) / "checkpoints"
    path: Path | str | None = None
    state = None
    if cfg.TRAIN.AUTO_RESUME:
        path, state = checkpoints.newest_valid(folder, log.warning)
    if not state and cfg.MODEL.RESUME:
        path = cfg.MODEL.RESUME
        state = checkpoints.load_state(path)
    if state:
        state["read_from"] = str(path)
        for change in check_continuation(state["config"], cfg, str(path)):
            follows = "; learning rates follow it" if change.key == "TRAIN.EPOCHS" else ""
            log.warning(f"CHANGED SINCE THE CHECKPOINT: {change}{follows}")
        check_sources(state.get("sources", {}), sources, str(path))
        done = state["progress"]["epoch"]
        rest = "all there are" if done >= cfg.TRAIN.EPOCHS else f"the next is in epoch {done + 1}"
        log.info(f"continuing from {path}: {state['step']} updates are done, {rest}")
        for name in {cfg.MODEL.RESUME, cfg.MODEL.PRETRAINED} - {"", str(path)}:
            log.info(f"not loaded: {name}")
    if not cfg.TRAIN.AUTO_RESUME:
        aside = checkpoints.move_aside(folder)
        if aside:
            log.warning(f"TRAIN.AUTO_RESUME is off: what an earlier run has left moves to {aside}")
    return state


def restore(run: Training, state: dict[str, Any]) -> None:
    """Bring a training to where a checkpoint left it."""
    checkpoints.restore(run.model, state["model"])
    load_optimizer(run.optimizer, state["optimizer"])
    if state["scaler"]:  # nothing where the checkpoint's training needed no loss scale
        run.scaler.load_state_dict(state["scaler"])
    if run.ema:
        checkpoints.restore(run.ema.model, state["model_ema"])
    for name, value in state["progress"].items():
        setattr(run.progress, name, value)
    run.meters.state.update(state["measured"])


def build_training(cfg: CfgNode, world: Distributed, log: Logger, stop: StopRequest) -> Training:
    """Everything that a training is made of, from the state it goes on from; rank 0 looks first."""
    teacher = build_online_teacher(cfg, world, log)
    with awaited("the list of images", log.info):
        data = world.main_first(lambda: open_run(cfg, teacher.num_classes if teacher else 0))
    cfg = data.cfg
    log.debug(f"resolved configuration:\n{dump(cfg)}")  # for the log's file alone
    log.debug(f"what differs from the defaults: {choices_in_words(cfg)}")
    in_the_loop = ""
    if teacher:
        in_the_loop = f"top-{cfg.DISTILL.LOGITS_TOPK} of the teacher {teacher.name} in the loop"
    taught_by = world.on_main(data.check_store) or in_the_loop or "no teacher, labels alone"
    plan = batch_plan(cfg)
    loader = utils.open_loader(data, world, log, plan.per_process, step_images=plan.per_update)
    steps = loader.count() // plan.accumulation  # updates of an epoch
    labels = labels_of_training(data, world)
    validate = open_validation(data, world, log, not cfg.DISTILL.ENABLED, stop)
    describe_data(loader, taught_by, data.validation if validate else None, log)
    mix_type = PairMix if cfg.AUG.MIXUP_MODE == "pair2" else BatchMix

    sources = world.on_main(data.sources)
    if teacher:
        sources["teacher"] = world.on_main(teacher.identity)
    state = world.on_main(lambda: find_state(cfg, log, sources))
    model, report = build_student(cfg, world, log, start=state is None)
    optimizer = build_optimizer(cfg, model)
    dtype = utils.amp_dtype(cfg, world.device)
    is_compiled, reason = utils.must_compile(cfg, world.device, steps * cfg.TRAIN.EPOCHS)
    runs = "compiled" if is_compiled else "uncompiled"
    log.debug(f"the model runs {runs} (TRAIN.COMPILE {reason})")
    if report:
        runs += f"; {report.brief()}"
    elif state is None and ":" not in cfg.MODEL.TYPE:
        runs += "; random weights"
    log.info(
        f"model {cfg.MODEL.NAME}: {count_parameters(model):,} parameters"
        f" ({count_parameters(model, trainable=True):,} train),"
        f" {multiply_adds_in_words(model, cfg.DATA.IMG_SIZE)}, {cfg.MODEL.NUM_CLASSES} classes,"
        f" {runs}"
    )
    run = Training(
        cfg=cfg,
        world=world,
        log=log,
        writer=open_metrics(cfg, world, log, state),
        stop=stop,
        plan=plan,
        loader=loader,
        validate=validate,
        model=model,
        network=utils.wrap(model, world, is_compiled, log.warning),
        ema=EMA(model, cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None,
        teacher=online_targets(teacher, cfg) if teacher else None,
        distill_loss=DistillLoss.from_config(cfg),
        mix=mix_type.from_config(cfg),
        labels=labels,
        optimizer=optimizer,
        scheduler=build_scheduler(cfg, optimizer, steps),
        scaler=utils.grad_scaler(world.device, dtype),
        dtype=dtype,
        is_compiled=is_compiled,
        has_new_part=state is None and (report is None or bool(report.zeroed)),
        progress=Progress(cfg.TRAIN.START_EPOCH, update=cfg.TRAIN.START_EPOCH * steps),
        sources=sources,
        meters=Meters(world),
        recent=deque(maxlen=cfg.TRAIN.MAX_BAD_STEPS),
        saver=checkpoints.Saver(
            run_folder(cfg) / "checkpoints",
            log.error,
            cfg.TRAIN.KEEP_CHECKPOINTS,
            state["read_from"] if state else "",
        ),
    )
    if state:
        restore(run, state)
    run.scheduler.prepare(run.progress.update)
    return run


def build_student(
    cfg: CfgNode, world: Distributed, log: Logger, start: bool
) -> tuple[nn.Module, LoadReport | None]:
    """The model on its device, with MODEL.PRETRAINED if it is to `start` from there; how that
    fitted.
    """
    utils.seed_everything(cfg.SEED)
    model, fitted = build_model(cfg, load=False, log=log.debug).to(world.device), None
    if cfg.TRAIN.CHANNELS_LAST and cfg.MODEL.TYPE != "tiny_vit":  # which does so by itself
        model = model.to(memory_format=torch.channels_last)
    if start and cfg.MODEL.PRETRAINED:
        name = cfg.MODEL.PRETRAINED
        fitted = world.on_main(lambda: load_named_weights(model, cfg, name, log=log.debug))
        world.broadcast_tensors(model.state_dict().values())
    if not cfg.TRAIN.SYNC_BN:
        return model, fitted
    if world.device.type != "cuda":
        raise ValueError(
            "TRAIN.SYNC_BN = True: batch statistics over processes need CUDA; leave --use-sync-bn"
            " out on other devices"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model), fitted


def open_metrics(
    cfg: CfgNode, world: Distributed, log: Logger, state: dict[str, Any] | None
) -> NullWriter:
    """The writer of metrics, without the lines after the state, which will be made again."""
    writer = create_metric_writer(
        run_folder(cfg),
        world.rank,
        cfg.WANDB_PROJECT if cfg.USE_WANDB else "",
        f"{cfg.MODEL.NAME}/{cfg.TAG}",
        yaml.safe_load(dump(cfg)),
        log.warning,
    )
    if state:
        writer.cut_back(state["step"], state["metric_lines"])
    else:
        writer.cut_back(-1)
    return writer


def build_online_teacher(cfg: CfgNode, world: Distributed, log: Logger) -> Teacher | None:
    """The teacher that runs in the loop, if one does."""
    if cfg.DISTILL.ONLINE:
        return Teacher.from_config(teacher_config(cfg), world.device, log.debug)
    if cfg.DISTILL.ENABLED and not cfg.DISTILL.TEACHER_LOGITS_PATH:
        raise ValueError(
            "DISTILL.ENABLED = True: a student needs a teacher: name its store in"
            " DISTILL.TEACHER_LOGITS_PATH (save_logits.py writes one), or set DISTILL.ONLINE True"
            " with DISTILL.TEACHER_CFG"
        )
    return None


def online_targets(teacher: Teacher, cfg: CfgNode) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """From a student's images to what a store would hold of the teacher's answer to them."""
    theirs = mean_and_std(teacher_config(cfg))
    k, temperature = cfg.DISTILL.LOGITS_TOPK, cfg.DISTILL.TEMPERATURE
    return teacher.in_the_loop(k, temperature, mean_and_std(cfg), theirs)


def labels_of_training(data: RunData, world: Distributed) -> LabelMap | None:
    """Which output each class of the training images is; None where labels are not needed."""
    cfg = data.cfg
    own = not cfg.DISTILL.ENABLED  # such data numbers the outputs of the model that it trains
    labels, reason = find_label_map(
        cfg.MODEL.NUM_CLASSES, data.images.num_classes, data_numbers_outputs=own
    )
    if labels is None and (own or cfg.DISTILL.ALPHA < 1):
        raise ValueError(
            f"this run learns from labels, but those of {cfg.DATA.DATA_PATH} are of no use:"
            f" {reason}"
        )
    return labels and labels.to(world.device)


def open_validation(
    data: RunData,
    world: Distributed,
    log: Logger,
    numbers_own: bool,
    stop: StopRequest | None = None,
    names: Sequence[str] = (),
) -> Callable[[nn.Module], dict[str, Any]] | None:
    """How good a model is over the validation images; None where unlabelled data has none.

    With `numbers_own` the training data numbers the model's classes; else these are somebody's own,
    which has `names` for them if they are known.
    """
    cfg = data.cfg
    try:
        images = world.main_first(lambda: data.validation)
    except ValueError as error:
        if cfg.DATA.DATASET != "folder" or cfg.DATA.VAL_PATH or cfg.EVAL_MODE:
            raise
        log.warning(f"nothing is evaluated: {error}")
        return None
    loader = data.val_loader(world.rank)
    labels, reason = find_label_map(
        cfg.MODEL.NUM_CLASSES,
        images.num_classes,
        data_numbers_outputs=numbers_own,
        names=names,
        data_names=images.class_names,
    )
    if labels is None:
        log.warning(f"accuracies are absent: {reason}")
    else:
        labels = labels.to(world.device)

    def validate(model: nn.Module) -> dict[str, Any]:
        count = loader.count()
        batches = progress(
            loader.batches(0), count, "evaluation", "batches", log.info, enabled=world.is_main
        )
        batches = utils.in_step(batches, count, world, stop)
        if labels is None:
            batches = ((images, given.fill_(-1)) for images, given in batches)
        return utils.evaluate(
            model,
            batches,
            world.device,
            utils.amp_dtype(cfg, world.device),
            world=world,
            label_map=labels,
            num_classes=images.num_classes if cfg.TEST.PER_CLASS_CSV else 0,
        )

    return validate


def describe_data(loader: EpochLoader, taught_by: str, validation: Any, log: Logger) -> None:
    """Log what is learnt from, and the images on which that is evaluated, if there are any."""
    replay, skipped = loader.dataset, loader.sampler.skipped
    log.debug(f"each image: {replay.decoder}, by {replay.executor}")
    trained = replay.dataset.classes_present()
    classes = len(trained) or replay.dataset.num_classes
    images = f"{len(replay) - skipped:,} images"
    if classes:
        images += f" of {classes:,} classes"
    if skipped:
        they = "they or their partner" if loader.sampler.paired else "they"
        images += (
            f" ({skipped:,} of the store's are skipped in epoch 0: {they} are not in the data)"
        )
    if validation is not None:
        seen = validation.classes_present()
        images += f", {len(validation):,}{f' of {len(seen):,}' if seen else ''} to validate"
        unseen = sorted(set(trained) - set(seen))
        if validation.class_names == replay.dataset.class_names and seen and unseen:
            more = f" and {len(unseen) - 5:,} more" if len(unseen) > 5 else ""
            log.warning(f"classes without validation images: {', '.join(unseen[:5])}{more}")
    if replay.store and replay.topk < replay.store.k:
        taught_by += f"; its top-{replay.topk} are read"
    log.info(f"data: {images}; {taught_by}; loader processes: {loader.num_workers}")


def describe(run: Training) -> None:
    """Log what the training comes to, and make its folder."""
    cfg, world, log, plan = run.cfg, run.world, run.log, run.plan
    if not world.is_main:
        return
    folder = run_folder(cfg)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(cfg), encoding="utf-8")
    peak, total = run.scheduler.schedule.peak_and_sum()
    numbered = cfg.TRAIN.EPOCHS // cfg.SAVE_FREQ
    files = min(numbered, cfg.TRAIN.KEEP_CHECKPOINTS or numbered) + 2  # last.pth and best.pth
    numbers = count_parameters(run.model) * (4 if run.ema else 3)  # the optimizer has two each
    less = ""
    if "DATA.BATCH_SIZE" in cfg.EXPLICIT and plan.per_process < cfg.DATA.BATCH_SIZE:
        less = f", as TRAIN.GLOBAL_BATCH wins over DATA.BATCH_SIZE {cfg.DATA.BATCH_SIZE}"
    steps = run.loader.count() // plan.accumulation
    log.info(
        f"training: {counted(steps * cfg.TRAIN.EPOCHS, 'update')}"
        f" ({counted(cfg.TRAIN.EPOCHS, 'epoch')} of {steps:,}) of {plan.per_update} images"
        f" ({counted(world.world_size, 'rank')} x {counted(plan.accumulation, 'batch', 'batches')}"
        f" of {plan.per_process}{less}); rates up to {peak:.3g} (TRAIN.BASE_LR"
        f" {cfg.TRAIN.BASE_LR:g} x {plan.per_update} / 512), {total:.2g} in all; checkpoints of"
        f" about {size_text(files * numbers * 4)} at most"
    )
    if run.has_new_part and cfg.TRAIN.OPTIMIZER.NAME == "adamw" and total < LEAST_SUM:
        log.warning(
            f"LITTLE MAY BE LEARNT: AdamW moves a weight by at most about the sum of the rates,"
            f" which is {total:.2g}: raise TRAIN.BASE_LR {cfg.TRAIN.BASE_LR:g}, which is scaled by"
            f" {plan.per_update} images an update / 512, or TRAIN.EPOCHS"
        )
    if not cfg.TRAIN.GLOBAL_BATCH:
        return
    if batch_norms(run.model) and not cfg.TRAIN.EVAL_BN_WHEN_TRAINING:
        log.warning(
            f"batch norm sees the {plan.per_process} images of a pass: another number of processes"
            " will change its statistics, and so the result, a little"
            " (TRAIN.EVAL_BN_WHEN_TRAINING avoids that)"
        )
    if run.mix.enabled and isinstance(run.mix, BatchMix):
        log.warning(
            "images are mixed within a pass: another number of processes will mix others"
            " (AUG.MIXUP_MODE pair2 avoids that)"
        )


def run_training(cfg: CfgNode, world: Distributed, stop: StopRequest) -> nn.Module:
    """Train; the model, or its EMA if there is one, when all epochs are done."""
    folder = run_folder(cfg)
    with no_trace_if_refused(folder), ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(sole_user(folder / "lock", IN_USE))

        world.on_main_alone(lock)
        log = create_logger(folder, world.rank)
        log.debug(f"code {git_state(Path(__file__).parent)}")
        log.info(
            f"run {folder}: {world.world_size} x {world.device.type},"
            f" {utils.precision(utils.amp_dtype(cfg, world.device))}, torch {torch.__version__}"
        )
        run = build_training(cfg, world, log, stop)
        stack.callback(run.writer.close)
        stack.callback(run.saver.close)
        describe(run)
        if run.progress.epoch >= cfg.TRAIN.EPOCHS:
            log.info(
                "nothing is left to train: raise TRAIN.EPOCHS to go on, or begin another run with"
                " --tag"
            )
        waits_for = "the first update" + ", for which the model is compiled" * run.is_compiled
        with awaited(waits_for, log.info) as has_come:
            train(run, has_come)
    best = f", best top-1 {run.progress.best:.3f}%" if run.progress.best >= 0 else ""
    log.info(
        f"finished: {counted(run.progress.epoch, 'epoch')},"
        f" {counted(run.progress.update, 'update')}{best}; {folder}"
    )
    return run.ema.model if run.ema else run.model


def evaluate_weights(cfg: CfgNode, world: Distributed) -> nn.Module:
    """--eval: how good exactly the named weights are, and averaged ones if the file has such."""
    log = create_logger(None, world.rank)
    name = cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED
    if not name and ":" not in cfg.MODEL.TYPE:
        raise ValueError("--eval measures weights: name them with --resume or --pretrained")
    model = build_teacher(cfg, log=log.info).to(world.device)
    notes: dict[str, Any] = {}
    with suppress(ValueError, OSError, LookupError, TypeError):  # none of our trainings'
        notes = read_notes(name)
        size = yaml.safe_load(notes["config"])["DATA"]["IMG_SIZE"]
        if size != cfg.DATA.IMG_SIZE:
            log.warning(
                f"{name} was trained at {size} px and is measured at {cfg.DATA.IMG_SIZE}:"
                f" DATA.IMG_SIZE {size} measures it as it was"
            )
    separate_heads(model)
    data = world.main_first(lambda: open_run(cfg, num_outputs(model)))
    names = [str(label) for label in notes.get("class_names", [])]
    validate = open_validation(data, world, log, numbers_own=False, names=names)
    found = validate(model)
    log.info(f"{name or cfg.MODEL.TYPE}: {evaluation_in_words(found)}")
    if world.is_main and cfg.TEST.PER_CLASS_CSV:
        if "class_count" not in found:
            raise ValueError(
                f"TEST.PER_CLASS_CSV = {cfg.TEST.PER_CLASS_CSV}: there are no accuracies, the"
                " labels are of no use to this model"
            )
        names, counts, right = data.images.class_names, found["class_count"], found["class_top1"]
        write_classes(cfg.TEST.PER_CLASS_CSV, names, counts.tolist(), right.tolist())
    try:
        averaged = read_state_dict(name, ema=True)
    except ValueError:
        return model
    load_weights(model, averaged, exact=True, label=f"{name}, averaged weights", log=log.info)
    log.info(f"{name}, averaged weights: {evaluation_in_words(validate(model))}")
    return model


def measure_throughput(cfg: CfgNode, world: Distributed) -> nn.Module:
    """--throughput: images a second of the model alone, without loading them."""
    log = create_logger(None, world.rank)
    has_weights = bool(cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED)  # without which it is as fast
    model = build_teacher(cfg, log=log.info if has_weights else log.debug).to(world.device)
    batch, size = cfg.DATA.BATCH_SIZE, cfg.DATA.IMG_SIZE
    dtype = utils.amp_dtype(cfg, world.device)
    log.info(
        f"model {cfg.MODEL.NAME}: {count_parameters(model):,} parameters,"
        f" {multiply_adds_in_words(model, size)}, {num_outputs(model)} classes"
    )
    generator = torch.Generator().manual_seed(cfg.SEED)
    images = torch.randn(batch, 3, size, size, generator=generator).to(world.device)
    if cfg.TRAIN.CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if cfg.TRAIN.COMPILE == "True":
        utils.compile_model(model, world, log.warning)
    with torch.inference_mode(), utils.autocast(world.device, dtype):
        seconds = utils.time_calls(lambda: model(images), world.device)
    speeds = [batch / second for second in seconds]
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    log.info(
        f"{cfg.MODEL.NAME}: {median:,.1f} images/s (middle half {low:,.1f} to {high:,.1f};"
        f" {len(speeds)} batches of {batch} at {size} px, {utils.precision(dtype)}),"
        f" {utils.peak_memory(world.device):.2f} GB"
    )
    return model


def run(settings: tuple[CfgNode, str], stop: StopRequest) -> int:
    """What the command line asks for: training, or a measurement."""
    cfg, save_model = settings
    world = utils.init_distributed(cfg.DEVICE)
    utils.choose_kernels(cfg.TRAIN.DETERMINISTIC, world.device)
    if cfg.THROUGHPUT_MODE:
        model = measure_throughput(cfg, world)
    elif cfg.EVAL_MODE:
        model = evaluate_weights(cfg, world)
    else:
        model = run_training(cfg, world, stop)
    if save_model and world.is_main:
        save_weights(model, save_model)
        getLogger("tinyvit").info(f"weights written to {save_model}")
    world.destroy()
    return Exit.DONE


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_program(partial(commands.training, argv, check_sealed), run)


if __name__ == "__main__":
    sys.exit(run_program(lambda: SETTINGS, run))
