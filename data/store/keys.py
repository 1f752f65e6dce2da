"""Keys: the stable texts that name images, and how the listing of a run is mapped to that of a
store.

Everything is done on whole arrays: one blob of lines (the bytes of keys.txt) and the offset of each
end. Keys are compared as numpy's byte strings, those of one length at a time: so millions of them
cost seconds and no Python object each.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from data.store.files import StoreError, atomic_file

NEWLINE = 10
CHUNK_KEYS = 1 << 18  # keys handled at once, which bounds what is held beside the result
DIGEST_BYTES = 32  # behind a kept array
SHOWN = 5


class Keys(Sequence[str]):
    """A read-only sequence of texts over one blob of lines."""

    def __init__(self, blob: np.ndarray) -> None:
        self.blob = blob  # uint8: each key as utf-8, followed by a newline
        if len(blob) and blob[-1] != NEWLINE:
            raise StoreError(
                f"the last key {bytes(blob[-80:]).splitlines()[-1]!r} has no end of line: the list"
                " is cut off; copy it again"
            )
        self.ends = np.flatnonzero(blob == NEWLINE)  # int64 [n]: offset of each key's newline

    @classmethod
    def of(cls, keys: "Keys | Sequence[str]") -> "Keys":
        """Any sequence of texts as Keys."""
        if isinstance(keys, Keys):
            return keys
        texts = iter(keys)
        parts = []
        count = 0
        while some := list(islice(texts, CHUNK_KEYS)):
            parts.append(("\n".join(some) + "\n").encode("utf-8", "surrogateescape"))
            count += len(some)
        made = cls(np.frombuffer(b"".join(parts), dtype=np.uint8))
        if len(made) != count:
            bad = next(key for key in keys if "\n" in key)
            raise StoreError(f"the key {bad!r} holds a line break: rename that image")
        return made

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """The keys of a text file, mapped."""
        try:
            if path.stat().st_size == 0:
                return cls(np.empty(0, np.uint8))
            return cls(np.memmap(path, dtype=np.uint8, mode="r"))
        except OSError as error:
            raise StoreError(
                f"{path}: can't be read ({error.strerror}): restore the file or write the store"
                " again"
            ) from error
        except StoreError as error:
            raise StoreError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"key {index} of {len(self)}")
        index = int(index) % len(self)
        start = self.ends[index - 1] + 1 if index else 0
        return bytes(self.blob[start : self.ends[index]]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for _, _, start, end in self.chunks():
            lines = bytes(self.blob[start : end - 1]).decode("utf-8", "surrogateescape")
            yield from lines.split("\n")

    def digest(self) -> str:
        """The sha256 of the blob, in hex: equal for equal lists."""
        return hashlib.sha256(np.ascontiguousarray(self.blob).data).hexdigest()

    def lengths(self) -> np.ndarray:
        """Bytes of each key: int64 [n]."""
        return np.diff(self.ends, prepend=-1) - 1

    def lines(self, rows: np.ndarray, length: int) -> np.ndarray:
        """Keys that all have one length in bytes, with their newlines, as byte strings [rows].

        numpy drops zero bytes at the end of a byte string: the newline keeps them.
        """
        found = np.empty((len(rows), length + 1), np.uint8)
        for low in range(0, len(rows), CHUNK_KEYS):
            some = rows[low : low + CHUNK_KEYS]
            starts = self.ends[some] - length
            found[low : low + CHUNK_KEYS] = self.blob[starts[:, None] + np.arange(length + 1)]
        return found.view(f"S{length + 1}").ravel()

    def chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """(first key, end key, first byte, end byte) of stretches of at most CHUNK_KEYS keys."""
        for low in range(0, len(self), CHUNK_KEYS):
            high = min(low + CHUNK_KEYS, len(self))
            start = int(self.ends[low - 1]) + 1 if low else 0
            yield low, high, start, int(self.ends[high - 1]) + 1


def locate(keys: Keys, wanted: Keys) -> np.ndarray:
    """Where each wanted key first stands in `keys`: int64, -1 if nowhere."""
    found = np.full(len(wanted), -1, np.int64)
    lengths = keys.lengths()
    wanted_lengths = wanted.lengths()
    for length in np.intersect1d(lengths, wanted_lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        wanted_rows = np.flatnonzero(wanted_lengths == length)
        lines = keys.lines(rows, length)
        order = np.argsort(lines, kind="stable")  # so the first of equal keys comes first
        lines = lines[order]
        for low in range(0, len(wanted_rows), CHUNK_KEYS):
            asking = wanted_rows[low : low + CHUNK_KEYS]
            needles = wanted.lines(asking, length)
            places = np.minimum(np.searchsorted(lines, needles), len(lines) - 1)
            is_hit = lines[places] == needles
            found[asking[is_hit]] = rows[order[places[is_hit]]]
    return found


def check_unique(keys: Keys) -> None:
    """Raise StoreError if a key is empty or stands twice."""
    if not len(keys):
        raise StoreError("there are no keys: a store needs at least one image")
    lengths = keys.lengths()
    if not lengths.all():
        raise StoreError(f"key {lengths.argmin()} is empty: each image needs a name")
    first = locate(keys, keys)
    twins = np.flatnonzero(first != np.arange(len(keys)))
    if len(twins):
        twin = int(twins[0])
        raise StoreError(
            f"the key {keys[twin]!r} stands twice, at positions {first[twin]} and {twin}: a key"
            " must name one image"
        )


def difference(store: Keys, listing: Keys, mapping: np.ndarray | None = None) -> str:
    """How a listing differs from a store's, in words: counts, and the first few names.

    `mapping` is `locate(store, listing)`, if it is known.
    """
    if mapping is None:
        mapping = locate(store, listing)
    found = mapping[mapping >= 0]
    is_found = np.zeros(len(store), bool)
    is_found[found] = True
    parts = [
        *_some("added", listing, np.flatnonzero(mapping < 0)),
        *_some("removed", store, np.flatnonzero(~is_found)),
    ]
    if (np.diff(found) < 0).any():
        parts.append("reordered: the images of both are in another order")
    return "; ".join(parts) or "no difference"


def _some(what: str, keys: Keys, rows: np.ndarray) -> list[str]:
    if not len(rows):
        return []
    names = [repr(keys[row]) for row in rows[:SHOWN]]
    if len(rows) > SHOWN:
        names.append("...")
    return [f"{len(rows):,} {what}: {', '.join(names)}"]


class KeyedStore(Protocol):
    """What `map_positions` asks of a store's reader."""

    root: Path
    keys: Keys
    keys_digest: str


