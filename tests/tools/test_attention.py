"""What tools/attention.py shows is the attention that the model computes."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from configs import dump, load_config
from models.tiny_vit import TinyViT
from tools.attention import attentions, draw, main

# For images of 96 pixels maps of 12, 6 and 3 points a side: in whole windows, padded, one window.
SHAPE = {
    "img_size": 96,
    "num_classes": 5,
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "window_sizes": (4, 4, 4, 3),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = TinyViT(**SHAPE).eval().requires_grad_(False)
    for name, value in made.named_parameters():
        if "attn" in name:  # far from even attention
            value.normal_(std=0.7)
    return made


@pytest.fixture(scope="module")
def image():
    return torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(1))


def by_hand(block, map_, row: int, column: int) -> np.ndarray:
    """What a point of a map [C, H, W] looks at, head by head: [heads, H, W], in float64."""
    attn, window = block.attn, block.window
    weights = {key: value.double().numpy() for key, value in attn.state_dict().items()}
    map_ = map_.double().numpy()
    dim, height, width = map_.shape
    share = dim // attn.num_heads

    def parts(y: int, x: int) -> np.ndarray:
        """Query, key and value of each head: [heads, 3, share]."""
        values = map_[:, y, x] if y < height and x < width else np.zeros(dim)
        values = (values - values.mean()) / np.sqrt(values.var() + attn.norm.eps)
        values = values * weights["norm.weight"] + weights["norm.bias"]
        values = weights["qkv.weight"] @ values + weights["qkv.bias"]
        return values.reshape(attn.num_heads, 3, share)

    top, left = row // window * window, column // window * window
    looks = np.zeros((attn.num_heads, height + window, width + window))
    for head in range(attn.num_heads):
        query = parts(row, column)[head, 0]
        for y in range(top, top + window):
            for x in range(left, left + window):
                offset = abs(y - row) * window + abs(x - column)
                score = query @ parts(y, x)[head, 1] / share**0.5
                looks[head, y, x] = np.exp(score + weights["attention_biases"][head, offset])
        looks[head] /= looks[head].sum()
    return looks[:, :height, :width]


@pytest.mark.parametrize(("name", "is_padded"), [("1.0", False), ("2.0", True), ("3.0", False)])
def test_attention_is_as_computed_by_hand(model, image, name, is_padded):
    stage = int(name[0])
    with torch.inference_mode():
        maps = model.forward_intermediates(image[None], intermediates_only=True)
        before = model.layers[stage - 1].downsample(maps[stage - 1])[0].clone()
    found = attentions(model, image)[name]
    height, width = found.size
    total = np.zeros((model.layers[stage].blocks[0].attn.num_heads, height, width))
    lost = 0.0
    for row in range(height):
        for column in range(width):
            expected = by_hand(model.layers[stage].blocks[0], before, row, column)
            total += expected
            lost = max(lost, 1 - expected.sum((1, 2)).min())
            if (row + column) % 4 == 0:
                asked = torch.zeros(height, width)
                asked[row, column] = 1
                np.testing.assert_allclose(found.given(asked), expected, atol=2e-6)
    np.testing.assert_allclose(found.given(torch.ones(height, width)), total, atol=2e-5)
    assert (lost > 0.05) == is_padded  # a padded window's zeros are looked at as well
    assert found.probs.max() > 0.5


def test_looking_changes_nothing(model, image):
    before = model(image[None])
    assert list(attentions(model, image)) == ["1.0", "2.0", "2.1", "3.0"]
    assert torch.equal(model(image[None]), before)
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_point_lies_in_its_cell(model, image):
    found = {"2.0": attentions(model, image)["2.0"]}  # 6 points a side, 4 a window
    picture = Image.fromarray(np.zeros((96, 96, 3), np.uint8))
    for point, cell in (((0.0, 0.0), (0, 0)), ((1.0, 0.4), (2, 5))):
        _, mean, head, *_ = draw(picture, found, [1], [point]).axes
        asked = torch.zeros(6, 6)
        asked[cell] = 1
        maps = found["2.0"].given(asked)
        assert np.array_equal(mean.images[1].get_array(), maps.mean(0))
        assert np.array_equal(head.images[1].get_array(), maps[1])
        assert (head.lines[0].get_xdata()[0], head.lines[0].get_ydata()[0]) == (
            cell[1] + 0.5,
            cell[0] + 0.5,
        )


@pytest.fixture
def place(model, tmp_path, monkeypatch):
    """A folder with weights, a photo, and what is neither."""
    monkeypatch.chdir(tmp_path)
    torch.save(model.state_dict(), "weights.pth")
    state = timm.create_model("test_byobnet", num_classes=3).state_dict()
    torch.save(state, "timm.pth")
    opts = "MODEL.TYPE timm MODEL.NAME test_byobnet MODEL.NUM_CLASSES 3".split()
    torch.save({"model": state, "config": dump(load_config(["--opts", *opts]))}, "own.pth")
    pixels = np.random.default_rng(0).integers(0, 255, (100, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "blocks", "size"),
    [
        ("", "1.0, 2.1, 3.0", (6, 3)),
        ("--blocks 2 --heads 1 --point 0.5 0.5 --point 1 0", "2.0, 2.1", (3, 4)),
    ],
)
def test_a_grid_is_drawn(words, blocks, size, place, capsys):
    assert main(["photo.png", "--weights", "weights.pth", "-o", "out.png", *words.split()]) == 0
    assert capsys.readouterr().out == f"out.png: blocks {blocks}\n"
    columns, rows = size
    width, height = Image.open("out.png").size
    assert width == 220 * columns + 66 and height == round(247.5 * rows)


def test_captions_and_colours_tell_small_shares_apart(model, image):
    """Colours begin at nothing, so that nearly even attention does not look like the opposite."""
    found = {"1.0": attentions(model, image)["1.0"]}  # 12 points a side, 4 a window
    picture = Image.new("RGB", (96, 96))
    for points, form in (([], "{:.3g}"), ([(0.5, 0.5)], "{:.2%}")):
        _, mean, *_, scale = draw(picture, found, [], points).axes
        drawn = mean.images[1]
        most = drawn.get_array().max()
        assert mean.get_title() == f"mean: max {form.format(most)}"
        assert (drawn.norm.vmin, drawn.norm.vmax) == (0, most)
        assert [text.get_text() for text in scale.get_yticklabels()] == ["0", "max"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("photo.png --blocks 0", "no stage or block with attention: there are 1.0, 2.0, 2.1, 3.0"),
        ("photo.png --blocks 2.2", "--blocks 2.2: no stage or block"),
        ("photo.png --blocks 1 --heads 2", "--heads 2: block 1.0 has heads 0 to 1"),
        ("photo.png --blocks 2 --heads 0 3", "--heads 3: block 2.0 has heads 0 to 2"),
        ("photo.png --point 0.5 1.5", "--point 0.5 1.5: expected numbers from 0 to 1"),
        ("text.png", "text.png: can't be decoded"),
        ("none.png", "none.png"),
        ("photo.png --image-size 8", "32 a side is the least"),
        ("photo.png -o no/such/folder.png", "no/such/folder.png"),
        ("photo.png --weights timm.pth", "timm.pth: these are not the weights of a TinyViT"),
        ("photo.png --weights own.pth", "own.pth: a ByobNet, which is no TinyViT"),
    ],
)
def test_faults_are_one_line(words, text, place, capsys):
    assert main(["--weights", "weights.pth", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error
