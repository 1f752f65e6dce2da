"""Teacher outputs as K probabilities an image, and the losses of a student that learns from them.

A teacher's output is kept as its K largest probabilities. What they leave of 1 is spread evenly
over the other C - K classes: that is the target, and no loss here builds it as a dense [B, C]
matrix. Losses are computed in float32 (float64 for a float64 student), whatever autocast says, and
are means over the batch."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from models.pretrained import classifier_names

_LOW_BITS = 0xFFFFFFFF


def encode(
    logits: torch.Tensor, k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest of softmax(logits / temperature): (int64 classes, float16 probabilities),
    both [B, K], descending.

    Equal probabilities are ordered by class, lowest first. `k` beyond the number of classes keeps
    all of them."""
    if k < 1 or temperature <= 0:
        raise ValueError(
            f"k = {k}, temperature = {temperature}: at least one class must be kept, at a"
            " temperature above 0"
        )
    num_classes = logits.shape[-1]
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    # topk leaves the order of ties open. The bits of a non-negative float32 sort like the number
    # itself, so bits and class
    # make one integer in which no two are equal.
    reversed_class = torch.arange(num_classes - 1, -1, -1, device=logits.device)
    keys = probs.view(torch.int32).to(torch.int64).mul_(_LOW_BITS + 1).add_(reversed_class)
    indices = num_classes - 1 - (torch.topk(keys, min(k, num_classes), dim=-1).values & _LOW_BITS)
    return indices, probs.gather(-1, indices).half()


def as_teacher(model: nn.Module) -> nn.Module:
    """The model, frozen and in evaluation mode, with a head that computes in float32 whatever
    autocast says.
    """
    model.eval().requires_grad_(False)
    for name in classifier_names(model):
        head = model.get_submodule(name)
        head.forward = partial(_in_float32, head.forward)
    return model


def teacher_dtype(cfg, device: torch.device) -> torch.dtype | None:
    """The autocast type of a teacher: float16 on CUDA, else None (float32). bfloat16's ties and
    errors would end up in the records.
    """
    return (
        torch.float16
        if device.type == "cuda" and cfg.AMP_ENABLE and cfg.AMP_DTYPE != "off"
        else None
    )


@torch.no_grad()
def teacher_logits(
    teacher: nn.Module,
    images: torch.Tensor,
    classes: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Float32 outputs [B, C] of a teacher for images [B, 3, H, W], of the given classes alone if
    `classes` is not None.
    """
    with nullcontext() if dtype is None else torch.autocast(images.device.type, dtype):
        logits = teacher(images.contiguous())
    logits = logits.float()
    return logits if classes is None else class_subset(logits, classes)


def teacher_targets(
    teacher: nn.Module,
    images: torch.Tensor,
    k: int,
    temperature: float = 1.0,
    class_subset: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a store keeps of a teacher's output for images: `encode`'s classes and probabilities,
    the same whether stored or online.
    """
    return encode(teacher_logits(teacher, images, class_subset, dtype), k, temperature)


def class_subset(logits: torch.Tensor, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The outputs of the given classes alone; the softmax of `encode` then renormalises over them."""
    return logits.index_select(-1, torch.as_tensor(indices, device=logits.device))


def densify(
    indices: torch.Tensor, probs: torch.Tensor, num_classes: int, subtract: bool = False
) -> torch.Tensor:
    """The whole target [B, C] that K stored probabilities stand for, in float32; `subtract` as of
    `_split`.
    """
    probs, rest = _split(probs.float(), num_classes, subtract)
    return rest.expand(-1, num_classes).scatter(-1, indices.long(), probs)


def sparse_soft_cross_entropy(
    student_logits: torch.Tensor, indices: torch.Tensor, probs: torch.Tensor, subtract: bool = False
) -> torch.Tensor:
    """Cross entropy of a student [B, C] with `densify`'s targets, which are never built: the mean
    over the batch.
    """
    log_probs = torch.log_softmax(_at_least_float32(student_logits), dim=-1)
    probs, rest = _split(probs.to(log_probs.dtype), log_probs.shape[-1], subtract)
    kept = ((probs - rest) * log_probs.gather(-1, indices.long())).sum(-1)
    return -(kept + rest.squeeze(-1) * log_probs.sum(-1)).mean()


def label_cross_entropy(student_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy with dense targets [B, C]: the mean over the images that have a label, i.e. a
    row that is not all zero.
    """
    losses = -(targets * torch.log_softmax(_at_least_float32(student_logits), dim=-1)).sum(-1)
    return losses.sum() / (targets.amax(-1) > 0).sum().clamp(min=1)


def distillation_loss(
    student_logits: torch.Tensor,
    indices: torch.Tensor,
    probs: torch.Tensor,
    targets: torch.Tensor | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    hard: bool = False,
    subtract: bool = False,
) -> torch.Tensor:
    """(1 - alpha) * cross entropy with dense label targets + alpha * temperature^2 * cross entropy
    with the teacher at that temperature.

    With `hard` the teacher's part is the cross entropy with its top-1 class instead, which has no
    temperature."""
    if alpha < 1 and targets is None:
        raise ValueError(
            f"DISTILL.ALPHA {alpha} asks for labels, but this data has none that fit: set"
            " DISTILL.ALPHA 1"
        )
    if hard:
        teacher = functional.cross_entropy(_at_least_float32(student_logits), indices[:, 0].long())
    else:
        student = _at_least_float32(student_logits) / temperature
        teacher = temperature**2 * sparse_soft_cross_entropy(student, indices, probs, subtract)
    if alpha == 1:
        return teacher
    return (1 - alpha) * label_cross_entropy(student_logits, targets) + alpha * teacher


def share_right(targets: torch.Tensor, answers: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Percent of the images that show the class answered [B], given their smoothed targets [B, C];
    of a mixed image, the part that does.
    """
    shown = targets.gather(1, answers[:, None]) - smoothing / targets.shape[1]
    return 100 * (shown.clamp(min=0) / (1 - smoothing)).mean()


def _split(
    probs: torch.Tensor, num_classes: int, subtract: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored probabilities, and what each other class gets [B, 1], so that all sum to 1.

    Float16 may have rounded a row's sum up beyond 1: it is scaled back; or, with `subtract`, the
    other classes get what is below 0."""
    total = probs.sum(-1, keepdim=True)
    others = num_classes - probs.shape[-1]
    if others > 0 and subtract:
        return probs, (1 - total) / others
    rest = (1 - total).clamp(min=0) / others if others > 0 else torch.zeros_like(total)
    return probs / total.clamp(min=1), rest


def _in_float32(forward, features: torch.Tensor) -> torch.Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return forward(features.float())


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
