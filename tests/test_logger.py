"""Logs, metrics and progress, with files as they are left by crashes and with a real wandb in
offline mode.
"""

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import logger
from logger import (
    MetricWriter,
    NullWriter,
    create_logger,
    create_metric_writer,
    note_fault,
    progress,
)


@pytest.fixture
def name(request):
    """A logger's name of this test's own, whose files are closed afterwards."""
    yield request.node.name
    log = logging.getLogger(request.node.name)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


# ---- logs


def test_rank_0_speaks_on_the_console_and_every_rank_in_its_file(tmp_path, name, capsys):
    for rank in (0, 2):
        create_logger(tmp_path / "new" / "folder", rank, name).info("grüße from %d", rank)
    assert re.fullmatch(r"\d\d:\d\d:\d\d grüße from 0\n", capsys.readouterr().out)
    for rank in (0, 2):
        text = (tmp_path / f"new/folder/log_rank{rank}.txt").read_text(encoding="utf-8")
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d INFO grüße from {rank}\n", text)


def test_a_logger_made_again_writes_each_line_once_and_appends(tmp_path, name, capsys):
    former = create_logger(tmp_path, 0, name)
    former.info("first")
    files = [handler for handler in former.handlers if isinstance(handler, logging.FileHandler)]
    log = create_logger(tmp_path, 0, name)
    log.warning("second")
    log.debug("not shown")
    assert [file.stream for file in files] == [None]  # closed
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "first",
        "second",
    ]
    written = [
        line.split(" ", 2)[2] for line in (tmp_path / "log_rank0.txt").read_text().splitlines()
    ]
    assert written == ["INFO first", "WARNING second", "DEBUG not shown"]  # but kept


