"""Logits stores from outside: what one holds, whether it is whole, how large it will be, and
converting and merging them.
"""

import argparse
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.store.files import FileLock
from data.store.format import (
    data_path,
    identity_digest,
    lock_path,
    parts_path,
    ranges,
    seal_path,
    size_text,
)
from data.store.keys import Keys
from data.store.original import UpstreamStoreReader
from data.store.parts import part_files, read_blocks
from data.store.reader import (
    LogitsStoreReader,
    LogitsStoreWriter,
    StoreError,
    disk_need,
    epoch_bytes,
    record_dtype,
)

BATCH_RECORDS = 1 << 14
SAMPLED_RECORDS = 100_000
NAME_BYTES = 16  # of an original's key and its end of line: n00007846_10001


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 = done, 1 = damage was found, 2 = the request or its files are at fault."""
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

    add = command(
        "info", info, "what a store is: sizes, recipe, teacher and its accuracy per epoch"
    )
    add("store", type=Path, help="folder of the store, in our layout or the original's")

    add = command(
        "verify",
        verify,
        "read a store in full and check it against its checksums; exit code 1 on damage",
    )
    add("store", type=Path, help="folder of the store")
    add("--epochs", type=int, metavar="E", help="also require the epochs 0 to E - 1")

    add = command("estimate", estimate, "the disk space that a store will take")
    add("--images", type=int, required=True, metavar="N", help="images of the data set")
    add("--topk", type=int, required=True, metavar="K", help="probabilities kept per image")
    add("--classes", type=int, required=True, metavar="C", help="classes of the teacher")
    add("--epochs", type=int, required=True, metavar="E", help="epochs to save")
    add("--original", action="store_true", help="also tell what the original's layout takes")

    add = command("convert", convert, "turn a store in the original's layout into one of ours")
    add("source", type=Path, help="folder that holds logits_top*_epoch*")
    add("target", type=Path, help="folder of the new store")
    add(
        "--cfg",
        required=True,
        metavar="FILE",
        help="the teacher's recipe, which the source was saved with (its mean is the fill colour)",
    )
    add(
        "--opts",
        nargs="*",
        default=[],
        metavar="KEY VALUE",
        help="set any configuration key, e.g. DISTILL.UPSTREAM_ORDER tar",
    )
    add(
        "--data-path",
        metavar="PATH",
        help="the data set, which tells the keys and is sampled for the proof",
    )
    add(
        "--keys",
        type=Path,
        metavar="FILE",
        help="the keys, one a line in the order of the data set, instead of the data set itself",
    )
    add("--teacher", default="unknown", metavar="NAME", help="name of the teacher for the manifest")

    add = command(
        "merge",
        merge,
        "gather the epochs of stores of one identity, e.g. written on several machines",
    )
    add("target", type=Path, help="folder to merge into; made if it is not there")
    add("sources", type=Path, nargs="+", help="stores to copy from")

    add = command(
        "histogram",
        histogram,
        "draw confidence, entropy and the mass outside the top K, to choose K",
    )
    add("store", type=Path, help="folder of the store")
    add("--epoch", type=int, metavar="E", help="epoch to look at; default: the first sealed one")
    add(
        "--output",
        type=Path,
        default=Path("logits.png"),
        metavar="PNG",
        help="picture to write (default: %(default)s)",
    )
    return top


def info(args: argparse.Namespace) -> int:
    if not (args.store / "manifest.json").exists() and any(args.store.glob("logits_top*_epoch*")):
        return _info_original(args.store)
    reader = LogitsStoreReader(args.store)
    identity, teacher, epochs = (
        reader.manifest["identity"],
        reader.manifest["teacher"],
        reader.epochs(),
    )
    size = epoch_bytes(len(reader), reader.k, reader.num_classes)
    print(
        f"{args.store}: format {reader.manifest['format']}, top-{reader.k} of"
        f" {reader.num_classes:,} classes, {len(reader):,} images"
    )
    print(
        f"  {reader.dtype.itemsize} bytes a record, {size_text(size)} an epoch,"
        f" {size_text(size * len(epochs))} in sealed epochs"
    )
    print(f"  keys: {reader.keys[0]} ... {reader.keys[-1]} (sha256 {reader.keys_digest[:16]})")
    for name, section in (
        ("identity", identity),
        ("teacher", teacher),
        ("written with", reader.manifest["info"]),
    ):
        print(f"  {name}:")
        _print_tree(
            {
                key: section[key]
                for key in section
                if key not in ("k", "num_classes", "num_images", "keys_sha256")
            },
            "    ",
        )
    print(f"  sealed epochs: {ranges(epochs)}")
    for epoch in epochs:
        accuracy = reader.seal(epoch)["teacher"]
        if accuracy:
            print(
                f"    epoch {epoch}: teacher "
                + ", ".join(f"{name} {value}" for name, value in accuracy.items())
            )
    for folder in sorted(args.store.glob("epoch_*.parts")):
        _print_unfinished(reader, int(folder.stem.removeprefix("epoch_")))
    return 0


def verify(args: argparse.Namespace) -> int:
    reader = LogitsStoreReader(args.store)
    epochs = reader.epochs()
    faults = (
        [f"{args.store}: epochs {ranges(lacking)} are missing"]
        if (lacking := set(range(args.epochs or 0)) - set(epochs))
        else []
    )
    with tqdm(
        total=epoch_bytes(len(reader), reader.k, reader.num_classes) * len(epochs),
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        for epoch in [None, *epochs]:
            try:
                if epoch is None:
                    reader.check_keys()
                else:
                    faults += reader.damaged_blocks(epoch, bar.update)
            except StoreError as error:
                faults.append(str(error))
    for fault in faults:
        print(fault)
    unfinished = [
        int(folder.stem.removeprefix("epoch_")) for folder in args.store.glob("epoch_*.parts")
    ]
    print(
        f"{args.store}: {len(epochs)} sealed epochs ({ranges(epochs)}), unfinished:"
        f" {ranges(unfinished)}: {len(faults)} faults"
    )
    return 1 if faults else 0


def estimate(args: argparse.Namespace) -> int:
    if min(args.images, args.topk, args.classes, args.epochs) < 1 or args.topk > args.classes:
        raise StoreError(
            f"top-{args.topk} of {args.classes} classes, {args.images} images, {args.epochs}"
            " epochs: give numbers from 1 up, K at most C"
        )
    record, size = (
        record_dtype(args.topk, args.classes).itemsize,
        epoch_bytes(args.images, args.topk, args.classes),
    )
    need = disk_need(args.images, args.topk, args.classes, args.epochs)
    print(
        f"{args.images:,} images, top-{args.topk} of {args.classes:,} classes: {record} bytes a"
        " record"
    )
    print(f"  an epoch:           {size:>20,} bytes ({size_text(size)})")
    print(
        f"  {f'{args.epochs} epochs:':<19} {size * args.epochs:>20,} bytes"
        f" ({size_text(size * args.epochs)})"
    )
    print(f"  most while writing: {need:>20,} bytes ({size_text(need)})")
    if args.original:
        record = 4 + 4 * args.topk
        total = args.images * (record + NAME_BYTES) * args.epochs
        print(
            f"  the original's:     {total:>20,} bytes ({size_text(total)}), with keys of"
            f" {NAME_BYTES} bytes as text in every epoch"
        )
    return 0


def convert(args: argparse.Namespace) -> int:
    from configs import load_config  # here, since nothing else in this program needs torch
    from data.augment.decoder import AugmentDecoder, fill_color
    from data.build import resolve
    from data.identity import excess_of, identity_of, proof_of
    from data.images.datasets import build_dataset

    data = ["--data-path", args.data_path] if args.data_path else []
    cfg = load_config(
        [
            "--cfg",
            args.cfg,
            *data,
            "--opts",
            *args.opts,
            "DISTILL.TEACHER_LOGITS_PATH",
            str(args.source),
        ]
    )
    dataset = None
    if args.keys:
        keys: Keys = Keys.read(args.keys)
        if cfg.MODEL.NUM_CLASSES < 1:
            raise StoreError(
                "without the data set nothing tells the number of classes: give --opts"
                " MODEL.NUM_CLASSES C"
            )
    else:
        cfg = resolve(cfg)
        dataset = build_dataset(cfg, "train")
        keys = Keys.of(dataset.get_keys())
    source = UpstreamStoreReader(
        args.source,
        keys,
        num_classes=cfg.MODEL.NUM_CLASSES,
        order=cfg.DISTILL.UPSTREAM_ORDER,
        cache=cfg.DATA.INDEX_DIR or None,
    )
    epochs = source.epochs()
    source.check_epochs(epochs)
    cfg = cfg.replace(
        {"DISTILL.LOGITS_TOPK": source.k, "DATA.SEED": 0, "AUG.FILL": list(fill_color(cfg))}
    )
    decoder = AugmentDecoder.from_config(cfg)
    no_images = {"positions": [], "sha256": []}
    manifest = {
        "identity": {
            **identity_of(cfg, len(keys), keys.digest()),
            "excess": excess_of(cfg, "subtract"),
        },
        "teacher": {"name": args.teacher, "weights_sha256": "unknown", "dtype": "unknown"},
        "proof": (
            proof_of(cfg, dataset, decoder)
            if dataset is not None
            else {"canary": decoder.canary(), "images": no_images}
        ),
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
    print(f"{args.target}: {len(epochs)} epochs of {len(keys):,} images (epochs {ranges(epochs)})")
    return 0


def merge(args: argparse.Namespace) -> int:
    readers = [LogitsStoreReader(source) for source in args.sources]
    for reader in readers:
        # makes the target, or checks that it is the same store
        writer = LogitsStoreWriter(args.target, reader.manifest, reader.keys)
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
    size = epoch_bytes(len(target), target.k, target.num_classes)
    writer.check_disk(copied)
    with tqdm(total=size * len(copied), unit="B", unit_scale=True, disable=None) as bar:
        for epoch in copied:
            _copy_epoch(origin[epoch], args.target, epoch, bar.update)
    print(
        f"{args.target}: {len(copied)} epochs copied ({ranges(copied)}), sealed now:"
        f" {ranges(target.epochs())}"
    )
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
    """Bits of each distribution [n] that probabilities [n, K] stand for, the rest being spread
    evenly over the other classes.
    """
    others = num_classes - probs.shape[1]
    share = np.clip(1 - probs.sum(axis=1), 0, None) / max(others, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.nansum(probs * np.log2(probs), axis=1) - others * np.nan_to_num(
            share * np.log2(share)
        )


def _draw(probs: np.ndarray, reader: LogitsStoreReader, title: str, output: Path) -> None:
    """Three panels from probabilities [n, K]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept, bits = probs.cumsum(axis=1), entropy(probs, reader.num_classes)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    confidence_axes, entropy_axes, mass_axes = figure.subplots(1, 3)
    _histogram(
        confidence_axes, probs[:, 0], np.linspace(0, 1, 51), "teacher's top-1 probability", "C0"
    )
    _histogram(
        entropy_axes,
        bits,
        np.linspace(0, max(bits.max(), 1e-3), 51),
        "entropy of the stored distribution (bits)",
        "C1",
    )
    for column in sorted({1, 2, 5, 10, 20, 50, 100, reader.k} & set(range(1, reader.k + 1))):
        mass = np.sort(np.clip(1 - kept[:, column - 1], 0, None))
        mass_axes.plot(
            np.linspace(0, 100, len(mass)), mass, label=f"top-{column}: mean {mass.mean():.4f}"
        )
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


