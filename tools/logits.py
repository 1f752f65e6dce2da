"""Logits stores from outside: what one holds, whether it is whole, converting and merging them."""

import argparse
import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.store.files import StoreError, atomic_file, lock_holder, sole_user, write_atomic
from data.store.format import (
    block_digests,
    counted,
    data_path,
    disk_need,
    encoded,
    epoch_bytes,
    lock_path,
    num_blocks,
    parts_path,
    ranges,
    record_dtype,
    rounded,
    seal_path,
    size_text,
)
from data.store.keys import Keys
from data.store.original import UpstreamStoreReader
from data.store.parts import part_files, read_blocks
from data.store.published import fetch_store
from data.store.reader import LogitsStoreReader
from data.store.writer import LogitsStoreWriter
from logger import progress

BATCH_RECORDS = 1 << 14
COPIED_BYTES = 1 << 23  # at once
SAMPLED_RECORDS = 100_000
CARD = """---
tags: [knowledge-distillation, teacher-logits]
---
# What {teacher} said

Of each image and epoch: the seed of its augmentation, and the teacher's most probable classes.
No images; their names are in keys.txt.

```
{info}```

Fetched and verified, it teaches students on the images that it was written for; that they are
these is checked before the first batch:

```
python -m tools.logits fetch hf-hub:USER/REPOSITORY STORE
python -m tools.logits verify STORE
python main.py --cfg RECIPE --data-path IMAGES --opts DISTILL.TEACHER_LOGITS_PATH STORE
```
"""
NAME_BYTES = 16  # of an original's key and its end of line: n00007846_10001


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0: done, 1: damage was found, 2: the request or its files are at fault."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tools.logits", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Callable:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub.add_argument

    text = "what a store is: sizes, recipe, teacher and its accuracy per epoch"
    add = command("info", info, text)
    add("store", type=Path, help="folder of the store, in our layout or the original's")

    text = "read a store in full and check it against its checksums; exit code 1 on damage"
    add = command("verify", verify, text)
    add("store", type=Path, help="folder of the store")
    add("--epochs", type=int, default=0, metavar="E", help="also require the epochs 0 to E - 1")

    add = command("estimate", estimate, "the disk space that a store will take")
    add("--images", type=int, required=True, metavar="N", help="images of the data set")
    add("--topk", type=int, required=True, metavar="K", help="probabilities kept per image")
    add("--classes", type=int, required=True, metavar="C", help="classes of the teacher")
    add("--epochs", type=int, required=True, metavar="E", help="epochs to save")
    add("--original", action="store_true", help="also tell what the original's layout takes")

    add = command("convert", convert, "turn a store in the original's layout into one of ours")
    add("source", type=Path, help="folder that holds logits_top*_epoch*")
    add("target", type=Path, help="folder of the new store")
    text = "the teacher's recipe, which the source was saved with (its mean is the fill colour)"
    add("--cfg", required=True, metavar="FILE", help=text)
    text = "set any configuration key, e.g. DISTILL.UPSTREAM_ORDER tar"
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help=text)
    text = "the data set, which tells the keys and is sampled for the proof"
    add("--data-path", metavar="PATH", help=text)
    text = "the keys, one a line in the order of the data set, instead of the data set itself"
    add("--keys", type=Path, metavar="FILE", help=text)
    add("--teacher", default="unknown", metavar="NAME", help="name of the teacher for the manifest")

    text = "gather the epochs of stores of one identity, e.g. written on several machines"
    add = command("merge", merge, text)
    add("target", type=Path, help="folder to merge into; made if it is not there")
    add("sources", type=Path, nargs="+", help="stores to copy from")

    text = "write README.md into a store, for a data set of the Hugging Face Hub"
    add = command("card", card, text)
    add("store", type=Path, help="folder of the store, which can then be uploaded as it is")

    text = "fetch a published store, or what is missing of it, and check each epoch"
    add = command("fetch", fetch, text)
    add("source", help="hf-hub:user/repository[@revision], or the link of a folder that has it")
    add("target", type=Path, help="folder of the store; made if it is not there")
    text = "the epochs 0 to E - 1 (default: all up to the first that is missing)"
    add("--epochs", type=int, default=0, metavar="E", help=text)

    text = "draw confidence, entropy and the mass outside the top K, to choose K"
    add = command("histogram", histogram, text)
    add("store", type=Path, help="folder of the store")
    add("--epoch", type=int, metavar="E", help="epoch to look at; default: the first sealed one")
    text = "picture to write (default: %(default)s)"
    add("-o", "--output", type=Path, default=Path("logits.png"), metavar="PNG", help=text)

    text = "list images whose given label the teacher does not believe, as DATA.EXCLUDE takes it"
    add = command("suspects", suspects, text)
    add("store", type=Path, help="folder of the store, whose teacher did not learn these labels")
    add("--cfg", metavar="FILE", help="a recipe with the data set")
    add("--data-path", metavar="PATH", help="the data set")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="set any configuration key")
    text = "suspect: not among the teacher's first N in most epochs (5 from 100 classes on, else 1)"
    add("--outside", type=int, default=0, metavar="N", help=text)
    text = "list to write, beside it a contact sheet, .png (default: %(default)s)"
    add("-o", "--output", type=Path, default=Path("suspects.txt"), metavar="FILE", help=text)
    return top


