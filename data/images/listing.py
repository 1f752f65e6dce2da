"""Which images there are: keys, labels and spans as arrays in files, scanned once, mapped by all.

A listing is sorted by class, then name. Its folder holds keys.npy (uint8: one key a line), ends.npy
(offset of each line's end), labels.npy (int32, -1 = none), for archives spans.npy (int64 [N, 2]:
offset and size in bytes, -1 and 0 = not known), info.npy (JSON), and for each part of it that was
asked for rows-*.npy (int64: the positions of its images). A folder is never changed: running jobs
may have it mapped. Beside the folders, `<source>.npy` names the newest one of a source of images,
and what makes it stale (JSON too). All are arrays because these carry a digest: a process that
starts a run computes it, its workers take what that one found.
"""

from __future__ import annotations

import codecs
import hashlib
import json
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

from data.store.files import sole_user
from data.store.keys import CHUNK_KEYS, Keys, default_cache, load_array, locate, save_array

Item = TypeVar("Item")
FORMAT = 4
REPORT_SECONDS = 5.0
SUBSET_SALT = 11  # of the hash that ranks the images of a class
SHOWN = 5
PROCESS_BEGAN = time.time_ns()


@dataclass
class Scan:
    """What a scan of the data found, in the listing's order."""

    keys: Keys | Sequence[str]
    labels: np.ndarray
    class_names: list[str]
    spans: np.ndarray | None = None
    # stamps, taken before looking, of what makes the listing stale when it changes
    watched: list[list] = field(default_factory=list)


class ListingKeys(Keys):
    """The keys of a listing's folder: line ends and digest are known, so opening them is quick."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.blob = np.load(folder / "keys.npy", mmap_mode="r")
        self.ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._digest = digest
        self._folder = folder

    def digest(self) -> str:
        """The sha256 of the lines."""
        return self._digest

    def __reduce__(self):
        return type(self), (self._folder, self._digest)


class Listing:
    """The images of a data set, or a part of them; pickles as its path.

    A position counts all images of the data set, selected or not; an index those of the part.
    """

    def __init__(self, folder: Path, rows: str = "") -> None:
        """`rows` names the file with the positions of the part's images; "" means all images."""
        info = _value(np.load(folder / "info.npy"))
        self.folder = folder
        self.class_names: list[str] = info["class_names"]
        self._all_keys = ListingKeys(folder, info["keys_sha256"])
        self._all_labels = np.load(folder / "labels.npy", mmap_mode="r")
        self._spans = (
            np.load(folder / "spans.npy", mmap_mode="r") if "spans" in info["arrays"] else None
        )
        self._rows_name = rows
        self._rows = np.load(folder / rows, mmap_mode="r") if rows else None

    def __reduce__(self):
        return type(self), (self.folder, self._rows_name)

    def __len__(self) -> int:
        return self.total if self._rows is None else len(self._rows)

    @property
    def total(self) -> int:
        """Number of images of the whole data set."""
        return len(self._all_labels)

    @cached_property
    def keys(self) -> Keys:
        """The stable names of the part's images."""
        return self._all_keys if self._rows is None else taken(self._all_keys, self._rows)

    @cached_property
    def labels(self) -> np.ndarray:
        """The class ids of the part's images."""
        labels = np.asarray(self._all_labels)
        return labels if self._rows is None else labels[self._rows]

    def position(self, index: int) -> int:
        """Where an image of the part stands among all images."""
        return index if self._rows is None else int(self._rows[index])

    def key(self, position: int) -> str:
        """The stable name of an image."""
        return self._all_keys[position]

    def label(self, position: int) -> int:
        """The class id of an image, -1 where there is none."""
        return int(self._all_labels[position])

    def span(self, position: int) -> tuple[int, int]:
        """Offset and size of an image in its archive, in bytes."""
        offset, size = self._spans[position]
        return int(offset), int(size)

    def select(self, choice: str, choose: Callable[[], np.ndarray]) -> Listing:
        """The part whose indices `choose` gives; they are kept under a name made of `choice`.

        Choosing among millions of keys takes seconds: it is done once, not by every process.
        """
        digest = hashlib.sha256(f"{self._rows_name} {choice}".encode()).hexdigest()
        name = f"rows-{digest[:16]}.npy"

        def make() -> Listing:
            rows = choose()
            save_array(self.folder / name, rows if self._rows is None else self._rows[rows])
            return Listing(self.folder, name)

        def find() -> Listing | None:
            kept = load_array(self.folder / name)
            return None if kept is None else Listing(self.folder, name)

        return _made_once(self.folder / f"{name}.lock", find, make)


