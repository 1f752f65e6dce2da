"""A frozen model whose answers are kept: which of its outputs, in which precision, and how the
data's labels are numbered in them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models.build import build_teacher, num_outputs
from models.class_map import class_map, map_outputs, read_class_subset
from models.distill import as_teacher, class_subset, encode, teacher_dtype, teacher_logits


@dataclass(frozen=True)
class Teacher:
    """A frozen model on its device, and how to ask it."""

    name: str
    model: nn.Module
    outputs: int  # how many it has
    classes: list[int] | None  # the outputs that are kept; None keeps all
    dtype: torch.dtype | None  # of autocast; None is float32

    @classmethod
    def from_config(
        cls, cfg: CfgNode, device: torch.device, log: Callable[[str], None] = print
    ) -> "Teacher":
        """The model of a configuration with exactly its weights, cut to DISTILL.CLASS_SUBSET; a
        user's function brings its own weights.
        """
        by_function = ":" in cfg.MODEL.TYPE
        if not (cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED or by_function):
            raise ValueError(
                f"MODEL.RESUME: name the weights of the teacher {cfg.MODEL.NAME} (--resume or"
                " --pretrained)"
            )
        model = as_teacher(build_teacher(cfg, log=log)).to(device)
        outputs, path = num_outputs(model), cfg.DISTILL.CLASS_SUBSET
        classes = read_class_subset(path, outputs) if path else None
        return cls(
            cfg.MODEL.TYPE if by_function else cfg.MODEL.NAME,
            model,
            outputs,
            classes,
            teacher_dtype(cfg, device),
        )

    @property
    def num_classes(self) -> int:
        """The number of outputs that are kept."""
        return self.outputs if self.classes is None else len(self.classes)

    @property
    def precision(self) -> str:
        """What it computes in, but for its head: float32 or float16."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def logits(self, images: Tensor) -> Tensor:
        """Its kept outputs [B, C] for images [B, 3, H, W], in float32."""
        return teacher_logits(self.model, images, self.classes, self.dtype)

    def in_the_loop(
        self,
        k: int,
        temperature: float,
        statistics: tuple[Sequence[float], Sequence[float]],
        own: tuple[Sequence[float], Sequence[float]],
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A function from a student's images to what a store would hold; their mean and std,
        `statistics`, give way to its `own`.
        """
        device = next(self.model.parameters()).device
        (mean, std), (own_mean, own_std) = (
            torch.tensor(pair, device=device)[..., None, None] for pair in (statistics, own)
        )
        is_same, scale, shift = statistics == own, std / own_std, (mean - own_mean) / own_std
        # once: a copy to a GPU is waited for
        classes = None if self.classes is None else torch.tensor(self.classes, device=device)

        def targets(images: Tensor) -> tuple[Tensor, Tensor]:
            images = images if is_same else images * scale + shift
            return encode(teacher_logits(self.model, images, classes, self.dtype), k, temperature)

        return targets

    def label_map(self, num_data_classes: int) -> np.ndarray | None:
        """For each class of the data the kept output that stands for it, -1 where none does; None
        if the data's labels don't fit.
        """
        mapping = class_map(self.outputs, num_data_classes)
        if self.classes is None:
            return mapping
        if mapping is None:
            return class_map(self.num_classes, num_data_classes)
        place = np.full(self.outputs, -1)
        place[self.classes] = np.arange(self.num_classes)
        return np.where(mapping < 0, -1, place[mapping])

    def in_data_classes(self, logits: Tensor, label_map: np.ndarray) -> Tensor:
        """All outputs of the model in the data's numbering."""
        return map_outputs(
            logits if self.classes is None else class_subset(logits, self.classes), label_map
        )

    def identity(self) -> dict[str, Any]:
        """What tells it from others: records of different identities never share a store."""
        subset = (
            {}
            if self.classes is None
            else {"classes_sha256": hashlib.sha256(repr(self.classes).encode()).hexdigest()}
        )
        return {
            "name": self.name,
            "weights_sha256": weights_digest(self.model),
            "dtype": self.precision,
            **subset,
        }


def weights_digest(model: nn.Module) -> str:
    """The sha256 of a model's state, in hex: names, types, shapes and bytes in the order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
