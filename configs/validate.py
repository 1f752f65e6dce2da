"""What a configuration must satisfy: ranges, choices and combinations, each fault told in one line."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.config import Config


class ConfigError(ValueError):
    """A fault in the user's configuration; its text names the source, the key, the value and the
    way out.
    """


CHOICES = {
    "DATA.MEAN_AND_STD_TYPE": ("default", "clip", "half", "inception"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.WORKER_START": ("auto", "fork", "spawn", "forkserver"),
    "DATA.ON_CORRUPT": ("error", "neighbour"),
    "DISTILL.EXCESS": ("auto", "rescale", "subtract"),
    "DISTILL.UPSTREAM_ORDER": ("folder", "tar"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "TRAIN.FREEZE": ("", "backbone"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair2"),
    "AMP_DTYPE": ("auto", "bf16", "fp16", "off"),
    "DEVICE": ("auto", "cuda", "mps", "cpu"),
}
NAMED_OR_FUNCTION = {  # a name of the list, or package.module:function
    "DATA.DATASET": ("imagenet", "imagenet22k", "cifar10", "cifar100", "folder", "shapes"),
    "MODEL.TYPE": ("tiny_vit", "clip_vit_large14_224", "timm"),
}
RANGES = {  # key -> smallest and largest allowed value
    "DATA.BATCH_SIZE": (1, None),
    "DATA.IMG_SIZE": (32, None),
    "DATA.SEED": (0, 2**31 - 1),
    "DATA.NUM_WORKERS": (0, None),
    "DATA.PREFETCH": (1, None),
    "DATA.MAX_PIXELS": (1, None),
    "DATA.SHAPES.TRAIN_IMAGES": (1, None),
    "DATA.SHAPES.VAL_IMAGES": (1, None),
    "DATA.SHAPES.SIZE": (16, None),
    "MODEL.NUM_CLASSES": (0, None),
    "MODEL.DROP_RATE": (0, 0.999),
    "MODEL.DROP_PATH_RATE": (0, 0.999),
    "MODEL.LABEL_SMOOTHING": (0, 0.999),
    "MODEL.TINY_VIT.IN_CHANS": (1, None),
    "DISTILL.LOGITS_TOPK": (0, None),
    "DISTILL.ALPHA": (0, 1),
    "TRAIN.START_EPOCH": (0, None),
    "TRAIN.EPOCHS": (1, None),
    "TRAIN.WARMUP_EPOCHS": (0, None),
    "TRAIN.WEIGHT_DECAY": (0, None),
    "TRAIN.BASE_LR": (0, None),
    "TRAIN.WARMUP_LR": (0, None),
    "TRAIN.MIN_LR": (0, None),
    "TRAIN.CLIP_GRAD": (0, None),
    "TRAIN.ACCUMULATION_STEPS": (1, None),
    "TRAIN.GLOBAL_BATCH": (0, None),
    "TRAIN.LAYER_LR_DECAY": (1e-6, 1),
    "TRAIN.EMA_DECAY": (0, 0.9999999),
    "TRAIN.CHECKPOINT_MINUTES": (0, None),
    "TRAIN.MAX_BAD_STEPS": (1, None),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": (1, None),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": (0, 1),
    "TRAIN.OPTIMIZER.EPS": (0, None),
    "TRAIN.OPTIMIZER.MOMENTUM": (0, 1),
    "AUG.COLOR_JITTER": (0, None),
    "AUG.REPROB": (0, 1),
    "AUG.RECOUNT": (1, None),
    "AUG.MIXUP": (0, None),
    "AUG.CUTMIX": (0, None),
    "AUG.MIXUP_PROB": (0, 1),
    "AUG.MIXUP_SWITCH_PROB": (0, 1),
    "AUG.HFLIP": (0, 1),
    "AUG.VFLIP": (0, 1),
    "TEST.BATCH_SIZE": (0, None),
    "TEST.EVERY": (1, None),
    "SAVE_FREQ": (1, None),
    "PRINT_FREQ": (1, None),
    "SEED": (0, 2**31 - 1),
}
LENGTHS = {  # key -> allowed numbers of items
    "DATA.MEAN": (0, 3),
    "DATA.STD": (0, 3),
    "AUG.FILL": (0, 3),
    "AUG.SCALE": (2,),
    "AUG.RATIO": (2,),
    "AUG.CUTMIX_MINMAX": (2,),
    "TRAIN.OPTIMIZER.BETAS": (2,),
    "MODEL.TINY_VIT.DEPTHS": (4,),
    "MODEL.TINY_VIT.NUM_HEADS": (4,),
    "MODEL.TINY_VIT.WINDOW_SIZES": (4,),
    "MODEL.TINY_VIT.EMBED_DIMS": (4,),
}
MSTD = r"mstd(?:\d+(?:\.\d+)?|inf)"
POLICY_OPTIONS = {
    "rand": re.compile(rf"m\d+|mmax\d+|n[1-9]\d*|{MSTD}|w0|inc[01]"),
    "original": re.compile(MSTD),
    "v0": re.compile(MSTD),
}


def validate(cfg: Config) -> None:
    """Raise ConfigError at the first value that cannot work."""
    for key, choices in CHOICES.items():
        value = cfg.value(key)
        if value not in choices:
            raise ConfigError(_choice_message(key, value, choices))
    for key, names in NAMED_OR_FUNCTION.items():
        value = cfg.value(key)
        if value not in names and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ConfigError(_choice_message(key, value, (*names, "package.module:function")))
    for key, (low, high) in RANGES.items():
        value = cfg.value(key)
        if not (
            math.isfinite(value)
            and (low is None or value >= low)
            and (high is None or value <= high)
        ):
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise ConfigError(f"{key} = {value!r}: must be {bounds}")
    for key, lengths in LENGTHS.items():
        _check_numbers(key, cfg.value(key), lengths)
    for check in (
        _check_policy,
        _check_crop,
        _check_cutmix,
        _check_statistics,
        _check_tiny_vit,
        _check_distill,
        _check_training,
        _check_output,
    ):
        check(cfg)


def _choice_message(key: str, value: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    listed = ", ".join(choice or "''" for choice in choices)
    return (
        f"{key} = {value!r}: "
        + (f"did you mean {near[0]}? " if near else "")
        + f"(one of {listed})"
    )


def _check_numbers(key: str, value: Any, lengths: tuple[int, ...]) -> None:
    if value is None:
        return
    if len(value) not in lengths:
        raise ConfigError(
            f"{key} = {list(value)}: expected {' or '.join(map(str, lengths))} numbers"
        )
    for item in value:
        if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item):
            raise ConfigError(f"{key} = {list(value)}: {item!r} is not a number")


def _refuse(is_wrong: bool, cfg: Config, key: str, reason: str) -> None:
    if is_wrong:
        value = cfg.value(key)
        raise ConfigError(
            f"{key} = {list(value) if isinstance(value, (list, tuple)) else repr(value)}: {reason}"
        )


def _check_policy(cfg: Config) -> None:
    key, policy = "AUG.AUTO_AUGMENT", cfg.AUG.AUTO_AUGMENT
    if policy in ("", "none"):
        return
    name, *options = policy.split("-")
    if name not in POLICY_OPTIONS:
        raise ConfigError(
            _choice_message(key, policy, ("rand-m9-mstd0.5-inc1", "original", "v0", "none"))
        )
    known = "m9, n2, mstd0.5, mmax10, w0, inc1" if name == "rand" else "mstd0.5"
    for option in options:
        _refuse(
            not POLICY_OPTIONS[name].fullmatch(option),
            cfg,
            key,
            f"option {option!r} is not one of {known} (numbers may differ)",
        )


def _check_crop(cfg: Config) -> None:
    low, high = cfg.AUG.SCALE
    _refuse(not 0 < low <= high <= 1, cfg, "AUG.SCALE", "needs 0 < smallest <= largest <= 1")
    low, high = cfg.AUG.RATIO
    _refuse(not 0 < low <= high, cfg, "AUG.RATIO", "needs 0 < smallest <= largest")
    _refuse(not 0 < cfg.DATA.SUBSET <= 1, cfg, "DATA.SUBSET", "a fraction above 0 and at most 1")


def _check_cutmix(cfg: Config) -> None:
    if cfg.AUG.CUTMIX_MINMAX is not None:
        low, high = cfg.AUG.CUTMIX_MINMAX
        side = cfg.DATA.IMG_SIZE
        _refuse(
            not 0 < low < high <= 1 or int(side * high) <= int(side * low),
            cfg,
            "AUG.CUTMIX_MINMAX",
            "needs 0 < smallest < largest <= 1, at least a pixel apart",
        )


def _check_statistics(cfg: Config) -> None:
    _refuse(any(value <= 0 for value in cfg.DATA.STD), cfg, "DATA.STD", "must be above 0")
    off_scale = any(not 0 <= value <= 255 or value != int(value) for value in cfg.AUG.FILL)
    _refuse(off_scale, cfg, "AUG.FILL", "three whole numbers from 0 to 255")
    _refuse(
        any(not 0 <= beta < 1 for beta in cfg.TRAIN.OPTIMIZER.BETAS),
        cfg,
        "TRAIN.OPTIMIZER.BETAS",
        "both in [0, 1)",
    )


def _check_tiny_vit(cfg: Config) -> None:
    if cfg.MODEL.TYPE != "tiny_vit":
        return
    prefix, shape = "MODEL.TINY_VIT.", cfg.MODEL.TINY_VIT
    for name in ("DEPTHS", "NUM_HEADS", "WINDOW_SIZES", "EMBED_DIMS"):
        _refuse(
            any(value < 1 or value != int(value) for value in shape[name]),
            cfg,
            prefix + name,
            "four whole numbers from 1 up",
        )
    for stage in range(1, 4):  # stage 0 is convolutional
        dim, heads = shape.EMBED_DIMS[stage], shape.NUM_HEADS[stage]
        _refuse(
            dim % heads != 0,
            cfg,
            prefix + "NUM_HEADS",
            f"stage {stage} has {heads} heads, which do not divide its {dim} channels (EMBED_DIMS"
            f" {list(shape.EMBED_DIMS)})",
        )
    size = shape.LOCAL_CONV_SIZE
    _refuse(size < 1 or size % 2 == 0, cfg, prefix + "LOCAL_CONV_SIZE", "an odd number from 1 up")
    for name in ("MLP_RATIO", "MBCONV_EXPAND_RATIO"):
        _refuse(shape[name] <= 0, cfg, prefix + name, "must be above 0")


def _check_distill(cfg: Config) -> None:
    distill = cfg.DISTILL
    _refuse(
        distill.LOGITS_TOPK < 1 and "DISTILL.LOGITS_TOPK" in cfg.EXPLICIT,
        cfg,
        "DISTILL.LOGITS_TOPK",
        "must be at least 1 (leave it out for the default)",
    )
    _refuse(distill.TEMPERATURE <= 0, cfg, "DISTILL.TEMPERATURE", "must be above 0")
    _refuse(
        distill.ONLINE and bool(distill.TEACHER_LOGITS_PATH),
        cfg,
        "DISTILL.ONLINE",
        f"the run already reads the store {distill.TEACHER_LOGITS_PATH}; give one of the two",
    )
    _refuse(
        distill.ONLINE and not distill.TEACHER_CFG,
        cfg,
        "DISTILL.ONLINE",
        "name the teacher's recipe in DISTILL.TEACHER_CFG",
    )
    batch = cfg.DATA.BATCH_SIZE
    trains = not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE or cfg.TRAIN.GLOBAL_BATCH)
    _refuse(
        trains and cfg.is_paired and batch % 2 == 1,
        cfg,
        "DATA.BATCH_SIZE",
        f"images are mixed in pairs, the batch must be even (e.g. {batch + 1})",
    )


def _check_training(cfg: Config) -> None:
    train = cfg.TRAIN
    _refuse(
        train.SYNC_BN and cfg.DEVICE == "cpu",
        cfg,
        "TRAIN.SYNC_BN",
        "batch statistics over processes need CUDA; leave --use-sync-bn out on the CPU",
    )
    if cfg.EVAL_MODE or cfg.THROUGHPUT_MODE:
        return
    _refuse(
        train.START_EPOCH >= train.EPOCHS,
        cfg,
        "TRAIN.START_EPOCH",
        f"no epoch left before TRAIN.EPOCHS = {train.EPOCHS}",
    )
    _refuse(
        train.WARMUP_EPOCHS > train.EPOCHS and not cfg.DISTILL.SAVE_TEACHER_LOGITS,
        cfg,
        "TRAIN.WARMUP_EPOCHS",
        f"warm-up is longer than training (TRAIN.EPOCHS = {train.EPOCHS}): also set"
        " TRAIN.WARMUP_EPOCHS, to 0 for none",
    )


def _check_output(cfg: Config) -> None:
    _refuse(not cfg.OUTPUT, cfg, "OUTPUT", "name a folder for the run")
    _refuse(
        not cfg.TAG or Path(cfg.TAG).name != cfg.TAG, cfg, "TAG", "a folder name, without slashes"
    )
    if cfg.EVAL_MODE or cfg.THROUGHPUT_MODE:
        return
    folder = Path(cfg.OUTPUT).absolute() / cfg.MODEL.NAME / cfg.TAG
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    _refuse(not existing.is_dir(), cfg, "OUTPUT", f"{existing} is a file, choose another folder")
    _refuse(
        not os.access(existing, os.W_OK | os.X_OK),
        cfg,
        "OUTPUT",
        f"no permission to write in {existing}, choose another folder",
    )
