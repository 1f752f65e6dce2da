"""The page docs/GPU.md, made of what benchmarks.gpu has found."""

from collections.abc import Iterator, Sequence
from typing import Any

Found = dict[str, Any]  # {part: {"found": values, "note": "", "is_check": ..., "seconds": ...}}
HEAD = """# On a GPU

Written by `python -m benchmarks.gpu`, which takes at most 20 minutes on one GPU: first checks, then
figures. A heading names the parts that its section comes from; `--only PART` runs these again. The
JSON beside the page holds all that was measured.
"""
NONE = "–"


def page(machine: dict[str, Any], parts: Found) -> str:
    """The page in Markdown."""
    gpu = f"{machine['gpus']} x {machine['gpu']}" if machine["gpu"] else "no GPU"
    text = f"{HEAD}\n{gpu}, {machine['cores']} cores of {machine['processor']},"
    text += f" Python {machine['python']}, torch {machine['torch']}.\n"
    if machine["quick"]:
        text += "\n**A run in small, to try the command: these figures mean nothing.**\n"
    names = [name for name, part in parts.items() if part["is_check"]]
    sections = {
        "Checks": (checks, names or ["checks"]),
        "The model beside timm's": (models, ["models"]),
        "A training step": (training, ["training"]),
        "Labels, stored logits, online teacher": (epochs, ["epochs"]),
        "Saving": (saving, ["saving"]),
        "From JPEG files to the step": (executors, ["executors"]),
        "Aims": (aims, []),
    }
    for title, (section, of_parts) in sections.items():
        kept = {name: parts[name] for name in of_parts if name in parts}
        text += f"\n## {title}" + "".join(f" `{name}`" for name in of_parts) + "\n\n"
        found = {key: value for part in kept.values() for key, value in part["found"].items()}
        text += "\n".join(section(found if of_parts else parts)) + "\n"
        notes = [f"`{name}`: {part['note']}" for name, part in kept.items() if part["note"]]
        notes += [f"`{name}` was not run" for name in of_parts if name not in parts]
        text += f"\n**Not complete**: {'; '.join(notes)}.\n" if notes else ""
    return text


def faults(parts: Found) -> list[str]:
    """Checks that failed, and parts that broke; a figure that was cut is none."""
    bad = []
    for name, part in parts.items():
        if part["is_check"]:
            bad += [key for key, value in part["found"].items() if value["passed"] is False]
        if part["note"] and (part["is_check"] or not part["note"].startswith("cut")):
            bad.append(f"{name}: {part['note']}")
    return bad


def table(*rows: Sequence[object]) -> Iterator[str]:
    """The lines of a table; numbers to three digits."""
    for index, row in enumerate(rows):
        cells = [
            number(cell) if isinstance(cell, float) else str(cell).replace("|", "/") for cell in row
        ]
        yield f"| {' | '.join(cells)} |"
        if index == 0:
            yield "|" + "---|" * len(row)


def number(value: float) -> str:
    """A number as people read it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}%"


def checks(found: dict) -> Iterator[str]:
    words = {True: "holds", False: "**FAILS**", None: "no verdict"}
    rows = [(name, words[value["passed"]], value["line"]) for name, value in found.items()]
    yield from table(("check", "", "found"), *rows)


def speed(row: dict, side: str, is_compiled: bool) -> float | None:
    """Images a second of one side's quickest mode."""
    seconds = [
        times["median"]
        for name, times in row["seconds"].items()
        if name.startswith(side) and name.endswith("compiled") == is_compiled
    ]
    return row["batch"] / min(seconds) if seconds else None


def over(row: dict | None, is_compiled: bool) -> float | None:
    """How many times as fast as timm's ours is, each in its quickest mode."""
    ours, theirs = (row and speed(row, side, is_compiled) for side in ("ours", "timm"))
    return ours / theirs if ours and theirs else None


def models(found: dict) -> Iterator[str]:
    yield "Images/s in bfloat16, forward or forward and backward, ours / timm's with equal weights,"
    yield "in turns, medians; memory is what a step adds, as constructed.\n"
    rows = []
    for name, row in found.items():
        cells: list[object] = [f"{name}, batch {row['batch']}"]
        for is_compiled in (False, True):
            sides = [speed(row, side, is_compiled) for side in ("ours", "timm")]
            cells.append(" / ".join(number(value) if value else NONE for value in sides))
            cells.append(over(row, is_compiled) or NONE)
        memory = [row["memory_gb"].get(side) for side in ("ours", "timm")]
        cells.append(" / ".join(number(value) if value else NONE for value in memory))
        rows.append(cells)
    yield from table(("", "eager", "times", "compiled", "times", "GB"), *rows)


def training(found: dict) -> Iterator[str]:
    yield "A step of main.py whose batch lies ready, and the part of it that is not the model's.\n"
    keys = ("images_per_second", "step_ms", "model_ms", "peak_memory_gb")
    rows = [
        [name, *(row[key] for key in keys), percent(row["outside_the_model"])]
        for name, row in found.items()
    ]
    yield from table(("", "images/s", "ms", "model's", "peak GB", "outside"), *rows)


def epochs(found: dict) -> Iterator[str]:
    if not found:
        return
    sizes = " and ".join(f"{role} {found[role]['model']}" for role in ("student", "teacher"))
    settings = found["settings"]
    yield f"{sizes}, {settings['images']} images in batches of {settings['batch_size']}.\n"
    rows = [
        (mode, seconds["median"], found["over_labels"][mode], found["peak_memory_gb"][mode])
        for mode, seconds in found["seconds_per_epoch"].items()
    ]
    yield from table(("", "seconds an epoch", "over labels", "peak GB"), *rows)


def saving(found: dict) -> Iterator[str]:
    if not found:
        return
    rates = found["images_per_second"]
    yield f"{found['teacher']}, top {found['top_k']}, batches of {found['batch_size']} in memory:"
    yield f"{number(rates['saving'])} images/s, {number(rates['without writing'])} without a store"
    yield f"({found['saving_adds']} of time)."


def executors(found: dict) -> Iterator[str]:
    rows = [
        (name, row["images_per_second"], percent(row["data_wait"]))
        for name, row in found.items()
        if isinstance(row, dict) and "data_wait" in row
    ]
    yield from table(("executor, workers", "images/s", "waits for data"), *rows)


def aims(parts: Found) -> Iterator[str]:
    def of(part: str, key: str) -> Any:
        return parts.get(part, {"found": {}})["found"].get(key)

    step, row = of("models", "5m training step"), of("training", "5m")
    fed = of("executors", "device, 8 workers")
    values = (
        ("5M's training speed over timm's, compiled", over(step, True), "at least", 1.1),
        ("the same, eager", over(step, False), "at least", 1.3),
        ("a step of 5M outside the model", row and row["outside_the_model"], "at most", 0.05),
        ("waiting for data, 8 workers, device", fed and fed["data_wait"], "at most", 0.02),
    )
    rows = []
    for name, value, bound, limit in values:
        is_met = value is not None and (value >= limit if bound == "at least" else value <= limit)
        answer = NONE if value is None else "met" if is_met else "**missed**"
        rows.append((name, f"{bound} {limit}", NONE if value is None else float(value), answer))
    yield from table(("", "aim", "measured", ""), *rows)
