"""The data sets of DATA.DATASET: each finds the images of a split and opens one of them.

A new one is a subclass of ListedImages that opens an image, a function that builds it, and a line
in DATASETS.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.images import layout, shapes
from data.images.archives import read_zip_member
from data.images.listing import (
    Listing,
    Scan,
    cached_listing,
    exclude,
    named_if_refused,
    stamp,
    subset,
)
from data.images.reading import CorruptImage, read_rgb, warn
from data.images.scans import ClassLists, class_folders, scan_folder, scan_tar, scan_zips
from data.images.shards import ParquetRows, ShardBytes, scan_parquet, scan_shards, shard_files
from data.store.files import FileBytes
from data.store.keys import Keys, check_unique, load_array, save_array

DEBUG_CLASSES = "n00007846"
NEIGHBOURS = 5000  # looked at for one that can be read: more than any class of ImageNet-22k has


class ListedImages:
    """A map-style data set of (RGB image, label) over a listing; subclasses open the images."""

    def __init__(self, cfg, listing: Listing) -> None:
        self.listing = listing
        self.max_pixels = cfg.DATA.MAX_PIXELS
        self.on_corrupt = cfg.DATA.ON_CORRUPT
        self._warned_in = 0  # the process

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        position = self.listing.position(range(len(self))[index])
        try:
            return self._sample(position)
        except CorruptImage as error:
            if self.on_corrupt == "error":
                raise CorruptImage(
                    f"{error}; or leave it out (DATA.EXCLUDE), or set DATA.ON_CORRUPT neighbour"
                ) from error
            return self._neighbour(position, error)

    def open_image(self, position: int) -> Image.Image:
        """The RGB image at a position of the listing.

        One that can't be decoded is a CorruptImage.
        """
        raise NotImplementedError

    def get_keys(self) -> Keys:
        """The stable names of all images."""
        return self.listing.keys

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each has images; 0 without labels."""
        return len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by label."""
        return self.listing.class_names

    def classes_present(self) -> list[str]:
        """The names of the classes that have images, as far as the listing knows labels."""
        labels, names = self.listing.labels, self.class_names
        counts = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
        return [name for name, count in zip(names, counts) if count]

    def _sample(self, position: int) -> tuple[Image.Image, int]:
        return self.open_image(position), self.listing.label(position)

    def _neighbour(self, position: int, error: CorruptImage) -> tuple[Image.Image, int]:
        """The next image that can be read, and its label.

        It is looked for among all images, selected or not: so a run on a part of the data finds the
        one that the store's writer found.
        """
        total = self.listing.total
        tried = min(total - 1, NEIGHBOURS)
        for step in range(1, tried + 1):
            other = (position + step) % total
            try:
                sample = self._sample(other)
            except CorruptImage:
                continue
            if self._warned_in != os.getpid():
                self._warned_in = os.getpid()
                warn(
                    f"{error}; {self.listing.key(other)} takes its place (DATA.ON_CORRUPT"
                    " neighbour; said once per process)"
                )
            return sample
        raise CorruptImage(
            f"{error}; nor can the {tried:,} images after it, which would take its place"
        )


def build_dataset(cfg, split: str) -> ListedImages:
    """The images of a split, "train" or "val".

    DATA.EXCLUDE, DATA.HELD_OUT and DATA.SUBSET apply to the training images alone, in this order;
    what is held out becomes the split "val".
    """
    name, held_out = cfg.DATA.DATASET, cfg.DATA.HELD_OUT
    source = "train" if held_out else split
    dataset = _build_users(cfg, source) if ":" in name else DATASETS[name](cfg, source)
    if source == "train":
        kept = exclude(dataset.listing, cfg.DATA.EXCLUDE)
        kept = subset(kept, 1 - held_out, rest=split == "val")
        dataset.listing = kept if split == "val" else subset(kept, cfg.DATA.SUBSET)
    return dataset


def _listed(cfg, source: dict, scan: Callable[[], Scan]) -> Listing:
    return cached_listing(source, scan, cfg.DATA.INDEX_DIR, cfg.DATA.REINDEX)


class FolderImages(ListedImages):
    """Files below a folder; a key is the path from there."""

    def __init__(self, cfg, listing: Listing, root: Path) -> None:
        super().__init__(cfg, listing)
        self.root = str(root)

    def open_image(self, position: int) -> Image.Image:
        return read_rgb(f"{self.root}/{self.listing.key(position)}", self.max_pixels)


class TarImages(ListedImages):
    """Members of one uncompressed tar file; a key is the path from the folder of classes."""

    def __init__(self, cfg, listing: Listing, path: Path) -> None:
        super().__init__(cfg, listing)
        self.tar = FileBytes(path)

    def open_image(self, position: int) -> Image.Image:
        data = self.tar.read(*self.listing.span(position))
        return read_rgb(data, self.max_pixels, f"{self.tar.path}: {self.listing.key(position)}")


def _build_class_folders(cfg, split: str) -> ListedImages:
    path = layout.find_split(cfg, split)
    class_lists = _given_class_lists(cfg)
    if split == "val" and not class_lists:
        class_lists = _classes_of_training(cfg)
    if split == "val" and class_lists and layout.is_22k(class_lists[0]):
        class_lists.append(layout.class_list("imagenet1k"))
    return _in_folders(cfg, path, class_lists)


def _build_unlabelled(cfg, split: str) -> ListedImages:
    if split == "val":
        return _in_folders(cfg, layout.find_split(cfg, split), _given_class_lists(cfg) or None)
    root = layout.data_path(cfg)
    path = layout.first_existing(root / "train", root / "train.tar") or root
    return _in_folders(cfg, path, None)


def _in_folders(cfg, path: Path, class_lists: ClassLists | None) -> ListedImages:
    """Images in class folders below `path`, a folder or a tar file; None: without classes."""
    kind = TarImages if path.is_file() else FolderImages
    return kind(cfg, _listing_of(cfg, path, class_lists), path)


def _listing_of(cfg, path: Path, class_lists: ClassLists | None) -> Listing:
    scan = scan_tar if path.is_file() else scan_folder
    source = {"kind": "folders", "path": str(path.resolve()), "class_lists": class_lists}
    return _listed(cfg, source, lambda: scan(path, class_lists))


def _given_class_lists(cfg) -> list[Sequence[str]]:
    return [layout.class_list(cfg.DATA.CLASS_LIST)] if cfg.DATA.CLASS_LIST else []


def _classes_of_training(cfg) -> list[Sequence[str]]:
    """The classes of the training images, if there are such: validation images keep their ids."""
    path = layout.training_path(cfg)
    if path is None:
        return []
    if path.is_dir():
        return [class_folders(path)]
    return [_listing_of(cfg, path, []).class_names]


class ZipImages(ListedImages):
    """ImageNet-22k: one zip file per class, a list of names beside them; a key is a name."""

    def __init__(self, cfg, listing: Listing, root: Path) -> None:
        super().__init__(cfg, listing)
        self.root = root
        self.name_format = cfg.DATA.FNAME_FORMAT

    def open_image(self, position: int) -> Image.Image:
        key = self.listing.key(position)
        path = self.root / f"{key.partition('_')[0]}.zip"
        member = self.name_format.format(key)
        data = read_zip_member(path, member, self.listing.span(position))
        return read_rgb(data, self.max_pixels, f"{path}: {member}")


def _build_imagenet22k(cfg, split: str) -> ListedImages:
    if split == "val":
        return _in_folders(cfg, layout.val_of_22k(cfg), _class_lists_for_val_of_22k(cfg))
    root = layout.data_path(cfg)
    names = root / layout.NAME_LIST
    if not names.is_file():
        raise ValueError(
            f"{names}: no such file: imagenet22k needs this list of image names (one a line, like"
            f" n00007846_10001) beside its zip files{layout.looks_like(root, 'imagenet22k')};"
            " correct --data-path"
        )
    class_lists = _given_class_lists(cfg)
    name_format = cfg.DATA.FNAME_FORMAT
    only = DEBUG_CLASSES if cfg.DATA.DEBUG else ""
    source = {
        "kind": "22k",
        "names": str(names.resolve()),
        "class_lists": class_lists,
        "name_format": name_format,
        "only": only,
    }
    listing = _listed(cfg, source, lambda: scan_zips(names, class_lists, name_format, only))
    if only:
        listing = listing.select("debug", lambda: _rows_of_debug(names, listing))
    return ZipImages(cfg, listing, root)


def _class_lists_for_val_of_22k(cfg) -> list[Sequence[str]]:
    """ImageNet-1k's, to which a model of all 22k classes is mapped; else the training images'."""
    class_lists = _given_class_lists(cfg)
    names = Path(cfg.DATA.DATA_PATH, layout.NAME_LIST)
    if not class_lists and cfg.DATA.DATA_PATH and names.is_file():
        class_lists = [_build_imagenet22k(cfg, "train").class_names]
    if not class_lists or layout.is_22k(class_lists[0]):
        class_lists.insert(0, layout.class_list("imagenet1k"))
    return class_lists


def _rows_of_debug(names: Path, whole: Listing) -> np.ndarray:
    wanted = [i for i, name in enumerate(whole.class_names) if name.startswith(DEBUG_CLASSES)]
    rows = np.flatnonzero(np.isin(whole.labels, wanted))
    if not len(rows):
        raise ValueError(
            f"{names}: has no images of the classes {DEBUG_CLASSES}*, which alone DATA.DEBUG uses:"
            " set DATA.DEBUG False"
        )
    return rows


class ShardImages(ListedImages):
    """Images in many files, webdataset's tars or parquet; a key is that of class folders."""

    def __init__(self, cfg, listing: Listing, source: ShardBytes | ParquetRows) -> None:
        super().__init__(cfg, listing)
        self.source = source

    def open_image(self, position: int) -> Image.Image:
        data = self.source.read(*self.listing.span(position))
        return read_rgb(data, self.max_pixels, self.listing.key(position))


