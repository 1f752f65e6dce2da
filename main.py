"""Training, distillation, fine-tuning and evaluation: build everything, one `train_step`, a loop.

    torchrun --nproc-per-node 8 main.py --cfg configs/1k/tiny_vit_21m.yaml --data-path ImageNet --batch-size 128

Exit codes: 0 done, 2 an error that one line explains, 75 stopped on request (SIGTERM, SIGUSR1,
Ctrl-C) with a checkpoint: start again to go on; 130 a second Ctrl-C."""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from logging import Logger
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from yacs.config import CfgNode

import utils
from configs import (
    BatchPlan,
    argument_parser,
    batch_plan,
    choices_in_words,
    config_from_args,
    dump,
    run_folder,
    teacher_config,
)
from configs.continuation import check_continuation, check_sources
from data.augment.decoder import mean_and_std
from data.augment.pairs import BatchMix, Mixer, PairMix
from data.augment.rng import run_seed
from data.build import Epochs, Sample, check_store, resolve, sources_of, train_epochs, val_epochs
from logger import (
    NullWriter,
    TrainingLog,
    create_logger,
    create_metric_writer,
    evaluation_in_words,
    git_state,
    note_fault,
    write_classes,
)
from logger import progress as progress_bar
from lr_scheduler import LearningRateScheduler, build_scheduler
from models import checkpoints
from models.build import (
    build_model,
    build_teacher,
    count_parameters,
    load_named_weights,
    multiply_adds_in_words,
    num_outputs,
)
from models.class_map import map_outputs, outputs_of_labels
from models.distill import distillation_loss, label_cross_entropy, share_right
from models.param_groups import build_optimizer
from models.pretrained import load_weights, read_state_dict, save_weights
from models.teacher import Teacher
from models.update import (
    Average,
    batch_norms,
    guarded_step,
    kept,
    restore_unless,
    running_statistics,
    set_training_mode,
)
from utils import Distributed, ElsewhereError, Measurements, StopRequest, Waiting

Validate = Callable[[nn.Module], dict[str, Any]]  # from a model to what `utils.evaluate` measures
FAULT = 2
INTERRUPTED = 130
# of a checkpoint
STATE_KEYS = {
    "model",
    "model_ema",
    "optimizer",
    "scaler",
    "progress",
    "measured",
    "step",
    "metric_lines",
    "config",
}
STOPPED = 75  # EX_TEMPFAIL: the same command goes on from here


class Stopped(Exception):
    """The run was asked to stop; its argument says whether its state is saved."""


