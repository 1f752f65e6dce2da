"""Where a run writes what it says: a log for people, metrics for programs, and progress of long
loops.
"""

import csv
import json
import logging
import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from termcolor import colored
from tqdm import tqdm

Item = TypeVar("Item")

COLOURS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _Console(logging.Handler):
    """Writes to the standard output of the moment, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)  # a closed terminal must not end a training


class _File(logging.FileHandler):
    """Says once that it can't be written, where logging would print a traceback for each line: a
    full disk must not end a training.
    """

    is_whole = True

    def handleError(self, record: logging.LogRecord) -> None:
        if self.is_whole:
            print(
                f"warning: {self.baseFilename} can't be written ({sys.exc_info()[1]}) and lacks"
                " lines from now on",
                file=sys.stderr,
            )
        self.is_whole = False


class _Coloured(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when, message = (
            colored(self.formatTime(record, "%H:%M:%S"), "green"),
            super().format(record),
        )
        return (
            f"{when}"
            f" {colored(message, COLOURS[record.levelno]) if record.levelno in COLOURS else message}"
        )


def create_logger(
    folder: str | Path | None, rank: int = 0, name: str = "tinyvit"
) -> logging.Logger:
    """The logger called `name`: rank 0 speaks on the console, every rank to log_rank<r>.txt in
    `folder` (None: no file), in more detail.

    Calling it again replaces its handlers, so that a line is never written twice.
    """
    log = logging.getLogger(name)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.addHandler(logging.NullHandler())
    if rank == 0:
        console = _Console(logging.INFO)
        console.setFormatter(_Coloured("%(message)s"))
        log.addHandler(console)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = _File(Path(folder) / f"log_rank{rank}.txt", encoding="utf-8")
        file.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        log.addHandler(file)
    return log


def git_state(folder: str | Path) -> str:
    """The commit that is checked out in a folder, marked if files differ from it; "unknown" without
    git.
    """
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class NullWriter:
    """Takes metrics and keeps none: what all processes but the first have."""

    lines = 0  # how many there are by now

    def write(
        self, step: int, epoch: float, speeds: Mapping[str, float] | None = None, **values: float
    ) -> None:
        """Note the values of a step."""

    def cut_back(self, step: float, lines: int | None = None) -> None:
        """Forget what was noted after a step, and after so many lines."""

    def close(self) -> None:
        """Finish writing."""


class MetricWriter(NullWriter):
    """Metrics as lines of JSON in metrics.jsonl, each on disk at once, and on to a wandb run if
    there is one.
    """

    def __init__(
        self, folder: str | Path, wandb_run: Any = None, warn: Callable[[str], object] = print
    ) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._wandb_run, self._warn = wandb_run, warn
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.cut_back(math.inf)

    def write(
        self, step: int, epoch: float, speeds: Mapping[str, float] | None = None, **values: float
    ) -> None:
        """Add a line of numbers (one-element tensors are read); JSON has no infinite ones, so those
        become null.

        What depends on the machine's mood, `speeds`, goes to wandb alone: equal runs have equal
        files."""
        numbers = {key: _number(value) for key, value in values.items()}
        line = {"step": step, "epoch": epoch}
        line |= {key: number if math.isfinite(number) else None for key, number in numbers.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            self.lines += 1
        except OSError as error:  # no reason to end a training
            self._warn(f"the metrics of step {step} could not be written: {error}")
        if self._wandb_run is not None:
            try:
                self._wandb_run.log({"step": step, "epoch": epoch, **numbers, **(speeds or {})})
            except Exception as error:
                self._warn(
                    f"wandb has failed ({_first_line(error)}): metrics go to {self.path} alone from"
                    " now on"
                )
                self._wandb_run = None

    def cut_back(self, step: float, lines: int | None = None) -> None:
        """Remove the lines after a checkpoint's step, and any that a crash cut short, so that a
        resumed run has no step twice.

        `lines`, how many there were, parts an epoch's last update from its evaluation, which has
        the same step."""
        if not self.path.exists():
            return
        found = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in found[:lines] if _step_of(line) <= step]
        self.lines = len(kept)
        if kept != found:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)

    def close(self) -> None:
        """Finish the wandb run."""
        if self._wandb_run is not None:
            try:
                self._wandb_run.finish()
            except Exception as error:
                self._warn(
                    f"wandb could not finish ({_first_line(error)}): {self.path} has all metrics"
                )
            self._wandb_run = None


class Journal:
    """Says how a training goes: a line of metrics, and one of the log that also tells the speed and
    the time that is left.
    """

    def __init__(
        self,
        say: Callable[[str], object],
        writer: NullWriter,
        epochs: int,
        images_per_update: int,
        update: int,
    ) -> None:
        """`update` is the number of updates done before this process."""
        self._say, self._writer, self._epochs, self._images = say, writer, epochs, images_per_update
        # time, seconds of it waiting for data, updates done
        self._start = self._last = time.perf_counter(), 0.0, update

    def begin_epoch(self, update: int) -> None:
        """Leave what was between the epochs out of the speed."""
        self._last = time.perf_counter(), 0.0, update

    def speak(
        self,
        update: int,
        epoch: int,
        step: int,
        steps: int,
        means: Mapping[str, float],
        rates: Sequence[float],
        skipped: int,
        waited: float,
        memory_gb: float,
    ) -> None:
        """Tell the `means` since the last time: `step` of the `steps` updates of `epoch` are done,
        `waited` seconds of it for data.
        """
        (then, before, last_update), self._last = self._last, (time.perf_counter(), waited, update)
        seconds = self._last[0] - then
        speed, wait = (
            (update - last_update) * self._images / seconds,
            100 * (waited - before) / seconds,
        )
        left = (
            (self._last[0] - self._start[0])
            / (update - self._start[2])
            * (steps * (self._epochs - epoch) - step)
        )
        speeds = {"images_per_second": speed, "data_wait_percent": wait, "memory_gb": memory_gb}
        self._writer.write(
            update,
            epoch + step / steps,
            speeds,
            **means,
            lr=max(rates),
            lr_min=min(rates),
            skipped=skipped,
        )
        values = ", ".join(
            f"{name} {value:.4g}" for name, value in {**means, "lr": max(rates)}.items()
        )
        self._say(
            f"epoch {epoch + 1}/{self._epochs}, update {step}/{steps}:"
            f" {values}{f', {skipped} updates skipped' if skipped else ''}; {speed:,.1f} images/s,"
            f" data wait {wait:.0f}%, {memory_gb:.2f} GB, {timedelta(seconds=round(left))} left"
        )


def evaluation_in_words(measured: dict[str, Any]) -> str:
    """The result of an evaluation."""
    text = f"{measured['count']:,} validation images"
    return text + (
        ": top-1 {top1:.3f}%, top-5 {top5:.3f}%, loss {loss:.4f}".format(**measured)
        if "top1" in measured
        else ""
    )


def note_fault(log: logging.Logger, text: str) -> None:
    """Write an error to a log's file alone: on the console the program's last line tells it."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))


