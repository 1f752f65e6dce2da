"""Whether a run may go on under another configuration than the one it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from configs import batch_plan, dump
from configs.config import flatten
from configs.validate import ConfigError

# What may differ because it changes where things are, what is shown and how fast it goes, but not
# what is computed.
FREE = {
    "EXPLICIT",
    "BASE",
    "OUTPUT",
    "TAG",
    "PRINT_FREQ",
    "SAVE_FREQ",
    "USE_WANDB",
    "WANDB_PROJECT",
    "LOCAL_RANK",
    "DEVICE",
    "EVAL_MODE",
    "THROUGHPUT_MODE",
    "DATA.DATA_PATH",
    "DATA.VAL_PATH",
    "DATA.INDEX_DIR",
    "DATA.REINDEX",
    "DATA.DOWNLOAD",
    "DATA.NUM_WORKERS",
    "DATA.WORKER_START",
    "DATA.PREFETCH",
    "DATA.PIN_MEMORY",
    "DATA.ON_CORRUPT",
    "DATA.MAX_PIXELS",
    "MODEL.PRETRAINED",
    "MODEL.RESUME",
    "DISTILL.TEACHER_LOGITS_PATH",
    "DISTILL.STAGE_DIR",
    "DISTILL.TEACHER_CFG",
    "DISTILL.TEACHER_WEIGHTS",
    "TRAIN.EPOCHS",
    "TRAIN.AUTO_RESUME",
    "TRAIN.CHECKPOINT_MINUTES",
    "TRAIN.USE_CHECKPOINT",
    "TRAIN.MAX_BAD_STEPS",
    "TEST.BATCH_SIZE",
    "TEST.EVERY",
    "TEST.PER_CLASS_CSV",
}
# How an update is split; free as soon as GLOBAL_BATCH says how large it is in all.
SPLIT = {"WORLD_SIZE", "DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS"}
GLOBAL = "TRAIN.GLOBAL_BATCH"


class Change(NamedTuple):
    """A key's value in the checkpoint, and now."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before!r} -> {self.now!r}"


def check_continuation(before: str, cfg: CfgNode, where: str) -> list[Change]:
    """Compare a checkpoint's configuration (its dump) with this run's: the changes that are allowed
    but worth saying, or a ConfigError.
    """
    old = flatten(yaml.safe_load(before))
    new = flatten(yaml.safe_load(dump(cfg)))
    images, was = batch_plan(cfg).per_update, _images_per_update(old)
    free = FREE | {GLOBAL} | (SPLIT if cfg.TRAIN.GLOBAL_BATCH else set())
    changes = [
        Change(key, old[key], new[key]) for key in new if key in old and old[key] != new[key]
    ]
    refused = [change for change in changes if change.key not in free]
    if images != was:
        refused.append(Change("images per update", was, images))
    if refused:
        way_out = (
            "start anew with --tag <new name>, take its weights alone with --pretrained, or give"
            " the old values back"
        )
        if images != was or any(change.key in SPLIT for change in refused):
            way_out += (
                f"; with {GLOBAL} {was} any number of processes may go on that shares so many"
                " images evenly"
            )
        raise ConfigError(
            f"{where} was written under another configuration ({'; '.join(map(str, refused))}):"
            f" {way_out}"
        )
    return [change for change in changes if change.key in SPLIT | {"TRAIN.EPOCHS"}]


def check_sources(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """A ConfigError if a checkpoint comes from other images, or another teacher, than lie now where
    the configuration says.
    """
    changes = [
        Change(key, before[key], now[key])
        for key in now
        if key in before and before[key] != now[key]
    ]
    if changes:
        raise ConfigError(
            f"{where} comes from other data than this run would see"
            f" ({'; '.join(map(str, changes))}): give the old images, lists and teacher back, start"
            " anew with --tag <new name>, or take its weights alone with --pretrained"
        )


def _images_per_update(values: Mapping[str, Any]) -> int:
    return (
        values[GLOBAL]
        or values["WORLD_SIZE"] * values["DATA.BATCH_SIZE"] * values["TRAIN.ACCUMULATION_STEPS"]
    )
