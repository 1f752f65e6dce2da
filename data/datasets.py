"""The data sets: where images lie, how they are listed, and how one is opened -> (RGB image, label)."""

from __future__ import annotations

import importlib
import inspect
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from data import shapes
from data.images import IMAGE_SUFFIXES, CorruptImage, TarBytes, ZipFolder, read_rgb, warn
from data.listing import Listing, Scan, cached_listing, exclude, reported, stamp, subset
from data.store_keys import Keys

__all__ = ["IMAGE_SUFFIXES", "CorruptImage", "ListedImages", "build_dataset", "read_rgb"]

CLASS_SETS = {"imagenet1k": "imagenet-1k", "imagenet22k": "imagenet-22k"}  # DATA.CLASS_LIST -> timm's name
SYNSET_LIST = "in22k_image_names.txt"
DEBUG_CLASSES = "n00007846"
SHOWN = 5


class ListedImages:
    """A map-style data set of (RGB image, label) over a listing; subclasses know how to fetch image `index`."""

    def __init__(self, listing: Listing, max_pixels: int, on_corrupt: str = "error") -> None:
        self.listing, self.max_pixels, self.on_corrupt = listing, max_pixels, on_corrupt
        self._warned = False

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return self.open(index), int(self.listing.labels[index])
        except CorruptImage as error:
            if self.on_corrupt == "error":
                raise
            return self._neighbour(index, error)

    def open(self, index: int) -> Image.Image:
        """Decode one image; one that can't be is a CorruptImage."""
        raise AssertionError("a subclass fetches images")

    def get_keys(self) -> Keys:
        """The stable names of all images."""
        return self.listing.keys

    @property
    def num_classes(self) -> int:
        """Number of classes of the labels' numbering; 0 without labels."""
        return self.listing.num_classes

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by label."""
        return self.listing.class_names

    def _neighbour(self, index: int, error: CorruptImage) -> tuple[Image.Image, int]:
        """The next image that can be read, and its label: the same in every process, epoch and run."""
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            try:
                sample = self.open(other), int(self.listing.labels[other])
            except CorruptImage:
                continue
            if not self._warned:
                self._warned = True
                warn(f"{error}; {self.listing.key(other)} takes its place (DATA.ON_CORRUPT neighbour; said once per process)")
            return sample
        raise error


class FolderImages(ListedImages):
    """Files below a folder; a key is the path from there."""

    def __init__(self, root: Path, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.root = root

    def open(self, index: int) -> Image.Image:
        return read_rgb(self.root / self.listing.key(index), self.max_pixels)


class TarImages(ListedImages):
    """Members of one uncompressed tar file."""

    def __init__(self, path: Path, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.tar = TarBytes(path)

    def open(self, index: int) -> Image.Image:
        name = f"{self.tar.path}: {self.listing.key(index)}"
        return read_rgb(self.tar.read(*self.listing.place(index)), self.max_pixels, name)


class ZipImages(ListedImages):
    """ImageNet-22k: one zip file per class, a list of names beside them; a key is a name."""

    def __init__(self, root: Path, listing: Listing, name_format: str, **options: Any) -> None:
        super().__init__(listing, **options)
        self.zips, self.name_format = ZipFolder(root), name_format

    def open(self, index: int) -> Image.Image:
        key = self.listing.key(index)
        archive, member = f"{key.partition('_')[0]}.zip", self.name_format.format(key)
        return read_rgb(self.zips.read(archive, member), self.max_pixels, f"{self.zips.folder / archive}: {member}")


class ArrayImages(ListedImages):
    """Images that lie decoded in one array file [N, H, W, 3]; a place's offset is the row."""

    def __init__(self, path: Path, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.path, self._array = path, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None}

    def open(self, index: int) -> Image.Image:
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        return Image.fromarray(np.array(self._array[self.listing.place(index)[0]]))


