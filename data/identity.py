"""What makes a student's run replay the teacher's: the manifest a config writes, the values a store
gives back, and the proof.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.augment.decoder import AugmentDecoder
from data.augment.rng import generator

PROOF_IMAGES = 64
# The keys whose values change a pixel or who is mixed with whom. A student takes them from its
# store.
RECIPE_KEYS = (
    "DATA.INTERPOLATION",
    "AUG.SCALE",
    "AUG.RATIO",
    "AUG.HFLIP",
    "AUG.VFLIP",
    "AUG.AUTO_AUGMENT",
    "AUG.COLOR_JITTER",
    "AUG.FILL",
    "AUG.REPROB",
    "AUG.REMODE",
    "AUG.RECOUNT",
    "AUG.MIXUP",
    "AUG.CUTMIX",
    "AUG.CUTMIX_MINMAX",
    "AUG.MIXUP_PROB",
    "AUG.MIXUP_SWITCH_PROB",
)


class IdentityError(ValueError):
    """A run that would not replay what the store holds."""


def identity_of(cfg, num_images: int, keys_sha256: str) -> dict[str, Any]:
    """The identity of the store that a resolved config writes."""
    return {
        "k": cfg.DISTILL.LOGITS_TOPK,
        "num_classes": cfg.MODEL.NUM_CLASSES,
        "num_images": num_images,
        "keys_sha256": keys_sha256,
        "base_seed": cfg.DATA.SEED,
        "shuffle_seed": cfg.DATA.SEED,
        "paired": cfg.is_paired,
        "temperature": cfg.DISTILL.TEMPERATURE,
        "image_size": cfg.DATA.IMG_SIZE,
        "recipe": {
            **{key: cfg.value(key) for key in RECIPE_KEYS},
            "ops": AugmentDecoder.from_config(cfg).recipe()["ops"],
        },
    }


def adopted_values(cfg, identity: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The config values that a store decides; one that the user set otherwise is an error naming
    both and the way out.
    """
    own_size = cfg.DATA.IMG_SIZE
    keeps_size = (
        cfg.DISTILL.OTHER_SIZE
        and "DATA.IMG_SIZE" in cfg.EXPLICIT
        and (own_size <= 32) == (identity["image_size"] <= 32)
    )
    stored = {
        **{key: identity["recipe"][key] for key in RECIPE_KEYS},
        "DATA.SEED": identity["base_seed"],
        "DATA.IMG_SIZE": own_size if keeps_size else identity["image_size"],
        "DISTILL.TEMPERATURE": identity["temperature"],
        "MODEL.NUM_CLASSES": identity["num_classes"],
    }
    for key, theirs in stored.items():
        mine = cfg.value(key)
        is_given = (
            key in cfg.EXPLICIT
            and not (key == "MODEL.NUM_CLASSES" and mine == 0)
            and not (key == "AUG.FILL" and mine == [])
        )
        if is_given and _plain(mine) != _plain(theirs):
            raise IdentityError(
                f"{key} = {mine!r}, but the store {root} was written with {theirs!r}:"
                f" {_way_out(key, theirs)}"
            )
    topk, k = cfg.DISTILL.LOGITS_TOPK, identity["k"]
    if topk > k:
        raise IdentityError(
            f"DISTILL.LOGITS_TOPK = {topk}, but the store {root} holds top-{k}: set"
            f" DISTILL.LOGITS_TOPK {k} or less"
        )
    return {
        **stored,
        "DISTILL.LOGITS_TOPK": topk or k,
        "DISTILL.EXCESS": excess_of(cfg, identity.get("excess", "rescale")),
    }


def excess_of(cfg, theirs: str) -> str:
    """What becomes of probabilities that sum to more than 1: what the store's writer makes of them,
    unless the user says.
    """
    return theirs if cfg.DISTILL.EXCESS == "auto" else cfg.DISTILL.EXCESS


def proof_of(cfg, dataset, decoder: AugmentDecoder) -> dict[str, Any]:
    """What a reader recomputes before its first batch: digests of the decoder's output and of some
    of the data's images.
    """
    count = min(PROOF_IMAGES, len(dataset))
    positions = np.sort(
        generator(cfg.DATA.SEED).choice(len(dataset), count, replace=False)
    ).tolist()
    return {
        "canary": decoder.canary(),
        "images": {"positions": positions, "sha256": [image_digest(dataset, i) for i in positions]},
    }


def check_proof(
    proof: Mapping[str, Any],
    dataset,
    decoder: AugmentDecoder,
    root: str,
    local: np.ndarray | None = None,
) -> None:
    """Raise IdentityError unless this machine decodes, and this data holds, what the writer saw."""
    canary = decoder.canary()
    drifted = [
        name for name, digest in proof.get("canary", {}).items() if canary.get(name) != digest
    ]
    if drifted:
        raise IdentityError(
            f"this machine does not augment as the writer of the store {root} did"
            f" ({', '.join(drifted)} differ): install the versions of Pillow and numpy that `python"
            " -m tools.logits info` shows for the store"
        )
    keys = dataset.get_keys() if hasattr(dataset, "get_keys") else None
    replaced = []
    images = proof.get("images", {"positions": [], "sha256": []})
    for position, digest in zip(images["positions"], images["sha256"]):
        index = position if local is None else int(local[position])
        if index >= 0 and image_digest(dataset, index) != digest:
            replaced.append(keys[index] if keys is not None else str(position))
    if replaced:
        raise IdentityError(
            f"{len(replaced)} of {len(images['positions'])} sampled images differ from those the"
            f" store {root} was written for (first: {', '.join(replaced[:3])}): restore the data,"
            " or save the logits again"
        )


def image_digest(dataset, index: int) -> str:
    """sha256 of an image's decoded pixels."""
    return hashlib.sha256(dataset[index][0].tobytes()).hexdigest()


def _way_out(key: str, theirs: Any) -> str:
    if key == "DATA.IMG_SIZE":
        return (
            f"set DATA.IMG_SIZE {theirs}, or DISTILL.OTHER_SIZE True for a student of another size"
            " (on the same side of 32 pixels)"
        )
    return f"leave {key} out to take the store's, or save logits with the other value"


def _plain(value: Any) -> Any:
    """A value without the spellings that make no difference: tuples as lists, whole numbers as
    floats.
    """
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return (
        float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    )
