"""Images in many files, webdataset's tars or Hugging Face's parquet: found and read by position.

Their keys and their order are those of class folders, <class>/<file>, so that one store serves all.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data.images.archives import is_image, tar_members
from data.images.layout import looks_like
from data.images.listing import Scan, reported, stamp
from data.images.reading import CorruptImage
from data.images.scans import check_some, folder_around, folder_of, labels_of
from data.store.files import FileBytes
from data.store.keys import Keys, check_unique

LABEL_SUFFIX = ".cls"
# ImageNet's names as its copies have them; in class folders they are n01440764/n01440764_10026.JPEG
# and n01440764/ILSVRC2012_val_00000293.JPEG.
IMAGENET_NAME = re.compile(
    r"(?:.*/)?(?P<stem>(?P<own>n\d{8})_\d+|ILSVRC2012_val_\d{8})(?:_(?P<wnid>n\d{8}))?\.jpe?g",
    re.ASCII | re.IGNORECASE,
)
SPLIT_WORDS = {"train": "train", "val": "val(idation)?"}


def shard_files(root: Path, split: str, suffix: str) -> list[Path]:
    """The files below a folder that have the split's name in theirs, in the order of names."""
    if root.is_file():
        return [root]
    word = re.compile(rf"(?<![a-z]){SPLIT_WORDS[split]}(?![a-z])", re.IGNORECASE)
    found = sorted(root.rglob(f"*{suffix}"))
    files = [path for path in found if word.search(str(path.relative_to(root)))]
    if not files:
        there = looks_like(root, "")
        if found:
            there = f"; {found[0]} and {len(found) - 1} others are of no split"
        raise ValueError(
            f"{root}: no {suffix} file has {split!r} in its name{there}: correct the path, or"
            " DATA.DATASET, which says how images are laid out"
        )
    return files


def key_of(name: str, class_name: str = "") -> str:
    """The key of an image that a copy of a data set calls by this name."""
    match = IMAGENET_NAME.fullmatch(name)
    wnid = match and (match["wnid"] or match["own"] or class_name)
    if wnid:
        return f"{wnid}/{match['stem']}.JPEG"
    return f"{class_name}/{name}" if class_name and "/" not in name else name


def scan_shards(root: Path, files: Sequence[Path], class_names: Sequence[str]) -> Scan:
    """Images of uncompressed tar files; their labels are numbers in NAME.cls files, else folders.

    Images that lie in no folder and have no number have no class.
    """
    watched = [stamp(root), *map(stamp, files)]
    names, labels, spans = [], [], []
    for path, start in zip(reported(files, f"listing {root}", "files"), _starts(files)):
        members = list(tar_members(path, lambda name: is_image(name) or _is_label(name)))
        tar = FileBytes(path)
        numbers = {}
        for name, offset, size in members:
            if _is_label(name):
                numbers[_stem(name)] = _number(tar.read(offset, size), f"{path}: {name}")
        for name, offset, size in members:
            if size >= 0 and not _is_label(name):
                names.append(name)
                labels.append(numbers.get(_stem(name), -1))
                spans.append((start + offset, size))
    labels = np.array(labels, np.int64)
    numbered = _class_names(root, names, labels, class_names)
    around = folder_around(names, labelled=not numbered)
    keys = _keys(root, [name.removeprefix(around) for name in names], labels, numbered)
    scan = _as_folders(keys, labels, spans, numbered, watched)
    if not numbered and all("/" in key for key in keys):
        classes = [folder_of(key) for key in scan.keys]
        lists = [class_names] if class_names else []
        scan.labels, scan.class_names = labels_of(
            root, classes, list(dict.fromkeys(classes)), lists
        )
    return scan


def scan_parquet(
    root: Path, files: Sequence[Path], class_names: Sequence[str], key_column: str
) -> Scan:
    """Images of parquet files in Hugging Face's layout: an image column, most often a label column.

    A row is known by the path beside its image, or by the text of `key_column`.
    """
    watched = [stamp(root), *map(stamp, files)]
    names, labels, spans = [], [], []
    for number, path in enumerate(reported(files, f"listing {root}", "files")):
        file = _opened(path)
        image, label, theirs = _columns(file, path)
        class_names = class_names or theirs
        if key_column and key_column not in file.schema_arrow.names:
            raise ValueError(
                f"DATA.KEY_COLUMN = {key_column}: {path} has the columns"
                f" {', '.join(file.schema_arrow.names)}: name one of them"
            )
        columns = [key_column or f"{image}.path", *([label] if label else [])]
        table = file.read(columns=columns).to_pydict()
        texts = table[key_column] if key_column else [row["path"] for row in table[image]]
        rows = range(len(texts))
        names += [text or f"row/{len(names) + row:06d}" for row, text in zip(rows, texts)]
        labels += [-1 if value is None else value for value in table.get(label, [-1] * len(rows))]
        spans += [(number, row) for row in rows]
    labels = np.array(labels, np.int64)
    numbered = _class_names(root, names, labels, class_names)
    keys = names if key_column else _keys(root, names, labels, numbered)
    return _as_folders(keys, labels, spans, numbered, watched)


