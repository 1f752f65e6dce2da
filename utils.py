"""What both programs share: the frame they run in, processes and devices, meters, evaluation."""

import ctypes
import logging
import math
import os
import random
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.commands import from_environment, one_line, tell
from logger import awaited, note_fault, progress

# How long processes wait for each other: in an exchange of tensors, and of objects, where one may
# be listing millions of files or computing the rest of an epoch alone.
TIME_OUT = timedelta(minutes=30)
PATIENCE = timedelta(days=7)

Settings = TypeVar("Settings")
Result = TypeVar("Result")
Item = TypeVar("Item")

# What a model with two heads is read off by, as the names of measured values begin.
HEADS = ("", "class_head_", "distill_head_")
WORTH_COMPILING = 2000  # updates; compiling takes minutes


class Exit(IntEnum):
    """How a program ends."""

    DONE = 0
    DIFFERENT = 1  # a check found differences
    FAULT = 2  # an error that one line explains
    STOPPED = 75  # EX_TEMPFAIL: on request; the same command goes on from here
    INTERRUPTED = 130  # by a second Ctrl-C


class Stopped(Exception):
    """The program was asked to stop; its text says what the user should know."""


class PeerError(ValueError):
    """A fault of another process of the run, which tells it itself."""


def run_program(
    load: Callable[[], Settings], program: Callable[[Settings, "StopRequest"], int]
) -> int:
    """Run a program to its exit code; a fault that a user can mend is one line on stderr.

    What `load` reads is the command line.
    """
    rank = os.environ.get("RANK", "0")
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # Asks to be stopped when the torchrun that started this process has been killed.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        settings = load()
    except ValueError as error:
        tell(error)
        return Exit.FAULT
    with StopRequest() as stop:
        try:
            return _ending(lambda: program(settings, stop), stop, rank)
        except KeyboardInterrupt:
            print("ended without saving: the same command goes on", file=sys.stderr)
            return Exit.INTERRUPTED
        finally:
            if dist.is_initialized():  # after a fault: what is under way waits for others in vain
                with suppress(Exception):  # PyTorch's own: whatever it does, the exit code stays
                    dist.distributed_c10d._abort_process_group()


