"""Timing two or more ways of doing one thing in a single run, turn by turn, so that the machine's
mood hits all alike.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch


def alternate(
    sides: dict[str, Callable[[], object]],
    repeats: int = 10,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Run each side once per round and return {side: {"median", "spread", "best"}} in seconds.

    The first `warmup` rounds are not counted; every second round goes in reverse, so that no side
    always follows the same one. The spread is the distance between the quartiles. Work queued on
    CUDA is waited for on both ends of a turn."""
    assert sides and repeats >= 1 and warmup >= 0, "need a side, a round and no negative warm-up"
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warmup, repeats):
        for name in sides if turn % 2 == 0 else reversed(sides):
            _wait()
            start = clock()
            sides[name]()
            _wait()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return {
        name: {"median": statistics.median(times), "spread": _spread(times), "best": min(times)}
        for name, times in seconds.items()
    }


def machine() -> dict[str, object]:
    """What the figures were measured on: processor, threads, accelerator and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(result: dict[str, object]) -> None:
    """Print a benchmark's result as one JSON document to stdout."""
    json.dump(result, sys.stdout, indent=2)
    print()


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
