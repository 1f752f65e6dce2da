"""Keys: the stable texts that name images, and how the listing of a run is mapped to that of a
store.

Everything is done on whole arrays: one blob of lines (the bytes of keys.txt) and the offset of
each. Keys are looked up by a 64-bit hash and then compared byte by byte, so millions of them cost
seconds and no Python object each."""

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data.store.files import StoreError

NEWLINE = 10
CHUNK_KEYS = 1 << 18
SALTS = (1, 2, 3)  # a pair of keys that collides under one is looked up again under the next
SHOWN = 5
PAIRED_RENAMES = 100_000  # with more differences than this nobody renamed a few files


class Keys(Sequence[str]):
    """A read-only sequence of texts over one blob of lines."""

    def __init__(self, blob: np.ndarray) -> None:
        self.blob = blob  # uint8, each key as utf-8 followed by a newline
        if len(blob) and blob[-1] != NEWLINE:
            raise StoreError(
                f"the last key {bytes(blob[-80:]).splitlines()[-1]!r} has no end of line: the list"
                " is cut off; copy it again"
            )
        self.ends = np.flatnonzero(blob == NEWLINE)  # of each key without its newline

    @classmethod
    def of(cls, keys: "Keys | Sequence[str]") -> "Keys":
        """Any sequence of texts as Keys."""
        if isinstance(keys, Keys):
            return keys
        texts, parts, count = iter(keys), [], 0
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
        for _, _, start, end in self._chunks():
            yield from (
                bytes(self.blob[start : end - 1]).decode("utf-8", "surrogateescape").split("\n")
            )

    def digest(self) -> str:
        """The sha256 of the blob, in hex: equal for equal lists."""
        return hashlib.sha256(np.ascontiguousarray(self.blob).data).hexdigest()

    def starts(self) -> np.ndarray:
        """Offset of each key's first byte."""
        starts = np.empty_like(self.ends)
        starts[:1] = 0
        np.add(self.ends[:-1], 1, out=starts[1:])
        return starts

    def hashes(self, salt: int) -> np.ndarray:
        """A 64-bit hash of each key."""
        rng = np.random.Generator(np.random.PCG64(salt))
        letters = rng.integers(1, 2**64, size=256, dtype=np.uint64)
        multiplier = rng.integers(1, 2**64, dtype=np.uint64) | np.uint64(1)
        hashes = np.empty(len(self), np.uint64)
        for low, high, start, end in self._chunks():
            starts = np.append(start, self.ends[low : high - 1] + 1) - start
            lengths = self.ends[low:high] - start - starts + 1
            powers = np.full(lengths.max(), multiplier, np.uint64)
            powers[0] = 1
            np.multiply.accumulate(powers, out=powers)
            places = np.arange(end - start) - np.repeat(starts, lengths)
            hashes[low:high] = np.add.reduceat(
                letters[self.blob[start:end]] * powers[places], starts
            )
        hashes ^= hashes >> np.uint64(29)
        return hashes

    def equal(self, mine: np.ndarray, other: "Keys", theirs: np.ndarray) -> np.ndarray:
        """Whether self[mine[i]] == other[theirs[i]], for each i."""
        result = np.empty(len(mine), bool)
        my_starts, their_starts = self.starts(), other.starts()
        for low in range(0, len(mine), CHUNK_KEYS):
            a, b = mine[low : low + CHUNK_KEYS], theirs[low : low + CHUNK_KEYS]
            # with the newline, so that no segment is empty
            lengths = self.ends[a] - my_starts[a] + 1
            same = lengths == other.ends[b] - their_starts[b] + 1
            some, lengths = np.flatnonzero(same), lengths[same]
            if len(some):
                firsts = np.cumsum(lengths) - lengths
                within = np.arange(lengths.sum()) - np.repeat(firsts, lengths)
                left = self.blob[np.repeat(my_starts[a[some]], lengths) + within]
                right = other.blob[np.repeat(their_starts[b[some]], lengths) + within]
                same[some] = np.logical_and.reduceat(left == right, firsts)
            result[low : low + len(a)] = same
        return result

    def _chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """(first key, end key, first byte, end byte) of stretches of at most CHUNK_KEYS keys."""
        for low in range(0, len(self), CHUNK_KEYS):
            high = min(low + CHUNK_KEYS, len(self))
            yield low, high, int(self.ends[low - 1]) + 1 if low else 0, int(self.ends[high - 1]) + 1


def locate(keys: Keys, wanted: Keys) -> np.ndarray:
    """Where each wanted key first stands in `keys`: int64, -1 if nowhere."""
    found = np.full(len(wanted), -1, np.int64)
    if not len(keys) or not len(wanted):
        return found
    open_questions = np.arange(len(wanted))
    for salt in SALTS:
        hashes, needles = keys.hashes(salt), wanted.hashes(salt)[open_questions]
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        # neighbours in the needles are neighbours in the haystack: far fewer cache misses
        sorted_needles = np.argsort(needles)
        places = np.empty(len(needles), np.int64)
        places[sorted_needles] = np.searchsorted(hashes, needles[sorted_needles])
        hit = places < len(hashes)
        hit[hit] = hashes[places[hit]] == needles[hit]
        rows, candidates = open_questions[hit], order[places[hit]]
        same = keys.equal(candidates, wanted, rows)
        found[rows[same]] = candidates[same]
        open_questions = rows[~same]  # equal hashes of different texts
        if not len(open_questions):
            break
    return found


