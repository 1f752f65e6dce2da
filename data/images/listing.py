"""Which images there are: keys, labels and places as arrays in files, scanned once, mapped by every
process.

A listing is sorted by class, then name. Its folder holds keys.txt (one key a line), ends.npy
(offset of each line's end), labels.npy (int32, -1 = none), for archives places.npy (int64 [N, 2]:
offset and size), for a selection positions.npy (int64: where its images stand in the whole
listing), and listing.json. A folder appears whole, by a rename, and is never changed: running jobs
may have it mapped."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.store.keys import CHUNK_KEYS, Keys, default_cache, locate

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

Item = TypeVar("Item")
FORMAT = 2
REPORT_SECONDS = 5.0
# a listing that is no longer fresh may still be mapped by a running job
LEFT_BEHIND_SECONDS = 30 * 24 * 3600
SUBSET_SALT = 11  # of the hash that ranks the images of a class
SHOWN = 5


@dataclass
class Scan:
    """What a scan of the data found, in the listing's order."""

    keys: Keys | Sequence[str]
    labels: np.ndarray
    class_names: list[str]
    places: np.ndarray | None = None
    # stamps, taken before looking, of what makes the listing stale when it changes
    watched: list[list] = field(default_factory=list)


class ListingKeys(Keys):
    """The keys of a listing: their line ends and digest are known, nothing is computed to open
    them.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.blob = np.memmap(folder / "keys.txt", np.uint8, "r")
        self.ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._digest, self._folder = digest, folder

    def digest(self) -> str:
        """The sha256 of keys.txt."""
        return self._digest

    def __reduce__(self):
        return type(self), (self._folder, self._digest)


class Listing:
    """The images of a data set. Opens in the time of a few `open` calls, and pickles as its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        info = json.loads((self.folder / "listing.json").read_text(encoding="utf-8"))
        self.class_names: list[str] = info["class_names"]
        self.keys = ListingKeys(self.folder, info["keys_sha256"])
        self.labels = np.load(self.folder / "labels.npy", mmap_mode="r")
        self.places = (
            np.load(self.folder / "places.npy", mmap_mode="r") if info["has_places"] else None
        )
        self._whole = info["whole"]

    def __reduce__(self):
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes of the numbering, whether or not each has images."""
        return len(self.class_names)

    @cached_property
    def whole(self) -> Listing:
        """The listing of all images that this one was selected from: itself, if nothing was left
        out.
        """
        return Listing(self.folder / self._whole) if self._whole else self

    @cached_property
    def _positions(self) -> np.ndarray:
        return np.load(self.folder / "positions.npy", mmap_mode="r")

    def position(self, index: int) -> int:
        """Where an image stands in the whole listing."""
        return int(self._positions[index]) if self._whole else index

    def key(self, index: int) -> str:
        """The stable name of an image."""
        return self.keys[index]

    def label(self, index: int) -> int:
        """The class id of an image, -1 where there is none."""
        return int(self.labels[index])

    def place(self, index: int) -> tuple[int, int]:
        """Offset and size of an image in its archive, in bytes."""
        offset, size = self.places[index]
        return int(offset), int(size)

    def digest(self) -> str:
        """The sha256 of keys.txt: equal for equal lists."""
        return self.keys.digest()

    def select(self, name: str, choose: Callable[[], np.ndarray]) -> Listing:
        """The listing of the images that `choose` picks, in this order.

        It is made once and kept below this one under a name that stands for the choice.
        """
        folder = self.folder / "selected" / hashlib.sha256(name.encode()).hexdigest()[:16]
        if listing := _opened(folder):
            return listing
        with named_if_refused(self.folder):
            folder.parent.mkdir(exist_ok=True)
            with _one_process(folder.with_suffix(".lock")):
                if listing := _opened(folder):
                    return listing
                shutil.rmtree(folder, ignore_errors=True)  # damaged
                rows = choose()
                places = None if self.places is None else np.asarray(self.places)[rows]
                positions = np.asarray(self._positions)[rows] if self._whole else rows
                _write(
                    folder,
                    Scan(
                        taken(self.keys, rows),
                        np.asarray(self.labels)[rows],
                        self.class_names,
                        places,
                    ),
                    os.path.join("..", "..", self._whole),
                    positions,
                )
        return Listing(folder)


def cached_listing(
    source: dict, scan: Callable[[], Scan], cache: str, again: bool = False
) -> Listing:
    """The listing of a source (whatever identifies the data), scanned if there is none or the data
    has changed since.

    `again` scans once for each process that asks. Of several processes that ask at once, one scans
    and the others wait for it."""
    root = (Path(cache) if cache else default_cache()) / "listings"
    stem = hashlib.sha256(json.dumps([FORMAT, source], sort_keys=True).encode()).hexdigest()[:20]
    again = again and (root, stem) not in _SCANNED_HERE
    if not again and (listing := _fresh(root, stem)):
        return listing
    asked = time.time_ns()
    with named_if_refused(root):
        root.mkdir(parents=True, exist_ok=True)
        with _one_process(root / f"{stem}.lock"):
            listing = _fresh(root, stem, since=asked if again else 0)
            if listing is None:
                found = _scanned(scan)
                folder = root / f"{stem}.{secrets.token_hex(4)}"
                _write(folder, found)
                _remove_old(root, stem, folder)
                listing = Listing(folder)
    _SCANNED_HERE.add((root, stem))
    return listing


def subset(listing: Listing, fraction: float) -> Listing:
    """The same fraction of every class, always the same images; those of a smaller fraction are
    among those of a larger one.
    """
    return (
        listing
        if fraction == 1
        else listing.select(f"subset {fraction!r}", lambda: _rows_of_subset(listing, fraction))
    )


def exclude(listing: Listing, path: str) -> Listing:
    """The listing without the keys that a file names, one a line."""
    names = read_names(path, "DATA.EXCLUDE") if path else []
    if not names:
        return listing
    keys = Keys.of(names)
    return listing.select(f"exclude {keys.digest()}", lambda: _rows_without(listing, keys, path))


def read_names(path: str, option: str) -> list[str]:
    """The lines of a file that an option names, without the empty ones; bytes that are no text are
    kept, as in names of files.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{option} = {path}: can't be read ({error.strerror}): name a file, one name a line"
        ) from None
    lines = (
        text.removeprefix(codecs.BOM_UTF8)
        .replace(b"\r\n", b"\n")
        .decode("utf-8", "surrogateescape")
        .split("\n")
    )
    return [line for line in lines if line]


