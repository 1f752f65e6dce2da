"""The contact sheet shows what the decoder makes of a picture, with words that belong to it."""

import numpy as np
import pytest
import torch
from PIL import Image

from configs import load_config
from data.augment.decoder import AugmentDecoder
from data.augment.ops import ToTensor
from data.augment.pairs import PairMix
from tools import replay_sheet
from tools.replay_sheet import (
    GAP,
    SIDE,
    Tile,
    arrange,
    draw_sheet,
    fit,
    font,
    landscape,
    seed_tiles,
    seeds_of,
    visible,
    wrap,
)


def picture(width: int, height: int) -> Image.Image:
    return landscape().resize((width, height))


def options(*opts: object) -> list[str]:
    return ["--opts", "DATA.IMG_SIZE", "64", *map(str, opts)]


def test_tiles_are_the_decoders_images_and_words():
    cfg = load_config(options())
    decoder, image = AugmentDecoder.from_config(cfg), picture(120, 90)
    original, *tiles = seed_tiles(cfg, decoder, image, [3, 2**31 - 1])
    assert original.title == "the picture" and original.words == ["120 x 90 pixels"]
    assert [tile.title for tile in tiles] == ["seed 3", "seed 2147483647"]
    for tile, seed in zip(tiles, (3, 2**31 - 1)):
        assert tile.words == decoder.describe(image, seed)
        assert tile.picture.tobytes() == fit(visible(cfg, decoder.decode(image, seed))).tobytes()


def test_visible_takes_the_normalisation_back():
    cfg, image = load_config([]), picture(50, 40)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert visible(cfg, ToTensor(mean, std)(image)).tobytes() == image.tobytes()
    assert visible(cfg, torch.full((3, 2, 2), 99.0)).getcolors() == [(4, (255, 255, 255))]


def test_pairs_are_mixed_as_in_training(tmp_path):
    cfg = load_config([*options(), "--opts", "AUG.MIXUP_MODE", "pair2"])
    decoder, images, seeds = (
        AugmentDecoder.from_config(cfg),
        [picture(120, 90), picture(80, 80)],
        [11, 22, 33, 45],
    )
    tiles = replay_sheet.pair_tiles(cfg, decoder, images, seeds)
    assert [tile.title for tile in tiles[:4]] == [
        "seed 11",
        "seed 22",
        "seed 11, mixed",
        "seed 22, mixed",
    ] and len(tiles) == 8
    mix = PairMix.from_config(cfg)
    decoded = torch.stack([decoder.decode(images[i % 2], seed) for i, seed in enumerate(seeds)])
    mixed, _ = mix(decoded, None, seeds)
    shown = [tiles[i].picture.tobytes() for i in (2, 3, 6, 7)]
    assert shown == [fit(visible(cfg, tensor)).tobytes() for tensor in mixed]
    assert [tiles[i].words for i in (2, 6)] == [[str(drawn)] for drawn in mix.draw(seeds, 64, 64)]


def test_the_program_writes_a_sheet(tmp_path, capsys):
    picture(100, 80).save(tmp_path / "one.png")
    for name, arguments in (("seeds.png", ["--seeds", "0-2,9"]), ("pairs.png", ["--pairs"])):
        replay_sheet.main(
            [
                "--image",
                str(tmp_path / "one.png"),
                *arguments,
                "-o",
                str(tmp_path / name),
                *options(),
            ]
        )
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width >= 4 * SIDE and np.asarray(sheet).std() > 10
        assert name in capsys.readouterr().out


def test_no_text_reaches_into_a_tile_or_its_neighbour():
    """With black pictures of one colour, the band of each picture holds nothing else, and the gaps
    between columns are empty.
    """
    words = [
        "a rather long line of words that has to be broken more than once to fit beneath a tile",
        "short",
        "third",
    ]
    tiles = [
        Tile(Image.new("RGB", (SIDE, SIDE), (255, 0, 0)), f"seed {2**31 - 1 - i}", words[: i % 4])
        for i in range(7)
    ]
    pixels = np.asarray(arrange("title", ["Recipe(of=1, some=2, length=3)" * 9], tiles)).astype(int)
    is_red = (pixels == (255, 0, 0)).all(-1)
    assert is_red.sum() == 7 * SIDE * SIDE  # no tile is overwritten
    top = np.flatnonzero(is_red.any(1))[0]
    for column in range(1, 4):
        left = GAP + column * (SIDE + GAP)
        assert (pixels[top:, left - GAP : left] == 255).all()
    assert (pixels[-GAP // 2 :] == 255).all()  # the last line of text is not cut off


def test_wrap_breaks_at_spaces_and_loses_nothing():
    text = "translate x by -0.40 of the width and quite a few words more"
    lines = wrap(text, 150, indent="  ")
    assert len(lines) > 1 and " ".join(line.strip() for line in lines) == text
    assert all(font().getlength(line) <= 150 for line in lines)
    assert wrap("short", 150) == ["short"]
    assert wrap("unbreakablyunbreakablyunbreakably long", 50) == [
        "unbreakablyunbreakablyunbreakably",
        "long",
    ]


def test_fit_keeps_the_aspect():
    assert fit(Image.new("RGB", (1000, 10), (0, 0, 255))).size == (SIDE, SIDE)
    pixels = np.asarray(fit(Image.new("RGB", (100, 50), (0, 0, 255))))
    assert (pixels == (0, 0, 255)).all(-1).sum() == SIDE * SIDE // 2


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("5", [5]), ("0-3,8", [0, 1, 2, 3, 8]), ("7, 7", [7, 7]), ("2147483647", [2**31 - 1])],
)
def test_lists_of_seeds(text, seeds):
    assert seeds_of(text, False) == seeds


def test_seeds_that_nobody_chose():
    assert seeds_of(None, False) == list(range(16))
    pairs = seeds_of(None, True)
    # each pair draws its own
    assert len(pairs) == 8 and len({a ^ b for a, b in zip(pairs[::2], pairs[1::2])}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "5-"], "--seeds 5-: write a range such as 0-15"),
        (["--seeds", "9-3"], "--seeds 9-3: write a range"),
        (["--seeds", "-1"], "--seeds -1: write a range|expected one argument"),
        (["--seeds", "0-1000000000"], "too many for one sheet, ask for 400 at most"),
        (["--seeds", "2147483648"], "seed 2147483648 is out of range"),
        (["--image", "nowhere.jpg"], "--image nowhere.jpg: no such file"),
        (["--image", __file__], "test_replay_sheet.py: cannot be read as a picture"),
        (["--pairs", "--seeds", "0-2"], "--pairs needs an even number of seeds, these are 3"),
        (["--pairs", "--opts", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"], "this recipe mixes nothing"),
        (["--opts", "AUG.REPROBE", "1"], "did you mean AUG.REPROB"),
        (["-o", "no/such/folder/sheet.png"], "no/such/folder/sheet.png"),
    ],
)
def test_faults_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        replay_sheet.main(
            [
                *(
                    ["--seeds", "1"]
                    if "--seeds" not in arguments and "--pairs" not in arguments
                    else []
                ),
                *arguments,
            ]
        )
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|"))


def test_one_picture_too_many():
    with pytest.raises(ValueError, match="2 pictures: give one, or two with --pairs"):
        draw_sheet(load_config(options()), [picture(20, 20)] * 2, [1], False, "")
