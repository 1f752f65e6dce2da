"""How far stored records are from what their teacher says now, and whether that is the same."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from models.distill import densify, encode

LEAST_SAME_TOP1 = 0.999  # share of images
MOST_MEAN_KL = 1e-4
MOST_VALUE_ERROR = 5e-3
TIE = 1e-3  # classes whose probabilities are closer than this may change places
SMALLEST = 1e-10  # probabilities below count as this much in a logarithm
WORST_SHOWN = 5


class Comparison(NamedTuple):
    """Of each image [B]: how its record differs from the teacher's answer."""

    value_error: Tensor  # largest difference of a probability, float
    divergence: Tensor  # KL of the answer from the record, allowing for sums that are not 1, float
    other_top1: Tensor  # whether the most probable class is another, and not for a tie
    other_classes: Tensor  # number of columns with another class, and not for a tie
    inexact: Tensor  # whether any bit differs
    stored_top1: Tensor
    top1: Tensor


def compare(indices: Tensor, probs: Tensor, logits: Tensor, temperature: float = 1.0) -> Comparison:
    """Stored classes [B, K] and probabilities [B, K] against the logits [B, C] that the teacher
    gives now.
    """
    num_classes = logits.shape[1]
    new_indices, new_probs = encode(logits, indices.shape[1], temperature)
    now = torch.softmax(logits.float() / temperature, dim=-1)
    probs = probs.float()
    is_class = indices < num_classes
    indices = indices.clamp(max=num_classes - 1)
    at_stored = now.gather(1, indices)
    value_error = (at_stored.half().float() - probs).abs().amax(1)  # rounded as the record is
    # A class that the record does not name has at most its last probability there.
    named = torch.zeros_like(now, dtype=torch.bool).scatter_(1, indices, True)
    is_named = named.gather(1, new_indices)
    excess = (new_probs.float() - probs[:, -1:]).clamp(min=0).masked_fill(is_named, 0).amax(1)
    # "not <=" rather than ">", so that what is no number counts as different.
    other = (indices != new_indices) & ~((now.gather(1, new_indices) - at_stored).abs() <= TIE)
    stored = densify(indices, probs, num_classes).clamp(min=SMALLEST)
    answer = densify(new_indices, new_probs, num_classes).clamp(min=SMALLEST)
    return Comparison(
        value_error=torch.maximum(value_error, excess).masked_fill(~is_class.all(1), torch.inf),
        divergence=(stored * (stored.log() - answer.log()) - stored + answer).sum(1),
        other_top1=other[:, 0],
        other_classes=other.sum(1),
        inexact=(indices != new_indices).any(1) | (probs != new_probs.float()).any(1),
        stored_top1=indices[:, 0],
        top1=new_indices[:, 0],
    )


@dataclass
class Agreement:
    """What comparing many images has shown, as plain numbers; those of several processes can be
    merged.
    """

    images: int = 0
    wrong_seeds: int = 0
    other_top1: int = 0
    other_classes: int = 0
    inexact: int = 0
    sum_divergence: float = 0.0
    most_value_error: float = 0.0
    worst: list[tuple[float, str]] = field(default_factory=list)  # how bad, which image and why

    def add(self, comparison: Comparison, wrong_seeds: Tensor, name: Callable[[int], str]) -> None:
        """Count a batch; `wrong_seeds` [B] says whose seed is not what it should be, `name` tells
        people which image a row is.
        """
        if not len(wrong_seeds):
            return
        wrong_seeds = wrong_seeds.cpu()
        found = Comparison(*(values.cpu() for values in comparison))
        error = torch.where(found.value_error.isnan(), torch.inf, found.value_error)
        self.images += len(wrong_seeds)
        self.wrong_seeds += int(wrong_seeds.sum())
        self.other_top1 += int(found.other_top1.sum())
        self.other_classes += int(found.other_classes.sum())
        self.inexact += int((found.inexact | wrong_seeds).sum())
        self.sum_divergence += float(found.divergence.double().sum())
        self.most_value_error = max(self.most_value_error, float(error.amax()))
        badness = error + wrong_seeds + found.other_top1.float()
        for row in torch.topk(badness, min(WORST_SHOWN, len(wrong_seeds))).indices.tolist():
            if badness[row] > 0:
                why = ", wrong seed" if wrong_seeds[row] else ""
                text = (
                    f"{name(row)}: off by {error[row]:.4f}, class {found.stored_top1[row]} stored,"
                    f" {found.top1[row]} now{why}"
                )
                self.worst.append((float(badness[row]), text))
        self._keep_worst()

    def merge(self, other: "Agreement") -> None:
        """Count what another process has found."""
        self.images += other.images
        self.wrong_seeds += other.wrong_seeds
        self.other_top1 += other.other_top1
        self.other_classes += other.other_classes
        self.inexact += other.inexact
        self.sum_divergence += other.sum_divergence
        self.most_value_error = max(self.most_value_error, other.most_value_error)
        self.worst += other.worst
        self._keep_worst()

    def faults(self, exact: bool = False) -> list[str]:
        """Why the records are not the teacher's; nothing if they are. `exact` asks for equality of
        every bit.
        """
        if not self.images:
            return ["no image was checked"]
        same_top1 = 1 - self.other_top1 / self.images
        divergence = self.sum_divergence / self.images
        faults = []
        if self.wrong_seeds:
            faults.append(f"{self.wrong_seeds:,} of {self.images:,} seeds are wrong")
        # "not <=" and "not >=", so that what is no number is a fault
        if not same_top1 >= LEAST_SAME_TOP1:
            faults.append(
                f"only {same_top1:.3%} have the same top-1 class, at least {LEAST_SAME_TOP1:.1%}"
                " must"
            )
        if not divergence <= MOST_MEAN_KL:
            faults.append(
                f"the mean KL divergence is {divergence:.2e}, at most {MOST_MEAN_KL:.0e} is allowed"
            )
        if not self.most_value_error <= MOST_VALUE_ERROR:
            faults.append(
                f"a probability is off by {self.most_value_error:.4f}, at most {MOST_VALUE_ERROR}"
                " is allowed"
            )
        if exact and self.inexact:
            faults.append(f"{self.inexact:,} of {self.images:,} records are not exactly equal")
        return faults

    def __str__(self) -> str:
        divergence = self.sum_divergence / max(self.images, 1)
        return (
            f"{self.images:,} images: {self.wrong_seeds:,} wrong seeds, {self.other_top1:,} other"
            f" top-1 classes, {self.other_classes:,} other classes in all, mean KL divergence"
            f" {divergence:.2e}, largest difference {self.most_value_error:.2e}, {self.inexact:,}"
            " not exactly equal"
        )

    def _keep_worst(self) -> None:
        self.worst = heapq.nlargest(WORST_SHOWN, self.worst)
