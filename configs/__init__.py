"""Command line and YAML files -> one validated, frozen configuration."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from configs.config import flatten
from configs.defaults import get_defaults
from configs.validate import ConfigError, validate

__all__ = [
    "BatchPlan",
    "ConfigError",
    "LearningRates",
    "argument_parser",
    "batch_plan",
    "choices_in_words",
    "config_from_args",
    "dump",
    "learning_rates",
    "load_config",
    "run_folder",
    "teacher_config",
]

# Values that load_config derives from other keys; a file that gives them is neither wrong nor
# heeded.
_DERIVED = ("WORLD_SIZE", "EXPLICIT", "BASE")
# What a timm model knows about its own input: configuration key -> key of its pretrained_cfg.
_TIMM_INPUT = {
    "DATA.MEAN": "mean",
    "DATA.STD": "std",
    "DATA.INTERPOLATION": "interpolation",
    "DATA.IMG_SIZE": "input_size",
}


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


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every program understands; programs add their own."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--cfg",
        metavar="FILE",
        help=(
            "recipe (YAML); the first comment of each file under configs/ is the command that"
            " runs it"
        ),
    )
    add(
        "--opts",
        metavar="KEY VALUE",
        nargs="*",
        action="extend",
        help="set any key of configs/defaults.py, e.g. --opts TRAIN.EPOCHS 10",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per process and forward pass (DATA.BATCH_SIZE)",
    )
    add("--data-path", metavar="PATH", help="the data set (DATA.DATA_PATH)")
    add(
        "--pretrained",
        metavar="WEIGHTS",
        help="weights to start from: path, URL or zoo name (MODEL.PRETRAINED)",
    )
    add(
        "--resume",
        metavar="CHECKPOINT",
        help="checkpoint to continue from, or to evaluate (MODEL.RESUME)",
    )
    add(
        "--accumulation-steps",
        type=int,
        metavar="N",
        help="forward passes per update (TRAIN.ACCUMULATION_STEPS)",
    )
    add(
        "--use-checkpoint",
        action="store_true",
        help="recompute activations to save memory (TRAIN.USE_CHECKPOINT)",
    )
    add(
        "--disable_amp",
        "--disable-amp",
        action="store_true",
        help="float32 throughout (AMP_ENABLE False)",
    )
    add("--output", metavar="FOLDER", help="runs go to FOLDER/MODEL.NAME/TAG (OUTPUT)")
    add("--tag", metavar="NAME", help="name of this run (TAG)")
    add(
        "--eval",
        action="store_true",
        help="evaluate the weights of --resume or --pretrained, then stop",
    )
    add(
        "--throughput",
        action="store_true",
        help="measure images per second of the model, then stop",
    )
    add("--only-cpu", action="store_true", help="run on the CPU (DEVICE cpu)")
    add(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        help="where to run; auto takes cuda if there is any (DEVICE)",
    )
    add(
        "--use-sync-bn",
        action="store_true",
        help="batch statistics over all processes (TRAIN.SYNC_BN)",
    )
    add("--use-wandb", action="store_true", help="also log to Weights & Biases (USE_WANDB)")
    add(
        "--local_rank",
        "--local-rank",
        type=int,
        help="accepted and ignored: torchrun says it in the environment",
    )
    return parser


def load_config(argv: list[str], world_size: int = 1) -> CfgNode:
    """Read flags, the YAML file with its BASE chain and --opts into a frozen configuration; any
    fault is a ConfigError.
    """
    return config_from_args(
        argument_parser("TinyViT").parse_args([str(word) for word in argv]), world_size
    )


def config_from_args(
    args: argparse.Namespace, world_size: int = 1, overrides: Mapping[str, Any] | None = None
) -> CfgNode:
    """The configuration of parsed flags; `overrides` are values that a program sets for itself."""
    cfg = get_defaults()
    sources = _merge_file(cfg, Path(args.cfg), seen=()) if args.cfg else {}
    sources |= _merge_opts(cfg, args.opts or [])
    for key, value in {**_flag_values(args), **(overrides or {})}.items():
        _set(cfg, key, value, source="command line")
        sources[key] = "command line"
    cfg.WORLD_SIZE = world_size
    cfg.BASE = [""]
    cfg.EXPLICIT = sorted(sources)
    try:
        _derive(cfg)
        cfg.freeze()
        validate(cfg)
        batch_plan(cfg)
    except ConfigError as error:
        source = sources.get(str(error).split(" ", 1)[0])  # the message begins with the key
        raise ConfigError(f"{source}: {error}" if source else str(error)) from None
    return cfg


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The configuration of the teacher that runs in the loop; it sees the student's images."""
    weights = ["--resume", cfg.DISTILL.TEACHER_WEIGHTS] if cfg.DISTILL.TEACHER_WEIGHTS else []
    subset = (
        ["--opts", "DISTILL.CLASS_SUBSET", cfg.DISTILL.CLASS_SUBSET]
        if cfg.DISTILL.CLASS_SUBSET
        else []
    )
    theirs = load_config(
        [
            "--cfg",
            cfg.DISTILL.TEACHER_CFG,
            "--eval",
            *weights,
            *subset,
            *["--disable_amp"] * (not cfg.AMP_ENABLE),
        ]
    )
    if theirs.DATA.IMG_SIZE != cfg.DATA.IMG_SIZE:
        raise ConfigError(
            f"DATA.IMG_SIZE = {cfg.DATA.IMG_SIZE}, but the teacher {cfg.DISTILL.TEACHER_CFG} takes"
            f" images of {theirs.DATA.IMG_SIZE} pixels: set the one or the other"
        )
    return theirs


