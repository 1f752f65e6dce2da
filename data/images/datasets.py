"""The data sets: where the images of a split lie, and how one is fetched -> (RGB image, label)."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.images import layout, shapes
from data.images.archives import TarBytes, ZipFolder
from data.images.listing import (
    Listing,
    Scan,
    cached_listing,
    exclude,
    named_if_refused,
    stamp,
    subset,
)
from data.images.reading import IMAGE_SUFFIXES, CorruptImage, read_rgb, warn
from data.images.scans import Numberings, scan_class_folders, scan_folder, scan_names, scan_tar
from data.store.keys import Keys, check_unique, save_array

__all__ = ["IMAGE_SUFFIXES", "CorruptImage", "ListedImages", "build_dataset", "read_rgb"]

DEBUG_CLASSES = "n00007846"
NEIGHBOURS = 5000  # looked at for one that can be read: more than any class of ImageNet-22k has
SHOWN = 5


class ListedImages:
    """A map-style data set of (RGB image, label) over a listing; subclasses know how to fetch an
    image.
    """

    def __init__(self, listing: Listing, max_pixels: int, on_corrupt: str = "error") -> None:
        self.listing, self.max_pixels, self.on_corrupt = listing, max_pixels, on_corrupt
        self._warned_in = 0

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        index = range(len(self))[index]
        try:
            return self.fetch(self.listing, index), self.listing.label(index)
        except CorruptImage as error:
            if self.on_corrupt == "error":
                raise
            return self._neighbour(self.listing.whole, self.listing.position(index), error)

    def fetch(self, listing: Listing, index: int) -> Image.Image:
        """Open one image of the listing, or of the whole one it was selected from; one that can't
        be decoded is a CorruptImage.
        """
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

    def _neighbour(
        self, whole: Listing, position: int, error: CorruptImage
    ) -> tuple[Image.Image, int]:
        """The next image that can be read, and its label.

        It is looked for among all images, selected or not: so a run on a part of the data finds the
        one that the store's writer found."""
        tried = min(len(whole) - 1, NEIGHBOURS)
        for step in range(1, tried + 1):
            other = (position + step) % len(whole)
            try:
                sample = self.fetch(whole, other), whole.label(other)
            except CorruptImage:
                continue
            if self._warned_in != os.getpid():
                self._warned_in = os.getpid()
                warn(
                    f"{error}; {whole.key(other)} takes its place (DATA.ON_CORRUPT neighbour; said"
                    " once per process)"
                )
            return sample
        raise CorruptImage(
            f"{error}; nor can the {tried:,} images after it, which would take its place"
        )


