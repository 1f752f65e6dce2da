"""Top classes of images, for any checkpoint: ours, the official ones, or a timm model's."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import isqrt
from pathlib import Path

import timm
import torch
from torch import nn
from yacs.config import CfgNode

from configs import load_config
from data.augment.decoder import eval_transform
from data.images.reading import IMAGE_SUFFIXES, read_rgb
from models.build import build_teacher
from models.pretrained import from_timm, load_weights, read_notes, read_state_dict
from models.tiny_vit import TinyViT

# pixels a point of the third stage's map stands for, which official models cover with one window
STRIDE = 16


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE|FOLDER",
        nargs="+",
        type=Path,
        help="image files, or folders that are searched for images",
    )
    add(
        "--weights",
        required=True,
        metavar="FILE|URL",
        help="a checkpoint; what model it belongs to is read from it",
    )
    add("--timm", metavar="NAME", help="the weights are of this timm model")
    add(
        "--cfg",
        metavar="FILE",
        help="take image size, mean and std from this recipe (default: the checkpoint's own)",
    )
    add(
        "--image-size", type=int, metavar="PIXELS", help="default: the size the model was built for"
    )
    add(
        "--classes",
        metavar="FILE",
        type=Path,
        help="class names, one a line; default: the checkpoint's, or ImageNet's",
    )
    add(
        "--topk", type=int, default=5, metavar="K", help="classes to show of each image (default 5)"
    )
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="images per forward pass (default 16)",
    )
    add("--json", action="store_true", help="one JSON object a line instead of a table")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    try:
        for path, classes in predict(**args):
            print(
                (
                    json.dumps({"image": str(path), "classes": classes})
                    if as_json
                    else _rows(path, classes)
                ),
                flush=True,
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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
    arguments as the command's.
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
        batch = paths[start : start + batch_size]
        with torch.inference_mode():
            probs = (
                model(
                    torch.stack(
                        [transform(read_rgb(path, settings.DATA.MAX_PIXELS)) for path in batch]
                    )
                )
                .float()
                .softmax(-1)
            )
        names = class_names(probs.shape[1], classes, names)
        values, indices = probs.topk(min(topk, probs.shape[1]))
        for path, row, found in zip(batch, values.tolist(), indices.tolist()):
            yield (
                path,
                [
                    {"class": i, "name": names[i], "probability": round(p, 6)}
                    for p, i in zip(row, found)
                ],
            )


def load_model(
    weights: str, timm_name: str | None = None
) -> tuple[nn.Module, CfgNode, Sequence[str]]:
    """The model of a checkpoint, in eval mode; a configuration that tells how it sees images; and
    its class names, if it has such.
    """
    notes = {} if timm_name else read_notes(weights)
    if "config" in notes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.yaml").write_text(notes["config"], encoding="utf-8")
            cfg = load_config(
                ["--cfg", f"{folder}/config.yaml", "--eval", "--resume", str(weights)]
            )
        return build_teacher(cfg, log=lambda text: None), cfg, notes.get("class_names", ())
    state = read_state_dict(weights)
    if timm_name:
        cfg = load_config(["--opts", "MODEL.TYPE", "timm", "MODEL.NAME", timm_name, "--eval"])
        model: nn.Module = timm.create_model(timm_name, num_classes=_head_rows(state))
    else:
        state = from_timm(state) if "patch_embed.conv1.conv.weight" in state else state
        settings = tiny_vit_settings(state, weights)
        cfg = load_config(["--opts", "DATA.IMG_SIZE", str(settings["img_size"]), "--eval"])
        model = TinyViT(**settings)
    load_weights(model, state, exact=True, log=lambda text: None)
    return model.eval(), cfg, ()


def tiny_vit_settings(state: Mapping[str, torch.Tensor], name: str) -> dict:
    """The TinyViT a state dict belongs to, read from the shapes of its tensors."""
    if "patch_embed.seq.0.c.weight" not in state or "head.weight" not in state:
        raise ValueError(
            f"{name}: these are not the weights of a TinyViT classifier; for a timm model name it"
            " with --timm"
        )
    blocks = sorted(
        {
            tuple(map(int, found.groups()))
            for key in state
            if (found := re.match(r"layers\.(\d)\.blocks\.(\d+)\.", key))
        }
    )
    depths = [sum(stage == i for stage, _ in blocks) for i in range(4)]
    biases = [state[f"layers.{i}.blocks.0.attn.attention_biases"].shape for i in range(1, 4)]
    dims = [
        state["patch_embed.seq.2.c.weight"].shape[0],
        *(state[f"layers.{i}.blocks.0.attn.proj.weight"].shape[0] for i in range(1, 4)),
    ]
    windows = [isqrt(points) for _, points in biases]
    return {
        "embed_dims": dims,
        "depths": depths,
        "num_heads": [1, *(heads for heads, _ in biases)],
        "window_sizes": [windows[0], *windows],
        "num_classes": state["head.weight"].shape[0],
        "in_chans": state["patch_embed.seq.0.c.weight"].shape[1],
        "mbconv_expand_ratio": state["layers.0.blocks.0.conv1.c.weight"].shape[0] / dims[0],
        "mlp_ratio": state["layers.1.blocks.0.mlp.fc1.weight"].shape[0] / dims[1],
        "local_conv_size": state["layers.1.blocks.0.local_conv.c.weight"].shape[-1],
        "img_size": max(32, windows[1] * STRIDE),
    }


def class_names(count: int, file: Path | None, own: Sequence[str] = ()) -> Sequence[str]:
    """The names of so many classes: a file's, ImageNet's, the checkpoint's `own`, or numbers."""
    if file:
        names = Path(file).read_text(encoding="utf-8").splitlines()
        if len(names) != count:
            raise ValueError(f"{file}: holds {len(names)} names, the model has {count} classes")
        return names
    if count not in (1000, 21841):
        return own or [f"class {i}" for i in range(count)]
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k" if count == 1000 else "imagenet-22k")
    return [info.index_to_description(i) for i in range(count)]


def _image_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
            )
            if not found:
                raise ValueError(f"{path}: no images in this folder")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"{path}: no such file or folder")


def _head_rows(state: Mapping[str, torch.Tensor]) -> int:
    return [value for key, value in state.items() if key.endswith("weight") and value.ndim == 2][
        -1
    ].shape[0]


def _rows(path: Path, classes: Sequence[dict]) -> str:
    return "\n".join(
        [
            str(path),
            *(
                f"  {100 * entry['probability']:6.2f} %  {entry['class']:>5}  {entry['name']}"
                for entry in classes
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