def map_positions(
    store: KeyedStore, listing: Keys | Sequence[str], cache: Path | str | None = None
) -> np.ndarray | None:
    """For each position of the store that of the listing, int64, -1 where the listing lacks it.

    None if they are the same list; images that the store lacks are a StoreError. The map is kept in
    `cache` and mapped from there, if that can be written.
    """
    names = Keys.of(listing)
    digest = names.digest()
    if digest == store.keys_digest:
        return None
    path = Path(cache or default_cache()) / f"store-map-{store.keys_digest[:24]}-{digest[:24]}.npy"
    if (kept := load_array(path)) is not None:
        return kept
    mapping = locate(store.keys, names)
    if (mapping < 0).any():
        raise StoreError(
            f"{store.root}: the store lacks images of this data set:"
            f" {difference(store.keys, names, mapping)}; use the data that the store was made from,"
            " name what it lacks in DATA.EXCLUDE, or save a store for this data set"
        )
    positions = np.full(len(store.keys), -1, np.int64)
    positions[mapping] = np.arange(len(names))
    if np.count_nonzero(positions >= 0) < len(names):
        check_unique(names)
    try:
        save_array(path, positions)
        return np.load(path, mmap_mode="r")
    except OSError:
        return positions


def default_cache() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyvit"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array so that other processes see it whole or not at all.

    A digest of the file's name and of all its bytes stands behind it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.save(file, array)
        file.flush()
        file.write(_digest_of_file(path, np.memmap(file.name, np.uint8, "r")))


def load_array(path: Path) -> np.ndarray | None:
    """What `save_array` wrote, mapped; None where there is none.

    One that is not as it was written, or another file's, is told on standard error, and None too.
    """
    if not path.is_file():
        return None
    try:
        data = np.memmap(path, np.uint8, "r")
        if _digest_of_file(path, data[:-DIGEST_BYTES]) == bytes(data[-DIGEST_BYTES:]):
            return np.load(path, mmap_mode="r")
        reason = "it is not as it was written"
    except (OSError, ValueError) as error:
        reason = str(error)
    _tell(f"warning: {path}: {reason}: it is made again")
    return None


@cache  # those who wait for a lock look again
def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _digest_of_file(path: Path, data: np.ndarray) -> bytes:
    place = "/".join(path.absolute().parts[-2:])  # of two arrays of one shape each has its own
    return hashlib.sha256(os.fsencode(place) + hashlib.sha256(data).digest()).digest()