class DrawnImages(ListedImages):
    """The built-in shapes: a place is (number within the class, pixels a side)."""

    def __init__(self, split: str, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.split = split

    def open(self, index: int) -> Image.Image:
        number, size = self.listing.place(index)
        return shapes.draw(self.split, int(self.listing.labels[index]), number, size)


class UserImages:
    """A data set of the user's, with what it does not offer filled in: keys are positions, class names are unknown."""

    def __init__(self, dataset: Any, num_classes: int) -> None:
        self.dataset = dataset
        self.num_classes = int(getattr(dataset, "num_classes", 0) or num_classes)
        self.class_names: list[str] = list(getattr(dataset, "class_names", None) or [])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return (image if image.mode == "RGB" else image.convert("RGB")), int(label)

    def get_keys(self) -> Sequence[str]:
        """The data set's own keys, or its positions as text."""
        return self.dataset.get_keys() if hasattr(self.dataset, "get_keys") else [str(i) for i in range(len(self))]


def build_dataset(cfg, split: str) -> ListedImages | UserImages:
    """The images of a split, "train" or "val"; DATA.SUBSET and DATA.EXCLUDE apply to training alone."""
    name = cfg.DATA.DATASET
    if ":" in name:
        if split == "train" and (cfg.DATA.SUBSET != 1 or cfg.DATA.EXCLUDE):
            raise ValueError(f"DATA.SUBSET and DATA.EXCLUDE work on listed data sets; let {name} leave images out itself")
        return UserImages(_call(name, cfg, split), cfg.MODEL.NUM_CLASSES)
    dataset = _BUILDERS[name](cfg, split, {"max_pixels": cfg.DATA.MAX_PIXELS, "on_corrupt": cfg.DATA.ON_CORRUPT})
    if split == "train":
        dataset.listing = exclude(subset(dataset.listing, cfg.DATA.SUBSET), cfg.DATA.EXCLUDE)
    return dataset


def _build_class_folders(cfg, split: str, options: dict) -> ListedImages:
    place = _find_split(cfg, split)
    numbering = _class_list(cfg.DATA.CLASS_LIST) if cfg.DATA.CLASS_LIST else None
    if numbering is None and split == "val":
        numbering = _numbering_of_training(cfg, place)
    return _labelled(cfg, place, numbering, options)


def _build_imagenet22k(cfg, split: str, options: dict) -> ListedImages:
    root = _data_path(cfg)
    if split == "val":
        return _labelled(cfg, _val_of_22k(cfg, root), _class_list("imagenet1k"), options)
    names = root / SYNSET_LIST
    source = {"kind": "22k", "names": str(names.resolve()), "debug": cfg.DATA.DEBUG, "classes": _list_identity(cfg)}
    listing = cached_listing(source, lambda: _scan_22k(names, cfg), cfg.DATA.INDEX_DIR, cfg.DATA.REINDEX)
    return ZipImages(root, listing, cfg.DATA.FNAME_FORMAT, **options)


def _build_cifar(cfg, split: str, options: dict) -> ListedImages:
    root = _data_path(cfg)
    folders = next((path for path in (root, root / cfg.DATA.DATASET) if (path / split).is_dir()), None)
    if folders is not None:
        return _labelled(cfg, folders / split, None, options)
    source = {"kind": cfg.DATA.DATASET, "root": str(root.resolve()), "split": split}
    listing = cached_listing(source, lambda: _scan_cifar(cfg, root, split), cfg.DATA.INDEX_DIR, cfg.DATA.REINDEX)
    return ArrayImages(_cifar_array(cfg, root, split, listing), listing, **options)


def _build_unlabelled(cfg, split: str, options: dict) -> ListedImages:
    root = Path(cfg.DATA.VAL_PATH) if split == "val" and cfg.DATA.VAL_PATH else _data_path(cfg)
    root = root / split if (root / split).is_dir() else root
    listing = cached_listing({"kind": "folder", "root": str(root.resolve())}, lambda: _scan_unlabelled(root), cfg.DATA.INDEX_DIR,
                             cfg.DATA.REINDEX)
    return FolderImages(root, listing, **options)


def _build_shapes(cfg, split: str, options: dict) -> ListedImages:
    count = cfg.DATA.SHAPES.TRAIN_IMAGES if split == "train" else cfg.DATA.SHAPES.VAL_IMAGES
    source = {"kind": "shapes", "split": split, "count": count, "size": cfg.DATA.SHAPES.SIZE}
    listing = cached_listing(source, lambda: _scan_shapes(count, cfg.DATA.SHAPES.SIZE), cfg.DATA.INDEX_DIR, cfg.DATA.REINDEX)
    return DrawnImages(split, listing, **options)


_BUILDERS: dict[str, Callable[[Any, str, dict], ListedImages]] = {
    "imagenet": _build_class_folders,
    "imagenet22k": _build_imagenet22k,
    "cifar10": _build_cifar,
    "cifar100": _build_cifar,
    "folder": _build_unlabelled,
    "shapes": _build_shapes,
}


def _labelled(cfg, place: Path, numbering: list[str] | None, options: dict) -> ListedImages:
    """Images in class folders below `place`, a folder or a tar file; ids are places in `numbering`, else sorted folders."""
    source = {"kind": "classes", "place": str(place.resolve()), "numbering": numbering}
    is_tar = place.is_file()
    scan = _scan_tar if is_tar else _scan_class_folders
    listing = cached_listing(source, lambda: scan(place, numbering), cfg.DATA.INDEX_DIR, cfg.DATA.REINDEX)
    return (TarImages if is_tar else FolderImages)(place, listing, **options)


def _data_path(cfg) -> Path:
    path = Path(cfg.DATA.DATA_PATH)
    if not cfg.DATA.DATA_PATH:
        raise ValueError(f"DATA.DATA_PATH is empty: say where {cfg.DATA.DATASET} lies with --data-path (or try DATA.DATASET shapes, "
                         "which needs no files)")
    if not path.exists():
        raise ValueError(f"DATA.DATA_PATH = {path}: no such file or folder; correct --data-path")
    return path


def _find_split(cfg, split: str) -> Path:
    """The folder or tar file of a split of class folders."""
    if split == "val" and cfg.DATA.VAL_PATH:
        root = Path(cfg.DATA.VAL_PATH)
        if not root.exists():
            raise ValueError(f"DATA.VAL_PATH = {root}: no such file or folder")
        candidates = (root / "val", root / "val.tar", root)
    else:
        root = _data_path(cfg)
        candidates = (root,) if root.is_file() else (root / split, root / f"{split}.tar")
    for place in candidates:
        if place.exists():
            return place
    key = "--data-path" if split == "train" else "DATA.VAL_PATH"
    raise ValueError(f"{root}: has neither {split}/ nor {split}.tar: expected {split}/<class>/*.JPEG there; correct {key}")


def _val_of_22k(cfg, root: Path) -> Path:
    if cfg.DATA.VAL_PATH:
        return _find_split(cfg, "val")
    for place in (root.parent / "ImageNet" / "val", root.parent / "ImageNet" / "val.tar"):
        if place.exists():
            return place
    raise ValueError(f"{root.parent / 'ImageNet'}: has neither val/ nor val.tar, where imagenet22k is validated: set DATA.VAL_PATH")


def _numbering_of_training(cfg, val: Path) -> list[str] | None:
    """The class names of the training images, so that a validation set with fewer classes keeps their ids; None if there are none."""
    if not cfg.DATA.DATA_PATH:
        return None
    root = Path(cfg.DATA.DATA_PATH)
    if (root / "train").is_dir():
        return _class_dirs(root / "train")
    if (root / "train.tar").is_file():
        return _labelled(cfg, root / "train.tar", None, {"max_pixels": 1}).class_names
    return None


def _class_list(name: str) -> list[str]:
    """The class names of a numbering, by id."""
    if name in CLASS_SETS:
        from timm.data import ImageNetInfo  # holds the lists; slow to import

        return ImageNetInfo(CLASS_SETS[name]).label_names()
    try:
        names = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"DATA.CLASS_LIST = {name}: neither {' nor '.join(CLASS_SETS)}, and no file that can be read ({error})") from None
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"DATA.CLASS_LIST = {name}: expected class names, one a line, each once")
    return names


