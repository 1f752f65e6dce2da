"""A plan holds every draw, in the stated order, and reads no pixel."""

import pickle
from dataclasses import FrozenInstanceError
from math import exp, inf, log, sqrt

import pytest
from PIL import Image

from configs import load_config
from data.augment import AugmentDecoder, randaugment
from data.augment.plan import (
    ColorJitter,
    Crop,
    Effect,
    Flip,
    PaddedCrop,
    RandomErasing,
    RandomResizedCrop,
    Shift,
)
from data.augment.randaugment import (
    DRAWS,
    POLICIES,
    RAND_EFFECTS,
    RAND_WEIGHTS,
    AutoAugment,
    RandAugment,
    augment_from_policy,
)
from data.augment.rng import generator


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


def decoder(*opts) -> AugmentDecoder:
    return AugmentDecoder.from_config(load_config(["--opts", *map(str, opts)]))


# ---- crops and flips


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


SIZES = [(500, 375), (64, 48), (300, 30), (20, 400), (7, 5), (2, 2), (1, 1), (1, 9)]


@pytest.mark.parametrize("size", SIZES)
def test_crop_boxes_are_drawn_as_stated(size):
    for seed in range(60):
        rng = generator(seed)
        left, top, width, height, filter = RandomResizedCrop().draw(rng, *size)
        numbers = iter(generator(seed).random, None)
        assert (left, top, width, height) == naive_box(*size, numbers)
        assert rng.random() == next(numbers)  # as many draws
        assert filter == "bicubic" and width * height > 0
        assert 0 <= left <= left + width <= size[0] and 0 <= top <= top + height <= size[1]


def test_ten_failures_take_the_centre_without_a_draw():
    rng = Draws(*[1.0, 1.0] * 10)  # the whole area at 4:3 does not fit a strip
    assert RandomResizedCrop().draw(rng, 300, 30) == Crop(130, 0, 40, 30, "bicubic")
    assert rng.numbers == []
    narrow = RandomResizedCrop().draw(Draws(*[1.0, 0.0] * 10), 30, 300)
    assert narrow == Crop(0, 130, 30, 40, "bicubic")


@pytest.mark.parametrize(("u", "filter"), [(0.49, "bilinear"), (0.5, "bicubic")])
def test_random_interpolation_is_drawn_after_the_box(u, filter):
    rng = Draws(1.0, 0.5, 0.0, 0.0, u)
    crop = RandomResizedCrop(interpolation="random").draw(rng, 60, 60)
    assert crop.filter == filter and len(rng.asked) == 5


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_small_images_are_shifted_top_first(interpolation):
    filter = "bilinear" if interpolation == "bilinear" else "bicubic"
    for u_top, u_left, top, left in ((0.0, 0.99, -4, 4), (0.99, 0.0, 4, -4), (0.5, 0.25, 0, -2)):
        rng = Draws(u_top, u_left)
        crop = PaddedCrop(interpolation=interpolation).draw(rng, 50, 30)
        assert crop == Shift(left, top, filter) and rng.asked == ["random"] * 2


@pytest.mark.parametrize(
    ("probability", "draws", "flips"),
    [(0.3, [0.29], True), (0.3, [0.3], False), (1.0, [0.999], True), (0.0, [], False)],
)
def test_flips(probability, draws, flips):
    rng = Draws(*draws)
    assert Flip("horizontal", probability).draw(rng) is flips and rng.numbers == []


# ---- colour jitter and erasing


def test_color_jitter_draws_three_factors_then_their_order():
    rng = Draws(0.0, 0.5, 1.0, 0.0, 0.0)
    low, high = 1.0 - 0.4, 1.0 + 0.4
    brightness, contrast, color = (u * (high - low) + low for u in (0.0, 0.5, 1.0))
    # (brightness, contrast, saturation): the last and the first change places, then the second and
    # the first
    expected = [("Contrast", contrast), ("Color", color), ("Brightness", brightness)]
    assert [effect[:2] for effect in ColorJitter(0.4).draw(rng)] == expected
    assert rng.numbers == []


def test_color_jitter_stays_at_zero_or_above():
    effects = ColorJitter(1.5).draw(Draws(0.0, 1.0, 0.0, 0.9, 0.9))
    assert effects == (Effect("Brightness", 0.0), Effect("Contrast", 2.5), Effect("Color", 0.0))