@dataclass
class Progress:
    """How far a run is: with the states of model, average, optimizer and scaler all that an exact
    continuation needs.
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
    epochs: Epochs
    validate: Validate | None
    model: nn.Module
    network: nn.Module  # the model, or the wrapper that averages its gradients over processes
    average: Average | None
    teacher: Callable[[Tensor], tuple[Tensor, Tensor]] | None  # run in the loop
    mixer: Mixer
    outputs: Tensor | None  # as of `outputs_of_labels`
    optimizer: torch.optim.Optimizer
    scheduler: LearningRateScheduler
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None  # of autocast; None is float32
    progress: Progress
    sources: dict[str, Any]  # which images and which teacher it learns from
    measured: Measurements  # what `train_step` returns: gradient norm, loss and accuracies


def train_step(run: Training, batches: Iterator[Sample]) -> tuple[Tensor, Tensor]:
    """One update from as many batches as it accumulates: what it measures, still on the device, and
    the positions of its images.
    """
    epoch, passes = run.progress.epoch, run.plan.accumulation
    moving = running_statistics(run.model)
    before = [tensor.clone() for tensor in moving]
    measured, positions = [], []
    for index in range(run.progress.step * passes, (run.progress.step + 1) * passes):
        batch = next(batches)
        utils.seed_step(run_seed(run.cfg.SEED, epoch, index, run.world.rank))
        is_last = (index + 1) % passes == 0
        with nullcontext() if is_last or run.network is run.model else run.network.no_sync():
            loss, accuracies = forward(run, batch, epoch, index)
            # A loss that is not finite makes all gradients so, on every process: the norm alone
            # then decides for all.
            poison = torch.where(torch.isfinite(loss), 1.0, torch.nan)
            with kept(moving if run.cfg.TRAIN.USE_CHECKPOINT else []):
                run.scaler.scale(loss / passes * poison).backward()
        measured.append(torch.stack([loss.detach(), *accuracies]))
        positions.append(batch.position)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.TRAIN.CLIP_GRAD or math.inf)
    is_good = torch.isfinite(norm)
    guarded_step(run.optimizer, is_good)
    run.scaler.update()
    restore_unless(is_good, moving, before)
    if run.average:
        run.average.update(run.progress.update, is_good)
    run.optimizer.zero_grad()
    return torch.cat([norm[None], torch.stack(measured).mean(0)]), torch.cat(positions)


def forward(run: Training, batch: Sample, epoch: int, index: int) -> tuple[Tensor, list[Tensor]]:
    """The loss of one forward pass, and how often student and teacher are right, in percent; only
    the target depends on the teacher.
    """
    cfg, device = run.cfg, run.world.device
    images, labels = batch.image.to(device, non_blocking=True), None
    if run.outputs is not None:
        labels = batch.label.to(device, non_blocking=True)
        labels = torch.where(labels < 0, -1, run.outputs[labels.clamp(min=0)])
    seeds = (
        batch.seed
        if isinstance(run.mixer, PairMix)
        else run_seed(cfg.DATA.SEED, epoch, index, run.world.rank)
    )
    images, targets = run.mixer(images, labels, seeds)
    if cfg.TRAIN.CHANNELS_LAST:
        images = images.contiguous(memory_format=torch.channels_last)
    with utils.autocast(device, run.dtype):
        logits = run.network(images)
    answers = [logits.argmax(1)]
    if cfg.DISTILL.ENABLED:
        stored = (
            batch.indices.to(device, non_blocking=True),
            batch.probs.to(device, non_blocking=True),
        )
        indices, probs = run.teacher(images) if run.teacher else stored
        loss = distillation_loss(
            logits,
            indices,
            probs,
            targets,
            cfg.DISTILL.ALPHA,
            cfg.DISTILL.TEMPERATURE,
            cfg.DISTILL.HARD,
            cfg.DISTILL.EXCESS == "subtract",
        )
        answers.append(indices[:, 0])
    else:
        loss = label_cross_entropy(logits, targets)
    return loss, (
        []
        if targets is None
        else [share_right(targets, answer, cfg.MODEL.LABEL_SMOOTHING) for answer in answers]
    )


def train(run: Training) -> None:
    """Train to the end of the last epoch; Stopped if a request comes first, and what is done is
    then saved.
    """
    cfg, progress, passes = run.cfg, run.progress, run.plan.accumulation
    saved, is_saved = time.monotonic(), True
    training_log = TrainingLog(
        run.log.info, run.writer, cfg.TRAIN.EPOCHS, run.plan.per_update, progress.update
    )
    while progress.epoch < cfg.TRAIN.EPOCHS:
        set_training_mode(
            run.model, cfg.TRAIN.FREEZE == "backbone", cfg.TRAIN.EVAL_BN_WHEN_TRAINING
        )
        steps, done = run.epochs.count(progress.epoch) // passes, progress.step * passes
        loader = run.epochs.batches(progress.epoch, done * run.plan.per_process)
        bar = run.world.is_main and sys.stderr.isatty()
        batches = Waiting(
            progress_bar(loader, steps * passes - done, f"epoch {progress.epoch + 1}", enabled=bar)
        )
        training_log.begin_epoch(progress.update)
        while progress.step < steps:
            run.measured.add(*train_step(run, batches))
            progress.step += 1
            progress.update += 1
            is_due = 0 < cfg.TRAIN.CHECKPOINT_MINUTES <= (time.monotonic() - saved) / 60
            must_stop, must_save = run.world.any_of(
                run.stop.received is not None, is_due and run.world.is_main
            )
            speaks = progress.update % cfg.PRINT_FREQ == 0
            if speaks or must_stop or must_save or progress.step == steps:
                collect(run)
            if speaks:
                rates = [group["lr"] for group in run.optimizer.param_groups]
                training_log.report(
                    progress.update,
                    progress.epoch,
                    progress.step,
                    steps,
                    run.measured.take_window(),
                    rates,
                    run.measured.state["skipped"],
                    batches.seconds,
                    utils.peak_memory(run.world.device),
                )
            run.scheduler.step_update(progress.update - 1)
            if must_stop or must_save:
                is_saved, saved = save(run, "last.pth"), time.monotonic()
            if must_stop:
                raise Stopped(is_saved)
        is_saved, saved = end_epoch(run), time.monotonic()
    if not is_saved and not save(run, "last.pth"):
        raise OSError(
            "all epochs are done, but their result is not saved in"
            f" {run_folder(cfg) / 'checkpoints'}: make room and start the same command again, which"
            " goes on from the newest checkpoint there"
        )


def collect(run: Training) -> None:
    """Wait for what the updates so far have measured; too many in a row without effect are an error
    that names their images.
    """
    limit, progress = run.cfg.TRAIN.MAX_BAD_STEPS, run.progress
    if not run.measured.collect(limit):
        return
    places = sorted(
        {
            place
            for part in run.world.gather_objects(torch.cat(run.measured.streak).tolist())
            for place in part
        }
    )
    names = run.epochs.dataset.keys_of(places)
    listed = run_folder(run.cfg) / "bad_images.txt"
    if run.world.is_main:
        listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    raise ValueError(
        f"{limit} updates in a row had a non-finite loss or gradient, up to number"
        f" {progress.update} (epoch {progress.epoch + 1}). Their images are listed in {listed}"
        f" (first: {', '.join(names[:3])}): leave broken ones out with DATA.EXCLUDE, or try a lower"
        " TRAIN.BASE_LR or --disable_amp; with a new --tag, and --pretrained last.pth"
    )


def end_epoch(run: Training) -> bool:
    """Evaluate, write the epoch's metrics and checkpoints, and move on to the next epoch; whether
    its state was saved.
    """
    cfg, progress, done = run.cfg, run.progress, run.progress.epoch + 1
    models = {"val": run.model, **({"average": run.average.model} if run.average else {})}
    results: dict[str, float] = {}
    is_due = run.validate is not None and (done % cfg.TEST.EVERY == 0 or done == cfg.TRAIN.EPOCHS)
    for name, model in models.items() if is_due else ():
        try:
            found = run.validate(model)
        except Stopped:
            raise Stopped(save(run, "last.pth"))  # which goes on with this evaluation
        results |= {f"{name}_{key}": found[key] for key in ("loss", "top1", "top5") if key in found}
        run.log.info(
            f"epoch {done}{', averaged weights' * (name == 'average')}:"
            f" {evaluation_in_words(found)}"
        )
    before, score = (
        progress.best,
        max((value for name, value in results.items() if name.endswith("_top1")), default=-1.0),
    )
    progress.best = max(score, before)
    means = {f"train_{name}": value for name, value in run.measured.take_epoch().items()}
    run.writer.write(
        progress.update,
        done,
        **means,
        **results,
        **({"best_top1": progress.best} if progress.best >= 0 else {}),
    )
    progress.epoch, progress.step = done, 0
    is_saved = save(
        run,
        *["best.pth"] * (score > before),
        *[f"epoch_{done:04d}.pth"] * (done % cfg.SAVE_FREQ == 0),
        "last.pth",
    )
    if not is_saved:
        progress.best = before  # so that a later epoch can still become the best that is kept
    return is_saved


def open_validation(
    cfg: CfgNode,
    world: Distributed,
    log: Logger,
    numbers_own: bool,
    stop: StopRequest | None = None,
) -> Validate | None:
    """How good a model is over the validation images; None where unlabelled data has none.

    With `numbers_own` the training data numbers the model's classes; else these are somebody's own.
    Rank 0 lists the images first."""
    try:
        world.on_main(lambda: val_epochs(cfg, 0) and None)
    except ValueError as error:
        if cfg.DATA.DATASET != "folder" or cfg.DATA.VAL_PATH or cfg.EVAL_MODE:
            raise
        log.warning(f"nothing is evaluated: {error}")
        return None
    epochs, dtype = val_epochs(cfg, world.rank), utils.amp_dtype(cfg, world.device)
    dataset, most = epochs.dataset.dataset, world.broadcast_object(epochs.count())
    outputs, reason = outputs_of_labels(cfg.MODEL.NUM_CLASSES, dataset.num_classes, numbers_own)
    if outputs is None:
        log.warning(f"accuracies are absent: {reason}")
    known = torch.from_numpy(np.array([False]) if outputs is None else outputs >= 0)
    is_other = outputs is not None and not np.array_equal(outputs, np.arange(len(outputs)))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        """Images, and labels of which those that no output stands for are -1; before each batch all
        processes agree whether to go on.
        """
        own = iter(epochs.batches(0))
        for _ in range(most):
            if stop and world.any_of(stop.received is not None)[0]:
                raise Stopped(False)
            for images, labels in islice(own, 1):
                yield (
                    images,
                    labels.where((labels >= 0) & known[labels.clamp(0, len(known) - 1)], -1),
                )

    def validate(model: nn.Module) -> dict[str, Any]:
        found = utils.evaluate(
            model,
            batches(),
            world.device,
            dtype,
            world=world,
            num_classes=len(outputs) if cfg.TEST.PER_CLASS_CSV and outputs is not None else 0,
            map_outputs=(lambda logits: map_outputs(logits, outputs)) if is_other else None,
        )
        return found | {"class_names": dataset.class_names}

    return validate


def save(run: Training, *names: str) -> bool:
    """Write the state of a run under some names; where that fails the files of before are kept.
    Whether all were written.
    """
    fault = ""
    if run.world.is_main:
        classes = run.epochs.dataset.dataset.class_names
        # else these are no names of them
        are_outputs = run.outputs is not None and len(classes) == run.cfg.MODEL.NUM_CLASSES
        state = {
            "model": run.model.state_dict(),
            "model_ema": run.average.model.state_dict() if run.average else None,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "progress": asdict(run.progress),
            "measured": run.measured.state,
            "step": run.progress.update,
            "metric_lines": run.writer.lines,
            "config": dump(run.cfg),
            "sources": run.sources,
            "class_names": list(classes) if are_outputs else [],
        }
        first, *others = (run_folder(run.cfg) / "checkpoints" / name for name in names)
        try:
            checkpoints.save_atomic(state, first)
            for other in others:
                checkpoints.save_also(first, other)
        except OSError as error:
            fault = str(error)
            run.log.error(
                f"NO CHECKPOINT WRITTEN: {fault}. Training goes on; make room, or this work can be"
                " lost"
            )
    return not run.world.broadcast_object(fault)


def find_state(cfg: CfgNode, log: Logger, sources: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from: the newest valid one of the run's folder, else --resume's; None to
    begin anew.

    `sources` are this run's data and teacher, which must be those that the state comes from.
    """
    folder = run_folder(cfg) / "checkpoints"
    path: Path | str | None = (
        checkpoints.newest_valid(folder, log.warning) if cfg.TRAIN.AUTO_RESUME else None
    )
    if cfg.TRAIN.AUTO_RESUME and not path and any(folder.glob("*.pth")):
        raise ValueError(
            f"{folder}: none of the checkpoints there can be used: begin another run with --tag, or"
            " move them away with TRAIN.AUTO_RESUME False"
        )
    state, path = None, path or cfg.MODEL.RESUME
    if path:
        state = checkpoints.load_checkpoint(path)
        if missing := sorted(STATE_KEYS - state.keys()):
            raise ValueError(
                f"{path} holds no {' and no '.join(missing)}, so no training goes on from it: take"
                " its weights with --pretrained"
            )
        for change in check_continuation(state["config"], cfg, str(path)):
            follows = "; learning rates follow it" if change.key == "TRAIN.EPOCHS" else ""
            log.warning(f"CHANGED SINCE THE CHECKPOINT: {change}{follows}")
        check_sources(state.get("sources", {}), sources, str(path))
        log.info(
            f"continuing from {path}: {state['step']} updates are done, the next is in epoch"
            f" {state['progress']['epoch'] + 1}"
        )
        for name in {cfg.MODEL.RESUME, cfg.MODEL.PRETRAINED} - {"", path}:
            log.info(f"not loaded: {name}")
    if not cfg.TRAIN.AUTO_RESUME and any(folder.glob("*.pth")):
        aside = next(
            name
            for name in (folder.with_name(f"checkpoints_before_{n}") for n in range(1, 10**6))
            if not name.exists()
        )
        log.warning(
            "TRAIN.AUTO_RESUME is off: the checkpoints of an earlier run move to"
            f" {folder.rename(aside)}"
        )
        (folder.parent / "wandb_id.txt").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return state


