"""Curves of one or several runs from their metrics.jsonl: loss, accuracy and learning rate, and a
line of best values for each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# Told apart by people with any colour vision (Okabe and Ito), dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# (panel's title and unit, [(metric, how it is called, line style)])
PANELS = (
    ("loss", [("loss", "train", "-"), ("val_loss", "validation", "--")]),
    (
        "top-1 accuracy (%)",
        [
            ("val_top1", "validation", "--"),
            ("train_top1", "train", "-"),
            ("train_teacher_top1", "teacher", ":"),
        ],
    ),
    ("learning rate", [("lr", "largest of all groups", "-")]),
)


@dataclass(frozen=True)
class Run:
    """The metrics of one run."""

    name: str
    lines: tuple[dict, ...]

    @classmethod
    def read(cls, place: Path) -> Run:
        """Read a run's folder or its metrics.jsonl; a last line that is cut short (the run still
        writes) is left out.
        """
        path = place / "metrics.jsonl" if place.is_dir() else place
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}: give a run's folder (OUTPUT/NAME/TAG) or its"
                " metrics.jsonl"
            ) from None
        lines = tuple(line for line in map(_parsed, text.splitlines()) if line is not None)
        if not lines:
            raise ValueError(f"{path}: holds no metrics yet")
        folder = path.parent.resolve()
        return cls(f"{folder.parent.name}/{folder.name}", lines)

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and values of a metric, each step once, without what is not finite."""
        values = {line["step"]: line[metric] for line in self.lines if line.get(metric) is not None}
        steps = np.array(sorted(values), float)
        return self._epochs(steps), np.array([values[step] for step in sorted(values)], float)

    def best(self, metric: str, largest: bool) -> float | None:
        """The best value of a metric so far."""
        values = self.series(metric)[1]
        return None if not len(values) else float(values.max() if largest else values.min())

    def _epochs(self, steps: np.ndarray) -> np.ndarray:
        """Updates as epochs, by the updates at which epochs ended; an epoch that is not over is
        taken to be as long as the others.
        """
        ends = {line["epoch"]: line["step"] for line in self.lines if "train_loss" in line}
        if not ends:
            return steps
        epoch, step = max(ends.items())
        return steps / (step / epoch) if step else steps

    @property
    def unit(self) -> str:
        """What `series` counts in."""
        return "epochs" if any("train_loss" in line for line in self.lines) else "updates"


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same runs, their names without the half (NAME or TAG) that is the same for all."""
    halves = [run.name.split("/") for run in runs]
    if len(set(map(tuple, halves))) < 2:
        return list(runs)
    wanted = [half for half in (0, 1) if len({parts[half] for parts in halves}) > 1]
    return [
        replace(run, name="/".join(parts[half] for half in wanted))
        for run, parts in zip(runs, halves)
    ]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the panels that have data into a picture file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (title, some)
        for title, metrics in PANELS
        if (
            some := [
                metric for metric in metrics if any(len(run.series(metric[0])[0]) for run in runs)
            ]
        )
    ]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (title, metrics) in zip(axes[0], panels):
        for run, colour in zip(runs, _cycle(COLOURS)):
            for metric, label, style in metrics:
                x, y = run.series(metric)
                if len(x):
                    marker = "o" if len(x) < 30 and metric.startswith("val") else None
                    axis.plot(
                        x,
                        y,
                        style,
                        color=colour,
                        label=f"{run.name}: {label}",
                        marker=marker,
                        markersize=3.5,
                        linewidth=1.6,
                    )
        axis.set_title(title)
        axis.set_xlabel(" / ".join(dict.fromkeys(run.unit for run in runs)))
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        # Beneath the curves, so that it covers none of them.
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8, frameon=False, ncols=1
        )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def best_values(runs: Iterable[Run]) -> str:
    """One line a run: its best accuracy and loss."""
    rows = []
    for run in runs:
        shown = [
            ("validation top-1", run.best("val_top1", True), "%"),
            ("validation loss", run.best("val_loss", False), ""),
            ("training loss", run.best("train_loss", False), ""),
        ]
        words = ", ".join(
            f"{name} {value:.2f}{unit}" for name, value, unit in shown if value is not None
        )
        rows.append(f"{run.name}: {words or 'no epoch is over yet'}")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="a run's folder (OUTPUT/NAME/TAG) or its metrics.jsonl",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("curves.png"),
        help="the picture (default curves.png)",
    )
    args = parser.parse_args(argv)
    try:
        runs = told_apart([Run.read(place) for place in args.runs])
        draw(runs, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{best_values(runs)}\n{args.output}")
    return 0


def _parsed(text: str) -> dict | None:
    try:
        line = json.loads(text)
        return line if isinstance(line, dict) and "step" in line else None
    except ValueError:
        return None


def _cycle(colours: Sequence[str]) -> Iterable[str]:
    while True:
        yield from colours


if __name__ == "__main__":
    sys.exit(main())
