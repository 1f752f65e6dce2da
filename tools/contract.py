"""Progressive model contraction: from a large TinyViT to smaller ones, each the best of its round.

    python -m tools.contract --limit 11e6 1.5 --limit 5.4e6 1.9 --data-path ./ImageNet

A round contracts the best model so far in some of its factors, keeps what is within the round's
limits on parameters and measured images a second, trains each candidate shortly and scores it on
images that are held out of training. The same call goes on where it was interrupted;
docs/CONTRACTION.md tells more. Exit codes are those of tools.study.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby, islice, product
from math import gcd, prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from torch import nn

import utils
from configs import Config, load_config
from data.build import resolve
from data.store.files import sole_user, write_atomic
from data.store.format import counted
from models.build import build_model, count_parameters
from models.tiny_vit import Block, MBConv, PatchEmbed, PatchMerging
from tools.plot import COLOURS
from tools.study import step_of
from tools.study_results import measure
from tools.study_runner import PYTHON, ROOT, Runner, Step
from utils import Exit, StopRequest, run_program

# Contraction factors: channels and blocks of stages, windows of the last three, expansion of MBConv
# and of MLP, channels of a head.
FACTORS = "D1 D2 D3 D4 N1 N2 N3 N4 W2 W3 W4 R M E".split()
# How far a step goes (0: a head's channels) and the least value; E is halved.
STEPS = {"D": (0, 1), "N": (1, 1), "W": (1, 2), "R": (0.5, 1), "M": (0.5, 1), "E": (0, 8)}
LIMIT = "of a round: most parameters, least images/s as times the seed's; give one for each round"
TRIED = 4000  # candidates of a round whose parameters are counted
GROUPS = 8  # of candidates whose speed is measured before a round is given up
TURNS = 5  # of the models of a group, one after the other

Numbers = tuple[float, ...]  # an architecture: the values of FACTORS


def tell(text: str) -> None:
    """What is no command, for people."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Candidate:
    """A contracted model within the limits of its round."""

    round: int
    name: str
    parameters: int
    images_per_second: float
    val_top1: float  # on what is held out, in percent
    seconds: float  # of its training
    is_winner: bool
    numbers: Numbers


