"""Looking for images: what a folder, a tar file or ImageNet-22k's list of names holds -> keys and
labels in a listing's order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data.images.archives import Member, is_image, tar_members
from data.images.listing import Scan, reported, stamp, taken, tell
from data.images.reading import IMAGE_SUFFIXES, warn
from data.store.keys import CHUNK_KEYS, NEWLINE, Keys

# class names by id: the first of them that has all classes found is used; none: sorted as found
Numberings = Sequence[Sequence[str]]

SPLITS = {"train", "val", "test"}
WNID_DIGITS = 8  # n00007846
WNID_BYTES = 1 + WNID_DIGITS
MANY_NAMES = 1_000_000  # of which a user is told
LONGEST_NAME = 255  # no file system has longer ones
SHOWN = 5


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in a folder, in the order of their bytes."""
    return sorted(
        (
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir() and not entry.name.startswith(".")
        ),
        key=os.fsencode,
    )


def scan_class_folders(root: Path, numberings: Numberings) -> Scan:
    """Images in <class>/..., any number of folders deep; files beside the class folders do not
    count.
    """
    watched = [stamp(root)]
    found = class_folders(root)
    names, ids = _numbered(root, found, numberings)
    images = chain.from_iterable(
        sorted(_images(root / name, f"{name}/", watched), key=os.fsencode) for name in found
    )
    keys = list(reported(images, f"listing {root}"))
    _check_some(root, keys, f"{root}/<class>/*.JPEG")
    labels, empty = _labels(keys, found, ids)
    _report_empty(root, empty)
    return Scan(keys, labels, names, watched=watched)


def scan_folder(root: Path) -> Scan:
    """Images without classes, any number of folders deep."""
    watched: list[list] = []
    keys = sorted(reported(_images(root, "", watched), f"listing {root}"), key=os.fsencode)
    _check_some(root, keys, "images in this folder or those below")
    return Scan(keys, np.full(len(keys), -1), [], watched=watched)


def scan_tar(path: Path, numberings: Numberings | None) -> Scan:
    """Images of a tar file under the keys they would have unpacked; a folder around all of them is
    left out. None: without classes.
    """
    watched = [stamp(path)]
    members = list(reported(tar_members(path), f"listing {path}"))
    labelled = numberings is not None
    around = _folder_around([member.name for member in members if member.size >= 0], labelled)
    members = [
        Member(name.removeprefix(around), *place)
        for name, *place in members
        if name.startswith(around)
    ]
    # of two members of one name the last counts
    images = {member.name: member for member in members if member.size >= 0}
    _check_some(path, images, "<class>/*.JPEG" if labelled else "images")
    if not labelled:
        keys = sorted(images, key=os.fsencode)
        return Scan(keys, np.full(len(keys), -1), [], _places(images, keys), watched)
    flat = next((name for name in images if "/" not in name), None)
    if flat:
        raise ValueError(
            f"{path}: {flat} lies in no class folder: expected <class>/<image>, with any folders"
            " around all of them; for images without classes set DATA.DATASET folder"
        )
    folders = {name.partition("/")[0] for name, *_ in members if not name.startswith(".")}
    if folders <= SPLITS:
        raise ValueError(
            f"{path}: holds {', '.join(sorted(folders))} where class folders are expected: unpack"
            " it, or make a tar of each"
        )
    found = sorted(folders, key=os.fsencode)
    keys = sorted(images, key=lambda name: (os.fsencode(name.partition("/")[0]), os.fsencode(name)))
    names, ids = _numbered(path, found, numberings)
    labels, empty = _labels(keys, found, ids)
    _report_empty(path, empty)
    return Scan(keys, labels, names, _places(images, keys), watched)


def scan_names(path: Path, numberings: Numberings) -> Scan:
    """ImageNet-22k: the names of a list, n00007846_10001 a line, with the WordNet id of the class
    in front.

    Whole arrays all through: the full list has 14.2 million lines.
    """
    watched = [stamp(path)]
    blob = np.fromfile(path, np.uint8)
    if (blob == ord("\r")).any():
        blob = blob[blob != ord("\r")]
    if len(blob) and blob[-1] != NEWLINE:
        blob = np.append(blob, np.uint8(NEWLINE))
    keys = Keys(blob)
    if len(keys) >= MANY_NAMES:
        tell(f"listing {path}: {len(keys):,} lines, which takes seconds for each million (once)")
    lengths = np.diff(keys.ends, prepend=-1) - 1
    rows = np.flatnonzero(lengths)  # without blank lines
    if not len(rows):
        raise ValueError(f"{path}: lists no images: expected one name a line, like n00007846_10001")
    wnids = _wnids(path, keys, rows)
    numbers = _numbers(path, keys, rows)
    order = _order(wnids, numbers)
    if order is not None:
        rows, wnids, numbers = rows[order], wnids[order], numbers[order]
    twins = np.flatnonzero((wnids[1:] == wnids[:-1]) & (numbers[1:] == numbers[:-1]))
    if len(twins):
        raise ValueError(
            f"{path}: {len(twins)} names stand twice (first: {keys[rows[twins[0]]]}): list each"
            " image once"
        )
    starts = np.flatnonzero(np.diff(wnids, prepend=-1))
    found = [f"n{wnids[start]:0{WNID_DIGITS}d}" for start in starts]
    names, ids = _numbered(path, found, numberings)
    labels = np.repeat(
        np.array([ids[name] for name in found], np.int32), np.diff(starts, append=len(wnids))
    )
    return Scan(
        keys if order is None and len(rows) == len(keys) else taken(keys, rows),
        labels,
        names,
        watched=watched,
    )


