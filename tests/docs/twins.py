"""Small twins of documented commands: the same program, recipe, flags and --opts in a folder of
stand-ins, made small by later --opts.

The network is the one thing that is replaced: the model zoo is a folder behind a file's URL,
timm's hub gives random weights.
"""

import shutil
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import save_logits
from configs import argument_parser, config_from_args, load_config
from data.store.reader import LogitsStoreReader
from models.build import build_model
from models.class_map import imagenet_wnids
from models.clip_vit import clip_vit_large14_224
from models.pretrained import ZOO_NAMES, zoo_url
from models.tiny_vit import VARIANTS as OFFICIAL
from models.tiny_vit import TinyViT
from tests.support.helpers import ROOT
from tests.support.images import encoded, write_parquet, write_tar
from tests.support.saving import write_upstream

# Each official variant in small; as among the official ones, a larger image has larger windows and
# nothing else.
_SMALL = {
    "depths": (1, 1, 1, 1),
    "window_sizes": (2, 2, 2, 2),
    "img_size": 40,
    "drop_path_rate": 0.0,
}
VARIANTS = {
    "5m": {**_SMALL, "embed_dims": (8, 16, 16, 16), "num_heads": (1, 1, 1, 1)},
    "11m": {**_SMALL, "embed_dims": (8, 16, 16, 32), "num_heads": (1, 1, 1, 2)},
    "21m": {**_SMALL, "embed_dims": (8, 16, 32, 32), "num_heads": (1, 1, 2, 2)},
}
VARIANTS["21m_384"] = {**VARIANTS["21m"], "img_size": 64, "window_sizes": (4, 4, 4, 2)}
VARIANTS["21m_512"] = {**VARIANTS["21m"], "img_size": 80, "window_sizes": (5, 5, 5, 3)}
CLIP = {
    "embed_dim": 16,
    "image_resolution": 40,
    "vision_layers": 1,
    "vision_width": 64,
    "vision_patch_size": 8,
}
TIMM = "convnext_atto"  # the smallest of the documented family
SIDE = 40  # pixels
WNIDS = sorted([imagenet_wnids(1000)[5], imagenet_wnids(1000)[700], imagenet_wnids(1000)[999]])
TRAIN, VAL, SHAPES = 8, 2, 80  # images of a class, and of all shapes
# recipes of stores
STORES = {
    "imagenet": "1k_distill/tiny_vit_5m_1k_distill",
    "imagenet22k": "22k_distill/tiny_vit_5m_22k_distill",
}
# What the documents leave to the reader, and folders outside of the repository.
PLACES = {
    "STORE": "stores/imagenet",
    "STORE_A": "stores/imagenet",
    "UNMIXED": "stores/unmixed",
    "STORE_B": "stores/imagenet",
    "MERGED": "merged",
    "ORIGINAL": "original",
    "CONVERTED": "converted",
    "RECIPE": f"configs/{STORES['imagenet']}.yaml",
    "DATA": "./ImageNet",
    "E": "1",
    "./output/demo/shapes-teacher/teacher/checkpoints/last.pth": "./checkpoints/shapes_teacher.pth",
    "FOLDER": "output/TinyViT-21M-1k/default",
    "/data/ImageNet": "./ImageNet",
    "/shared/output": "./shared/output",
    "/shared/teacher_logits": "./shared/teacher_logits",
    "$first": "0",
    "$last": "1",
}
TEACHERS = """from tests.support.teachers import Glance


def large(cfg):
    return Glance(1000)
"""


class Command(NamedTuple):
    """A command of the documents without its launcher."""

    program: str  # main.py, save_logits.py, or the module after -m
    arguments: list[str]
    world: int = 1  # processes that the launcher starts


def parsed(words: Sequence[str]) -> Command:
    """A command's parts; torchrun itself judges its flags."""
    words = [PLACES.get(word, word) for word in words if word != "srun"]
    if words[0] == "python":
        return Command(words[2], words[3:]) if words[1] == "-m" else Command(words[1], words[2:])
    launch = get_args_parser().parse_args(words[1:])
    machines = int(launch.nnodes.split(":")[-1])  # its default is 1:1
    return Command(
        launch.training_script, launch.training_script_args, machines * int(launch.nproc_per_node)
    )


def config_of(command: Command):
    """The configuration of a command, as it stands in the documents or as a twin."""
    # programs have flags of their own
    known, _ = argument_parser("").parse_known_args(command.arguments)
    is_saving = command.program == "save_logits.py"
    return config_from_args(known, command.world, {"DISTILL.SAVE_TEACHER_LOGITS": is_saving})