def _ending(program: Callable[[], int], stop: "StopRequest", rank: str) -> int:
    """The exit code of a program; its faults are told."""
    try:
        return program()
    except Stopped as stopped:
        logging.getLogger("tinyvit").info(f"stopped on request: {stopped}")
        return Exit.STOPPED
    except PeerError:
        # While a run is being stopped, processes that end are no fault.
        return Exit.STOPPED if stop.received else Exit.FAULT
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        text = one_line(error)
    except RuntimeError as error:  # of exchanges between processes it is the only type
        if not (isinstance(error, dist.DistError) or a_peer_is_lost()):
            raise
        if stop.received:
            return Exit.STOPPED
        text = (
            "the connection to another process is lost, whose own message tells why"
            f" ({one_line(error)[:120]})"
        )
    print(f"error: {text}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
    note_fault(logging.getLogger("tinyvit"), text)
    return Exit.FAULT


def a_peer_is_lost() -> bool:
    """Whether another process of the group has ended: nothing can be sent to it any more."""
    if not dist.is_initialized():
        return False
    for rank in set(range(dist.get_world_size())) - {dist.get_rank()}:
        try:
            dist.isend(torch.zeros(1), rank)  # never received: one that lives has failed as well
        except RuntimeError:
            return True
    return False


@dataclass(frozen=True)
class Distributed:
    """This process among all of a run; on a single process every reduction is the identity."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank on this machine: the number of its GPU
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # for objects, on the CPU and patient; None is the group of all exchanges
    objects: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, as a new tensor where there are several.

        No GPU is waited for where the tensor is on the CPU.
        """
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any process, the same answer on all."""
        counts = self.all_reduce_sum(torch.tensor(flags, dtype=torch.float32))
        return [count > 0 for count in counts.tolist()]

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's `obj`, on every process."""
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every process's `obj` in the order of ranks, on every process."""
        if self.world_size == 1:
            return [obj]
        objects: list[Any] = [None] * self.world_size
        dist.all_gather_object(objects, obj, group=self.objects)
        return objects

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on this process's device with rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def everywhere(self, function: Callable[[], Result]) -> Result:
        """What `function` returns here, once it has succeeded on all processes."""
        result, fault = _attempt(function)
        texts = self.gather_objects(None if fault is None else one_line(fault))
        if fault is not None:
            raise fault
        for text in texts:
            if text is not None:
                raise PeerError(text)
        return result

    def on_main_alone(self, function: Callable[[], Result]) -> Result | None:
        """What `function` returns on rank 0, there; None on the others; they fail together."""
        return self.everywhere(function if self.is_main else _nothing)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` returns on rank 0, on every process; they fail together."""
        return self.broadcast_object(self.on_main_alone(function))

    def on_each_machine(self, function: Callable[[], object]) -> None:
        """Call `function` on one process of each machine; none goes on before it is done on all."""
        self.everywhere(function if self.local_rank == 0 else _nothing)

    def main_first(self, function: Callable[[], Result]) -> Result:
        """What `function` returns here; rank 0 calls it first, the others find its files."""
        if self.is_main:
            result = self.everywhere(function)
            self.everywhere(_nothing)
        else:
            self.everywhere(_nothing)
            result = self.everywhere(function)
        return result

    def destroy(self) -> None:
        """Leave the group of processes."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class Agreement:
    """What processes ask each other about once a second, after the same piece of work on all: to
    wait for each other after every piece would cost the slowest one's time again and again.
    """

    def __init__(self, world: Distributed) -> None:
        self._world = world
        self._since, self._pieces, self._next = time.monotonic(), 0, 1

    def any_of(self, *flags: bool, now: bool = False) -> list[bool]:
        """After a piece of work: for each flag whether it is set on any process, and False where
        it is not yet time to ask; `now` asks anyway. The answers are the same on all processes.
        """
        self._pieces += 1
        if self._world.world_size > 1 and self._pieces < self._next and not now:
            return [False] * len(flags)
        seconds = time.monotonic() - self._since
        *counts, total = self._world.all_reduce_sum(torch.tensor([*flags, seconds])).tolist()
        a_second = int(self._pieces * self._world.world_size / max(total, 1e-6))
        self._next = min(a_second, 2 * self._pieces)  # short times say little of later ones
        self._since, self._pieces = time.monotonic(), 0
        return [count > 0 for count in counts]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """(result, None) or (None, the error)."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _nothing() -> None:
    """What a process does while it is another's turn."""


def init_distributed(
    device: str = "auto", join_timeout: timedelta = timedelta(minutes=5)
) -> Distributed:
    """Join the processes that torchrun's environment names, or run alone without one.

    `join_timeout` is how long to wait for the others at the start."""
    rank, world_size = from_environment("RANK", 0), from_environment("WORLD_SIZE", 1)
    local_rank = from_environment("LOCAL_RANK", from_environment("SLURM_LOCALID", rank))
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
            timeout=TIME_OUT,
            device_id=chosen if on_gpu else None,
        )
        objects = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        names = ("MASTER_ADDR", "MASTER_PORT")
        address = ":".join(os.environ.get(name, f"({name} is not set)") for name in names)
        raise ValueError(
            f"process {rank} of {world_size} can't join the others at {address}:"
            f" {str(error).splitlines()[0]}. If the port is in use, give torchrun another"
            " --master-port; else see that every process was started and that this address is"
            " reachable"
        ) from error
    return Distributed(rank, world_size, local_rank, chosen, objects)


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


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called auto (CUDA, else CPU), cuda, mps or cpu; on CUDA the GPU numbered
    `local_rank`, or the one that Slurm shows this process, made the current one.
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
    if visible == 1 and "LOCAL_RANK" not in os.environ and "SLURM_LOCALID" in os.environ:
        local_rank = 0  # Slurm may show each task its own GPU alone (--gpus-per-task)
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


def choose_kernels(deterministic: bool, device: torch.device) -> None:
    """Ask for kernels that give equal bits from run to run, or for the fastest ones; what computes
    in float32 on CUDA may multiply matrices in TF32, as its convolutions do anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
    torch.use_deterministic_algorithms(deterministic)
    # Writing to all new memory would only help a program that reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")


def must_compile(cfg, device: torch.device, updates: int) -> tuple[bool, str]:
    """Whether the model of a run of so many updates is compiled (TRAIN.COMPILE), and why."""
    if cfg.TRAIN.COMPILE != "auto":
        return cfg.TRAIN.COMPILE == "True", "as asked"
    if device.type != "cuda":
        return False, f"auto, on {device.type}"
    if cfg.TRAIN.DETERMINISTIC:
        return False, "auto, with TRAIN.DETERMINISTIC"
    return updates >= WORTH_COMPILING, f"auto, {updates:,} updates"


def compile_model(model: nn.Module, world: Distributed, warn: Callable[[str], object]) -> None:
    """Compile a model in place; where its compiler fails, now or later, it runs as it is.

    The backward pass is compiled with the forward pass: one that failed later, when gradients are
    half summed, would end the run.
    """
    from torch._functorch import config as compiling  # seldom needed, and not loaded with torch

    if hasattr(compiling, "force_non_lazy_backward_lowering"):  # not in PyTorch 2.6
        compiling.force_non_lazy_backward_lowering = True

    def give_up(reason: str) -> None:
        model._compiled_call_impl = None
        warn(
            f"torch.compile unavailable ({reason}): the model runs uncompiled, at some cost in"
            " speed"
        )

    reason = ""
    try:
        with awaited("a first use of torch.compile", warn):
            torch.compile(lambda x: x * 2)(torch.ones(2, device=world.device))
    except Exception as error:  # compilers fail in many ways
        reason = one_line(error)[:200]
    if world.any_of(bool(reason))[0]:
        give_up(reason or "on another process")
        return
    model.compile(dynamic=False)  # one size of batches is all there is
    compiled = model._compiled_call_impl

    def guarded(*inputs: Tensor) -> Tensor:
        try:
            return compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything has run
            dynamo = torch._dynamo.config
            if "optimize_ddp" in str(error) and dynamo.optimize_ddp:
                dynamo.optimize_ddp = False  # older PyTorch can't cut what recomputes parts
            else:
                give_up(one_line(error)[:200])
            return model(*inputs)

    model._compiled_call_impl = guarded  # copies of a model, as of an EMA, are without it


def outputs_of(model: nn.Module, images: Tensor, rows: int) -> Tensor:
    """What a model says of images [n, ...]: its outputs [n, C]; of a model that answers with two
    heads their mean, the class head's and the distillation head's [3, n, C].

    A last batch is filled up to `rows`, the size of the others, where another size costs: a
    compiled model would be compiled again, and cuDNN look for its fastest kernels again.
    """
    count = len(images)
    if count < rows and (images.is_cuda or _is_compiled(model)):
        images = F.pad(images, (0, 0) * (images.dim() - 1) + (0, rows - count))
    answer = model(images)
    heads = answer if isinstance(answer, tuple) else (answer,)
    shapes = [[*getattr(head, "shape", [type(head).__name__])] for head in heads]
    if len(shapes[0]) != 2 or len(heads) > 2 or shapes[-1] != shapes[0]:
        raise ValueError(
            f"the model answers {len(images)} images with {', '.join(map(str, shapes))}: one tensor"
            " [images, classes] is needed, or a pair of them, of class and distillation head"
        )
    if len(heads) == 2:
        answer = torch.stack([sum(heads) / 2, *heads])
    return answer.narrow(-2, 0, count)


def _is_compiled(model: nn.Module) -> bool:
    return any(part._compiled_call_impl for part in model.modules())


def wrap(
    model: nn.Module, world: Distributed, is_compiled: bool, warn: Callable[[str], object]
) -> nn.Module:
    """The model, compiled if that is asked for, and with gradients averaged over processes."""
    if is_compiled:
        compile_model(model, world, warn)
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
        model,
        [world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=8,  # so that small models' gradients travel while others are computed
        **{name: False},
    )


class StopRequest:
    """Notes that the process was asked to stop: SIGTERM, SIGUSR1 as batch systems send before the
    time is up, Ctrl-C.

    Who works looks at `received` between two pieces of work: main.py's `train` after an update,
    `in_step` before a batch of an evaluation, save_logits.py's `watched` after each batch.
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


class Meters:
    """What updates measure, as means since the last log line and over the epoch.

    Values stay on their device until `collect`. An update whose "norm", the gradient's, is not
    finite counts as skipped. `state` is plain values: with it a resumed run goes on exactly.
    """

    def __init__(self, world: Distributed) -> None:
        self.world = world
        self.state: dict[str, Any] = {
            "names": [],  # of the values, in the order of the rows
            "window": [],  # rows since the last log line
            "epoch": [],  # the sum of the epoch's rows, and how many they are
            "skipped": 0,
            "skipped_in_a_row": 0,
        }
        self._pending: list[Tensor] = []
        self._has_begun = False

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take what one update measured, always the same names; nothing waits for the device."""
        if not self._has_begun and set(self.state["names"]) != set(values):
            # none yet, or those of a checkpoint of another version: its means are given up
            self.state |= {"names": list(values), "window": [], "epoch": []}
        self._has_begun, names = True, self.state["names"]
        assert set(names) == set(values), f"an update measures {list(values)}, others {names}"
        self._pending.append(torch.stack([values[name].detach() for name in names]))

    def collect(self) -> None:
        """Wait for the values of the updates so far, as means over all processes."""
        if not self._pending:
            return
        rows = torch.stack(self._pending).cpu().double()
        rows = self.world.all_reduce_sum(rows) / self.world.world_size
        self._pending = []
        state = self.state
        norm = state["names"].index("norm")
        for row in rows.tolist():
            if math.isfinite(row[norm]):
                state["window"].append(row)
                sums = state["epoch"] or [0.0] * (len(row) + 1)  # of each value, and their count
                state["epoch"] = [total + value for total, value in zip(sums, [*row, 1.0])]
                state["skipped_in_a_row"] = 0
            else:
                state["skipped"] += 1
                state["skipped_in_a_row"] += 1

    def take_window(self) -> dict[str, float]:
        """The means since this was last called."""
        rows = self.state["window"]
        self.state["window"] = []
        columns = zip(self.state["names"], zip(*rows))
        return {name: sum(column) / len(rows) for name, column in columns}

    def take_epoch(self) -> dict[str, float]:
        """The means over the epoch, which ends here."""
        sums = self.state["epoch"]
        self.state["epoch"] = []
        return {name: total / sums[-1] for name, total in zip(self.state["names"], sums)}


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


def open_loader(data, world: Distributed, log: logging.Logger, batch_size: int, **options: Any):
    """The training batches of this process (data.build.EpochLoader) from a data.build.RunData: with
    the executor that all processes can use, and epochs that one process of each machine verifies.
    """
    with awaited(f"the proof that {world.device} augments as Pillow does", log.info):
        executor = world.everywhere(lambda: data.choose_executor(world.device, log.warning))
    shown = partial(progress, unit="blocks", log=log.info, enabled=world.is_main)

    def verify(epoch: int) -> None:
        world.on_each_machine(lambda: data.verify(epoch, shown))

    loader = data.train_loader(batch_size, world.rank, executor=executor, verify=verify, **options)
    return loader


def time_calls(
    function: Callable[[], Any], device: torch.device, calls: int = 30, limit: float = 60.0
) -> list[float]:
    """Seconds of each of several calls, after a third as many that are not counted.

    Warm-up and counting each end early, after three calls at least, when `limit` seconds are over.
    """

    def timed(count: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < count and (len(seconds) < 3 or sum(seconds) < limit):
            begun = time.perf_counter()
            function()
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            seconds.append(time.perf_counter() - begun)
        return seconds

    timed(calls // 3)
    return timed(calls)


def in_step(
    batches: Iterable[Item], count: int, world: Distributed, stop: StopRequest | None
) -> Iterator[Item]:
    """The batches, of which this process has `count`; Stopped soon after any process must stop.

    All processes agree before the same batches, so that none is left waiting for the others.
    """
    most = max(world.gather_objects(count))
    own, agreement = iter(batches), Agreement(world)
    for _ in range(most):
        if stop and agreement.any_of(stop.received is not None)[0]:
            raise Stopped("the same command goes on")
        yield from islice(own, 1)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    world: Distributed | None = None,
    label_map=None,
    num_classes: int = 0,
) -> dict[str, Any]:
    """Loss, accuracies in percent and image count over all processes, each image once.

    Batches begin with (images [B, 3, H, W], labels [B]). A `label_map` (models.class_map.LabelMap)
    brings outputs into the labels' numbering; images whose label no output stands for are left out
    of the loss and count as wrong. Where no image has a label only `count` is given. With
    `num_classes` (the labels') the result also has `class_count` and `class_top1`: each class's
    images, and how many are right. Of a model with two heads the mean is measured, and each head
    under names of its own: `class_head_loss`, ..., `distill_head_top5`.
    """
    world = world or Distributed(device=device)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # whose forward does not wait for processes that have fewer batches
    # Running statistics differ between ranks after a step: rank 0's are the ones saved.
    world.broadcast_tensors(model.buffers())
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    # loss, known, top-1, top-5, images; of the model's answer, of its class and distillation heads
    sums = torch.zeros(5, len(HEADS), dtype=wide, device=device)
    by_class = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # images, right ones
    was_training, rows, count, answers = model.training, 0, 0, 1
    model.eval()
    for part in model.modules():  # timm's two heads answer apart in training mode alone
        part.training = getattr(part, "distilled_training", False)
    try:
        for images, labels, *_ in batches:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True).long().clamp(min=-1)
            rows = max(rows, len(images))
            with autocast(device, dtype):
                logits = outputs_of(model, images, rows).float()  # [B, C] or [3, B, C]
            if label_map is not None:
                logits = label_map.logits(logits)  # in the classes of the data
                labels = label_map.known(labels)
            logits = logits.view(-1, len(labels), logits.shape[-1])  # [answers, B, C]
            answers = len(logits)
            wanted = labels.expand(answers, -1)
            loss = F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="none"
            )
            best = logits.topk(min(5, logits.shape[-1])).indices  # [answers, B, 5]
            right = best == labels[:, None]
            hits = torch.stack([wanted >= 0, right[..., 0], right.any(-1)])  # [3, answers, B]
            sums[0, :answers].add_(loss.view(answers, -1).sum(1, dtype=wide))
            sums[1:4, :answers].add_(hits.sum(-1))
            count += len(labels)
            if num_classes:
                by_class.index_add_(1, labels.clamp(min=0), hits[:2, 0].long())
    finally:
        model.train(was_training)
    sums[4] = count
    measured = world.all_reduce_sum(sums).T.tolist()
    result: dict[str, Any] = {"count": int(measured[0][4])}
    if not measured[0][1]:
        return result
    for head, (loss, known, top1, top5, count) in zip(HEADS[:answers], measured):
        rates = {"loss": loss / known, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
        result |= {f"{head}{name}": rate for name, rate in rates.items()}
    if num_classes:
        result["class_count"], result["class_top1"] = world.all_reduce_sum(by_class).cpu().numpy()
    return result
