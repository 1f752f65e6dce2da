"""What every program needs around a model: processes and devices, autocast, meters and evaluation."""

import math
import os
import random
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class ElsewhereError(ValueError):
    """A fault of another process, which reports it."""


@dataclass(frozen=True)
class Distributed:
    """This process among all of a run; on a single process every reduction is the identity."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank on this machine: the number of its GPU
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, as a new tensor where there are several; of one
        on the CPU no GPU is waited for.
        """
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any process, the same answer on all."""
        return [
            count > 0
            for count in self.all_reduce_sum(torch.tensor(flags, dtype=torch.float32)).tolist()
        ]

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's `obj`, on every process."""
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every process's `obj` in the order of ranks, on every process."""
        if self.world_size == 1:
            return [obj]
        objects: list[Any] = [None] * self.world_size
        dist.all_gather_object(objects, obj)
        return objects

    def on_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on rank 0, on every process; a ValueError or OSError of rank 0 is
        an ElsewhereError on the others.
        """
        result = fault = None
        if self.is_main:
            try:
                result = function()
            except (ValueError, OSError) as error:
                fault = error
        result, message = self.broadcast_object((result, None if fault is None else str(fault)))
        if fault is not None:
            raise fault
        if message is not None:
            raise ElsewhereError(message)
        return result

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on this process's device with rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def destroy(self) -> None:
        """Leave the group of processes."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def init_distributed(
    device: str = "auto",
    join_timeout: timedelta = timedelta(minutes=5),
    timeout: timedelta = timedelta(minutes=30),
) -> Distributed:
    """Join the processes that torchrun's environment names, or run alone without one.

    `join_timeout` is how long to wait for the others at the start, `timeout` how long for any later
    exchange: rank 0 may be listing millions of images meanwhile."""
    rank, world_size = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    local_rank = from_environment("LOCAL_RANK", rank)
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise ValueError(
            "of the environment variables RANK and WORLD_SIZE only one is set: start with torchrun,"
            " or set both or none"
        )
    if not 0 <= rank < world_size:
        raise ValueError(
            f"RANK {rank} is not in [0, WORLD_SIZE = {world_size}): start with torchrun, or correct"
            " the environment"
        )
    chosen = choose_device(device, local_rank)
    if world_size == 1:
        return Distributed(device=chosen)
    if chosen.type == "mps":
        raise ValueError(
            f"DEVICE mps runs on a single process, not on {world_size}: use --device cpu, or start"
            " without torchrun"
        )
    on_gpu = chosen.type == "cuda"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=join_timeout))
        store = fresh_store(store, rank, world_size, join_timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=chosen if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '(MASTER_ADDR is not set)')}:{os.environ.get('MASTER_PORT', '(MASTER_PORT is not set)')}"
        raise ValueError(
            f"process {rank} of {world_size} can't join the others at {address}:"
            f" {str(error).splitlines()[0]}. If the port is in use, give torchrun another"
            " --master-port; else see that every process was started and that this address is"
            " reachable"
        ) from error
    return Distributed(rank, world_size, local_rank, chosen)


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The part of a store that belongs to the processes that are joining now.

    torchrun's store outlives a restart, and the addresses that ended processes have left there must
    not be found; its count of restarts is of no help, nodes may count differently. So rank 0 opens
    a session of a new name and waits until all others are in it."""
    deadline = time.monotonic() + timeout.total_seconds()
    session = uuid.uuid4().hex
    if rank == 0:
        store.set("session", session)
    place = world_size
    while True:
        if rank == 0 and store.add(f"{session}/arrived", 0) == world_size - 1:
            store.set(f"{session}/complete", "")
            return dist.PrefixStore(session, store)
        if (
            rank > 0
            and store.check(["session"])
            and (found := store.get("session").decode()) != session
        ):
            session, place = found, store.add(f"{found}/arrived", 1)
        # a late comer to an old session gets no place in it
        if place < world_size and store.check([f"{session}/complete"]):
            return dist.PrefixStore(session, store)
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all have come within {timeout.total_seconds():.0f} s")
        time.sleep(0.01)


def from_environment(name: str, default: int) -> int:
    """A number that torchrun puts into the environment."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment variable {name} is {text!r}, not a number: start with torchrun, or"
            " correct it"
        ) from None


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called auto (CUDA, else CPU), cuda, mps or cpu; on CUDA the GPU numbered
    `local_rank`, made the current one.
    """
    if name not in ("auto", "cuda", "mps", "cpu"):
        raise ValueError(f"DEVICE {name!r} is none of auto, cuda, mps, cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(
                "DEVICE mps: this machine or this PyTorch has no MPS device; use --device cpu"
            )
        return torch.device("mps")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= visible:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        restriction = "" if named is None else f" (CUDA_VISIBLE_DEVICES is {named!r})"
        what = {0: "no GPU is visible to PyTorch", 1: "1 GPU is visible"}.get(
            visible, f"{visible} GPUs are visible"
        )
        way_out = (
            f"start at most {visible} processes on this machine"
            if visible
            else "use --device cpu, or a CUDA build of PyTorch"
        )
        raise ValueError(
            f"DEVICE {name}: no GPU for LOCAL_RANK {local_rank}: {what}{restriction}; {way_out}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices): for initial weights and
    for others' code.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def choose_kernels(deterministic: bool) -> None:
    """Ask for kernels that give equal bits from run to run, or for the fastest ones."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def seed_step(run_seed: int) -> None:
    """Seed torch (all devices) for one step's dropout and drop path, so that there is no generator
    state to save.
    """
    torch.manual_seed(run_seed)