def cached_listing(
    source: dict, scan: Callable[[], Scan], cache: str, again: bool = False
) -> Listing:
    """The listing of a source (whatever identifies the data), scanned if there is no fresh one.

    With `again`, one that was made before this process began is not fresh. Of several processes
    that ask at once, one scans and the others wait for it.
    """
    root = (Path(cache) if cache else default_cache()) / "listings"
    name = hashlib.sha256(json.dumps([FORMAT, source], sort_keys=True).encode()).hexdigest()[:20]
    newest = root / f"{name}.npy"
    since = PROCESS_BEGAN if again else 0

    def make() -> Listing:
        found = _scanned(scan)
        folder = root / f"{name}.{secrets.token_hex(4)}"
        _write(folder, found)
        pointer = {"folder": folder.name, "watched": found.watched, "made": time.time_ns()}
        _save_value(newest, pointer)
        return Listing(folder)

    return _made_once(root / f"{name}.lock", lambda: _fresh(newest, since), make)


def subset(listing: Listing, fraction: float, rest: bool = False) -> Listing:
    """The same fraction of every class, at least an image of each, always the same images; or what
    that leaves.

    Those of a smaller fraction are among those of a larger one.
    """
    if fraction == 1:
        return listing
    name = f"{'all but the ' * rest}subset {fraction!r}"
    return listing.select(name, lambda: _rows_of_subset(listing, fraction, rest))


def exclude(listing: Listing, path: str) -> Listing:
    """The listing without the keys that a file names, one a line."""
    names = read_names(path, "DATA.EXCLUDE") if path else []
    if not names:
        return listing
    keys = Keys.of(names)
    return listing.select(f"exclude {keys.digest()}", lambda: _rows_without(listing, keys, path))


def read_names(path: str, option: str) -> list[str]:
    """The lines of a file that an option names, without the empty ones.

    Bytes that are no text are kept, as in names of files.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{option} = {path}: can't be read ({error.strerror}): name a file, one name a line"
        ) from None
    text = text.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    lines = text.decode("utf-8", "surrogateescape").split("\n")
    return [line for line in lines if line]


def reported(items: Iterable[Item], what: str, unit: str = "images") -> Iterator[Item]:
    """The items, with a line on standard error every few seconds."""
    begun = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            text = f"{what}: {count:,} {unit} so far ({last - begun:.0f} s)"
            print(text, file=sys.stderr, flush=True)


@contextmanager
def named_if_refused(folder: Path) -> Iterator[None]:
    """Tell a user whose cache can't be written where it lies, and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{folder}: the list of images can't be kept there ({error.strerror or error}): name a"
            " folder in DATA.INDEX_DIR"
        ) from error


def stamp(path: str | Path) -> list:
    """What tells that a file or folder has changed: its path, time of change and size."""
    status = os.stat(path)
    return [str(path), status.st_mtime_ns, 0 if os.path.isdir(path) else status.st_size]


