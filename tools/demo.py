"""The whole idea in a few minutes: a teacher, its saved logits, and two students with the same
budget, one of them distilled.

Runs the real commands on the built-in `shapes` data and prints each before it runs. Interrupted,
the same call goes on where it was."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from configs import load_config
from data.augment.rng import sample_seed
from data.build import open_run, resolve
from data.images.datasets import build_dataset
from tools.predict import load_model
from tools.replay_sheet import main as replay_sheet

ROOT = Path(__file__).resolve().parent.parent
# as one would type it
PYTHON = (
    os.path.relpath(sys.executable, ROOT)
    if Path(sys.executable).is_relative_to(ROOT)
    else sys.executable
)
ROLES = ("teacher", "scratch", "distilled")
RECIPES = {"teacher": "teacher", "scratch": "student", "distilled": "student_distill"}
NAMES = {"teacher": "shapes-teacher", "scratch": "shapes-student", "distilled": "shapes-distilled"}
# positions of an epoch whose pairs show mixup, cutmix, and neither
SHOWN = (4, 5, 36, 37, 18, 19, 2, 3)
QUICK = [
    "DATA.SHAPES.TRAIN_IMAGES",
    "640",
    "DATA.SHAPES.VAL_IMAGES",
    "100",
    "TRAIN.EPOCHS",
    "1",
    "TRAIN.WARMUP_EPOCHS",
    "0",
]


class Demo:
    """The steps of the demo, each run once: what is done is remembered in the output folder."""

    def __init__(self, output: Path, quick: bool, workers: int | None) -> None:
        self.output, self.store, self.memory = output, output / "logits", output / "demo.json"
        self.opts = [
            *(QUICK if quick else []),
            *(["DATA.NUM_WORKERS", str(workers)] if workers is not None else []),
        ]
        output.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}  # spent in each step, over all attempts
        self.results: dict = {}
        if self.memory.exists():
            self.seconds, self.results = json.loads(self.memory.read_text()).values()

    def run(self) -> dict:
        """All steps in order; returns what result.json holds."""
        print("1/7  A teacher learns from labels.", flush=True)
        self._train("teacher")
        print("2/7  Its top-10 probabilities go to disk, with one seed an image.", flush=True)
        self._command(
            "save",
            "save_logits.py",
            self._recipe("save_logits"),
            "--output",
            str(self.output),
            *self._weights("teacher"),
            *self._opts(self._store()),
        )
        print("3/7  The check runs the teacher again on a quarter of it, and judges.", flush=True)
        self._check()
        print("4/7  A student learns from labels.", flush=True)
        self._train("scratch")
        print(
            "5/7  The same student learns from the stored probabilities, with the same budget and"
            " no teacher in memory.",
            flush=True,
        )
        self._train("distilled", *self._store())
        print("6/7  Both students and the teacher are evaluated.", flush=True)
        accuracies = {role: self._evaluate(role) for role in ROLES}
        print("7/7  Pictures.", flush=True)
        pictures = self._pictures()
        result = {
            role: {"accuracy": accuracies[role], "seconds": round(self.seconds[f"train-{role}"], 1)}
            for role in ROLES
        }
        result |= {
            "check_passed": self.results["check"] == 0,
            "store_bytes": _folder_bytes(self.store),
        }
        result["seconds"] = round(sum(self.seconds.values()), 1)
        (self.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        self._table(result, pictures)
        return result

    def run_folder(self, role: str) -> Path:
        """Where main.py keeps the run of a role."""
        return self.output / NAMES[role] / "default"

    def _train(self, role: str, *opts: str) -> None:
        self._command(
            f"train-{role}",
            "main.py",
            self._recipe(RECIPES[role]),
            "--output",
            str(self.output),
            *self._opts(opts),
        )

    def _check(self) -> None:
        if "check" not in self.results:
            command = (
                "save_logits.py",
                self._recipe("save_logits"),
                "--check-saved-logits",
                "--percent",
                "25",
                *self._weights("teacher"),
            )
            status, _ = self._call("check", [*command, *self._opts(self._store())], may_fail=True)
            self._remember("check", status)

    def _evaluate(self, role: str) -> float:
        if f"accuracy-{role}" not in self.results:
            command = (
                "main.py",
                self._recipe(RECIPES[role]),
                "--eval",
                *self._weights(role),
                "--output",
                str(self.output),
            )
            _, text = self._call(f"eval-{role}", [*command, *self._opts()])
            self._remember(f"accuracy-{role}", float(re.findall(r"top-1 ([\d.]+)%", text)[-1]))
        return self.results[f"accuracy-{role}"]

    def _pictures(self) -> list[Path]:
        begun = time.monotonic()
        curves, sheet, matrix = (
            self.output / name for name in ("curves.png", "replay_sheet.png", "confusion.png")
        )
        folders = [str(self.run_folder(role)) for role in ROLES]
        self._call("plot", ["-m", "tools.plot", *folders, "-o", str(curves)])
        images, shown = (
            build_dataset(self._config("student"), "train"),
            [
                self.output / "first.png",
                self.output / "second.png",
            ],
        )
        for path, index in zip(shown, (0, len(images) // 2)):  # of different classes
            images[index][0].save(path)
        seeds = ",".join(str(sample_seed(0, 0, position)) for position in SHOWN)
        replay_sheet(
            [
                "--cfg",
                str(ROOT / "configs/shapes/save_logits.yaml"),
                "--pairs",
                "--seeds",
                seeds,
                "--image",
                *map(str, shown),
                "-o",
                str(sheet),
            ]
        )
        draw_confusion({role: self._confusion(role) for role in ("scratch", "distilled")}, matrix)
        self.seconds.setdefault("pictures", time.monotonic() - begun)
        return [curves, sheet, matrix]

    def _confusion(self, role: str) -> tuple[np.ndarray, list[str]]:
        """Counts [true class, answer] over the validation images, and the classes' names."""
        cfg = self._config(RECIPES[role], "--eval")
        model, _, _ = load_model(str(self.run_folder(role) / "checkpoints" / "last.pth"))
        epochs = open_run(cfg).val_loader()
        names = epochs.dataset.dataset.class_names
        matrix = np.zeros((len(names), len(names)), int)
        with torch.inference_mode():
            for images, labels in epochs.batches(0):
                np.add.at(matrix, (labels.numpy(), model(images).argmax(1).numpy()), 1)
        return matrix, names

    def _config(self, recipe: str, *flags: str) -> CfgNode:
        """A recipe's resolved configuration, for use in this process."""
        words = [
            "--cfg",
            str(ROOT / f"configs/shapes/{recipe}.yaml"),
            *flags,
            "--opts",
            *self.opts,
            "DATA.NUM_WORKERS",
            "0",
        ]
        return resolve(load_config(words))

    def _table(self, result: dict, pictures: Sequence[Path]) -> None:
        print(f"\n{'':12}{'accuracy':>10}{'seconds':>10}{'bytes':>14}")
        for role in ROLES:
            print(f"{role:12}{result[role]['accuracy']:>9.1f}%{result[role]['seconds']:>10.0f}")
        print(f"{'the store':12}{'':>10}{self.seconds['save']:>10.0f}{result['store_bytes']:>14,}")
        gain = result["distilled"]["accuracy"] - result["scratch"]["accuracy"]
        print(
            "\nAccuracies are on validation images; while training and saving they are lower, as"
            " images are augmented and mixed then.\nThe same student, with the same images and"
            f" epochs, is {gain:+.1f} points better when it learns from the teacher's store.\nThe"
            f" check of the stored logits has {'passed' if result['check_passed'] else 'FAILED'};"
            f" {result['seconds']:.0f} s in all.\n"
        )
        print("\n".join(map(str, [*pictures, self.output / "result.json"])))
        image, weights = (
            os.path.relpath(path, ROOT)
            for path in (self.output / "first.png", Path(self._weights("distilled")[1]))
        )
        print(
            f"\nNext, what the student sees in a picture, and README.md:\n  {PYTHON} -m"
            f" tools.predict {image} --weights {weights}"
        )

    def _recipe(self, name: str) -> str:
        return f"--cfg=configs/shapes/{name}.yaml"

    def _weights(self, role: str) -> tuple[str, str]:
        return "--resume", str(self.run_folder(role) / "checkpoints" / "last.pth")

    def _store(self) -> tuple[str, str]:
        return "DISTILL.TEACHER_LOGITS_PATH", str(self.store)

    def _opts(self, opts: Sequence[str] = ()) -> list[str]:
        return ["--opts", *self.opts, *opts] if self.opts or opts else []

    def _command(self, step: str, *words: str) -> None:
        if step in self.results:
            print("     (done before)", flush=True)
            return
        self._call(step, words)
        self._remember(step, True)

    def _call(self, step: str, words: Sequence[str], may_fail: bool = False) -> tuple[int, str]:
        """Run a Python command from the repository's root, its output shown as it comes; returns
        exit status and output.
        """
        print(f"\n$ {PYTHON} {shlex.join(words)}", flush=True)
        begun, lines = time.monotonic(), []
        # One thread beside one loader process: more of them wait for each other on two cores.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            for line in process.stdout:
                lines.append(line)
                print(f"  {line}", end="", flush=True)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                # where it stopped
                print("".join(f"  {line}" for line in process.stdout), end="", flush=True)
                process.wait()
            self.seconds[step] = self.seconds.get(step, 0) + time.monotonic() - begun
            self._save()
        if status and not may_fail:
            raise ChildProcessError(
                f"that command ended with exit status {status}; when it is mended, the same call"
                " goes on from here"
            )
        return status, "".join(lines)

    def _remember(self, key: str, value: object) -> None:
        self.results[key] = value
        self._save()

    def _save(self) -> None:
        temporary = self.memory.with_suffix(".tmp")
        temporary.write_text(json.dumps({"seconds": self.seconds, "results": self.results}))
        os.replace(temporary, self.memory)


