"""Everything that wants a GPU, in one command of at most 20 minutes: first the checks, then the
figures, as one JSON and as the page docs/GPU.md.

    python -m benchmarks.gpu                              # all parts
    python -m benchmarks.gpu --only models training       # these again, beside what the JSON holds
    python -m benchmarks.gpu --quick --device cpu         # the whole way in small, without a GPU

Each part runs in a process of its own and has its seconds: what it found until then is kept, and
that it was cut is told. JSON and page are written after each finding, the output of parts is kept
in --folder. Exit codes: 0 all checks hold, 1 one fails or a part broke, 2 there is no GPU."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import distill, executor, gpu_checks, gpu_page, model, saving
from benchmarks.timing import machine
from utils import choose_device, choose_kernels, peak_memory

CHECKED = "--student 5m --size 224 --images 800 --batch-size 32 --workers 8".split()
CHECKED_QUICK = "--student tiny --size 48 --images 24 --batch-size 4 --workers 0".split()
VARIANTS = ("5m", "11m", "21m")


@dataclass(frozen=True)
class Part:
    """A piece of the whole that can be run alone."""

    seconds: int  # that it may take, beside what the parts before have left
    run: Callable[[argparse.Namespace, Path], Iterator[dict[str, Any]]]


def checked(check: Callable[..., Iterator[dict]]) -> Callable[..., Iterator[dict]]:
    """A check as the run of a part."""

    def run(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
        words = CHECKED_QUICK if options.quick else CHECKED
        args = distill.parse([*words, "--repeats", "1", "--warmup", "0"])
        args.device, args.gpus = options.device, options.gpus
        return check(args, folder)

    return run


def models(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """Ours beside timm's."""
    choose_kernels(False, choose_device(options.device))
    words = ["--device", options.device, "--dtypes", "bfloat16", "--seconds"]
    words += "0 --batch 2 --image-size 64".split() if options.quick else "4 --batch 128".split()
    # a compiled row holds the eager one too: that one comes first in case there is no time
    for flag in ("--no-compile", "--compile")[options.quick :]:
        for variant in VARIANTS[: 1 if options.quick else 3]:
            args = model.parse([*words, "--variant", variant, flag])
            for row in model.measure(args):
                yield {f"{variant} {row['task']}": {**row, "batch": args.batch}}


