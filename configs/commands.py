"""What the command lines of the two programs mean, read before anything slow is imported."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from configs.command_line import argument_parser
from configs.config import Config
from configs.load import config_from_args

Settings = TypeVar("Settings")
# A ValueError unless a store's folder holds these epochs.
CheckSealed = Callable[[Path, range], None]

# What the flags set that save_logits.py accepts, as the original did, and does without.
OF_TRAINING = (
    *("EVAL_MODE", "THROUGHPUT_MODE", "TRAIN.ACCUMULATION_STEPS", "TRAIN.USE_CHECKPOINT"),
    *("TRAIN.SYNC_BN", "USE_WANDB"),
)


def answered(load: Callable[[], Settings]) -> Settings:
    """What `load` reads from the command line; a fault of the user's ends the program."""
    try:
        return load()
    except ValueError as error:
        tell(error)
        sys.exit(2)


def tell(error: ValueError) -> None:
    """Tell a fault of the command line on rank 0: it is the same in all processes."""
    if is_main():
        print(f"error: {one_line(error)}", file=sys.stderr)


def is_main() -> bool:
    """Whether this process is the only one, or the one of them that talks to people."""
    return os.environ.get("RANK", "0") == "0"


def one_line(error: Exception) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def training(argv: list[str] | None, check_sealed: CheckSealed) -> tuple[Config, str]:
    """main.py: the configuration, and where to write the weights when done."""
    parser = argument_parser(
        "Train a student: from labels, from a teacher's stored logits, or with the teacher in the"
        " loop."
    )
    add = parser.add_argument
    add("--save-model", metavar="FILE", default="", help="write the weights, as safetensors")
    add(
        "--per-class-csv",
        dest="TEST.PER_CLASS_CSV",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="with --eval: write each class's accuracy",
    )
    args = parser.parse_args(argv)
    check = partial(_check_epochs, check_sealed)
    cfg = config_from_args(args, from_environment("WORLD_SIZE", 1), check=check)
    for option, path in (
        ("--save-model", args.save_model),
        ("TEST.PER_CLASS_CSV", cfg.TEST.PER_CLASS_CSV),
    ):
        if path:
            check_writable(option, path)
    return cfg, args.save_model


def _check_epochs(check_sealed: CheckSealed, cfg: Config) -> None:
    """A ValueError where a training wants epochs that its store lacks; rank 0 alone looks."""
    root, reads_none = cfg.DISTILL.TEACHER_LOGITS_PATH, cfg.EVAL_MODE or cfg.THROUGHPUT_MODE
    if reads_none or cfg.DISTILL.REUSE_EPOCHS or cfg.DISTILL.REUSE_FIRST or not is_main():
        return
    if root and Path(root, "manifest.json").is_file():
        check_sealed(Path(root), range(cfg.TRAIN.START_EPOCH, cfg.TRAIN.EPOCHS))


def saving(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """save_logits.py: its flags, and the configuration."""
    text = "Save a teacher's answers to a logits store, or check them."
    parser = argument_parser(text, without_effect=OF_TRAINING)
    add = parser.add_argument
    add("--check-saved-logits", action="store_true", help="compare the store with its teacher now")
    add("--exact", action="store_true", help="with the check: every bit must be equal")
    add("--percent", type=float, metavar="P", help="with the check: a share of the batches")
    add("--skip-eval", action="store_true", help="do not evaluate the teacher before saving")
    args = parser.parse_args(argv)
    if "THROUGHPUT_MODE" in args:
        parser.error("--throughput belongs to main.py")
    if (args.exact or args.percent is not None) and not args.check_saved_logits:
        parser.error("--exact and --percent go with --check-saved-logits")
    if args.percent is not None and not 0 < args.percent <= 100:
        parser.error(f"--percent {args.percent:g}: expected more than 0 and at most 100")
    own = {
        "EVAL_MODE": False,
        "DISTILL.ENABLED": True,
        "TRAIN.WARMUP_EPOCHS": 0,
        "DISTILL.REUSE_EPOCHS": False,
        "DISTILL.REUSE_FIRST": 0,
        "DISTILL.SAVE_TEACHER_LOGITS": not args.check_saved_logits,
    }
    cfg = config_from_args(args, from_environment("WORLD_SIZE", 1), own)
    if not cfg.DISTILL.TEACHER_LOGITS_PATH:
        raise ValueError(
            "DISTILL.TEACHER_LOGITS_PATH: name the store's folder, e.g. --opts"
            " DISTILL.TEACHER_LOGITS_PATH teacher_logits"
        )
    return args, cfg


def from_environment(name: str, default: int) -> int:
    """A number that torchrun puts into the environment."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment variable {name} is {text!r}, not a number: start with torchrun, or"
            " correct it"
        ) from None


def check_writable(option: str, path: str | Path) -> None:
    """Raise a ValueError unless a file can be written there; folders that it lacks are made."""
    folder = Path(path).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass  # what there is instead is told below
    if Path(path).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(
            f"{option} {path}: can't be written there, name a file in a folder of yours"
        )