class FolderImages(ListedImages):
    """Files below a folder; a key is the path from there."""

    def __init__(self, root: Path, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.root = str(root)

    def fetch(self, listing: Listing, index: int) -> Image.Image:
        return read_rgb(f"{self.root}/{listing.key(index)}", self.max_pixels)


class TarImages(ListedImages):
    """Members of one uncompressed tar file."""

    def __init__(self, path: Path, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.tar = TarBytes(path)

    def fetch(self, listing: Listing, index: int) -> Image.Image:
        return read_rgb(
            self.tar.read(*listing.place(index)),
            self.max_pixels,
            f"{self.tar.path}: {listing.key(index)}",
        )


class ZipImages(ListedImages):
    """ImageNet-22k: one zip file per class, a list of names beside them; a key is a name."""

    def __init__(self, root: Path, listing: Listing, name_format: str, **options: Any) -> None:
        super().__init__(listing, **options)
        self.zips, self.name_format = ZipFolder(root), name_format

    def fetch(self, listing: Listing, index: int) -> Image.Image:
        key = listing.key(index)
        archive, member = f"{key.partition('_')[0]}.zip", self.name_format.format(key)
        return read_rgb(
            self.zips.read(archive, member),
            self.max_pixels,
            f"{self.zips.folder / archive}: {member}",
        )


class ArrayImages(ListedImages):
    """Images that lie decoded in one array file [N, H, W, 3]; a place's offset is the row."""

    def __init__(self, path: Path, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.path, self._array = path, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_array": None}

    def fetch(self, listing: Listing, index: int) -> Image.Image:
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        return Image.fromarray(np.array(self._array[listing.place(index)[0]]))


class DrawnImages(ListedImages):
    """The built-in shapes: a place is (number within the class, pixels a side)."""

    def __init__(self, split: str, listing: Listing, **options: Any) -> None:
        super().__init__(listing, **options)
        self.split = split

    def fetch(self, listing: Listing, index: int) -> Image.Image:
        number, size = listing.place(index)
        return shapes.draw(self.split, listing.label(index), number, size)


class UserImages(ListedImages):
    """A data set of the user's; its keys are what its get_keys() returns, else its positions in
    decimal text.
    """

    def __init__(self, dataset: Any, listing: Listing, num_classes: int, **options: Any) -> None:
        super().__init__(listing, **options)
        self.dataset, self._num_classes = dataset, num_classes

    @property
    def num_classes(self) -> int:
        return self._num_classes

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        position = self.listing.position(range(len(self))[index])
        sample = self.dataset[position]
        if not (
            isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Image.Image)
        ):
            raise ValueError(
                f"item {position} of the data set {type(self.dataset).__name__} is no pair (PIL"
                " image, label): leave transforms and tensors to the augmentation"
            )
        image, label = sample
        return (image if image.mode == "RGB" else image.convert("RGB")), (
            -1 if label is None else int(label)
        )


def build_dataset(cfg, split: str) -> ListedImages:
    """The images of a split, "train" or "val"; DATA.EXCLUDE and DATA.SUBSET apply to training
    alone, in this order.
    """
    name = cfg.DATA.DATASET
    build = _build_users if ":" in name else _BUILDERS[name]
    dataset = build(
        cfg, split, {"max_pixels": cfg.DATA.MAX_PIXELS, "on_corrupt": cfg.DATA.ON_CORRUPT}
    )
    if split == "train":
        dataset.listing = subset(exclude(dataset.listing, cfg.DATA.EXCLUDE), cfg.DATA.SUBSET)
    return dataset


def _build_class_folders(cfg, split: str, options: dict) -> ListedImages:
    place = layout.find_split(cfg, split)
    if cfg.DATA.CLASS_LIST:
        numberings = [layout.class_list(cfg.DATA.CLASS_LIST)]
    else:
        numberings = [] if split == "train" else _numbering_of_training(cfg)
    if split == "val" and numberings and layout.is_22k(numberings[0]):
        numberings.append(layout.class_list("imagenet1k"))
    return _in_class_folders(cfg, place, numberings, options)


def _build_imagenet22k(cfg, split: str, options: dict) -> ListedImages:
    if split == "val":
        return _in_class_folders(
            cfg, layout.val_of_22k(cfg), _val_numberings_of_22k(cfg, options), options
        )
    root = layout.data_path(cfg)
    names = root / layout.NAME_LIST
    if not names.is_file():
        raise ValueError(
            f"{names}: no such file: imagenet22k needs this list of image names (one a line, like"
            " n00007846_10001) beside its zip files; correct --data-path"
        )
    numberings = [layout.class_list(cfg.DATA.CLASS_LIST)] if cfg.DATA.CLASS_LIST else []
    source = {
        "kind": "22k",
        "names": str(names.resolve()),
        "numberings": numberings,
        "debug": cfg.DATA.DEBUG,
    }
    listing = _listed(
        cfg, source, lambda: _scan_22k(names, numberings, check_zips=not cfg.DATA.DEBUG)
    )
    if cfg.DATA.DEBUG:
        listing = listing.select("debug", partial(_rows_of_debug, names, listing))
    return ZipImages(root, listing, cfg.DATA.FNAME_FORMAT, **options)


def _build_cifar(cfg, split: str, options: dict) -> ListedImages:
    if split == "val" and cfg.DATA.VAL_PATH:
        return _build_class_folders(cfg, split, options)
    root = layout.data_path(cfg)
    if root.is_file() or layout.has_splits(root):
        return _build_class_folders(cfg, split, options)
    source = {"kind": cfg.DATA.DATASET, "root": str(root.resolve()), "split": split}
    listing = _listed(cfg, source, lambda: _scan_cifar(cfg, root, split))
    array = listing.folder / "images.npy"
    if not array.is_file():  # decoded once, so that all processes map one copy
        with named_if_refused(listing.folder):
            save_array(array, _cifar(cfg, root, split).data)
    return ArrayImages(array, listing, **options)


def _build_unlabelled(cfg, split: str, options: dict) -> ListedImages:
    if split == "val":
        place = layout.find_split(cfg, split)
        if cfg.DATA.CLASS_LIST:
            return _in_class_folders(cfg, place, [layout.class_list(cfg.DATA.CLASS_LIST)], options)
    else:
        root = layout.data_path(cfg)
        place = layout.first_existing(root / "train", root / "train.tar") or root
    is_tar = place.is_file()
    scan = (lambda: scan_tar(place, None)) if is_tar else (lambda: scan_folder(place))
    listing = _listed(cfg, {"kind": "folder", "place": str(place.resolve())}, scan)
    return (TarImages if is_tar else FolderImages)(place, listing, **options)


def _build_shapes(cfg, split: str, options: dict) -> ListedImages:
    count = cfg.DATA.SHAPES.TRAIN_IMAGES if split == "train" else cfg.DATA.SHAPES.VAL_IMAGES
    source = {"kind": "shapes", "split": split, "count": count, "size": cfg.DATA.SHAPES.SIZE}
    return DrawnImages(
        split, _listed(cfg, source, lambda: _scan_shapes(count, cfg.DATA.SHAPES.SIZE)), **options
    )


def _build_users(cfg, split: str, options: dict) -> ListedImages:
    dataset = _call(cfg.DATA.DATASET, cfg, split)
    names = list(getattr(dataset, "class_names", None) or getattr(dataset, "classes", None) or [])
    if not len(dataset):
        raise ValueError(f"DATA.DATASET = {cfg.DATA.DATASET}: the data set for {split} is empty")
    keys = Keys.of(
        dataset.get_keys()
        if hasattr(dataset, "get_keys")
        else [str(i) for i in range(len(dataset))]
    )
    labels = np.array(getattr(dataset, "targets", [-1] * len(keys)), np.int32)
    if not len(keys) == len(labels) == len(dataset):
        raise ValueError(
            f"DATA.DATASET = {cfg.DATA.DATASET}: a data set of {len(dataset)} images with"
            f" {len(keys)} keys and {len(labels)} targets: give one for each image, or neither"
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
    num_classes = (
        int(getattr(dataset, "num_classes", 0))
        or len(names)
        or int(labels.max()) + 1
        or cfg.MODEL.NUM_CLASSES
    )
    return UserImages(dataset, listing, num_classes, **options)


_BUILDERS: dict[str, Callable[[Any, str, dict], ListedImages]] = {
    "imagenet": _build_class_folders,
    "imagenet22k": _build_imagenet22k,
    "cifar10": _build_cifar,
    "cifar100": _build_cifar,
    "folder": _build_unlabelled,
    "shapes": _build_shapes,
}


def _listed(cfg, source: dict, scan: Callable[[], Scan]) -> Listing:
    return cached_listing(source, scan, cfg.DATA.INDEX_DIR, cfg.DATA.REINDEX)


def _in_class_folders(cfg, place: Path, numberings: Numberings, options: dict) -> ListedImages:
    """Images in class folders below `place`, a folder or a tar file."""
    return (TarImages if place.is_file() else FolderImages)(
        place, _list_of_classes(cfg, place, numberings), **options
    )


def _list_of_classes(cfg, place: Path, numberings: Numberings) -> Listing:
    scan = scan_tar if place.is_file() else scan_class_folders
    return _listed(
        cfg,
        {"kind": "classes", "place": str(place.resolve()), "numberings": numberings},
        lambda: scan(place, numberings),
    )


def _numbering_of_training(cfg) -> list[Sequence[str]]:
    """The classes of the training images, so that validation images keep their ids; none if there
    are no training images.
    """
    place = layout.training_place(cfg)
    if place is None:
        return []
    return [
        (
            layout.class_folders(place)
            if place.is_dir()
            else _list_of_classes(cfg, place, []).class_names
        )
    ]


def _val_numberings_of_22k(cfg, options: dict) -> list[Sequence[str]]:
    """ImageNet-1k's, to which a model of all 22k classes is mapped; else the training images' own."""
    if cfg.DATA.CLASS_LIST:
        trained: Sequence[str] = layout.class_list(cfg.DATA.CLASS_LIST)
    elif cfg.DATA.DATA_PATH and Path(cfg.DATA.DATA_PATH, layout.NAME_LIST).is_file():
        trained = _build_imagenet22k(cfg, "train", options).class_names
    else:
        return [layout.class_list("imagenet1k")]
    return [layout.class_list("imagenet1k"), trained] if layout.is_22k(trained) else [trained]


def _scan_22k(names: Path, numberings: Numberings, check_zips: bool) -> Scan:
    found = scan_names(names, numberings)
    if check_zips:
        present = set(os.listdir(names.parent))
        missing = [
            name
            for i in np.unique(found.labels)
            if f"{(name := found.class_names[i])}.zip" not in present
        ]
        if missing:
            raise ValueError(
                f"{names}: {len(missing)} of its classes have no zip file beside it (first:"
                f" {', '.join(missing[:SHOWN])}): restore the files, or take their names out of the"
                " list"
            )
    return found


def _rows_of_debug(names: Path, whole: Listing) -> np.ndarray:
    wanted = [i for i, name in enumerate(whole.class_names) if name.startswith(DEBUG_CLASSES)]
    rows = np.flatnonzero(np.isin(whole.labels, wanted))
    if not len(rows):
        raise ValueError(
            f"{names}: has no images of the classes {DEBUG_CLASSES}*, which alone DATA.DEBUG uses:"
            " set DATA.DEBUG False"
        )
    return rows


def _cifar(cfg, root: Path, split: str):
    from torchvision import datasets

    kind = datasets.CIFAR10 if cfg.DATA.DATASET == "cifar10" else datasets.CIFAR100
    root = root.parent if root.name == kind.base_folder else root
    try:
        return kind(str(root), train=split == "train", download=cfg.DATA.DOWNLOAD)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{root}: {cfg.DATA.DATASET} is not there, or damaged ({error}): give its folder with"
            " --data-path"
            + ("" if cfg.DATA.DOWNLOAD else ", or set DATA.DOWNLOAD True to fetch it")
        ) from None


def _scan_cifar(cfg, root: Path, split: str) -> Scan:
    images = _cifar(cfg, root, split)
    labels = np.array(images.targets)
    order = np.argsort(labels, kind="stable")
    keys = [f"{images.classes[labels[i]]}/{i:05d}" for i in order]
    folder = Path(images.root, images.base_folder)
    watched = [stamp(folder / name) for name, _ in (*images.train_list, *images.test_list)]
    return Scan(
        keys,
        labels[order],
        list(images.classes),
        np.stack([order, np.zeros_like(order)], 1),
        watched,
    )


def _scan_shapes(count: int, size: int) -> Scan:
    kinds = len(shapes.CLASS_NAMES)
    per_class = [count // kinds + (label < count % kinds) for label in range(kinds)]
    keys = [
        f"{shapes.CLASS_NAMES[label]}/{number:06d}"
        for label in range(kinds)
        for number in range(per_class[label])
    ]
    places = np.array(
        [(number, size) for label in range(kinds) for number in range(per_class[label])]
    )
    return Scan(keys, np.repeat(np.arange(kinds), per_class), list(shapes.CLASS_NAMES), places)


def _call(name: str, cfg, split: str) -> Any:
    """The data set that a user's `package.module:function` returns; what goes wrong inside is the
    user's to see as it is.
    """
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"DATA.DATASET = {name}: there is no module {error.name} (its folder must be on"
            " PYTHONPATH)"
        ) from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"DATA.DATASET = {name}: {module.__file__} has no function {function!r}")
    required = [
        item for item in inspect.signature(found).parameters.values() if item.default is item.empty
    ]
    dataset = (
        found(cfg, split)
        if len(required) > 1 or "split" in inspect.signature(found).parameters
        else found(cfg)
    )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"DATA.DATASET = {name}: gave a {type(dataset).__name__}, not a data set "
            "with a length and [i] -> (PIL image, label)"
        )
    return dataset