def _build_shards(cfg, split: str) -> ListedImages:
    has_own_path = split == "val" and cfg.DATA.VAL_PATH
    root = Path(cfg.DATA.VAL_PATH) if has_own_path else layout.data_path(cfg)
    are_tars = cfg.DATA.DATASET == "webdataset"
    files = shard_files(root, split, ".tar" if are_tars else ".parquet")
    class_lists = _given_class_lists(cfg)
    class_names = class_lists[0] if class_lists else []
    key_column = cfg.DATA.KEY_COLUMN
    source = {
        "kind": cfg.DATA.DATASET,
        "files": [str(path.resolve()) for path in files],
        "class_lists": class_lists,
        "key_column": key_column,
    }
    if are_tars:
        listing = _listed(cfg, source, lambda: scan_shards(root, files, class_names))
        return ShardImages(cfg, listing, ShardBytes(files))
    listing = _listed(cfg, source, lambda: scan_parquet(root, files, class_names, key_column))
    return ShardImages(cfg, listing, ParquetRows(files))


class ArrayImages(ListedImages):
    """Images that lie decoded in one array file [N, H, W, 3]; a key ends with the row."""

    def __init__(self, cfg, listing: Listing, path: Path) -> None:
        super().__init__(cfg, listing)
        self.path = path
        self._array = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None}

    def open_image(self, position: int) -> Image.Image:
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        return Image.fromarray(np.array(self._array[_number_in(self.listing.key(position))]))


