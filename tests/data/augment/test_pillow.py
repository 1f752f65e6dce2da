"""What a plan's names do to pixels: against Pillow, torchvision, timm or a few naive lines."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.random import MT19937, Generator
from PIL import Image, ImageEnhance, ImageOps

from data.augment import pillow, shift
from data.augment.pillow import EFFECTS, RESAMPLING
from data.augment.plan import Crop, Effect, Erasure, Plan, Shift
from data.augment.randaugment import augment_from_policy
from data.augment.rng import choice, gauss, generator, uniform

BICUBIC, BILINEAR = RESAMPLING["bicubic"], RESAMPLING["bilinear"]
FILL = (124, 116, 104)


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and grain."""
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), BICUBIC)).astype(int)
    pixels = smooth + rng.integers(-20, 21, (height, width, 3))
    pixels[height // 3 :, : width // 4] = (250, 3, 120)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def equal(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def done(image: Image.Image, name: str, argument: float = 0.0, filter: str = "") -> Image.Image:
    """The image after one effect."""
    return EFFECTS[name](image, Effect(name, argument, filter), FILL)


def test_crop_resizes_the_width_first_then_the_height():
    image = picture(200, 90)
    found = pillow.cropped(image, Crop(3, 5, 120, 31, "bicubic"), 32)
    cut = image.crop((3, 5, 123, 36))
    assert equal(found, cut.resize((32, 31), BICUBIC).resize((32, 32), BICUBIC))
    height_first = cut.resize((120, 32), BICUBIC).resize((32, 32), BICUBIC)
    assert not equal(found, height_first)  # the order is visible


def test_crop_of_one_pixel_works():
    image = Image.new("RGB", (1, 1), (10, 20, 30))
    found = pillow.cropped(image, Crop(0, 0, 1, 1, "bicubic"), 32)
    assert found.getcolors() == [(1024, (10, 20, 30))]


@pytest.mark.parametrize(("left", "top"), [(4, -4), (-4, 4), (-2, 0)])
def test_small_images_are_shifted_over_black(left, top):
    image = picture(32, 32)
    padded = Image.new("RGB", (40, 40))
    padded.paste(image, (4, 4))
    expected = padded.crop((left + 4, top + 4, left + 36, top + 36))
    assert equal(pillow.cropped(image, Shift(left, top, "bicubic"), 32), expected)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_small_images_of_another_size_are_resized_first(filter):
    image = picture(50, 37)
    expected = pillow.resize(image, 32, RESAMPLING[filter])
    assert equal(pillow.cropped(image, Shift(0, 0, filter), 32), expected)


@pytest.mark.parametrize(
    ("axis", "mirror"), [("horizontal", ImageOps.mirror), ("vertical", ImageOps.flip)]
)
def test_flips(axis, mirror):
    image = picture(40, 40)
    plan = Plan(40, Shift(0, 0, "bicubic"), (axis,), (), ())
    plain = (0.0,) * 3, (1.0,) * 3
    expected = pillow.to_float(mirror(image), *plain)
    assert torch.equal(pillow.apply(plan, image, FILL, *plain), expected)


@pytest.mark.parametrize(
    "statistics",
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0, 0.5, 1.0), (1.0, 0.5, 0.1))],
)
def test_to_float_equals_torchvisions_bits(statistics):
    functional = pytest.importorskip("torchvision.transforms.functional")
    values = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    cut = picture(41, 29).crop((3, 2, 30, 25))
    for image in (picture(), picture(1, 1), Image.fromarray(values), cut):
        tensor = pillow.to_float(image, *statistics)
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert torch.equal(tensor, functional.normalize(functional.to_tensor(image), *statistics))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_boxes_hold_their_seeds_noise(mode):
    image = picture(32, 32)
    erasures = (Erasure(2, 3, 5, 7, mode, 11), Erasure(4, 4, 20, 9, mode, 12))
    plan = Plan(32, Shift(0, 0, "bicubic"), (), (), erasures)
    found = pillow.apply(plan, image, FILL, (0.5,) * 3, (0.5,) * 3).numpy()
    expected = pillow.to_float(image, (0.5,) * 3, (0.5,) * 3).numpy().copy()
    for top, left, height, width, _, seed in erasures:
        shape = (3, height, width) if mode == "pixel" else (3, 1, 1)
        noise = Generator(MT19937(seed)).normal(size=shape).astype(np.float32)
        expected[:, top : top + height, left : left + width] = 0 if mode == "const" else noise
    assert np.array_equal(found, expected)


# ---- shears and translations


