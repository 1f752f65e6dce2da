"""The store on disk: records, file names, sizes, and the manifest, whose identity and teacher
decide which epochs belong together.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.store.files import FileBytes, StoreError

FORMAT = 1
RECIPE_VERSION = 2  # the newest of identity.recipe that this program knows
UNNUMBERED_VERSION = 2  # what a recipe without a number means: it has the reprs of its operations
SEAL_RECORDS = 1 << 16  # records under one checksum
MOST = 1 << 40  # images, classes or probabilities that a manifest may speak of
ONE = np.float16(1).view(np.uint16)  # its bits
SHOWN = 5


class Records:
    """The records of a file by row, each read when it is asked for."""

    def __init__(self, path: Path, dtype: np.dtype, offset: int = 0) -> None:
        """`offset` bytes stand before them."""
        self._bytes = FileBytes(path)
        self._dtype = dtype
        self._offset = offset

    def __getitem__(self, row: int) -> np.void:
        size = self._dtype.itemsize
        return np.frombuffer(self._bytes.read(self._offset + row * size, size), self._dtype)[0]


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
    records["seed"] = seeds
    records["index"] = indices
    records["prob"] = probs
    return records


def num_blocks(num_images: int) -> int:
    """Stretches of an epoch that have a checksum each."""
    return -(-num_images // SEAL_RECORDS)


def epoch_bytes(num_images: int, k: int, num_classes: int) -> int:
    """Size of a sealed epoch, without its header."""
    return num_images * record_dtype(k, num_classes).itemsize


def disk_need(num_images: int, k: int, num_classes: int, epochs: int) -> int:
    """The most bytes that writing so many epochs occupies at any time.

    The parts of the last one, with a position of 8 bytes a record, exist beside its sealed file.
    """
    size = epoch_bytes(num_images, k, num_classes)
    return epochs * size + (size + num_images * 8 if epochs else 0)


def size_text(size: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return counted(size, "byte")


def counted(number: int, noun: str, plural: str = "") -> str:
    """1 image, 2 images."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def rounded(text: str) -> str:
    """A text in which no number with a point has more than five digits that count."""
    return re.sub(r"\d+\.\d{5,}", lambda number: f"{float(number[0]):.5g}", text)


def impossible(records: np.ndarray, num_classes: int, name: Callable[[int], object]) -> str:
    """What is wrong with the first of the records [n] that no teacher can have given; "" if it can
    have given all. `name` names one.
    """
    # Bits of probabilities sort as their numbers do; those of negative numbers, of what is no
    # number and of what exceeds 1 come after.
    bits = records["prob"].view(np.uint16)
    exceeds, rises = bits[:, 0] > ONE, bits[:, 1:] > bits[:, :-1]
    is_unknown, is_negative = records["index"] >= num_classes, records["seed"] < 0
    # of all at once, which is several times quicker than row by row
    if not (exceeds.any() or rises.any() or is_unknown.any() or is_negative.any()):
        return ""
    is_bad = exceeds | rises.any(axis=1) | is_unknown.any(axis=1) | is_negative
    return (
        f"the record of {name(int(is_bad.argmax()))} has a class from {num_classes:,} up,"
        " probabilities that do not descend from 1 to 0, or a negative seed"
    )


def block_digests(records: np.ndarray) -> Iterator[str]:
    """The sha256 of each SEAL_RECORDS records, in hex."""
    for low in range(0, len(records), SEAL_RECORDS):
        block = np.asarray(records[low : low + SEAL_RECORDS])
        yield hashlib.sha256(block.view(np.uint8)).hexdigest()


