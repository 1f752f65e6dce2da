"""Which images there are: keys, labels and places as arrays in files, scanned once, mapped by every process.

A listing is sorted by class, then name. Its folder holds keys.txt (one key a line), ends.npy (offset of each line's end), labels.npy
(int32, -1 = none), for archives places.npy (int64 [N, 2]: offset and size), and listing.json, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.store_keys import Keys, default_cache, locate

FORMAT = 1
REPORT_SECONDS = 5.0
LEFT_BEHIND_SECONDS = 7 * 24 * 3600  # a listing that is no longer fresh may still be mapped by a running job
SUBSET_SALT = 11  # of the hash that ranks the images of a class
SHOWN = 5


@dataclass
class Scan:
    """What a scan of the data found, in the listing's order."""

    keys: Keys | Sequence[str]
    labels: np.ndarray
    class_names: list[str]
    places: np.ndarray | None = None
    watched: list[list] = field(default_factory=list)  # stamps, taken before looking, of what makes the listing stale when it changes


class ListingKeys(Keys):
    """The keys of a listing: their line ends and digest are known, nothing is computed to open them."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.blob = _mapped(folder / "keys.txt")
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
        self.places = np.load(self.folder / "places.npy", mmap_mode="r") if info["has_places"] else None

    def __reduce__(self):
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes of the numbering, whether or not each has images."""
        return len(self.class_names)

    def key(self, index: int) -> str:
        """The stable name of an image."""
        return self.keys[index]

    def place(self, index: int) -> tuple[int, int]:
        """Offset and size of an image in its archive, in bytes."""
        offset, size = self.places[index]
        return int(offset), int(size)

    def digest(self) -> str:
        """The sha256 of keys.txt: equal for equal lists."""
        return self.keys.digest()

    def select(self, indices: np.ndarray, name: str) -> Listing:
        """The listing of some images only, in this order, kept beside this one under a name that stands for the selection."""
        folder = self.folder.with_name(f"{self.folder.name}-{hashlib.sha256(name.encode()).hexdigest()[:16]}")
        if not (folder / "listing.json").is_file():
            _write(folder, Scan(_taken(self.keys, indices), np.asarray(self.labels)[indices], self.class_names,
                                None if self.places is None else np.asarray(self.places)[indices]))
        return Listing(folder)


def cached_listing(source: dict, scan: Callable[[], Scan], cache: str, again: bool = False) -> Listing:
    """The listing of a source (whatever identifies the data), scanned if there is none or the data has changed since.

    Several processes may ask at once: each that finds none scans, and the first to finish is kept.
    """
    root = (Path(cache) if cache else default_cache()) / "listings"
    stem = hashlib.sha256(json.dumps([FORMAT, source], sort_keys=True).encode()).hexdigest()[:20]
    known = sorted(root.glob(f"{stem}.*/listing.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in () if again else known:
        if _is_fresh(path):
            return Listing(path.parent)
    found = scan()
    folder = root / f"{stem}.{secrets.token_hex(4)}"
    try:
        _write(folder, found)
    except OSError as error:
        raise ValueError(f"{root}: the list of images can't be kept there ({error.strerror or error}): "
                         "name a folder in DATA.INDEX_DIR") from error
    for path in known:
        if time.time() - path.stat().st_mtime > LEFT_BEHIND_SECONDS:
            shutil.rmtree(path.parent, ignore_errors=True)
    return Listing(folder)


def subset(listing: Listing, fraction: float) -> Listing:
    """The same fraction of every class, always the same images; those of a smaller fraction are among those of a larger one."""
    if fraction == 1:
        return listing
    ranks = listing.keys.hashes(SUBSET_SALT)
    order = np.lexsort((ranks, listing.labels))
    labels = np.asarray(listing.labels)[order]
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    counts = np.diff(np.r_[starts, len(labels)])
    wanted = np.floor(counts * fraction + 1e-9).astype(np.int64)
    if (wanted < 1).any():
        class_id = int(labels[starts[np.argmin(wanted)]])
        name = listing.class_names[class_id] if class_id >= 0 else "the unlabelled images"
        raise ValueError(f"DATA.SUBSET = {fraction}: less than one image of class {name}, which has {counts[np.argmin(wanted)]}: "
                         f"use at least {1 / counts.min():.4g}")
    within = np.arange(len(labels)) - np.repeat(starts, counts)
    return listing.select(np.sort(order[within < np.repeat(wanted, counts)]), f"subset {fraction!r}")


def exclude(listing: Listing, path: str) -> Listing:
    """The listing without the keys that a file names, one a line."""
    if not path:
        return listing
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"DATA.EXCLUDE = {path}: can't be read ({error})") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    found = locate(listing.keys, Keys.of(names))
    unknown = [name for name, place in zip(names, found) if place < 0]
    if unknown:
        raise ValueError(f"DATA.EXCLUDE = {path}: {len(unknown)} of {len(names)} keys are not in the data "
                         f"(first: {', '.join(unknown[:SHOWN])}); a key looks like {listing.key(0)}")
    kept = np.ones(len(listing), bool)
    kept[found] = False
    if not kept.any():
        raise ValueError(f"DATA.EXCLUDE = {path}: names every image, nothing is left to train on")
    return listing.select(np.flatnonzero(kept), f"exclude {hashlib.sha256(text.encode()).hexdigest()}")


def reported(items: Iterator, what: str) -> Iterator:
    """The items, with a line on standard error every few seconds."""
    begun = last = time.monotonic()
    for count, item in enumerate(items):
        yield item
        if count % 1024 == 0 and time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            print(f"{what}: {count:,} so far ({last - begun:.0f} s)", file=sys.stderr, flush=True)


def stamp(path: str | Path) -> list:
    """What tells that a file or folder has changed."""
    status = os.stat(path)
    return [str(path), status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size]


def _is_fresh(path: Path) -> bool:
    try:
        watched = json.loads((path.parent / "watched.json").read_text(encoding="utf-8"))
        return all(stamp(name) == [name, *rest] for name, *rest in watched)
    except (OSError, ValueError):
        return False


def _write(folder: Path, scan: Scan) -> None:
    """Write a listing's folder so that others see it whole or not at all."""
    keys = Keys.of(scan.keys)
    temporary = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        (temporary / "keys.txt").write_bytes(memoryview(np.ascontiguousarray(keys.blob)))
        np.save(temporary / "ends.npy", np.asarray(keys.ends, np.int64))
        np.save(temporary / "labels.npy", np.asarray(scan.labels, np.int32))
        if scan.places is not None:
            np.save(temporary / "places.npy", np.asarray(scan.places, np.int64))
        (temporary / "watched.json").write_text(json.dumps(scan.watched), encoding="utf-8")
        info = {"class_names": scan.class_names, "keys_sha256": Keys.digest(keys), "has_places": scan.places is not None}
        (temporary / "listing.json").write_text(json.dumps(info), encoding="utf-8")
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "listing.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _taken(keys: Keys, indices: np.ndarray) -> Keys:
    """Some of the keys as Keys of their own."""
    ends = np.asarray(keys.ends)
    starts = np.r_[0, ends[:-1] + 1][indices]
    lengths = ends[indices] - starts + 1
    firsts = np.cumsum(lengths) - lengths
    return Keys(np.asarray(keys.blob)[np.repeat(starts - firsts, lengths) + np.arange(lengths.sum())])


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


