"""Reading a logits store against reading the original's layout the original's way.

    python -m benchmarks.store                                    # 1.28 M images, K = 10 and 100
    python -m benchmarks.store --images 5000000 --topk 10 100     # a few minutes and 9 GB of disk

Both stores are written first, with keys like ImageNet-22k's; then both sides are timed turn by turn
in one run, with a warm page cache. The original's way: every key of an epoch is parsed into a
dictionary, a record is read with seek and read. Memory is measured in a fresh process for each
side, as the growth from before opening to after reading: private pages are a process's own, mapped
ones are the page cache's and shared by all processes. What verification costs is measured as the
processor time to the first record, and that in which a process reads all records of an epoch while
a thread verifies the next one, against the same without it. The report goes to stdout as JSON."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.timing import alternate, machine, report
from data.store import LogitsStoreReader, LogitsStoreWriter, record_dtype
from data.store.format import Records, epoch_bytes, pack_records
from data.store.keys import Keys
from data.store.verify import Verifier

CLASSES = 21841
RANKS = 8
EPOCHS = 2
BLOCK = 1 << 16
READS = 20_000  # records of one turn


class OriginalReader:
    """One epoch of the original's layout, read the original's way."""

    def __init__(self, folder: Path, k: int) -> None:
        self.k, self.size = k, 4 + 4 * k
        # key -> rank << 32 | row: one int instead of a tuple, to its advantage
        self.rows: dict[str, int] = {}
        self.values = []
        for rank in range(RANKS):
            with open(folder / f"rank{rank}-keys.txt") as lines:
                for row, line in enumerate(lines):
                    self.rows[line.rstrip("\n")] = rank << 32 | row
            self.values.append(open(folder / f"rank{rank}-values.bin", "rb"))  # noqa: SIM115

    def read(self, key: str) -> tuple[int, np.ndarray, np.ndarray]:
        row = self.rows[key]
        file = self.values[row >> 32]
        file.seek((row & 0xFFFFFFFF) * self.size)
        data = file.read(self.size)
        seed = int(np.frombuffer(data, np.int32, 1)[0])
        return (
            seed,
            np.frombuffer(data, np.int16, self.k, 4),
            np.frombuffer(data, np.float16, self.k, 4 + 2 * self.k),
        )

    def close(self) -> None:
        for file in self.values:
            file.close()


def read_ours(records: Records, position: int) -> tuple[int, np.ndarray, np.ndarray]:
    """A record as ReplayDataset takes it."""
    record = records[position]
    return int(record["seed"]), record["index"], record["prob"]


def key_text(position: int) -> str:
    """A name like n00007846_10001; they ascend with the position."""
    return f"n{position // 650:08d}_{position % 650 + 1000}"


def epoch_order(images: int, epoch: int) -> np.ndarray:
    """The shuffled order in which both sides are written."""
    return np.random.Generator(np.random.PCG64([7, epoch])).permutation(images)


def blocks(images: int, k: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions, records) of an epoch, as a teacher would give them."""
    rng = np.random.Generator(np.random.PCG64([k, epoch]))
    probs = -np.sort(-rng.dirichlet(np.ones(k), size=256), axis=1)
    order = epoch_order(images, epoch)
    for low in range(0, images, BLOCK):
        positions = order[low : low + BLOCK]
        indices = (positions[:, None] * 7919 + np.arange(k)) % CLASSES
        yield (
            positions,
            pack_records(
                rng.integers(0, 2**31, len(positions)), indices, probs[positions % 256], CLASSES
            ),
        )


def write_ours(root: Path, keys: Keys, k: int) -> None:
    """A sealed store."""
    with LogitsStoreWriter(root, {"identity": {"k": k, "num_classes": CLASSES}}, keys) as writer:
        for epoch in range(EPOCHS):
            writer.begin_epoch(epoch)
            for positions, records in blocks(len(keys), k, epoch):
                writer.append(positions, records)
            writer.seal(epoch)


def write_original(root: Path, keys: list[str], k: int) -> None:
    """The same records in the original's layout, dealt to ranks in runs of the epoch's order."""
    for epoch in range(EPOCHS):
        folder = root / f"logits_top{k}_epoch{epoch}"
        folder.mkdir(parents=True)
        for positions, records in blocks(len(keys), k, epoch):
            for rank in range(RANKS):
                mine = slice(rank, None, RANKS)
                with (
                    open(folder / f"rank{rank}-keys.txt", "a") as names,
                    open(folder / f"rank{rank}-values.bin", "ab") as values,
                ):
                    names.write(
                        "".join(f"{keys[position]}\n" for position in positions[mine].tolist())
                    )
                    values.write(records[mine].tobytes())


def memory() -> dict[str, float]:
    """This process's private and its mapped pages, in MB."""
    sizes = {}
    with open("/proc/self/smaps_rollup") as lines:
        for line in lines:
            name, _, size = line.partition(":")
            if size.strip().endswith("kB"):
                sizes[name] = int(size.split()[0]) / 1024
    return {"private": sizes["Anonymous"], "mapped": sizes["Rss"] - sizes["Anonymous"]}


def worker_memory(side: str, folder: Path, images: int, k: int) -> dict[str, float]:
    """What a loader process of one side grows by; called in a process of its own."""
    positions = np.random.Generator(np.random.PCG64(5)).integers(0, images, READS).tolist()
    # from the data set's listing, in both designs: they don't count
    wanted = [key_text(position) for position in positions]
    before = memory()
    if side == "ours":
        records = LogitsStoreReader(folder / "ours").open_records(0)
        for position in positions:
            read_ours(records, position)
    else:
        reader = OriginalReader(folder / "original" / f"logits_top{k}_epoch0", k)
        for key in wanted:
            reader.read(key)
    after = memory()
    return {f"{name}_mb": round(after[name] - before[name], 2) for name in before}


