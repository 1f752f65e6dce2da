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
    probs, left = _split(probs, num_classes, subtract, torch.float32)
    rest = left / max(num_classes - probs.shape[-1], 1)
    return rest.expand(-1, num_classes).scatter(-1, indices.long(), probs)


def sparse_soft_cross_entropy(
    student_logits: Tensor, indices: Tensor, probs: Tensor, subtract: bool = False
) -> Tensor:
    """Cross entropy of a student [B, C] with `densify`'s targets, which are never built: the mean
    over the batch.
    """
    return _sparse_loss(_log_softmax(student_logits), indices, probs, subtract)[0]


def label_cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with dense targets [B, C]: the mean over the images that have a label, i.e. a
    row that is not all zero.
    """
    return _label_loss(_log_softmax(student_logits), targets)


@dataclass(frozen=True)
class DistillLoss:
    """What a student pays for its logits: `alpha` of it to the teacher, the rest to the labels."""

    alpha: float = 1.0
    temperature: float = 1.0
    hard: bool = False  # learn the teacher's top-1 class instead, which has no temperature
    subtract: bool = False  # as of `_split`
    two_heads: bool = False  # labels are learned by the class head, the rest by the other

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "DistillLoss":
        """The loss that DISTILL describes."""
        settings = cfg.DISTILL
        return cls(
            settings.ALPHA,
            settings.TEMPERATURE,
            settings.HARD,
            settings.EXCESS == "subtract",
            settings.TWO_HEADS,
        )

    def __call__(
        self,
        answer: Tensor | tuple[Tensor, Tensor],
        indices: Tensor,
        probs: Tensor,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The `loss` of logits [B, C], or of (class head's, distillation head's), given the
        teacher's record [B, K] and label targets [B, C]; and its parts without their weights.

        loss = (1 - alpha) * cross entropy with the labels (`label_loss`)
        + alpha * temperature^2 * cross entropy with the teacher at that temperature.
        `kl` is temperature^2 * that cross entropy without the teacher's own entropy.
        """
        class_logits, distill_logits = self._heads(answer)
        temperature = 1.0 if self.hard else self.temperature
        scaled = distill_logits if temperature == 1 else distill_logits / temperature
        log_probs = _log_softmax(scaled)
        if self.hard:
            teacher = kl = functional.nll_loss(log_probs, indices[:, 0].long())
        else:
            teacher, kl = _sparse_loss(log_probs, indices, probs, self.subtract)
        if temperature != 1:
            teacher, kl = temperature**2 * teacher, temperature**2 * kl
        if self.alpha == 1:
            return {"loss": teacher, "kl": kl}
        if targets is None:
            raise ValueError(
                f"DISTILL.ALPHA {self.alpha} asks for labels, but this data has none that fit: set"
                " DISTILL.ALPHA 1"
            )
        class_log_probs = log_probs if scaled is class_logits else _log_softmax(class_logits)
        label = _label_loss(class_log_probs, targets)
        loss = (1 - self.alpha) * label + self.alpha * teacher
        return {"loss": loss, "kl": kl, "label_loss": label}

    def _heads(self, answer: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits that learn from the labels, and those that learn from the teacher."""
        if not self.two_heads:
            logits = _at_least_float32(answer)
            return logits, logits
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ValueError(
                "DISTILL.TWO_HEADS: in training the model must answer with (class logits,"
                f" distillation logits), but this one does with a {type(answer).__name__}"
            )
        return _at_least_float32(answer[0]), _at_least_float32(answer[1])


def _split(
    probs: Tensor, num_classes: int, subtract: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stored probabilities, and what they leave to all other classes [B, 1], which sum to 1.

    Float16 may have rounded a row's sum up beyond 1: it is scaled back; or, with `subtract`, the
    other classes get what is below 0. Where all classes are kept (K = C) no other one is left: they
    sum to what float16 has made of 1, and only what exceeds it is scaled back.
    """
    total = probs.sum(-1, keepdim=True, dtype=dtype)
    if subtract and num_classes > probs.shape[-1]:
        return probs.to(dtype), 1 - total
    scale = total.clamp(min=1)
    left = scale - total if num_classes > probs.shape[-1] else torch.zeros_like(total)
    return probs / scale, left


def _sparse_loss(
    log_probs: Tensor, indices: Tensor, probs: Tensor, subtract: bool
) -> tuple[Tensor, Tensor]:
    """Cross entropy of a student's log probabilities [B, C] with K stored probabilities, and the
    same without the entropy of these: means over the batch.
    """
    count, num_classes = log_probs.shape
    k = probs.shape[-1]
    probs, left = _split(probs, num_classes, subtract, log_probs.dtype)
    rest = left / max(num_classes - k, 1)
    # of the columns, and of the sum over all classes
    weights = rest.new_empty(count, k + 1)
    torch.sub(rest, probs, out=weights[:, :k])
    torch.neg(rest, out=weights[:, k:])
    answers = log_probs.gather(-1, indices.long()), log_probs.sum(-1, keepdim=True)
    loss = torch.dot(weights.view(-1), torch.cat(answers, -1).view(-1)) / count
    if subtract:
        left, rest = left.clamp(min=0), rest.clamp(min=0)
    known = torch.empty_like(weights)  # less the entropy
    torch.xlogy(probs, probs, out=known[:, :k])
    torch.xlogy(left, rest, out=known[:, k:])
    return loss, torch.add(loss.detach(), known.sum(), alpha=1 / count)


def _label_loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the rows of targets that are not all zero."""
    return -(targets * log_probs).sum() / targets.any(-1).sum().clamp(min=1)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(_at_least_float32(logits), dim=-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model answers with a {type(logits).__name__}: one tensor is needed (of two heads,"
            " DISTILL.TWO_HEADS has each learn its own)"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
