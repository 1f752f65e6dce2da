"""Curves of runs from their metrics.jsonl, above a table of their best values.

Runs whose folders differ in a -seedN at the end alone are one curve: their mean, in a band of one
standard deviation. Losses in training are apart where one ends above three times the next lower.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Told apart by people with any colour vision (Okabe and Ito), dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Panels of one metric, apart where one run's is far larger; their curves can be smoothed.
LOSSES = {"training loss": "loss", "KL from the teacher": "kl"}
# Other panels: their metrics, each with its line.
PANELS = {
    "validation loss": {"val_loss": "-"},
    "validation top-1 (%)": {"val_top1": "-"},
    "top-1 in training (%): student —, teacher ···": {"train_top1": "-", "train_teacher_top1": ":"},
    "learning rate, the largest of all groups": {"lr": "-"},
}
BEST = {
    "validation top-1": "val_top1",
    "validation loss": "val_loss",
    "training loss": "train_loss",
}
APART = 3  # times the next lower loss
SPEED = re.compile(r"epoch (\d+)/\d+, update (\d+)/(\d+): .*; ([\d,.]+) images/s")


@dataclass(frozen=True)
class Run:
    """The metrics of one run, or of several that differ in their seeds."""

    name: str
    lines: Sequence[dict]
    seeds: int = 1

    @classmethod
    def read(cls, place: Path) -> Run:
        """Read a run's folder or its metrics.jsonl."""
        path = place / "metrics.jsonl" if place.is_dir() else place
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}: give a run's folder (OUTPUT/NAME/TAG) or its"
                " metrics.jsonl"
            ) from None
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # cut short: the run still writes
        if not lines:
            raise ValueError(f"{path}: holds no metrics yet")
        for metric in LOSSES.values():
            means = [line for line in lines if line.get(f"train_{metric}") is not None]
            if sum(metric in line for line in lines) < len(means):  # a short run's epochs tell more
                for line in lines:
                    line.pop(metric, None)
                for line in means:
                    line[metric] = line[f"train_{metric}"]
        return cls(str(path.parent.resolve()), [*speeds(path.with_name("log_rank0.txt")), *lines])

    def has(self, metric: str) -> bool:
        """Whether it holds a finite value of a metric."""
        return any(line.get(metric) is not None for line in self.lines)

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epochs, and mean and standard deviation of a metric over the seeds that have got there;
        without what is not finite.
        """
        found = defaultdict(list)
        for line in self.lines:
            if line.get(metric) is not None:
                found[line["epoch"]].append(line[metric])
        epochs = sorted(found)
        spreads = [np.std(found[at], ddof=1) if len(found[at]) > 1 else 0.0 for at in epochs]
        means = [np.mean(found[at]) for at in epochs]
        return np.array(epochs, float), np.array(means), np.array(spreads)

    def best(self, metric: str) -> tuple[float, float]:
        """The best mean, of losses the lowest, and its standard deviation."""
        _, means, spreads = self.series(metric)
        place = means.argmin() if metric.endswith("loss") else means.argmax()
        return means[place], spreads[place]


def speeds(log: Path) -> Iterator[dict]:
    """Images a second, which a log tells and the metrics do not: equal runs have equal metrics."""
    if log.exists():
        for found in SPEED.findall(log.read_text(encoding="utf-8", errors="replace")):
            epoch, update, updates, speed = (float(word.replace(",", "")) for word in found)
            yield {"epoch": epoch - 1 + update / updates, "images/s": speed}


def grouped(runs: Sequence[Run]) -> list[Run]:
    """The runs by seed, the best first, under what tells their folders apart."""
    found = defaultdict(dict)
    for run in runs:
        found[re.sub(r"-seed\d+$", "", run.name)][run.name] = run.lines
    folders = [base if len(same) > 1 else next(iter(same)) for base, same in found.items()]
    groups = [
        Run(name, [*chain(*same.values())], len(same))
        for name, same in zip(told_apart(folders), found.values())
    ]
    return sorted(
        groups, key=lambda run: -run.best("val_top1")[0] if run.has("val_top1") else np.inf
    )


def told_apart(folders: Sequence[str]) -> list[str]:
    """Names of folders: the parts of their paths, counted from the end, in which they differ."""
    paths = [Path(folder).parts[::-1] for folder in folders]
    places = [place for place, parts in enumerate(zip(*paths)) if len(set(parts)) > 1] or [0, 1]
    return ["/".join(path[place] for place in reversed(places)) for path in paths]


def table(runs: Sequence[Run]) -> list[str]:
    """Lines of text, the first of them the head: names, seeds and best values."""
    rows = [["run", "seeds", *BEST]]
    for run in runs:
        cells = [run.name, str(run.seeds)]
        for metric in BEST.values():
            cell = ""
            if run.has(metric):
                value, spread = run.best(metric)
                cell = f"{value:.4g} ± {spread:.2g}" if run.seeds > 1 else f"{value:.4g}"
            cells.append(cell)
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def comparable(runs: Sequence[Run], metric: str) -> list[list[Run]]:
    """The runs that have a metric, apart where it ends far higher than others'."""
    ends = [(run.series(metric)[1][-1], run) for run in runs if run.has(metric)]
    panels, last = [], 0.0
    for end, run in sorted(ends, key=lambda pair: pair[0]):
        if not panels or end > APART * last:
            panels.append([])
        panels[-1].append(run)
        last = end
    return panels


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Means over `width` neighbours, fewer at the ends."""
    window = np.ones(min(width, len(values)))
    sums, counts = (np.convolve(each, window, "same") for each in (values, values**0))
    return sums / counts


def draw(runs: Sequence[Run], also: Sequence[str], smooth: int) -> Figure:
    """The panels that have data, and the table as their legend."""
    panels = [
        (title, {metric: "-"}, alike)
        for title, metric in LOSSES.items()
        for alike in comparable(runs, metric)
    ]
    for title, metrics in [*PANELS.items(), *((metric, {metric: "-"}) for metric in also)]:
        if any(run.has(metric) for run in runs for metric in metrics):
            panels.append((title, metrics, runs))
    is_few = len(runs) <= len(COLOURS)
    colours = COLOURS if is_few else colormaps["turbo"](np.linspace(0, 1, len(runs)))
    colour_of = dict(zip((run.name for run in runs), colours))
    lines = table(runs)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(5.2 * columns, 9), 4.1 * rows + 0.17 * len(lines))
    figure = Figure(size, layout="constrained")
    for number, (title, metrics, shown) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, number, title=title, xlabel="epochs")
        axis.grid(alpha=0.3)
        for run in shown:
            colour = colour_of[run.name]
            for metric, style in metrics.items():
                if not run.has(metric):
                    continue
                epochs, values, spreads = run.series(metric)
                if smooth > 1 and metric in (*LOSSES.values(), *also):
                    axis.plot(epochs, values, style, color=colour, alpha=0.2)
                    values = smoothed(values, smooth)
                marker = "o" if len(values) == 1 else "." if len(values) < 30 else ""
                axis.plot(epochs, values, style, color=colour, marker=marker)
                band = (epochs, values - spreads, values + spreads)
                axis.fill_between(*band, color=colour, alpha=0.15, linewidth=0)
        if axis.dataLim.height == 0:  # one value: from zero, or the scale would be of its digits
            axis.update_datalim([(0, 0)])
            axis.autoscale_view()
        axis.set_xlim(left=0)
    handles = [Line2D([], [], color=colour_of[run.name], linewidth=3) for run in runs]
    figure.legend(
        [Line2D([], [], color="none"), *handles],
        lines,
        loc="outside lower center",
        prop={"family": "monospace", "size": 8},
        frameon=False,
    )
    return figure


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    help = "a run's folder (OUTPUT/NAME/TAG) or its metrics.jsonl"
    add("runs", metavar="RUN", nargs="+", type=Path, help=help)
    help = "the picture (default curves.png)"
    add("-o", "--output", metavar="FILE", type=Path, default=Path("curves.png"), help=help)
    help = "a panel more for each: norm (of the gradient), images/s, or any metric of the runs"
    add("--also", metavar="METRIC", nargs="+", default=[], help=help)
    help = "means over N neighbours, of losses in training and of --also, before the values"
    add("--smooth", metavar="N", type=int, default=1, help=help)
    args = parser.parse_args(argv)
    try:
        runs = grouped([Run.read(place) for place in args.runs])
        known = {metric for run in runs for line in run.lines for metric in line}
        for metric in set(args.also) - known:
            raise ValueError(f"--also {metric}: these runs have {', '.join(sorted(known))}")
        draw(runs, args.also, args.smooth).savefig(args.output, dpi=110, bbox_inches="tight")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*table(runs), str(args.output)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