def numbers_of(cfg: Config) -> Numbers:
    """The contraction factors of a TinyViT."""
    shape = cfg.MODEL.TINY_VIT
    (_, *dims), (first, *heads) = shape.EMBED_DIMS, shape.NUM_HEADS
    head_dims = [dim // count for dim, count in zip(dims, heads)]
    if cfg.MODEL.TYPE != "tiny_vit":
        raise ValueError(f"MODEL.TYPE = {cfg.MODEL.TYPE}: contraction starts from a tiny_vit")
    if len({*head_dims}) > 1:
        fitting = (
            channels for channels in range(max(head_dims), 0, -1) if not gcd(*dims) % channels
        )
        told = [f"{[first, *(dim // some for dim in dims)]}" for some in islice(fitting, 3)]
        raise ValueError(
            f"MODEL.TINY_VIT.NUM_HEADS = {shape.NUM_HEADS}: contraction starts from heads of as"
            f" many channels in each of the stages 1 to 3, not {', '.join(map(str, head_dims))}:"
            f" set {' or '.join(told)}"
        )
    ratios = shape.MBCONV_EXPAND_RATIO, shape.MLP_RATIO
    return *shape.EMBED_DIMS, *shape.DEPTHS, *shape.WINDOW_SIZES[1:], *ratios, head_dims[0]


def split(numbers: Numbers) -> list[Numbers]:
    """The values of each kind of factor, in the order of STEPS."""
    return [numbers[:4], numbers[4:8], numbers[8:11], *zip(numbers[11:])]


def name_of(numbers: Numbers) -> str:
    """An architecture by its numbers."""
    texts = ("-".join(f"{value:g}" for value in values) for values in split(numbers))
    return "_".join(map(str.__add__, STEPS, texts))


def keys_of(numbers: Numbers) -> dict[str, Any]:
    """The configuration of an architecture."""
    dims, depths, windows, (expand,), (mlp,), (head_dim,) = split(numbers)
    shape = {
        "EMBED_DIMS": [*dims],
        "DEPTHS": [*depths],
        "NUM_HEADS": [max(dim // head_dim, 1) for dim in dims],
        "WINDOW_SIZES": [windows[0], *windows],  # the first is not used
        "MBCONV_EXPAND_RATIO": expand,
        "MLP_RATIO": mlp,
    }
    return {f"MODEL.TINY_VIT.{key}": value for key, value in shape.items()}


@cache
def size_of(part: type[nn.Module], *settings: Any) -> int:
    """Parameters of a part of a model."""
    with torch.device("meta"):
        return count_parameters(part(*settings))


def parameters_of(numbers: Numbers, cfg: Config) -> int:
    """Parameters of an architecture, added up from its parts: thousands are counted in a moment."""
    shape = cfg.MODEL.TINY_VIT
    dims, depths, windows, (expand,), (mlp,), (head_dim,) = split(numbers)
    total = size_of(PatchEmbed, shape.IN_CHANS, dims[0])
    total += depths[0] * size_of(MBConv, dims[0], expand, 0.0)
    for before, dim, depth, window in zip(dims, dims[1:], depths[1:], windows):
        settings = (dim, dim // head_dim, window, mlp, 0.0, 0.0, shape.LOCAL_CONV_SIZE)
        total += size_of(PatchMerging, before, dim, 2) + depth * size_of(Block, *settings)
    return total + size_of(nn.LayerNorm, dim) + size_of(nn.Linear, dim, cfg.MODEL.NUM_CLASSES)


def choices(numbers: Numbers, factor: str, reach: int) -> list[float]:
    """The values that a factor may take in a round, from its present one down."""
    step, least = STEPS[factor[0]]
    now, steps = numbers[FACTORS.index(factor)], range(1, reach + 1)
    values = [now - (step or numbers[-1]) * count for count in steps]
    if factor == "E":
        values = [now >> count for count in steps if now % (1 << count) == 0]
    return [now, *(value for value in values if value >= least)]


def contracted(
    best: Numbers, factors: Sequence[str], reach: int, singly: bool, rng: random.Random
) -> set[Numbers]:
    """The architectures around the best one, which is among them: all or, where these are too many
    to count, the smallest and a draw.
    """
    options = [choices(best, factor, reach if factor in factors else 0) for factor in FACTORS]
    if singly:
        places = enumerate(options)
        found = {(*best[:i], value, *best[i + 1 :]) for i, values in places for value in values}
    elif prod(map(len, options)) <= TRIED:
        found = {*product(*options)}
    else:
        # Smaller heads are more of them, with more biases.
        found = {(*(values[-1] for values in options[:-1]), best[-1])}
        for _ in range(TRIED):
            share = rng.random()  # few factors as often as many: hardly any combination has few
            found.add(tuple(rng.choice(v) if rng.random() < share else v[0] for v in options))
    return found


class Search:
    """The rounds from a seed; what was measured for them is kept in the folder of the search."""

    def __init__(self, args: argparse.Namespace, cfg: Config, stop: StopRequest) -> None:
        self.args, self.stop = args, stop
        classes = cfg.MODEL.NUM_CLASSES or resolve(cfg).MODEL.NUM_CLASSES
        self.cfg = cfg.replace({"MODEL.NUM_CLASSES": classes})
        self.seed = numbers_of(cfg)
        self.candidates: list[Candidate] = []
        self.device = utils.choose_device(cfg.DEVICE)
        self.batch = cfg.TEST.BATCH_SIZE or cfg.DATA.BATCH_SIZE
        cpu = f"{platform.machine()} with {counted(torch.get_num_threads(), 'thread')}"
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else cpu
        images = f"{counted(self.batch, 'image')} of {cfg.DATA.IMG_SIZE} px"
        self.dtype = utils.amp_dtype(cfg, self.device)
        self.place = f"{name}, {images}, {utils.precision(self.dtype)}"

    def around(self, best: Numbers, number: int) -> list[tuple[int, Numbers]]:
        """(parameters, architecture) of what a round may come to from `best`, largest first."""
        args, most = self.args, self.args.limit[number - 1][0]
        rng = random.Random(f"{self.cfg.SEED} {number}")
        found = contracted(best, args.factors, args.reach, args.singly, rng)
        sizes = sorted(((parameters_of(n, self.cfg), n) for n in found), reverse=True)
        fitting = [(size, numbers) for size, numbers in sizes if size <= most]
        if not fitting:
            raise ValueError(
                f"--limit {most:,.0f}: round {number} has no candidate, --factors and --reach"
                f" leave {sizes[-1][0]:,} parameters: raise the limit, or give more of these"
            )
        return [found for found in fitting if name_of(found[1]) not in args.leave_out]

    def check_limits(self) -> None:
        """A ValueError if a round can't come below its limit, even from the smallest models."""
        smallest = self.seed
        for number, _ in enumerate(self.args.limit, 1):
            *_, (_, smallest) = self.around(smallest, number)

    def speeds(self, models: Sequence[Numbers]) -> list[float]:
        """Images a second of each: what is kept, else measured in turn with the seed."""
        path, seed = self.args.output / "speeds.json", name_of(self.seed)
        known: dict[str, Any] = {"measured on": self.place}
        if path.exists():
            known = json.loads(path.read_text("utf-8"))
        new = {name: numbers for numbers in models if (name := name_of(numbers)) not in known}
        if new:
            if known["measured on"] != self.place:
                raise ValueError(
                    f"{path}: measured on {known['measured on']}, this is {self.place}: go on"
                    " there, or give another --output"
                )
            tell(f"measuring {counted(len(new), 'model')} on {self.place}")
            fresh = self._measured(new | {seed: self.seed})
            # As if the machine were always in the mood in which it met the seed first.
            mood = known.get(seed, fresh[seed]) / fresh[seed]
            known |= {name: round(mood * speed, 1) for name, speed in fresh.items()}
            write_atomic(path, json.dumps(known, indent=1).encode())
        return [known[name_of(numbers)] for numbers in models]

    def _measured(self, models: dict[str, Numbers]) -> dict[str, float]:
        """Median images a second of models that take turns."""
        built = {}
        for name, numbers in models.items():
            model = build_model(self.cfg.replace(keys_of(numbers)), load=False)
            built[name] = model.eval().to(self.device)
        size = self.cfg.DATA.IMG_SIZE
        images = torch.randn(self.batch, 3, size, size, device=self.device)
        seconds: dict[str, list[float]] = {name: [] for name in built}
        with torch.inference_mode(), utils.autocast(self.device, self.dtype):
            for _ in range(TURNS):
                for name, model in built.items():
                    seconds[name] += utils.time_calls(partial(model, images), self.device, calls=3)
        return {name: len(images) / median(times) for name, times in seconds.items()}

    def round(self, number: int, best: Numbers) -> list[Candidate]:
        """The candidates of a round."""
        most, times = self.args.limit[number - 1]
        seed_speed, speed = self.speeds([self.seed, best])
        least = times * seed_speed
        size, wanted = parameters_of(best, self.cfg), self.args.candidates or 1
        if size <= most and speed >= least:
            raise ValueError(
                f"--limit {most:,.0f} {times}: {name_of(best)}, from which round {number} starts,"
                f" has {size:,} parameters and {speed:,} images/s and fits already: give a tighter"
                " one"
            )
        around, chosen, fastest = self.around(best, number)[: GROUPS * wanted], [], 0.0
        while around and len(chosen) < wanted:
            group, around = around[:wanted], around[wanted:]
            for (size, numbers), speed in zip(group, self.speeds([n for _, n in group])):
                fastest = max(fastest, speed)
                if speed >= least:
                    name = name_of(numbers)
                    chosen.append(Candidate(number, name, size, speed, 0.0, 0.0, False, numbers))
        if not chosen:
            raise ValueError(
                f"--limit {most:,.0f}: round {number} has no candidate of {least:,.1f}"
                f" images/s, the fastest that was measured does {fastest:,}: lower the limit on"
                " speed or that on parameters, or give more rounds, --factors or --reach"
            )
        return chosen[:wanted]

    def step(self, candidate: Candidate) -> Step:
        """Its training."""
        args, name, train = self.args, candidate.name, self.cfg.TRAIN
        opts = {
            "TRAIN.EPOCHS": args.epochs,
            "TRAIN.WARMUP_EPOCHS": round(args.epochs * train.WARMUP_EPOCHS / train.EPOCHS),
            "DATA.HELD_OUT": args.held_out,
            "SAVE_FREQ": args.epochs,
        }
        opts |= dict(zip(args.opts[::2], args.opts[1::2])) | keys_of(candidate.numbers)
        return step_of(name, name, None, {"train": str(args.cfg)}, opts, args.output, {})

    def train(self, candidates: Sequence[Candidate]) -> int:
        """Train the candidates of a round and score them; with --print, only tell how."""
        steps = [self.step(candidate) for candidate in candidates]
        runner = Runner(steps, self.args.output, self.args.jobs, self.stop)
        if not self.args.print:
            runner.run()
        elif lacking := [step for step in steps if not step.is_whole()]:
            for step in lacking:
                print(PYTHON, shlex.join(step.words))
            return Exit.STOPPED
        for name, reason in runner.failed.items():
            tell(f"FAILED {name}: {reason}; to go on without it: --leave-out {name}")
        if self.stop.received:
            tell("stopped on request: the same call goes on from here")
            return Exit.STOPPED
        if runner.failed:
            return Exit.DIFFERENT
        for candidate, step in zip(candidates, steps):
            found = measure(step)
            if "val_top1" not in found:
                raise ValueError(f"{step.name}: what is held out has no labels that could score it")
            candidate.val_top1, candidate.seconds = found["val_top1"], runner.seconds(step)
        self.best = max(candidates, key=lambda found: (found.val_top1, -found.parameters))
        self.best.is_winner = True
        self.candidates += candidates
        return Exit.DONE

    def write(self) -> None:
        """contraction.csv, contraction.png and a recipe for the last winner."""
        args, winner = self.args, self.best
        with open(args.output / "contraction.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*vars(winner)][:-1], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(map(vars, self.candidates))
        drawn(self.candidates).savefig(args.output / "contraction.png", dpi=130)
        path = args.output / f"round{winner.round}.yaml"
        recipe = {"BASE": [os.path.relpath(args.cfg, args.output)], "MODEL.NAME": winner.name}
        text = (
            f"{winner.parameters:,} parameters, {winner.images_per_second:,} images/s,"
            f" {winner.val_top1:.2f}% of what was held out after"
            f" {counted(args.epochs, 'epoch')}."
        )
        recipe |= keys_of(winner.numbers)
        content = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None)
        path.write_text(f"# python main.py --cfg {path}\n# {text}\n{content}", "utf-8")
        tell(f"round {winner.round}: {path}: {text}")


def drawn(candidates: Sequence[Candidate]) -> Figure:
    """Accuracy against parameters and against speed; a line leads from winner to winner."""
    groups = {"winners": [found for found in candidates if found.is_winner]}
    rounds = groupby(candidates, lambda found: found.round)
    groups |= {f"round {number}": list(some) for number, some in rounds}
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column in zip(axes, ("parameters", "images_per_second")):
        axis.set_prop_cycle(color=COLOURS)
        for label, some in groups.items():
            places = [getattr(found, column) for found in some]
            style = ("-ks", 10) if label == "winners" else ("o", 5)  # beneath the rounds' dots
            heights = [found.val_top1 for found in some]
            axis.plot(places, heights, style[0], markersize=style[1], label=label)
        axis.set_xlabel(column.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 accuracy on held-out images (%)")
    axes[0].legend(frameon=False)
    return figure


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """The command line, and the configuration of the seed."""
    description = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.contract", description=description)
    add = parser.add_argument
    seed = ROOT / "configs/1k/tiny_vit_21m.yaml"
    add("--cfg", type=Path, default=seed, help="recipe of the seed (TinyViT-21M)")
    names = ("PARAMETERS", "SPEED")
    add("--limit", type=float, nargs=2, action="append", required=True, metavar=names, help=LIMIT)
    help = f"to contract (all): {' '.join(FACTORS)}; D, N, W: of all stages"
    add("--factors", nargs="+", default=[], help=help)
    add("--singly", action="store_true", help="one factor a candidate, not several jointly")
    add("--reach", type=int, default=4, help="steps that a factor may take in a round (4)")
    add("--candidates", type=int, default=16, help="to train in a round, the largest (16)")
    add("--epochs", type=int, default=30, help="of a candidate's training (30)")
    add("--held-out", type=float, default=0.01, help="fraction of images that score (0.01)")
    add("--leave-out", nargs="+", metavar="NAME", default=[], help="candidates to do without")
    folder = Path("output/contraction")
    add("-o", "--output", type=Path, default=folder, help=f"for everything ({folder})")
    add("--data-path", help="the data set")
    add("--opts", nargs="*", default=[], help="KEY VALUE pairs for the seed and all trainings")
    add("--jobs", type=int, default=1, help="trainings at a time (1)")
    add("--print", action="store_true", help="only print the trainings that a round waits for")
    args = parser.parse_args(argv)
    args.cfg = (args.cfg if args.cfg.exists() else ROOT / args.cfg).absolute()
    args.output = args.output.absolute()
    if args.data_path:
        args.opts += ["DATA.DATA_PATH", os.path.abspath(args.data_path)]
    cfg = load_config(["--cfg", str(args.cfg), "--opts", *args.opts])
    numbers = numbers_of(cfg)
    for word in args.factors:
        some = (choices(numbers, name, args.reach) for name in FACTORS if name.startswith(word))
        if not any(values[1:] for values in some):
            raise ValueError(
                f"--factors {word}: {name_of(numbers)} has nothing to contract there; there are"
                f" {' '.join(FACTORS)}, and D, N, W for all stages"
            )
    args.factors = [factor for factor in FACTORS if factor.startswith(tuple(args.factors or STEPS))]
    return args, cfg


def run(settings: tuple[argparse.Namespace, Config], stop: StopRequest) -> int:
    """Go from round to round."""
    args, cfg = settings
    with sole_user(args.output / "lock", "wait for its end, or give another --output"):
        search = Search(args, cfg, stop)
        search.check_limits()
        best = search.seed
        for number, _ in enumerate(args.limit, 1):
            if code := search.train(search.round(number, best)):
                return Exit.DONE if args.print else code
            search.write()
            best = search.best.numbers
    return Exit.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Search, and return the exit code."""
    return run_program(partial(parse, argv), run)


if __name__ == "__main__":
    sys.exit(main())
