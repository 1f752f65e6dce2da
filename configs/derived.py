"""What follows from the keys: other keys, the split of an update, learning rates, the folder."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import NamedTuple

from configs.config import Config, ConfigError


class BatchPlan(NamedTuple):
    """How one update is made up, in images and forward passes."""

    per_process: int  # images of one forward pass of one process
    accumulation: int  # forward passes per update
    per_update: int  # images of one update over all processes


class LearningRates(NamedTuple):
    """The schedule's three rates, scaled by the images per update."""

    base: float
    warmup: float
    minimum: float


def derive(cfg: Config) -> None:
    """Fill in the values that follow from others; a choice that contradicts one is an error."""
    distill = cfg.DISTILL
    trains = not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE)
    for key in ("DISTILL.TEACHER_LOGITS_PATH", "DISTILL.ONLINE"):
        if not cfg.value(key):
            continue
        if trains and "DISTILL.ENABLED" in cfg.EXPLICIT and not distill.ENABLED:
            raise ConfigError(
                f"DISTILL.ENABLED = False, but {key} = {cfg.value(key)!r} gives a teacher to learn"
                " from: leave out the one or the other",
                "DISTILL.ENABLED",
            )
        distill.ENABLED = True
    # A teacher's answer belongs to one image or to one pair of them, whatever batch these are in.
    if cfg.AUG.MIXUP_MODE == "batch" and (distill.ENABLED or distill.SAVE_TEACHER_LOGITS):
        cfg.AUG.MIXUP_MODE = "pair2"
        if trains and "AUG.MIXUP_MODE" in cfg.EXPLICIT and cfg.is_paired:
            reason = "DISTILL.ENABLED" if distill.ENABLED else "DISTILL.SAVE_TEACHER_LOGITS"
            raise ConfigError(
                f"AUG.MIXUP_MODE = 'batch', but with {reason} True a teacher's answers belong to"
                " images or pairs, not to batches: leave it out, or set pair2",
                "AUG.MIXUP_MODE",
            )


def batch_plan(cfg: Config) -> BatchPlan:
    """Images per forward pass and forward passes per update, from GLOBAL_BATCH if given."""
    world, per_pass, total = cfg.WORLD_SIZE, cfg.DATA.BATCH_SIZE, cfg.TRAIN.GLOBAL_BATCH
    if not total:
        passes = cfg.TRAIN.ACCUMULATION_STEPS
        return BatchPlan(per_pass, passes, per_pass * world * passes)
    unit = 2 if cfg.is_paired else 1  # images that stay together
    if total % (world * unit):
        fitting = [str(size) for size in range(1, total // unit + 1) if total % (size * unit) == 0]
        shown = ", ".join(fitting[:12])
        if len(fitting) > 12:
            shown += ", ..."
        pairs = " in whole pairs" if cfg.is_paired else ""
        raise ConfigError(
            f"TRAIN.GLOBAL_BATCH = {total}: cannot be split over {world} processes{pairs}: use"
            f" one of {shown} processes, or a multiple of {world * unit}",
            "TRAIN.GLOBAL_BATCH",
        )
    units = total // world // unit
    most = max(per_pass // unit, 1)
    passes = next(n for n in range(1, units + 1) if units % n == 0 and units // n <= most)
    return BatchPlan(units // passes * unit, passes, total)


def learning_rates(cfg: Config) -> LearningRates:
    """The configured rates times (images per update) / 512."""
    train, scale = cfg.TRAIN, batch_plan(cfg).per_update / 512.0
    return LearningRates(train.BASE_LR * scale, train.WARMUP_LR * scale, train.MIN_LR * scale)


def run_folder(cfg: Config) -> Path:
    """The folder of this run's log, metrics and checkpoints."""
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def adopt_timm_input(cfg: Config) -> None:
    """Take mean, std, interpolation and size that a timm model was trained with, unless given."""
    if cfg.MODEL.TYPE != "timm":
        return
    import timm  # slow to import, and only some recipes need it

    name = cfg.MODEL.NAME
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise ConfigError(
            f"MODEL.NAME = {name!r}: timm {timm.__version__} has no such model; {advice}",
            "MODEL.NAME",
        )
    own = timm.get_pretrained_cfg(name)
    if own is None:
        return
    explicit = set(cfg.EXPLICIT)
    if "DATA.MEAN_AND_STD_TYPE" in explicit:
        explicit |= {"DATA.MEAN", "DATA.STD"}
    values = {
        "DATA.MEAN": list(own.mean),
        "DATA.STD": list(own.std),
        "DATA.IMG_SIZE": json.loads(cfg.MODEL.ARGS or "{}").get("img_size", own.input_size[-1]),
    }
    if own.interpolation in ("bicubic", "bilinear"):
        values["DATA.INTERPOLATION"] = own.interpolation
    for key in values.keys() - explicit:
        group, name = key.split(".")
        cfg[group][name] = values[key]