def write_classes(
    path: str | Path, names: Sequence[str], counts: Sequence[int], right: Sequence[int]
) -> None:
    """The accuracy of each class as CSV, given how many images it has and how many of them are
    right.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", "images", "right", "top1"])
        for label, (count, hits) in enumerate(zip(counts, right)):
            rows.writerow(
                [
                    label,
                    names[label] if label < len(names) else "",
                    count,
                    hits,
                    f"{100 * hits / count:.3f}" if count else "",
                ]
            )


def _number(value: Any) -> float:
    """A plain number out of a number, a numpy scalar or a one-element tensor."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _step_of(line: str) -> float:
    """The step of a whole line; one that is cut short lies behind every step, infinity included."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.nan
    except (ValueError, KeyError, TypeError):
        return math.nan


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def create_metric_writer(
    folder: str | Path,
    rank: int = 0,
    wandb_project: str = "",
    name: str = "",
    config: Mapping[str, Any] | None = None,
    warn: Callable[[str], object] = print,
) -> NullWriter:
    """The writer of a run: of rank 0 a real one, with a wandb run as well if a project is named and
    wandb can be reached.
    """
    if rank != 0:
        return NullWriter()
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = (
        _start_wandb(Path(folder), wandb_project, name, config or {}, warn)
        if wandb_project
        else None
    )
    return MetricWriter(folder, run, warn)


def _start_wandb(
    folder: Path, project: str, name: str, config: Mapping[str, Any], warn: Callable[[str], object]
) -> Any:
    """A wandb run, continued if the folder knows its id; None with a warning if there can be none."""
    remembered = folder / "wandb_id.txt"
    run_id = (remembered.read_text().strip() if remembered.exists() else "") or uuid.uuid4().hex[
        :12
    ]
    instead = f"metrics go to {folder / 'metrics.jsonl'} alone"
    try:
        import wandb  # optional, and slow to import

        settings = wandb.Settings(init_timeout=60, console="off")
        run = wandb.init(
            project=project,
            name=name or None,
            config=dict(config),
            dir=str(folder),
            id=run_id,
            resume="allow",
            settings=settings,
        )
        # wandb's own count only rises, a resumed run's step may go back
        run.define_metric("*", step_metric="step")
        remembered.write_text(run_id)
    except ImportError as error:
        warn(f"wandb can't be imported ({_first_line(error)}): {instead}; pip install wandb")
        return None
    except Exception as error:
        warn(
            f"wandb could not start ({_first_line(error)}): {instead}; `wandb login`, or"
            " WANDB_MODE=offline to upload later"
        )
        return None
    return run


def progress(
    items: Iterable[Item],
    total: int | None = None,
    description: str = "",
    unit: str = "it",
    log: Callable[[str], object] = print,
    interval: float = 30.0,
    enabled: bool = True,
    note: Callable[[], str] = str,
) -> Iterator[Item]:
    """The items, with a bar on a terminal, else with a line through `log` every `interval` seconds;
    `note` says what else is shown.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if not enabled:
        yield from items
    elif sys.stderr.isatty():
        with tqdm(
            items, total=total, desc=description, unit=unit, dynamic_ncols=True, leave=False
        ) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
    else:
        start = last = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - last >= interval:
                last = now
                log(
                    "; ".join(
                        filter(
                            None,
                            [_progress_line(description, done, total, unit, now - start), note()],
                        )
                    )
                )


def _progress_line(
    description: str, done: int, total: int | None, unit: str, seconds: float
) -> str:
    """How far a loop is after so many seconds, and how long it will take."""
    rate = done / max(seconds, 1e-9)
    text = f"{description}: {done}" if description else f"{done}"
    if total:
        left = timedelta(seconds=round((total - done) / rate))
        return f"{text} of {total} {unit} ({done / total:.0%}), {rate:.1f} {unit}/s, {left} left"
    return f"{text} {unit}, {rate:.1f} {unit}/s"