def suspects(args: argparse.Namespace) -> int:
    from tools.suspects import suspects  # here, since it needs torch

    return suspects(args)


def info(args: argparse.Namespace) -> int:
    if not (args.store / "manifest.json").exists() and any(args.store.glob("logits_top*_epoch*")):
        return _info_original(args.store)
    reader = LogitsStoreReader(args.store)
    manifest = reader.manifest
    epochs = reader.epochs()
    size = epoch_bytes(len(reader), reader.k, reader.num_classes)
    print(
        f"{args.store}: format {manifest['format']}, top-{reader.k} of"
        f" {reader.num_classes:,} classes, {counted(len(reader), 'image')}"
    )
    print(
        f"  {reader.dtype.itemsize} bytes a record, {size_text(size)} an epoch,"
        f" {size_text(size * len(epochs))} in sealed epochs"
    )
    print(f"  keys: {reader.keys[0]} ... {reader.keys[-1]} (sha256 {reader.keys_digest[:16]})")
    told = ("k", "num_classes", "num_images", "keys_sha256")
    identity = {key: value for key, value in manifest["identity"].items() if key not in told}
    tree = {"identity": identity, "teacher": manifest["teacher"], "written with": manifest["info"]}
    _print_tree(tree, "  ")
    print(f"  sealed epochs: {ranges(epochs)}")
    for epoch in epochs:
        accuracy = [
            f"{name} {round(value, 2)}" for name, value in reader.seal(epoch)["teacher"].items()
        ]
        if accuracy:
            print(f"    epoch {epoch}: teacher {', '.join(accuracy)}")
    for epoch in _unfinished(args.store):
        _print_unfinished(reader, epoch)
    return 0


def verify(args: argparse.Namespace) -> int:
    reader = LogitsStoreReader(args.store)
    epochs = reader.epochs()
    faults = []
    lacking = set(range(args.epochs)) - set(epochs)
    if lacking:
        faults.append(f"{args.store}: missing epochs: {ranges(lacking)}")
    try:
        len(reader.keys)  # checks them
    except StoreError as error:
        faults.append(str(error))
    for epoch in epochs:
        try:
            blocks = progress(
                reader.faults(epoch), num_blocks(len(reader)), f"epoch {epoch}", "blocks"
            )
            faults += filter(None, blocks)
        except StoreError as error:
            faults.append(str(error))
    for fault in faults:
        print(fault)
    print(
        f"{args.store}: {counted(len(epochs), 'sealed epoch')} ({ranges(epochs)}), unfinished:"
        f" {ranges(_unfinished(args.store))}: {counted(len(faults), 'fault')}"
    )
    return 1 if faults else 0