def subset_ranks(keys: Keys) -> np.ndarray:
    """What orders the images of a class for DATA.SUBSET: a 64-bit hash of each key.

    Which images a subset has depends on it, so it stays as it is. It is a polynomial in a constant
    number, with one random number for each byte value, modulo 2**64.
    """
    rng = np.random.Generator(np.random.PCG64(SUBSET_SALT))
    letters = rng.integers(1, 2**64, size=256, dtype=np.uint64)
    base = rng.integers(1, 2**64, dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(keys), np.uint64)
    for low, high, start, end in keys.chunks():
        starts = np.append(start, keys.ends[low : high - 1] + 1) - start
        lengths = keys.ends[low:high] - start - starts + 1  # with the newline
        powers = np.full(lengths.max(), base, np.uint64)
        powers[0] = 1
        np.multiply.accumulate(powers, out=powers)
        within = np.arange(end - start) - np.repeat(starts, lengths)
        terms = letters[keys.blob[start:end]] * powers[within]
        hashes[low:high] = np.add.reduceat(terms, starts)
    hashes ^= hashes >> np.uint64(29)
    return hashes


def _rows_of_subset(listing: Listing, fraction: float, rest: bool) -> np.ndarray:
    ranks = subset_ranks(listing.keys)
    order = np.lexsort((ranks, listing.labels))
    labels = listing.labels[order]
    starts = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
    counts = np.diff(starts, append=len(labels))
    wanted = np.floor(counts * fraction + 1e-9).astype(np.int64).clip(1)
    within = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(order[(within < np.repeat(wanted, counts)) ^ rest])


def _rows_without(listing: Listing, keys: Keys, path: str) -> np.ndarray:
    found = locate(listing.keys, keys)
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        raise ValueError(
            f"DATA.EXCLUDE = {path}: {len(unknown)} of {len(keys)} keys are not in the data (first:"
            f" {', '.join(keys[i] for i in unknown[:SHOWN])}); a key looks like {listing.keys[0]}"
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


def _made_once(
    lock: Path, find: Callable[[], Listing | None], make: Callable[[], Listing]
) -> Listing:
    """What `find` finds; where that is nothing, one process makes it and the others wait."""
    if (found := find()) is not None:
        return found
    with named_if_refused(lock.parent):
        with sole_user(lock, wait=True):
            found = find()
            return make() if found is None else found


def _fresh(newest: Path, since: int) -> Listing | None:
    """The newest listing of a source, if it is not older than `since` and its data is unchanged."""
    kept = load_array(newest)
    if kept is None:
        return None
    pointer = _value(kept)
    try:
        is_changed = any(stamp(watched[0]) != watched for watched in pointer["watched"])
    except OSError:  # what it was made of is gone
        return None
    if is_changed or pointer["made"] < since:
        return None
    folder = newest.parent / pointer["folder"]
    info = load_array(folder / "info.npy")
    if info is None or any(
        load_array(folder / f"{name}.npy") is None for name in _value(info)["arrays"]
    ):
        return None
    return Listing(folder)


def _write(folder: Path, scan: Scan) -> None:
    keys = Keys.of(scan.keys)
    arrays = {
        "keys": keys.blob,
        "ends": np.asarray(keys.ends, np.int64),
        "labels": np.asarray(scan.labels, np.int32),
    }
    if scan.spans is not None:
        arrays["spans"] = np.asarray(scan.spans, np.int64)
    info = {
        "class_names": scan.class_names,
        "keys_sha256": Keys.digest(keys),
        "arrays": list(arrays),
    }
    try:
        for name, array in arrays.items():
            save_array(folder / f"{name}.npy", array)
        _save_value(folder / "info.npy", info)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _save_value(path: Path, value: dict) -> None:
    save_array(path, np.frombuffer(json.dumps(value).encode(), np.uint8))


def _value(array: np.ndarray) -> dict:
    return json.loads(array.tobytes())


def taken(keys: Keys, rows: np.ndarray) -> Keys:
    """Some of the keys, in the order of `rows`, as Keys of their own."""
    parts = []
    for low in range(0, len(rows), CHUNK_KEYS):
        some = np.asarray(rows[low : low + CHUNK_KEYS])
        starts = np.where(some > 0, keys.ends[some - 1] + 1, 0)
        lengths = keys.ends[some] - starts + 1
        firsts = np.cumsum(lengths) - lengths
        letters = np.repeat(starts - firsts, lengths) + np.arange(lengths.sum())
        parts.append(np.asarray(keys.blob)[letters])
    return Keys(np.concatenate(parts))
