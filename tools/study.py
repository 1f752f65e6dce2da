"""An experiment as one file: what is made once, the runs, and a table of what came out.

    python -m tools.study tools/studies/science.yaml

Runs main.py and save_logits.py as commands, leaves out what is finished, and goes on where it was
interrupted; docs/STUDIES.md tells how a study is written. Exit codes: 0 done, 1 a run has failed,
2 an error that one line explains, 75 stopped on request, 130 a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from configs import argument_parser, config_from_args, run_folder
from configs.load import load_yaml, read_text
from data.store.files import sole_user
from tools.study_results import write_results
from tools.study_runner import PYTHON, ROOT, Runner, Step
from utils import Exit, StopRequest, run_program

# What a study may say, and what holds where it does not.
STUDY = {
    "base": "",
    "question": "",
    "opts": {},
    "values": {},
    "once": {},
    "variants": {},
    "seeds": [0],
    "table": ["val_top1"],
    "x": "epochs",
    "log": False,
    "quick": {},
}
# What an entry does with its recipe.
PROGRAMS = {
    "train": "main.py",
    "save": "save_logits.py --skip-eval",
    "check": "save_logits.py --check-saved-logits --percent 25",
}
# What an entry takes from an earlier one: the options that name its result.
SOURCES = {
    "teacher": ["MODEL.RESUME"],
    "online": ["DISTILL.TEACHER_WEIGHTS", "DISTILL.ONLINE", "DISTILL.TEACHER_CFG"],
    "store": ["DISTILL.TEACHER_LOGITS_PATH"],
    "start": ["MODEL.PRETRAINED"],
}
QUICK = "--quick: a trial of all parts; its figures prove nothing."
SHOWN = ("say", "x", "line")  # what changes nothing of a run
ENTRY = (*PROGRAMS, *SOURCES, *SHOWN, "opts")


def plan(args: argparse.Namespace, study: dict[str, Any]) -> list[Step]:
    """The commands of a study, each after those that it needs."""
    values = study["values"]
    changes = {key: value for key, value in args.changes.items() if key not in values}
    steps: dict[str, Step] = {}
    for section, seeds in (("once", [None]), ("variants", args.seeds)):
        seen: dict[str, str] = {}
        for row, entry in expanded(args.file, study[section], values | args.changes):
            where = f"{args.file}: {section}.{row}"
            check_known(where, entry, ENTRY)
            essence = {key: value for key, value in entry.items() if key not in SHOWN}
            same = seen.setdefault(json.dumps(essence, sort_keys=True), row)
            if same != row:
                raise ValueError(f"{where}: repeats {same}: leave one of the two out")
            for seed in seeds:
                name = name_of(row)
                opts = study["opts"] | entry.get("opts", {}) | changes
                if seed is not None:
                    name, opts = name_of(row, seed), opts | {"SEED": seed}
                if name in steps:
                    raise ValueError(f"{where}: {name} stands there already: name it otherwise")
                try:
                    steps[name] = step_of(name, row, seed, entry, opts, args.output, steps)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
    return list(steps.values())


def step_of(
    name: str,
    row: str,
    seed: int | None,
    entry: dict[str, Any],
    opts: dict[str, Any],
    output: Path,
    earlier: dict[str, Step],
) -> Step:
    """The command that an entry of a study stands for."""
    kinds = [kind for kind in PROGRAMS if kind in entry]
    if len(kinds) != 1:
        raise ValueError(f"expected a recipe under one of {', '.join(PROGRAMS)}")
    (kind,) = kinds
    if kind == "save":
        opts["DISTILL.TEACHER_LOGITS_PATH"] = output / name
    needs = []
    for key in filter(entry.__contains__, SOURCES):
        own = name_of(entry[key], seed)  # of a variant, the one with the same seed
        source = own if own in earlier else name_of(entry[key])
        check_known(key, [source], earlier)
        need = earlier[source]
        needs.append(need)
        opts |= zip(SOURCES[key], (need.result, True, run_folder(need.cfg) / "config.yaml"))
    words = ["--cfg", entry[kind], "--output", str(output), "--tag", name]
    if opts:
        words += ["--opts", *(str(word) for pair in opts.items() for word in pair)]
    args = argument_parser("").parse_args(words)
    args.cfg = str(ROOT / args.cfg)
    cfg = config_from_args(args, 1, {"DISTILL.SAVE_TEACHER_LOGITS": kind != "train"})
    return Step(name, row, kind, [*PROGRAMS[kind].split(), *words], cfg, entry, needs, seed)


def name_of(row: str, seed: int | None = None) -> str:
    """The name of a command: of a run's folder and log."""
    name = re.sub(r"[^\w.=+-]+", "-", row)
    return name if seed is None else f"{name}-seed{seed}"