def dump(cfg: CfgNode) -> str:
    """The configuration as YAML that load_config reads back to an equal one."""
    return cfg.dump(sort_keys=False)


def choices_in_words(cfg: CfgNode) -> str:
    """What differs from the defaults, on one line."""
    defaults = get_defaults()
    changed = [
        f"{key} {value}"
        for key, value in flatten(cfg).items()
        if key not in _DERIVED and value != defaults.value(key)
    ]
    return ", ".join(changed) or "the defaults"


def run_folder(cfg: CfgNode) -> Path:
    """The folder of this run's log, metrics and checkpoints."""
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def batch_plan(cfg: CfgNode) -> BatchPlan:
    """Images per forward pass and forward passes per update, from GLOBAL_BATCH where that is given."""
    world, limit, total = cfg.WORLD_SIZE, cfg.DATA.BATCH_SIZE, cfg.TRAIN.GLOBAL_BATCH
    if not total:
        return BatchPlan(
            limit, cfg.TRAIN.ACCUMULATION_STEPS, limit * world * cfg.TRAIN.ACCUMULATION_STEPS
        )
    unit = 2 if cfg.is_paired else 1  # a pair is never split
    if total % (world * unit):
        fitting = [size for size in range(1, total // unit + 1) if total % (size * unit) == 0]
        shown = ", ".join(map(str, fitting[:12])) + (", ..." if len(fitting) > 12 else "")
        raise ConfigError(
            f"TRAIN.GLOBAL_BATCH {total} cannot be split over {world}"
            f" processes{' in whole pairs' * (unit == 2)}: use one of {shown} processes, or another"
            " GLOBAL_BATCH"
        )
    share = total // world
    steps = next(
        n
        for n in range(1, share + 1)
        if share % (n * unit) == 0 and (share // n <= limit or share // n == unit)
    )
    return BatchPlan(share // steps, steps, total)


def learning_rates(cfg: CfgNode) -> LearningRates:
    """The configured rates times (images per update) / 512."""
    scale = batch_plan(cfg).per_update / 512.0
    return LearningRates(
        cfg.TRAIN.BASE_LR * scale, cfg.TRAIN.WARMUP_LR * scale, cfg.TRAIN.MIN_LR * scale
    )


def _flag_values(args: argparse.Namespace) -> dict[str, Any]:
    """The keys that flags set; a flag that is absent sets nothing."""
    given = {
        "DATA.BATCH_SIZE": args.batch_size,
        "DATA.DATA_PATH": args.data_path,
        "MODEL.PRETRAINED": args.pretrained,
        "MODEL.RESUME": args.resume,
        "TRAIN.ACCUMULATION_STEPS": args.accumulation_steps,
        "OUTPUT": args.output,
        "TAG": args.tag,
        "DEVICE": args.device,
    }
    switches = {
        "TRAIN.USE_CHECKPOINT": (args.use_checkpoint, True),
        "AMP_ENABLE": (args.disable_amp, False),
        "EVAL_MODE": (args.eval, True),
        "THROUGHPUT_MODE": (args.throughput, True),
        "DEVICE": (args.only_cpu, "cpu"),
        "TRAIN.SYNC_BN": (args.use_sync_bn, True),
        "USE_WANDB": (args.use_wandb, True),
    }
    values = {key: value for key, value in given.items() if value is not None}
    return values | {key: value for key, (is_on, value) in switches.items() if is_on}


def _derive(cfg: CfgNode) -> None:
    """Fill in the values that follow from others."""
    if cfg.DISTILL.TEACHER_LOGITS_PATH or cfg.DISTILL.ONLINE:
        cfg.DISTILL.ENABLED = True
    if cfg.DISTILL.ENABLED or cfg.DISTILL.SAVE_TEACHER_LOGITS:
        cfg.AUG.MIXUP_MODE = "pair2"  # a stored probability belongs to one image, or to one pair
    if cfg.MODEL.TYPE == "timm":
        own = _timm_input(cfg.MODEL.NAME)
        if "DATA.MEAN_AND_STD_TYPE" in cfg.EXPLICIT:
            own = {key: value for key, value in own.items() if key not in ("DATA.MEAN", "DATA.STD")}
        for key, value in own.items():
            if key not in cfg.EXPLICIT:
                _set(cfg, key, value, source=f"timm model {cfg.MODEL.NAME}")


def _timm_input(name: str) -> dict[str, Any]:
    """Mean, std, interpolation and image size that a timm model was trained with."""
    import timm  # slow to import, and only some recipes need it

    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(
            f"MODEL.NAME = {name!r}: timm {timm.__version__} has no such model"
            + (f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()")
        )
    own = timm.get_pretrained_cfg(name)
    if own is None:
        return {}
    values = {key: getattr(own, field) for key, field in _TIMM_INPUT.items()}
    values["DATA.IMG_SIZE"] = values["DATA.IMG_SIZE"][-1]
    if values["DATA.INTERPOLATION"] not in ("bicubic", "bilinear"):
        del values["DATA.INTERPOLATION"]
    return values


def _merge_file(cfg: CfgNode, path: Path, seen: tuple[Path, ...]) -> dict[str, str]:
    """Merge a YAML file over `cfg`, its BASE files first; returns the keys they set, each with its
    file.
    """
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(
            f"{path}: BASE goes round in a circle: {' -> '.join(p.name for p in (*seen, resolved))}"
        )
    content = _read_yaml(path, named_by=seen[-1] if seen else None)
    bases = content.get("BASE") or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: BASE = {bases!r}: expected a list of YAML files")
    sources: dict[str, str] = {}
    for base in filter(None, bases):
        sources |= _merge_file(cfg, path.parent / base, (*seen, resolved))
    for key, value in _leaves(cfg, content, str(path)):
        if key not in _DERIVED:
            _set(cfg, key, value, source=str(path))
            sources[key] = str(path)
    if "EXPLICIT" in content:  # a dump: it holds every key, and says which of them somebody chose
        sources = {key: str(path) for key in content["EXPLICIT"] or []}
    return sources


def _read_yaml(path: Path, named_by: Path | None) -> dict:
    """One YAML file as plain values; tags and repeated keys are refused."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else getattr(error, "strerror", None) or str(error)
        )
        raise ConfigError(
            f"{path}: {reason}" + (f" (BASE of {named_by})" if named_by else "")
        ) from None
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.TagToken):
                raise ConfigError(
                    f"{path}: line {token.start_mark.line + 1}: YAML tags are not allowed, write"
                    " plain values"
                )
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), path)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected KEY: value lines, found a {type(content).__name__}")
    return content


def _refuse_repeated_keys(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        for (key, value), name in zip(node.value, names):
            if names.count(name) > 1:
                raise ConfigError(
                    f"{path}: line {key.start_mark.line + 1}: key {name} stands there twice,"
                    " keep one"
                )
            _refuse_repeated_keys(value, path)


def _leaves(
    cfg: CfgNode, content: Mapping, source: str, prefix: str = ""
) -> Iterable[tuple[str, Any]]:
    """The (dotted key, value) pairs of nested mappings."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(_find(cfg, key, value, source), CfgNode):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {key} = {value!r}: is a group of keys, not a value")
            yield from _leaves(cfg, value, source, f"{key}.")
        else:
            yield key, value


def _merge_opts(cfg: CfgNode, opts: list[str]) -> dict[str, str]:
    """Merge KEY VALUE pairs of the command line; returns the keys they set, each with its source."""
    if len(opts) % 2:
        way_out = "; write KEY VALUE, without =" if any("=" in word for word in opts[::2]) else ""
        raise ConfigError(
            f"--opts: expected KEY VALUE pairs, got {len(opts)} words: {' '.join(opts)}{way_out}"
        )
    for key, text in zip(opts[::2], opts[1::2]):
        default = _find(cfg, key, text, "--opts")
        if isinstance(default, CfgNode):
            raise ConfigError(
                f"--opts: {key} = {text}: is a group of keys, name one of {', '.join(default)}"
            )
        if key in _DERIVED:
            raise ConfigError(f"--opts: {key} = {text}: is set by the program")
        _set(cfg, key, text if isinstance(default, str) else _literal(text), source="--opts")
    return dict.fromkeys(opts[::2], "--opts")


def _literal(text: Any) -> Any:
    """A Python or YAML literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text


def _find(cfg: CfgNode, key: str, value: Any, source: str) -> Any:
    """The present value of a dotted key; an unknown key is an error that suggests the right one."""
    node = cfg
    for name in str(key).split("."):
        if not isinstance(node, CfgNode) or name not in node:
            known = list(_all_keys(cfg))
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5) or _same_last_name(
                str(key), known
            )
            advice = f"did you mean {near[0]}?" if near else "see configs/defaults.py"
            raise ConfigError(f"{source}: {key} = {value!r}: unknown key; {advice}")
        node = node[name]
    return node


def _same_last_name(key: str, known: list[str]) -> list[str]:
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    return [
        last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1].upper(), last, n=1)
    ]


def _all_keys(node: CfgNode, prefix: str = "") -> Iterable[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{name}.")


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set a dotted key, converted to its default's type."""
    default = _find(cfg, key, value, source)
    node = cfg
    *groups, last = key.split(".")
    for name in groups:
        node = node[name]
    node[last] = _convert(default, value, f"{source}: {key} = {value!r}")


def _convert(default: Any, value: Any, where: str) -> Any:
    """`value` as the type of `default`, or an error that begins with `where`."""
    if isinstance(default, str):
        expected, fits, result = "text (quote it)", isinstance(value, str), value
    elif isinstance(default, bool):
        expected, fits, result = "True or False", isinstance(value, bool), value
    elif isinstance(default, (int, float)):
        value = _literal(value) if isinstance(value, str) else value  # YAML reads 1e-8 as text
        whole = isinstance(default, int)
        expected = "a whole number" if whole else "a number"
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        result = type(default)(value) if fits else None
    else:  # a list, a tuple, or None, which stands for a list that is not given
        kind = list if default is None else type(default)
        expected, fits = "a list of numbers", value is None or isinstance(value, (list, tuple))
        result = default if value is None else kind(value) if fits else None
    if not fits:
        raise ConfigError(f"{where}: expected {expected}, got {type(value).__name__}")
    return result
