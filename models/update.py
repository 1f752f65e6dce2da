"""What an update moves of a model and what it leaves alone; where a flag on the device says so, all
of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers that normalise by the statistics of a batch."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def set_training_mode(model: nn.Module, frozen: bool, keep_statistics: bool) -> None:
    """Training mode, but not for what is to stay as it is: a frozen backbone, or running
    statistics.
    """
    model.train(not frozen)
    if keep_statistics:
        for module in batch_norms(model):
            module.eval()


def guarded_step(
    optimizer: torch.optim.Optimizer, is_good: Tensor, wait: bool | None = None
) -> None:
    """The optimizer's step if the one-element tensor `is_good` holds, else nothing moves.

    Without `wait` the device decides and the host does not ask it (default: on CUDA); that needs a
    fused optimizer.
    """
    if wait is None:
        wait = is_good.device.type != "cuda"
    if wait or not all(group.get("fused") for group in optimizer.param_groups):
        if is_good:
            optimizer.step()
        return
    for group in optimizer.param_groups:
        # a fused first step that is skipped would leave the buffers uninitialised
        for parameter in group["params"] if group.get("momentum") else ():
            if "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    # The interface between GradScaler and fused optimizers: where found_inf is not 0 the kernel
    # changes nothing.
    optimizer.grad_scale = None
    optimizer.found_inf = torch.empty_like(is_good, dtype=torch.float32)
    torch.logical_not(is_good, out=optimizer.found_inf)
    optimizer.step()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The bytes of each buffer that a forward pass in training mode changes."""
    return [
        buffer.view(-1).view(torch.uint8)
        for module in batch_norms(model)
        if module.training
        for buffer in module.buffers(False)
    ]


def in_one(tensors: list[Tensor]) -> Tensor:
    """A copy of tensors [n], one behind the other: a few launches for however many they are."""
    return torch.cat(tensors) if tensors else torch.empty(0)


@torch.no_grad()
def restore_unless(is_good: Tensor, tensors: list[Tensor], saved: Tensor) -> None:
    """Give tensors what `in_one` has saved back where the flag does not hold; CUDA is not waited
    for.
    """
    if not tensors or (is_good.device.type == "cpu" and is_good):
        return
    chosen = torch.where(is_good, in_one(tensors), saved)
    torch._foreach_copy_(tensors, chosen.split([len(tensor) for tensor in tensors]))


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave running statistics alone: a forward pass that is recomputed must not count twice."""
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked = count


class EMA:
    """An exponential moving average of a model's weights and buffers, as a model of its own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin at the model's present weights."""
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        kinds: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for of in nn.Module.parameters, nn.Module.buffers:
            for pair in zip(of(self.model), of(model)):
                kinds.setdefault(pair[0].dtype, []).append(pair)
        # of each type one tensor, whose parts the average's are, and the model's: all as they lie
        # in memory
        self._parts: list[tuple[Tensor, list[Tensor]]] = []
        for pairs in kinds.values():
            theirs = [value.detach().as_strided((value.numel(),), (1,)) for _, value in pairs]
            whole = torch.cat(theirs)
            parts = whole.split([len(part) for part in theirs])
            for (mine, _), part in zip(pairs, parts):
                mine.data = part.as_strided(mine.shape, mine.stride())
            self._parts.append((whole, theirs))

    @torch.no_grad()
    def update(self, updates: int, is_good: Tensor) -> None:
        """Move towards the model after its update number `updates`, if the flag holds; early on in
        larger steps.
        """
        weight = is_good * (1 - min(self.decay, (1 + updates) / (10 + updates)))
        for mine, theirs in self._parts:
            if mine.is_floating_point():
                mine.lerp_(torch.cat(theirs), weight.to(mine.dtype))
            else:
                torch.cat(theirs, out=mine)
