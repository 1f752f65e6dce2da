"""Logs, metrics and progress, with files as crashes leave them and a real wandb offline."""

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import logger

try:
    import resource
except ImportError:  # Windows
    resource = None
from logger import MetricWriter, NullWriter, awaited, create_logger, create_metric_writer, progress


@pytest.fixture
def name(request):
    """A logger's name of this test's own, whose files are closed afterwards."""
    yield request.node.name
    create_logger(None, 1, request.node.name)


# Logs


def test_rank_0_writes_to_the_console_and_every_rank_to_its_file(tmp_path, name, capsys, caplog):
    for rank in (0, 2):
        create_logger(tmp_path / "new" / "folder", rank, name).info("grüße from %d", rank)
    assert re.fullmatch(r"\d\d:\d\d:\d\d grüße from 0\n", capsys.readouterr().out)
    for rank in (0, 2):
        text = (tmp_path / f"new/folder/log_rank{rank}.txt").read_text(encoding="utf-8")
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d INFO grüße from {rank}\n", text)
    assert caplog.records == [], "nothing reaches the root logger"


def test_a_logger_made_again_writes_each_line_once_and_appends(tmp_path, name, capsys):
    former = create_logger(tmp_path, 0, name)
    former.info("first")
    files = [handler for handler in former.handlers if isinstance(handler, logging.FileHandler)]
    log = create_logger(tmp_path, 0, name)
    log.warning("second")
    log.debug("not shown")
    logger.note_fault(log, "all is lost")
    assert [file.stream for file in files] == [None], "closed"
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["first", "second"]
    written = (tmp_path / "log_rank0.txt").read_text()
    assert re.findall(r"[A-Z]+ .*", written) == [
        *("INFO first", "WARNING second", "DEBUG not shown", "ERROR all is lost")
    ]


def test_without_a_folder_there_is_no_file_and_other_ranks_are_silent(
    tmp_path, name, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    create_logger(None, 0, name).info("seen")
    create_logger(None, 1, name).error("not seen")
    captured = capsys.readouterr()
    assert captured.out.endswith("seen\n") and "not" not in captured.out + captured.err
    assert os.listdir(tmp_path) == []


def test_a_closed_console_does_not_end_the_run(tmp_path, name, monkeypatch):
    log = create_logger(tmp_path, 0, name)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.info("still here")
    assert "still here" in (tmp_path / "log_rank0.txt").read_text()


@pytest.mark.parametrize(
    ("switch", "plain", "careful"),
    [
        ("FORCE_COLOR", r"\x1b\[32m[\d:]{8}\x1b\[0m plain", r" \x1b\[33mcareful\x1b\[0m$"),
        ("NO_COLOR", r"[\d:]{8} plain", r"^[\d:]{8} careful$"),
    ],
)
def test_colours_are_for_the_console_only(switch, plain, careful, tmp_path, root):
    code = (
        "import logger; log = logger.create_logger('.'); log.info('plain'); log.warning('careful')"
    )
    keys = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
    environment = keys | {"PYTHONPATH": str(root), switch: "1"}
    command = [sys.executable, "-c", code]
    shown = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).splitlines()
    assert re.fullmatch(plain, shown[0]) and re.search(careful, shown[1])
    assert "\x1b" not in (tmp_path / "log_rank0.txt").read_text()


# Metrics


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_line_is_there_at_once_with_plain_numbers_and_nothing_that_the_clock_says(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, 0, {"images_per_second": 3.0}, loss=0.25, images=7)
    assert read(tmp_path) == [{"step": 1, "epoch": 0, "loss": 0.25, "images": 7}]
    numbers = {"a": torch.tensor(2.5), "b": np.float32(1.5), "c": np.int64(3)}
    writer.write(2, 0.5, **numbers, d=math.nan, e=-math.inf)
    expected = {"step": 2, "epoch": 0.5, "a": 2.5, "b": 1.5, "c": 3, "d": None, "e": None}
    assert read(tmp_path)[1] == expected


def test_a_resumed_run_has_no_step_twice(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 8):
        writer.write(step, 0, loss=step)
    writer.cut_back(5)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
    writer.write(6, 0, loss=60)
    again = MetricWriter(tmp_path)
    again.cut_back(6)
    again.write(7, 0, loss=70)
    assert [line["loss"] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 60, 70]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_metrics_that_cannot_be_written_are_a_warning(tmp_path):
    warnings: list[str] = []
    writer = MetricWriter(tmp_path, warnings.append)
    (tmp_path / "metrics.jsonl").mkdir()
    writer.write(7, 0, loss=1.0)
    assert len(warnings) == 1 and "metrics of step 7" in warnings[0] and writer.lines == 0


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files can't grow beyond a size: what fits of a write is written, then it is refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(resource is None, reason="a system without limits of file sizes")
@pytest.mark.parametrize("room", [0, 10])
def test_a_line_that_a_full_disk_cut_short_does_not_spoil_the_next(room, tmp_path):
    warnings: list[str] = []
    writer = MetricWriter(tmp_path, warnings.append)
    writer.write(1, 0, loss=1.0)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with full_disk(size + room):
        writer.write(2, 0, loss=2.0)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size + room
        writer.write(3, 0, loss=3.0)
    assert len(warnings) == 2
    for step in (4, 5):
        writer.write(step, 0, loss=4.0)
    assert [line["step"] for line in read(tmp_path)] == [1, 4, 5] and writer.lines == 3
    assert len(warnings) == 2