def _build_cifar(cfg, split: str) -> ListedImages:
    if split == "val" and cfg.DATA.VAL_PATH:
        return _build_class_folders(cfg, split)
    root = layout.data_path(cfg)
    if root.is_file() or layout.has_splits(root):
        return _build_class_folders(cfg, split)
    source = {"kind": cfg.DATA.DATASET, "root": str(root.resolve()), "split": split}
    listing = _listed(cfg, source, lambda: _scan_cifar(cfg, root, split))
    array = listing.folder / "images.npy"
    if load_array(array) is None:  # decoded once, so that all processes map one copy
        with named_if_refused(listing.folder):
            save_array(array, _cifar(cfg, root, split).data)
    return ArrayImages(cfg, listing, array)


def _cifar(cfg, root: Path, split: str):
    from torchvision import datasets

    kind = datasets.CIFAR10 if cfg.DATA.DATASET == "cifar10" else datasets.CIFAR100
    root = root.parent if root.name == kind.base_folder else root
    try:
        return kind(str(root), train=split == "train", download=cfg.DATA.DOWNLOAD)
    except (RuntimeError, OSError) as error:
        download = "" if cfg.DATA.DOWNLOAD else ", or set DATA.DOWNLOAD True to fetch it"
        raise ValueError(
            f"{root}: {cfg.DATA.DATASET} is not there, or damaged ({error})"
            f"{layout.looks_like(root, cfg.DATA.DATASET)}: give its folder with"
            f" --data-path{download}"
        ) from None


def _scan_cifar(cfg, root: Path, split: str) -> Scan:
    images = _cifar(cfg, root, split)
    labels = np.array(images.targets)
    order = np.argsort(labels, kind="stable")
    keys = [f"{images.classes[labels[i]]}/{i:05d}" for i in order]
    folder = Path(images.root, images.base_folder)
    watched = [stamp(folder / name) for name, _ in (*images.train_list, *images.test_list)]
    return Scan(keys, labels[order], list(images.classes), watched=watched)


