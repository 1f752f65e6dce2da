"""A frozen model whose answers are kept, the same whether stored, checked or asked in the loop."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from models.build import build_teacher, num_outputs
from models.class_map import LabelMap, find_label_map, read_class_subset
from models.distill import encode
from models.pretrained import classifier_names, read_notes, weights_digest

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
        memory_format: torch.memory_format = torch.contiguous_format,
        weights: str = "",
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.memory_format = memory_format  # of images and convolutions
        self.num_outputs = num_outputs
        self.classes = classes  # the outputs that are kept; None keeps all
        self.weights = weights  # where they come from
        self.dtype = dtype  # of autocast; None is float32
        kept = None if classes is None else torch.tensor(classes)
        self.register_buffer("kept", kept, persistent=False)
        self.eval().requires_grad_(False)
        if memory_format != torch.contiguous_format:  # which some models leave by themselves
            self.to(memory_format=memory_format)
        for head_name in classifier_names(model):
            head = model.get_submodule(head_name)
            head.forward = partial(_in_float32, head.forward)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        device: torch.device,
        log: Callable[[str], None] = print,
        written: Mapping[str, Any] | None = None,
    ) -> "Teacher":
        """The model of a configuration with exactly its weights, cut to DISTILL.CLASS_SUBSET.

        A user's function brings its own weights. `written` is the identity of the teacher that
        began the store, if there is one: its memory format is kept.
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
        name = cfg.MODEL.TYPE if by_function else f"{cfg.MODEL.NAME} {cfg.MODEL.ARGS}".strip()
        dtype = teacher_dtype(cfg, device)
        if written is None:
            is_last = cfg.TRAIN.CHANNELS_LAST and dtype is not None and is_convolutional(model)
        else:
            is_last = "memory_format" in written
        memory_format = torch.channels_last if is_last else torch.contiguous_format
        weights = cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED
        return cls(name, model, outputs, classes, dtype, memory_format, weights).to(device)

    @cached_property
    def names(self) -> list[str]:
        """The names of all outputs that a checkpoint of ours tells; none for other weights."""
        with suppress(ValueError, OSError):
            return list(map(str, read_notes(self.weights).get("class_names", [])))
        return []

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
            logits = self.model(images.contiguous(memory_format=self.memory_format))
        expected = [len(images), self.num_outputs]
        found = list(getattr(logits, "shape", [type(logits).__name__]))
        if found != expected:
            raise ValueError(
                f"the teacher {self.name} answered {len(images)} images with {found}, not with a"
                f" tensor {expected}: correct the model or its class count"
            )
        logits = logits.float()
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

    def label_map(
        self, num_data_classes: int, data_names: Sequence[str] = ()
    ) -> tuple[LabelMap | None, str]:
        """The map from the data's classes to the kept outputs; None and why if none is known."""
        return find_label_map(
            self.num_outputs,
            num_data_classes,
            subset=self.classes,
            names=self.names,
            data_names=data_names,
        )

    def identity(self) -> dict[str, Any]:
        """What tells it from others: records of different identities never share a store.

        What is not said is as it was before there was a choice.
        """
        identity = {
            "name": self.name,
            "weights_sha256": weights_digest(self.model.state_dict()),
            "dtype": self.precision,
        }
        if self.memory_format == torch.channels_last:
            identity["memory_format"] = "channels_last"
        if self.model._compiled_call_impl is not None:
            identity["compiled"] = True
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


def is_convolutional(model: nn.Module) -> bool:
    """Whether a model convolves beyond a patch embedding: in half precision the GPU's units for
    products then want channels last, in float32 nothing does.
    """
    return sum(isinstance(part, nn.Conv2d) for part in model.modules()) > 1


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


def _in_float32(forward: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return forward(features.float())
