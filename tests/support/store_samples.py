"""A small store for tests: records that are a pure function of (epoch, position), keys, a manifest,
and writers of whole epochs.
"""

import functools
from pathlib import Path

import numpy as np

from data.store import LogitsStoreReader, LogitsStoreWriter
from data.store.format import pack_records

K, CLASSES, IMAGES = 5, 1000, 301
KEYS = [f"class {i // 30:02d}/it's image {i:05d}.jpg" for i in range(IMAGES)]


def manifest(**identity) -> dict:
    """A manifest; keyword arguments replace parts of its identity."""
    return {
        "identity": {
            "k": K,
            "num_classes": CLASSES,
            "base_seed": 7,
            "shuffle_seed": 7,
            "paired": True,
            "temperature": 1.0,
            "image_size": 224,
            "recipe": {"AUG.SCALE": (0.08, 1.0), "AUG.REPROB": 0.25},
            **identity,
        },
        "teacher": {"name": "teacher", "weights_sha256": "ab" * 32, "dtype": "float32"},
        "proof": {
            "canary": {"drawn": "11", "jpeg": "22"},
            "images": {"positions": [3, 9], "sha256": ["aa", "bb"]},
        },
        "info": {"versions": {"numpy": "2.0"}},
    }


def records_of(epoch: int, positions: np.ndarray, k: int = K, classes: int = CLASSES) -> np.ndarray:
    """What the teacher would say: the same for the same epoch and positions, whoever asks."""
    made = [_record(epoch, int(position), k, classes) for position in positions]
    return pack_records(
        *(np.array([record[part] for record in made]) for part in range(3)), classes
    )


@functools.cache
def _record(epoch: int, position: int, k: int, classes: int) -> tuple[int, np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64([epoch, position]))
    return (
        int(rng.integers(0, 2**31)),
        rng.choice(classes, k, replace=False),
        np.sort(rng.dirichlet(np.ones(k)))[::-1],
    )


def batches(
    epoch: int, images: int = IMAGES, batch: int = 32, world: int = 1, rank: int = 0
) -> list[np.ndarray]:
    """The batches of one rank in the shuffled order of an epoch."""
    order = np.random.Generator(np.random.PCG64(epoch)).permutation(images)[rank::world]
    return [order[low : low + batch] for low in range(0, len(order), batch)]


def write_store(
    root: Path, epochs: int = 1, world: int = 1, keys: list[str] | None = None, **identity
) -> LogitsStoreReader:
    """A sealed store, written by `world` ranks one after the other."""
    keys = KEYS if keys is None else keys
    made = manifest(**identity)
    for epoch in range(epochs):
        for rank in range(world):
            with LogitsStoreWriter(root, made, keys) as writer:
                writer.begin_epoch(epoch, rank)
                for positions in batches(epoch, len(keys), world=world, rank=rank):
                    writer.append(
                        positions,
                        records_of(
                            epoch, positions, made["identity"]["k"], made["identity"]["num_classes"]
                        ),
                    )
        with LogitsStoreWriter(root, made, keys) as writer:
            writer.seal(epoch, {"top1": 50.0 + epoch})
    return LogitsStoreReader(root)
