"""What makes a student's run replay the teacher's: the manifest a config writes, the values a store
gives back, and the proof.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data.augment import AugmentDecoder
from data.augment.decoder import SMALL
from data.augment.plan import RECIPE_VERSION
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


# What chooses the images of a data set; told beside a store's identity, for people alone.
CHOICE_KEYS = (
    "DATA.DATASET",
    "DATA.CLASS_LIST",
    "DATA.EXCLUDE",
    "DATA.HELD_OUT",
    "DATA.SUBSET",
    "DATA.DEBUG",
    "DATA.SHAPES.TRAIN_IMAGES",
)


class IdentityError(ValueError):
    """A run that would not replay what the store holds."""


def identity_of(cfg, num_images: int, keys_sha256: str) -> dict[str, Any]:
    """The identity of the store that a resolved config writes."""
    recipe = {key: cfg.value(key) for key in RECIPE_KEYS}
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
        "recipe": {"version": RECIPE_VERSION, **recipe},
    }


def choice_of(cfg) -> dict[str, Any]:
    """How a config chooses its images."""
    return {key: cfg.value(key) for key in CHOICE_KEYS}


def adopted_values(cfg, identity: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The config values that a store decides.

    One that the user set otherwise is an error naming both and the way out.
    """
    recipe = identity["recipe"]
    for key in RECIPE_KEYS:  # one that is younger than the store has a default that draws nothing
        if key not in recipe and key in cfg.EXPLICIT:
            raise IdentityError(
                f"{key} = {cfg.value(key)!r}, but the store {root} was written before there was"
                f" {key}: leave it at its default, or save a store with it"
            )
    stored = {key: recipe[key] for key in RECIPE_KEYS if key in recipe}
    stored["DATA.SEED"] = identity["base_seed"]
    stored["DATA.IMG_SIZE"] = identity["image_size"]
    stored["DISTILL.TEMPERATURE"] = identity["temperature"]
    stored["MODEL.NUM_CLASSES"] = identity["num_classes"]
    own_size = cfg.DATA.IMG_SIZE
    draws_alike = (own_size <= SMALL) == (identity["image_size"] <= SMALL)
    if cfg.DISTILL.OTHER_SIZE and "DATA.IMG_SIZE" in cfg.EXPLICIT and draws_alike:
        stored["DATA.IMG_SIZE"] = own_size
    differing = []
    for key, theirs in stored.items():
        mine = cfg.value(key)
        means_any = (key == "MODEL.NUM_CLASSES" and mine == 0) or (key == "AUG.FILL" and mine == [])
        if key in cfg.EXPLICIT and not means_any and _plain(mine) != _plain(theirs):
            differing.append(
                f"{key} = {mine!r}, but the store {root} was written with {theirs!r}:"
                f" {_way_out(key, theirs)}"
            )
    if differing:
        raise IdentityError("; ALSO: ".join(differing))
    topk, k = cfg.DISTILL.LOGITS_TOPK, identity["k"]
    if topk > k:
        raise IdentityError(
            f"DISTILL.LOGITS_TOPK = {topk}, but the store {root} holds top-{k}: set"
            f" DISTILL.LOGITS_TOPK {k} or less"
        )
    stored["DISTILL.LOGITS_TOPK"] = topk or k
    stored["DISTILL.EXCESS"] = excess_of(cfg, identity.get("excess", "rescale"))
    return stored


def excess_of(cfg, theirs: str) -> str:
    """What becomes of probabilities that sum to over 1: as the store's writer did, or as asked."""
    return theirs if cfg.DISTILL.EXCESS == "auto" else cfg.DISTILL.EXCESS


def proof_of(cfg, dataset, decoder: AugmentDecoder) -> dict[str, Any]:
    """What a reader recomputes before its first batch: digests of decoded and of own images."""
    count = min(PROOF_IMAGES, len(dataset))
    drawn = generator(cfg.DATA.SEED).choice(len(dataset), count, replace=False)
    positions = np.sort(drawn).tolist()
    return {
        "canary": decoder.canary(),
        "images": {"positions": positions, "sha256": [image_digest(dataset, i) for i in positions]},
    }


def check_proof(
    proof: Mapping[str, Any],
    dataset,
    decoder: AugmentDecoder,
    root: str,
    index_of: np.ndarray | None = None,
) -> None:
    """Raise IdentityError unless this machine decodes, and this data holds, what the writer saw."""
    count = len(dataset) if index_of is None else len(index_of)
    try:
        expected = dict(proof.get("canary", {}))
        images = proof.get("images", {"positions": [], "sha256": []})
        sampled = {int(place): sha for place, sha in zip(images["positions"], images["sha256"])}
        if not all(0 <= position < count for position in sampled):
            raise IndexError(f"positions beyond {count:,}")
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise IdentityError(
            f"{root}/manifest.json: its proof can't be understood ({error!r}): restore the file"
        ) from None
    canary = decoder.canary()
    drifted = [name for name, digest in expected.items() if canary.get(name) != digest]
    if drifted:
        raise IdentityError(
            f"this machine does not augment as the writer of the store {root} did"
            f" ({', '.join(drifted)} differ): install the versions of Pillow and numpy that `python"
            " -m tools.logits info` shows for the store"
        )
    keys = dataset.get_keys() if hasattr(dataset, "get_keys") else None
    replaced = []
    for position, digest in sampled.items():
        index = position if index_of is None else int(index_of[position])
        if index >= 0 and image_digest(dataset, index) != digest:
            replaced.append(keys[index] if keys is not None else str(position))
    if replaced:
        raise IdentityError(
            f"{len(replaced)} of {len(sampled)} sampled images differ from those the"
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
    if key == "DISTILL.TEMPERATURE":
        return (
            f"leave {key} out to take the store's, or save logits again: what float16 has rounded"
            " to 0 and what K has cut off can't be raised afterwards"
        )
    value = str(theirs).replace(" ", "")
    return f"set {key} {value} as the store has it, or save logits with the other value"


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value