def naive_erasures(rng, mode: str, count: int, size: int) -> list[tuple]:
    """The boxes of random erasing in the plainest words."""
    found = []
    if rng.random() > 1.0:
        return found
    boxes = min(int(rng.random() * count) + 1, count) if count > 1 else 1
    for _ in range(boxes):
        for _ in range(10):
            area = (rng.random() * (1 / 3 - 0.02) + 0.02) * 224 * 224 / boxes
            ratio = exp(rng.random() * (log(1 / 0.3) - log(0.3)) + log(0.3))
            h, w = int(round(sqrt(area * ratio))), int(round(sqrt(area / ratio)))
            if w >= 224 or h >= 224:
                continue
            top, left = int(rng.random() * (224 - h + 1)), int(rng.random() * (224 - w + 1))
            top = min(int(round(top * size / 224)), size - 1)
            left = min(int(round(left * size / 224)), size - 1)
            h = min(int(round(h * size / 224)), size - top)
            w = min(int(round(w * size / 224)), size - left)
            seed = 0 if mode == "const" else min(int(rng.random() * (2**30 + 1)), 2**30)
            found.append((top, left, h, w, mode, seed))
            break
    return found


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [32, 224, 96])
def test_erasures_against_naive_ones(mode, count, size):
    for seed in range(12):
        rng, theirs = generator(seed), generator(seed)
        drawn = RandomErasing(1.0, mode, count).draw(rng, size)
        assert list(drawn) == naive_erasures(theirs, mode, count, size)
        assert rng.random() == theirs.random()


def test_erasing_is_skipped_above_its_probability():
    rng = Draws(0.251)
    assert RandomErasing(0.25).draw(rng, 8) == () and rng.asked == ["random"]
    assert len(RandomErasing(0.25, "const").draw(Draws(0.25, 0.5, 0.5, 0.5, 0.5), 8)) == 1


# ---- RandAugment and AutoAugment


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
    assert DRAWS[name].argument(level, rng) == pytest.approx(argument, rel=1e-12)
    assert rng.numbers == []


def test_an_effect_draws_whether_then_how_strong_then_the_sign_then_the_filter():
    op, rotate = RandAugment(9.0, 1, 0.5, interpolation="random"), RAND_EFFECTS.index("Rotate")
    rng = Draws([rotate], 0.5, 0.4, 0.51, 0.2)
    degrees = -((9.0 + 0.5 * 0.4) / 10 * 30.0)
    assert op.draw(rng) == (Effect("Rotate", degrees, "bilinear"),)
    assert rng.asked == ["choice", "random", "normal", "random", "random"]
    skipped = Draws([rotate], 0.51)
    assert op.draw(skipped) == () and skipped.asked == ["choice", "random"]


@pytest.mark.parametrize(
    ("op", "numbers", "threshold"),
    [
        (RandAugment(9.0, 1), [], 230),
        (RandAugment(15.0, 1), [], 256),  # limited to 10
        (RandAugment(15.0, 1, limit=20.0), [], 384),
        (RandAugment(9.0, 1, std=3.0), [-9.0], 0),
        (RandAugment(8.0, 1, std=inf), [0.5], int(0.4 * 256)),  # even up to the magnitude
    ],
)
def test_magnitudes(op, numbers, threshold):
    rng = Draws([RAND_EFFECTS.index("Solarize")], 0.0, *numbers)
    assert op.draw(rng) == (Effect("Solarize", threshold),) and rng.numbers == []


def asked_by(name: str, increasing: bool) -> list[str]:
    """What an effect draws after whether it is done."""
    rng = Draws([RAND_EFFECTS.index(name)], 0.0, 0.3)
    RandAugment(9.0, 1, increasing=increasing).draw(rng)
    return rng.asked[2:]


def test_increasing_effects_take_the_place_of_the_others():
    index = RAND_EFFECTS.index("Posterize")
    for increasing, bits in ((False, 1), (True, 3)):
        op = RandAugment(3.0, 1, increasing=increasing)
        assert op.draw(Draws([index], 0.0)) == (Effect("Posterize", bits),)
    geometric = "Rotate ShearX ShearY TranslateXRel TranslateYRel".split()
    enhancing = "Color Contrast Brightness Sharpness".split()
    for increasing, signed in ((False, geometric), (True, geometric + enhancing)):
        found = {name for name in RAND_EFFECTS if "random" in asked_by(name, increasing)}
        assert found == set(signed)


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
        RandAugment.from_policy("rand-n5-w0").draw(Noting(seed))
    names = {RAND_EFFECTS[index] for indices in chosen for index in indices}
    assert names.isdisjoint({"Posterize", "Invert"}) and {"Rotate", "ShearX", "ShearY"} <= names
    assert all(len(set(indices)) == 5 for indices in chosen)
    assert sum(RAND_EFFECTS.index("Rotate") in indices for indices in chosen) > 250  # weight 0.3