def expanded(
    file: Path, entries: dict[str, Any], values: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Entries with every {name} replaced by its value; where that is a list, one for each item."""
    for entry in entries.items():
        text = json.dumps(entry)
        names = dict.fromkeys(re.findall(r"\{(\w+)\}", text))
        check_known(f"{file}: {entry[0]}", names, values)
        lists = (values[name] for name in names)
        for choice in product(*(each if isinstance(each, list) else [each] for each in lists)):
            filled = text
            for name, value in zip(names, choice):
                filled = filled.replace(f"{{{name}}}", json.dumps(str(value))[1:-1])
            yield tuple(json.loads(filled))


def check_known(where: str, names: Iterable[str], known: Collection[str]) -> None:
    """A ValueError with the nearest known name if one of the names is unknown."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)
            advice = f"did you mean {near[0]}?" if near else "there is none above it"
            raise ValueError(f"{where}: {name} is unknown; {advice}")


def read_study(file: Path) -> dict[str, Any]:
    """A study's file with what it leaves out; a ValueError if it has not the form of one."""
    study = load_yaml(read_text(file), str(file))
    check_known(str(file), study, STUDY)
    if study.get("base"):
        base = read_study(file.parent / study["base"])
        study = base | study | {"values": base["values"] | study.get("values", {})}
    for key, default in STUDY.items():
        if type(study.setdefault(key, default)) is not type(default):
            raise ValueError(f"{file}: {key}: expected a {type(default).__name__}")
    entries = [*study["once"].values(), *study["variants"].values()]
    if not study["variants"] or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: variants: name runs, e.g. labels: {{train: recipe.yaml}}")
    return study


def parse(
    argv: Sequence[str] | None, program: str = "study", about: str = str(__doc__), file: str = ""
) -> tuple[argparse.Namespace, dict[str, Any], list[Step]]:
    """The command line of a program that runs a study, or one study, the study that it means, and
    the study's commands.
    """
    description = about.partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m tools.{program}", description=description)
    add = parser.add_argument
    if file:
        parser.set_defaults(file=Path(file))
    else:
        add("file", type=Path, help="the study (YAML); tools/studies has some")
    add("-o", "--output", type=Path, help="the folder for everything (output/NAME)")
    add("--data-path", help="the data set, for all commands")
    help = "KEY VALUE pairs: options for all commands, or values of the study"
    add("--opts", nargs="*", default=[], help=help)
    add("--seeds", type=int, nargs="+", help="instead of the study's")
    add("--jobs", type=int, default=1, help="commands at a time (1)")
    add("--print", action="store_true", help="only print the commands, in a possible order")
    add("--quick", action="store_true", help="tiny: shows that all parts run, not what they find")
    args = parser.parse_args(argv)
    if len(args.opts) % 2:
        raise ValueError(f"--opts: expected KEY VALUE pairs, got {' '.join(args.opts)}")
    if not (args.file.exists() or (ROOT / args.file).exists()):
        shipped = {path.stem: path for path in ROOT.glob("tools/studies/*.yaml")}
        near = difflib.get_close_matches(args.file.stem, shipped, n=1)
        paths = [os.path.relpath(shipped[name]) for name in near or sorted(shipped)]
        raise ValueError(f"{args.file}: no such file; did you mean {' or '.join(paths)}?")
    study, name = read_study(args.file), args.file.stem
    args.seeds = args.seeds or study["seeds"]
    args.changes = {}
    if args.quick:
        args.changes |= study["quick"]
        args.seeds, name = args.seeds[:1], f"{name}-quick"
        study["question"] = f"{QUICK} {study['question']}"
    args.changes |= zip(args.opts[::2], map(yaml.safe_load, args.opts[1::2]))
    if study["values"]:  # which are no keys of a configuration: these have capital letters
        check_known(f"{args.file}: --opts", filter(str.islower, args.changes), study["values"])
    if args.data_path:
        args.changes["DATA.DATA_PATH"] = os.path.abspath(args.data_path)
    entries = [*study["once"].values(), *study["variants"].values()]
    paths = [str(entry.get("opts", {}).get("DATA.DATA_PATH", "")) for entry in entries]
    own = list(dict.fromkeys(path.strip("{}") for path in paths if path))
    if own and "DATA.DATA_PATH" in args.changes:
        advice = f"set {', '.join(own)} in place of --data-path, e.g. --opts {own[0]} PATH"
        raise ValueError(f"{args.file}: its entries say where their images are: {advice}")
    args.output = Path(args.output or Path("output", name)).absolute()
    return args, study, plan(args, study)


def run(settings: tuple[argparse.Namespace, dict[str, Any], list[Step]], stop: StopRequest) -> int:
    """Print the commands, or run them and write what came out."""
    args, study, steps = settings
    if args.print:
        for step in steps:
            after = ", ".join(need.name for need in step.needs)
            print(f"{PYTHON} {shlex.join(step.words)}{after and f'  # after {after}'}")
        return Exit.DONE
    with sole_user(args.output / "lock", "wait for its end, or give another --output"):
        runner = Runner(steps, args.output, args.jobs, stop)
        runner.run()
        told, known = write_results(study, args.changes, runner)
        print(f"\n{told}", flush=True)
    for name, reason in runner.failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if stop.received:
        print("stopped on request: the same call goes on from here", file=sys.stderr)
        return Exit.STOPPED
    if runner.failed:
        return 1
    check_known(f"{args.file}: table", study["table"], known)
    return Exit.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study and return its exit code."""
    return run_program(partial(parse, argv), run)


if __name__ == "__main__":
    sys.exit(main())
