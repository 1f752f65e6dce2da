"""Which value wins: defaults < the files of BASE < the file of --cfg < --opts < flags."""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from configs.command_line import argument_parser, flag_values
from configs.config import MAPPING, Config, ConfigError, flatten
from configs.defaults import REMOVED, get_defaults
from configs.derived import adopt_timm_input, batch_plan, derive
from configs.validate import CHOICES, COMBINATIONS, VALUES, judge

Layer = tuple[str, dict[str, Any]]  # where values come from, and they under their dotted keys

# What load_config itself writes; files may hold it, since dumps do.
WRITTEN = ("BASE", "EXPLICIT", "WORLD_SIZE")
ROOT = Path(__file__).resolve().parent.parent
LARGEST_FILE = 50_000  # characters of YAML; a dump has 6,000
MOST_FILES = 100  # behind a BASE
LONGEST_VALUE = 3_000  # characters; Python prints no number that is much longer
KINDS = {str: "text (quote it)", bool: "True or False", int: "a whole number", float: "a number"}


def load_config(argv: list[str], world_size: int = 1) -> Config:
    """Flags, YAML files and --opts as one frozen configuration; any fault is a ConfigError."""
    args = argument_parser("TinyViT").parse_args([str(word) for word in argv])
    return config_from_args(args, world_size)


def config_from_args(
    args: argparse.Namespace,
    world_size: int = 1,
    overrides: Mapping[str, Any] | None = None,
    check: Callable[[Config], object] = id,
) -> Config:
    """The configuration of parsed flags; `overrides` are values that a program sets for itself.

    A ConfigError tells all faults that do not follow from others, that of `check` among them.
    """
    layers = _file_layers(Path(args.cfg)) if args.cfg else []
    layers.append(("--opts", _opts_values(args.opts)))
    layers.append(("command line", flag_values(args) | dict(overrides or {})))
    cfg = get_defaults()
    defaults = flatten(get_defaults())
    sources: dict[str, str] = {}
    explicit: set[str] = set()
    faults: dict[str, str] = {}  # the first under each key

    def note(error: ValueError) -> None:
        key = getattr(error, "key", "")
        faults.setdefault(key, f"{sources[key]}: {error}" if key in sources else str(error))

    def attempt(step: Callable[..., object], *values: Any) -> None:
        try:
            step(*values)
        except ValueError as error:
            note(error)

    for source, values in layers:
        # A dump holds every key, and says which of them somebody chose.
        chosen = values.get("EXPLICIT", values) or ()
        for key, value in values.items():
            sources[key] = source
            if key in REMOVED:
                _note_removed(key, source, is_chosen=key in chosen)
            elif key not in WRITTEN:
                attempt(_merge, cfg, key, value, defaults)
        explicit.update(chosen)
    cfg.WORLD_SIZE = world_size
    cfg.EXPLICIT = sorted(explicit - {*REMOVED, *WRITTEN})
    if not faults:
        attempt(derive, cfg)
    if not faults:
        judge(cfg, VALUES, note)
    if not faults:
        judge(cfg, COMBINATIONS, note)
        attempt(batch_plan, cfg)
        attempt(check, cfg)
    if not faults:
        attempt(adopt_timm_input, cfg)
    if faults:
        raise ConfigError("; ALSO: ".join(faults.values()), next(iter(faults)))
    cfg.freeze()
    return cfg


def teacher_config(cfg: Config) -> Config:
    """The configuration of the teacher that runs in the loop; it sees the student's images."""
    distill = cfg.DISTILL
    words = ["--cfg", distill.TEACHER_CFG, "--eval"]
    if distill.TEACHER_WEIGHTS:
        words += ["--resume", distill.TEACHER_WEIGHTS]
    if distill.CLASS_SUBSET:
        words += ["--opts", "DISTILL.CLASS_SUBSET", distill.CLASS_SUBSET]
    if not cfg.AMP_ENABLE:
        words.append("--disable-amp")
    theirs = load_config(words)
    if theirs.DATA.IMG_SIZE != cfg.DATA.IMG_SIZE:
        raise ConfigError(
            f"DATA.IMG_SIZE = {cfg.DATA.IMG_SIZE}, but the teacher {distill.TEACHER_CFG} takes"
            f" images of {theirs.DATA.IMG_SIZE} pixels: set the one or the other",
            "DATA.IMG_SIZE",
        )
    return theirs


def dump(cfg: Config) -> str:
    """The configuration as YAML that load_config reads back to an equal one."""
    return cfg.dump(sort_keys=False)


def choices_in_words(cfg: Config) -> str:
    """What differs from the defaults, on one line."""
    defaults = get_defaults()
    changed = [
        f"{key} {value}"
        for key, value in flatten(cfg).items()
        if key not in WRITTEN and value != defaults.value(key)
    ]
    return ", ".join(changed) or "the defaults"


