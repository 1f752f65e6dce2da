"""A contact sheet: what a recipe makes of one picture under many seeds, with their plans.

python -m tools.replay_sheet --cfg configs/1k/tiny_vit_21m.yaml --image cat.jpg --seeds 0-15
python -m tools.replay_sheet --cfg configs/1k_distill/tiny_vit_5m_1k_distill.yaml --pairs
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from configs import load_config
from data.augment import AugmentDecoder
from data.augment.rng import sample_seed
from data.images.reading import read_rgb
from data.store.format import counted, rounded

COLUMNS = 4
MOST = 400  # seeds on one sheet


@dataclass(frozen=True)
class Tile:
    """A picture with a title and lines of words beneath."""

    picture: Image.Image
    title: str
    words: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the sheet that the arguments describe."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.replay_sheet", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--cfg", metavar="FILE", help="recipe (YAML); without one the defaults")
    add("--opts", metavar="KEY VALUE", nargs="*", default=[], help="set any key of the recipe")
    add(
        "--image",
        metavar="FILE",
        nargs="*",
        default=[],
        help="picture (with --pairs up to two); else a drawn one",
    )
    add(
        "--seeds",
        metavar="LIST",
        help="e.g. 0-15 or 3,5,9 (default 0-15; with --pairs, the first eight seeds of a run)",
    )
    add("--pairs", action="store_true", help="mix neighbours of the list, as in distillation")
    help = "the picture (default %(default)s)"
    add("-o", "--output", default="replay_sheet.png", metavar="FILE", help=help)
    args = parser.parse_args(argv)
    words = ["--cfg", args.cfg] if args.cfg else []
    words += ["--opts", *args.opts]
    if args.pairs:
        words += ["AUG.MIXUP_MODE", "pair2"]
    try:
        cfg = load_config(words)
        decoder = AugmentDecoder.from_config(cfg)
        files = ((name, Path(name).read_bytes()) for name in args.image)
        images = [read_rgb(data, cfg.DATA.MAX_PIXELS, name) for name, data in files]
        images = images or [landscape()]
        tiles = tiles_of(decoder, images, seeds_of(args.seeds, args.pairs), args.pairs)
        title = ", ".join(Path(name).name for name in args.image) or "a drawn picture"
        draw(tiles, f"{title}: {rounded(str(decoder))}", args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.output}: {counted(len(tiles), 'tile')}")


def tiles_of(
    decoder: AugmentDecoder, images: Sequence[Image.Image], seeds: Sequence[int], pairs: bool
) -> list[Tile]:
    """The tiles of one picture under seeds, or of one or two pictures mixed in pairs."""
    most = 2 if pairs else 1
    if len(images) > most:
        raise ValueError(f"{len(images)} pictures: give one, or two with --pairs")
    if pairs:
        return pair_tiles(decoder, images, seeds)
    image = images[0]
    original = Tile(image, "the picture", [f"{image.width} x {image.height} pixels"])
    return [original, *(decoded_tile(decoder, image, seed) for seed in seeds)]


def pair_tiles(
    decoder: AugmentDecoder, images: Sequence[Image.Image], seeds: Sequence[int]
) -> list[Tile]:
    """Four tiles per pair of seeds: both decoded images, then both as the model sees them."""
    mix = decoder.mix
    if not mix:
        raise ValueError(
            "this recipe mixes nothing (AUG.MIXUP, AUG.CUTMIX or AUG.MIXUP_PROB is 0): leave"
            " --pairs out, or set it otherwise"
        )
    if len(seeds) % 2:
        raise ValueError(f"--pairs needs an even number of seeds, these are {len(seeds)}")
    tiles = []
    for pair in zip(seeds[::2], seeds[1::2]):
        both = list(zip((images[0], images[-1]), pair))
        decoded = torch.stack([decoder.decode(image, seed) for image, seed in both])
        mixed, _ = mix(decoded, None, pair)  # [2, 3, H, W]
        drawn = str(mix.draw(pair, *decoded.shape[-2:])[0])
        tiles += [decoded_tile(decoder, image, seed) for image, seed in both]
        for tensor, seed in zip(mixed, pair):
            tiles.append(Tile(visible(decoder, tensor), f"seed {seed}, mixed", [drawn]))
    return tiles


def decoded_tile(decoder: AugmentDecoder, image: Image.Image, seed: int) -> Tile:
    """A picture under a seed, with what that means."""
    plan = decoder.plan(image.width, image.height, seed)
    picture = visible(decoder, decoder.apply(plan, image))
    return Tile(picture, f"seed {seed}", str(plan).split("; "))


def visible(decoder: AugmentDecoder, tensor: Tensor) -> Image.Image:
    """A normalised tensor [3, H, W] as a picture; what is no colour, such as noise, is clipped."""
    mean, std = torch.tensor([decoder.mean, decoder.std])[..., None, None]
    values = (tensor * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def draw(tiles: Sequence[Tile], title: str, path: str, row_height: float = 4.3) -> None:
    """Write the tiles as a picture, in rows that are as high as their longest text."""
    columns = min(len(tiles), COLUMNS)
    rows = -(-len(tiles) // columns)
    figure = Figure(figsize=(3.0 * columns, row_height * rows + 0.8), layout="constrained")
    figure.suptitle(folded(title.split("; "), 37 * columns), fontsize=9, parse_math=False)
    for number, tile in enumerate(tiles, start=1):
        axes = figure.add_subplot(rows, columns, number, xticks=[], yticks=[], anchor="N")
        axes.imshow(tile.picture)
        title = folded([tile.title], 30)
        axes.set_title(title, fontsize=10, fontweight="bold", parse_math=False)
        axes.set_xlabel(folded(tile.words, 40), fontsize=8, loc="left", parse_math=False)
    figure.savefig(path, dpi=90)


def folded(texts: Sequence[str], width: int) -> str:
    """Lines of texts; what is too long goes on in the next, after a space or a part of a name."""
    part = re.compile(rf".{{1,{width}}}(?:$|(?<=[ /_-]))|.{{{width}}}")
    # no font has the bytes of a name that is no text
    shown = (text.encode(errors="backslashreplace").decode() for text in texts)
    return "\n".join("\n  ".join(part.findall(text)) for text in shown)


def seeds_of(text: str | None, pairs: bool) -> list[int]:
    """'0-3,8' as [0, 1, 2, 3, 8]; without a list, seeds that show what there is to see."""
    # pairs draw from the exclusive or of their seeds, which is 1 for all of 0 and 1, 2 and 3, ...
    if text is None:
        return [sample_seed(0, 0, position) for position in range(8)] if pairs else list(range(16))
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if (
            not first.isdecimal()
            or (dash and not last.isdecimal())
            or (dash and int(last) < int(first))
        ):
            raise ValueError(f"--seeds {text}: write a range such as 0-15, or a list such as 3,5,9")
        seeds += range(int(first), min(int(last or first), int(first) + MOST) + 1)
    if len(seeds) > MOST:
        raise ValueError(f"--seeds {text}: too many for one sheet, ask for {MOST} at most")
    return seeds


def landscape() -> Image.Image:
    """A picture in which a crop, a mirror image, a tilt and other colours are seen at once."""
    width, height = 500, 375
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for y in range(height):
        draw.line([(0, y), (width, y)], (70 + 150 * y // height, 140 + 80 * y // height, 235))
    draw.ellipse([60, 40, 130, 110], (255, 225, 90))
    draw.polygon([(0, 250), (120, 120), (230, 250)], (110, 110, 130))
    draw.polygon([(92, 150), (120, 120), (145, 150), (120, 160)], (245, 245, 250))
    draw.polygon([(150, 260), (300, 90), (470, 260)], (90, 95, 115))
    draw.rectangle([0, 250, width, height], (95, 150, 60))
    draw.polygon([(210, height), (260, 250), (275, 250), (300, height)], (200, 180, 130))
    draw.rectangle([330, 200, 440, 300], (190, 90, 60))
    draw.polygon([(315, 200), (385, 145), (455, 200)], (120, 40, 40))
    draw.rectangle([372, 245, 400, 300], (70, 40, 25))
    draw.rectangle([340, 215, 364, 239], (250, 240, 170))
    draw.rectangle([92, 260, 106, 330], (95, 60, 35))
    draw.ellipse([60, 195, 140, 280], (40, 110, 45))
    for x in range(8, width, 23):
        draw.line([(x, 345), (x + 4, 325), (x + 8, 345)], (50, 100, 30), 2)
    return image


if __name__ == "__main__":
    main()
