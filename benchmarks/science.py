"""Does distillation work? One teacher, and for each seed a student with labels and the same student
from the teacher's stored logits.

    python -m benchmarks.science --output output/science    # about 10 minutes on two CPU cores
    python -m benchmarks.science --output output/science --seeds 0 1 2 3 4    # goes on

The recipes are those of configs/shapes: equal images, epochs, augmentation and model; a seed is the
student's own (SEED: initial weights, drop path). Accuracies are those after the last epoch, none is
picked. The report goes to stdout as JSON; the exit code is 0 if the worst distilled student is
above the best one that learnt from labels alone."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import main
import save_logits
from benchmarks.timing import machine, report

RECIPES = Path(main.__file__).parent / "configs" / "shapes"
NAMES = {
    "teacher": "shapes-teacher",
    "student": "shapes-student",
    "student_distill": "shapes-distilled",
}


def train(recipe: str, output: Path, seed: int, opts: list[str]) -> float:
    """Top-1 after the last epoch of a recipe, in percent."""
    words = [
        "--cfg",
        str(RECIPES / f"{recipe}.yaml"),
        "--output",
        str(output),
        "--tag",
        f"seed{seed}",
        "--opts",
        "SEED",
        str(seed),
        *opts,
    ]
    if main.main(words):
        raise SystemExit(f"training {recipe} with seed {seed} has failed")
    lines = (output / NAMES[recipe] / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()
    return next(line["val_top1"] for line in map(json.loads, reversed(lines)) if "val_top1" in line)


def compare(args: argparse.Namespace) -> dict[str, object]:
    """Accuracies of the teacher and of each student."""
    begun, store = time.monotonic(), ["DISTILL.TEACHER_LOGITS_PATH", str(args.output / "logits")]
    teacher = train("teacher", args.output, 0, args.opts)
    weights = args.output / NAMES["teacher"] / "seed0" / "checkpoints" / "last.pth"
    words = [
        "--cfg",
        str(RECIPES / "save_logits.yaml"),
        "--resume",
        str(weights),
        "--skip-eval",
        "--output",
        str(args.output),
    ]
    if save_logits.main([*words, "--opts", *store, *args.opts]):
        raise SystemExit("the logits could not be saved")
    scratch = [train("student", args.output, seed, args.opts) for seed in args.seeds]
    distilled = [
        train("student_distill", args.output, seed, [*store, *args.opts]) for seed in args.seeds
    ]
    return {
        "machine": machine(),
        "seeds": args.seeds,
        "opts": args.opts,
        "teacher_top1": teacher,
        "scratch_top1": scratch,
        "distilled_top1": distilled,
        "worst_distilled_minus_best_scratch": min(distilled) - max(scratch),
        "seconds": round(time.monotonic() - begun),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("output/science"), help="where runs and logits are kept"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--opts",
        nargs="*",
        default=[],
        metavar="KEY VALUE",
        help="for all runs, e.g. TRAIN.EPOCHS 2",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = compare(parse())
    report(result)
    sys.exit(result["worst_distilled_minus_best_scratch"] <= 0)
