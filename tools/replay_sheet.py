"""A contact sheet: what a recipe makes of one picture under many seeds, each with what was drawn in
words.

    python -m tools.replay_sheet --cfg configs/1k/tiny_vit_21m.yaml --image cat.jpg --seeds 0-15 -o sheet.png
    python -m tools.replay_sheet --cfg configs/1k_distill/tiny_vit_5m_1k_distill.yaml --pairs -o pairs.png
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs import load_config
from data.augment.decoder import AugmentDecoder, mean_and_std
from data.augment.rng import sample_seed

SIDE = 224  # pixels of a tile
GAP = 16
MOST = 400  # seeds on one sheet
LINE = 17  # pixels from one line of text to the next
INK, PALE, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)


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
    parser.add_argument(
        "--cfg",
        metavar="FILE",
        help="recipe (YAML); without one the defaults, the recipe of ImageNet from scratch",
    )
    parser.add_argument(
        "--opts",
        metavar="KEY VALUE",
        nargs="*",
        default=[],
        help="set any key of the recipe, e.g. --opts AUG.REPROB 1.0",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        nargs="*",
        default=[],
        help="picture (with --pairs up to two); else a drawn one",
    )
    parser.add_argument(
        "--seeds",
        metavar="LIST",
        help="e.g. 0-15 or 3,5,9 (default 0-15; with --pairs, the first eight seeds of a run)",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="mix neighbours of the list of seeds as they are mixed in distillation",
    )
    parser.add_argument(
        "-o",
        "--output",
        default="replay_sheet.png",
        metavar="FILE",
        help="default replay_sheet.png",
    )
    args = parser.parse_args(argv)
    try:
        opts = [*args.opts, *(["AUG.MIXUP_MODE", "pair2"] if args.pairs else [])]
        cfg = load_config(
            [*(["--cfg", args.cfg] if args.cfg else []), *(["--opts", *opts] if opts else [])]
        )
        images = [open_image(name) for name in args.image] or [landscape()]
        title = ", ".join([Path(name).name for name in args.image] or ["a drawn picture"])
        sheet = draw_sheet(cfg, images, seeds_of(args.seeds, args.pairs), args.pairs, title)
        sheet.save(args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.output}: {sheet.width} x {sheet.height} pixels")


def draw_sheet(
    cfg, images: Sequence[Image.Image], seeds: Sequence[int], pairs: bool, title: str
) -> Image.Image:
    """The sheet of one picture under seeds, or of one or two pictures mixed in pairs."""
    decoder = AugmentDecoder.from_config(cfg)
    if len(images) > (2 if pairs else 1):
        raise ValueError(
            f"{len(images)} pictures: give {'one or two' if pairs else 'one, or two with --pairs'}"
        )
    tiles = (
        pair_tiles(cfg, decoder, images, seeds)
        if pairs
        else seed_tiles(cfg, decoder, images[0], seeds)
    )
    recipe = repr(decoder).splitlines()[1:-1]
    return arrange(
        f"{title}: {'pairs of seeds' if pairs else 'seeds'}",
        [line.strip().rstrip(",") for line in recipe],
        tiles,
    )


def seed_tiles(
    cfg, decoder: AugmentDecoder, image: Image.Image, seeds: Sequence[int]
) -> list[Tile]:
    """The picture itself, then one tile per seed."""
    original = Tile(fit(image), "the picture", [f"{image.width} x {image.height} pixels"])
    return [original, *(decoded_tile(cfg, decoder, image, seed) for seed in seeds)]


def pair_tiles(
    cfg, decoder: AugmentDecoder, images: Sequence[Image.Image], seeds: Sequence[int]
) -> list[Tile]:
    """Four tiles per pair of seeds: both decoded images, then both as the model sees them, mixed."""
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
        decoded = torch.stack(
            [decoder.decode(image, seed) for image, seed in zip((images[0], images[-1]), pair)]
        )
        mixed, _ = mix(decoded, None, pair)
        drawn = str(mix.draw(pair, *decoded.shape[-2:])[0])
        tiles += [
            decoded_tile(cfg, decoder, image, seed)
            for image, seed in zip((images[0], images[-1]), pair)
        ]
        tiles += [
            Tile(fit(visible(cfg, tensor)), f"seed {seed}, mixed", [drawn])
            for tensor, seed in zip(mixed, pair)
        ]
    return tiles


def decoded_tile(cfg, decoder: AugmentDecoder, image: Image.Image, seed: int) -> Tile:
    """A picture under a seed."""
    return Tile(
        fit(visible(cfg, decoder.decode(image, seed))),
        f"seed {seed}",
        decoder.describe(image, seed),
    )


def visible(cfg, tensor: Tensor) -> Image.Image:
    """A normalised tensor as a picture; what lies outside black and white, such as erased noise, is
    clipped.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in mean_and_std(cfg))
    values = (tensor * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def fit(picture: Image.Image) -> Image.Image:
    """The picture in a square of SIDE pixels: small ones with visible pixels, others shrunk."""
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    filter = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (SIDE, SIDE), (235, 235, 235))
    square.paste(
        picture.convert("RGB").resize(size, filter), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2)
    )
    return square


def arrange(title: str, recipe: Sequence[str], tiles: Sequence[Tile]) -> Image.Image:
    """The tiles in rows under a title and the recipe; every row is as high as its longest text."""
    columns = min(len(tiles), 4 if len(tiles) <= 16 or len(tiles) % 4 == 0 else 6)
    width = max(columns, 3) * (SIDE + GAP) + GAP
    heading = [line for text in recipe for line in wrap(text, width - 2 * GAP, indent="    ")]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    texts = [
        [[line for word in tile.words for line in wrap(word, SIDE, indent="  ")] for tile in row]
        for row in rows
    ]
    heights = [SIDE + LINE * (1 + max(map(len, text))) + GAP for text in texts]
    top = 2 * GAP + 30 + LINE * len(heading)
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, font(20, bold=True))
    for number, line in enumerate(heading):
        draw.text((GAP, GAP + 30 + LINE * number), line, PALE, font())
    for row, text, height in zip(rows, texts, heights):
        for column, (tile, lines) in enumerate(zip(row, text)):
            left = GAP + column * (SIDE + GAP)
            sheet.paste(tile.picture, (left, top))
            draw.text((left, top + SIDE + 2), tile.title, INK, font(bold=True))
            for number, line in enumerate(lines, start=1):
                draw.text((left, top + SIDE + 2 + LINE * number), line, INK, font())
        top += height
    return sheet


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces; all but the first begin with
    `indent`.
    """
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font().getlength(longer) > width:
            lines.append(indent + word)
        else:
            lines[-1:] = [longer]
    return lines


@lru_cache
def font(size: int = 13, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along: the same on every machine."""
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts/ttf", f"DejaVuSans{'-Bold' * bold}.ttf")), size
    )


def open_image(name: str) -> Image.Image:
    """A picture in RGB."""
    try:
        return Image.open(name).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"--image {name}: no such file") from None
    except OSError as error:
        raise ValueError(f"--image {name}: cannot be read as a picture ({error})") from None


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
    """A picture in which a crop, a mirror image, a tilt and a change of colours are seen at once."""
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
