"""The tree of keys as an object: every key by attribute or by its dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

LONGEST_MESSAGE = 2000  # characters
MAPPING = "MODEL.ARGS"  # the one key whose value is a mapping, kept as a text of JSON


class ConfigError(ValueError):
    """A fault in the user's configuration: a line that names source, key, value and the way out.

    What makes it too long to read stands in the middle, which is left out.
    """

    def __init__(self, message: str, key: str = "") -> None:
        line = " ".join(message.splitlines())
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[:500]} ... {line[-500:]}"
        super().__init__(line)
        self.key = key  # the dotted key to blame, if it is one


class Config(CfgNode):
    """A configuration: yacs's tree of keys, with what follows from several of them.

    Modules that may not import `configs` are handed one, and find here what they need.
    """

    @property
    def is_paired(self) -> bool:
        """Whether neighbours of an epoch's order are mixed with each other."""
        aug = self.AUG
        mixes = aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None
        return aug.MIXUP_MODE == "pair2" and mixes

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        node = self
        for name in key.split("."):
            node = node[name]
        return node

    def replace(self, values: Mapping[str, Any]) -> Config:
        """A frozen copy with other values under dotted keys, of the types that were there."""
        copy = self.clone()
        copy.defrost()
        for key, value in values.items():
            group, _, name = key.rpartition(".")
            before = copy.value(key)
            if value is not None and before is not None:
                value = type(before)(value)
            node = copy.value(group) if group else copy
            setattr(node, name, value)
        copy.freeze()
        return copy


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested mappings."""
    flat = {}
    for name, value in node.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != MAPPING:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
