"""The whole idea in minutes: a teacher, its saved logits, two students of which one is distilled.

Both students have the same budget. Runs the study tools/studies/demo.yaml, which shows its
commands, and draws what came out. Interrupted, the same call goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs import load_config
from data.augment.rng import sample_seed
from data.build import open_run
from tools import plot, replay_sheet, study
from tools.predict import load_model
from tools.study_runner import PYTHON, ROOT, Step
from utils import StopRequest, run_program

RUNS = {
    "teacher": "shapes-teacher/teacher",
    "scratch": "shapes-student/scratch-seed0",
    "distilled": "shapes-distilled/distilled-seed0",
}
# Positions of an epoch whose pairs show mixup, cutmix, and neither.
SHOWN = (4, 5, 36, 37, 18, 19, 2, 3)


def run(settings: tuple[argparse.Namespace, dict[str, Any], list[Step]], stop: StopRequest) -> int:
    """Run the study and draw its pictures; 1 if the check of the store failed."""
    args, _, _ = settings
    status = study.run(settings, stop)
    if status > 1 or args.print:
        return status
    output = args.output
    results = json.loads((output / "results.json").read_text())
    if results["failed"].keys() - {"check"}:
        return status
    print("\n6/6  Pictures.", flush=True)
    save_samples(output)
    plot.main([*(str(output / run) for run in RUNS.values()), "-o", str(output / "curves.png")])
    seeds = ",".join(str(sample_seed(0, 0, position)) for position in SHOWN)
    sheet = f"--cfg configs/shapes/save_logits.yaml --pairs --seeds {seeds} --image".split()
    names = ("first.png", "second.png", "-o", "replay_sheet.png")
    replay_sheet.main(sheet + [name if name == "-o" else str(output / name) for name in names])
    draw_confusion(output)
    rows = {row["run"]: row for row in results["rows"]}
    result = {
        role: {"accuracy": rows[role]["val_top1"], "seconds": rows[role]["seconds"]}
        for role in RUNS
    }
    seconds = round(sum(results["seconds"].values()), 1)
    store_bytes = rows["distilled"]["bytes"]
    result |= {"check_passed": status == 0, "store_bytes": store_bytes, "seconds": seconds}
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    gain = rows["distilled"]["val_top1"] - rows["scratch"]["val_top1"]
    verdict = "FAILED" if status else "passed"
    print(f"""
Accuracies are on validation images; while training and saving they are lower, as images are
augmented and mixed then.
The same student, with the same images and epochs, is {gain:+.1f} points better when it learns from
the teacher's store.
The check of the stored logits has {verdict}; {seconds:.0f} s in all. {study.QUICK * args.quick}
""")
    for name in ("curves.png", "replay_sheet.png", "confusion.png", "result.json"):
        print(output / name)
    image = os.path.relpath(output / "first.png", ROOT)
    weights = os.path.relpath(checkpoint(output, "distilled"), ROOT)
    print("\nNext, what the student sees in a picture, and README.md:")
    print(f"  {PYTHON} -m tools.predict {shlex.join([image, '--weights', weights])}")
    return status


def checkpoint(output: Path, role: str) -> Path:
    """Where main.py keeps the last weights of a role."""
    return output / RUNS[role] / "checkpoints" / "last.pth"


def save_samples(output: Path) -> None:
    """Two training images of different classes, as picture files."""
    images = open_run(load_config(["--cfg", str(ROOT / "configs/shapes/student.yaml")])).images
    images[0][0].save(output / "first.png")
    images[len(images) // 2][0].save(output / "second.png")


def draw_confusion(output: Path) -> None:
    """Confusion matrices of both students on the validation images, in percent of a true class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12.4, 5.6), layout="constrained")
    for axis, role in zip(axes, ("scratch", "distilled")):
        counts, names = confusion(checkpoint(output, role))
        percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
        drawn = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                colour = "white" if value > 55 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="answer", ylabel="true class")
        axis.set_title(f"{role}: {100 * counts.trace() / counts.sum():.1f}% right")
    figure.colorbar(drawn, ax=axes, label="% of the true class", shrink=0.8)
    figure.savefig(output / "confusion.png", dpi=110)
    pyplot.close(figure)


def confusion(weights: Path) -> tuple[np.ndarray, list[str]]:
    """Counts [true class, answer] over the validation images, and the classes' names."""
    model, cfg, names = load_model(str(weights))
    loader = open_run(cfg.replace({"DATA.NUM_WORKERS": 0})).val_loader()
    counts = np.zeros((len(names), len(names)), int)
    with torch.inference_mode():
        for images, labels in loader.batches(0):
            answers = model(images).argmax(1)
            np.add.at(counts, (labels.numpy(), answers.numpy()), 1)
    return counts, names


def main(argv: Sequence[str] | None = None) -> int:
    """The command, which takes the flags of a study; returns its exit status."""
    file = str(ROOT / "tools" / "studies" / "demo.yaml")
    return run_program(partial(study.parse, argv, "demo", str(__doc__), file), run)


if __name__ == "__main__":
    sys.exit(main())
