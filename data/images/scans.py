"""Looking for images: what a folder, a tar or ImageNet-22k's zips hold -> a listing's arrays."""

from __future__ import annotations

import os
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import chain, groupby, pairwise
from pathlib import Path

import numpy as np

from data.images import layout
from data.images.archives import NOWHERE, is_image, tar_members, zip_spans
from data.images.listing import Scan, reported, stamp
from data.images.reading import IMAGE_SUFFIXES, warn

# Lists of class names by id: the first that has all classes found is used. Without any list the
# classes found are numbered in their order.
ClassLists = Sequence[Sequence[str]]

SPLITS = {"train", "val", "test"}
NAME_22K = re.compile(r"n\d{8}_\S{1,240}", re.ASCII)
SHOWN = 5


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in a folder, in the order of their bytes."""
    names = [
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and not entry.name.startswith(".")
    ]
    return sorted(names, key=os.fsencode)


def scan_folder(root: Path, class_lists: ClassLists | None) -> Scan:
    """Images in <class>/..., any number of folders deep; files beside the folders don't count.

    With None they lie in any folders and have no classes.
    """
    if class_lists is None:
        return _scan_unlabelled(root)
    watched = [stamp(root)]
    found = class_folders(root)
    images = chain.from_iterable(
        sorted(_images(root / name, f"{name}/", watched), key=os.fsencode) for name in found
    )
    keys = list(reported(images, f"listing {root}"))
    check_some(root, keys, f"{root}/<class>/*.JPEG")
    _announce_links(watched)
    labels, class_names = labels_of(root, map(folder_of, keys), found, class_lists)
    return Scan(keys, labels, class_names, watched=watched)


def _scan_unlabelled(root: Path) -> Scan:
    watched: list[list] = []
    keys = sorted(reported(_images(root, "", watched), f"listing {root}"), key=os.fsencode)
    check_some(root, keys, "images in this folder or those below")
    _announce_links(watched)
    return Scan(keys, np.full(len(keys), -1), [], watched=watched)


def scan_tar(path: Path, class_lists: ClassLists | None) -> Scan:
    """Images of a tar file under the keys they would have unpacked; None: without classes.

    A folder around all images is left out.
    """
    watched = [stamp(path)]
    members = list(reported(tar_members(path), f"listing {path}"))
    labelled = class_lists is not None
    around = folder_around([member.name for member in members if member.size >= 0], labelled)
    inside = [
        member._replace(name=member.name.removeprefix(around))
        for member in members
        if member.name.startswith(around)
    ]
    # of two members of one name the last counts
    spans = {name: (offset, size) for name, offset, size in inside if size >= 0}
    check_some(path, spans, "<class>/*.JPEG" if labelled else "images")
    if class_lists is None:
        keys = sorted(spans, key=os.fsencode)
        labels, class_names = np.full(len(keys), -1), []
    else:
        found = _tar_classes(path, spans, {folder_of(member.name) for member in inside})
        keys = sorted(spans, key=lambda name: (os.fsencode(folder_of(name)), os.fsencode(name)))
        labels, class_names = labels_of(path, map(folder_of, keys), found, class_lists)
    return Scan(keys, labels, class_names, np.array([spans[key] for key in keys]), watched)


def scan_names(path: Path, class_lists: ClassLists) -> Scan:
    """ImageNet-22k: the names of a list, n00007846_10001 a line, with the class in front."""
    watched = [stamp(path)]
    names = path.read_text(encoding="utf-8", errors="surrogateescape").split()
    if not names:
        raise ValueError(f"{path}: lists no images: expected one name a line, like n00007846_10001")
    wrong = next((name for name in names if not NAME_22K.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: {wrong[:80]!r} is no image name like n00007846_10001: correct the list"
        )
    names.sort()  # by class too: all ids have one length
    twins = [name for name, following in pairwise(names) if name == following]
    if twins:
        raise ValueError(
            f"{path}: {len(twins)} names stand twice (first: {twins[0]}): list each image once"
        )
    counts = Counter(map(_wnid_of, names))
    labels, class_names = labels_of(path, counts, list(counts), class_lists)
    return Scan(names, labels, class_names, watched=watched)


def scan_zips(path: Path, class_lists: ClassLists, name_format: str, only: str = "") -> Scan:
    """ImageNet-22k: a list of names, and where their images lie in the zip files beside it.

    With `only`, the beginning of class names, the files of other classes are not opened.
    """
    scan = scan_names(path, class_lists)
    wnids = [scan.class_names[i] for i in np.unique(scan.labels)]
    if not only:
        _check_zips(path, wnids)
    spans = []
    classes = groupby(scan.keys, _wnid_of)
    for wnid, names in reported(classes, f"listing {path.parent}", f"of {len(wnids):,} zip files"):
        members = _spans_in(path.with_name(f"{wnid}.zip")) if wnid.startswith(only) else {}
        spans.append(np.array([members.get(name_format.format(name), NOWHERE) for name in names]))
    scan.spans = np.concatenate(spans)
    return scan


def _images(
    folder: Path, prefix: str, watched: list[list], above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Paths of the images in a folder and those below, each after `prefix`.

    `above` are the devices and inodes of the folders around it: a link to one is not followed.
    """
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    watched.append(stamp(folder))
    for entry in os.scandir(folder):
        is_folder = entry.is_dir()
        # a pipe would block its reader; a link that leads nowhere is missed when it is opened
        is_file = entry.is_file() or (entry.is_symlink() and not is_folder)
        if is_image(entry.name) and is_file:
            yield prefix + entry.name
        elif is_folder and not entry.name.startswith("."):
            inner = f"{prefix}{entry.name}/"
            yield from _images(Path(entry.path), inner, watched, (*above, identity))