def estimate(args: argparse.Namespace) -> int:
    if min(args.images, args.topk, args.classes, args.epochs) < 1 or args.topk > args.classes:
        raise StoreError(
            f"top-{args.topk} of {args.classes} classes, {args.images} images, {args.epochs}"
            " epochs: give numbers from 1 up, K at most C"
        )
    record = record_dtype(args.topk, args.classes).itemsize
    size = epoch_bytes(args.images, args.topk, args.classes)
    print(
        f"{counted(args.images, 'image')}, top-{args.topk} of {args.classes:,} classes: {record}"
        " bytes a record"
    )
    rows = {
        "an epoch": size,
        counted(args.epochs, "epoch"): size * args.epochs,
        "most while writing": disk_need(args.images, args.topk, args.classes, args.epochs),
    }
    for name, total in rows.items():
        print(f"  {name + ':':<19} {total:>20,} bytes ({size_text(total)})")
    if args.original:
        total = args.images * (4 + 4 * args.topk + NAME_BYTES) * args.epochs
        print(
            f"  the original's:     {total:>20,} bytes ({size_text(total)}), with keys of"
            f" {NAME_BYTES} bytes as text in every epoch"
        )
    return 0


def convert(args: argparse.Namespace) -> int:
    from configs import load_config  # here, since nothing else in this program needs torch
    from data.augment.decoder import AugmentDecoder, fill_color
    from data.build import open_run
    from data.identity import excess_of, identity_of, proof_of

    words = ["--cfg", args.cfg]
    if args.data_path:
        words += ["--data-path", args.data_path]
    words += ["--opts", *args.opts, "DISTILL.TEACHER_LOGITS_PATH", str(args.source)]
    cfg = load_config(words)
    images = None
    if args.keys:
        keys = Keys.read(args.keys)
        if cfg.MODEL.NUM_CLASSES < 1:
            raise StoreError(
                "without the data set nothing tells the number of classes: give --opts"
                " MODEL.NUM_CLASSES C"
            )
    else:
        data = open_run(cfg)
        cfg = data.cfg
        images = data.images
        keys = images.get_keys()
    source = UpstreamStoreReader(
        args.source,
        keys,
        num_classes=cfg.MODEL.NUM_CLASSES,
        order=cfg.DISTILL.UPSTREAM_ORDER,
        cache=cfg.DATA.INDEX_DIR or None,
    )
    epochs = source.epochs()
    source.check_epochs(epochs)
    own = {"DISTILL.LOGITS_TOPK": source.k, "DATA.SEED": 0, "AUG.FILL": list(fill_color(cfg))}
    cfg = cfg.replace(own)
    decoder = AugmentDecoder.from_config(cfg)
    if images is None:
        proof = {"canary": decoder.canary(), "images": {"positions": [], "sha256": []}}
    else:
        proof = proof_of(cfg, images, decoder)
    identity = identity_of(cfg, len(keys), keys.digest())
    manifest = {
        "identity": {**identity, "excess": excess_of(cfg, "subtract")},
        "teacher": {"name": args.teacher, "weights_sha256": "unknown", "dtype": "unknown"},
        "proof": proof,
        "info": {"converted_from": str(args.source)},
    }
    with (
        LogitsStoreWriter(args.target, manifest, keys) as writer,
        tqdm(total=len(keys) * len(epochs), unit=" images", disable=None) as bar,
    ):
        writer.check_disk(epochs)
        for epoch in epochs:
            if redundant := source.redundant_ranks(epoch):
                print(
                    f"epoch {epoch}: nothing is taken from ranks {ranges(redundant)}, all their"
                    " keys stand in lower ranks' files"
                )
            if writer.is_sealed(epoch):
                continue
            records = source.open_epoch(epoch)
            writer.begin_epoch(epoch)
            for low in range(0, len(keys), BATCH_RECORDS):
                positions = np.arange(low, min(low + BATCH_RECORDS, len(keys)))
                writer.append(positions, records[positions])
                bar.update(len(positions))
            writer.seal(epoch)
    made = f"{counted(len(epochs), 'epoch')} ({ranges(epochs)}) of {counted(len(keys), 'image')}"
    print(f"{args.target}: {made}")
    return 0