def reported(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The items, with a line on standard error every few seconds."""
    begun = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            tell(f"{what}: {count:,} images so far ({last - begun:.0f} s)")


def tell(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def named_if_refused(folder: Path) -> Iterator[None]:
    """Tell a user whose cache can't be written where it lies, and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{folder}: the list of images can't be kept there ({error.strerror or error}): "
            "name a folder in DATA.INDEX_DIR"
        ) from error


def stamp(path: str | Path) -> list:
    """What tells that a file or folder has changed."""
    status = os.stat(path)
    return [str(path), status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size]


_SCANNED_HERE: set[tuple[Path, str]] = set()


def _rows_of_subset(listing: Listing, fraction: float) -> np.ndarray:
    ranks = listing.keys.hashes(SUBSET_SALT)
    order = np.lexsort((ranks, listing.labels))
    labels = np.asarray(listing.labels)[order]
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    counts = np.diff(np.r_[starts, len(labels)])
    wanted = np.floor(counts * fraction + 1e-9).astype(np.int64)
    if (wanted < 1).any():
        class_id = int(labels[starts[np.argmin(wanted)]])
        name = listing.class_names[class_id] if class_id >= 0 else "the unlabelled images"
        raise ValueError(
            f"DATA.SUBSET = {fraction}: less than one image of class {name}, which has"
            f" {counts[np.argmin(wanted)]}: use at least {math.ceil(1e6 / counts.min()) / 1e6}"
        )
    within = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(order[within < np.repeat(wanted, counts)])


def _rows_without(listing: Listing, keys: Keys, path: str) -> np.ndarray:
    found = locate(listing.keys, keys)
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        raise ValueError(
            f"DATA.EXCLUDE = {path}: {len(unknown)} of {len(keys)} keys are not in the data (first:"
            f" {', '.join(keys[i] for i in unknown[:SHOWN])}); a key looks like {listing.key(0)}"
        )
    kept = np.ones(len(listing), bool)
    kept[found] = False
    if not kept.any():
        raise ValueError(f"DATA.EXCLUDE = {path}: names every image, nothing is left to train on")
    return np.flatnonzero(kept)


