"""Every augmentation against Pillow, torchvision, timm or a few naive lines, and the order of its
draws.
"""

import pickle
from dataclasses import FrozenInstanceError
from math import exp, inf, log, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.random import MT19937, Generator
from PIL import Image, ImageEnhance, ImageOps

from data.augment import randaugment, shift
from data.augment.ops import (
    ColorJitter,
    Flip,
    PaddedCrop,
    RandomErasing,
    RandomResizedCrop,
    ToTensor,
    resize,
)
from data.augment.randaugment import (
    EFFECTS,
    POLICIES,
    RAND_EFFECTS,
    RAND_WEIGHTS,
    AutoAugment,
    RandAugment,
    augment_from_policy,
)
from data.augment.rng import choice, gauss, generator, uniform

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
FILL = (124, 116, 104)


class Draws:
    """A generator that gives listed numbers; random() and normal() take the next, choice() the next
    list. It notes who asked.
    """

    def __init__(self, *numbers) -> None:
        self.numbers, self.asked = list(numbers), []

    def _next(self, name: str):
        self.asked.append(name)
        return self.numbers.pop(0)

    def random(self) -> float:
        return self._next("random")

    def normal(self, mean: float, std: float) -> float:
        return mean + std * self._next("normal")

    def choice(self, count: int, size: int, replace: bool, p=None) -> list[int]:
        return self._next("choice")


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and grain."""
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)).resize(
        (width, height), BICUBIC
    )
    pixels = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3))
    pixels[height // 3 :, : width // 4] = (250, 3, 120)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def equal(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def words(op, image, rng) -> list[str]:
    told: list[str] = []
    op(image, rng, lambda text, *values: told.append(text % values))
    return told


# ---------------------------------------------------------------- crops and flips


def naive_box(width: int, height: int, numbers) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = (next(numbers) * (1.0 - 0.08) + 0.08) * (width * height)
        ratio = exp(next(numbers) * (log(4 / 3) - log(3 / 4)) + log(3 / 4))
        w, h = max(1, int(round(sqrt(area * ratio)))), max(1, int(round(sqrt(area / ratio))))
        if w <= width and h <= height:
            top = min(int(next(numbers) * (height - h + 1)), height - h)
            left = min(int(next(numbers) * (width - w + 1)), width - w)
            return left, top, w, h
    w, h = width, height
    if w / h < 3 / 4:
        h = max(1, int(round(w / (3 / 4))))
    if w / h > 4 / 3:
        w = max(1, int(round(h * (4 / 3))))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize(
    "size", [(500, 375), (64, 48), (300, 30), (20, 400), (7, 5), (2, 2), (1, 1), (1, 9)]
)
def test_crop_boxes_are_drawn_as_stated(size):
    for seed in range(60):
        rng = generator(seed)
        box = RandomResizedCrop(32).draw_box(*size, rng)
        numbers = iter(generator(seed).random, None)
        assert box == naive_box(*size, numbers)
        assert rng.random() == next(numbers)  # as many draws
        left, top, width, height = box
        assert (
            0 <= left <= left + width <= size[0]
            and 0 <= top <= top + height <= size[1]
            and width * height > 0
        )


def test_ten_failures_take_the_centre_without_a_draw():
    rng = Draws(*[1.0, 1.0] * 10)  # the whole area at 4:3 does not fit a strip
    assert RandomResizedCrop(32).draw_box(300, 30, rng) == (130, 0, 40, 30)
    assert rng.numbers == []
    assert RandomResizedCrop(32).draw_box(30, 300, Draws(*[1.0, 0.0] * 10)) == (0, 130, 30, 40)


def test_crop_resizes_the_width_first_then_the_height():
    image, op = picture(200, 90), RandomResizedCrop(32)
    for seed in range(20):
        left, top, width, height = op.draw_box(*image.size, generator(seed))
        cut = image.crop((left, top, left + width, top + height))
        assert equal(
            op(image, generator(seed)), cut.resize((32, height), BICUBIC).resize((32, 32), BICUBIC)
        )
    wide = picture(200, 31)
    height_first = wide.resize((200, 32), BICUBIC).resize((32, 32), BICUBIC)
    assert equal(
        resize(wide, (32, 32), BICUBIC), wide.resize((32, 31), BICUBIC).resize((32, 32), BICUBIC)
    )
    assert not equal(resize(wide, (32, 32), BICUBIC), height_first)  # the order is visible


def test_random_interpolation_is_drawn_after_the_box():
    image = picture(60, 60)
    cut = image.crop((0, 0, 60, 60))
    for u, filter in ((0.49, BILINEAR), (0.5, BICUBIC)):
        rng = Draws(1.0, 0.5, 0.0, 0.0, u)
        assert equal(
            RandomResizedCrop(32, interpolation="random")(image, rng), resize(cut, (32, 32), filter)
        )
        assert len(rng.asked) == 5


def test_crop_of_one_pixel_works():
    image = Image.new("RGB", (1, 1), (10, 20, 30))
    assert RandomResizedCrop(32)(image, generator(0)).getcolors() == [(1024, (10, 20, 30))]


def test_small_images_are_shifted_top_first_over_black():
    image = picture(32, 32)
    padded = Image.new("RGB", (40, 40))
    padded.paste(image, (4, 4))
    for u_top, u_left, top, left in ((0.0, 0.99, 0, 8), (0.99, 0.0, 8, 0), (0.5, 0.25, 4, 2)):
        rng = Draws(u_top, u_left)
        assert equal(PaddedCrop(32)(image, rng), padded.crop((left, top, left + 32, top + 32)))
        assert rng.asked == ["random"] * 2


def test_small_images_of_another_size_are_resized_first():
    image = picture(50, 37)
    centre = Draws(0.5, 0.5)
    assert equal(PaddedCrop(32)(image, centre), resize(image, (32, 32), BICUBIC))
    assert equal(
        PaddedCrop(32, interpolation="bilinear")(image, Draws(0.5, 0.5)),
        resize(image, (32, 32), BILINEAR),
    )
    assert equal(
        PaddedCrop(32, interpolation="random")(image, Draws(0.5, 0.5)),
        resize(image, (32, 32), BICUBIC),
    )


def test_small_crops_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    PaddedCrop(32)(picture(32, 32), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("axis", "mirror"), [("horizontal", ImageOps.mirror), ("vertical", ImageOps.flip)]
)
def test_flips(axis, mirror):
    image = picture()
    assert equal(Flip(axis, 0.3)(image, Draws(0.29)), mirror(image))
    assert equal(Flip(axis, 0.3)(image, Draws(0.3)), image)
    assert equal(Flip(axis, 1.0)(image, Draws(0.999)), mirror(image))
    assert equal(Flip(axis, 0.0)(image, Draws()), image)  # no draw


# ---------------------------------------------------------------- colour jitter, tensors, erasing


def test_color_jitter_draws_three_factors_then_their_order():
    image = picture()
    rng = Draws(0.0, 0.5, 1.0, 0.0, 0.0)
    low, high = 1.0 - 0.4, 1.0 + 0.4
    brightness, contrast, saturation = (u * (high - low) + low for u in (0.0, 0.5, 1.0))
    # (brightness, contrast, saturation): the last and the first change places, then the second and
    # the first
    expected = ImageEnhance.Contrast(image).enhance(contrast)
    expected = ImageEnhance.Color(expected).enhance(saturation)
    expected = ImageEnhance.Brightness(expected).enhance(brightness)
    assert equal(ColorJitter(0.4)(image, rng), expected)
    assert rng.numbers == []


def test_color_jitter_stays_at_zero_or_above():
    told = words(ColorJitter(1.5), picture(), Draws(0.0, 1.0, 0.0, 0.9, 0.9))
    assert told == ["brightness x 0.00", "contrast x 2.50", "saturation x 0.00"]


@pytest.mark.parametrize(
    "statistics",
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0, 0.5, 1.0), (1.0, 0.5, 0.1))],
)
def test_to_tensor_equals_torchvisions_bits(statistics):
    functional = pytest.importorskip("torchvision.transforms.functional")
    every_value = Image.fromarray(
        np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    )
    for image in (picture(), picture(1, 1), every_value, picture(41, 29).crop((3, 2, 30, 25))):
        tensor = ToTensor(*statistics)(image)
        assert (
            tensor.dtype == torch.float32
            and tensor.is_contiguous()
            and tensor.shape == (3, image.height, image.width)
        )
        assert torch.equal(tensor, functional.normalize(functional.to_tensor(image), *statistics))


def test_erasing_is_skipped_above_its_probability():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    rng = Draws(0.251)
    assert torch.equal(RandomErasing(0.25)(image.clone(), rng), image)
    assert rng.asked == ["random"]
    assert not torch.equal(
        RandomErasing(0.25, "const")(image.clone(), Draws(0.25, 0.5, 0.5, 0.5, 0.5)), image
    )


def naive_erase(image: np.ndarray, rng: Generator, mode: str, count: int) -> np.ndarray:
    """Random erasing in the plainest words: float32 [3, H, W] -> the same, with boxes overwritten."""
    image = image.copy()
    _, image_height, image_width = image.shape
    if rng.random() > 1.0:
        return image
    boxes = min(int(rng.random() * count) + 1, count) if count > 1 else 1
    for _ in range(boxes):
        for _ in range(10):
            area = (rng.random() * (1 / 3 - 0.02) + 0.02) * 224 * 224 / boxes
            ratio = exp(rng.random() * (log(1 / 0.3) - log(0.3)) + log(0.3))
            h, w = int(round(sqrt(area * ratio))), int(round(sqrt(area / ratio)))
            if w >= 224 or h >= 224:
                continue
            top, left = int(rng.random() * (224 - h + 1)), int(rng.random() * (224 - w + 1))
            top = min(int(round(top * image_height / 224)), image_height - 1)
            left = min(int(round(left * image_width / 224)), image_width - 1)
            h, w = (
                min(int(round(h * image_height / 224)), image_height - top),
                min(int(round(w * image_width / 224)), image_width - left),
            )
            if mode == "const":
                image[:, top : top + h, left : left + w] = 0
            else:
                noise = Generator(MT19937(min(int(rng.random() * (2**30 + 1)), 2**30)))
                image[:, top : top + h, left : left + w] = noise.normal(
                    size=(3, h, w) if mode == "pixel" else (3, 1, 1)
                ).astype(np.float32)
            break
    return image


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (96, 64)])
def test_erasing_against_a_naive_one(mode, count, size):
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    for seed in range(12):
        rng, theirs = generator(seed), generator(seed)
        expected = naive_erase(image.numpy(), theirs, mode, count)
        assert torch.equal(
            RandomErasing(1.0, mode, count)(image.clone(), rng), torch.from_numpy(expected)
        )
        assert rng.random() == theirs.random()


# ---------------------------------------------------------------- shears and translations


@pytest.mark.parametrize("filter", [BICUBIC, BILINEAR])
@pytest.mark.parametrize("size", [(64, 64), (33, 17), (3, 40), (1, 1), (130, 130)])
def test_shears_and_translations_equal_pillows_bits(filter, size):
    image, (width, height) = picture(*size), size
    rng = generator(3)
    for case in range(60):
        strength = (
            float(round(uniform(rng, -3, 3), 1)) if case % 5 == 0 else uniform(rng, -0.9, 0.9)
        )
        x, y = strength * width, strength * height
        for move, argument, matrix in (
            (shift.shear_x, strength, (1, strength, 0, 0, 1, 0)),
            (shift.shear_y, strength, (1, 0, 0, strength, 1, 0)),
            (shift.translate_x, x, (1, 0, x, 0, 1, 0)),
            (shift.translate_y, y, (1, 0, 0, 0, 1, y)),
        ):
            expected = image.transform(
                size, Image.Transform.AFFINE, matrix, resample=filter, fillcolor=FILL
            )
            assert equal(move(image, argument, filter, FILL), expected), (move.__name__, argument)


def test_a_shear_that_rounding_breaks_up_is_left_to_pillow():
    # moves the first columns to the pixel before, and rounds to nothing in the last
    image, factor = picture(130, 8), -1e-15
    assert shift._bicubic_rows(image, factor * (np.arange(8) + 0.5), FILL) is None
    expected = image.transform(
        image.size,
        Image.Transform.AFFINE,
        (1, factor, 0, 0, 1, 0),
        resample=BICUBIC,
        fillcolor=FILL,
    )
    assert equal(shift.shear_x(image, factor, BICUBIC, FILL), expected)


# ---------------------------------------------------------------- RandAugment and AutoAugment


def test_effects_equal_pillows_own():
    image = picture()
    for bits in range(1, 8):
        assert equal(EFFECTS["Posterize"].apply(image, bits), ImageOps.posterize(image, bits))
    for threshold in (0, 1, 100, 255, 256):
        assert equal(
            EFFECTS["Solarize"].apply(image, threshold), ImageOps.solarize(image, threshold)
        )
    assert equal(EFFECTS["Invert"].apply(image, 0), ImageOps.invert(image))
    assert equal(EFFECTS["Solarize"].apply(image, -20), ImageOps.invert(image))


def test_posterize_to_no_bits_is_black_and_to_eight_is_nothing():
    image = picture()
    for bits in (0, -3):
        assert EFFECTS["Posterize"].apply(image, bits).getcolors() == [(40 * 30, (0, 0, 0))]
    for bits in (8, 11):
        assert equal(EFFECTS["Posterize"].apply(image, bits), image)


def test_solarize_add_changes_dark_pixels_only():
    pixels = np.asarray(picture()).astype(int)
    expected = np.where(pixels < 128, np.minimum(pixels + 200, 255), pixels).astype(np.uint8)
    assert np.array_equal(np.asarray(EFFECTS["SolarizeAdd"].apply(picture(), 200)), expected)


@pytest.mark.parametrize(
    ("name", "level", "numbers", "argument"),
    [
        ("Rotate", 1.0, [0.5], 30.0),
        ("Rotate", 0.5, [0.51], -15.0),
        ("ShearX", 1.0, [0.51], -0.3),
        ("ShearY", 1.0, [0.5], 0.3),
        ("TranslateXRel", 1.0, [0.5], 0.45),
        ("TranslateYRel", 1.0, [0.51], -0.45),
        ("Color", 1.0, [], 1.9),
        ("Contrast", 0.0, [], 0.1),
        ("ColorIncreasing", 0.5, [0.5], 1.45),
        ("ColorIncreasing", 0.5, [0.51], 0.55),
        ("BrightnessIncreasing", 1.5, [0.51], 0.1),  # never below
        ("SharpnessIncreasing", 0.0, [0.51], 1.0),
        ("Posterize", 0.99, [], 3),
        ("PosterizeIncreasing", 0.99, [], 1),
        ("PosterizeIncreasing", 1.0, [], 0),
        ("PosterizeOriginal", 1.0, [], 8),
        ("Solarize", 1.0, [], 256),
        ("SolarizeIncreasing", 1.0, [], 0),
        ("SolarizeIncreasing", 2.0, [], -256),
        ("SolarizeAdd", 1.0, [], 110),
        ("SolarizeAdd", 2.0, [], 220),
        ("AutoContrast", 1.0, [], 0),
    ],
)
def test_levels_become_arguments(name, level, numbers, argument):
    rng = Draws(*numbers)
    assert EFFECTS[name].draw(level, rng) == pytest.approx(argument, rel=1e-12)
    assert rng.numbers == []


def test_an_effect_draws_whether_then_how_strong_then_the_sign_then_the_filter():
    op = RandAugment(magnitude=9.0, count=1, std=0.5, fill=FILL, interpolation="random")
    image, rotate = picture(), RAND_EFFECTS.index("Rotate")
    rng = Draws([rotate], 0.5, 0.4, 0.51, 0.2)
    degrees = -((9.0 + 0.5 * 0.4) / 10 * 30.0)
    assert equal(op(image, rng), image.rotate(degrees, BILINEAR, fillcolor=FILL))
    assert rng.asked == ["choice", "random", "normal", "random", "random"]
    skipped = Draws([rotate], 0.51)
    assert equal(op(image, skipped), image)
    assert skipped.asked == ["choice", "random"]


def test_a_magnitude_without_deviation_is_not_drawn_and_is_limited():
    index = RAND_EFFECTS.index("Solarize")
    assert words(RandAugment(9.0, 1), picture(), Draws([index], 0.0)) == ["solarize from 230"]
    assert words(RandAugment(15.0, 1), picture(), Draws([index], 0.0)) == ["solarize from 256"]
    assert words(RandAugment(15.0, 1, limit=20.0), picture(), Draws([index], 0.0)) == [
        "solarize from 384"
    ]
    assert words(RandAugment(9.0, 1, std=3.0), picture(), Draws([index], 0.0, -9.0)) == [
        "solarize from 0"
    ]


def test_an_infinite_deviation_draws_evenly_up_to_the_magnitude():
    rng = Draws([RAND_EFFECTS.index("Solarize")], 0.0, 0.5)
    assert words(RandAugment(8.0, 1, std=inf), picture(), rng) == [
        f"solarize from {int(0.4 * 256)}"
    ]
    assert rng.asked == ["choice", "random", "random"]


def test_increasing_effects_take_the_place_of_the_others():
    index = RAND_EFFECTS.index("Posterize")
    assert words(RandAugment(3.0, 1), picture(), Draws([index], 0.0)) == ["posterize to 1 bits"]
    assert words(RandAugment(3.0, 1, increasing=True), picture(), Draws([index], 0.0)) == [
        "posterize to 3 bits"
    ]
    signed = [name for name in RAND_EFFECTS if "random" in asked_by(name, increasing=False)]
    assert signed == ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
    signed = [name for name in RAND_EFFECTS if "random" in asked_by(name, increasing=True)]
    assert signed == [
        "Rotate",
        "Color",
        "Contrast",
        "Brightness",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateXRel",
        "TranslateYRel",
    ]


def asked_by(name: str, increasing: bool) -> list[str]:
    """What an effect draws after whether it is done."""
    rng = Draws([RAND_EFFECTS.index(name)], 0.0, 0.3)
    RandAugment(9.0, 1, increasing=increasing)(picture(), rng)
    return rng.asked[2:]


def test_weights_never_draw_posterize_or_invert_nor_an_effect_twice():
    chosen = []

    class Noting:
        def __init__(self, seed):
            self.rng = generator(seed)

        def choice(self, *args, **kwargs):
            chosen.append(self.rng.choice(*args, **kwargs).tolist())
            return chosen[-1]

        def random(self):
            return 1.0  # skip them all

    for seed in range(300):
        RandAugment.from_policy("rand-n5-w0", FILL, "bicubic")(picture(), Noting(seed))
    names = {RAND_EFFECTS[index] for indices in chosen for index in indices}
    assert names.isdisjoint({"Posterize", "Invert"}) and {"Rotate", "ShearX", "ShearY"} <= names
    assert all(len(set(indices)) == 5 for indices in chosen)
    assert sum(RAND_EFFECTS.index("Rotate") in indices for indices in chosen) > 250  # weight 0.3


def test_auto_augment_draws_a_pair_then_each_effect():
    image = picture()
    op = AutoAugment("v0", fill=FILL)
    # Sub-policy 15: Rotate 1.0 7 (no draw of whether), TranslateYRel 0.8 9.
    rng = Draws(15.5 / 25, 0.4, 0.81)
    assert equal(op(image, rng), image.rotate(0.7 * 30.0, BICUBIC, fillcolor=FILL))
    assert rng.asked == ["random"] * 3


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies_equal_timms(policy):
    timm = pytest.importorskip("timm.data.auto_augment")
    theirs = [
        [(op.name, op.prob, op.magnitude) for op in pair]
        for pair in timm.auto_augment_policy(policy, timm._HPARAMS_DEFAULT)
    ]
    assert [
        [tuple(effect) for effect in pair] for pair in randaugment._sub_policies(policy)
    ] == theirs


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m9-mstd0.5",
        "rand-m7-n3",
        "rand",
        "rand-m5-mstd101",
        "rand-inc1-m10",
        "original",
        "v0",
        "v0-mstd0.5",
    ],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_policies_equal_timms_under_the_same_draws(policy, interpolation, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    parameters = {"img_mean": FILL, "translate_const": 100}
    if interpolation != "random":
        parameters["interpolation"] = BICUBIC
    make = timm.rand_augment_transform if policy.startswith("rand") else timm.auto_augment_transform
    transform, op, image = (
        make(policy, parameters),
        augment_from_policy(policy, FILL, interpolation),
        picture(48, 36),
    )
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
        assert equal(op(image, ours), expected), seed
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


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("rand", RandAugment()),
        ("rand-m9-mstd0.5-inc1", RandAugment(9.0, std=0.5, increasing=True)),
        ("rand-inc1-mstd0.50-m9", RandAugment(9.0, std=0.5, increasing=True)),
        ("rand-m15-n4-mmax20-w0", RandAugment(15.0, 4, limit=20.0, weighted=True)),
        ("rand-mmax0", RandAugment()),
        ("rand-inc0", RandAugment()),  # off; the original reads any number as on
        ("rand-m9-mstdinf", RandAugment(9.0, std=inf)),  # the original ignores this one
        ("rand-m9-mstd101", RandAugment(9.0, std=inf)),
        ("rand-m9-mstd100", RandAugment(9.0, std=100.0)),
        ("original", AutoAugment("original")),
        ("v0-mstd0.5", AutoAugment("v0", std=0.5)),
    ],
)
def test_policy_strings(policy, expected):
    op = augment_from_policy(policy, (128, 128, 128), "bicubic")
    assert op == expected and repr(op) == repr(expected)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("augmix-m5", "cannot be replayed; use rand-m9"),
        ("3a", "cannot be replayed"),
        ("originalr", "cannot be replayed"),
        ("v0r", "cannot be replayed"),
        ("randy-m9", "cannot be replayed"),
        ("rand-m9-p2", "option 'p2' is not one of m, n, mstd, mmax, w, inc"),
        ("rand-m9.5", "option 'm9.5' is not one of"),
        ("rand-minf", "option 'minf' is not one of"),
        ("rand-m", "option 'm' is not one of"),
        ("rand-", "option '' is not one of"),
        ("rand-m9-m5", "m stands there twice"),
        ("rand-inc2", "inc is 0 .* or 1"),
        ("rand-w1", "no weights w1, give w0"),
        ("rand-n0", "n is at least 1"),
        ("rand-n14-w0", "at most 13 with w0"),
        ("original-m9", "option 'm9' is not one of mstd"),
    ],
)
def test_policies_that_cannot_be_replayed_are_named(policy, message):
    with pytest.raises(ValueError, match=message) as error:
        augment_from_policy(policy, FILL, "bicubic")
    assert f"AUG.AUTO_AUGMENT = {policy!r}" in str(error.value)


def test_weights_belong_to_the_effects():
    assert len(RAND_WEIGHTS) == len(RAND_EFFECTS) == 15
    weights = dict(zip(RAND_EFFECTS, RAND_WEIGHTS))
    assert weights["Rotate"] == 0.3 and weights["ShearX"] == weights["ShearY"] == 0.2
    assert weights["TranslateXRel"] == weights["TranslateYRel"] == 0.1
    assert weights["Color"] == weights["Sharpness"] == weights["AutoContrast"] == 0.025
    assert {
        weights[name] for name in ("Solarize", "SolarizeAdd", "Contrast", "Brightness", "Equalize")
    } == {0.005}
    assert weights["Posterize"] == weights["Invert"] == 0


# ---------------------------------------------------------------- ops as values

EVERY_OP = [
    RandomResizedCrop(64),
    PaddedCrop(32),
    Flip("vertical", 0.25),
    ColorJitter(0.4),
    ToTensor((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    RandomErasing(1.0, "rand", 2),
    RandAugment(fill=FILL),
    AutoAugment("v0"),
]


@pytest.mark.parametrize("op", EVERY_OP, ids=lambda op: type(op).__name__)
def test_ops_are_frozen_values(op):
    assert pickle.loads(pickle.dumps(op)) == op
    assert hash(op) == hash(pickle.loads(pickle.dumps(op)))
    name = next(iter(vars(op)))
    with pytest.raises(FrozenInstanceError):
        setattr(op, name, 0)


def test_reprs_are_complete_and_leave_out_the_models_statistics():
    assert [repr(op) for op in EVERY_OP] == [
        (
            "RandomResizedCrop(size=64, scale=(0.08, 1.0), ratio=(0.75, 1.3333333333333333),"
            " interpolation='bicubic')"
        ),
        "PaddedCrop(size=32, padding=4, interpolation='bicubic')",
        "Flip(axis='vertical', probability=0.25)",
        "ColorJitter(strength=0.4)",
        "ToTensor()",
        "RandomErasing(probability=1.0, mode='rand', count=2)",
        (
            "RandAugment(magnitude=10.0, count=2, std=0.0, limit=10.0, weighted=False,"
            " increasing=False, fill=(124, 116, 104), interpolation='bicubic')"
        ),
        (
            "AutoAugment(policy='v0', std=0.0, limit=10.0, fill=(128, 128, 128),"
            " interpolation='bicubic')"
        ),
    ]


def test_every_effect_has_words():
    told = set()
    for name in EFFECTS:
        op = RandAugment(9.0, 1, increasing=name.endswith("Increasing"))
        base = name.removesuffix("Increasing").removesuffix("Original")
        told |= set(words(op, picture(), Draws([RAND_EFFECTS.index(base)], 0.0, 0.3)))
    assert {
        "auto-contrast",
        "equalize",
        "invert",
        "rotate by 27.0 degrees",
        "color x 1.72",
        "color x 1.81",
    } <= told
    assert not any("%" in text for text in told)
