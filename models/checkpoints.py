"""States of a training on disk: written whole or not at all, read safely, the newest found."""

import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.pretrained import read_file, unwrap

# names that a training gives
_OWN = re.compile(r"(last|best|epoch_\d+)\.pth")
MOST_UPDATES = 10**12  # more than a training could do: 30 years at 1,000 a second
# what a training's checkpoint holds, at least
STATE_TYPES = dict.fromkeys("model optimizer scaler progress measured".split(), dict)
STATE_TYPES |= {"model_ema": dict | None, "step": int, "metric_lines": int, "config": str}


def save_atomic(state: dict[str, Any], path: str | Path) -> None:
    """Write tensors and plain values so that `path` is at any time either the old file or the whole
    new one.
    """
    path = Path(path)
    _assert_plain(state, "state")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError in whose context the system's error is.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise OSError(
            cause.errno or errno.EIO,
            f"can't write the checkpoint ({cause.strerror}){kept}",
            str(path),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def save_also(path: str | Path, other: str | Path) -> None:
    """Give a checkpoint that was just written a second name: a link to the same file where there
    can be links, else a copy.
    """
    path = Path(path)
    other = Path(other)
    temporary = other.with_name(f".{other.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, other)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(other.parent)


class Saver:
    """Writes checkpoints in a thread, one at a time, while training goes on."""

    def __init__(
        self, folder: Path, log: Callable[[str], None], most: int = 0, spared: str | Path = ""
    ) -> None:
        """Of the numbered ones the newest `most` are kept (0: all), and `spared`, if it is one."""
        self.best = -1.0  # of the checkpoints that were written
        self._folder = folder
        self._log = log
        self._most = most
        self._spared = Path(spared).resolve()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[bool] = Future()
        self._writing.set_result(True)

    def begin(self, state: dict[str, Any], names: Sequence[str]) -> None:
        """Write a state as it is now under some names, once what is being written is."""
        self.wait()
        kept, ready = snapshot(state), None
        if torch.cuda.is_initialized():
            ready = torch.cuda.Event(blocking=True)
            ready.record()
        self._writing = self._thread.submit(self._write, kept, ready, names)

    def wait(self) -> tuple[bool, float]:
        """Wait for the checkpoint that is being written: whether it was, and the best by now."""
        return self._writing.result(), self.best

    def close(self) -> None:
        """Wait, and end the thread."""
        self._thread.shutdown()

    def _write(
        self, state: dict[str, Any], ready: torch.cuda.Event | None, names: Sequence[str]
    ) -> bool:
        if ready:
            ready.synchronize()
        try:
            save_atomic(state, self._folder / names[0])
            for name in names[1:]:
                save_also(self._folder / names[0], self._folder / name)
        except OSError as error:
            self._log(
                f"NO CHECKPOINT WRITTEN: {error}. Training goes on; make room, or this work can be"
                " lost"
            )
            return False
        self.best = state["progress"]["best"]
        if self._most:
            self._prune(names)
        return True

    def _prune(self, names: Sequence[str]) -> None:
        """Remove numbered checkpoints but for the newest of those up to the one just written."""
        numbered = {
            int(path.stem[6:]): path
            for path in self._folder.glob("epoch_*.pth")
            if _OWN.fullmatch(path.name)
        }
        newest = max((n for n, path in numbered.items() if path.name in names), default=-1)
        for n in sorted(n for n in numbered if n <= newest)[: -self._most]:
            if numbered[n].resolve() != self._spared:
                with suppress(OSError):  # what stays takes room, and hinders nobody
                    numbered[n].unlink()


def snapshot(value: Any) -> Any:
    """A copy on the CPU of tensors and plain values; of CUDA tensors it is made on their stream,
    which is not waited for.
    """
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(snapshot, value))
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return copy.copy_(value, non_blocking=value.is_cuda)


def _assert_plain(value: Any, name: str) -> None:
    """Only what `torch.load(weights_only=True)` reads in any version may be saved."""
    if isinstance(value, dict):
        for key, item in value.items():
            is_plain = type(key) in (str, int)
            assert is_plain, f"{name} has the key {key!r}, which is neither text nor a number"
            _assert_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _assert_plain(item, f"{name}[{i}]")
    else:
        is_plain = type(value) in (Tensor, int, float, bool, str, bytes, type(None))
        assert is_plain, f"{name} is a {type(value)}: save plain values and tensors"


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder outlast a power cut, where the system can (Windows can't)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint that `save_atomic` wrote, on the CPU; no code in it is ever run, and a damaged
    file is a ValueError.
    """
    state, _, digest = read_file(path)
    kind = "file without checksums" if digest else type(state).__name__
    if digest or not isinstance(state, dict):
        raise ValueError(f"{path} is a {kind} instead of a training state: use another one")
    return state


def load_state(path: str | Path) -> dict[str, Any]:
    """A checkpoint that a training can go on from."""
    state = load_checkpoint(path)
    kinds = sorted(STATE_TYPES.items())
    missing = [name for name, kind in kinds if not isinstance(state.get(name, ...), kind)]
    if missing:
        raise ValueError(
            f"{path} holds no {' and no '.join(missing)}, so no training goes on from it: take its"
            " weights with --pretrained"
        )
    unwrap(state, Path(path), ema=False)
    if state["model_ema"]:
        unwrap(state, Path(path), ema=True)
    if not _is_step(state["step"]):
        raise ValueError(f"{path}: no training has done {str(state['step'])[:40]} updates")
    return state


def newest_valid(
    folder: str | Path, log: Callable[[str], None] = print
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint (*.pth) of a folder that is furthest by its `step`, then by its date, and what
    it holds.

    Files of names that no training gives are looked at when no other can be used. Damaged ones are
    named and skipped; if all are, or one can't be read for no fault of its own, that is an error:
    what they hold may be a month of work.
    """

    def progress(path: Path) -> tuple[bool, float, int, bool]:
        is_own = _OWN.fullmatch(path.name) is not None
        step, date = None, 0
        try:
            if path.is_file():  # opening a FIFO would wait for ever
                date = path.stat().st_mtime_ns
                step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
        except Exception:
            pass
        # What can't be used comes first, to be reported.
        return is_own, step if _is_step(step) else math.inf, date, path.name == "last.pth"

    paths = sorted(Path(folder).glob("*.pth"), key=progress, reverse=True)
    for path in paths:
        try:
            return path, load_state(path)
        except ValueError as error:
            log(f"skipped: {error}")
    if paths:
        raise ValueError(
            f"{folder}: none of the checkpoints there can be used: begin another run with --tag, or"
            " move them away with TRAIN.AUTO_RESUME False"
        )
    return None, None


def _is_step(step: object) -> bool:
    return type(step) is int and 0 <= step < MOST_UPDATES


def move_aside(folder: Path) -> Path | None:
    """Keep what an earlier run has left: its checkpoints, and copies of metrics and configuration.

    Returns the folder they are in now, None if there was nothing.
    """
    if not any(folder.glob("*.pth")):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}_before_{number}")).exists():
        number += 1
    folder.rename(aside)
    for name in ("metrics.jsonl", "config.yaml"):
        if (folder.parent / name).exists():
            shutil.copy2(folder.parent / name, aside)
    (folder.parent / "wandb_id.txt").unlink(missing_ok=True)
    return aside


def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights; what does not fit is told in one line."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise ValueError(
            f"the checkpoint is of another {type(model).__name__} ({reason}): begin another run"
            " with --tag, or give the model back that it was written for"
        ) from None