def training(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """A whole step of main.py whose batch lies ready, and what of it is not the model's."""
    variants = [(variant, False) for variant in VARIANTS] + [("5m", True)]
    if options.quick:
        variants = [("tiny", False), ("tiny", True)]
    batch, size = (4, 48) if options.quick else (128, 224)
    device = choose_device(options.device)
    for variant, is_compiled in variants:
        words = f"--size {size} --batch-size {batch} --images {batch} --workers 0".split()
        args = distill.parse([*words, "--device", options.device])
        compiled = ["TRAIN.COMPILE", str(is_compiled)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = executor.step_times(
            [*distill.options(args, folder, variant), *compiled, "TAG", "step"], device
        )
        name = f"{variant} compiled" if is_compiled else variant
        outside = 1 - found["model_ms"] / found["step_ms"]
        yield {
            name: {
                **found,
                "images_per_second": 1000 * batch / found["step_ms"],
                "outside_the_model": outside,
                "peak_memory_gb": peak_memory(device),
            }
        }


def epochs(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """An epoch by labels, from a store, with the teacher in the loop."""
    words = "--student 5m --teacher timm:convnext_base --size 224 --images 6144 --batch-size 128"
    words += " --workers 8 --repeats 3"
    if options.quick:
        words = "--size 48 --images 8 --batch-size 4 --workers 0 --repeats 1 --warmup 0"
        words += " --start fork" if options.device == "cpu" else ""
    yield distill.benchmark(distill.parse([*words.split(), "--device", options.device]), folder)


def saved(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """The teacher's loop with and without a store."""
    words = "--model 21m --batch-size 128 --batches 10 --repeats 6"
    if options.quick:
        words = "--model 5m --batch-size 2 --batches 1 --repeats 1 --classes 200 --topk 10"
    yield saving.measure(saving.parse([*words.split(), "--device", options.device]))


def trainings(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """Whole trainings from JPEG files, with both executors."""
    words = "--batch 256 --images 16384 --steps 24 --workers 4 8 16 --compiled"
    if options.quick:
        words = "--batch 4 --images 16 --steps 2 --workers 0 --model tiny --compiled"
    yield from executor.measure(executor.parse([*words.split(), "--device", options.device]))


CHECKS = {
    "waiting": Part(50, checked(gpu_checks.waiting)),
    "bits": Part(40, checked(gpu_checks.bits)),
    "bias": Part(25, checked(gpu_checks.bias_gradient)),
    "trains": Part(130, checked(gpu_checks.trains)),
    "exact": Part(160, checked(gpu_checks.exact)),
    "ranks": Part(85, checked(gpu_checks.ranks)),
}
FIGURES = {
    "models": Part(300, models),
    "training": Part(90, training),
    "epochs": Part(120, epochs),
    "saving": Part(45, saved),
    "executors": Part(145, trainings),
}
PARTS = CHECKS | FIGURES


def isolated(
    run: Callable[[argparse.Namespace, Path], Iterator[dict]],
    options: argparse.Namespace,
    name: str,
    seconds: float,
    take: Callable[[dict], None],
) -> str:
    """Run a part in a fresh process, `take` what it finds; what went wrong, if anything did."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # a fork, so that imports are paid for once; this process never touches CUDA
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_work, args=(run, options, name, sender))
    process.start()
    sender.close()
    end, note = time.monotonic() + seconds, f"cut after {seconds:.0f} s"
    try:
        while time.monotonic() < end:
            if receiver.poll(0.1):
                found = receiver.recv()
                if isinstance(found, str):
                    return found
                take(found)
            elif not process.is_alive():
                return f"ended with exit code {process.exitcode}"
        return note
    except EOFError:
        process.join()
        return f"ended with exit code {process.exitcode}"
    finally:
        process.kill()
        with suppress(ProcessLookupError):  # its own processes
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _work(run: Callable, options: argparse.Namespace, name: str, sender: Connection) -> None:
    os.setsid()  # it and its own processes can be ended together
    folder = options.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if options.quick:
        torch.compiler.set_stance("force_eager")  # compiling takes minutes on a CPU
        torch.set_num_threads(1)  # forks and more threads do not go together
    fault = ""
    with open(f"{folder}.log", "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        for descriptor in (1, 2):  # of its processes
            os.dup2(log.fileno(), descriptor)
        try:
            for found in run(options, folder):
                sender.send(found)
        except BaseException as error:
            traceback.print_exc()
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    shutil.rmtree(folder, ignore_errors=True)
    sender.send(fault)


def describe(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """The machine, which only a process that may use CUDA can tell."""
    yield {
        **machine(),
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "device": options.device,
        "quick": options.quick,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=[], metavar="PART", help=", ".join(PARTS))
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--quick", action="store_true", help="tiny models and a few steps: figures mean nothing")
    add("--folder", type=Path, default=Path("output/gpu"), help="for logs and what parts write")
    add("--json", type=Path, help="default: benchmarks/results/gpu.json, with --quick in --folder")
    add("--page", type=Path, help="default: docs/GPU.md, with --quick in --folder")
    options = parser.parse_args(argv)
    options.json = options.json or (
        options.folder / "gpu.json" if options.quick else Path("benchmarks/results/gpu.json")
    )
    options.page = options.page or (
        options.folder / "GPU.md" if options.quick else Path("docs/GPU.md")
    )
    return options


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the parts and return the exit code."""
    options = parse(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    here: dict[str, Any] = {}
    fault = isolated(describe, options, "machine", 60, here.update)
    if options.device == "cuda" and not here.get("gpu"):
        why = f" ({fault})" if fault else ""
        say(f"error: no GPU is visible to PyTorch{why}; --device cpu --quick needs none")
        return 2
    options.gpus = here["gpus"]
    found: dict[str, Any] = {"machine": here, "parts": {}}
    if options.only and options.json.exists():
        found = json.loads(options.json.read_text())
        if found["machine"] != here:
            say(f"error: {options.json} was measured elsewhere: name another file with --json")
            return 2
    names, end = options.only or list(PARTS), time.monotonic()
    for number, name in enumerate(names):
        end += PARTS[name].seconds if not options.quick else 3600  # however busy the machine is
        seconds = end - time.monotonic()
        left = names[number + 1 :]
        most = sum(PARTS[name].seconds for name in left)
        then = f"; then {', '.join(left)}: {most} s at most" if left else ""
        say(f"{name}: {seconds:.0f} s at most{then}")
        part = found["parts"][name] = {"is_check": name in CHECKS, "found": {}, "note": ""}

        def take(values: dict, part: dict = part) -> None:
            part["found"].update(values)
            for key, value in values.items():
                if isinstance(value, dict) and "passed" in value:
                    word = {True: "ok", False: "FAILED", None: "--"}[value["passed"]]
                    say(f"  {word:<6} {key}: {value['line']}")
            write(found, options)

        started = time.monotonic()
        part["note"] = isolated(PARTS[name].run, options, name, seconds, take)
        part["seconds"] = round(time.monotonic() - started, 1)
        write(found, options)
        say(f"  {part['seconds']} s")
        if part["note"]:
            say(f"  NOT COMPLETE: {part['note']} (see {options.folder / name}.log)")
    say(f"written: {options.json}, {options.page}")
    return 1 if gpu_page.faults(found["parts"]) else 0


def write(found: dict[str, Any], options: argparse.Namespace) -> None:
    """JSON and page, as far as they are known."""
    for path, text in (
        (options.json, json.dumps(found, indent=2) + "\n"),
        (options.page, gpu_page.page(found["machine"], found["parts"])),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
