"""Where the images of a split lie, and the lists of class names that labels may follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from data.images.listing import read_names
from data.images.reading import IMAGE_SUFFIXES

NAME_LIST = "in22k_image_names.txt"
# DATA.CLASS_LIST -> timm's name
CLASS_SETS = {"imagenet1k": "imagenet-1k", "imagenet22k": "imagenet-22k"}
NUM_CLASSES_22K = 21841
SIGNS = {  # what lies in a folder of each DATA.DATASET
    "imagenet": ["train", "train.tar"],
    "imagenet22k": [NAME_LIST],
    "cifar10": ["cifar-10-batches-py"],
    "cifar100": ["cifar-100-python"],
    "parquet": ["*.parquet", "data/*.parquet"],
    "webdataset": ["*.tar"],
}


def data_path(cfg) -> Path:
    """DATA.DATA_PATH, which exists unless it is to be made by a download."""
    if not cfg.DATA.DATA_PATH:
        raise ValueError(
            f"DATA.DATA_PATH is empty: say where {cfg.DATA.DATASET} lies with --data-path (or try"
            " --cfg configs/shapes/student.yaml, which needs no files)"
        )
    path = Path(cfg.DATA.DATA_PATH)
    is_cifar = cfg.DATA.DATASET.startswith("cifar")
    if not path.exists() and not (cfg.DATA.DOWNLOAD and is_cifar):
        download = ", or set DATA.DOWNLOAD True to fetch it" if is_cifar else ""
        raise ValueError(
            f"DATA.DATA_PATH = {path}: no such file or folder; correct --data-path{download}"
        )
    return path


def find_split(cfg, split: str) -> Path:
    """The folder or tar file of a split."""
    if split == "val" and cfg.DATA.VAL_PATH:
        root = Path(cfg.DATA.VAL_PATH)
        path = first_existing(root / "val", root / "val.tar", root)
        if path is None:
            raise ValueError(f"DATA.VAL_PATH = {root}: no such file or folder; correct it")
        return path
    root = data_path(cfg)
    if root.is_file():
        if split == "val" and not cfg.EVAL_MODE:
            raise ValueError(
                f"DATA.DATA_PATH = {root}: one file can't hold training and validation images:"
                " name the latter in DATA.VAL_PATH, or hold some out with DATA.HELD_OUT 0.2"
            )
        return root
    path = first_existing(root / split, root / f"{split}.tar")
    if path is None:
        packed = sorted(path.name for path in root.glob(f"{split}.t*z*") if path.is_file())
        hint = f"; unpack {packed[0]}, from which single images can't be read" if packed else ""
        folders = sum(entry.is_dir() for entry in root.iterdir())
        if root.name in ("train", "val"):
            hint = "; give the folder around it"
        elif folders and not packed and not has_splits(root) and cfg.DATA.DATASET != "folder":
            hint = (
                f"; if its {folders} folders are classes, move them into {root / 'train'} and"
                " validate on some of it with DATA.HELD_OUT 0.2, as docs/RECIPES.md does"
            )
        hint = hint or looks_like(root, cfg.DATA.DATASET)
        other = ", or set DATA.VAL_PATH" if split == "val" else ""
        if other and cfg.DATA.DATASET != "folder" and training_path(cfg):
            other += ", or hold some images of training out with DATA.HELD_OUT 0.2"
        raise ValueError(
            f"{root}: has neither {split}/ nor {split}.tar{hint}: correct --data-path{other}"
        )
    return path


def looks_like(root: Path, wanted: str) -> str:
    """The DATA.DATASET that a folder where nothing was found for another is of, in words."""
    for kind, signs in SIGNS.items():
        if kind != wanted and any(next(root.glob(sign), None) for sign in signs):
            return f"; what lies there looks like DATA.DATASET {kind}"
    suffixes = {path.suffix.lower() for path in root.glob("*")}
    if wanted != "folder" and suffixes & {*IMAGE_SUFFIXES}:
        return "; for images without labels set DATA.DATASET folder"
    return ""


def training_path(cfg) -> Path | None:
    """The folder or tar file of the training images, if there is one."""
    root = Path(cfg.DATA.DATA_PATH)
    if not cfg.DATA.DATA_PATH or (root.is_file() and cfg.EVAL_MODE and not cfg.DATA.VAL_PATH):
        return None
    return root if root.is_file() else first_existing(root / "train", root / "train.tar")


def val_of_22k(cfg) -> Path:
    """The images on which ImageNet-22k is validated: DATA.VAL_PATH, or ImageNet's beside it."""
    if cfg.DATA.VAL_PATH:
        return find_split(cfg, "val")
    beside = data_path(cfg).absolute().parent / "ImageNet"
    path = first_existing(beside / "val", beside / "val.tar")
    if path is None:
        raise ValueError(
            f"{beside}: has neither val/ nor val.tar, on which imagenet22k is validated: set"
            " DATA.VAL_PATH"
        )
    return path


def first_existing(*paths: Path) -> Path | None:
    """The first of the paths where there is a file or folder."""
    return next((path for path in paths if path.exists()), None)


def has_splits(root: Path) -> bool:
    """Whether a folder holds images in the layout of ImageNet."""
    return any(
        (root / split).is_dir() or (root / f"{split}.tar").is_file() for split in ("train", "val")
    )


def class_list(name: str) -> list[str]:
    """The class names of DATA.CLASS_LIST, by id."""
    if name in CLASS_SETS:
        return list(_imagenet_names(CLASS_SETS[name]))
    if not Path(name).is_file():
        raise ValueError(
            f"DATA.CLASS_LIST = {name}: neither {' nor '.join(CLASS_SETS)}, and no file"
        )
    names = [line.strip() for line in read_names(name, "DATA.CLASS_LIST") if line.strip()]
    twice = next((repeated for repeated, count in Counter(names).items() if count > 1), None)
    if twice or not names:
        found = f"{twice} stands twice" if twice else "it is empty"
        raise ValueError(
            f"DATA.CLASS_LIST = {name}: {found}: expected class names, one a line, each once"
        )
    return names


@cache
def _imagenet_names(subset: str) -> tuple[str, ...]:
    from timm.data import ImageNetInfo  # holds the lists; slow to import

    return tuple(ImageNetInfo(subset).label_names())


def is_22k(names: Sequence[str]) -> bool:
    """Whether these are the class names of all of ImageNet-22k."""
    return len(names) == NUM_CLASSES_22K and list(names) == class_list("imagenet22k")
