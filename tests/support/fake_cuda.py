"""CUDA without a GPU: what a program would launch, wait for and copy, counted on fake tensors.

    with fake_cuda() as device:  # tensors that are made on it have shapes, but no values
        model = on_fake(model, device)
        with Watch(device) as watch, watch.phase("forward"):
            model(images)
    watch.launches["forward"], watch.waits, watch.blocking

Backward passes do not run on fake CUDA: count those on fake tensors of the CPU, `fake_cuda("cpu")`.
Attention is counted as its plain products and softmax, more than a real kernel launches.
"""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that make no kernel run: they name memory, or only reserve it.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# Their results' shapes or values are asked of the device.
WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}
# Tensors that one launch of a multi-tensor kernel takes, by the number of lists; and its blocks.
LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS, BLOCK = 320, 65536  # elements
CONCATENATED = 128  # tensors that one launch of `cat` takes


@contextmanager
def fake_cuda(kind: str = "cuda") -> Iterator[torch.device]:
    """The device of fake tensors, for all that is made inside; streams are there and do nothing."""
    optimizers = importlib.import_module("torch.optim.optimizer")
    helpers = importlib.import_module("torch.utils._foreach_utils")
    with ExitStack() as stack:
        for module in (optimizers, helpers):  # else each call for many tensors is many calls
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(patch.object(module, "_foreach_supported_types", types))
        replaced = {
            "is_bf16_supported": lambda *args, **options: True,
            "Stream": lambda *args: Stream(),
            "stream": nullcontext,
            "current_stream": lambda *args: Stream(),
            "manual_seed_all": lambda seed: None,
        }
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        autocast = importlib.import_module("torch.cuda.amp.common")
        stack.enter_context(patch.object(autocast, "amp_definitely_not_available", lambda: False))
        stack.enter_context(patch.object(Tensor, "record_stream", lambda tensor, stream: None))
        stack.enter_context(patch.object(Tensor, "pin_memory", pinned))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to copy it
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield torch.device(kind, 0) if kind == "cuda" else torch.device(kind)


def pinned(tensor: Tensor) -> Tensor:
    """The same tensor, from now on taken for one in memory that a GPU reads by itself."""
    tensor.lies_in_pinned_memory = True
    return tensor


class Stream:
    """A stream of nothing."""

    def record_event(self) -> None:
        """No event is needed."""

    def wait_event(self, event: None) -> None:
        """Nothing is waited for."""


def on_fake(model: nn.Module, device: torch.device) -> nn.Module:
    """The same model, with fake parameters and buffers on a device."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                made = torch.empty_strided(value.shape, value.stride(), device=device)
                module._parameters[name] = nn.Parameter(made, value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                made = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=device
                )
                module._buffers[name] = made
    return model


class Watch(TorchDispatchMode):
    """Counts what is launched on a device by phase; remembers what the host would wait for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.launches: Counter[str] = Counter()  # by phase
        self.operations: Counter[tuple[str, str]] = Counter()  # by phase and operation
        self.waits: list[str] = []
        self.blocking: list[str] = []  # copies between devices that make the host wait
        self._phases = ["rest"]

    def clear(self) -> None:
        """Forget what was seen so far."""
        for seen in (self.launches, self.operations, self.waits, self.blocking):
            seen.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done inside under a name."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def during(self, name: str, function: Callable) -> Callable:
        """A function whose calls are counted under a name."""

        @wraps(function)
        def counted(*args: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*args, **options)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks for a device or a layout
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        phase = self._phases[-1]
        inputs = tensors_in((args, kwargs))
        is_by_mask = name == "index" and any(t.dtype == torch.bool for t in inputs[1:])
        is_there = any(t.device == self.device for t in inputs)
        if is_there and (is_by_mask or name in WAITING):
            self.waits.append(f"{phase}: {name}")
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        # A number on the CPU goes to a kernel as its argument.
        taking_part = [t for t in inputs if t.dim() or t.device.type != "cpu"]
        devices = {t.device.type for t in [*taking_part, *outputs]}
        if kwargs.get("pin_memory"):
            pinned(result)
        is_copy = name in ("_to_copy", "copy_", "_copy_from") and len(devices) > 1
        if is_copy and blocks(inputs, args, kwargs):
            self.blocking.append(f"{phase}: {name} {[tuple(t.shape) for t in inputs]}")
        if self.device.type in devices and not (name in FREE or is_view(func)):
            count = launches(name, args)
            self.launches[phase] += count
            self.operations[phase, name] += count
        return result


def blocks(tensors: list[Tensor], args: tuple, kwargs: dict) -> bool:
    """Whether a copy between devices makes the host wait: it is not `non_blocking`, or its end on
    the CPU is memory that CUDA first copies to its own.
    """
    is_asked = kwargs.get("non_blocking") or args[2:3] == (True,)
    ends = [t for t in tensors if t.device.type == "cpu"]
    return not (is_asked and all(hasattr(t, "lies_in_pinned_memory") for t in ends))


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def is_view(func: Any) -> bool:
    """Whether an operation only names its argument's memory anew."""
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def launches(name: str, args: tuple) -> int:
    """How many kernels an operation launches; multi-tensor ones take only so many tensors each."""
    if name in ("cat", "stack"):
        return -(-len(args[0]) // CONCATENATED)
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [value for value in args if isinstance(value, (list, tuple)) and tensors_in(value)]
    is_stepped = name.startswith("_fused_adam")
    if is_stepped:
        lists = lists[:4]  # the fifth is there for AMSGrad, the last counts the steps
    shapes = [[(t.shape, t.stride()) for t in tensors] for tensors in lists]
    if any(other != shapes[0] for other in shapes):
        return len(lists[0])  # each tensor by itself
    most = LISTS[len(lists)]
    count = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += 1
        blocks += -(-tensor.numel() // BLOCK)
        if tensors >= most or blocks >= BLOCKS:
            count += -(-blocks // BLOCKS)
            tensors = blocks = 0
    return count + bool(tensors)