def compare(folder: Path, images: int, k: int, repeats: int) -> dict[str, object]:
    """Both sides for one size of store."""
    texts = [key_text(position) for position in range(images)]
    keys = Keys.of(texts)
    write_ours(folder / "ours", keys, k)
    write_original(folder / "original", texts, k)
    originals = [folder / "original" / f"logits_top{k}_epoch{epoch}" for epoch in range(EPOCHS)]
    rng = np.random.Generator(np.random.PCG64(1))
    first, ours = texts[images // 2], LogitsStoreReader(folder / "ours")

    def open_original(epoch: int) -> None:
        reader = OriginalReader(originals[epoch], k)
        reader.read(first)
        reader.close()

    result: dict[str, object] = {
        "images": images,
        "k": k,
        "record_bytes": record_dtype(k, CLASSES).itemsize,
    }
    result["open_and_first_record"] = seconds(
        lambda: read_ours(LogitsStoreReader(folder / "ours").open_records(0), images // 2),
        lambda: open_original(0),
        max(3, repeats // 3),
    )
    result["epoch_switch"] = seconds(
        lambda: read_ours(ours.open_records(1), images // 2),
        lambda: open_original(1),
        max(3, repeats // 3),
    )

    records, original = ours.open_records(0), OriginalReader(originals[0], k)
    for position in rng.integers(0, images, 100).tolist():
        a, b = read_ours(records, position), original.read(texts[position])
        assert a[0] == b[0] and (a[1] == b[1]).all() and (a[2] == b[2]).all(), (
            "the two stores differ"
        )
    for name, order in (
        ("random", epoch_order(images, 5)),
        ("epoch_order", epoch_order(images, 0)[::RANKS]),
    ):
        positions = order[:READS].tolist()
        wanted = [texts[position] for position in positions]
        times = alternate(
            {
                "ours": lambda positions=positions: [
                    read_ours(records, position) for position in positions
                ],
                "original": lambda wanted=wanted: [original.read(key) for key in wanted],
            },
            repeats,
        )
        rates = {side: round(len(positions) / time["median"]) for side, time in times.items()}
        result[f"records_per_second_{name}"] = {
            **rates,
            "ratio": round(rates["ours"] / rates["original"], 2),
        }
    original.close()
    result["worker_memory"] = memories(folder, images, k)
    result["verification"] = verification(folder / "ours", images, k, max(3, repeats // 3))
    return result


def verification(root: Path, images: int, k: int, repeats: int) -> dict[str, object]:
    """Seconds of processor time that it costs that nothing is read unverified."""

    def start(verifies: bool) -> None:
        reader = LogitsStoreReader(root)
        if verifies:
            Verifier(reader).wait(0, lambda items, *_: items)
        read_ours(reader.open_records(0), images // 2)

    def epoch(verifies: bool) -> None:
        reader = LogitsStoreReader(root)
        verifier = Verifier(reader)
        if verifies:
            verifier.begin(1)
        records = reader.open_records(0)
        for position in range(images):
            read_ours(records, position)
        if verifies:
            verifier.wait(1, lambda items, *_: items)

    found: dict[str, object] = {"epoch_bytes": epoch_bytes(images, k, CLASSES)}
    for name, function in (("first_record", start), ("epoch", epoch)):
        sides = {"without": lambda f=function: f(False), "with": lambda f=function: f(True)}
        found[name] = alternate(sides, repeats, clock=time.process_time)
    return found


def seconds(
    ours: Callable[[], object], original: Callable[[], object], repeats: int
) -> dict[str, object]:
    """Median seconds of both sides, their spreads, and how many times faster ours is."""
    times = alternate({"ours": ours, "original": original}, repeats, warmup=1)
    return {**times, "ratio": round(times["original"]["median"] / times["ours"]["median"], 1)}


def memories(folder: Path, images: int, k: int) -> dict[str, object]:
    """What a loader process of each side grows by."""
    sides: dict[str, dict[str, float]] = {}
    for side in ("ours", "original"):
        options = f"--worker {side} --images {images} --topk {k} --folder".split()
        command = [sys.executable, "-m", "benchmarks.store", *options, str(folder)]
        sides[side] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
    return {
        **sides,
        "private_ratio_at_least": round(
            sides["original"]["private_mb"] / max(sides["ours"]["private_mb"], 1.0), 1
        ),
    }


def main() -> None:
    """Measure and print the report."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store", description=__doc__, formatter_class=formatter
    )
    text = "sizes of data sets (default: %(default)s)"
    parser.add_argument("--images", type=int, nargs="+", default=[1_281_167], help=text)
    text = "probabilities per image (default: %(default)s)"
    parser.add_argument("--topk", type=int, nargs="+", default=[10, 100], help=text)
    text = "turns of each side (default: %(default)s)"
    parser.add_argument("--repeats", type=int, default=9, help=text)
    text = "where to write the stores (default: a temporary folder)"
    parser.add_argument("--folder", type=Path, help=text)
    parser.add_argument("--worker", choices=["ours", "original"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker_memory(args.worker, args.folder, args.images[0], args.topk[0])))
        return
    result: dict[str, object] = {
        "machine": machine(),
        "page_cache": "warm",
        "ranks": RANKS,
        "sizes": [],
    }
    for images in args.images:
        for k in args.topk:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                result["sizes"].append(compare(Path(folder), images, k, args.repeats))
    report(result)


if __name__ == "__main__":
    main()
