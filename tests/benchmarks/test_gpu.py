"""`python -m benchmarks.gpu` goes its whole way in small on a CPU; its checks can fail, its parts
are cut in time, and its page tells all.
"""

import argparse
import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_checks, gpu_page
from tests.support.helpers import ROOT

SMALL = ["--quick", "--device", "cpu"]
HEADINGS = [
    "## Checks `waiting` `bits` `bias` `trains` `exact` `ranks`",
    "## The model beside timm's `models`",
    "## A training step `training`",
    "## Labels, stored logits, online teacher `epochs`",
    "## Saving `saving`",
    "## From JPEG files to the step `executors`",
    "## Aims",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run of all parts, and what it said."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", *SMALL, "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return folder, done.stderr


def test_all_parts_are_whole(whole):
    folder, told = whole
    found = json.loads((folder / "gpu.json").read_text())
    parts = found["parts"]
    assert list(parts) == list(gpu.PARTS) and not any(part["note"] for part in parts.values())
    assert gpu_page.faults(parts) == []
    verdicts = {k: v for name in gpu.CHECKS for k, v in parts[name]["found"].items()}
    assert len(verdicts) == 22 and all(value["passed"] is True for value in verdicts.values())
    assert set(parts["models"]["found"]) == {"5m evaluation", "5m training step"}
    assert set(parts["training"]["found"]) == {"tiny", "tiny compiled"}
    assert set(parts["epochs"]["found"]["seconds_per_epoch"]) == {"labels", "stored", "online"}
    assert set(parts["saving"]["found"]["images_per_second"]) == {"without writing", "saving"}
    trainings = {"pillow, 0 workers", "device, 0 workers", "device, 0 workers, compiled"}
    assert trainings < set(parts["executors"]["found"])
    assert told.count("  ok ") == 22 and all(f"\n{name}: " in f"\n{told}" for name in parts)
    # logs are kept, what parts have written is not
    left = {path.name for path in folder.iterdir()}
    assert left == {"gpu.json", "GPU.md", *(f"{name}.log" for name in ("machine", *parts))}


def test_the_page_has_every_section(whole):
    text = (whole[0] / "GPU.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == HEADINGS
    assert "these figures mean nothing" in text and "Not complete" not in text
    for section in text.split("\n## ")[1:]:
        assert section.count("\n| ") >= 3 or section.startswith("Saving"), section
    assert "images/s" in text.partition("## Saving")[2]


def test_one_part_again_leaves_the_others(whole, tmp_path, capsys):
    found = json.loads((whole[0] / "gpu.json").read_text())
    expected = copy.deepcopy(found)
    window = found["parts"]["bias"]["found"]["bias gradient, window 7"]
    window["passed"] = False
    again, file = [*SMALL, "--folder", str(tmp_path), "--only", "bias"], tmp_path / "gpu.json"
    file.write_text(json.dumps({**found, "machine": {**found["machine"], "gpu": "another"}}))
    before = file.read_bytes()
    assert gpu.main(again) == 2
    assert f"error: {file} was measured elsewhere" in capsys.readouterr().err
    assert file.read_bytes() == before
    file.write_text(json.dumps(found))
    assert gpu.main(again) == 0
    found = json.loads(file.read_text())
    for values in (found, expected):
        del values["parts"]["bias"]["seconds"]
    assert found == expected


def test_without_a_gpu_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--folder", str(tmp_path)]) == 2
    line = "error: no GPU is visible to PyTorch; --device cpu --quick needs none\n"
    assert capsys.readouterr() == ("", line)


def test_all_parts_end_in_20_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) < 20 * 60


# ---------------------------------------------------------------- parts


def slow(options, folder):
    yield {"first": 1}
    sleeper = subprocess.Popen(["sleep", "600"])
    (options.folder / "pid").write_text(str(sleeper.pid))
    yield {"second": 2}
    time.sleep(600)


def breaks(options, folder):
    yield {"first": 1}
    raise ValueError("what\nhappened")


def dies(options, folder):
    yield {"first": 1}
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def ends(options, folder):
    yield {"first": 1}


def isolated(run, folder: Path, seconds: float = 60) -> tuple[str, dict]:
    found = {}
    options = argparse.Namespace(folder=folder, quick=False)
    return gpu.isolated(run, options, "part", seconds, found.update), found


def test_a_part_is_cut_with_all_its_processes_and_what_it_found_is_kept(tmp_path):
    assert isolated(slow, tmp_path, 1) == ("cut after 1 s", {"first": 1, "second": 2})
    status = Path("/proc", (tmp_path / "pid").read_text(), "status")
    assert not status.exists() or re.search(r"State:\s+[ZX]", status.read_text())


def test_a_part_that_breaks_says_why(tmp_path):
    assert isolated(breaks, tmp_path) == ("ValueError: what happened", {"first": 1})
    assert "raise ValueError" in (tmp_path / "part.log").read_text()
    assert isolated(dies, tmp_path) == ("ended with exit code -9", {"first": 1})
    assert (tmp_path / "part.log").read_text() == "last words\n"
    assert isolated(ends, tmp_path) == ("", {"first": 1})


def test_what_is_missing_is_told_on_the_page(whole):
    found = json.loads((whole[0] / "gpu.json").read_text())
    parts = found["parts"]
    parts["bits"]["found"]["bits of default"] = {"passed": False, "line": "3 of 4 differ"}
    parts["trains"] |= {"found": {}, "note": "cut after 130 s"}
    parts["ranks"]["found"] = {"two processes": {"passed": None, "line": "not tried: one GPU"}}
    parts["models"]["note"] = "cut after 300 s"
    del parts["models"]["found"]["5m training step"]
    parts["epochs"] |= {"found": {}, "note": "OutOfMemoryError: x|y"}
    del parts["saving"]
    expected = ["bits of default", "trains: cut after 130 s", "epochs: OutOfMemoryError: x|y"]
    assert gpu_page.faults(parts) == expected
    text = gpu_page.page(found["machine"], parts)
    for line in (
        "| bits of default | **FAILS** | 3 of 4 differ |",
        "| two processes | no verdict | not tried: one GPU |",
        "**Not complete**: `trains`: cut after 130 s.",
        "**Not complete**: `models`: cut after 300 s.",
        "**Not complete**: `epochs`: OutOfMemoryError: x|y.",
        "**Not complete**: `saving` was not run.",
        "| 5M's training speed over timm's, compiled | at least 1.1 | – | – |",
    ):
        assert line in text.splitlines(), line
    assert [line for line in text.splitlines() if line.startswith("## ")] == HEADINGS


def test_the_page_shows_what_was_measured_on_a_gpu():
    """Medians become images a second of each side's quickest mode."""
    seconds = {"ours": 0.1, "timm": 0.16, "timm channels-last": 0.15, "ours compiled": 0.05}
    row = {
        "task": "training step",
        "batch": 128,
        "seconds": {name: {"median": value} for name, value in seconds.items()},
        "memory_gb": {"ours": 5.25, "timm": 7.0},
    }
    row["seconds"]["timm compiled"] = {"median": 0.06}
    step = {"images_per_second": 2000.0, "step_ms": 64.0, "model_ms": 62.0}
    step |= {"peak_memory_gb": 6.5, "outside_the_model": 0.03125}
    fed = {"images_per_second": 3000.0, "data_wait": 0.002}
    parts = {
        name: {"is_check": False, "note": "", "found": values}
        for name, values in {
            "models": {"5m training step": row},
            "training": {"5m": step},
            "executors": {"device, 8 workers": fed, "step_ms": 64.0},
        }.items()
    }
    machine = {"gpus": 1, "gpu": "NVIDIA X", "cores": 16, "processor": "Y", "quick": False}
    text = gpu_page.page({**machine, "python": "3.12", "torch": "2.11"}, parts)
    for line in (
        "1 x NVIDIA X, 16 cores of Y, Python 3.12, torch 2.11.",
        "| 5m training step, batch 128 | 1,280 / 853 | 1.5 | 2,560 / 2,133 | 1.2 | 5.25 / 7 |",
        "| 5m | 2,000 | 64 | 62 | 6.5 | 3.1% |",
        "| device, 8 workers | 3,000 | 0.2% |",
        "| 5M's training speed over timm's, compiled | at least 1.1 | 1.2 | met |",
        "| the same, eager | at least 1.3 | 1.5 | met |",
        "| a step of 5M outside the model | at most 0.05 | 0.0312 | met |",
        "| waiting for data, 8 workers, device | at most 0.02 | 0.002 | met |",
    ):
        assert line in text.splitlines(), line


# ---------------------------------------------------------------- checks fail where they should

ARGS = argparse.Namespace(device="cpu", batch_size=2)


def failing(check, args=ARGS, folder: Path = Path()) -> list[str]:
    verdicts = [verdict for found in check(args, folder) for verdict in found.items()]
    assert verdicts
    return [name for name, verdict in verdicts if not verdict["passed"]]


def test_a_picture_of_other_bits_is_found(monkeypatch):
    decode = gpu_checks.AugmentDecoder.decode_batch

    def changed(self, *args) -> Tensor:
        batch = decode(self, *args)
        batch[1, 2, 3, 4] += 2**-20
        return batch

    assert failing(gpu_checks.bits) == []
    monkeypatch.setattr(gpu_checks.AugmentDecoder, "decode_batch", changed)
    assert failing(gpu_checks.bits) == [f"bits of {name}" for name in gpu_checks.RECIPES]


def test_a_bias_gradient_summed_in_bfloat16_is_found(monkeypatch):
    """As it would be if the table were cast before its values are spread."""
    select = Tensor.index_select

    class Coarse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, table, offsets):
            ctx.save_for_backward(offsets)
            ctx.size = table.shape
            return select(table, 1, offsets)

        @staticmethod
        def backward(ctx, gradient):
            total = torch.zeros(ctx.size, dtype=torch.bfloat16)
            terms = gradient.bfloat16()
            for place, term in zip(ctx.saved_tensors[0].tolist(), terms.unbind(1)):
                total[:, place] += term
            return total.to(gradient.dtype), None

    monkeypatch.setattr(gpu_checks, "WINDOWS", (7,))
    assert failing(gpu_checks.bias_gradient) == []
    monkeypatch.setattr(Tensor, "index_select", lambda t, _, offsets: Coarse.apply(t, offsets))
    assert failing(gpu_checks.bias_gradient) == ["bias gradient, window 7"]


def test_where_a_step_waits_is_named():
    def asks() -> None:
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    device = torch.device("cpu")
    assert gpu_checks.fault_without_waiting(lambda: None, device) == ""
    line = asks.__code__.co_firstlineno + 1
    expected = f"test_gpu.py:{line}: called a synchronizing CUDA operation"
    assert gpu_checks.fault_without_waiting(asks, device) == expected


def test_differences_of_checkpoints_are_named():
    one = {"a": torch.ones(3), "b": [1, {"c": torch.zeros(2), "d": 0.5}], "e": None}
    other = copy.deepcopy(one)
    assert gpu_checks.differences(one, other, "model") == []
    other["a"][2] += 2**-23
    other["b"][1]["d"] = 0.25
    assert gpu_checks.differences(one, other, "model") == ["model.a", "model.b.1.d"]
    del other["e"]
    assert gpu_checks.differences(one, other, "model") == ["model"]