def build_training(cfg: CfgNode, world: Distributed, log: Logger, stop: StopRequest) -> Training:
    """Everything that a training is made of, from the configuration and the state it goes on from;
    rank 0 looks at files first.
    """
    if cfg.DISTILL.ENABLED and not (cfg.DISTILL.TEACHER_LOGITS_PATH or cfg.DISTILL.ONLINE):
        raise ValueError(
            "DISTILL.ENABLED = True: a student needs a teacher: name its store in"
            " DISTILL.TEACHER_LOGITS_PATH (save_logits.py writes one), or set DISTILL.ONLINE True"
            " with DISTILL.TEACHER_CFG"
        )
    theirs = teacher_config(cfg) if cfg.DISTILL.ONLINE else None
    teacher = Teacher.from_config(theirs, world.device, log.info) if theirs else None
    cfg = world.on_main(lambda: resolve(cfg, teacher.num_classes if teacher else 0))
    log.debug(f"resolved configuration:\n{dump(cfg)}")  # for the log's file alone
    log.info(f"configuration, all of it in config.yaml: {choices_in_words(cfg)}")
    in_the_loop = (
        f"the teacher {theirs.MODEL.NAME} runs in the loop"
        if theirs
        else "no teacher, labels alone"
    )
    log.info(world.on_main(lambda: check_store(cfg)) or in_the_loop)
    plan, uses_labels = batch_plan(cfg), not cfg.DISTILL.ENABLED
    epochs = train_epochs(cfg, world.rank, plan.per_process, plan.per_update, log.info)
    steps = epochs.count() // plan.accumulation
    outputs, reason = outputs_of_labels(
        cfg.MODEL.NUM_CLASSES, epochs.dataset.dataset.num_classes, uses_labels
    )
    if outputs is None and (uses_labels or cfg.DISTILL.ALPHA < 1):
        raise ValueError(
            f"this run learns from labels, but those of {cfg.DATA.DATA_PATH} are of no use:"
            f" {reason}"
        )

    utils.seed_everything(cfg.SEED)
    model = build_model(cfg, load=False, log=log.info).to(world.device)
    if cfg.TRAIN.CHANNELS_LAST and cfg.MODEL.TYPE != "tiny_vit":  # which does so by itself
        model = model.to(memory_format=torch.channels_last)
    sources = world.on_main(
        lambda: sources_of(cfg) | ({"teacher": teacher.identity()} if teacher else {})
    )
    state = world.on_main(lambda: find_state(cfg, log, sources))
    if state:
        checkpoints.restore(model, state["model"])
    elif cfg.MODEL.PRETRAINED:
        world.on_main(
            lambda: load_named_weights(model, cfg, cfg.MODEL.PRETRAINED, log=log.info) and None
        )
        world.broadcast_tensors(model.state_dict().values())
    if cfg.TRAIN.SYNC_BN:
        if world.device.type != "cuda":
            raise ValueError(
                "TRAIN.SYNC_BN = True: batch statistics over processes need CUDA; leave"
                " --use-sync-bn out on other devices"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    progress = (
        Progress(**state["progress"])
        if state
        else Progress(cfg.TRAIN.START_EPOCH, update=cfg.TRAIN.START_EPOCH * steps)
    )
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer, steps)
    dtype = utils.amp_dtype(cfg, world.device)
    scaler = utils.grad_scaler(world.device, dtype)
    average = Average(model, cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if average:
            average.model.load_state_dict(state["model_ema"])
    scheduler.prepare(progress.update)
    writer = create_metric_writer(
        run_folder(cfg),
        world.rank,
        cfg.WANDB_PROJECT if cfg.USE_WANDB else "",
        f"{cfg.MODEL.NAME}/{cfg.TAG}",
        yaml.safe_load(dump(cfg)),
        log.warning,
    )
    # what comes after will be made again
    writer.cut_back(state["step"] if state else -1, state["metric_lines"] if state else None)
    labelled = outputs is not None
    in_the_loop = teacher and teacher.in_the_loop(
        cfg.DISTILL.LOGITS_TOPK, cfg.DISTILL.TEMPERATURE, mean_and_std(cfg), mean_and_std(theirs)
    )
    columns = [
        "norm",
        "loss",
        *["top1"] * labelled,
        *["teacher_top1"] * (labelled and cfg.DISTILL.ENABLED),
    ]
    return Training(
        cfg=cfg,
        world=world,
        log=log,
        writer=writer,
        stop=stop,
        plan=plan,
        epochs=epochs,
        model=model,
        validate=open_validation(cfg, world, log, uses_labels, stop),
        network=utils.wrap(model, world, cfg.TRAIN.COMPILE, log.warning),
        sources=sources,
        average=average,
        teacher=in_the_loop,
        mixer=(PairMix if cfg.AUG.MIXUP_MODE == "pair2" else BatchMix).from_config(cfg),
        outputs=torch.from_numpy(outputs).to(world.device) if labelled else None,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        dtype=dtype,
        progress=progress,
        measured=Measurements(columns, world, state and state["measured"]),
    )


def describe(run: Training) -> None:
    """Log what is trained, how and on what; keep the configuration."""
    cfg, world, log, plan, model = run.cfg, run.world, run.log, run.plan, run.model
    if not world.is_main:
        return
    (run_folder(cfg) / "config.yaml").write_text(dump(cfg), encoding="utf-8")
    log.info(
        f"code {git_state(Path(__file__).parent)}, torch {torch.__version__}, {world.world_size} x"
        f" {world.device.type}, {utils.precision(run.dtype)}"
    )
    log.info(
        f"model {cfg.MODEL.NAME}: {count_parameters(model):,} parameters"
        f" ({count_parameters(model, trainable=True):,} train),"
        f" {multiply_adds_in_words(model, cfg.DATA.IMG_SIZE)}, {cfg.MODEL.NUM_CLASSES} classes"
    )
    log.info("each image: " + "; ".join(map(str, run.epochs.dataset.decoder.ops)))
    images, updates = (
        len(run.epochs.dataset) - run.epochs.sampler.skipped,
        run.epochs.count() // plan.accumulation,
    )
    log.info(
        f"{images:,} images, {updates:,} updates an epoch, each of {plan.per_update} images: "
        f"{world.world_size} processes x {plan.accumulation} passes x {plan.per_process}"
    )
    if cfg.TRAIN.GLOBAL_BATCH and batch_norms(model) and not cfg.TRAIN.EVAL_BN_WHEN_TRAINING:
        log.warning(
            f"batch norm sees the {plan.per_process} images of a pass: another number of processes"
            " will change its statistics, and so the result, a little (TRAIN.EVAL_BN_WHEN_TRAINING"
            " avoids that)"
        )
    if cfg.TRAIN.GLOBAL_BATCH and run.mixer.enabled and isinstance(run.mixer, BatchMix):
        log.warning(
            "images are mixed within a pass: another number of processes will mix others"
            " (AUG.MIXUP_MODE pair2 avoids that)"
        )


def evaluate_weights(cfg: CfgNode, world: Distributed, log: Logger) -> nn.Module:
    """--eval: how good exactly the named weights are, and the averaged ones if the file has such."""
    name = cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED
    if not name and ":" not in cfg.MODEL.TYPE:
        raise ValueError("--eval measures weights: name them with --resume or --pretrained")
    model = build_teacher(cfg, log=log.info).to(world.device)
    cfg = world.on_main(lambda: resolve(cfg, num_outputs(model)))
    validate = open_validation(cfg, world, log, numbers_own=False)
    found = validate(model)
    log.info(f"{name or cfg.MODEL.TYPE}: {evaluation_in_words(found)}")
    if world.is_main and (path := cfg.TEST.PER_CLASS_CSV):
        if "class_count" not in found:
            raise ValueError(
                f"TEST.PER_CLASS_CSV = {path}: there are no accuracies, the labels are of no use to"
                " this model"
            )
        write_classes(
            path, found["class_names"], found["class_count"].tolist(), found["class_top1"].tolist()
        )
    try:
        averaged = read_state_dict(name, ema=True)
    except ValueError:
        return model
    load_weights(model, averaged, exact=True, label=f"{name}, averaged weights", log=log.info)
    log.info(f"{name}, averaged weights: {evaluation_in_words(validate(model))}")
    return model


def measure_throughput(cfg: CfgNode, world: Distributed, log: Logger) -> nn.Module:
    """--throughput: images a second of the model alone, without loading them."""
    has_weights = bool(cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED)  # without which it is as fast
    model = build_teacher(cfg, log=log.info if has_weights else log.debug).to(world.device)
    batch, size, dtype = cfg.DATA.BATCH_SIZE, cfg.DATA.IMG_SIZE, utils.amp_dtype(cfg, world.device)
    log.info(
        f"model {cfg.MODEL.NAME}: {count_parameters(model):,} parameters,"
        f" {multiply_adds_in_words(model, size)}, {num_outputs(model)} classes"
    )
    images = torch.randn(
        batch, 3, size, size, generator=torch.Generator().manual_seed(cfg.SEED)
    ).to(world.device)
    if cfg.TRAIN.CHANNELS_LAST:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    network = utils.wrap(model, Distributed(device=world.device), cfg.TRAIN.COMPILE, log.warning)
    with torch.inference_mode(), utils.autocast(world.device, dtype):
        speeds = [
            batch / seconds for seconds in utils.time_calls(lambda: network(images), world.device)
        ]
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    log.info(
        f"{cfg.MODEL.NAME}: {median:,.1f} images/s (middle half {low:,.1f} to {high:,.1f};"
        f" {len(speeds)} batches of {batch} at {size} px, {utils.precision(dtype)}),"
        f" {utils.peak_memory(world.device):.2f} GB"
    )
    return model


def run_training(cfg: CfgNode, world: Distributed, log: Logger) -> nn.Module:
    """Train; the model, averaged if it was asked for, when all epochs are done."""
    with StopRequest() as stop:
        run = build_training(cfg, world, log, stop)
        describe(run)
        if run.progress.epoch >= cfg.TRAIN.EPOCHS:
            log.info(
                "nothing is left to train: raise TRAIN.EPOCHS to go on, or begin another run with"
                " --tag"
            )
        try:
            train(run)
        finally:
            run.writer.close()
    best = f", best top-1 {run.progress.best:.3f}%" if run.progress.best >= 0 else ""
    log.info(
        f"finished: {run.progress.epoch} epochs, {run.progress.update} updates{best};"
        f" {run_folder(cfg)}"
    )
    return run.average.model if run.average else run.model


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argument_parser(str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--save-model",
        metavar="FILE",
        default="",
        help="write the weights alone, as safetensors, when done",
    )
    parser.add_argument(
        "--per-class-csv",
        metavar="FILE",
        help="with --eval: write each class's accuracy (TEST.PER_CLASS_CSV)",
    )
    args, rank, log = parser.parse_args(argv), os.environ.get("RANK", "0"), None
    try:
        given = {"TEST.PER_CLASS_CSV": args.per_class_csv} if args.per_class_csv else {}
        cfg = config_from_args(args, utils.from_environment("WORLD_SIZE", 1), given)
        for name, path in (
            ("--save-model", args.save_model),
            ("TEST.PER_CLASS_CSV", cfg.TEST.PER_CLASS_CSV),
        ):
            if path and not utils.is_writable(path):
                raise ValueError(
                    f"{name} {path}: can't be written there, name a file in a folder of yours"
                )
        world = utils.init_distributed(cfg.DEVICE)
        utils.choose_kernels(cfg.TRAIN.DETERMINISTIC)
        program = (
            measure_throughput
            if cfg.THROUGHPUT_MODE
            else evaluate_weights
            if cfg.EVAL_MODE
            else run_training
        )
        folder = run_folder(cfg) if program is run_training else None
        with ExitStack() as stack:
            if folder:
                world.on_main(
                    lambda: stack.enter_context(utils.sole_user(folder / "log_rank0.txt"))
                )
            log = create_logger(folder, world.rank)
            model = program(cfg, world, log)
        if args.save_model and world.is_main:
            save_weights(model, args.save_model)
            log.info(f"weights written to {args.save_model}")
        world.destroy()
        return 0
    except Stopped as stopped:
        is_saved = stopped.args[0]
        log.info(
            "stopped on request:"
            f" {'the same command goes on from here' if is_saved else 'and nothing could be saved'}"
        )
        return STOPPED if is_saved else FAULT
    except KeyboardInterrupt:
        print(
            "ended without saving: the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return INTERRUPTED
    except ElsewhereError:
        return FAULT
    except (ValueError, OSError, RuntimeError) as error:
        return fail(error, rank, log)


def fail(error: Exception, rank: str, log: Logger | None) -> int:
    """Tell a fault in one line, in the log as well, as far as there is one; the exit code. A fault
    of the program itself is raised.
    """
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        # how gloo and NCCL say that another process is gone
        if "onnection" not in text and not isinstance(error, dist.DistError):
            raise error
        text = (
            f"the connection to another process is lost, whose own message tells why ({text[:120]})"
        )
    print(f"error: {text}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
    if log:
        note_fault(log, text)
    return FAULT


if __name__ == "__main__":
    sys.exit(main())