def test_without_a_folder_there_is_no_file_and_other_ranks_are_silent(
    tmp_path, name, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    create_logger(None, 0, name).info("seen")
    create_logger(None, 1, name).error("not seen")
    captured = capsys.readouterr()
    assert captured.out.endswith("seen\n") and "not" not in captured.out + captured.err
    assert os.listdir(tmp_path) == []


def test_a_fault_is_noted_in_the_file_alone(tmp_path, name, capsys):
    note_fault(create_logger(tmp_path, 0, name), "all is lost")
    assert capsys.readouterr().out == "" and (tmp_path / "log_rank0.txt").read_text().endswith(
        " ERROR all is lost\n"
    )


def test_nothing_reaches_the_root_logger(tmp_path, name, caplog):
    create_logger(tmp_path, 0, name).info("mine")
    assert caplog.records == []


def test_a_closed_console_does_not_end_the_run(tmp_path, name, monkeypatch):
    log = create_logger(tmp_path, 0, name)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.info("still here")
    assert "still here" in (tmp_path / "log_rank0.txt").read_text()


def test_colours_are_for_the_console_only(tmp_path, root):
    code = (
        "import logger; log = logger.create_logger('.', 0); log.info('plain');"
        " log.warning('careful')"
    )
    lines = {}
    for key in ("FORCE_COLOR", "NO_COLOR"):
        environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
        environment |= {"PYTHONPATH": str(root), key: "1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        lines[key] = done.stdout.splitlines()
    assert re.fullmatch(r"\x1b\[32m\d\d:\d\d:\d\d\x1b\[0m plain", lines["FORCE_COLOR"][0])
    assert lines["FORCE_COLOR"][1].endswith(" \x1b[33mcareful\x1b[0m")
    assert "\x1b" not in "".join(lines["NO_COLOR"]) + (tmp_path / "log_rank0.txt").read_text()


# ---- metrics


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_line_is_there_at_once_with_step_and_epoch_and_nothing_that_the_clock_says(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, 0, {"images_per_second": 3.0}, loss=0.25, images=7)
    assert read(tmp_path) == [{"step": 1, "epoch": 0, "loss": 0.25, "images": 7}]
    writer.write(
        2, 0.5, a=torch.tensor(2.5), b=np.float32(1.5), c=np.int64(3), d=float("nan"), e=-math.inf
    )
    assert read(tmp_path)[1] == {
        "step": 2,
        "epoch": 0.5,
        "a": 2.5,
        "b": 1.5,
        "c": 3,
        "d": None,
        "e": None,
    }
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    writer.close()


def test_a_resumed_run_has_no_step_twice(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 8):
        writer.write(step, 0, loss=step)
    writer.cut_back(5)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
    writer.write(6, 0, loss=60)
    writer.close()
    writer = MetricWriter(tmp_path)
    writer.cut_back(6)
    writer.write(7, 0, loss=70)
    writer.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
        (s, s) for s in range(1, 6)
    ] + [(6, 60), (7, 70)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_metrics_that_cannot_be_written_are_a_warning(tmp_path):
    said = []
    writer = MetricWriter(tmp_path, warn=said.append)
    (tmp_path / "metrics.jsonl").mkdir()
    writer.write(7, 0, loss=1.0)
    assert (
        len(said) == 1
        and said[0].startswith("the metrics of step 7 could not be written: ")
        and writer.lines == 0
    )


def test_cutting_back_by_lines_parts_an_update_from_the_evaluation_at_the_same_step(tmp_path):
    writer = MetricWriter(tmp_path)
    assert writer.lines == 0
    writer.write(5, 0, loss=1.0)
    lines = writer.lines
    writer.write(5, 1, top1=50.0)
    assert (lines, writer.lines) == (1, 2)
    writer.close()
    writer = MetricWriter(tmp_path)
    assert writer.lines == 2
    writer.cut_back(5, lines)
    writer.cut_back(5, 10)
    assert read(tmp_path) == [{"step": 5, "epoch": 0, "loss": 1.0}] and writer.lines == 1
    writer.close()


@pytest.mark.parametrize(
    "torn",
    [
        '{"step": 3, "ep',
        '{"step": 3, "epoch": 0}',
        "\x00\x00\x00",
        "[1]\n",
        '{"epoch": 1}\n',
        "\udcff",
    ],
)
def test_a_line_cut_short_by_a_crash_is_removed(torn, tmp_path):
    whole = b'{"step": 1, "epoch": 0}\n{"step": 2, "epoch": 0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn.encode(errors="surrogateescape"))
    writer = MetricWriter(tmp_path)
    writer.write(3, 0)
    writer.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_an_untouched_file_is_not_rewritten(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, 0)
    inode = os.stat(tmp_path / "metrics.jsonl").st_ino
    writer.cut_back(1)
    assert os.stat(tmp_path / "metrics.jsonl").st_ino == inode
    writer.close()


def test_a_crash_while_cutting_back_leaves_the_old_file(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path)
    for step in (1, 2):
        writer.write(step, 0)

    def crash(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
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
    public = {key for key in vars(MetricWriter) if not key.startswith("_")}
    assert public | {"lines"} == {key for key in vars(NullWriter) if not key.startswith("_")}
    writer = create_metric_writer(tmp_path / "run")
    writer.write(1, 0)
    writer.close()
    assert os.listdir(tmp_path / "run") == ["metrics.jsonl"]


# ---- wandb

REAL_WANDB = """
import sys, logger
for start in (1, 3):
    writer = logger.create_metric_writer("run", 0, "project", "name", {"epochs": 3}, warn=lambda text: sys.exit(text))
    writer.cut_back(start - 1)
    for step in (start, start + 1, start + 2):
        writer.write(step, 0.5, loss_of_training=step / 8)
    writer.close()
    writer.close()
"""


def test_a_real_wandb_run_offline_is_continued_under_its_id(tmp_path, root):
    keys = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = {
        **keys,
        "PYTHONPATH": str(root),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", REAL_WANDB],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "run" / "wandb_id.txt").read_text()
    runs = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}
    assert all(b"loss_of_training" in path.read_bytes() for path in runs)
    assert [line["step"] for line in read(tmp_path / "run")] == [1, 2, 3, 4, 5]


class FakeRun:
    """What is asked of a wandb run."""

    def __init__(self, fails=()):
        self.lines, self.calls, self.fails = [], [], fails

    def define_metric(self, name, step_metric):
        self.calls.append((name, step_metric))

    def log(self, values):
        if "log" in self.fails:
            raise RuntimeError("connection lost\nsecond line")
        self.lines.append(values)

    def finish(self):
        if "finish" in self.fails:
            raise RuntimeError("connection lost")
        self.calls.append("finish")


def fake_wandb(monkeypatch, start):
    module = types.SimpleNamespace(Settings=lambda **settings: settings, init=start)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_gets_the_run_and_its_numbers(tmp_path, monkeypatch):
    started, run = [], FakeRun()
    fake_wandb(monkeypatch, lambda **options: started.append(options) or run)
    (tmp_path / "wandb_id.txt").write_text("known")
    writer = create_metric_writer(tmp_path, 0, "tinyvit", "5m/default", {"SEED": 1}, pytest.fail)
    writer.write(4, 1, loss=torch.tensor(0.5), bad=math.inf)
    writer.close()
    options = started[0]
    assert (options["project"], options["name"], options["config"], options["id"]) == (
        "tinyvit",
        "5m/default",
        {"SEED": 1},
        "known",
    )
    assert (options["resume"], options["dir"]) == ("allow", str(tmp_path))
    assert run.lines == [{"step": 4, "epoch": 1, "loss": 0.5, "bad": math.inf}]
    assert run.calls == [("*", "step"), "finish"]


def test_wandb_is_not_imported_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    create_metric_writer(tmp_path, 0, warn=pytest.fail).close()


def unreachable(**options):
    raise RuntimeError("timed out\nmore")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            None,
            (
                r"wandb can't be imported \(.+\): metrics go to .+metrics.jsonl alone; pip install"
                r" wandb"
            ),
        ),
        (
            unreachable,
            (
                r"wandb could not start \(timed out\): metrics go to .+metrics.jsonl alone; `wandb"
                r" login`, or WANDB_MODE=offline"
            ),
        ),
    ],
)
def test_a_missing_or_unreachable_wandb_is_one_warning(start, message, tmp_path, monkeypatch):
    if start:
        fake_wandb(monkeypatch, start)
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    writer = create_metric_writer(tmp_path, 0, "project", warn=warnings.append)
    for step in (1, 2):
        writer.write(step, 0, loss=1.0)
    writer.close()
    assert len(warnings) == 1 and re.search(message, warnings[0])
    assert len(read(tmp_path)) == 2 and not (tmp_path / "wandb_id.txt").exists()


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("log", r"wandb has failed \(connection lost\): metrics go to .+ alone from now on"),
        ("finish", "wandb could not finish"),
    ],
)
def test_a_wandb_that_fails_later_is_one_warning(fails, message, tmp_path):
    warnings: list[str] = []
    writer = MetricWriter(tmp_path, FakeRun((fails,)), warnings.append)
    for step in (1, 2):
        writer.write(step, 0, loss=1.0)
    writer.close()
    assert len(warnings) == 1 and re.search(message, warnings[0])
    assert len(read(tmp_path)) == 2


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_there_are_lines_at_intervals(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(logger.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    assert list(
        progress([5, 6, 7, 8], description="saving", unit="img", log=lines.append, interval=2)
    ) == [5, 6, 7, 8]
    assert lines == [
        "saving: 2 of 4 img (50%), 1.0 img/s, 0:00:02 left",
        "saving: 4 of 4 img (100%), 1.0 img/s, 0:00:00 left",
    ]
    assert sys.stderr.getvalue() == ""


def test_a_loop_of_unknown_length_and_a_quick_one(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines: list[str] = []
    assert list(progress(iter("ab"), log=lines.append, interval=0)) == ["a", "b"]
    assert [re.sub(r"[\d.]+ it/s", "R it/s", line) for line in lines] == [
        "1 it, R it/s",
        "2 it, R it/s",
    ]
    assert list(progress(range(1000), log=pytest.fail)) == list(range(1000))
    assert list(progress([], total=0, log=pytest.fail, interval=0)) == []


def test_on_a_terminal_there_is_a_bar_above_which_lines_are_logged(tmp_path, name, monkeypatch):
    terminal, out = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", out)
    log = create_logger(None, 0, name)
    for number in progress(range(3), description="epoch 1", log=pytest.fail, interval=0):
        log.info("line %d", number)
    assert "epoch 1" in terminal.getvalue() and "/3" in terminal.getvalue()
    assert [line.split(" ")[-2:] for line in out.getvalue().splitlines()] == [
        ["line", "0"],
        ["line", "1"],
        ["line", "2"],
    ]


def test_progress_of_other_ranks_is_silent(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(iter([1, 2]), log=pytest.fail, interval=0, enabled=False)) == [1, 2]
    assert terminal.getvalue() == ""


def test_leaving_a_loop_early_closes_its_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    closed = []
    monkeypatch.setattr(
        logger.tqdm, "close", lambda self, close=logger.tqdm.close: closed.append(close(self))
    )
    items = progress(range(100))
    next(items)
    items.close()
    assert closed
