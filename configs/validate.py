"""What a configuration must satisfy, checked here alone: choices, ranges, combinations."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.config import Config, ConfigError


class Items(NamedTuple):
    """What a list of numbers must be."""

    lengths: tuple[int, ...]
    low: float = -1000
    high: float = 1000
    is_whole: bool = False
    is_ascending: bool = False


TINY = 1e-6  # the least that counts as above 0
BELOW_1 = 0.9999999  # the most that counts as below 1
FUNCTION = "package.module:function"

CHOICES = {
    "DATA.DATASET": (
        *("imagenet", "imagenet22k", "cifar10", "cifar100", "folder"),
        *("webdataset", "parquet", "shapes"),
        FUNCTION,
    ),
    "DATA.MEAN_AND_STD_TYPE": ("default", "clip", "half", "inception"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.WORKER_START": ("auto", "fork", "spawn", "forkserver"),
    "DATA.ON_CORRUPT": ("error", "neighbour"),
    "MODEL.TYPE": ("tiny_vit", "clip_vit_large14_224", "timm", FUNCTION),
    "DISTILL.EXCESS": ("auto", "rescale", "subtract"),
    "DISTILL.UPSTREAM_ORDER": ("folder", "tar"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "TRAIN.FREEZE": ("", "backbone"),
    "TRAIN.COMPILE": ("auto", "True", "False"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.EXECUTOR": ("auto", "pillow", "device"),
    "AUG.MIXUP_MODE": ("batch", "pair2"),
    "AMP_DTYPE": ("auto", "bf16", "fp16", "off"),
    "DEVICE": ("auto", "cuda", "mps", "cpu"),
}
MANY = 10**9
# The largest values are far above what anybody uses, and below what exhausts time or memory.
RANGES = {  # (smallest value, largest value): the keys that it holds for
    (0, MANY): """
        TRAIN.WEIGHT_DECAY TRAIN.BASE_LR TRAIN.WARMUP_LR TRAIN.MIN_LR TRAIN.CLIP_GRAD
        TRAIN.CHECKPOINT_MINUTES TRAIN.OPTIMIZER.EPS AUG.COLOR_JITTER AUG.MIXUP AUG.CUTMIX
    """,
    (1, MANY): "DATA.MAX_PIXELS TEST.EVERY SAVE_FREQ PRINT_FREQ",
    (1, 10**7): "DATA.SHAPES.TRAIN_IMAGES DATA.SHAPES.VAL_IMAGES",
    (0, 10**6): "MODEL.NUM_CLASSES DISTILL.LOGITS_TOPK TRAIN.GLOBAL_BATCH TEST.BATCH_SIZE",
    (1, 10**6): "DATA.BATCH_SIZE TRAIN.ACCUMULATION_STEPS",
    (0, 10**5): """
        TRAIN.START_EPOCH TRAIN.WARMUP_EPOCHS TRAIN.KEEP_CHECKPOINTS DISTILL.REUSE_FIRST
    """,
    (1, 10**5): "TRAIN.EPOCHS TRAIN.LR_SCHEDULER.DECAY_EPOCHS TRAIN.MAX_BAD_STEPS",
    (-1, 1000): "DATA.NUM_WORKERS",
    (1, 1000): "DATA.PREFETCH MODEL.TINY_VIT.IN_CHANS AUG.RECOUNT",
    (1, 100): "MODEL.TINY_VIT.LOCAL_CONV_SIZE",
    (16, 4096): "DATA.SHAPES.SIZE",
    (32, 4096): "DATA.IMG_SIZE",
    (TINY, 1000): """
        DISTILL.TEMPERATURE MODEL.TINY_VIT.MLP_RATIO MODEL.TINY_VIT.MBCONV_EXPAND_RATIO
    """,
    (TINY, 1): "DATA.SUBSET TRAIN.LAYER_LR_DECAY",
    (0, 1): """
        DISTILL.ALPHA TRAIN.LR_SCHEDULER.DECAY_RATE TRAIN.OPTIMIZER.MOMENTUM AUG.REPROB
        AUG.MIXUP_PROB AUG.MIXUP_SWITCH_PROB AUG.HFLIP AUG.VFLIP
    """,
    (0, 0.999): """
        MODEL.DROP_RATE MODEL.DROP_PATH_RATE MODEL.LABEL_SMOOTHING DATA.HELD_OUT
    """,
    (0, BELOW_1): "TRAIN.EMA_DECAY",
    (0, 2**31 - 1): "DATA.SEED SEED",
}
STAGES = Items((4,), 1, 1000, is_whole=True)
LISTS = {
    "DATA.MEAN": Items((0, 3)),
    "DATA.STD": Items((0, 3), TINY),
    "AUG.FILL": Items((0, 3), 0, 255, is_whole=True),
    "AUG.SCALE": Items((2,), TINY, 1, is_ascending=True),
    "AUG.RATIO": Items((2,), TINY, is_ascending=True),
    "AUG.CUTMIX_MINMAX": Items((2,), TINY, 1, is_ascending=True),
    "TRAIN.OPTIMIZER.BETAS": Items((2,), 0, BELOW_1),
    "MODEL.TINY_VIT.DEPTHS": STAGES,
    "MODEL.TINY_VIT.NUM_HEADS": STAGES,
    "MODEL.TINY_VIT.WINDOW_SIZES": Items((4,), 1, 100, is_whole=True),
    "MODEL.TINY_VIT.EMBED_DIMS": Items((4,), 1, 10**5, is_whole=True),
}
MSTD = r"-mstd(\d+(\.\d+)?|inf)"
POLICY = re.compile(
    rf"(none)?|(original|v0)({MSTD})*|rand(-m\d+|-mmax\d+|-n[1-9]\d*|{MSTD}|-w0|-inc[01])*"
)

# Anything more could ask for any attribute, or a name of any length.
NAME_FORMAT = re.compile(r"[^{}]*\{(:\.\d{1,3})?\}[^{}]*")

Rule = tuple[bool, str, str]  # whether something is wrong, the key to blame, what to do


def judge(cfg: Config, groups: Iterable[Callable], note: Callable[[ConfigError], object]) -> None:
    """Note what cannot work by some groups of rules: VALUES, or COMBINATIONS of good values."""
    for rules in groups:
        for is_wrong, key, what_to_do in rules(cfg):
            if is_wrong:
                note(ConfigError(f"{key} = {cfg.value(key)!r}: {what_to_do}", key))


def _choices(cfg: Config) -> Iterator[Rule]:
    for key, choices in CHOICES.items():
        value = cfg.value(key)
        is_function = FUNCTION in choices and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value)
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0.7)
        advice = f"did you mean {near[0]}? " if near else ""
        listed = ", ".join(choice or "''" for choice in choices)
        yield value not in choices and not is_function, key, f"{advice}it is one of {listed}"


def _ranges(cfg: Config) -> Iterator[Rule]:
    for (low, high), keys in RANGES.items():
        for key in keys.split():
            fits = _is_number(cfg.value(key), low, high)
            yield not fits, key, f"expected a number from {low:,} to {high:,}"


def _lists(cfg: Config) -> Iterator[Rule]:
    for key, (lengths, low, high, is_whole, is_ascending) in LISTS.items():
        values = cfg.value(key)
        if values is None:  # not given
            continue
        fits = (
            isinstance(values, (list, tuple))
            and len(values) in lengths
            and all(_is_number(value, low, high) for value in values)
            and (not is_whole or all(value == int(value) for value in values))
            and (not is_ascending or values[0] <= values[1])
        )
        count = " or ".join(map(str, lengths))
        whole = "whole " if is_whole else ""
        order = ", the smaller one first" if is_ascending else ""
        bounds = f"from {low:,} to {high:,}{order}"
        yield not fits, key, f"expected {count} {whole}numbers {bounds}"


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and low <= value <= high


def _images(cfg: Config) -> Iterator[Rule]:
    is_format = NAME_FORMAT.fullmatch(cfg.DATA.FNAME_FORMAT)
    yield not is_format, "DATA.FNAME_FORMAT", "expected {} where the listed name goes, e.g. {}.jpeg"
    grammar = "none, original, v0 or rand, e.g. rand-m9-n2-mstd0.5-mmax10-w0-inc1, v0-mstd0.5"
    is_policy = POLICY.fullmatch(cfg.AUG.AUTO_AUGMENT)
    yield not is_policy, "AUG.AUTO_AUGMENT", f"expected {grammar}"
    if cfg.AUG.CUTMIX_MINMAX is not None:
        low, high = (int(cfg.DATA.IMG_SIZE * side) for side in cfg.AUG.CUTMIX_MINMAX)
        yield low >= high, "AUG.CUTMIX_MINMAX", "the two must be a pixel apart at least"
    trains = not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE)
    batch = cfg.DATA.BATCH_SIZE
    yield (
        trains and cfg.is_paired and batch % 2 == 1 and not cfg.TRAIN.GLOBAL_BATCH,
        "DATA.BATCH_SIZE",
        f"images are mixed in pairs, the batch must be even (e.g. {batch + 1})",
    )


def _model(cfg: Config) -> Iterator[Rule]:
    shape = cfg.MODEL.TINY_VIT
    is_timm = cfg.MODEL.TYPE == "timm"
    yield bool(cfg.MODEL.ARGS) and not is_timm, "MODEL.ARGS", "only MODEL.TYPE timm takes arguments"
    if cfg.MODEL.TYPE != "tiny_vit":
        return
    for stage in range(1, 4):  # stage 0 is convolutional
        dim, heads = shape.EMBED_DIMS[stage], shape.NUM_HEADS[stage]
        reason = f"stage {stage} has {heads} heads, which do not divide its {dim} EMBED_DIMS"
        yield dim % heads != 0, "MODEL.TINY_VIT.NUM_HEADS", reason
    is_even = shape.LOCAL_CONV_SIZE % 2 == 0
    yield is_even, "MODEL.TINY_VIT.LOCAL_CONV_SIZE", "expected an odd number"


def _teacher(cfg: Config) -> Iterator[Rule]:
    distill = cfg.DISTILL
    is_no_k = distill.LOGITS_TOPK < 1 and "DISTILL.LOGITS_TOPK" in cfg.EXPLICIT
    yield is_no_k, "DISTILL.LOGITS_TOPK", "must be at least 1 (leave it out for the default)"
    trains = not (cfg.EVAL_MODE or cfg.THROUGHPUT_MODE or distill.SAVE_TEACHER_LOGITS)
    if trains and distill.TWO_HEADS:
        reason = "the distillation head needs a teacher: DISTILL.TEACHER_LOGITS_PATH, or ONLINE"
        yield not distill.ENABLED, "DISTILL.TWO_HEADS", reason
        reason = "leaves the class head of DISTILL.TWO_HEADS nothing to learn from, set e.g. 0.5"
        yield distill.ALPHA == 1, "DISTILL.ALPHA", reason
    if distill.ONLINE:
        store, recipe = distill.TEACHER_LOGITS_PATH, distill.TEACHER_CFG
        reason = f"the run already reads the store {store}; give one of the two"
        yield bool(store), "DISTILL.ONLINE", reason
        yield not recipe, "DISTILL.ONLINE", "name the teacher's recipe in DISTILL.TEACHER_CFG"


def _programs(cfg: Config) -> Iterator[Rule]:
    train, is_saving = cfg.TRAIN, cfg.DISTILL.SAVE_TEACHER_LOGITS
    yield (
        train.SYNC_BN and cfg.DEVICE == "cpu",
        "TRAIN.SYNC_BN",
        "batch statistics over processes need CUDA; leave --use-sync-bn out on the CPU",
    )
    yield (
        bool(cfg.TEST.PER_CLASS_CSV) and not cfg.EVAL_MODE,
        "TEST.PER_CLASS_CSV",
        "written by --eval alone: add --eval, or leave --per-class-csv out",
    )
    if cfg.EVAL_MODE or cfg.THROUGHPUT_MODE:
        return
    yield (
        train.START_EPOCH >= train.EPOCHS,
        "TRAIN.START_EPOCH",
        f"no epoch left before TRAIN.EPOCHS = {train.EPOCHS}",
    )
    yield (
        train.WARMUP_EPOCHS > train.EPOCHS and not is_saving,
        "TRAIN.WARMUP_EPOCHS",
        f"warm-up is longer than training (TRAIN.EPOCHS = {train.EPOCHS}): also set"
        " TRAIN.WARMUP_EPOCHS, to 0 for none",
    )


def _folders(cfg: Config) -> Iterator[Rule]:
    yield not cfg.OUTPUT, "OUTPUT", "name a folder for the run"
    # The run's folder is OUTPUT/MODEL.NAME/TAG, and stays inside OUTPUT.
    name, tag = Path(cfg.MODEL.NAME), Path(cfg.TAG)
    leaves_output = name.is_absolute() or ".." in name.parts
    yield leaves_output, "MODEL.NAME", "names a folder inside OUTPUT: no leading slash, no .."
    is_folder = tag.name == cfg.TAG and cfg.TAG not in ("", "..")
    yield not is_folder, "TAG", "a folder name, without slashes, not . or .."
    if cfg.EVAL_MODE or cfg.THROUGHPUT_MODE:
        return
    folder = Path(cfg.OUTPUT).absolute() / cfg.MODEL.NAME / cfg.TAG
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    yield not existing.is_dir(), "OUTPUT", f"{existing} is a file, choose another folder"
    yield (
        not os.access(existing, os.W_OK | os.X_OK),
        "OUTPUT",
        f"no permission to write in {existing}, choose another folder",
    )


VALUES = (_choices, _ranges, _lists)
COMBINATIONS = (_images, _model, _teacher, _programs, _folders)
