"""The contact sheet shows what the decoder makes of a picture, with the plan that belongs to it."""

import numpy as np
import pytest
import torch
from PIL import Image

from configs import load_config
from data.augment import AugmentDecoder
from data.augment.pillow import to_float
from tools import replay_sheet
from tools.replay_sheet import Tile, draw, folded, landscape, seeds_of, tiles_of, visible


def decoder(*opts: str) -> AugmentDecoder:
    return AugmentDecoder.from_config(load_config(["--opts", "DATA.IMG_SIZE", "64", *opts]))


def picture(width: int, height: int) -> Image.Image:
    return landscape().resize((width, height))


def test_tiles_are_the_decoders_images_and_plans():
    ours, image = decoder(), picture(120, 90)
    original, *tiles = tiles_of(ours, [image], [3, 2**31 - 1], pairs=False)
    assert original.title == "the picture" and original.picture is image
    assert [tile.title for tile in tiles] == ["seed 3", "seed 2147483647"]
    for tile, seed in zip(tiles, (3, 2**31 - 1)):
        assert "; ".join(tile.words) == str(ours.plan(120, 90, seed))
        assert tile.picture.tobytes() == visible(ours, ours.decode(image, seed)).tobytes()


def test_visible_takes_the_normalisation_back():
    ours, image = decoder(), picture(50, 40)
    tensor = to_float(image, ours.mean, ours.std)
    assert visible(ours, tensor).tobytes() == image.tobytes()
    assert visible(ours, torch.full((3, 2, 2), 99.0)).getcolors() == [(4, (255, 255, 255))]


def test_pairs_are_mixed_as_in_training():
    ours, seeds = decoder("AUG.MIXUP_MODE", "pair2"), [11, 22, 33, 45]
    images = [picture(120, 90), picture(80, 80)]
    tiles = tiles_of(ours, images, seeds, pairs=True)
    titles = ["seed 11", "seed 22", "seed 11, mixed", "seed 22, mixed"]
    assert [tile.title for tile in tiles[:4]] == titles and len(tiles) == 8
    decoded = torch.stack([ours.decode(images[i % 2], seed) for i, seed in enumerate(seeds)])
    mixed, _ = ours.mix(decoded, None, seeds)
    shown = [tiles[i].picture.tobytes() for i in (2, 3, 6, 7)]
    assert shown == [visible(ours, tensor).tobytes() for tensor in mixed]
    drawn = ours.mix.draw(seeds, 64, 64)
    assert [tiles[i].words for i in (2, 6)] == [[str(mix)] for mix in drawn]


@pytest.mark.parametrize("arguments", [["--seeds", "0-2,9"], ["--pairs", "--seeds", "1,4"]])
def test_the_program_writes_a_sheet(arguments, tmp_path, capsys):
    picture(100, 80).save(tmp_path / "one.png")
    files = ["--image", str(tmp_path / "one.png"), "-o", str(tmp_path / "sheet.png")]
    replay_sheet.main([*files, *arguments, "--opts", "DATA.IMG_SIZE", "64"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 800 and np.asarray(sheet).std() > 10
    assert "sheet.png" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "size"), [(1, (270, 432)), (3, (810, 432)), (5, (1080, 792))])
def test_a_sheet_is_as_large_as_its_tiles(count, size, tmp_path):
    """Whatever their names hold: signs of formulas, bytes that are no text."""
    tile = Tile(picture(40, 30), "a$b", ["class$1/$2.jpg", "\udcff.png"])
    draw([tile] * count, "few", str(tmp_path / "sheet.png"), 4.0)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == size


def test_long_names_are_cut_between_their_parts():
    names = ["n02037110/ILSVRC2012_val_00029089.JPEG", "2021_summer/IMG_20210304_123456_HDR.jpeg"]
    assert folded(names, 24).split("\n") == [
        "n02037110/ILSVRC2012_",
        "  val_00029089.JPEG",
        "2021_summer/IMG_",
        "  20210304_123456_HDR.jpeg",
    ]
    assert folded(["x" * 50, "", "\udcff"], 24) == f"{'x' * 24}\n  {'x' * 24}\n  xx\n\n\\udcff"


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
        (["--image", "nowhere.jpg"], "No such file or directory: 'nowhere.jpg'"),
        (["--image", __file__], "test_replay_sheet.py: can't be decoded (it is no JPEG"),
        (["--pairs", "--seeds", "0-2"], "--pairs needs an even number of seeds, these are 3"),
        (["--pairs", "--opts", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"], "this recipe mixes nothing"),
        (["--opts", "AUG.REPROBE", "1"], "did you mean AUG.REPROB"),
        (["-o", "no/such/folder/sheet.png"], "no/such/folder/sheet.png"),
    ],
)
def test_faults_are_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        replay_sheet.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|"))


def test_one_picture_too_many():
    with pytest.raises(ValueError, match="2 pictures: give one, or two with --pairs"):
        tiles_of(decoder(), [picture(20, 20)] * 2, [1], pairs=False)
