"""The whole idea in minutes: a teacher, its saved logits, two students of which one is distilled.

Both students have the same budget. Runs the real commands on the built-in `shapes` data and prints
each before it runs. Interrupted, the same call goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configs import load_config
from data.augment.rng import sample_seed
from data.build import open_run
from tools.predict import load_model

ROOT = Path(__file__).resolve().parent.parent
# The interpreter as one would type it.
IS_OURS = Path(sys.executable).is_relative_to(ROOT)
PYTHON = os.path.relpath(sys.executable, ROOT) if IS_OURS else sys.executable
ROLES = {"teacher": "shapes-teacher", "scratch": "shapes-student", "distilled": "shapes-distilled"}
QUICK = (
    "DATA.SHAPES.TRAIN_IMAGES 640 DATA.SHAPES.VAL_IMAGES 100 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
)
# Positions of an epoch whose pairs show mixup, cutmix, and neither.
SHOWN = (4, 5, 36, 37, 18, 19, 2, 3)
PICTURES = ("curves.png", "replay_sheet.png", "confusion.png")


class Step(NamedTuple):
    """A command of the demo, and what is said before it."""

    name: str
    said: str
    command: str  # with {output}, {opts} and {store}, which is {opts} and where the store lies


STEPS = (
    Step(
        "train-teacher",
        "1/7  A teacher learns from labels.",
        "main.py --cfg configs/shapes/teacher.yaml --output {output} {opts}",
    ),
    Step(
        "save",
        "2/7  Its top-10 probabilities go to disk, with one seed an image.",
        "save_logits.py --cfg configs/shapes/save_logits.yaml --output {output}"
        " --resume {output}/shapes-teacher/default/checkpoints/last.pth {store}",
    ),
    Step(
        "check",
        "3/7  The check runs the teacher again on a quarter of it, and judges.",
        "save_logits.py --cfg configs/shapes/save_logits.yaml --check-saved-logits --percent 25"
        " --resume {output}/shapes-teacher/default/checkpoints/last.pth {store}",
    ),
    Step(
        "train-scratch",
        "4/7  A student learns from labels.",
        "main.py --cfg configs/shapes/student.yaml --output {output} {opts}",
    ),
    Step(
        "train-distilled",
        "5/7  The same student learns from the stored probabilities, with the same budget and no"
        " teacher in memory.",
        "main.py --cfg configs/shapes/student_distill.yaml --output {output} {store}",
    ),
    Step(
        "accuracy-teacher",
        "6/7  Both students and the teacher are evaluated.",
        "main.py --cfg configs/shapes/teacher.yaml --eval --output {output}"
        " --resume {output}/shapes-teacher/default/checkpoints/last.pth {opts}",
    ),
    Step(
        "accuracy-scratch",
        "",
        "main.py --cfg configs/shapes/student.yaml --eval --output {output}"
        " --resume {output}/shapes-student/default/checkpoints/last.pth {opts}",
    ),
    Step(
        "accuracy-distilled",
        "",
        "main.py --cfg configs/shapes/student_distill.yaml --eval --output {output}"
        " --resume {output}/shapes-distilled/default/checkpoints/last.pth {opts}",
    ),
    Step(
        "curves",
        "7/7  Pictures.",
        "-m tools.plot {output}/shapes-teacher/default {output}/shapes-student/default"
        " {output}/shapes-distilled/default -o {output}/curves.png",
    ),
    Step(
        "sheet",
        "",
        "-m tools.replay_sheet --cfg configs/shapes/save_logits.yaml --pairs --seeds {seeds}"
        " --image {output}/first.png {output}/second.png -o {output}/replay_sheet.png",
    ),
)


class Demo:
    """The steps of the demo, each run once: what is done is remembered in the output folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.memory = output / "demo.json"
        self.seconds: dict[str, float] = {}  # spent in each step, over all attempts
        self.results: dict[str, float] = {}  # an evaluation's accuracy in percent, or exit status
        output.mkdir(parents=True, exist_ok=True)
        if self.memory.exists():
            memory = json.loads(self.memory.read_text())
            self.seconds, self.results = memory["seconds"], memory["results"]

    def run(self, opts: str) -> dict:
        """All steps in order, with more options for the programs; what result.json holds."""
        save_samples(self.output)
        output = shlex.quote(str(self.output))
        places = {
            "output": output,
            "opts": f"--opts {opts}" if opts else "",
            "store": f"--opts {opts} DISTILL.TEACHER_LOGITS_PATH {output}/logits",
            "seeds": ",".join(str(sample_seed(0, 0, position)) for position in SHOWN),
        }
        for step in STEPS:
            if step.said:
                print(step.said, flush=True)
            if step.name in self.results:
                print("     (done before)", flush=True)
                continue
            words = shlex.split(step.command.format(**places))
            self.results[step.name] = self._call(step.name, words)
            self._save()
        begun = time.monotonic()
        draw_confusion(self.output)
        self.seconds.setdefault("confusion", time.monotonic() - begun)
        result = self._result()
        (self.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _call(self, name: str, words: list[str]) -> float:
        """Run a Python command from the repository's root and show its output as it comes."""
        print(f"\n$ {PYTHON} {shlex.join(words)}", flush=True)
        begun = time.monotonic()
        text = ""
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            # One thread beside one loader process: more of them wait for each other on two cores.
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                text += line
        except BaseException:
            process.terminate()
            print(process.stdout.read(), flush=True)  # where it stopped
            raise
        finally:
            status = process.wait()
            self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - begun
            self._save()
        may_fail = name == "check"  # which is told at the end
        if status and not may_fail:
            raise ChildProcessError(
                f"that command ended with exit status {status}; when it is mended, the same call"
                " goes on from here"
            )
        if name.startswith("accuracy"):
            return float(re.findall(r"top-1 ([\d.]+)%", text)[-1])
        return status

    def _save(self) -> None:
        temporary = self.memory.with_suffix(".tmp")
        temporary.write_text(json.dumps({"seconds": self.seconds, "results": self.results}))
        os.replace(temporary, self.memory)

    def _result(self) -> dict:
        result: dict = {}
        for role in ROLES:
            seconds = round(self.seconds[f"train-{role}"], 1)
            result[role] = {"accuracy": self.results[f"accuracy-{role}"], "seconds": seconds}
        files = [path for path in (self.output / "logits").rglob("*") if path.is_file()]
        result["check_passed"] = self.results["check"] == 0
        result["store_bytes"] = sum(path.stat().st_size for path in files)
        result["seconds"] = round(sum(self.seconds.values()), 1)
        return result

    def print_table(self, result: dict) -> None:
        """What came of it, where the pictures are, and what to try next."""
        print(f"\n{'':12}{'accuracy':>10}{'seconds':>10}{'bytes':>14}")
        for role in ROLES:
            print(f"{role:12}{result[role]['accuracy']:>9.1f}%{result[role]['seconds']:>10.0f}")
        print(f"{'the store':12}{'':>10}{self.seconds['save']:>10.0f}{result['store_bytes']:>14,}")
        gain = result["distilled"]["accuracy"] - result["scratch"]["accuracy"]
        verdict = "passed" if result["check_passed"] else "FAILED"
        print(f"""
Accuracies are on validation images; while training and saving they are lower, as images are
augmented and mixed then.
The same student, with the same images and epochs, is {gain:+.1f} points better when it learns from
the teacher's store.
The check of the stored logits has {verdict}; {result["seconds"]:.0f} s in all.
""")
        for name in (*PICTURES, "result.json"):
            print(self.output / name)
        image = os.path.relpath(self.output / "first.png", ROOT)
        weights = os.path.relpath(checkpoint(self.output, "distilled"), ROOT)
        print("\nNext, what the student sees in a picture, and README.md:")
        words = ["-m", "tools.predict", image, "--weights", weights]
        print(f"  {PYTHON} {shlex.join(words)}")


def checkpoint(output: Path, role: str) -> Path:
    """Where main.py keeps the last weights of a role."""
    return output / ROLES[role] / "default" / "checkpoints" / "last.pth"


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


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 if the check of the store failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    help = "where everything goes (output/demo)"
    add("--output", metavar="FOLDER", type=Path, default=ROOT / "output" / "demo", help=help)
    help = "a tiny version: shows that all parts run, not that they learn"
    add("--quick", action="store_true", help=help)
    add("--workers", type=int, metavar="N", help="loader processes (default: the recipes' 2)")
    args = parser.parse_args(argv)
    opts = QUICK if args.quick else ""
    if args.workers is not None:
        opts += f" DATA.NUM_WORKERS {args.workers}"
    try:
        demo = Demo(args.output.resolve())
        result = demo.run(opts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same call goes on from here", file=sys.stderr)
        return 130
    demo.print_table(result)
    return 0 if result["check_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