def test_weights_belong_to_the_effects():
    expected = {"Rotate": 0.3, "Posterize": 0, "Invert": 0}
    expected |= dict.fromkeys("ShearX ShearY".split(), 0.2)
    expected |= dict.fromkeys("TranslateXRel TranslateYRel".split(), 0.1)
    expected |= dict.fromkeys("Color Sharpness AutoContrast".split(), 0.025)
    expected |= dict.fromkeys("Solarize SolarizeAdd Contrast Brightness Equalize".split(), 0.005)
    assert expected == RAND_WEIGHTS


def test_auto_augment_draws_a_pair_then_each_effect():
    # Sub-policy 15: Rotate 1.0 7 (no draw of whether), TranslateYRel 0.8 9.
    rng = Draws(15.5 / 25, 0.4, 0.81)
    assert AutoAugment("v0").draw(rng) == (Effect("Rotate", 0.7 * 30.0, "bicubic"),)
    assert rng.asked == ["random"] * 3


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies_equal_timms(policy):
    timm = pytest.importorskip("timm.data.auto_augment")
    theirs = timm.auto_augment_policy(policy, timm._HPARAMS_DEFAULT)
    assert [list(pair) for pair in randaugment._sub_policies(policy)] == [
        [(op.name, op.prob, op.magnitude) for op in pair] for pair in theirs
    ]


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
    assert augment_from_policy(policy) == expected


@pytest.mark.parametrize(
    "policy", "augmix-m5 3a originalr randy-m9 rand-m9-p2 rand-n14-w0 rand-m9-m5".split()
)
def test_policies_that_cannot_be_replayed_are_named(policy):
    with pytest.raises(ValueError, match=f"AUG.AUTO_AUGMENT = '{policy}': "):
        augment_from_policy(policy)


# ---- plans as values

RECIPES = [
    (),
    ("AUG.AUTO_AUGMENT", "v0", "AUG.REPROB", 1.0, "AUG.RECOUNT", 3, "DATA.IMG_SIZE", 64),
    ("AUG.AUTO_AUGMENT", "none", "AUG.REMODE", "const", "DATA.INTERPOLATION", "random"),
    ("DATA.IMG_SIZE", 32, "AUG.AUTO_AUGMENT", "rand-m9-n4-w0", "AUG.VFLIP", 0.5),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_plans_are_values_that_depend_on_size_and_seed_alone(recipe):
    ours, theirs = decoder(*recipe), decoder(*recipe)
    plans = {ours.plan(50, 40, seed) for seed in range(50)}
    assert plans == {theirs.plan(50, 40, seed) for seed in range(50)} and len(plans) > 30
    for plan in list(plans)[:5]:
        assert pickle.loads(pickle.dumps(plan)) == plan
        with pytest.raises(FrozenInstanceError):
            plan.size = 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_image_decodes_as_its_plan_is_applied(recipe):
    ours = decoder(*recipe)
    for seed, color in ((1, "black"), (2, "white")):
        image = Image.new("RGB", (50, 40), color)
        assert ours.decode(image, seed).equal(ours.apply(ours.plan(50, 40, seed), image))


def test_a_plan_reads_as_text():
    ours = decoder("AUG.REPROB", 1.0, "AUG.VFLIP", 0.5)
    lines = [str(ours.plan(120, 90, seed)) for seed in range(40)]
    assert all(line.startswith("crop ") and "; erase " in line for line in lines)
    told = "; ".join(lines)
    for words in ("flip horizontal", "flip vertical", "rotate by", "solarize from"):
        assert words in told


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40])
def test_seeds_outside_int32_are_refused(seed):
    with pytest.raises(ValueError, match=f"seed {seed} is out of range: .* from 0 to 2147483647"):
        decoder().plan(8, 8, seed)