def _images(folder: Path, prefix: str, watched: list[list], above: tuple = ()) -> Iterator[str]:
    """Paths of the images in a folder and those below, each after `prefix`; a link to a folder
    `above` is not followed.
    """
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    watched.append(stamp(folder))
    for entry in os.scandir(folder):
        # a pipe would block its reader
        if is_image(entry.name) and (
            entry.is_file() or (entry.is_symlink() and not entry.is_dir())
        ):
            yield prefix + entry.name
        elif not entry.name.startswith(".") and entry.is_dir():
            yield from _images(
                Path(entry.path), f"{prefix}{entry.name}/", watched, (*above, identity)
            )


def _check_some(place: Path, keys, expected: str) -> None:
    if not len(keys):
        raise ValueError(
            f"{place}: no images ({', '.join(IMAGE_SUFFIXES)}): expected {expected}; correct the"
            " path, or DATA.DATASET, which says how images are laid out"
        )


def _numbered(
    place: Path, found: Sequence[str], numberings: Numberings
) -> tuple[list[str], dict[str, int]]:
    """The class names by id, and each one's id."""
    for names in numberings or [found]:
        ids = {name: i for i, name in enumerate(names)}
        if ids.keys() >= set(found):
            return list(names), ids
    known = set(numberings[0])
    unknown = [name for name in found if name not in known]
    raise ValueError(
        f"{place}: {len(unknown)} classes have no place in the numbering of {len(known)} classes"
        f" that the labels follow (first: {', '.join(unknown[:SHOWN])}): set DATA.CLASS_LIST to a"
        " list that has them, or leave these classes out"
    )


def _labels(
    keys: Sequence[str], found: Sequence[str], ids: dict[str, int]
) -> tuple[np.ndarray, list[str]]:
    """The label of each key, and the classes without any; keys are sorted by class as `found` is."""
    counts = dict.fromkeys(found, 0)
    for key in keys:
        counts[key.partition("/")[0]] += 1
    labels = np.repeat(np.array([ids[name] for name in found], np.int32), list(counts.values()))
    return labels, [name for name, count in counts.items() if not count]


def _report_empty(place: Path, empty: Sequence[str]) -> None:
    if empty:
        warn(
            f"{place}: {len(empty)} class folders hold no images (first:"
            f" {', '.join(empty[:SHOWN])}); they keep their ids"
        )


def _folder_around(names: Sequence[str], labelled: bool) -> str:
    """The folders that lie around all names, with a slash after each; the folder of a single class
    is not one of them.
    """
    if not names:
        return ""
    shared = names[0].split("/")[:-1]
    for name in names:
        parts = name.split("/")[:-1]
        while shared != parts[: len(shared)]:
            shared.pop()
    if labelled and shared and all(name.count("/") == len(shared) for name in names):
        shared.pop()
    return "".join(f"{part}/" for part in shared)


def _places(images: dict[str, Member], keys: Sequence[str]) -> np.ndarray:
    return np.array([(images[key].offset, images[key].size) for key in keys], np.int64)


def _wnids(path: Path, keys: Keys, rows: np.ndarray) -> np.ndarray:
    """The digits of the WordNet id before the underscore of each line, as a number: int32."""
    ends = keys.ends[rows]
    starts = _starts(keys, rows)
    last = len(keys.blob) - 1
    value = np.zeros(len(rows), np.int32)
    fits = (ends - starts > WNID_BYTES + 1) & (ends - starts <= LONGEST_NAME)
    fits &= (keys.blob[starts] == ord("n")) & (
        keys.blob[np.minimum(starts + WNID_BYTES, last)] == ord("_")
    )
    for column in range(1, WNID_BYTES):
        digit = keys.blob[np.minimum(starts + column, last)] - np.uint8(ord("0"))
        fits &= digit < 10
        value = value * 10 + digit
    if not fits.all():
        row = int(rows[np.argmin(fits)])
        raise ValueError(
            f"{path}: line {row + 1}: {keys[row]!r} is no image name like n00007846_10001: correct"
            " the list"
        )
    return value


def _numbers(path: Path, keys: Keys, rows: np.ndarray) -> np.ndarray:
    """What follows the underscore of each line, padded to one width so that it compares by its
    bytes.
    """
    starts = _starts(keys, rows) + WNID_BYTES + 1
    lengths = keys.ends[rows] - starts
    padded = np.zeros((len(rows), int(lengths.max())), np.uint8)
    for low in range(0, len(rows), CHUNK_KEYS):
        chunk = slice(low, low + CHUNK_KEYS)
        places = starts[chunk, None] + np.arange(padded.shape[1])
        inside = places < keys.ends[rows[chunk], None]
        padded[chunk] = keys.blob[np.minimum(places, len(keys.blob) - 1)] * inside
    return padded.view(f"S{padded.shape[1]}").ravel()


def _starts(keys: Keys, rows: np.ndarray) -> np.ndarray:
    """Where the key of each row begins."""
    return np.where(rows > 0, keys.ends[rows - 1] + 1, 0)


def _order(wnids: np.ndarray, numbers: np.ndarray) -> np.ndarray | None:
    """The order that sorts by class, then name; None if they are sorted."""
    rising = (wnids[1:] > wnids[:-1]) | ((wnids[1:] == wnids[:-1]) & (numbers[1:] >= numbers[:-1]))
    return None if rising.all() else np.lexsort((numbers, wnids))
