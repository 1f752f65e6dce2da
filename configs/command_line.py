"""The flags that every program understands."""

import argparse
from collections.abc import Container
from typing import Any

# (flag, also a short one, and what follows it, key that it sets, type, what it is)
VALUES = (
    ("--batch-size N", "DATA.BATCH_SIZE", int, "images per process and forward pass"),
    ("--data-path PATH", "DATA.DATA_PATH", str, "the data set"),
    ("--pretrained WEIGHTS", "MODEL.PRETRAINED", str, "weights to start from: path, URL, zoo name"),
    (
        "--resume CHECKPOINT",
        "MODEL.RESUME",
        str,
        "checkpoint to continue from, to evaluate, or of the teacher",
    ),
    ("--accumulation-steps N", "TRAIN.ACCUMULATION_STEPS", int, "forward passes per update"),
    ("-o --output FOLDER", "OUTPUT", str, "runs go to FOLDER/MODEL.NAME/TAG"),
    ("--tag NAME", "TAG", str, "name of this run"),
    ("--device auto|cuda|mps|cpu", "DEVICE", str, "where to run; auto takes cuda if there is any"),
)
# (flag and its other spelling, key that it sets, the value, what that does)
SWITCHES = (
    ("--use-checkpoint", "TRAIN.USE_CHECKPOINT", True, "recompute activations to save memory"),
    ("--disable_amp --disable-amp", "AMP_ENABLE", False, "float32 throughout"),
    ("--eval", "EVAL_MODE", True, "evaluate the weights of --resume or --pretrained, then stop"),
    ("--throughput", "THROUGHPUT_MODE", True, "measure images per second of the model, then stop"),
    ("--only-cpu", "DEVICE", "cpu", "run on the CPU"),
    ("--use-sync-bn", "TRAIN.SYNC_BN", True, "batch statistics over all processes"),
    ("--use-wandb", "USE_WANDB", True, "also log to Weights & Biases"),
)


def argument_parser(
    description: str, without_effect: Container[str] = ()
) -> argparse.ArgumentParser:
    """A parser of the flags that all programs share; programs add their own.

    The help leaves out what sets a key `without_effect`. A flag whose `dest` is a dotted key sets
    that key; one that is absent sets nothing.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--cfg",
        metavar="FILE",
        help="recipe (YAML); the first line of each under configs/ is the command that runs it",
    )
    parser.add_argument(
        "--opts",
        metavar="KEY VALUE",
        nargs="*",
        action="extend",
        default=[],
        help="set any key of configs/defaults.py, e.g. --opts TRAIN.EPOCHS 10",
    )
    for words, key, kind, text in VALUES:
        *flags, placeholder = words.split()
        parser.add_argument(
            *flags,
            metavar=placeholder,
            dest=key,
            type=kind,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if key in without_effect else f"{text} ({key})",
        )
    for flags, key, value, text in SWITCHES:
        parser.add_argument(
            *flags.split(),
            dest=key,
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS if key in without_effect else f"{text} ({key} {value})",
        )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        help="accepted and ignored: torchrun says it in the environment",
    )
    return parser


def flag_values(args: argparse.Namespace) -> dict[str, Any]:
    """The keys that flags set."""
    return {key: value for key, value in vars(args).items() if key.isupper()}