def check_unique(keys: Keys) -> None:
    """Raise StoreError if a key is empty or stands twice."""
    if not len(keys):
        raise StoreError("there are no keys: a store needs at least one image")
    empty = np.flatnonzero(keys.ends == keys.starts())
    if len(empty):
        raise StoreError(f"key {empty[0]} is empty: each image needs a name")
    hashes = keys.hashes(SALTS[0])
    order = np.argsort(hashes, kind="stable")
    twins = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    first, second = order[twins], order[twins + 1]
    same = np.flatnonzero(keys.equal(first, keys, second))
    if len(same):
        a, b = first[same[0]], second[same[0]]
        raise StoreError(
            f"the key {keys[a]!r} stands twice, at positions {a} and {b}: a key must name one image"
        )


class ListingDifference(NamedTuple):
    """How a listing differs from a store's."""

    added: list[str]  # the first few images that the store lacks, and so on
    removed: list[str]
    renamed: list[tuple[str, str]]  # (name in the store, name in the listing)
    counts: tuple[int, int, int]  # of the three above
    reordered: bool
    common: int

    def describe(self) -> str:
        """The difference in one sentence."""
        if not self.common and self.counts[0]:
            return (
                f"no image of this data set is in the store (the first: {self.added[0]!r}, the"
                f" store's: {self.removed[0]!r})"
            )
        renamed = [f"{old!r} -> {new!r}" for old, new in self.renamed]
        shown = zip(
            ("added", "removed", "renamed (it seems)"),
            (map(repr, self.added), map(repr, self.removed), renamed),
            self.counts,
        )
        parts = [
            f"{count:,} {what}: {', '.join(some)}{', ...' * (count > SHOWN)}"
            for what, some, count in shown
            if count
        ]
        if self.reordered:
            parts.append(
                "the order of the others is another"
                if parts
                else "reordered: the same images in another order"
            )
        return "; ".join(parts) or "no difference"


def compare_listings(
    store: Keys, listing: Keys, mapping: np.ndarray | None = None
) -> ListingDifference:
    """Tell added, removed, renamed and reordered images apart; `mapping` is `locate(store,
    listing)`, if it is known.
    """
    mapping = locate(store, listing) if mapping is None else mapping
    found = mapping[mapping >= 0]
    added = np.flatnonzero(mapping < 0)
    is_hit = np.zeros(len(store), bool)
    is_hit[found] = True
    removed = np.flatnonzero(~is_hit)
    renamed: list[tuple[int, int]] = []
    if len(found) and max(len(added), len(removed)) <= PAIRED_RENAMES:
        renamed = _pair_renames(store, listing, removed.tolist(), added.tolist())
        olds, news = {old for old, _ in renamed}, {new for _, new in renamed}
        added = np.array([i for i in added.tolist() if i not in news], np.int64)
        removed = np.array([i for i in removed.tolist() if i not in olds], np.int64)
    return ListingDifference(
        added=[listing[i] for i in added[:SHOWN]],
        removed=[store[i] for i in removed[:SHOWN]],
        renamed=[(store[old], listing[new]) for old, new in renamed[:SHOWN]],
        counts=(len(added), len(removed), len(renamed)),
        reordered=bool((np.diff(found) < 0).any()),
        common=len(found),
    )


def _pair_renames(
    store: Keys, listing: Keys, removed: list[int], added: list[int]
) -> list[tuple[int, int]]:
    """Pairs (store position, listing position) that look like one image under two names: same file
    in another folder, then folders in which as many names went as came."""
    pairs: list[tuple[int, int]] = []
    for part in (2, 0):  # of (folder, "/", file)
        gone, come = _group(store, removed, part), _group(listing, added, part)
        for text in gone.keys() & come.keys():
            if len(gone[text]) == len(come[text]):
                pairs += zip(gone[text], come[text])
        olds, news = {old for old, _ in pairs}, {new for _, new in pairs}
        removed, added = [i for i in removed if i not in olds], [i for i in added if i not in news]
    return sorted(pairs)


def _group(keys: Keys, positions: list[int], part: int) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for position in positions:
        groups.setdefault(keys[position].rpartition("/")[part], []).append(position)
    return groups


class KeyedStore(Protocol):
    """What `map_positions` asks of a store's reader."""

    root: Path
    keys: Keys
    keys_digest: str


def map_positions(
    store: KeyedStore, listing: Keys | Sequence[str], cache: Path | str | None = None
) -> np.ndarray | None:
    """For each position of the store that of the listing, int64, -1 where the listing lacks it;
    None if they are the same list.

    A listing that has images which the store lacks is a StoreError. The map is kept in `cache` and
    mapped from there, if it can be written."""
    digest = (
        listing.digest() if hasattr(listing, "digest") else (listing := Keys.of(listing)).digest()
    )
    if digest == store.keys_digest:
        return None
    path = Path(cache or default_cache()) / f"store-map-{store.keys_digest[:24]}-{digest[:24]}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        pass
    names = Keys.of(listing)
    mapping = locate(store.keys, names)
    if (mapping < 0).any():
        difference = compare_listings(store.keys, names, mapping)
        raise StoreError(
            f"{store.root}: the store lacks images of this data set: {difference.describe()}; use"
            " the data that the store was made from, name what it lacks in DATA.EXCLUDE, or save a"
            " store for this data set"
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
    """Write an array so that other processes see it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
