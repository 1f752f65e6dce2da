"""What a run writes: a log for people, metrics for programs, and the progress of long loops."""

import csv
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from termcolor import colored
from tqdm import tqdm

Item = TypeVar("Item")
Log = Callable[[str], object]  # takes a line

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
    """Warns once where it can't be written, instead of a traceback a line.

    A full disk must not end a training.
    """

    is_whole = True

    def __init__(self, path: Path, **options: Any) -> None:
        self.is_new = not path.exists()
        super().__init__(path, **options)

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
        message = super().format(record)
        if record.levelno in COLOURS:
            message = colored(message, COLOURS[record.levelno])
        return f"{colored(self.formatTime(record, '%H:%M:%S'), 'green')} {message}"


def create_logger(
    folder: str | Path | None, rank: int = 0, name: str = "tinyvit"
) -> logging.Logger:
    """The logger called `name`, of rank 0 on the console, of every rank in a file.

    The file is log_rank<r>.txt in `folder` (None: no file) and has more detail. Calling it again
    replaces its handlers, so that a line is never written twice.
    """
    log = logging.getLogger(name)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.addHandler(logging.NullHandler())  # without one, logging would use stderr
    if rank == 0:
        console = _Console(logging.INFO)
        console.setFormatter(_Coloured())
        log.addHandler(console)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # names of files that are no text are written in escapes
        path = Path(folder) / f"log_rank{rank}.txt"
        file = _File(path, encoding="utf-8", errors="backslashreplace")
        line = "%(asctime)s %(levelname)s %(message)s"
        file.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
        log.addHandler(file)
    return log


