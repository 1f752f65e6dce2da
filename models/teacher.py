"""A frozen model whose answers are kept, the same whether stored, checked or asked in the loop."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models.build import build_teacher, num_outputs
from models.class_map import LabelMap, find_label_map, read_class_subset
from models.distill import encode
from models.pretrained import classifier_names

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std of each channel


class Teacher(nn.Module):
    """A model without gradients, in eval mode, that gives its kept outputs in float32.

    Its head computes in float32 whatever `dtype` autocast has for the rest.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        num_outputs: int,
        classes: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.num_outputs = num_outputs
        self.classes = classes  # the outputs that are kept; None keeps all
        self.dtype = dtype  # of autocast; None is float32
        kept = None if classes is None else torch.tensor(classes)
        self.register_buffer("kept", kept, persistent=False)
        self.eval().requires_grad_(False)
        for head_name in classifier_names(model):
            head = model.get_submodule(head_name)
            head.forward = partial(_in_float32, head.forward)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, device: torch.device, log: Callable[[str], None] = print
    ) -> "Teacher":
        """The model of a configuration with exactly its weights, cut to DISTILL.CLASS_SUBSET.

        A user's function brings its own weights.
        """
        by_function = ":" in cfg.MODEL.TYPE
        if not (cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED or by_function):
            raise ValueError(
                f"MODEL.RESUME: name the weights of the teacher {cfg.MODEL.NAME} (--resume or"
                " --pretrained)"
            )
        model = build_teacher(cfg, log=log)
        outputs = num_outputs(model)
        path = cfg.DISTILL.CLASS_SUBSET
        classes = read_class_subset(path, outputs) if path else None
        name = cfg.MODEL.TYPE if by_function else cfg.MODEL.NAME
        return cls(name, model, outputs, classes, teacher_dtype(cfg, device)).to(device)

    @property
    def num_classes(self) -> int:
        """The number of outputs that are kept."""
        return self.num_outputs if self.classes is None else len(self.classes)

    @property
    def precision(self) -> str:
        """What it computes in, but for its head: float32 or float16."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Its kept outputs [B, C] for images [B, 3, H, W], in float32."""
        mixed_precision = torch.autocast(
            images.device.type, self.dtype, enabled=self.dtype is not None
        )
        with strict_float32(), mixed_precision:
            logits = self.model(images.contiguous()).float()
        return logits if self.kept is None else logits.index_select(-1, self.kept)

    def in_the_loop(
        self, k: int, temperature: float, statistics: Statistics, own: Statistics
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """A function from a student's images to what a store would hold.

        The images are normalised by `statistics`, the teacher's would be by its `own`.
        """
        # [3, 1, 1] each; copied once, as a copy to a GPU is waited for
        device = next(self.model.parameters()).device
        mean, std = torch.tensor(statistics, device=device)[..., None, None]
        own_mean, own_std = torch.tensor(own, device=device)[..., None, None]
        scale = std / own_std
        shift = (mean - own_mean) / own_std

        def targets(images: Tensor) -> tuple[Tensor, Tensor]:
            if statistics != own:
                images = images * scale + shift
            return encode(self(images), k, temperature)

        return targets

    def label_map(self, num_data_classes: int) -> tuple[LabelMap | None, str]:
        """The map from the data's classes to the kept outputs; None and why if none is known."""
        return find_label_map(self.num_outputs, num_data_classes, subset=self.classes)

    def identity(self) -> dict[str, Any]:
        """What tells it from others: records of different identities never share a store."""
        identity = {
            "name": self.name,
            "weights_sha256": weights_digest(self.model),
            "dtype": self.precision,
        }
        if self.classes is not None:
            text = repr(self.classes)
            identity["classes_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return identity


def teacher_dtype(cfg: CfgNode, device: torch.device) -> torch.dtype | None:
    """The autocast type of a teacher: float16 on CUDA, else None (float32).

    Never bfloat16, whose ties and errors would end up in the records.
    """
    is_mixed = cfg.AMP_ENABLE and cfg.AMP_DTYPE != "off"
    return torch.float16 if is_mixed and device.type == "cuda" else None


@contextmanager
def strict_float32() -> Iterator[None]:
    """Let float32 mean float32: no TF32 in convolutions and products, whatever the student has."""
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


def weights_digest(model: nn.Module) -> str:
    """The sha256 of a model's state, in hex: names, types, shapes and bytes, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_float32(forward: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return forward(features.float())