def normalised(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as its file gives it back (tuples become lists), with all its sections."""
    plain = json.loads(json.dumps(manifest, default=lambda value: value.item()))  # numpy's scalars
    return {"format": FORMAT, "identity": {}, "teacher": {}, "proof": {}, "info": {}} | plain


def encoded(content: Mapping[str, Any], **options: Any) -> bytes:
    """The bytes of a manifest's or seal's file."""
    text = json.dumps(content, indent=1, default=lambda value: value.item(), **options)
    return (text + "\n").encode()


def decoded(data: bytes, name: str) -> dict[str, Any]:
    """The manifest in a file's bytes, translated; a newer format or nonsense is a StoreError."""
    try:
        manifest = normalised(json.loads(data))
        version, identity = int(manifest["format"]), manifest["identity"]
        if version != FORMAT:
            raise StoreError(
                f"{name}: the store has format {version}, this program knows format {FORMAT}:"
                " update the program"
            )
        counts = [int(identity[key]) for key in ("k", "num_classes", "num_images")]
        if min(counts) < 1 or max(counts) > MOST or counts[0] > counts[1]:
            raise ValueError(f"counts of {counts}")
        if not re.fullmatch("[0-9a-f]{64}", identity["keys_sha256"]):
            raise ValueError("keys_sha256 is none")
        if not all(isinstance(manifest[key], dict) for key in ("teacher", "proof", "info")):
            raise TypeError("a section is none")
        return translated(manifest, name)
    except StoreError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise StoreError(
            f"{name}: is no manifest of a logits store ({error!r}): restore the file or write the"
            " store again"
        ) from None


def translated(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A manifest in today's terms; what is on disk stays as it is, for the digests in its seals.

    Recipes used to hold the reprs of their operations, which follow from the other values.
    """
    recipe = dict(manifest["identity"].get("recipe", {}))
    if recipe.pop("ops", None) is not None:
        recipe.setdefault("version", UNNUMBERED_VERSION)
    if recipe.get("version", 0) > RECIPE_VERSION:
        raise StoreError(
            f"{name}: the recipe has version {recipe['version']}, this program knows version"
            f" {RECIPE_VERSION}: update the program"
        )
    if not recipe:
        return dict(manifest)
    return {**manifest, "identity": {**manifest["identity"], "recipe": recipe}}


def identity_digest(data: bytes) -> str:
    """The sha256 of all in manifest.json that epochs of one store have in common, in hex.

    That is format, identity and teacher, as they stand in the file's bytes.
    """
    manifest = normalised(json.loads(data))
    parts = {key: manifest[key] for key in ("format", "identity", "teacher")}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_same(stored: Mapping[str, Any], given: Mapping[str, Any], name: str) -> None:
    """Raise StoreError unless two (translated) manifests are of one store, and so are their proofs.

    For writers and merging: format, identity and teacher must be equal.
    """
    parts = [
        {key: each[key] for key in ("format", "identity", "teacher")} for each in (stored, given)
    ]
    if found := differing(*parts):
        raise StoreError(
            f"{name} is another store: {found}: use the same settings and teacher, or another"
            " folder"
        )
    drifted = _changed(stored["proof"].get("canary", {}), given["proof"].get("canary", {}))
    if drifted:
        raise StoreError(
            f"{name}: this machine does not augment as the store's writer did ({', '.join(drifted)}"
            " of the canary differ): install the versions of Pillow and numpy that `python -m"
            " tools.logits info` shows for the store"
        )
    images = _image_digests(stored)
    replaced = _changed(images, _image_digests(given))
    if replaced:
        raise StoreError(
            f"{name}: {len(replaced)} of {len(images)} sampled images differ from those the store"
            f" was written for (first: position {replaced[0]}): restore the data, or use another"
            " folder"
        )


def differing(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What two (parts of) manifests hold otherwise, in words; "" if nothing."""
    theirs, mine = dict(_leaves(stored)), dict(_leaves(given))
    found = [
        f"{key} is {_shown(theirs.get(key))} there and {_shown(mine.get(key))} here"
        for key in sorted(theirs.keys() | mine.keys())
        if (key in theirs, theirs.get(key)) != (key in mine, mine.get(key))
    ]
    return "; ".join(found[:SHOWN]) + ", ..." * (len(found) > SHOWN)


def other_choice(info: Mapping[str, Any], mine: Any) -> str:
    """How a store's writer chose its images otherwise, in words; "" if nothing is known."""
    theirs = info.get("images")
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return ""  # of before, or damaged: nothing seals this part
    known = sorted(theirs.keys() & mine.keys())
    values = [f"{key} {theirs[key]}" for key in known if theirs[key] != mine[key]]
    return f"; it was saved with {', '.join(values)}" if values else ""


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


def ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"


def epochs_text(numbers: Iterable[int], are: bool = False) -> str:
    """{0, 1, 2} as "epochs 0-2" or "epochs 0-2 are", {5} as "epoch 5" or "epoch 5 is"."""
    text = ranges(numbers)
    if text.isdigit():
        return f"epoch {text}" + " is" * are
    return f"epochs {text}" + " are" * are


def _changed(stored: Mapping, given: Mapping) -> list:
    """The keys of both under which they hold different values."""
    return sorted(key for key in stored.keys() & given.keys() if stored[key] != given[key])


def _image_digests(manifest: Mapping[str, Any]) -> dict[int, str]:
    images = manifest["proof"].get("images", {})
    return dict(zip(images.get("positions", []), images.get("sha256", [])))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all that is no dictionary."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= 80 else text[:77] + "..."