def twin(command: Command) -> Command:
    """The same command of main.py or save_logits.py in small, for one process."""
    cfg = config_of(command)
    opts = "DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 1".split()
    if not any(word.endswith("/config.yaml") for word in command.arguments):  # of a twin, earlier
        opts += _small_model(cfg)
    if cfg.TRAIN.GLOBAL_BATCH:
        opts += ["TRAIN.GLOBAL_BATCH", 8]
    if cfg.DATA.DATASET == "shapes":
        opts += ["DATA.SHAPES.TRAIN_IMAGES", SHAPES, "DATA.SHAPES.VAL_IMAGES", 20]
    elif cfg.DATA.DATASET == "cifar10":
        opts += ["DATA.SUBSET", 1.0]
    elif Path(cfg.DATA.DATA_PATH).name.startswith("ImageNet"):
        # The list has all classes, unlike the stand-in.
        name = "imagenet22k" if cfg.DATA.DATASET == "imagenet22k" else "imagenet1k"
        opts += ["DATA.CLASS_LIST", name]
    small = ["--batch-size", "4", "--only-cpu", "--opts", *map(str, opts)]
    return Command(command.program, [*command.arguments, *small])


def _small_model(cfg) -> list[object]:
    """Options for the small model that stands for a configuration's, and for its image size."""
    match cfg.MODEL.TYPE:
        case "timm":
            has_weights = timm.get_pretrained_cfg(cfg.MODEL.NAME).has_weights
            assert has_weights, f"timm has no weights for {cfg.MODEL.NAME}"
            if cfg.DISTILL.TWO_HEADS:
                return ["MODEL.ARGS", "{patch_size: 8, depth: 1, embed_dim: 24}"]
            return ["MODEL.NAME", TIMM, "DATA.IMG_SIZE", SIDE]
        case "tiny_vit" if cfg.DATA.DATASET != "shapes":
            small = VARIANTS[_official(cfg)]
            keys = ["DEPTHS", "EMBED_DIMS", "NUM_HEADS"]
            opts = []
            if cfg.DATA.DATASET != "cifar10":  # whose images are small already
                keys.append("WINDOW_SIZES")
                opts = ["DATA.IMG_SIZE", small["img_size"]]
            for key in keys:
                opts += [f"MODEL.TINY_VIT.{key}", list(small[key.lower()])]
            return opts
        case "tiny_vit":
            return []
        case _:
            return ["DATA.IMG_SIZE", SIDE]


def _official(cfg) -> str:
    """The official variant that a configuration describes, by its windows too where these are an
    official variant's.
    """
    dims = tuple(cfg.MODEL.TINY_VIT.EMBED_DIMS)
    found = {name: shape for name, shape in OFFICIAL.items() if shape["embed_dims"] == dims}
    for name, shape in found.items():
        if shape.get("window_sizes") == tuple(cfg.MODEL.TINY_VIT.WINDOW_SIZES):
            return name
    return next(iter(found))


def write_stand_ins(root: Path) -> None:
    """Everything that the documents' commands find in the folder where they are started, in small,
    but no result of theirs.
    """
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "tools").mkdir()
    (root / "tools" / "studies").symlink_to(ROOT / "tools" / "studies")
    _write_pictures(root / "ImageNet", WNIDS, "JPEG")
    _write_pictures(root / "cifar10", ["airplane", "bird", "cat"], "jpg")
    _write_pictures(root / "flowers", ["daisy", "rose", "tulip"], "jpg")
    shutil.copy(root / "flowers" / "train" / "daisy" / "0.jpg", root / "photo.jpg")
    _write_albums(root / "photos")
    _write_tars_and_parquet(root)
    _write_zips(root / "ImageNet-22k")
    _write_weights(root / "checkpoints")
    _write_mobile_sam(root / "mobile_sam.pt")
    (root / "my_package").mkdir()
    (root / "my_package" / "teachers.py").write_text(TEACHERS)
    for name, recipe in STORES.items():
        _write_store(root, name, recipe)
    _write_store(root, "unmixed", STORES["imagenet"], {"AUG.MIXUP": 0.0, "AUG.CUTMIX": 0.0})
    published = root / "datasets" / "USER" / "REPOSITORY" / "resolve"
    published.mkdir(parents=True)
    (published / "main").symlink_to(root / "stores" / "imagenet")
    records = np.array(LogitsStoreReader(root / "stores" / "imagenet").open_epoch(0))
    write_upstream(root / "original", {0: records})


def _write_pictures(root: Path, classes: Sequence[str], suffix: str) -> None:
    """Class folders for training and validation."""
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                _picture(label, index).save(root / split / name / f"{index}.{suffix}", "JPEG")


def _write_albums(root: Path) -> None:
    """Photos without labels."""
    for album in range(len(WNIDS)):
        (root / str(album)).mkdir(parents=True)
        for index in range(TRAIN):
            _picture(album, index).save(root / str(album) / f"{index}.jpg")