def _announce_links(watched: Sequence[list]) -> None:
    """Tell which of the folders that were looked into, the first one and those below, are links."""
    root, *below = [path for path, *_ in watched]
    links = [path for path in below if os.path.islink(path)]
    if links:
        warn(
            f"{root}: {len(links)} folders are links (first: {links[0]}): the images behind them"
            " count under these names too"
        )


def check_some(path: Path, keys: Sized, expected: str) -> None:
    if not len(keys):
        raise ValueError(
            f"{path}: no images ({', '.join(IMAGE_SUFFIXES)}): expected {expected}"
            f"{layout.looks_like(path, '')}; correct the path, or DATA.DATASET, which says how"
            " images are laid out"
        )


def labels_of(
    path: Path, classes: Iterable[str], found: Sequence[str], class_lists: ClassLists
) -> tuple[np.ndarray, list[str]]:
    """The labels of images, and the class names by label.

    `classes` are the images' own, or a count of each, in the order of `found`, which may hold more.
    """
    names = _class_list_of(path, found, class_lists)
    ids = {name: i for i, name in enumerate(names)}
    counts = Counter(classes)
    empty = [name for name in found if not counts[name]]
    if empty:
        warn(
            f"{path}: no images in {len(empty):,} of {len(found):,} class folders (first:"
            f" {', '.join(empty[:SHOWN])}), which keep their ids: remove the folder, or put images"
            " into it"
        )
    labels = np.array([ids[name] for name in found], np.int32)
    return np.repeat(labels, [counts[name] for name in found]), names


def _class_list_of(path: Path, found: Sequence[str], class_lists: ClassLists) -> list[str]:
    if not class_lists:
        return list(found)
    for names in class_lists:
        if set(found) <= set(names):
            return list(names)
    known = set(class_lists[0])
    unknown = [name for name in found if name not in known]
    raise ValueError(
        f"{path}: {len(unknown)} classes have no place in the numbering of {len(known)} classes"
        f" that the labels follow (first: {', '.join(unknown[:SHOWN])}): set DATA.CLASS_LIST to a"
        " list that has them, or leave these classes out"
    )


def _tar_classes(path: Path, images: Iterable[str], folders: set[str]) -> list[str]:
    """The class folders of a tar file; an error where its layout is another."""
    flat = next((name for name in images if "/" not in name), None)
    if flat:
        raise ValueError(
            f"{path}: {flat} lies in no class folder: expected <class>/<image>, with any folders"
            " around all of them; for images without classes set DATA.DATASET folder"
        )
    folders = {name for name in folders if not name.startswith(".")}
    if folders <= SPLITS:
        raise ValueError(
            f"{path}: holds {', '.join(sorted(folders))} where class folders are expected: unpack"
            " it, or make a tar of each"
        )
    return sorted(folders, key=os.fsencode)


def folder_around(names: Sequence[str], labelled: bool) -> str:
    """The path that all names begin with, with a slash; a single class's folder is not in it."""
    folders = {posixpath.dirname(name) for name in names}
    shared = posixpath.commonpath(folders) if folders else ""
    if labelled and len(folders) == 1:
        shared = posixpath.dirname(shared)
    return f"{shared}/" if shared else ""


def _check_zips(path: Path, wnids: Sequence[str]) -> None:
    present = set(os.listdir(path.parent))
    missing = [wnid for wnid in wnids if f"{wnid}.zip" not in present]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of its classes have no zip file beside it (first:"
            f" {', '.join(missing[:SHOWN])}): restore the files, or take their names out of the"
            " list"
        )


def _spans_in(path: Path) -> dict[str, tuple[int, int]]:
    try:
        return zip_spans(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        warn(f"{path}: can't be read ({error}): restore the zip file")
        return {}


def folder_of(name: str) -> str:
    return name.partition("/")[0]


def _wnid_of(name: str) -> str:
    return name[:9]  # n00007846
