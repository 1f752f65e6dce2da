"""ImageNet-22k and ImageNet-1k: which class of the one is which of the other, by WordNet id."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

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
    """For each of the 1,000 classes its position among the 21,841, -1 where it is absent (one is)."""
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


def outputs_of_labels(
    num_outputs: int, num_labels: int, numbers_own: bool
) -> tuple[np.ndarray | None, str]:
    """For each label of the data the output that stands for it, -1 where none does; None with the
    reason where labels are of no use.

    With `numbers_own` it is such data that numbers the outputs; else they have a meaning already.
    """
    if not num_labels:
        return None, "the data has no labels"
    mapping = class_map(num_outputs, num_labels)
    if mapping is None and numbers_own:
        return np.arange(num_labels), ""
    return mapping, (
        ""
        if mapping is not None
        else (
            f"the data has {num_labels} classes and the model {num_outputs}, and nothing says which"
            " is which: name the model's classes in DATA.CLASS_LIST, so that the data's get"
            " their ids"
        )
    )


def map_outputs(logits: torch.Tensor, mapping: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Outputs [B, C] in the data's numbering; a class without an output gets its row's minimum, so
    it never wins.
    """
    mapping = torch.as_tensor(mapping, device=logits.device)
    mapped = logits.index_select(-1, mapping.clamp(min=0))
    return torch.where(mapping < 0, logits.amin(-1, keepdim=True), mapped)


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