def test_a_name_that_is_no_text_is_logged_in_escapes(tmp_path, name, capsys):
    log = create_logger(tmp_path, 1, name)
    logger.note_fault(log, os.fsdecode(b"a/\xff.jpg is broken"))
    log.info("next")
    text = (tmp_path / "log_rank1.txt").read_text(encoding="utf-8")
    assert "a/\\udcff.jpg is broken\n" in text and text.endswith("INFO next\n")
    assert capsys.readouterr().err == ""


def test_cutting_back_by_lines_parts_an_update_from_the_evaluation_at_the_same_step(tmp_path):
    writer = MetricWriter(tmp_path)
    assert writer.lines == 0
    writer.write(5, 0, loss=1.0)
    lines = writer.lines
    writer.write(5, 1, top1=50.0)
    again = MetricWriter(tmp_path)
    assert (lines, writer.lines, again.lines) == (1, 2, 2)
    again.cut_back(5, lines)
    again.cut_back(5, 10)
    assert read(tmp_path) == [{"step": 5, "epoch": 0, "loss": 1.0}] and again.lines == 1


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 3, "ep',
        b'{"step": 3, "epoch": 0}',
        b"\0\0\0",
        b"[1]\n",
        b'{"epoch": 1}\n',
        b"\xff",
    ],
)
def test_a_line_cut_short_by_a_crash_is_removed(torn, tmp_path):
    whole = b'{"step": 1, "epoch": 0}\n{"step": 2, "epoch": 0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    MetricWriter(tmp_path).write(3, 0)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_an_untouched_file_is_not_rewritten_and_a_crash_leaves_the_old_one(tmp_path, monkeypatch):
    def crash(*names):
        raise KeyboardInterrupt

    writer = MetricWriter(tmp_path)
    for step in (1, 2):
        writer.write(step, 0)
    monkeypatch.setattr(os, "replace", crash)
    writer.cut_back(2)
    with pytest.raises(KeyboardInterrupt):
        writer.cut_back(1)
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_only_rank_0_writes_and_the_others_have_the_same_methods(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    writer = create_metric_writer(tmp_path / "run", rank=1, wandb_project="p", warn=pytest.fail)
    assert type(writer) is NullWriter
    writer.write(1, 0, loss=1.0)
    writer.cut_back(0)
    writer.close()
    assert os.listdir(tmp_path) == []
    writer = create_metric_writer(tmp_path / "run", warn=pytest.fail)
    writer.write(1, 0)
    writer.close()
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


# wandb

REAL_WANDB = """
import sys, logger
for start in (1, 3):
    writer = logger.create_metric_writer("run", 0, "project", "name", {"epochs": 3}, warn=sys.exit)
    writer.cut_back(start - 1)
    for step in (start, start + 1, start + 2):
        writer.write(step, 0.5, loss_of_training=step / 8)
    writer.close()
    writer.close()
"""


def test_a_real_wandb_run_offline_is_continued_under_its_id(tmp_path, root):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(root), "HOME": str(tmp_path / "home")}
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", REAL_WANDB]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text()
    runs = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}
    assert all(b"loss_of_training" in path.read_bytes() for path in runs)
    assert [line["step"] for line in read(tmp_path / "run")] == [1, 2, 3, 4, 5]


class FakeWandb:
    """What is asked of wandb and of its run; `fails` at one of the calls."""

    def __init__(self, fails=""):
        self.calls = []
        for call in ("init", "define_metric", "log", "finish"):
            setattr(self, call, self._noting(call, is_failing=call == fails))

    def Settings(self, **settings):
        return settings

    def _noting(self, call, is_failing):
        def noted(*values, **options):
            if is_failing:
                raise RuntimeError("connection lost\nsecond line")
            self.calls.append((call, *values, *options.items()))
            return self

        return noted


def test_wandb_gets_the_run_and_its_numbers(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "wandb_id.txt").write_text("known")
    writer = create_metric_writer(tmp_path, 0, "tinyvit", "5m/default", {"SEED": 1}, pytest.fail)
    writer.write(4, 1, {"images_per_second": 3.0}, loss=torch.tensor(0.5), bad=math.inf)
    for _ in range(2):
        writer.close()
    (_, *options), *calls = wandb.calls
    wanted = {"project": "tinyvit", "name": "5m/default", "config": {"SEED": 1}, "id": "known"}
    assert dict(options).items() >= (wanted | {"resume": "allow", "dir": str(tmp_path)}).items()
    numbers = {"step": 4, "epoch": 1, "loss": 0.5, "bad": math.inf, "images_per_second": 3.0}
    assert calls == [
        ("define_metric", "*", ("step_metric", "step")),
        ("log", numbers),
        ("finish",),
    ]


