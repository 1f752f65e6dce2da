"""Programs for tests: their arguments, and processes of their own that can be killed."""

import importlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.helpers import ROOT, free_port, quick_context


def words(*parts: object) -> list[str]:
    """The words of a command: strings are split as a shell does, anything else is one word."""
    found: list[str] = []
    for part in parts:
        found += shlex.split(part) if isinstance(part, str) else [str(part)]
    return found


class Ended(NamedTuple):
    """How the processes of a job ended."""

    codes: list[int]
    text: str  # all that they wrote, one process after the other

    def expect(self, codes: list[int], *texts: str) -> None:
        """Assert the exit codes, that all these texts were written, and that nobody saw a traceback
        of ours.
        """
        assert self.codes == codes, f"{self.codes}:\n{self.text}"
        missing = [text for text in texts if text not in self.text]
        traced = 'save_logits.py", line' in self.text
        assert not missing and not traced, f"without {missing}:\n{self.text}"


class Job:
    """A program as processes of its own, one a rank; the context kills those that are left."""

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        world: int = 1,
        prepare: str = "",
        env: dict[str, str] | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        """`prepare` is Python that each process runs first; `folders`: where each rank starts."""
        output = max(i for i, word in enumerate(arguments) if word == "OUTPUT") + 1
        self.log = Path(arguments[output]) / f"job-{time.monotonic_ns()}"
        self.log.mkdir(parents=True)
        shared = {"OMP_NUM_THREADS": "1", **(env or {})}
        if world > 1:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            shared |= {"WORLD_SIZE": str(world), **address}
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            folder = str(folders[rank]) if folders else str(ROOT)
            args = (
                program,
                list(arguments),
                shared | own,
                folder,
                f"{self.log / str(rank)}",
                prepare,
            )
            self.ranks.append(quick_context().Process(target=_run_program, args=args))
            self.ranks[-1].start()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def text(self, rank: int | None = None) -> str:
        """What a rank, or all of them, have written so far."""
        ranks = range(len(self.ranks)) if rank is None else [rank]
        paths = [self.log / str(number) for number in ranks]
        return "\n".join(path.read_text() for path in paths if path.exists())

    def wait(self, seconds: float = 120) -> Ended:
        """Wait for all to end by themselves; after one has failed the others have little time."""
        deadline = time.monotonic() + seconds
        while any(process.exitcode is None for process in self.ranks):
            assert time.monotonic() < deadline, f"still running:\n{self.text()}"
            if any(process.exitcode not in (None, 0) for process in self.ranks):
                deadline = min(deadline, time.monotonic() + 20)
            time.sleep(0.01)
        return Ended([process.exitcode for process in self.ranks], self.text())

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            running = any(process.is_alive() for process in self.ranks)
            assert running and time.monotonic() < deadline, f"in vain:\n{self.text()}"
            time.sleep(0.01)


def _run_program(
    program: str, arguments: list[str], env: dict[str, str], folder: str, log: str, prepare: str
) -> None:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    main = importlib.import_module(program)
    exec(prepare, {"__name__": "prepare", "main": main, "rank": int(env.get("RANK", 0))})
    code = main.main(arguments)
    sys.stdout.flush()
    sys.exit(code)
