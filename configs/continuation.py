"""Whether a run may go on under another configuration than the one it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from configs import Config, ConfigError, batch_plan, dump
from configs.config import flatten
from configs.load import parse

# What may differ because it changes where things are, what is shown and how fast it goes, but not
# what is computed.
FREE = set(
    """
    EXPLICIT BASE OUTPUT TAG PRINT_FREQ SAVE_FREQ USE_WANDB WANDB_PROJECT LOCAL_RANK DEVICE
    EVAL_MODE THROUGHPUT_MODE DATA.DATA_PATH DATA.VAL_PATH DATA.INDEX_DIR DATA.REINDEX
    DATA.DOWNLOAD DATA.NUM_WORKERS DATA.WORKER_START DATA.PREFETCH DATA.PIN_MEMORY
    DATA.ON_CORRUPT DATA.MAX_PIXELS MODEL.PRETRAINED MODEL.RESUME DISTILL.TEACHER_LOGITS_PATH
    DISTILL.TEACHER_CFG DISTILL.TEACHER_WEIGHTS DISTILL.VERIFY TRAIN.EPOCHS TRAIN.AUTO_RESUME
    TRAIN.CHECKPOINT_MINUTES TRAIN.GLOBAL_BATCH TRAIN.USE_CHECKPOINT TRAIN.MAX_BAD_STEPS
    TRAIN.KEEP_CHECKPOINTS TEST.BATCH_SIZE TEST.EVERY TEST.PER_CLASS_CSV AUG.EXECUTOR TRAIN.COMPILE
    """.split()
)
# How an update is split; free as soon as GLOBAL_BATCH says how large it is in all.
SPLIT = {"WORLD_SIZE", "DATA.BATCH_SIZE", "TRAIN.ACCUMULATION_STEPS"}
WORTH_SAYING = SPLIT | {"TRAIN.EPOCHS"}


class Change(NamedTuple):
    """A key's value in the checkpoint, and now."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before!r} -> {self.now!r}"


def check_continuation(before: str, cfg: Config, where: str) -> list[Change]:
    """Compare a checkpoint's configuration (its dump) with this run's.

    Returns the changes that are allowed but worth saying; any that is not allowed is a ConfigError.
    Keys that only one of the two has do not matter.
    """
    old = parse(before, where)
    changes = _changes(old, parse(dump(cfg), where))
    try:
        was, is_now = _images_per_update(old), batch_plan(cfg).per_update
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: its configuration is not whole ({error!r})") from None
    if was != is_now:
        changes.append(Change("images per update", was, is_now))
    free = FREE | SPLIT if cfg.TRAIN.GLOBAL_BATCH else FREE
    refused = [change for change in changes if change.key not in free]
    if not refused:
        return [change for change in changes if change.key in WORTH_SAYING]
    way_out = (
        "start anew with --tag <new name>, take its weights alone with --pretrained, give the old"
        " values back, or move the file away if it is another run's"
    )
    if was != is_now or any(change.key in SPLIT for change in refused):
        way_out += (
            f"; with TRAIN.GLOBAL_BATCH {was} any number of processes may go on that shares so many"
            " images evenly"
        )
    listed = "; ".join(map(str, refused))
    raise ConfigError(f"{where} was written under another configuration ({listed}): {way_out}")


def check_sources(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """A ConfigError if a checkpoint comes from other images or another teacher than are there."""
    changes = "; ".join(map(str, _changes(flatten(before), flatten(now))))
    if changes:
        raise ConfigError(
            f"{where} comes from other data than this run would see ({changes}): give the old"
            " images, lists and teacher back, start anew with --tag <new name>, or take its weights"
            " alone with --pretrained"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs under the keys that both have."""
    return [
        Change(key, before[key], value)
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def _images_per_update(values: Mapping[str, Any]) -> int:
    per_pass = values["WORLD_SIZE"] * values["DATA.BATCH_SIZE"]
    return values["TRAIN.GLOBAL_BATCH"] or per_pass * values["TRAIN.ACCUMULATION_STEPS"]
