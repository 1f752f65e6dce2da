"""ImageNet-22k and ImageNet-1k: which class of the one is which of the other, by WordNet id."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_SUBSETS = {1000: "imagenet-1k", 21841: "imagenet-22k"}


@cache
def imagenet_wnids(num_classes: int) -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 or 21,841 classes, in class order."""
    from timm.data import ImageNetInfo  # holds the lists; slow to import, and most runs need none

    if num_classes not in _SUBSETS:
        raise ValueError(
            f"no WordNet ids are known for {num_classes} classes, only for"
            f" {' and '.join(map(str, _SUBSETS))}"
        )
    return tuple(ImageNetInfo(_SUBSETS[num_classes]).label_names())


def map_22k_to_1k() -> np.ndarray:
    """For each of the 1,000 classes its position among the 21,841; -1 for the absent one."""
    return class_map(21841, 1000)


def class_map(num_outputs: int, num_data_classes: int) -> np.ndarray | None:
    """For each class of the data the model's output that stands for it, -1 where there is none;
    None if no map is known.
    """
    if num_outputs == num_data_classes:
        return np.arange(num_outputs, dtype=np.int64)
    if {num_outputs, num_data_classes} != set(_SUBSETS):
        return None
    position = {wnid: index for index, wnid in enumerate(imagenet_wnids(num_outputs))}
    return np.array(
        [position.get(wnid, -1) for wnid in imagenet_wnids(num_data_classes)], dtype=np.int64
    )


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Which output of a model stands for each class of the data."""

    outputs: Tensor  # int64 [data classes], -1 where no output stands for the class

    @cached_property
    def is_identity(self) -> bool:
        """Whether the data's class number is the output's number already."""
        return self.outputs.tolist() == list(range(len(self.outputs)))

    def to(self, device: torch.device) -> "LabelMap":
        """The same map on the device where labels and logits are."""
        moved = LabelMap(self.outputs.to(device))
        vars(moved)["is_identity"] = self.is_identity  # seen here: a GPU would be waited for
        return moved

    def labels(self, labels: Tensor) -> Tensor:
        """The data's labels [B] as outputs [B]; -1 without a label or an output for it."""
        if self.is_identity:
            return labels
        outputs = self.outputs[labels.clamp(min=0)]
        return outputs.masked_fill(labels < 0, -1)

    def known(self, labels: Tensor) -> Tensor:
        """The data's labels [B], -1 where no output stands for the class."""
        return labels if self.is_identity else labels.masked_fill(self.labels(labels) < 0, -1)

    def logits(self, logits: Tensor) -> Tensor:
        """Outputs [B, C] in the data's numbering [B, data classes].

        A class without an output gets its row's minimum, so that it never wins.
        """
        if self.is_identity:
            return logits
        mapped = logits.index_select(-1, self.outputs.clamp(min=0))
        return torch.where(self.outputs < 0, logits.amin(-1, keepdim=True), mapped)


def find_label_map(
    num_outputs: int,
    num_classes: int,
    *,
    subset: Sequence[int] | None = None,
    data_numbers_outputs: bool = False,
    names: Sequence[str] = (),
    data_names: Sequence[str] = (),
) -> tuple[LabelMap | None, str]:
    """The map from the data's classes to a model's outputs; None and the reason if none is known.

    With `subset` only these outputs are kept, and numbered anew. `data_numbers_outputs` says that
    the model learns from this data, so that an output means what the data's number means. Where
    `names` of the outputs are known and the data has some of them, they decide.
    """
    if not num_classes:
        return None, "the data has no labels"
    outputs = class_map(num_outputs, num_classes)
    position = {name: output for output, name in enumerate(names)}
    are_known = len(position) == num_outputs and not position.keys().isdisjoint(data_names)
    if are_known and (outputs is None or num_outputs == num_classes):
        unknown = [name for name in data_names if name not in position]
        if unknown:
            return None, (
                f"the data's class {unknown[0]} is none of those that the weights were trained on"
                f" ({', '.join(names[:3])}{', ...' * (num_outputs > 3)}): name it as there"
            )
        outputs = np.array([position[name] for name in data_names])
    if subset is not None:
        if outputs is None:
            outputs = class_map(len(subset), num_classes)
        else:
            position = np.full(num_outputs, -1)
            position[subset] = np.arange(len(subset))
            outputs = np.where(outputs < 0, -1, position[outputs])
        num_outputs = len(subset)
    if outputs is None and data_numbers_outputs:
        outputs = np.arange(num_classes)
    if outputs is None:
        return None, (
            f"the data has {num_classes} classes and the model {num_outputs}, and nothing says"
            " which is which: name the model's classes in DATA.CLASS_LIST, so that the data's get"
            " their ids"
        )
    return LabelMap(torch.from_numpy(outputs)), ""


def read_class_subset(
    path: str | Path, num_outputs: int, class_names: Sequence[str] = ()
) -> list[int]:
    """Read output indices from a file of indices or class names, one a line (`class_names` defaults
    to ImageNet's WordNet ids).
    """
    names = class_names or (imagenet_wnids(num_outputs) if num_outputs in _SUBSETS else ())
    index_of = {name: index for index, name in enumerate(names)}
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the list of classes cannot be read ({error})") from None
    subset = [
        index_of.get(line, int(line) if line.isascii() and line.isdigit() else -1)
        for line in lines
        if line
    ]
    wrong = [
        line for line, index in zip(filter(None, lines), subset) if not 0 <= index < num_outputs
    ]
    if wrong:
        raise ValueError(
            f"{path}: {', '.join(wrong[:3])}{', ...' * (len(wrong) > 3)}: neither class names of"
            f" the teacher nor indices below {num_outputs}"
        )
    if not subset or len(set(subset)) < len(subset):
        raise ValueError(f"{path}: expected some classes, one a line, each once")
    return subset
