"""Top classes of images, for any checkpoint: ours, the official ones, or a timm model's."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from configs import load_config
from data.augment.decoder import eval_transform
from data.images.reading import IMAGE_SUFFIXES, read_rgb, warn
from models.build import build_teacher
from models.hub import load_tiny_vit
from models.pretrained import read_notes


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 if an image among others can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    help = "image files, or folders that are searched for images"
    add("images", metavar="IMAGE|FOLDER", nargs="+", type=Path, help=help)
    help = "a checkpoint; what model it belongs to is read from it"
    add("--weights", required=True, metavar="FILE|URL|hf-hub:REPOSITORY", help=help)
    add("--timm", metavar="NAME", help="the weights are of this timm model")
    help = "take image size, mean and std from this recipe (default: the checkpoint's own)"
    add("--cfg", metavar="FILE", help=help)
    help = "default: the size the model was built for"
    add("--image-size", type=int, metavar="PIXELS", help=help)
    help = "class names, one a line; default: the checkpoint's, or ImageNet's"
    add("--classes", metavar="FILE", type=Path, help=help)
    help = "classes to show of each image (default 5)"
    add("--topk", type=int, default=5, metavar="K", help=help)
    help = "images per forward pass (default 16)"
    add("--batch-size", type=int, default=16, metavar="N", help=help)
    add("--json", action="store_true", help="one JSON object a line instead of a table")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    status = 0
    try:
        for path, classes in predict(**args):
            if not classes:
                status = 1
                continue
            if as_json:
                print(json.dumps({"image": str(path), "classes": classes}), flush=True)
                continue
            print(path)
            for entry in classes:
                percent = 100 * entry["probability"]
                print(f"  {percent:6.2f} %  {entry['class']:>5}  {entry['name']}", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def predict(
    images: Sequence[str | Path],
    weights: str,
    *,
    timm: str | None = None,
    cfg: str | None = None,
    image_size: int | None = None,
    classes: Path | None = None,
    topk: int = 5,
    batch_size: int = 16,
) -> Iterator[tuple[Path, list[dict]]]:
    """Each image's path and its classes, most probable first: {"class", "name", "probability"};
    arguments as the command's. One among others that can't be read has a warning and no classes.
    """
    if topk < 1 or batch_size < 1:
        raise ValueError(f"topk {topk}, batch size {batch_size}: numbers from 1 up")
    paths = list(_image_files([Path(image) for image in images]))
    model, settings, names = load_model(weights, timm)
    if cfg:
        settings = load_config(["--cfg", cfg, "--eval"])
    if image_size:
        settings = settings.replace({"DATA.IMG_SIZE": image_size})
    transform = eval_transform(settings)
    for start in range(0, len(paths), batch_size):
        batch, tensors = [], []
        for path in paths[start : start + batch_size]:
            try:
                tensors.append(transform(read_rgb(path, settings.DATA.MAX_PIXELS)))
                batch.append(path)
            except ValueError as error:
                if len(paths) == 1:
                    raise
                warn(str(error))
                yield path, []
        if not batch:
            continue
        with torch.inference_mode():
            probs = model(torch.stack(tensors)).float().softmax(-1)
        names = class_names(probs.shape[1], classes, names)
        top = probs.topk(min(topk, probs.shape[1]))
        for path, values, indices in zip(batch, top.values.tolist(), top.indices.tolist()):
            found = []
            for index, value in zip(indices, values):
                entry = {"class": index, "name": names[index], "probability": round(value, 6)}
                found.append(entry)
            yield path, found


def load_model(
    weights: str, timm_name: str | None = None
) -> tuple[nn.Module, CfgNode, Sequence[str]]:
    """The model of a checkpoint, in eval mode; a configuration that tells how it sees images; and
    its class names, if it has such.
    """
    notes = {} if timm_name else read_notes(weights)
    if notes.get("config"):
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "config.yaml"
            recipe.write_text(notes["config"], encoding="utf-8")
            cfg = load_config(["--cfg", str(recipe), "--eval", "--resume", str(weights)])
        if ":" in cfg.MODEL.TYPE:
            raise ValueError(
                f"{weights}: its model is made by {cfg.MODEL.TYPE}, which no file of weights may"
                " start: evaluate it with main.py --cfg ... --eval"
            )
        return build_teacher(cfg, log=lambda text: None), cfg, notes.get("class_names", ())
    if timm_name:
        words = ["--eval", "--resume", weights, "--opts", "MODEL.TYPE", "timm", "MODEL.NAME"]
        cfg = load_config([*words, timm_name])
        return build_teacher(cfg, log=lambda text: None), cfg, ()
    model = load_tiny_vit(weights)
    return model, load_config(["--opts", "DATA.IMG_SIZE", str(model.img_size), "--eval"]), ()


def class_names(count: int, file: Path | None, own: Sequence[str] = ()) -> Sequence[str]:
    """A file's names, the checkpoint's `own` (ImageNet's in words), or numbers.

    Without any, 1,000 or 21,841 classes are taken for ImageNet's.
    """
    if file:
        names = Path(file).read_text(encoding="utf-8").splitlines()
        if len(names) != count:
            raise ValueError(f"{file}: holds {len(names)} names, the model has {count} classes")
        return names
    own = own if len(own) == count else ()
    if count not in (1000, 21841):
        return own or [f"class {i}" for i in range(count)]
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k" if count == 1000 else "imagenet-22k")
    if own and list(own) != info.label_names():
        return own
    return [info.index_to_description(i) for i in range(count)]


def _image_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
            continue
        if not path.is_dir():
            raise ValueError(f"{path}: no such file or folder: name images, or folders of images")
        found = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise ValueError(f"{path}: no images in this folder")
        yield from sorted(found)


if __name__ == "__main__":
    sys.exit(main())