@pytest.mark.parametrize("filter", [BICUBIC, BILINEAR])
@pytest.mark.parametrize("size", [(64, 64), (33, 17), (3, 40), (1, 1), (130, 130)])
def test_shears_and_translations_equal_pillows_bits(filter, size):
    image, (width, height) = picture(*size), size
    rng = generator(3)
    for case in range(60):
        strength = uniform(rng, -0.9, 0.9)
        if case % 5 == 0:
            strength = float(round(uniform(rng, -3, 3), 1))
        x, y = strength * width, strength * height
        for move, argument, matrix in (
            (shift.shear_x, strength, (1, strength, 0, 0, 1, 0)),
            (shift.shear_y, strength, (1, 0, 0, strength, 1, 0)),
            (shift.translate_x, x, (1, 0, x, 0, 1, 0)),
            (shift.translate_y, y, (1, 0, 0, 0, 1, y)),
        ):
            affine = Image.Transform.AFFINE
            expected = image.transform(size, affine, matrix, resample=filter, fillcolor=FILL)
            assert equal(move(image, argument, filter, FILL), expected), (move.__name__, argument)


def test_a_shear_that_rounding_breaks_up_is_left_to_pillow():
    # It moves the first columns to the pixel before, and rounds to nothing in the last.
    image, factor = picture(130, 8), -1e-15
    assert shift._bicubic_rows(image, factor * (np.arange(8) + 0.5), FILL) is None
    affine, matrix = Image.Transform.AFFINE, (1, factor, 0, 0, 1, 0)
    expected = image.transform(image.size, affine, matrix, resample=BICUBIC, fillcolor=FILL)
    assert equal(shift.shear_x(image, factor, BICUBIC, FILL), expected)


# ---- effects


@pytest.mark.parametrize("bits", range(1, 8))
def test_posterize_equals_pillows(bits):
    assert equal(done(picture(), "Posterize", bits), ImageOps.posterize(picture(), bits))


@pytest.mark.parametrize("threshold", [0, 1, 100, 255, 256])
def test_solarize_equals_pillows(threshold):
    assert equal(done(picture(), "Solarize", threshold), ImageOps.solarize(picture(), threshold))


@pytest.mark.parametrize(
    ("name", "argument", "theirs"),
    [
        ("Invert", 0.0, ImageOps.invert),
        ("Solarize", -20, ImageOps.invert),
        ("AutoContrast", 0.0, ImageOps.autocontrast),
        ("Equalize", 0.0, ImageOps.equalize),
        ("Color", 1.3, lambda image: ImageEnhance.Color(image).enhance(1.3)),
        ("Contrast", 0.1, lambda image: ImageEnhance.Contrast(image).enhance(0.1)),
        ("Brightness", 1.9, lambda image: ImageEnhance.Brightness(image).enhance(1.9)),
        ("Sharpness", 1.9, lambda image: ImageEnhance.Sharpness(image).enhance(1.9)),
        ("Posterize", 8, lambda image: image),
        ("Posterize", 11, lambda image: image),
        ("Posterize", 0, lambda image: Image.new("RGB", image.size)),  # no bits left: black
        ("Posterize", -3, lambda image: Image.new("RGB", image.size)),
    ],
)
def test_effects_equal_pillows_own(name, argument, theirs):
    assert equal(done(picture(), name, argument), theirs(picture()))


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_rotation_takes_filter_and_fill(filter):
    expected = picture().rotate(-12.5, RESAMPLING[filter], fillcolor=FILL)
    assert equal(done(picture(), "Rotate", -12.5, filter), expected)


def test_solarize_add_changes_dark_pixels_only():
    pixels = np.asarray(picture()).astype(int)
    expected = np.where(pixels < 128, np.minimum(pixels + 200, 255), pixels).astype(np.uint8)
    assert np.array_equal(np.asarray(done(picture(), "SolarizeAdd", 200)), expected)


POLICIES = "rand-m9-mstd0.5-inc1 rand-m9-mstd0.5 rand-m7-n3 rand rand-m5-mstd101 rand-inc1-m10"
POLICIES += " original v0 v0-mstd0.5"


@pytest.mark.parametrize("policy", POLICIES.split())
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_policies_equal_timms_under_the_same_draws(policy, interpolation, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    parameters = {"img_mean": FILL, "translate_const": 100}
    if interpolation != "random":
        parameters["interpolation"] = BICUBIC
    make = timm.rand_augment_transform if policy.startswith("rand") else timm.auto_augment_transform
    transform, op, image = (
        make(policy, parameters),
        augment_from_policy(policy, interpolation),
        None,
    )
    image = picture(48, 36)
    refused = 0
    for seed in range(120):
        theirs, ours = generator(seed), generator(seed)
        with monkeypatch.context() as patch:
            patch.setattr(timm, "random", random_module(theirs))
            patch.setattr(timm, "np", SimpleNamespace(random=theirs))
            try:
                expected = transform(image)
            except ValueError:  # Pillow 13 does not posterize to 0 bits
                refused += 1
                continue
        found = image
        for effect in op.draw(ours):
            found = EFFECTS[effect.name](found, effect, FILL)
        assert equal(found, expected), seed
        assert ours.random() == theirs.random()
    assert refused < 30


def random_module(rng: Generator) -> SimpleNamespace:
    """The parts of Python's random that timm uses, drawn from a numpy generator by our rules."""
    return SimpleNamespace(
        random=rng.random,
        uniform=lambda low, high: uniform(rng, low, high),
        gauss=lambda mean, std: gauss(rng, mean, std),
        choice=lambda items: choice(rng, items),
    )
