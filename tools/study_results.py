"""What the runs of a study came to: results.json, table.md, table.csv and plot.png."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, groupby
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from configs import batch_plan, run_folder
from data.store import LogitsStoreReader
from data.store.format import record_dtype
from logger import git_state
from tools.plot import COLOURS, Run
from tools.study_runner import ROOT, Runner, Step


def write_results(
    study: dict[str, Any], changes: dict[str, Any], runner: Runner
) -> tuple[str, set[str]]:
    """Write all files from the runs that are finished.

    The table with where the files are, and all that a table could have told of these runs.
    """
    done = [step for step in runner.steps if step.kind == "train" and step.name in runner.done]
    columns = study["table"]
    rows = []
    for name, steps in groupby(done, lambda step: step.row):
        runs = [measure(step) | {"seconds": runner.seconds(step) or None} for step in steps]
        row = {"run": name, "seeds": len(runs)}
        for column in columns:
            known = [run[column] for run in runs if run.get(column) is not None]
            row[column], row[f"{column} spread"] = mean(known) if known else None, spread(known)
        rows.append(row | {"runs": runs})
    table = markdown(study["question"], columns, rows)
    if len(runner.done) < len(runner.steps):
        table += f"\n{len(runner.done)} of {len(runner.steps)} commands are done.\n"
    result = {
        "question": study["question"],
        "changes": changes,
        "code": git_state(ROOT),
        "rows": rows,
        "seconds": {step.name: runner.seconds(step) for step in runner.steps},
        "failed": runner.failed,
    }
    paths = [runner.output / name for name in "table.md results.json table.csv plot.png".split()]
    paths[0].write_text(table, "utf-8")
    paths[1].write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    with open(paths[2], "w", newline="", encoding="utf-8") as file:
        names = ["run", "seeds", *(c + end for c in columns for end in ("", " spread"))]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    variants = [step for step in done if step.seed is not None]
    figure = drawn(study, variants, columns[0])
    figure.savefig(paths[3], dpi=130)
    known = {column for row in rows for run in row["runs"] for column in run}
    return "\n".join([table, *map(str, paths)]), known


def measure(step: Step) -> dict[str, Any]:
    """The last value of each metric of a run, and what its teacher's answers cost."""
    found: dict[str, Any] = {"teacher_passes": 0}  # images that the teacher has looked at
    for line in Run.read(run_folder(step.cfg)).lines:
        found |= line
    if step.cfg.DISTILL.ONLINE:
        found["teacher_passes"] = found["step"] * batch_plan(step.cfg).per_update
    for need in step.needs:
        if need.kind == "save":
            store = LogitsStoreReader(need.result)
            distill = step.cfg.DISTILL
            epochs = store.epochs()[: distill.REUSE_FIRST or None][: step.cfg.TRAIN.EPOCHS]
            record = record_dtype(distill.LOGITS_TOPK or store.k, store.num_classes)
            found["teacher_passes"] = len(epochs) * len(store)
            found["bytes_per_image"] = record.itemsize
            found["bytes"] = found["teacher_passes"] * record.itemsize
    return found


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; a single value has none."""
    return stdev(values) if len(values) > 1 else None


def markdown(question: str, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """The table with its question above."""
    lines = [["", "seeds", *columns], ["---"] * (len(columns) + 2)]
    for row in rows:
        cells = [row["run"], str(row["seeds"])]
        for column in columns:
            values = (row[column], row[f"{column} spread"] or None)  # no spread is not worth saying
            cells.append(" ± ".join(f"{round(v, 2):,}" for v in values if v is not None))
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{question}\n\n{table}\n\nAfter the last epoch; mean ± standard deviation over seeds.\n"


def drawn(study: dict[str, Any], steps: Sequence[Step], metric: str) -> Figure:
    """A metric against what was varied, else against epochs; bars are standard deviations.

    Beside varied runs, one without x is a line across.
    """
    places = sorted({float(step.entry["x"]) for step in steps if "x" in step.entry})
    lines: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for step in steps:
        where, values, _ = Run.read(run_folder(step.cfg)).series(metric)
        if places:
            where = [float(step.entry["x"])] if "x" in step.entry else places
            values = [*values[-1:]] * len(where)
        for place, value in zip(where, values):
            lines[step.entry.get("line", step.row)][place].append(value)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for (name, points), colour in zip(lines.items(), cycle(COLOURS)):
        heights = [mean(values) for values in points.values()]
        bars = [spread(values) or 0 for values in points.values()]
        axis.errorbar([*points], heights, bars, color=colour, label=name, marker=".", capsize=3)
    if study["log"]:
        axis.set_xscale("log")
    if places:
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
    axis.set(xlabel=study["x"], ylabel=metric)
    axis.set_title(study["question"], fontsize=10, wrap=True)
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(frameon=False)
    return figure