def draw_confusion(matrices: dict[str, tuple[np.ndarray, list[str]]], path: Path) -> None:
    """Confusion matrices side by side, in percent of each true class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(matrices), figsize=(6.2 * len(matrices), 5.6), squeeze=False, layout="constrained"
    )
    for axis, (role, (matrix, names)) in zip(axes[0], matrices.items()):
        percent = 100 * matrix / matrix.sum(1, keepdims=True).clip(1)
        image = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for row, column in np.ndindex(*percent.shape):
            if percent[row, column] >= 0.5:
                axis.text(
                    column,
                    row,
                    f"{percent[row, column]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if percent[row, column] > 55 else "black",
                )
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("answer")
        axis.set_ylabel("true class")
        axis.set_title(f"{role}: {100 * np.trace(matrix) / matrix.sum():.1f}% right")
    figure.colorbar(image, ax=axes[0].tolist(), label="% of the true class", shrink=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=ROOT / "output" / "demo",
        help="where everything goes (output/demo)",
    )
    add(
        "--quick",
        action="store_true",
        help="a tiny version: shows that all parts run, not that they learn",
    )
    add("--workers", type=int, metavar="N", help="loader processes (default: the recipes' 2)")
    args = parser.parse_args(argv)
    try:
        result = Demo(args.output.resolve(), args.quick, args.workers).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same call goes on from here", file=sys.stderr)
        return 130
    return 0 if result["check_passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