def merge(args: argparse.Namespace) -> int:
    readers = [LogitsStoreReader(source) for source in args.sources]
    for reader in readers:
        # makes the target, with the first one's manifest as it is, or checks that it is the same
        manifest = json.loads((reader.root / "manifest.json").read_bytes())
        writer = LogitsStoreWriter(args.target, manifest, reader.keys)
    target = LogitsStoreReader(args.target)
    origin = dict.fromkeys(target.epochs(), target)
    for reader in readers:
        for epoch in reader.epochs():
            first = origin.setdefault(epoch, reader)
            if first.seal(epoch)["sha256"] != reader.seal(epoch)["sha256"]:
                raise StoreError(
                    f"epoch {epoch} of {first.root} and of {reader.root} hold other records (saved"
                    " on machines that compute differently): choose one by moving the other's"
                    f" {data_path(Path(), epoch)} and {seal_path(Path(), epoch)} away"
                )
    copied = [epoch for epoch, reader in sorted(origin.items()) if reader is not target]
    writer.check_disk(copied)
    with _bar(target, copied) as bar:
        for epoch in copied:
            _copy_epoch(origin[epoch], target, epoch, bar.update)
    print(
        f"{args.target}: {counted(len(copied), 'epoch')} copied ({ranges(copied)}), sealed now:"
        f" {ranges(target.epochs())}"
    )
    return 0


def card(args: argparse.Namespace) -> int:
    manifest = LogitsStoreReader(args.store).manifest  # which info tells of, in this layout
    told = io.StringIO()
    with redirect_stdout(told):
        info(args)
    text = CARD.format(
        teacher=manifest["teacher"].get("name", "a teacher"),
        info=told.getvalue().replace(str(args.store), "the store"),
    )
    write_atomic(args.store / "README.md", text.encode())
    print(f"{args.store / 'README.md'}: written")
    return 0


def fetch(args: argparse.Namespace) -> int:
    fetched = fetch_store(args.source, args.target, args.epochs, partial(progress, unit="MB"))
    sealed = ranges(LogitsStoreReader(args.target).epochs())
    arrived = f"{counted(len(fetched), 'epoch')} fetched ({ranges(fetched)})"
    print(f"{args.target}: {arrived}, sealed now: {sealed}")
    return 0