class _PlainLoader(yaml.SafeLoader):
    """Plain values alone, no tag runs anything; a key that stands there twice is an error.

    So is an alias: a few lines of them make more values than a memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(
                problem=f"*{alias.anchor} stands for another value, write that out",
                problem_mark=alias.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"key {key.value} stands there twice, keep one"
                raise yaml.constructor.ConstructorError(
                    problem=problem, problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """What a YAML text of KEY: value lines holds."""
    if len(text) > LARGEST_FILE:
        raise ConfigError(f"{where}: more than {LARGEST_FILE:,} characters, which is no recipe")
    try:
        content = yaml.load(text, _PlainLoader) or {}
    except Exception as error:  # PyYAML checks few of the values that it converts
        text = str(error).replace('"<unicode string>"', "the text")
        raise ConfigError(f"{where}: broken YAML: {' '.join(text.split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected KEY: value lines, found a {type(content).__name__}")
    return content


def parse(text: str, where: str) -> dict[str, Any]:
    """The values of a YAML text under their dotted keys."""
    content = load_yaml(text, where)
    for key, items in (("BASE", "YAML files"), ("EXPLICIT", "keys")):
        if isinstance(content.get(key), str):
            content[key] = [content[key]]
        names = content.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            found = type(names).__name__
            raise ConfigError(f"{where}: {key}: expected a list of {items}, found a {found}")
    return flatten(content)


def read_text(path: Path, named_by: str = "") -> str:
    """The text of a YAML file, as far as one may be long."""
    try:
        # the recipes that lie beside this code are found from anywhere
        with open(path if path.exists() else ROOT / path, encoding="utf-8") as file:
            return file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        known = [str(file.relative_to(ROOT)) for file in ROOT.glob("*/*/*.yaml")]
        known += map(str, path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(str(path), known, n=1)
        advice = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file{named_by}{advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}){named_by}") from None


def _file_layers(path: Path, readers: tuple[Path, ...] = ()) -> list[Layer]:
    """The values of the files that a YAML file names in BASE, then its own.

    `readers` are the files that led to it.
    """
    chain = (*readers, path.resolve())
    if chain[-1] in readers:
        circle = " -> ".join(file.name for file in chain)
        raise ConfigError(f"{path}: BASE goes round in a circle: {circle}")
    values = parse(read_text(path, f" (BASE of {readers[-1]})" if readers else ""), str(path))
    layers: list[Layer] = []
    for base in filter(None, values.get("BASE") or []):
        layers += _file_layers(path.parent / base, chain)
        if len(layers) > MOST_FILES:  # files that name each other many times
            raise ConfigError(f"{path}: BASE leads to more than {MOST_FILES} files")
    return [*layers, (str(path), values)]


def _opts_values(words: list[str]) -> dict[str, str]:
    """KEY VALUE pairs of the command line, the values as text."""
    joined = next((word for word in words[::2] if "=" in word), "")
    if joined or len(words) % 2:
        hint = joined and f"; write KEY and VALUE apart: {joined.replace('=', ' ', 1)}"
        raise ConfigError(
            f"--opts: expected KEY VALUE pairs, got {len(words)} words: {' '.join(words)}{hint}"
        )
    values = dict(zip(words[::2], words[1::2]))
    for key, text in values.items():
        if key in WRITTEN:
            raise ConfigError(f"--opts: {key} = {text}: is set by the program", key)
    return values


def _merge(cfg: Config, key: str, value: Any, defaults: dict[str, Any]) -> None:
    """Set a key by the rules of yacs.

    Beyond these a whole number stands for a fraction, and None for a list that is not given.
    """
    try:
        is_long = len(repr(value)) > LONGEST_VALUE
    except ValueError:  # a number of more digits than Python prints
        is_long = True
    if is_long:
        raise ConfigError(f"{key}: expected at most {LONGEST_VALUE:,} characters", key)
    if key not in defaults:
        raise ConfigError(f"{key} = {value!r}: {_what_instead(key, list(defaults))}", key)
    default = defaults[key]
    if "True" in CHOICES.get(key, ()):  # a switch that may also be auto, kept as text
        value = str(_literal(str(value)))
    if key == MAPPING:
        value = _mapping_text(key, value)
    if isinstance(value, str):
        # yacs reads text as a literal: quoted, "12" remains text
        value = repr(value) if isinstance(default, str) else _literal(value)
    match default:
        case float() if type(value) is int:
            value = float(str(value))  # infinite where it is too large
        case list() | tuple() if value is None:
            value = default
        case None if isinstance(value, tuple):
            value = list(value)  # as YAML has it
    try:
        if value is None and default is not None:
            raise ValueError
        cfg.merge_from_list([key, value])
    except ValueError:
        expected = KINDS.get(type(default), "a list of numbers")
        found = type(value).__name__
        raise ConfigError(f"{key} = {value!r}: expected {expected}, got {found}", key) from None


def _mapping_text(key: str, value: Any) -> str:
    """The one text of a mapping, however it was written."""
    mapping = _literal(value) if isinstance(value, str) else value
    try:
        if not isinstance(mapping or {}, dict):
            raise TypeError
        return json.dumps(mapping, sort_keys=True) if mapping else ""
    except TypeError:
        example = "{img_size: 32, patch_size: 4}"
        raise ConfigError(f"{key} = {value!r}: expected a mapping, e.g. {example}", key) from None


def _literal(text: str) -> Any:
    """A Python or YAML literal, or the text itself."""
    for read in (ast.literal_eval, partial(yaml.load, Loader=_PlainLoader)):
        with suppress(Exception):  # of nearly any kind
            return read(text)
    return text


def _what_instead(key: str, known: list[str]) -> str:
    """What to do about a key that does not exist."""
    members = [name for name in known if name.startswith(f"{key}.")]
    if members:
        return f"is a group of keys, not a value: name one of them, e.g. {members[0]}"
    last_names = {name.rpartition(".")[2]: name for name in reversed(known)}
    last = key.rpartition(".")[2].upper()
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    near += [last_names[name] for name in difflib.get_close_matches(last, last_names, n=1)]
    advice = f"did you mean {near[0]}?" if near else "see configs/defaults.py"
    return f"unknown key; {advice}"


def _note_removed(key: str, source: str, is_chosen: bool) -> None:
    """Tell on the first process that a key of the user's has no effect any more."""
    if is_chosen and os.environ.get("RANK", "0") == "0":
        print(
            f"note: {source}: {key} is no longer a key and ignored: {REMOVED[key]}", file=sys.stderr
        )
