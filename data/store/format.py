"""The store on disk: records, file names, sizes, and the manifest, whose identity and teacher
decide which epochs belong together.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.store.files import StoreError

FORMAT = 1
SEAL_RECORDS = 1 << 16  # records under one checksum
SHOWN = 5


def record_dtype(k: int, num_classes: int) -> np.dtype:
    """One record: little-endian, no padding; 4 + 4 k bytes, or 4 + 6 k beyond 65,536 classes."""
    return np.dtype(
        [
            ("seed", "<i4"),
            ("index", "<u2" if num_classes <= 1 << 16 else "<u4", (k,)),
            ("prob", "<f2", (k,)),
        ]
    )


def pack_records(
    seeds: np.ndarray, indices: np.ndarray, probs: np.ndarray, num_classes: int
) -> np.ndarray:
    """Seeds [n], class indices [n, k] and descending probabilities [n, k] as n records."""
    records = np.empty(len(seeds), record_dtype(np.shape(indices)[1], num_classes))
    records["seed"], records["index"], records["prob"] = seeds, indices, probs
    return records


def epoch_bytes(num_images: int, k: int, num_classes: int) -> int:
    """Size of a sealed epoch, without its header."""
    return num_images * record_dtype(k, num_classes).itemsize


def disk_need(num_images: int, k: int, num_classes: int, epochs: int) -> int:
    """The most that writing so many epochs occupies at any time: parts and sealed file of the last
    one exist together.
    """
    size = epoch_bytes(num_images, k, num_classes)
    return epochs * size + (size + num_images * 8 if epochs else 0)


def size_text(size: int) -> str:
    """A number of bytes for people."""
    unit, scale = next(
        (
            (unit, scale)
            for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
            if size >= scale
        ),
        ("kB", 1e3),
    )
    return f"{size / scale:.2f} {unit}"


def block_digests(records: np.ndarray) -> Iterator[str]:
    """The sha256 of each SEAL_RECORDS records, in hex."""
    for low in range(0, len(records), SEAL_RECORDS):
        yield hashlib.sha256(raw_bytes(np.asarray(records[low : low + SEAL_RECORDS]))).hexdigest()


def normalised(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it would be read back from its file (tuples become lists), with all sections
    present.
    """
    plain = json.loads(json.dumps(manifest, default=lambda value: value.item()))  # numpy's scalars
    return {"format": FORMAT, "identity": {}, "teacher": {}, "proof": {}, "info": {}} | plain


def encoded(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json."""
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def decoded(data: bytes, name: str) -> dict[str, Any]:
    """The manifest in a file's bytes; a newer format or nonsense is a StoreError."""
    try:
        manifest = normalised(json.loads(data))
        version, identity = int(manifest["format"]), manifest["identity"]
        if version <= FORMAT and (
            min(int(identity[key]) for key in ("k", "num_classes", "num_images")) < 1
            or not identity["keys_sha256"]
        ):
            raise ValueError("a count is below 1")
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{name}: is no manifest of a logits store ({error!r}): restore the file or write the"
            " store again"
        ) from None
    if version != FORMAT:
        raise StoreError(
            f"{name}: the store has format {version}, this program knows format {FORMAT}: update"
            " the program"
        )
    return manifest


def identity_digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 of all that must be equal for epochs to belong to one store: format, identity and
    teacher.
    """
    parts = {key: manifest[key] for key in ("format", "identity", "teacher")}
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted name, stored value, given value) of all leaves of two nested dictionaries that
    differ; None stands for an absent one.
    """
    a, b = dict(_leaves(stored)), dict(_leaves(given))
    names = (
        name
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or a[name] != b[name]
    )
    return [(name, a.get(name), b.get(name)) for name in names]


def check_same(stored: Mapping[str, Any], given: Mapping[str, Any], name: str) -> None:
    """For writers and merging: raise StoreError unless format, identity and teacher are equal, and
    so is what both proofs tell.
    """
    parts = ("format", "identity", "teacher")
    found = differences(
        {part: stored[part] for part in parts}, {part: given[part] for part in parts}
    )
    if found:
        what = "; ".join(
            f"{key} is {_shown(theirs)} there and {_shown(mine)} here"
            for key, theirs, mine in found[:SHOWN]
        )
        more = ", ..." if len(found) > SHOWN else ""
        raise StoreError(
            f"{name} is another store: {what}{more}: use the same settings and teacher, or another"
            " folder"
        )
    canary, mine = stored["proof"].get("canary", {}), given["proof"].get("canary", {})
    drifted = sorted(key for key in canary.keys() & mine.keys() if canary[key] != mine[key])
    if drifted:
        raise StoreError(
            f"{name}: this machine does not augment as the store's writer did ({', '.join(drifted)}"
            " of the canary differ): install the versions of Pillow and numpy that `python -m"
            " tools.logits info` shows for the store"
        )
    images, mine = _image_digests(stored), _image_digests(given)
    replaced = sorted(
        position for position in images.keys() & mine.keys() if images[position] != mine[position]
    )
    if replaced:
        raise StoreError(
            f"{name}: {len(replaced)} of {len(images)} sampled images differ from those the store"
            f" was written for (first: position {replaced[0]}): restore the data, or use another"
            " folder"
        )


def data_path(root: Path, epoch: int) -> Path:
    """The sealed records of an epoch."""
    return root / f"epoch_{epoch:04d}.npy"


def seal_path(root: Path, epoch: int) -> Path:
    """The seal of an epoch."""
    return root / f"epoch_{epoch:04d}.json"


def parts_path(root: Path, epoch: int) -> Path:
    """The folder of parts of an epoch that is being written."""
    return root / f"epoch_{epoch:04d}.parts"


def lock_path(root: Path, epoch: int) -> Path:
    """The lock of an epoch that is being written."""
    return root / f"epoch_{epoch:04d}.lock"


def again(epoch: int) -> str:
    """The way out when an epoch is damaged."""
    return f"delete epoch_{epoch:04d}.npy and .json and save that epoch again"


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return memoryview(array.view(np.uint8)) if array.dtype != np.uint8 else memoryview(array)


def ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"


def _image_digests(manifest: Mapping[str, Any]) -> dict[int, str]:
    images = manifest["proof"].get("images", {})
    return dict(zip(images.get("positions", []), images.get("sha256", [])))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
