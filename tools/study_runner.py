"""The commands of a study as processes: what is finished is left out, and one that fails costs
those alone that need it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs import Config, run_folder
from data.store import LogitsStoreReader
from data.store.files import lock_holder
from models.checkpoints import load_state
from utils import StopRequest

ROOT = Path(__file__).resolve().parent.parent
# The interpreter as one would type it.
IS_OURS = Path(sys.executable).is_relative_to(ROOT)
PYTHON = os.path.relpath(sys.executable, ROOT) if IS_OURS else sys.executable


@dataclass(frozen=True)
class Step:
    """One command of a study."""

    name: str  # of its log, and the tag of its run
    row: str  # what the study calls it, without its seed
    kind: str  # train, save or check
    words: list[str]  # a program and its arguments
    cfg: Config
    entry: dict[str, Any]  # as it stands in the study
    needs: list[Step]
    seed: int | None  # of a variant

    @property
    def result(self) -> Path:
        """The last weights, or the store."""
        if self.kind == "train":
            return run_folder(self.cfg) / "checkpoints" / "last.pth"
        return Path(self.cfg.DISTILL.TEACHER_LOGITS_PATH)

    def is_whole(self) -> bool:
        """Whether all of its result lies on disk."""
        epochs = self.cfg.TRAIN.EPOCHS
        try:
            if self.kind == "train":
                return load_state(self.result)["progress"]["epoch"] >= epochs
            return {*range(epochs)} <= {*LogitsStoreReader(self.result).epochs()}
        except (ValueError, OSError):
            return False

    def is_in_use(self) -> bool:
        """Whether a process works at it that an earlier study has left behind."""
        folder = self.result if self.kind == "save" else run_folder(self.cfg)
        return any(map(lock_holder, folder.glob("*lock")))


@dataclass
class Job:
    """A step whose command runs."""

    step: Step
    process: subprocess.Popen
    read: int  # bytes of its log that were
    device: str  # of those that CUDA shows us
    told: str = ""  # since it began
    begun: float = field(default_factory=time.monotonic)


class Runner:
    """Runs steps; each has a log, which also says how its command ended."""

    def __init__(self, steps: Sequence[Step], output: Path, jobs: int, stop: StopRequest) -> None:
        if jobs < 1:
            raise ValueError(f"--jobs {jobs}: give 1 or more")
        self.steps, self.output = steps, output
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # and why
        self._most, self._stop = jobs, stop
        self._jobs: list[Job] = []
        count = torch.cuda.device_count()
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        self._devices = names.split(",")[: max(count, 1)]  # shared out among the jobs

    def run(self) -> None:
        """Run all that is not done, until a request to stop."""
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        self._pending, is_stopping = list(self.steps), False
        try:
            while self._pending or self._jobs:
                self._pending = [step for step in self._pending if not self._begin(step)]
                self._jobs = [job for job in self._jobs if not self._end(job)]
                if self._stop.received and not is_stopping:
                    self._pending, is_stopping = [], True
                    for job in self._jobs:
                        job.process.terminate()
                time.sleep(0.05)
        finally:
            for job in self._jobs:  # after a second Ctrl-C
                job.process.kill()

    def attempts(self, step: Step) -> list[tuple[str, str, str]]:
        """Exit status, seconds and command of each attempt that has ended."""
        text = self._log(step).read_text("utf-8", "replace") if self._log(step).exists() else ""
        return re.findall(r"^exit status (\S+) after ([\d.]+) s: (.*)$", text, re.MULTILINE)

    def seconds(self, step: Step) -> float:
        """How long all attempts at a step have taken."""
        return sum(float(seconds) for _, seconds, _ in self.attempts(step))

    def _log(self, step: Step) -> Path:
        return self.output / "logs" / f"{step.name}.log"

    def _begin(self, step: Step) -> bool:
        """Start a step if it is its turn; whether it is settled or has started."""
        lacking = [need.name for need in step.needs if need.name in self.failed]
        if lacking:
            self.failed[step.name] = f"not run, it needs {lacking[0]}"
            return True
        is_ready = self.done.issuperset(need.name for need in step.needs)
        if len(self._jobs) == self._most or not is_ready or step.is_in_use():
            return False
        command, last = shlex.join(step.words), self.attempts(step)[-1:]
        # What was made elsewhere or by a killed study has no end in the log.
        ended_well = all((status, words) == ("0", command) for status, _, words in last)
        is_done = ended_well and (step.kind != "check" or last) and step.is_whole()
        print(step.entry.get("say", f"{step.name}:"))
        print("  (done before)" if is_done else f"$ {PYTHON} {command}", flush=True)
        if is_done:
            self.done.add(step.name)
            return True
        with open(self._log(step), "ab") as log:
            size = log.tell()
            # One thread beside one loader process: more wait for each other on two cores.
            env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
            env["LOCAL_WORLD_SIZE"] = str(self._most)  # the loaders' processes share the cores
            taken = [job.device for job in self._jobs]
            device = min(self._devices, key=taken.count)
            if len(self._devices) > 1:
                env["CUDA_VISIBLE_DEVICES"] = device
            words = [sys.executable, *step.words]
            process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)
        self._jobs.append(Job(step, process, size, device))
        return True

    def _end(self, job: Job) -> bool:
        """Show what a command has written since; note how it ended, if it has."""
        status, name = job.process.poll(), job.step.name
        with open(self._log(job.step), "rb+") as log:
            log.seek(job.read)
            news = log.read().decode(errors="replace")
            job.read = log.tell()
            if status is not None:
                seconds = time.monotonic() - job.begun
                ended = f"exit status {status} after {seconds:.1f} s"
                log.write(f"\n{ended}: {shlex.join(job.step.words)}\n".encode())
        job.told += news
        if self._most == 1:
            print(news, end="", flush=True)
        if status is None:
            return False
        if self._most > 1:
            print(f"{name}: {ended}", flush=True)
        if status == 0:
            self.done.add(name)
        elif self._stop.received:
            pass
        elif job.step.is_in_use():  # by what a killed study has left, which had no lock yet
            self._pending.append(job.step)
        else:
            _, _, reason = job.told.strip().rpartition("\n")
            self.failed[name] = f"{reason or 'it said nothing'} ({ended}, {self._log(job.step)})"
        return True