def wrap(
    model: nn.Module, world: Distributed, is_compiled: bool, warn: Callable[[str], object]
) -> nn.Module:
    """The model compiled, if that is asked for and possible on all processes, and with gradients
    averaged over them.
    """
    if is_compiled:
        reason = None
        try:
            torch.compile(lambda x: x * 2)(torch.ones(2, device=world.device))
        except Exception as error:  # compilers fail in many ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if world.any_of(reason is not None)[0]:
            warn(
                f"torch.compile unavailable ({reason or 'on another process'}): the model runs"
                " uncompiled, at some cost in speed"
            )
        else:
            model.compile()
    if world.world_size == 1:
        return model
    # where depthwise gradients come in strides of their own, which costs next to nothing
    if world.device.type == "cpu":
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # Buffers are rank 0's where it counts, in evaluations and checkpoints: sending them every step
    # would change no weight.
    name = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        else "broadcast_buffers"
    )
    return DistributedDataParallel(
        model, [world.device] if world.device.type == "cuda" else None, **{name: False}
    )


class StopRequest:
    """Notes that the process was asked to stop: SIGTERM, SIGUSR1 as batch systems send before the
    time is up, Ctrl-C.

    A second Ctrl-C is a KeyboardInterrupt. A context manager: on leaving it, the handlers from
    before are back."""

    def __init__(self, names: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGINT")) -> None:
        self.received: str | None = None  # name of the signal
        self._signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        again = "; Ctrl-C again ends now, without saving" if number == signal.SIGINT else ""
        if os.environ.get("RANK", "0") == "0":  # print may not be called from here
            os.write(
                2, f"{self.received}: stopping as soon as the state is whole{again}\n".encode()
            )


def amp_dtype(cfg, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision that AMP_ENABLE and AMP_DTYPE mean on a device; None is float32
    throughout.
    """
    name = cfg.AMP_DTYPE if cfg.AMP_ENABLE else "off"
    if name not in ("auto", "bf16", "fp16", "off"):
        raise ValueError(f"AMP_DTYPE {name!r} is none of auto, bf16, fp16, off")
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "off" or device.type == "cpu" or (name == "auto" and device.type != "cuda"):
        return None
    if name == "bf16" and not has_bf16:
        raise ValueError(
            f"AMP_DTYPE bf16: {torch.cuda.get_device_name(device)} has no bfloat16; use AMP_DTYPE"
            " fp16 or auto"
        )
    return torch.bfloat16 if name == "bf16" or (name == "auto" and has_bf16) else torch.float16


def precision(dtype: torch.dtype | None) -> str:
    """The name of what a model computes in, given the type of autocast."""
    return str(dtype or torch.float32).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """The context in which the model runs; None is float32."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def grad_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """A loss scaler that works for float16 and is the identity for every other type."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


@contextmanager
def sole_user(path: str | Path) -> Iterator[None]:
    """Let no other process in that asks for the same file, as far as the system has such locks; one
    that dies lets go.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            import fcntl  # absent on Windows

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which children do not inherit
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"{path.parent} is in use: another process writes to this run; wait for its end, or"
                " give this one another --tag"
            ) from None
        except (ImportError, OSError):
            pass
        yield


def is_writable(path: str | Path) -> bool:
    """Whether a file can be written there; folders that it lacks are made."""
    path = Path(path).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return not path.is_dir() and os.access(path.parent, os.W_OK)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class Measurements:
    """What updates measure, kept on their device until `collect`; an update whose first column is
    not finite counts as skipped.

    `state` is plain values: with it a resumed run goes on exactly. `streak` has the images'
    positions of each of the last updates, as far as these were skipped."""

    def __init__(
        self, columns: Sequence[str], world: Distributed, state: dict[str, Any] | None = None
    ) -> None:
        self.columns, self.world = tuple(columns), world
        self.state = state or {"window": [], "epoch": [], "skipped": 0, "skipped_in_a_row": 0}
        self.streak: list[Tensor] = []
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, row: Tensor, positions: Tensor) -> None:
        """Take one update's columns, and its images; nothing waits for the device."""
        self._pending.append((row, positions))

    def collect(self, limit: float = math.inf) -> bool:
        """Wait for the pending rows, as means over all processes; stops, and tells, when `limit`
        updates in a row were skipped.
        """
        if not self._pending:
            return False
        rows = (
            self.world.all_reduce_sum(
                torch.stack([row for row, _ in self._pending]).detach().cpu().double()
            )
            / self.world.world_size
        )
        pending, self._pending = self._pending, []
        for row, (_, positions) in zip(rows.tolist(), pending):
            if math.isfinite(row[0]):
                self.state["window"].append(row)
                self.state["epoch"] = [
                    total + value
                    for total, value in zip(
                        self.state["epoch"] or [0.0] * (len(row) + 1), (*row, 1.0)
                    )
                ]
                self.state["skipped_in_a_row"] = 0
                self.streak = []
            else:
                self.state["skipped"] += 1
                self.state["skipped_in_a_row"] += 1
                self.streak.append(positions)
                if self.state["skipped_in_a_row"] >= limit:
                    return True
        return False

    def take_window(self) -> dict[str, float]:
        """The means over what was collected since this was last called."""
        rows, self.state["window"] = self.state["window"], []
        return {name: sum(column) / len(rows) for name, column in zip(self.columns, zip(*rows))}

    def take_epoch(self) -> dict[str, float]:
        """The means over the epoch, which ends here."""
        sums, self.state["epoch"] = self.state["epoch"], []
        return {name: total / sums[-1] for name, total in zip(self.columns, sums)}


class Waiting:
    """An iterator that adds up how long it was waited for."""

    def __init__(self, items: Iterable) -> None:
        self._items, self.seconds = iter(items), 0.0

    def __iter__(self) -> "Waiting":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - start


def peak_memory(device: torch.device) -> float:
    """The most memory used so far in GB: on the GPU, else by this process (not a number where the
    system does not say).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # absent on Windows
    except ImportError:
        return math.nan
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )


def time_calls(
    function: Callable[[], Any],
    device: torch.device,
    calls: int = 30,
    warmup: int = 10,
    limit: float = 60.0,
) -> list[float]:
    """Seconds of each of several calls, after some that are not counted; on CUDA by events on the
    device.

    Elsewhere calls end early, after three at least, when warm-up or counting has taken `limit`
    seconds."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        for _ in range(warmup):
            function()
        marks[0].record()
        for mark in marks[1:]:
            function()
            mark.record()
        marks[-1].synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]

    def timed(count: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < count and (len(seconds) < 3 or sum(seconds) < limit):
            start = time.perf_counter()
            function()
            if device.type == "mps":
                torch.mps.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds

    timed(warmup)
    return timed(calls)


def _right(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the label is the highest output, the second highest, ..., as bool [B, k] (or [B, C]
    with fewer classes).
    """
    return logits.topk(min(k, logits.shape[1]), dim=1).indices == labels[:, None]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    world: Distributed | None = None,
    map_outputs: Callable[[Tensor], Tensor] | None = None,
    map_labels: Callable[[Tensor], Tensor] | None = None,
    num_classes: int = 0,
) -> dict[str, Any]:
    """Loss, accuracies in percent and image count over all processes, each image once; batches
    begin with (images, labels).

    `map_outputs` brings outputs into the data's numbering of classes, and `map_labels` makes labels
    negative that no output stands for: such images are left out of the loss and count as wrong.
    Where no image has a label, only `count` is given. With `num_classes` (the data's) the result
    also has `class_count` and `class_top1`: each class's images and how many are right."""
    world = world or Distributed(device=device)
    if isinstance(model, DistributedDataParallel):
        # its forward waits for the other processes, which may have another number of batches
        model = model.module
    # running statistics differ between ranks after a step: rank 0's are the ones saved
    world.broadcast_tensors(model.buffers())
    training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=_wide(device), device=device)  # loss, labels, images, top-1, top-5
    by_class = torch.zeros(2, num_classes, dtype=torch.int64, device=device)
    try:
        for images, labels, *_ in loader:
            images, labels = (
                images.to(device, non_blocking=True),
                labels.to(device, non_blocking=True).long(),
            )
            with autocast(device, dtype):
                logits = model(images)
            logits = logits.float() if map_outputs is None else map_outputs(logits.float())
            known = labels if map_labels is None else map_labels(labels)
            loss = (
                F.cross_entropy(logits, known.clamp(min=-1), ignore_index=-1, reduction="none")
                .to(sums.dtype)
                .sum()
            )
            right = _right(logits, known, 5)
            counts = torch.stack(
                [(known >= 0).sum(), torch.ones_like(known).sum(), right[:, 0].sum(), right.sum()]
            )
            sums += torch.cat([loss[None], counts.to(sums.dtype)])
            if num_classes:
                by_class.index_add_(
                    1, labels.clamp(min=0), torch.stack([labels >= 0, right[:, 0]]).long()
                )
    finally:
        model.train(training)
    loss, labelled, count, top1, top5 = world.all_reduce_sum(sums).tolist()
    result: dict[str, Any] = {"count": int(count)}
    if labelled:
        result |= {"loss": loss / labelled, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
        if num_classes:
            class_count, class_top1 = world.all_reduce_sum(by_class).cpu().numpy()
            result |= {"class_count": class_count, "class_top1": class_top1}
    return result
