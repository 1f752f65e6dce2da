"""A checkpoint as a file for other programs, which is kept only if it answers as the checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from configs.commands import one_line
from data.augment.decoder import eval_transform, mean_and_std
from data.build import TransformedDataset, open_run
from data.store.format import counted, rounded
from logger import progress
from models.build import count_parameters, num_outputs
from models.class_map import LabelMap, find_label_map
from models.hub import save_pretrained, timm_arguments
from models.pretrained import (
    WEIGHTS_FILE,
    load_weights,
    read_notes,
    read_state_dict,
    save_weights,
    to_timm,
)
from models.tiny_vit import TinyViT
from tools.predict import load_model
from utils import Exit

# by suffix; --format timm has the suffix of safetensors
FORMATS = {".onnx": "onnx", ".pt2": "pt2", ".safetensors": "safetensors", "": "hub"}
EXTRAS = ("onnx", "onnxscript", "onnxruntime")
OLDEST_OPSET = 18  # that PyTorch writes
# Of the largest output: float16 has 11 bits, int8 eight for the values of a whole tensor.
TOLERANCES = {"float32": 1e-4, "float16": 0.02, "int8": 0.15}
IMAGENETS = {1000: "imagenet1k", 21841: "imagenet22k"}
BATCH = 32


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 if the file answers too differently."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    help = "a training's checkpoint, or the weights of any TinyViT"
    add("checkpoint", metavar="CHECKPOINT", help=help)
    help = "what to write: .onnx, .pt2 (torch.export), .safetensors, or a folder for the Hub"
    add("-o", "--output", required=True, type=Path, metavar="FILE", help=help)
    help = "default: by the suffix; timm is safetensors under timm's names"
    add("--format", choices=[*FORMATS.values(), "timm"], help=help)
    help = "of weights and arithmetic (float32); int8, of linear layers, for onnx alone"
    add("--precision", choices=TOLERANCES, default="float32", help=help)
    help = "version of ONNX's operators (default: PyTorch's choice)"
    add("--opset", type=int, metavar="N", help=help)
    add("--ema", action="store_true", help="export the averaged weights")
    help = (
        "images to compare on, and top-1 if they are in class folders (default: the validation"
        " images of the checkpoint's recipe)"
    )
    add("--images", type=Path, metavar="FOLDER", help=help)
    help = "how many of them, evenly spread (512)"
    add("--count", type=int, default=512, metavar="N", help=help)
    told = ", ".join(f"{name} {value}" for name, value in TOLERANCES.items())
    help = f"the largest difference, as a share of the largest output ({told})"
    add("--tolerance", type=float, metavar="X", help=help)
    try:
        return export(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return Exit.FAULT


def export(args: argparse.Namespace) -> int:
    """Write the file under another name, compare, and give it its own."""
    check_request(args)
    output, form = args.output, args.format
    model, cfg, names = load_model(args.checkpoint)
    if args.ema:
        averaged = read_state_dict(args.checkpoint, ema=True)
        load_weights(model, averaged, exact=True, log=lambda text: None)
    if form in ("timm", "hub") and not isinstance(model, TinyViT):
        raise ValueError(f"--format {form} is for TinyViT, and this is a {type(model).__name__}")
    loader, labels = open_images(cfg, num_outputs(model), names, args.images, args.count)
    notes = read_notes(args.checkpoint)
    # nobody else has the folders of this machine
    notes["config"] = re.sub(r"(?m)^( *\w+: )/.*/", r"\1", notes.get("config", ""))
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        made = Path(folder, output.name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, of its own making
                write(model, made, cfg, notes, args)
                answer = answerer(form, made, model)
        except Exception as error:  # exporters and runtimes raise what they like
            reason = one_line(error)[:300]
            raise ValueError(f"{args.checkpoint} can't be written as {form}: {reason}") from error
        difference, figures = compare(model, answer, loader, labels)
        limit = TOLERANCES[args.precision] if args.tolerance is None else args.tolerance
        is_same = difference <= limit
        verdict = "written" if is_same else "NOT WRITTEN, it differs"
        print(f"{output} ({args.precision}): {figures}; tolerance {limit:g}: {verdict}")
        if not is_same:
            return Exit.DIFFERENT
        if form == "hub":
            text = card(model, cfg, notes, figures)
            made.joinpath("README.md").write_text(text, encoding="utf-8")
            output.mkdir(exist_ok=True)
        for file in made.iterdir() if form == "hub" else [made]:
            os.replace(file, output / file.name if form == "hub" else output)
    return Exit.DONE


def check_request(args: argparse.Namespace) -> None:
    """A ValueError for what can't be done, before anything is read; else the format is known."""
    output = args.output
    form = args.format = args.format or FORMATS.get(output.suffix)
    needed = "safetensors" if form == "timm" else form
    if needed is None or needed not in ("hub", FORMATS.get(output.suffix)):
        suffixes = ", ".join(filter(None, FORMATS))
        raise ValueError(
            f"{output}: not the suffix of {form or 'any format'}: there are {suffixes} and, of a"
            " folder for the Hub, none"
        )
    if args.images and not args.images.exists():
        raise ValueError(f"--images {args.images}: no such folder")
    if args.precision == "int8" and form != "onnx":
        raise ValueError(f"--precision int8 is for onnx, not for {form}")
    if form != "onnx":
        return
    if lacking := " ".join(name for name in EXTRAS if find_spec(name) is None):
        raise ValueError(f"{output}: ONNX needs more packages: pip install {lacking}")
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if args.opset and not OLDEST_OPSET <= args.opset <= newest:
        raise ValueError(f"--opset {args.opset}: from {OLDEST_OPSET} to {newest}")


