"""Curves of one or several runs from their metrics.jsonl, and a line of best values for each."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np

# Told apart by people with any colour vision (Okabe and Ito), dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Of each panel: a metric, how it is called, its line.
PANELS = {
    "loss": [("loss", "train", "-"), ("val_loss", "validation", "--")],
    "top-1 accuracy (%)": [
        ("val_top1", "validation", "--"),
        ("train_top1", "train", "-"),
        ("train_teacher_top1", "teacher", ":"),
    ],
    "learning rate": [("lr", "largest of all groups", "-")],
}
# A metric, how its best value is called, its unit, and what chooses it.
BEST = (
    ("val_top1", "validation top-1", "%", max),
    ("val_loss", "validation loss", "", min),
    ("train_loss", "training loss", "", min),
)


@dataclass(frozen=True)
class Run:
    """The metrics of one run."""

    name: str
    lines: tuple[dict, ...]

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
        folder = path.parent.resolve()
        return cls(f"{folder.parent.name}/{folder.name}", tuple(lines))

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs (updates, before the first epoch is over) and values of a metric, each step once,
        without what is not finite.
        """
        values = {line["step"]: line[metric] for line in self.lines if line.get(metric) is not None}
        steps = np.array(sorted(values), float)
        return steps / self._steps_per_unit(), np.array([values[step] for step in sorted(values)])

    @property
    def unit(self) -> str:
        """What `series` counts in."""
        return "epochs" if self._ends() else "updates"

    def _ends(self) -> dict[int, int]:
        """Updates at which epochs ended."""
        return {line["epoch"]: line["step"] for line in self.lines if "train_loss" in line}

    def _steps_per_unit(self) -> float:
        # An epoch that is not over is taken to be as long as the others.
        epoch, step = max(self._ends().items(), default=(1, 1))
        return step / epoch or 1


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The same runs, their names without the half (NAME or TAG) that is the same for all."""
    halves = [run.name.split("/") for run in runs]
    names, tags = (set(half) for half in zip(*halves))
    if len(names) > 1 and len(tags) == 1:
        return [replace(run, name=name) for run, (name, _) in zip(runs, halves)]
    if len(tags) > 1 and len(names) == 1:
        return [replace(run, name=tag) for run, (_, tag) in zip(runs, halves)]
    return list(runs)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the panels that have data into a picture file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for title, metrics in PANELS.items():
        if any(len(run.series(metric)[1]) for run in runs for metric, _, _ in metrics):
            panels.append(title)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes[0], panels):
        for run, colour in zip(runs, cycle(COLOURS)):
            for metric, label, style in PANELS[title]:
                epochs, values = run.series(metric)
                if not len(values):
                    continue
                marker = "." if len(values) < 30 else None  # a single point has no line
                label = f"{run.name}: {label}"
                axis.plot(epochs, values, style, color=colour, label=label, marker=marker)
        axis.set(title=title, xlabel=" / ".join(sorted({run.unit for run in runs})))
        axis.grid(alpha=0.3)
        # Beneath the curves, so that it covers none of them.
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def best_values(runs: Iterable[Run]) -> str:
    """One line a run: its best accuracy and loss."""
    rows = []
    for run in runs:
        words = []
        for metric, name, unit, choose in BEST:
            _, values = run.series(metric)
            if len(values):
                words.append(f"{name} {choose(values):.2f}{unit}")
        rows.append(f"{run.name}: {', '.join(words) or 'no epoch is over yet'}")
    return "\n".join(rows)


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
    args = parser.parse_args(argv)
    try:
        runs = told_apart([Run.read(place) for place in args.runs])
        draw(runs, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{best_values(runs)}\n{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