def histogram(args: argparse.Namespace) -> int:
    reader = LogitsStoreReader(args.store)
    epochs = reader.epochs()
    if args.epoch is None and not epochs:
        raise StoreError(f"{args.store}: has no sealed epoch: run save_logits.py first")
    epoch = epochs[0] if args.epoch is None else args.epoch
    records = reader.open_epoch(epoch)
    probs = np.asarray(records[:: -(-len(records) // SAMPLED_RECORDS)]["prob"], np.float64)
    images = f"{len(probs):,} of {len(records):,} images"
    title = (
        f"{args.store.resolve().name}, epoch {epoch}: {images}, top-{reader.k} of"
        f" {reader.num_classes:,} classes"
    )
    _draw(probs, reader, title, args.output)
    print(f"{args.output}: written")
    return 0


def entropy(probs: np.ndarray, num_classes: int) -> np.ndarray:
    """Bits of each distribution [n] that probabilities [n, K] stand for.

    The rest of each is spread evenly over the other classes.
    """
    others = num_classes - probs.shape[1]
    share = np.clip(1 - probs.sum(axis=1), 0, None) / max(others, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = others * np.nan_to_num(share * np.log2(share))
        return -np.nansum(probs * np.log2(probs), axis=1) - rest


def _draw(probs: np.ndarray, reader: LogitsStoreReader, title: str, output: Path) -> None:
    """Three panels from probabilities [n, K]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    confidence_axes, entropy_axes, mass_axes = figure.subplots(1, 3)
    _histogram(confidence_axes, probs[:, 0], 1.0, "teacher's top-1 probability", "C0")
    bits = entropy(probs, reader.num_classes)
    highest = max(bits.max(), 1e-3)
    _histogram(entropy_axes, bits, highest, "entropy of the stored distribution (bits)", "C1")
    kept = probs.cumsum(axis=1)
    for column in sorted({1, 2, 5, 10, 20, 50, 100, reader.k} & set(range(1, reader.k + 1))):
        mass = np.sort(np.clip(1 - kept[:, column - 1], 0, None))
        percent = np.linspace(0, 100, len(mass))
        mass_axes.plot(percent, mass, label=f"top-{column}: mean {mass.mean():.4f}")
    mass_axes.set(
        xlabel="images, sorted (%)",
        ylabel="probability mass outside the top K",
        yscale="log",
        ylim=(1e-4, 1.0),
        xlim=(0, 100),
    )
    mass_axes.grid(alpha=0.3)
    mass_axes.legend()
    figure.savefig(output, dpi=110)


def _histogram(axes, values: np.ndarray, highest: float, label: str, color: str) -> None:
    percent = np.full(len(values), 100 / len(values))
    axes.hist(values, np.linspace(0, highest, 51), weights=percent, color=color, alpha=0.75)
    for name, value, style in (("mean", values.mean(), "-"), ("median", np.median(values), "--")):
        text = f"{name} {value:.3f}"
        axes.axvline(value, color="black", linestyle=style, linewidth=1, label=text)
    axes.set(xlabel=label, ylabel="images per bin (%)", xlim=(0, highest))
    axes.grid(alpha=0.3)
    axes.legend()


def _copy_epoch(
    source: LogitsStoreReader,
    target: LogitsStoreReader,
    epoch: int,
    progress: Callable[[int], None],
) -> None:
    """Copy a sealed epoch; what arrived is read back and checked before it gets its name."""
    seal = source.seal(epoch)
    source.open_epoch(epoch)  # which also judges the seal
    with sole_user(lock_path(target.root, epoch), "wait for it or stop it"):
        path = data_path(target.root, epoch)
        with open(data_path(source.root, epoch), "rb") as reading, atomic_file(path) as writing:
            while chunk := reading.read(COPIED_BYTES):
                writing.write(chunk)
                progress(len(chunk))
            writing.flush()
            digests = list(block_digests(np.load(writing.name, mmap_mode="r")))
            if digests != seal["sha256"]:
                damaged = next(filter(None, source.faults(epoch)), f"{path}: the copy is damaged")
                raise StoreError(f"{damaged}; nothing of it was copied")
        # as the target's manifest may have been written in an earlier version's terms
        seal["identity_sha256"] = target.identity_sha256
        write_atomic(seal_path(target.root, epoch), encoded(seal))


def _bar(reader: LogitsStoreReader, epochs: list[int]) -> tqdm:
    total = epoch_bytes(len(reader), reader.k, reader.num_classes) * len(epochs)
    return tqdm(total=total, unit="B", unit_scale=True, disable=None)


def _unfinished(root: Path) -> list[int]:
    """The epochs that have parts."""
    return sorted(int(path.stem.removeprefix("epoch_")) for path in root.glob("epoch_*.parts"))


def _print_unfinished(reader: LogitsStoreReader, epoch: int) -> None:
    identity = bytes.fromhex(reader.identity_sha256)
    parts = part_files(parts_path(reader.root, epoch))
    is_there = np.zeros(len(reader), bool)
    for path in parts:
        for block in read_blocks(path, epoch, reader.dtype, identity, len(reader)):
            is_there[block.positions] = True
    holder = lock_holder(lock_path(reader.root, epoch))
    at_work = f", {holder} holds its lock" if holder else ""
    print(
        f"  unfinished epoch {epoch}: {is_there.mean():.1%} of the images in"
        f" {counted(len(parts), 'part')}{at_work}"
    )


def _info_original(root: Path) -> int:
    reader = UpstreamStoreReader(root, [])
    print(
        f"{root}: the original's layout, top-{reader.k}, {reader.dtype.itemsize} bytes a record; no"
        " manifest, no checksums"
    )
    for epoch in reader.epochs():
        folder = root / f"logits_top{reader.k}_epoch{epoch}"
        sizes = [
            path.stat().st_size // reader.dtype.itemsize
            for path in sorted(folder.glob("rank*-values.bin"))
        ]
        redundant = reader.redundant_ranks(epoch)
        left_over = (
            f"; every key of ranks {ranges(redundant)} stands in lower ranks too: left by an"
            " earlier run?"
            if redundant
            else ""
        )
        print(
            f"  epoch {epoch}: {sum(sizes):,} records of {counted(len(sizes), 'rank')}{left_over}"
        )
    return 0


def _print_tree(tree: dict[str, Any], indent: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            print(f"{indent}{key}: {rounded(str(value))}")


if __name__ == "__main__":
    sys.exit(main())