def _list_identity(cfg) -> list[str] | None:
    return _class_list(cfg.DATA.CLASS_LIST) if cfg.DATA.CLASS_LIST else None


def _class_dirs(root: Path) -> list[str]:
    return sorted((entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")), key=os.fsencode)


def _ids(found: Sequence[str], numbering: list[str] | None, place: Path) -> tuple[list[str], dict[str, int]]:
    """The numbering and each found class's id in it."""
    names = list(found) if numbering is None else numbering
    ids = {name: i for i, name in enumerate(names)}
    unknown = [name for name in found if name not in ids]
    if unknown:
        raise ValueError(f"{place}: {len(unknown)} classes have no place in the numbering of {len(names)} classes (first: "
                         f"{', '.join(unknown[:SHOWN])}): set DATA.CLASS_LIST to a list that has them, or move these folders away")
    return names, ids


def _scan_class_folders(root: Path, numbering: list[str] | None) -> Scan:
    watched = [stamp(root)]
    found = _class_dirs(root)
    names, ids = _ids(found, numbering, root)
    keys: list[str] = []
    labels: list[int] = []
    empty = []
    for name in reported(found, f"listing {root}"):
        files = sorted(_image_files(root / name, name, watched), key=os.fsencode)
        keys += files
        labels += [ids[name]] * len(files)
        if not files:
            empty.append(name)
    if not keys:
        raise ValueError(f"{root}: no images: expected {root}/<class>/*.JPEG ({', '.join(IMAGE_SUFFIXES)}); correct the path")
    if empty:
        warn(f"{root}: {len(empty)} class folders hold no images (first: {', '.join(empty[:SHOWN])}); they keep their ids")
    return Scan(keys, np.array(labels), names, watched=watched)


def _scan_unlabelled(root: Path) -> Scan:
    watched: list[list] = []
    keys = sorted(_image_files(root, "", watched), key=os.fsencode)
    if not keys:
        raise ValueError(f"{root}: no images ({', '.join(IMAGE_SUFFIXES)}) in this folder or those below; correct the path")
    return Scan(keys, np.full(len(keys), -1), [], watched=watched)


def _image_files(folder: Path, prefix: str, watched: list[list]) -> Iterator[str]:
    """Paths of the images in a folder and those below, each with `prefix` for the folder."""
    watched.append(stamp(folder))
    for entry in os.scandir(folder):
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir():
            yield from _image_files(Path(entry.path), name, watched)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
            yield name


def _scan_tar(path: Path, numbering: list[str] | None) -> Scan:
    watched, size = [stamp(path)], path.stat().st_size
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in reported(tar, f"listing {path}"):
                _check_member(path, member, size)
                if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                    members.append((str(PurePosixPath(member.name)), member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        with open(path, "rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd"))
        why = "it is compressed, and single images can't be read from it: unpack it to a plain .tar" if packed else f"{error}: restore it"
        raise ValueError(f"{path}: can't be read as a tar: {why}") from None
    members = _without_shared_root(members)
    flat = [name for name, *_ in members if "/" not in name]
    if flat or not members:
        what = f"{flat[0]} lies in no class folder" if flat else "no images in it"
        raise ValueError(f"{path}: {what}: expected <class>/<image> (with at most one folder around all)")
    members.sort(key=lambda member: (os.fsencode(member[0].split("/")[0]), os.fsencode(member[0])))
    found = list(dict.fromkeys(name.split("/")[0] for name, *_ in members))
    names, ids = _ids(found, numbering, path)
    labels = np.array([ids[name.split("/")[0]] for name, *_ in members])
    return Scan([name for name, *_ in members], labels, names, np.array([place for _, *place in members]), watched)


def _check_member(path: Path, member: tarfile.TarInfo, size: int) -> None:
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        raise ValueError(f"{path}: member {member.name!r} points outside of the archive: make the tar again with relative paths")
    if member.isfile() and member.offset_data + member.size > size:
        raise ValueError(f"{path}: the tar is truncated (member {member.name} ends at byte {member.offset_data + member.size:,}, "
                         f"the file at {size:,}): restore it")


def _without_shared_root(members: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Names without a folder that lies around all class folders."""
    parts = [name.split("/") for name, *_ in members]
    if members and len({part[0] for part in parts}) == 1 and all(len(part) > 2 for part in parts):
        return _without_shared_root([("/".join(part[1:]), *place) for part, (_, *place) in zip(parts, members)])
    return members


def _scan_22k(names: Path, cfg) -> Scan:
    if not names.is_file():
        raise ValueError(f"{names}: no such file: imagenet22k needs this list of image names (one n00007846_10001 a line) "
                         "beside the zip files")
    watched = [stamp(names)]
    blob = np.fromfile(names, np.uint8)
    blob = blob[blob != ord("\r")]
    if len(blob) and blob[-1] != ord("\n"):
        blob = np.append(blob, np.uint8(ord("\n")))
    keys = Keys(blob)
    starts = keys.starts()
    kept = keys.ends > starts  # blank lines
    wnid, position = np.unique(_prefixes(keys, starts, kept, names), return_inverse=True)
    found = [name.decode() for name in wnid]
    order = np.flatnonzero(kept)
    if cfg.DATA.DEBUG:
        chosen = np.array([name.startswith(DEBUG_CLASSES) for name in found])
        order, position = order[chosen[position]], position[chosen[position]]
        found = [name for name in found if name.startswith(DEBUG_CLASSES)]
        position -= int(np.argmax(chosen))
    if not len(order):
        raise ValueError(f"{names}: lists no images" + (f" of classes {DEBUG_CLASSES}* (DATA.DEBUG)" if cfg.DATA.DEBUG else ""))
    class_names, ids = _ids(found, _list_identity(cfg), names)
    missing = [name for name in found if not (names.parent / f"{name}.zip").is_file()]
    if missing:
        raise ValueError(f"{names}: {len(missing)} of its classes have no zip file beside it (first: {missing[0]}.zip): "
                         "restore them, or take their names out of the list")
    sort = _byte_order(keys, starts, order)
    return Scan(_lines(keys, starts, order[sort]), np.array([ids[name] for name in found])[position[sort]], class_names, watched=watched)


def _prefixes(keys: Keys, starts: np.ndarray, kept: np.ndarray, names: Path) -> np.ndarray:
    """The WordNet id before the first underscore of each kept line, nine bytes each."""
    places = starts[kept]
    short = keys.ends[kept] - places < 11
    underscore = keys.blob[np.minimum(places + 9, len(keys.blob) - 1)] != ord("_")
    if (short | underscore).any():
        line = int(np.flatnonzero(kept)[np.argmax(short | underscore)])
        raise ValueError(f"{names}: line {line + 1}: {keys[line]!r} is no image name like n00007846_10001")
    return np.ascontiguousarray(keys.blob[places[:, None] + np.arange(9)]).view("S9").ravel()


def _byte_order(keys: Keys, starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The order that sorts lines by their bytes."""
    lengths = keys.ends[rows] - starts[rows]
    padded = np.zeros((len(rows), int(lengths.max())), np.uint8)
    for column in range(padded.shape[1]):
        has = lengths > column
        padded[has, column] = keys.blob[starts[rows[has]] + column]
    return np.argsort(padded.view(f"S{padded.shape[1]}").ravel(), kind="stable")


def _lines(keys: Keys, starts: np.ndarray, rows: np.ndarray) -> Keys:
    lengths = keys.ends[rows] - starts[rows] + 1
    firsts = np.cumsum(lengths) - lengths
    return Keys(keys.blob[np.repeat(starts[rows] - firsts, lengths) + np.arange(lengths.sum())])


def _cifar(cfg, root: Path, split: str):
    from torchvision import datasets

    kind = datasets.CIFAR10 if cfg.DATA.DATASET == "cifar10" else datasets.CIFAR100
    try:
        return kind(str(root), train=split == "train", download=cfg.DATA.DOWNLOAD)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{root}: {cfg.DATA.DATASET} is not there, or damaged ({error}): give its folder with --data-path, or set "
                         "DATA.DOWNLOAD True to fetch it") from None


def _scan_cifar(cfg, root: Path, split: str) -> Scan:
    images = _cifar(cfg, root, split)
    numbers = np.array(images.targets)
    order = np.argsort(numbers, kind="stable")
    keys = [f"{images.classes[numbers[i]]}/{i:05d}" for i in order]
    return Scan(keys, numbers[order], list(images.classes), np.stack([order, np.zeros_like(order)], 1), [stamp(root / images.base_folder)])


def _cifar_array(cfg, root: Path, split: str, listing: Listing) -> Path:
    """The decoded images of torchvision's files, kept beside the listing so that all processes map one copy."""
    path = listing.folder / "images.npy"
    if not path.is_file():
        temporary = listing.folder / f"images.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            np.save(file, _cifar(cfg, root, split).data)
        os.replace(temporary, path)
    return path


def _scan_shapes(count: int, size: int) -> Scan:
    kinds = len(shapes.CLASS_NAMES)
    per_class = [count // kinds + (label < count % kinds) for label in range(kinds)]
    keys = [f"{shapes.CLASS_NAMES[label]}/{number:06d}" for label in range(kinds) for number in range(per_class[label])]
    places = np.array([(number, size) for label in range(kinds) for number in range(per_class[label])])
    return Scan(keys, np.repeat(np.arange(kinds), per_class), list(shapes.CLASS_NAMES), places)


def _call(name: str, cfg, split: str) -> Any:
    """The data set that a user's `package.module:function` returns."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"DATA.DATASET = {name}: {error}; it must be importable from the folder you start in") from None
    return found(cfg, split) if len(inspect.signature(found).parameters) > 1 else found(cfg)