def _histogram(axes, values: np.ndarray, bins: np.ndarray, label: str, color: str) -> None:
    axes.hist(
        values, bins, weights=np.full(len(values), 100 / len(values)), color=color, alpha=0.75
    )
    for name, value, style in (("mean", values.mean(), "-"), ("median", np.median(values), "--")):
        axes.axvline(
            value, color="black", linestyle=style, linewidth=1, label=f"{name} {value:.3f}"
        )
    axes.set(xlabel=label, ylabel="images per bin (%)", xlim=(bins[0], bins[-1]))
    axes.grid(alpha=0.3)
    axes.legend()


def _copy_epoch(
    source: LogitsStoreReader, target: Path, epoch: int, progress: Callable[[int], None]
) -> None:
    lock = FileLock(lock_path(target, epoch))
    lock.acquire()
    temporary = data_path(target, epoch).with_name(
        f"{data_path(target, epoch).name}.tmp-{secrets.token_hex(4)}"
    )
    try:
        if damaged := list(source.damaged_blocks(epoch, progress)):
            raise StoreError(f"{damaged[0]}; nothing of it was copied")
        shutil.copyfile(data_path(source.root, epoch), temporary)
        temporary.replace(data_path(target, epoch))
        shutil.copyfile(seal_path(source.root, epoch), temporary)
        temporary.replace(seal_path(target, epoch))
    finally:
        temporary.unlink(missing_ok=True)
        lock.release()


def _print_unfinished(reader: LogitsStoreReader, epoch: int) -> None:
    identity = bytes.fromhex(identity_digest(reader.manifest))
    parts = part_files(parts_path(reader.root, epoch))
    is_there = np.zeros(len(reader), bool)
    for path in parts:
        for block in read_blocks(path, epoch, reader.dtype, identity, len(reader)):
            is_there[block.positions] = True
    holder = FileLock(lock_path(reader.root, epoch)).holder()
    at_work = f", process {holder.pid} on {holder.host} holds its lock" if holder else ""
    print(
        f"  unfinished epoch {epoch}: {is_there.mean():.1%} of the images in {len(parts)}"
        f" parts{at_work}"
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
        print(f"  epoch {epoch}: {sum(sizes):,} records of {len(sizes)} ranks{left_over}")
    return 0


def _print_tree(tree: dict, indent: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value}")


if __name__ == "__main__":
    sys.exit(main())