def _scanned(scan: Callable[[], Scan]) -> Scan:
    try:
        return scan()
    except OSError as error:
        raise ValueError(
            f"{error.filename}: can't be read ({error.strerror or error}): see to its permissions,"
            " or move it away"
        ) from error


@contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Let one process in at a time; the system frees the lock of one that dies. Where there are no
    such locks, all enter.
    """
    with open(path, "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            # a file system without locks: the same list is then made several times over
            except OSError:
                pass
        yield


def _known(root: Path, stem: str) -> list[tuple[int, Path]]:
    """(time made, folder) of all listings of a source, newest first."""
    return sorted(
        ((made, path.parent) for made, path in _dated(root.glob(f"{stem}.*/listing.json"))),
        reverse=True,
    )


def _dated(paths: Iterable[Path]) -> Iterator[tuple[int, Path]]:
    """(time made, path) of those that no other process removes meanwhile."""
    for path in paths:
        try:
            yield path.stat().st_mtime_ns, path
        except OSError:
            pass


def _fresh(root: Path, stem: str, since: int = 0) -> Listing | None:
    """The newest listing of a source, if the data has not changed since and it is not older than
    `since`.
    """
    for made, folder in _known(root, stem):
        try:
            watched = json.loads((folder / "watched.json").read_text(encoding="utf-8"))
            is_fresh = made >= since and all(
                stamp(name) == [name, *rest] for name, *rest in watched
            )
        except (OSError, ValueError):  # removed meanwhile, or damaged by a power cut
            continue
        if is_fresh and (listing := _opened(folder)):
            return listing
    return None


def _opened(folder: Path) -> Listing | None:
    """The listing in a folder; None if there is none, or one that a power cut has damaged."""
    try:
        listing = Listing(folder)
        is_whole = len(listing.keys.blob) == listing.keys.ends[-1] + 1 and len(listing.keys) == len(
            listing
        )
        return listing if is_whole else None
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _remove_old(root: Path, stem: str, kept: Path) -> None:
    for made, folder in [*_known(root, stem), *_dated(root.glob(f".{stem}.*"))]:
        if folder != kept and time.time_ns() - made > LEFT_BEHIND_SECONDS * 1e9:
            shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, scan: Scan, whole: str = "", positions: np.ndarray | None = None) -> None:
    """Write a listing's folder so that others see it whole or not at all."""
    keys = Keys.of(scan.keys)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        (temporary / "keys.txt").write_bytes(memoryview(np.ascontiguousarray(keys.blob)))
        np.save(temporary / "ends.npy", np.asarray(keys.ends, np.int64))
        np.save(temporary / "labels.npy", np.asarray(scan.labels, np.int32))
        if scan.places is not None:
            np.save(temporary / "places.npy", np.asarray(scan.places, np.int64))
        if positions is not None:
            np.save(temporary / "positions.npy", np.asarray(positions, np.int64))
        (temporary / "watched.json").write_text(json.dumps(scan.watched), encoding="utf-8")
        info = {
            "class_names": scan.class_names,
            "keys_sha256": Keys.digest(keys),
            "has_places": scan.places is not None,
            "whole": whole,
        }
        (temporary / "listing.json").write_text(json.dumps(info), encoding="utf-8")
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "listing.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def taken(keys: Keys, rows: np.ndarray) -> Keys:
    """Some of the keys, in the order of `rows`, as Keys of their own."""
    ends = np.asarray(keys.ends)
    parts = []
    for low in range(0, len(rows), CHUNK_KEYS):
        some = rows[low : low + CHUNK_KEYS]
        starts = np.where(some > 0, ends[some - 1] + 1, 0)
        lengths = ends[some] - starts + 1
        firsts = np.cumsum(lengths) - lengths
        parts.append(
            np.asarray(keys.blob)[np.repeat(starts - firsts, lengths) + np.arange(lengths.sum())]
        )
    return Keys(np.concatenate(parts))
