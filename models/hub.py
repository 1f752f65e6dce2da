"""TinyViTs as files that others know: what the tensors of one tell of its shape, and folders in the
form of timm and the Hugging Face Hub.
"""

import json
import re
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

from models.pretrained import (
    WEIGHTS_FILE,
    StateDict,
    from_timm,
    load_weights,
    read_state_dict,
    save_weights,
    to_timm,
)
from models.tiny_vit import VARIANTS, TinyViT

# pixels a point of the third stage's map stands for, which official models cover with one window
STRIDE = 16
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_WINDOWS = (7, 7, 14, 7)  # of the variants that do not say otherwise


def load_tiny_vit(source: str | Path, **overrides: Any) -> TinyViT:
    """The TinyViT that a checkpoint is of, with its weights, in eval mode; the source is as
    read_state_dict's, and the model's shape is read from its tensors.
    """
    state = from_timm(read_state_dict(source))  # which are ours already, or become so
    try:
        model = TinyViT(**{**tiny_vit_settings(state, str(source)), **overrides})
    except (LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{source}: no TinyViT has tensors like these ({error})") from None
    exact = not overrides
    load_weights(model, state, exact=exact, label=str(source), log=lambda text: None)
    return model.eval()


def tiny_vit_settings(state: StateDict, name: str) -> dict[str, Any]:
    """The TinyViT a state dict belongs to, read from the shapes of its tensors."""
    if "patch_embed.seq.0.c.weight" not in state or "head.weight" not in state:
        raise ValueError(
            f"{name}: these are not the weights of a TinyViT classifier; for a timm model name it"
            " with --timm"
        )
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    blocks = {re.match(r"layers\.\d\.blocks\.\d+\.|", key).group() for key in state}
    depths = [sum(block.startswith(f"layers.{stage}.") for block in blocks) for stage in range(4)]
    dims = [shapes["patch_embed.seq.2.c.weight"][0]]
    num_heads = [1]  # of the first stage, which has no attention
    windows = []
    for stage in (1, 2, 3):
        block = f"layers.{stage}.blocks.0"
        heads, points = shapes[f"{block}.attn.attention_biases"]
        dims.append(shapes[f"{block}.attn.proj.weight"][0])
        num_heads.append(heads)
        windows.append(isqrt(points))
    return {
        "embed_dims": dims,
        "depths": depths,
        "num_heads": num_heads,
        "window_sizes": [windows[0], *windows],
        "num_classes": shapes["head.weight"][0],
        "in_chans": shapes["patch_embed.seq.0.c.weight"][1],
        "mbconv_expand_ratio": shapes["layers.0.blocks.0.conv1.c.weight"][0] / dims[0],
        "mlp_ratio": shapes["layers.1.blocks.0.mlp.fc1.weight"][0] / dims[1],
        "local_conv_size": shapes["layers.1.blocks.0.local_conv.c.weight"][-1],
        "img_size": max(32, windows[1] * STRIDE),
    }


def timm_arguments(model: TinyViT) -> dict[str, Any]:
    """What timm.create_model builds a model of the same shape from."""
    settings = tiny_vit_settings(model.state_dict(), "the model")
    del settings["img_size"]  # which timm's takes from each image
    return {"model_name": timm_name(nearest_variant(settings) or "5m"), **settings}


def nearest_variant(settings: Mapping[str, Any]) -> str:
    """The official variant that a TinyViT of these settings is, or may start from by resizing its
    windows; "" where there is none.
    """
    windows = tuple(settings["window_sizes"])[1:]
    differs = {
        name: tuple(shape.get("window_sizes", _WINDOWS))[1:] != windows
        for name, shape in VARIANTS.items()
        if _dims_and_heads(shape) == _dims_and_heads(settings)
    }
    return min(differs, key=differs.get, default="")


def _dims_and_heads(settings: Mapping[str, Any]) -> tuple[int, ...]:
    return (*settings["embed_dims"], *settings["num_heads"][1:])  # the first stage has no heads


def timm_name(variant: str) -> str:
    """timm's name of one of VARIANTS."""
    return f"tiny_vit_{variant}" if "_" in variant else f"tiny_vit_{variant}_224"


def save_pretrained(
    model: TinyViT,
    folder: str | Path,
    *,
    label_names: Sequence[str] = (),
    notes: Mapping[str, object] | None = None,
    **data: Any,
) -> None:
    """Write a folder that TinyViT.from_pretrained and timm (local-dir:FOLDER) read, and that can be
    uploaded to the Hub as it is.

    `data` are fields of timm's pretrained_cfg, such as mean, std and crop_pct (default: ImageNet's
    mean and std); `notes` are for read_notes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = timm_arguments(model)
    side = model.img_size
    config = {
        "architecture": arguments.pop("model_name"),
        "num_classes": arguments.pop("num_classes"),
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": (model.in_chans, side, side),
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.conv1.conv",
            "classifier": "head.fc",
            **_IMAGENET,
            **data,
        },
    }
    if label_names:
        config["label_names"] = list(label_names)
    save_weights(model, folder / WEIGHTS_FILE, naming=to_timm, notes=notes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
