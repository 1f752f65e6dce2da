"""Teacher outputs as K probabilities an image, and the losses of a student that learns from them.

A teacher's output is kept as its K largest probabilities. What they leave of 1 is spread evenly
over the other C - K classes: that is the target, and no loss here builds it as a dense [B, C]
matrix. Losses are computed in float32 (float64 for a float64 student), whatever autocast says, and
are means over the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from yacs.config import CfgNode

_LOW_BITS = 0xFFFFFFFF


def encode(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The `k` largest of softmax(logits / temperature): (int64 classes, float16 probabilities),
    both [B, K], descending.

    Equal probabilities are ordered by class, lowest first. `k` beyond the number of classes keeps
    all of them.
    """
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


def densify(indices: Tensor, probs: Tensor, num_classes: int, subtract: bool = False) -> Tensor:
    """The whole target [B, C] that K stored probabilities stand for, in float32; `subtract` as of
    `_split`.
    """
    probs, rest = _split(probs.float(), num_classes, subtract)
    return rest.expand(-1, num_classes).scatter(-1, indices.long(), probs)


def sparse_soft_cross_entropy(
    student_logits: Tensor, indices: Tensor, probs: Tensor, subtract: bool = False
) -> Tensor:
    """Cross entropy of a student [B, C] with `densify`'s targets, which are never built: the mean
    over the batch.
    """
    log_probs = torch.log_softmax(_at_least_float32(student_logits), dim=-1)
    probs, rest = _split(probs.to(log_probs.dtype), log_probs.shape[-1], subtract)
    kept = ((probs - rest) * log_probs.gather(-1, indices.long())).sum(-1)
    return -(kept + rest.squeeze(-1) * log_probs.sum(-1)).mean()


def label_cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with dense targets [B, C]: the mean over the images that have a label, i.e. a
    row that is not all zero.
    """
    losses = -(targets * torch.log_softmax(_at_least_float32(student_logits), dim=-1)).sum(-1)
    return losses.sum() / targets.any(-1).sum().clamp(min=1)


@dataclass(frozen=True)
class DistillLoss:
    """What a student pays for its logits: `alpha` of it to the teacher, the rest to the labels."""

    alpha: float = 1.0
    temperature: float = 1.0
    hard: bool = False  # learn the teacher's top-1 class instead, which has no temperature
    subtract: bool = False  # as of `_split`

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "DistillLoss":
        """The loss that DISTILL describes."""
        settings = cfg.DISTILL
        is_subtracted = settings.EXCESS == "subtract"
        return cls(settings.ALPHA, settings.TEMPERATURE, settings.HARD, is_subtracted)

    def __call__(
        self, student_logits: Tensor, indices: Tensor, probs: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """The loss of logits [B, C], given the teacher's record [B, K] and label targets [B, C].

        (1 - alpha) * cross entropy with the labels
        + alpha * temperature^2 * cross entropy with the teacher at that temperature.
        """
        if self.hard:
            logits = _at_least_float32(student_logits)
            teacher = functional.cross_entropy(logits, indices[:, 0].long())
        else:
            logits = _at_least_float32(student_logits)
            if self.temperature != 1:
                logits = logits / self.temperature
            teacher = sparse_soft_cross_entropy(logits, indices, probs, self.subtract)
            if self.temperature != 1:
                teacher = self.temperature**2 * teacher
        if self.alpha == 1:
            return teacher
        if targets is None:
            raise ValueError(
                f"DISTILL.ALPHA {self.alpha} asks for labels, but this data has none that fit: set"
                " DISTILL.ALPHA 1"
            )
        return (1 - self.alpha) * label_cross_entropy(
            student_logits, targets
        ) + self.alpha * teacher


def _split(probs: Tensor, num_classes: int, subtract: bool) -> tuple[Tensor, Tensor]:
    """Stored probabilities, and what each other class gets [B, 1], so that all sum to 1.

    Float16 may have rounded a row's sum up beyond 1: it is scaled back; or, with `subtract`, the
    other classes get what is below 0. Where all classes are kept (K = C) no other one is left: they
    sum to what float16 has made of 1, and only what exceeds it is scaled back.
    """
    total = probs.sum(-1, keepdim=True)
    others = num_classes - probs.shape[-1]
    if others > 0 and subtract:
        return probs, (1 - total) / others
    scale = total.clamp(min=1)
    rest = (scale - total) / others if others > 0 else torch.zeros_like(total)
    return probs / scale, rest


def _at_least_float32(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model answers with a {type(logits).__name__}: one tensor is needed")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