class ShardBytes:
    """The bytes of several files as if they were one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [FileBytes(path) for path in files]
        self.starts = _starts(files)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset."""
        number = bisect_right(self.starts, offset) - 1
        return self.files[number].read(offset - self.starts[number], size)


class ParquetRows:
    """The images of parquet files by row.

    A row group is decoded as a whole, so the last one is kept for those that read in order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._opened: dict[int, Any] = {}
        self._kept: tuple[tuple[int, int], Any] = ((-1, -1), None)

    def __reduce__(self):
        return type(self), (self.files,)

    def read(self, number: int, row: int) -> bytes:
        """The bytes of the image in a row of the file of this number."""
        path = self.files[number]
        try:
            if number not in self._opened:
                file = _opened(path)
                groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
                ends = list(accumulate(group.num_rows for group in groups))
                self._opened[number] = file, _columns(file, path)[0], ends
            file, image, ends = self._opened[number]
            group = bisect_right(ends, row)
            if self._kept[0] != (number, group):
                table = file.read_row_group(group, [f"{image}.bytes"], use_threads=False)
                self._kept = (number, group), table.column(image)
            data = self._kept[1][row - (ends[group - 1] if group else 0)].as_py()["bytes"]
        except (OSError, ValueError, LookupError) as error:
            raise ValueError(f"{path}: row {row} can't be read ({error}): restore it") from None
        if data is None:
            raise CorruptImage(f"{path}: row {row} holds no bytes of an image: restore it")
        return data


def _as_folders(
    keys: Sequence[str],
    labels: np.ndarray,
    spans: Sequence[tuple[int, int]],
    class_names: list[str],
    watched: list[list],
) -> Scan:
    """The scan that class folders with these keys give."""
    check_unique(Keys.of(keys))
    order = sorted(
        range(len(keys)), key=lambda i: (os.fsencode(folder_of(keys[i])), os.fsencode(keys[i]))
    )
    sorted_keys = [keys[i] for i in order]
    return Scan(sorted_keys, labels[order], class_names, np.array(spans)[order], watched)


def _class_names(
    root: Path, names: Sequence[str], labels: np.ndarray, class_names: Sequence[str]
) -> list[str]:
    """The names of the classes by number, as given or else the numbers; none without labels."""
    check_some(root, names, "some in these files")
    without = np.flatnonzero(labels < 0)
    if len(without) == len(names):
        return []
    if len(without):
        raise ValueError(
            f"{root}: {len(without)} of {len(names)} images have no label (first:"
            f" {names[without[0]]}): give all of them one, or none"
        )
    if class_names and labels.max() >= len(class_names):
        raise ValueError(
            f"{root}: {names[labels.argmax()]} has label {labels.max()}, but there are"
            f" {len(class_names)} class names: set DATA.CLASS_LIST to a list that has all"
        )
    return list(class_names) or [str(label) for label in range(labels.max() + 1)]


def _keys(
    root: Path, names: Sequence[str], labels: np.ndarray, class_names: Sequence[str]
) -> list[str]:
    """The images' keys, whose folders must be of the classes that the labels name."""
    classes = [class_names[label] if class_names else "" for label in labels]
    keys = list(map(key_of, names, classes))
    known = set(class_names)
    for key, class_name in zip(keys, classes):
        if folder_of(key) != class_name and folder_of(key) in known:
            raise ValueError(
                f"{root}: {key} has the label of class {class_name}: its labels follow another"
                " numbering, name it in DATA.CLASS_LIST"
            )
    return keys


def _columns(file, path: Path) -> tuple[str, str, list[str]]:
    """The names of the columns of images and labels ("": none), and those of the classes."""
    schema = file.schema_arrow
    kinds = {field.name: field.type for field in schema}
    images = [
        name
        for name, kind in kinds.items()
        if hasattr(kind, "get_field_index") and kind.get_field_index("bytes") >= 0
    ]
    if not images:
        raise ValueError(
            f"{path}: no column holds images as Hugging Face writes them (bytes and path): it has"
            f" {', '.join(kinds)}"
        )
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features", {})
    classes = {
        name: feature.get("names", [])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in kinds
    }
    label = next(iter(classes), "label" if "label" in kinds else "")
    return images[0], label, classes.get(label, [])


def _opened(path: Path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(
            "DATA.DATASET = parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    try:
        return ParquetFile(path, memory_map=False)
    except ValueError as error:
        raise ValueError(f"{path}: can't be read as parquet ({error}): restore it") from None


def _starts(files: Sequence[Path]) -> list[int]:
    """Where each file begins when all are laid end to end."""
    return list(accumulate((path.stat().st_size for path in files[:-1]), initial=0))


def _is_label(name: str) -> bool:
    return name.endswith(LABEL_SUFFIX)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _number(data: bytes, name: str) -> int:
    if not data.strip().isdigit():
        raise ValueError(f"{name}: {data[:20]!r} is no number of a class: write the tars again")
    return int(data)
