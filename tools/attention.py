"""Where a TinyViT looks: attention of chosen blocks, heads and points, drawn over an image.

Without --point a tile shows how much attention each point gets in all from the points of its
window (1: as much as if attention were even); with it, what that point looks at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from data.augment.decoder import eval_transform
from data.images.reading import read_rgb
from models.tiny_vit import Block, TinyViT
from tools.predict import load_model
from tools.replay_sheet import visible


class _Watch(TorchFunctionMode):
    """Keeps the probabilities of each attention that is computed meanwhile.

    The model's own kernels keep none, and so it stays as fast as it is for all others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key, _ = args
            scores = query @ key.mT * query.shape[-1] ** -0.5 + kwargs["attn_mask"]
            self.found.append(scores.softmax(-1))
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Attention:
    """What the points of an image's map look at in one block."""

    probs: Tensor  # [windows, heads, N, N]: a point's row sums to 1
    window: int
    size: tuple[int, int]  # of the map, before it was padded to whole windows

    def given(self, asked: Tensor) -> Tensor:
        """The attention that points give, summed with the weights [H, W]: [heads, H, W], each
        window in its place.
        """
        window, (height, width) = self.window, self.size
        asked = F.pad(asked, (0, -width % window, 0, -height % window))
        grid = asked.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2)
        rows, columns = grid.shape[:2]
        looks = torch.einsum("nhqk,nq->hnk", self.probs, grid.reshape(-1, window**2))
        looks = looks.view(-1, rows, columns, window, window).transpose(2, 3)
        return looks.reshape(-1, *asked.shape)[:, :height, :width]


def attentions(model: TinyViT, image: Tensor) -> dict[str, Attention]:
    """Of an image [3, H, W] the attention of each block that has such, by stage.block."""
    blocks = {module: name for name, module in model.named_modules() if isinstance(module, Block)}
    seen = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module in blocks:
            _, stage, _, number = blocks[module].split(".")
            seen.append((f"{stage}.{number}", module.window, tuple(inputs[0].shape[2:])))

    with torch.inference_mode(), register_module_forward_pre_hook(note), _Watch() as watch:
        model(image[None])
    return {
        name: Attention(probs, window, size)
        for (name, window, size), probs in zip(seen, watch.found)
    }


def chosen(
    found: Mapping[str, Attention], words: Sequence[str], heads: Sequence[int]
) -> dict[str, Attention]:
    """The named blocks and all blocks of named stages, else the last block of each stage; a
    ValueError if one of them has not all the heads.
    """
    for word in words:
        if not any(f"{name}.".startswith(f"{word}.") for name in found):
            raise ValueError(
                f"--blocks {word}: no stage or block with attention: there are {', '.join(found)}"
            )
    if not words:
        words = {name[0]: name for name in found}.values()
    kept = {name: found[name] for name in found if {name, name[0]} & {*words}}
    for name, attention in kept.items():
        count = attention.probs.shape[1]
        for head in set(heads) - set(range(count)):
            raise ValueError(f"--heads {head}: block {name} has heads 0 to {count - 1}")
    return kept


def draw(
    picture: Image.Image,
    found: Mapping[str, Attention],
    heads: Sequence[int],
    points: Sequence[tuple[float, float]],
) -> Figure:
    """A row for each block and point: the windows, the mean over all heads, each head; colours go
    from 0 to a tile's maximum.
    """
    rows = [(name, point) for name in found for point in points or [None]]
    columns = 2 + (len(heads) or max(each.probs.shape[1] for each in found.values()))
    figure = Figure((2.0 * columns + 0.6, 2.25 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for (name, point), (first, *others) in zip(rows, grid):
        window, (height, width) = found[name].window, found[name].size
        asked = torch.ones(height, width)
        if point:
            row, column = (
                min(int(at * side), side - 1) for at, side in zip(point[::-1], asked.shape)
            )
            asked = torch.zeros(height, width)
            asked[row, column] = 1
        maps = found[name].given(asked).numpy()
        extent = (0, width, height, 0)
        first.imshow(picture, extent=extent)
        first.set_title(f"block {name}, windows", fontsize=8)
        first.vlines(range(0, width, window), 0, height, color="white", linewidth=0.8)
        first.hlines(range(0, height, window), 0, width, color="white", linewidth=0.8)
        tiles = {"mean": maps.mean(0)}
        tiles |= {f"head {head}": maps[head] for head in heads or range(len(maps))}
        for axis, (title, values) in zip(others, tiles.items()):
            most, lost = values.max(), 1 - values.sum() / asked.sum().item()
            axis.imshow(picture.convert("L"), cmap="gray", extent=extent)
            shade = {"cmap": "inferno", "vmin": 0, "alpha": 0.85 * values / most}
            axis.imshow(values, extent=extent, **shade)
            text = f"{title}: max {most:.2%}" if point else f"{title}: max {most:.3g}"
            if lost >= 0.005:
                text += f", padding {lost:.0%}"
            axis.set_title(text, fontsize=8)
            if point:
                axis.plot(column + 0.5, row + 0.5, "+", color="cyan", markersize=7)
    bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=grid[0], aspect=15, pad=0.01)
    bar.set_ticks([0, 1], labels=["0", "max"], fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.attention", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("image", metavar="IMAGE", help="an image file")
    help = "a checkpoint of a TinyViT; which one is read from it"
    add("--weights", required=True, metavar="FILE|URL", help=help)
    help = "default: the size the model was built for"
    add("--image-size", type=int, metavar="PIXELS", help=help)
    help = "stages, or blocks as STAGE.BLOCK, counted from 0 (default: the last of each stage)"
    add("--blocks", nargs="+", default=[], metavar="BLOCK", help=help)
    help = "heads, counted from 0 (default: all)"
    add("--heads", nargs="+", type=int, default=[], metavar="HEAD", help=help)
    help = "a point whose attention is shown, from 0 0 (top left) to 1 1 of what the model sees"
    add("--point", nargs=2, type=float, action="append", default=[], metavar=("X", "Y"), help=help)
    help = "the picture (default %(default)s)"
    add("-o", "--output", metavar="FILE", type=Path, default=Path("attention.png"), help=help)
    args = parser.parse_args(argv)
    try:
        for point in args.point:
            if not all(0 <= at <= 1 for at in point):
                raise ValueError(f"--point {point[0]:g} {point[1]:g}: expected numbers from 0 to 1")
        model, cfg, _ = load_model(args.weights)
        if not isinstance(model, TinyViT):
            raise ValueError(f"{args.weights}: a {type(model).__name__}, which is no TinyViT")
        if args.image_size:
            cfg = cfg.replace({"DATA.IMG_SIZE": args.image_size})
        transform = eval_transform(cfg)
        image = transform(read_rgb(args.image, cfg.DATA.MAX_PIXELS))
        found = chosen(attentions(model, image), args.blocks, args.heads)
        draw(visible(transform, image), found, args.heads, args.point).savefig(args.output, dpi=110)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: blocks {', '.join(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
