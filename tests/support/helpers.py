"""Real processes for tests: torchrun as a user starts it, and functions on several ranks without
its start-up time.
"""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(
    args: Sequence[str],
    nproc: int,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess:
    """Run `torchrun <args>` with `nproc` processes on this machine; stdout and stderr are captured
    as text.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={nproc}",
        "--master-addr=127.0.0.1",
    ]
    command += [f"--master-port={free_port()}", *map(str, args)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True
    )


def quick_context() -> multiprocessing.context.BaseContext:
    """Processes forked from a server that has what is slow to import, so that they start within
    milliseconds after the first one.
    """
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        # Wrapping a model for several processes imports torch._dynamo, which takes a second.
        context.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "timm"])
    return context


def run_ranks(
    function: Callable,
    world_size: int,
    *args: Any,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
) -> list[Any]:
    """What `function(*args)`, a module's own function, returns on each rank, in processes with
    torchrun's environment.

    The processes are those of `quick_context`.
    """
    context = quick_context()
    shared = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **(env or {}),
    }
    started = []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(
            target=_run_rank, args=(sender, environment, function, args), daemon=True
        )
        process.start()
        sender.close()
        started.append((process, receiver))
    try:
        return [_outcome(rank, receiver, timeout) for rank, (_, receiver) in enumerate(started)]
    finally:
        for process, _ in started:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _run_rank(sender, environment: dict[str, str], function: Callable, args: tuple) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        message = (function(*args), None)
    except BaseException:
        message = (None, traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))


def _outcome(rank: int, receiver, timeout: float) -> Any:
    assert receiver.poll(timeout), f"rank {rank} has not answered in {timeout} s"
    try:
        value, error = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    assert error is None, f"rank {rank} failed:\n{error}"
    return value