def _write_tars_and_parquet(root: Path) -> None:
    """ImageNet as webdataset's shards, as Hugging Face's parquet and as a tar for each split."""
    wnids = imagenet_wnids(1000)
    for split, count in (("train", TRAIN), ("val", VAL)):
        images = {
            f"{wnid}_{index}_{wnid}": (wnids.index(wnid), encoded(_picture(label, index), "JPEG"))
            for label, wnid in enumerate(WNIDS)
            for index in range(count)
        }
        shard = {f"{name}.cls": str(label).encode() for name, (label, _) in images.items()}
        shard |= {f"{name}.jpg": data for name, (_, data) in images.items()}
        write_tar(root / "shards" / f"{split}-0000.tar", shard)
        labels, data = zip(*images.values())
        paths = [f"{name}.JPEG" for name in images]
        long_name = "validation" if split == "val" else split
        write_parquet(root / f"imagenet-1k/data/{long_name}-0.parquet", paths, data, labels)
        members = {f"{path.partition('_')[0]}/{path}": part for path, part in zip(paths, data)}
        write_tar(root / f"ImageNet-{split}.tar", members)


def _write_zips(root: Path) -> None:
    """ImageNet-22k's layout."""
    root.mkdir()
    with open(root / "in22k_image_names.txt", "w") as names:
        for label, wnid in enumerate(WNIDS):
            with zipfile.ZipFile(root / f"{wnid}.zip", "w") as archive:
                for index in range(TRAIN):
                    names.write(f"{wnid}_{index}\n")
                    with archive.open(f"{wnid}_{index}.jpeg", "w") as file:
                        _picture(label, index).save(file, "JPEG")


def _picture(label: int, index: int) -> Image.Image:
    rng = np.random.default_rng([label, index])
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def _write_weights(root: Path) -> None:
    """The files of the model zoo under their names, each with the weights of a small variant."""
    root.mkdir()
    torch.manual_seed(0)
    for variant, shape in VARIANTS.items():
        for name in ZOO_NAMES:
            model = TinyViT(**shape, num_classes=21841 if name == "22k_distill" else 1000)
            file = root / Path(zoo_url(variant, name)).name
            # a larger 21m begins with the weights of the smaller, under the same name
            if not file.exists():
                torch.save({"model": model.state_dict()}, file)
    recipe = str(ROOT / "configs" / "shapes" / "teacher.yaml")
    cfg = load_config(["--cfg", recipe, "--opts", "MODEL.NUM_CLASSES", "10"])
    torch.save(build_model(cfg).state_dict(), root / "shapes_teacher.pth")
    torch.save(clip_vit_large14_224(**CLIP).state_dict(), root / "clip_vit_large_patch14_22k.pth")


def _write_mobile_sam(path: Path) -> None:
    """The encoder's part of its file, small, under its names."""
    encoder = TinyViT(**VARIANTS["5m"])
    sizes = {"0.weight": (256, encoder.num_features, 1, 1), "2.weight": (256, 256, 3, 3)}
    sizes |= dict.fromkeys(("1.weight", "1.bias", "3.weight", "3.bias"), (256,))
    state = encoder.state_dict() | {
        f"neck.{name}": torch.rand(size) for name, size in sizes.items()
    }
    torch.save({f"image_encoder.{name}": value for name, value in state.items()}, path)


def _write_store(
    root: Path, name: str, recipe: str, others: dict[str, object] | None = None
) -> None:
    """The store that a student's recipe wants, from a teacher of our own."""
    classes = 21841 if name == "imagenet22k" else 1000
    data = root / ("ImageNet-22k" if classes > 1000 else "ImageNet")
    opts = {
        "MODEL.TYPE": "tests.support.teachers:glance",
        "MODEL.NUM_CLASSES": classes,
        "DISTILL.TEACHER_LOGITS_PATH": root / "stores" / name,
        **(others or {}),
    }
    words = f"--cfg {root}/configs/{recipe}.yaml --data-path {data} --skip-eval --output".split()
    words += [f"{root}/stores", "--opts"]
    for key, value in opts.items():
        words += [key, str(value)]
    assert save_logits.main(twin(Command("save_logits.py", words)).arguments) == 0


def shrink_the_world(patch: pytest.MonkeyPatch) -> None:
    """The official models small, and timm's weights from no hub."""
    for module in ("models.hub", "models.tiny_vit"):
        patch.setattr(f"{module}.VARIANTS", VARIANTS)
    patch.setattr("models.build.clip_vit_large14_224", partial(clip_vit_large14_224, **CLIP))
    patch.setattr("timm.models._builder.load_pretrained", _random_weights)
    # Another back end still traces the model; the default one calls a C++ compiler, for a minute.
    patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        patch.delenv(key, raising=False)


def _random_weights(model: torch.nn.Module, **_: object) -> None:
    """In place of timm's download: weights of the right shapes, the same each time, as a file's
    are.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