def open_images(
    cfg: CfgNode, outputs: int, names: Sequence[str], folder: Path | None, count: int
) -> tuple[DataLoader, LabelMap | None]:
    """Batches of (images, labels), and which output each label is; None without labels. `names`
    are the model's classes, if it names them.
    """
    with TemporaryDirectory() as place:
        if folder:
            own = {"DATA.DATASET": "folder", "DATA.CLASS_LIST": "", "DATA.DATA_PATH": ""}
            if folder.is_dir() and any(path.is_dir() for path in folder.iterdir()):
                own["DATA.DATASET"] = "imagenet"
                own["DATA.CLASS_LIST"] = IMAGENETS.get(outputs, "")
                if names:
                    listed = Path(place, "classes.txt")
                    listed.write_text("\n".join(names), encoding="utf-8")
                    own["DATA.CLASS_LIST"] = str(listed)
            cfg = cfg.replace({**own, "DATA.VAL_PATH": str(folder)})
        try:
            if ":" in cfg.DATA.DATASET:
                raise ValueError(f"{cfg.DATA.DATASET} is code, which no checkpoint may start")
            images = open_run(cfg, outputs).images
        except ValueError as error:
            reason = str(error)
            if "--data-path" in reason:  # which is no option here
                place = cfg.DATA.DATA_PATH
                reason = f"{place} lacks the recipe's own" if place else "the recipe names none"
            raise ValueError(
                f"no images to compare on: {reason}; name a folder: --images FOLDER"
            ) from None
    labels, reason = find_label_map(outputs, images.num_classes)
    if folder and images.num_classes and labels is None:
        raise ValueError(f"{folder}: {reason}")
    count = max(1, min(count, len(images)))
    places = [(0, i * len(images) // count) for i in range(count)]
    dataset = TransformedDataset(images, eval_transform(cfg))
    return DataLoader(dataset, BATCH, sampler=places), labels


@torch.no_grad()
def compare(
    model: nn.Module,
    answer: Callable[[Tensor], Tensor],
    loader: DataLoader,
    labels: LabelMap | None,
) -> tuple[float, str]:
    """The largest difference between a model's outputs and the file's, as a share of the largest
    output; and all that was found, in words.
    """
    rows = [
        (model(images), answer(images), given)
        for images, given in progress(loader, description="comparing", unit="batches")
    ]
    before, after, given = map(torch.cat, zip(*rows))
    largest = before.abs().max().item()
    difference = (after - before).abs().max().item() / (largest or 1)
    same = (after.argmax(1) == before.argmax(1)).sum().item()
    figures = (
        f"{counted(len(before), 'image')}, largest difference {difference:.2g} of the largest"
        f" output {largest:.3g}, same class first in {same}"
    )
    if labels is not None:
        targets = labels.known(given)
        top1 = [
            100 * (labels.logits(logits).argmax(1) == targets).double().mean().item()
            for logits in (before, after)
        ]
        figures += f", top-1 {top1[0]:.2f}% before and {top1[1]:.2f}% after"
    return difference, figures


class Program(nn.Module):
    """A model that takes and gives float32, whatever it computes in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dtype = next(model.parameters()).dtype

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits."""
        return self.model(images.to(self.dtype)).float()


def write(
    model: nn.Module, path: Path, cfg: CfgNode, notes: dict[str, Any], args: argparse.Namespace
) -> None:
    """Write a model as the command asks for."""
    model, form = deepcopy(model), args.format
    mean, std = mean_and_std(cfg)
    if form in ("onnx", "pt2") and hasattr(model, "fuse"):
        model.fuse()
    if args.precision == "float16":
        model.half()
    names = notes.get("class_names", [])
    if form == "hub":
        crop = {"crop_pct": 0.875} if cfg.TEST.CROP else {"crop_pct": 1.0, "crop_mode": "squash"}
        save_pretrained(model, path, label_names=names, notes=notes, mean=mean, std=std, **crop)
        return
    if form in ("safetensors", "timm"):
        save_weights(model, path, naming=to_timm if form == "timm" else dict, notes=notes)
        return
    images = torch.zeros(2, 3, cfg.DATA.IMG_SIZE, cfg.DATA.IMG_SIZE)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Program(model), (images,), dynamic_shapes=shapes)
    if form == "pt2":
        torch.export.save(program, path)
        return
    named = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": shapes}
    onnx = torch.onnx.export(
        program, (images,), dynamo=True, opset_version=args.opset, verbose=False, **named
    )
    known = {"image_size": cfg.DATA.IMG_SIZE, "mean": mean, "std": std, "class_names": names}
    for key, value in known.items():
        onnx.model.metadata_props[key] = json.dumps(value)
    onnx.save(path)
    if args.precision == "int8":
        from onnxruntime.quantization import quantize_dynamic

        # convolutions stay as they are: few weights, and slower in int8
        quantize_dynamic(path, path, op_types_to_quantize=["MatMul", "Gemm"])


def answerer(form: str, path: Path, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What answers from the file, as its users would: images -> logits."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if form == "pt2":
        return torch.export.load(path).module()
    if form == "safetensors":
        return load_model(str(path))[0]
    path = path / WEIGHTS_FILE if form == "hub" else path
    return timm.create_model(**timm_arguments(model), checkpoint_path=path).eval()


def card(model: TinyViT, cfg: CfgNode, notes: dict[str, Any], figures: str) -> str:
    """The README.md of a repository on the Hub."""
    mean, std = mean_and_std(cfg)
    progress, sources = (json.dumps(notes.get(key, {})) for key in ("progress", "sources"))
    return f"""---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, tiny_vit]
---
# {cfg.MODEL.NAME}

TinyViT of {count_parameters(model) / 1e6:.1f} M parameters for {model.num_classes} classes.

```python
import timm

model = timm.create_model("hf-hub:USER/REPOSITORY", pretrained=True).eval()
```

or, with the code it comes from, `TinyViT.from_pretrained("USER/REPOSITORY")`.
Images: {cfg.DATA.IMG_SIZE} pixels a side, mean {mean}, standard deviation {std} of values up to 1.

## Where it comes from

- progress: {rounded(progress)} (`best` is the highest top-1 in validation, in percent)
- data and teacher: {sources}
- these files compared with the checkpoint, through timm: {figures}

The recipe:

```yaml
{notes["config"].strip()}
```
"""


if __name__ == "__main__":
    sys.exit(main())
