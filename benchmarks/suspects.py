"""Wrong labels that are planted and looked for: precision and recall of `tools.logits suspects`,
and what leaving out its list does for a student.

    python -m benchmarks.suspects --data-path ./cifar10 --output output/suspects

Half of CIFAR-10's training images teach a timm model; of the others, which that teacher never sees,
5% get another class. Students of the same kind learn from these labels, without the suspects or
without as many of the first of them as are wrong, and from the true labels. The data are links
below OUTPUT; the trainings are a study, which goes on where it was interrupted. The report goes to
stdout as JSON."""

import argparse
import json
import random
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from benchmarks.timing import machine, report
from tools import logits, study

TEACHER = "configs/cifar/tiny_vit_11m_cifar10_teacher.yaml"
SAVE = "configs/cifar/save_logits.yaml"
STUDENT = "configs/cifar/tiny_vit_5m_cifar10.yaml"
UNMIXED = {"AUG.MIXUP": 0.0, "AUG.CUTMIX": 0.0}
HALVES = ("taught", "true", "planted")  # the last two have the same images


def plant(source: Path, output: Path, most: int, share: float) -> set[str]:
    """Link the images as train/CLASS/* and val/CLASS/* of three data sets; the wrong ones' keys."""
    rng = random.Random(0)
    classes = sorted(path.name for path in (source / "train").iterdir())
    wrong = set()
    for name in HALVES:
        for label in classes:
            for split in ("train", "val"):
                (output / name / split / label).mkdir(parents=True, exist_ok=True)
            for path in sorted((source / "val" / label).iterdir())[: most // len(classes) // 5]:
                link(output / name / "val" / label / path.name, path)
    for label in classes:
        paths = sorted((source / "train" / label).iterdir())[: most // len(classes)]
        half = len(paths) // 2
        for path in paths[:half]:
            link(output / "taught" / "train" / label / path.name, path)
        changed = set(rng.sample(paths[half:], round(share * (len(paths) - half))))
        for path in paths[half:]:
            given = rng.choice([each for each in classes if each != label])
            key = f"{given if path in changed else label}/{label}-{path.name}"
            link(output / "planted" / "train" / key, path)
            link(output / "true" / "train" / label / f"{label}-{path.name}", path)
            if path in changed:
                wrong.add(key)
    return wrong


def link(path: Path, target: Path) -> None:
    """A symbolic link, if it is not there."""
    if not path.is_symlink():
        path.symlink_to(target)


def described(output: Path, model: str, weights: str, has_list: bool) -> dict[str, Any]:
    """The study; students without suspects come when there is a list of them."""
    start = {"MODEL.PRETRAINED": weights} if weights else {}
    data = {name: {"DATA.DATA_PATH": str(output / name)} for name in HALVES}
    variants = {name: {"train": STUDENT, "opts": {**start, **data[name]}} for name in HALVES[1:]}
    for name, file in (("all suspects", "suspects.txt"), ("the first", "first.txt")):
        if has_list:
            opts = {**start, **data["planted"], "DATA.EXCLUDE": str(output / file)}
            variants[f"planted, without {name}"] = {"train": STUDENT, "opts": opts}
    return {
        "question": "What do wrong labels cost, and what does leaving out the suspects bring back?",
        "opts": {"MODEL.TYPE": "timm", "MODEL.NAME": model, **UNMIXED},
        "once": {
            "teacher": {"train": TEACHER, "opts": {**start, **data["taught"]}},
            "logits": {"save": SAVE, "teacher": "teacher", "opts": data["planted"]},
        },
        "variants": variants,
    }


def judged(listed: list[str], wrong: set[str]) -> dict[str, Any]:
    """How many of the listed are wrong, and of the wrong listed; also of as many as are wrong."""
    hits = [key in wrong for key in listed]
    first = sum(hits[: len(wrong)]) / len(wrong)
    return {
        "wrong": len(wrong),
        "listed": len(listed),
        "precision": sum(hits) / max(len(hits), 1),
        "recall": sum(hits) / len(wrong),
        "precision and recall of as many as are wrong": first,
    }


def main() -> int:
    """Plant, find and train; the exit code of the study."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="train/CLASS/* and val/CLASS/*")
    add("--output", type=Path, default=Path("output/suspects"), help="default: %(default)s")
    add("--model", default="tf_efficientnet_lite0", help="timm's name (%(default)s)")
    add("--weights", default="hub", help='what all models start from (%(default)s; "": random)')
    add(
        "--images",
        type=int,
        default=50_000,
        help="training images (%(default)s), a fifth to evaluate",
    )
    add("--share", type=float, default=0.05, help="of wrong labels (%(default)s)")
    add("--seeds", nargs="+", default=["0", "1"], help="of the students (0 1)")
    add("--opts", nargs="*", default=[], help="KEY VALUE pairs for all commands")
    args = parser.parse_args()
    output = args.output.absolute()
    wrong = plant(args.data_path.absolute(), output, args.images, args.share)
    found = output / "suspects.txt"
    with redirect_stdout(sys.stderr):
        for has_list in (False, True):
            plan = output / "study.yaml"
            text = yaml.safe_dump(
                described(output, args.model, args.weights, has_list), sort_keys=False
            )
            plan.write_text(text)
            words = [str(plan), "--output", str(output), "--seeds", *args.seeds]
            status = study.main([*words, "--opts", *args.opts])
            if not status and not has_list:
                words = ["suspects", str(output / "logits"), "--cfg", SAVE, "-o", str(found)]
                words += ["--data-path", str(output / "planted"), "--opts", "MODEL.TYPE", "timm"]
                status = logits.main([*words, "MODEL.NAME", args.model, *args.opts])
                lines = found.read_text().splitlines(True)
                (output / "first.txt").write_text("".join(lines[: len(wrong)]))
            if status:
                return status
    rows = json.loads((output / "results.json").read_text())["rows"]
    listed = found.read_text().splitlines()
    accuracies = {row["run"]: [run["val_top1"] for run in row["runs"]] for row in rows}
    report({"machine": machine(), **judged(listed, wrong), "top-1": accuracies})
    return 0


if __name__ == "__main__":
    sys.exit(main())