def note_fault(log: logging.Logger, text: str) -> None:
    """Write an error to a log's file alone: on the console the program's last line tells it."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, text, (), None))


@contextmanager
def no_trace_if_refused(folder: Path) -> Iterator[None]:
    """A run that is refused while nothing but logs is in its folder takes its own, new one away."""
    try:
        yield
    except (ValueError, OSError):
        files = list(folder.iterdir()) if folder.is_dir() else []
        if all(path.name.startswith("log_rank") for path in files):
            with suppress(OSError):  # not empty, or (Windows) in use
                for handler in logging.getLogger("tinyvit").handlers:
                    if isinstance(handler, _File) and handler.is_new:
                        os.remove(handler.baseFilename)
                folder.rmdir()
                folder.parent.rmdir()
        raise


@contextmanager
def awaited(what: str, log: Log, seconds: float = 8.0) -> Iterator[Callable[[], None]]:
    """Tell what is waited for if it has not come after some seconds; the function that is given
    says that it has.
    """
    timer = threading.Timer(seconds, log, [f"waiting for {what}"])
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def git_state(folder: str | Path) -> str:
    """The commit checked out in a folder, marked if files differ from it; "unknown" without git."""
    words = ["git", "-C", str(folder), *"describe --always --dirty --abbrev=40 --exclude=*".split()]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


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
    """Metrics as lines of JSON in metrics.jsonl, and in a wandb run if one is started."""

    def __init__(self, folder: str | Path, warn: Log = print) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self._warn = warn
        self._wandb_run: Any = None
        self._is_whole = True  # no line was cut short
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.cut_back(math.inf)

    def start_wandb(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        """Begin a wandb run, or go on with the one whose id the folder knows; none is a warning."""
        remembered = self.path.with_name("wandb_id.txt")
        try:
            run_id = remembered.read_text().strip() if remembered.exists() else ""
            run_id = run_id or uuid.uuid4().hex[:12]
            import wandb  # optional, and slow to import

            run = wandb.init(
                project=project,
                name=name or None,
                config=dict(config),
                dir=str(self.path.parent),
                id=run_id,
                resume="allow",
                settings=wandb.Settings(init_timeout=60, console="off"),
            )
            # wandb's own count only rises, a resumed run's step may go back
            run.define_metric("*", step_metric="step")
            remembered.write_text(run_id)
            self._wandb_run = run
        except Exception as error:
            self._warn(
                f"wandb could not start ({_first_line(error)}): metrics go to {self.path} alone;"
                " `pip install wandb`, `wandb login`, or WANDB_MODE=offline to upload later"
            )

    def write(
        self, step: int, epoch: float, speeds: Mapping[str, float] | None = None, **values: float
    ) -> None:
        """Add a line of numbers, which may be one-element tensors.

        JSON has no infinite ones, so those become null. What depends on the machine's mood,
        `speeds`, goes to wandb alone: equal runs have equal files.
        """
        place = {"step": step, "epoch": epoch}
        numbers = {key: _number(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        try:
            if not self._is_whole:  # as a full disk leaves it
                self.cut_back(math.inf)
            self._is_whole = False
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(place | finite) + "\n")
            self._is_whole = True
            self.lines += 1
        except OSError as error:  # no reason to end a training
            self._warn(f"the metrics of step {step} could not be written: {error}")
        self._tell_wandb("log", place | numbers | dict(speeds or {}))

    def cut_back(self, step: float, lines: int | None = None) -> None:
        """Remove the lines after a checkpoint's step, and any that a crash cut short.

        So a resumed run has no step twice. `lines`, how many there were, parts an epoch's last
        update from its evaluation, which has the same step.
        """
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
        self._tell_wandb("finish")
        self._wandb_run = None

    def _tell_wandb(self, method: str, *values: Any) -> None:
        """Call the wandb run, if there is one; after a fault there is none."""
        if self._wandb_run is None:
            return
        try:
            getattr(self._wandb_run, method)(*values)
        except Exception as error:
            self._warn(f"wandb has failed ({_first_line(error)}): all metrics are in {self.path}")
            self._wandb_run = None


def create_metric_writer(
    folder: str | Path,
    rank: int = 0,
    wandb_project: str = "",
    name: str = "",
    config: Mapping[str, Any] | None = None,
    warn: Log = print,
) -> NullWriter:
    """The writer of a run: of rank 0 a real one, with a wandb run as well if a project is named."""
    if rank != 0:
        return NullWriter()
    writer = MetricWriter(folder, warn)
    if wandb_project:
        writer.start_wandb(wandb_project, name, config or {})
    return writer


class TrainingLog:
    """Reports how a training goes: as a line of metrics, and in words with speed and time left."""

    def __init__(
        self, log: Log, writer: NullWriter, epochs: int, images_per_update: int, update: int
    ) -> None:
        """`update` is the number of updates done before this process."""
        self._log = log
        self._writer = writer
        self._epochs = epochs
        self._images_per_update = images_per_update
        self._start = (time.perf_counter(), update)
        self.brief = ""  # the last report, for a progress bar
        self.begin_epoch(update)

    def begin_epoch(self, update: int) -> None:
        """Leave what was between the epochs out of the speed."""
        # time, updates done, seconds waited for data
        self._last = (time.perf_counter(), update, 0.0)

    def report(
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
        """Report the `means` since the last time.

        `step` of the `steps` updates of `epoch` are done, `waited` seconds of it for data.
        """
        now = time.perf_counter()
        last_time, last_update, last_waited = self._last
        self._last = (now, update, waited)
        seconds = now - last_time
        speed = (update - last_update) * self._images_per_update / seconds
        wait_percent = 100 * (waited - last_waited) / seconds
        start, first_update = self._start
        updates_left = steps * (self._epochs - epoch) - step
        seconds_left = (now - start) / (update - first_update) * updates_left

        speeds = {
            "images_per_second": speed,
            "data_wait_percent": wait_percent,
            "memory_gb": memory_gb,
        }
        rate_range = {"lr": max(rates), "lr_min": min(rates)}
        self._writer.write(
            update, epoch + step / steps, speeds, **means, **rate_range, skipped=skipped
        )
        left = f"{timedelta(seconds=round(seconds_left))} left"
        self.brief = f"loss {means.get('loss', math.nan):.4g}, {left} in all"
        # an accuracy of mixed images may be 1e-10, which is 0 to people
        shown = [f"{name} {round(float(value), 4):.4g}" for name, value in means.items()]
        shown.append(f"lr {max(rates):.4g}")
        if skipped:
            shown.append(f"{skipped} updates skipped")
        self._log(
            f"epoch {epoch + 1}/{self._epochs}, update {step}/{steps}: {', '.join(shown)};"
            f" {speed:,.1f} images/s, data wait {wait_percent:.0f}%, {memory_gb:.2f} GB,"
            f" {left}"
        )


def evaluation_in_words(measured: dict[str, Any]) -> str:
    """The result of an evaluation."""
    text = f"{measured['count']:,} validation images"
    if "top1" in measured:
        text += ": top-1 {top1:.3f}%, top-5 {top5:.3f}%, loss {loss:.4f}".format(**measured)
    if "class_head_top1" in measured:
        heads = "; top-1 of the class head {class_head_top1:.3f}%, of the distillation head"
        text += (heads + " {distill_head_top1:.3f}%").format(**measured)
    return text


def write_classes(
    path: str | Path, names: Sequence[str], counts: Sequence[int], right: Sequence[int]
) -> None:
    """The accuracy of each class as CSV, from how many images it has and how many are right."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "name", "images", "right", "top1"])
        for label, (count, hits) in enumerate(zip(counts, right)):
            name = names[label] if label < len(names) else ""
            top1 = f"{100 * hits / count:.3f}" if count else ""
            rows.writerow([label, name, count, hits, top1])


def progress(
    items: Iterable[Item],
    total: int | None = None,
    description: str = "",
    unit: str = "it",
    log: Log = print,
    interval: float = 30.0,
    enabled: bool = True,
    note: Callable[[], str] = str,
) -> Iterator[Item]:
    """The items, with a bar on a terminal, else with a line through `log` every `interval` seconds.

    `note` says what else is shown.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if not enabled:
        yield from items
    elif sys.stderr.isatty():
        bar = tqdm(items, description, total, leave=False, unit=unit, dynamic_ncols=True)
        with bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
    else:
        start = last = time.monotonic()
        with awaited(f"the first {unit} ({description})", log) as has_come:
            for done, item in enumerate(items, 1):
                has_come()
                yield item
                now = time.monotonic()
                if now - last >= (interval if last > start else min(interval, 8.0)):
                    last = now
                    shown = {"prefix": description, "unit": unit, "postfix": note()}
                    log(tqdm.format_meter(done, total, now - start, ncols=0, **shown))


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