@pytest.mark.parametrize(
    ("wandb", "message"),
    [
        (None, r"wandb could not start \(.+\): metrics go to .+metrics.jsonl alone; `pip install"),
        (FakeWandb("init"), r"wandb could not start \(connection lost\): metrics go to"),
        (FakeWandb("log"), r"wandb has failed \(connection lost\): all metrics are in .+\.jsonl"),
        (FakeWandb("finish"), r"wandb has failed \(connection lost\)"),
    ],
)
def test_a_wandb_that_fails_is_one_warning(wandb, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    warnings: list[str] = []
    writer = create_metric_writer(tmp_path, 0, "project", warn=warnings.append)
    for step in (1, 2):
        writer.write(step, 0, loss=1.0)
    writer.close()
    assert len(warnings) == 1 and re.match(message, warnings[0])
    assert len(read(tmp_path)) == 2
    assert (tmp_path / "wandb_id.txt").exists() == ("has failed" in message)


# Training


def test_a_report_has_speed_wait_and_the_time_that_is_left(tmp_path, monkeypatch):
    clock = iter([100.0, 100.0, 105.0, 115.0])
    monkeypatch.setattr(logger.time, "perf_counter", lambda: next(clock))
    lines: list[str] = []
    writer = MetricWriter(tmp_path)
    log = logger.TrainingLog(lines.append, writer, epochs=3, images_per_update=8, update=20)
    log.report(25, 1, 5, 15, {"loss": 3.0}, [0.1, 0.2], 0, waited=2.0, memory_gb=1.5)
    log.report(
        30, 1, 10, 15, {"loss": 2.0, "top1": 3e-10}, [0.1, 0.2], 2, waited=3.0, memory_gb=1.5
    )
    assert lines == [
        "epoch 2/3, update 5/15: loss 3, lr 0.2; 8.0 images/s, data wait 40%, 1.50 GB,"
        " 0:00:25 left",
        "epoch 2/3, update 10/15: loss 2, top1 0, lr 0.2, 2 updates skipped; 4.0 images/s,"
        " data wait 10%, 1.50 GB, 0:00:30 left",
    ]
    numbers = {"loss": 2.0, "top1": 3e-10, "lr": 0.2, "lr_min": 0.1, "skipped": 2}
    assert read(tmp_path)[1] == {"step": 30, "epoch": 1 + 10 / 15, **numbers}


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_there_are_lines_at_intervals(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(logger.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    notes = iter("ab")
    items = progress("5678", None, "saving", "img", lines.append, 2, note=lambda: next(notes))
    assert list(items) == list("5678")
    assert lines == [
        "saving:  50% 2/4 [00:02<00:02,  1.00img/s, a]",
        "saving: 100% 4/4 [00:04<00:00,  1.00img/s, b]",
    ]
    assert sys.stderr.getvalue() == ""


def test_without_a_terminal_a_first_item_that_does_not_come_is_told_of(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(logger.awaited.__wrapped__, "__defaults__", (0.0,))
    told, lines = threading.Event(), []

    def log(line: str) -> None:
        lines.append(line)
        told.set()

    def slow():
        assert told.wait(20)
        yield 1

    assert list(progress(slow(), None, "epoch 3", "batches", log)) == [1]
    assert lines == ["waiting for the first batches (epoch 3)"]


def test_a_loop_of_unknown_length_and_a_quick_one(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines: list[str] = []
    assert list(progress(iter("ab"), log=lines.append, interval=0)) == ["a", "b"]
    assert [line.partition(" [")[0] for line in lines] == ["1it", "2it"]
    assert list(progress(range(1000), log=pytest.fail)) == list(range(1000))
    assert list(progress([], total=0, log=pytest.fail, interval=0)) == []


def test_on_a_terminal_there_is_a_bar_above_which_lines_are_logged(name, monkeypatch):
    terminal, out = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", out)
    log = create_logger(None, 0, name)
    for number in progress(range(3), description="epoch 1", log=pytest.fail, interval=0):
        log.info("line %d", number)
    assert "epoch 1" in terminal.getvalue() and "/3" in terminal.getvalue()
    assert re.findall(r"line \d", out.getvalue()) == ["line 0", "line 1", "line 2"]


def test_progress_of_other_ranks_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(iter([1, 2]), log=pytest.fail, interval=0, enabled=False)) == [1, 2]
    assert sys.stderr.getvalue() == ""


def test_leaving_a_loop_early_clears_its_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    items = progress(range(100))
    next(items)
    before = sys.stderr.getvalue()
    items.close()
    assert re.fullmatch(r"\r +\r", sys.stderr.getvalue().removeprefix(before))


def test_what_takes_long_says_what_is_waited_for():
    told, said = threading.Event(), []

    def log(line: str) -> None:
        said.append(line)
        told.set()

    with awaited("the first batch", log, 0.0) as has_come:
        assert told.wait(20)
        has_come()
    with awaited("nothing", log, 3600.0):
        pass
    with awaited("something that has come", log, 3600.0) as has_come:
        has_come()
    assert said == ["waiting for the first batch"]