class DrawnImages(ListedImages):
    """The built-in shapes; a key ends with the number within the class."""

    def __init__(self, cfg, listing: Listing, split: str) -> None:
        super().__init__(cfg, listing)
        self.split = split
        self.size = cfg.DATA.SHAPES.SIZE

    def open_image(self, position: int) -> Image.Image:
        number = _number_in(self.listing.key(position))
        return shapes.draw(self.split, self.listing.label(position), number, self.size)


def _build_shapes(cfg, split: str) -> ListedImages:
    count = cfg.DATA.SHAPES.TRAIN_IMAGES if split == "train" else cfg.DATA.SHAPES.VAL_IMAGES
    listing = _listed(cfg, {"kind": "shapes", "count": count}, lambda: _scan_shapes(count))
    return DrawnImages(cfg, listing, split)


def _scan_shapes(count: int) -> Scan:
    names = shapes.CLASS_NAMES
    labels = np.sort(np.arange(count) % len(names))
    numbers = np.arange(count) - np.searchsorted(labels, labels)  # within the class
    keys = [f"{names[label]}/{number:06d}" for label, number in zip(labels, numbers)]
    return Scan(keys, labels, list(names))


def _number_in(key: str) -> int:
    return int(key.rpartition("/")[2])


class UserImages(ListedImages):
    """A data set of the user's; its keys are its get_keys(), else its positions as decimal text."""

    def __init__(self, cfg, listing: Listing, dataset: Any, num_classes: int) -> None:
        super().__init__(cfg, listing)
        self.dataset = dataset
        self._num_classes = num_classes

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def _sample(self, position: int) -> tuple[Image.Image, int]:
        sample = self.dataset[position]
        is_pair = isinstance(sample, tuple) and len(sample) == 2
        if not (is_pair and isinstance(sample[0], Image.Image)):
            raise ValueError(
                f"item {position} of the data set {type(self.dataset).__name__} is no pair (PIL"
                " image, label): leave transforms and tensors to the augmentation"
            )
        image, label = sample
        return image.convert("RGB"), -1 if label is None else int(label)


def _build_users(cfg, split: str) -> ListedImages:
    option = f"DATA.DATASET = {cfg.DATA.DATASET}"
    dataset = _users_dataset(cfg, split, option)
    count = len(dataset)
    if not count:
        raise ValueError(f"{option}: the data set for {split} is empty")
    names = list(getattr(dataset, "class_names", None) or getattr(dataset, "classes", None) or [])
    keys = Keys.of(dataset.get_keys() if hasattr(dataset, "get_keys") else map(str, range(count)))
    labels = np.array(getattr(dataset, "targets", [-1] * count), np.int32)
    if not len(keys) == len(labels) == count:
        raise ValueError(
            f"{option}: a data set of {count} images with {len(keys)} keys and {len(labels)}"
            " targets: give one for each image, or neither"
        )
    if cfg.DATA.SUBSET != 1 and split == "train" and (labels < 0).any():
        raise ValueError(
            f"DATA.SUBSET needs the class of each image: give the data set of {cfg.DATA.DATASET} a"
            " list `targets`"
        )
    check_unique(keys)
    source = {
        "kind": "user",
        "keys": keys.digest(),
        "labels": hashlib.sha256(labels).hexdigest(),
        "names": names,
    }
    listing = _listed(cfg, source, lambda: Scan(keys, labels, names))
    given = int(getattr(dataset, "num_classes", 0)) or len(names)
    num_classes = given or int(labels.max()) + 1 or cfg.MODEL.NUM_CLASSES
    return UserImages(cfg, listing, dataset, num_classes)


def _users_dataset(cfg, split: str, option: str) -> Any:
    """The data set that a user's `package.module:function` returns.

    What goes wrong inside is the user's to see as it is.
    """
    module_name, _, function_name = cfg.DATA.DATASET.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"{option}: there is no module {error.name} (its folder must be on PYTHONPATH)"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{option}: {module.__file__} has no function {function_name!r}")
    parameters = inspect.signature(function).parameters
    required = [item for item in parameters.values() if item.default is item.empty]
    takes_split = "split" in parameters or len(required) > 1
    dataset = function(cfg, split) if takes_split else function(cfg)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{option}: gave a {type(dataset).__name__}, not a data set with a length and [i] ->"
            " (PIL image, label)"
        )
    return dataset


DATASETS: dict[str, Callable[[Any, str], ListedImages]] = {
    "imagenet": _build_class_folders,
    "imagenet22k": _build_imagenet22k,
    "cifar10": _build_cifar,
    "cifar100": _build_cifar,
    "folder": _build_unlabelled,
    "parquet": _build_shards,
    "webdataset": _build_shards,
    "shapes": _build_shapes,
}
