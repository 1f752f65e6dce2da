"""The decoder gives the original's bits, the same ones every time, and says what they depend on."""

import hashlib
import json
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from yacs.config import CfgNode

from configs.defaults import get_defaults
from data.augment import canary, pillow
from data.augment.decoder import (
    AugmentDecoder,
    EvalTransform,
    eval_transform,
    fill_color,
    mean_and_std,
)
from data.augment.pairs import PairMix
from data.augment.rng import choice, generator, integer, uniform


def config(*overrides) -> CfgNode:
    cfg = get_defaults()
    cfg.merge_from_list(list(overrides))
    cfg.freeze()
    return cfg


def decoder(*overrides) -> AugmentDecoder:
    return AugmentDecoder.from_config(config(*overrides))


def picture(width: int, height: int) -> Image.Image:
    return canary.drawn_image(width, height)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


# The original's bits.

GOLDEN_CONFIGS = (
    "default default_posterize0 img384 interp_bilinear mean_clip no_aa_no_jitter rand_n3"
    " rand_noninc re_const re_rand re_pixel_count3 aa_original interp_random no_aa_color_jitter"
).split()


@pytest.mark.parametrize("name", GOLDEN_CONFIGS)
def test_golden_images(name, goldens):
    entry = json.loads((goldens / "augment_index.json").read_text())["configs"][name]
    decode = decoder(*entry["overrides"]).decode
    cases = np.load(goldens / entry["file"])
    images = {
        file: Image.open(goldens / "images" / file).convert("RGB")
        for file in np.unique(cases["image"])
    }
    wrong = []
    for file, seed, shape, expected in zip(*map(cases.get, ("image", "seed", "shape", "sha256"))):
        tensor = decode(images[file], seed)
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        assert tensor.shape == tuple(shape)
        if digest(tensor) != expected:
            wrong.append((str(file), int(seed)))
    assert wrong == []


def test_golden_configs_are_all_tried(goldens):
    assert sorted(json.loads((goldens / "augment_index.json").read_text())["configs"]) == sorted(
        GOLDEN_CONFIGS
    )


# A pure function of image and seed.


def global_states() -> list[bytes]:
    return [
        pickle.dumps(random.getstate()),
        pickle.dumps(np.random.get_state()),  # noqa: NPY002
        torch.get_rng_state().numpy().tobytes(),
    ]


def random_recipe(rng) -> list:
    """--opts of a recipe, everything in it drawn."""
    policy = choice(rng, ["none", "original", "v0", "rand", "rand"])
    if policy == "rand":
        std = choice(rng, ["0", "0.5", "2", "inf"])
        options = f"m{integer(rng, 0, 15)} n{integer(rng, 1, 4)} mstd{std} w0 inc1 mmax20".split()
        policy = "-".join(["rand"] + [option for option in options if rng.random() < 0.6])
    values = {
        "DATA.IMG_SIZE": choice(rng, [16, 32, 33, 48, 64]),
        "DATA.INTERPOLATION": choice(rng, ["bicubic", "bilinear", "random"]),
        "DATA.MEAN_AND_STD_TYPE": choice(rng, ["default", "clip", "half"]),
        "AUG.AUTO_AUGMENT": policy,
        "AUG.COLOR_JITTER": choice(rng, [0.0, 0.4, 1.2]),
        "AUG.REPROB": choice(rng, [0.0, 0.25, 1.0]),
        "AUG.REMODE": choice(rng, ["const", "rand", "pixel"]),
        "AUG.RECOUNT": integer(rng, 1, 4),
        "AUG.HFLIP": choice(rng, [0.0, 0.5, 1.0]),
        "AUG.VFLIP": choice(rng, [0.0, 0.5]),
        "AUG.SCALE": (uniform(rng, 0.01, 0.5), 1.0),
        "AUG.FILL": choice(rng, [[], [0, 255, 7]]),
    }
    return [part for item in values.items() for part in item]


@pytest.mark.parametrize("case", range(60))
def test_any_recipe_decodes_twice_alike_and_draws_from_the_seed_alone(case):
    rng = generator(case)
    recipe = random_recipe(rng)
    image = picture(integer(rng, 1, 90), integer(rng, 1, 90))
    pixels = image.tobytes()
    first, second = decoder(*recipe), decoder(*recipe)
    assert first == second
    for _ in range(6):
        seed = integer(rng, 0, 2**31 - 1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        before = global_states()
        tensor = first.decode(image, seed)
        assert global_states() == before
        random.seed(2)
        np.random.seed(2)  # noqa: NPY002
        torch.manual_seed(2)
        assert digest(second.decode(image.copy(), np.int64(seed))) == digest(tensor)
        assert torch.isfinite(tensor).all()
    assert image.tobytes() == pixels


def test_other_seeds_give_other_images():
    decode, image = decoder("DATA.IMG_SIZE", 48).decode, picture(80, 60)
    assert len({digest(decode(image, seed)) for seed in range(200)}) == 200


def holds_only(value, *types) -> bool:
    if hasattr(value, "__dataclass_fields__"):
        value = tuple(vars(value).values())
    if isinstance(value, tuple):
        return all(holds_only(item, *types) for item in value)
    return type(value) in types


@pytest.mark.parametrize("case", range(20))
def test_plans_hold_numbers_and_names_only(case):
    plan = decoder(*random_recipe(generator(case))).plan(70, 50, case)
    assert holds_only(plan, int, float, str)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_results_do_not_share_memory():
    decode, image = decoder("DATA.IMG_SIZE", 48).decode, picture(80, 60)
    first = decode(image, 1)
    kept = first.clone()
    decode(image, 1).zero_()
    assert torch.equal(first, kept)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_other_modes_are_converted_to_rgb(mode):
    image = picture(40, 30).convert(mode)
    assert torch.equal(
        decoder("DATA.IMG_SIZE", 48).decode(image, 3),
        decoder("DATA.IMG_SIZE", 48).decode(image.convert("RGB"), 3),
    )
    assert torch.equal(
        eval_transform(config())(image), eval_transform(config())(image.convert("RGB"))
    )


def test_an_unread_file_decodes_as_the_read_one(tmp_path):
    picture(120, 90).save(tmp_path / "a.jpg")
    decode = decoder("DATA.IMG_SIZE", 48).decode
    unread, read = Image.open(tmp_path / "a.jpg"), Image.open(tmp_path / "a.jpg")
    read.load()
    assert torch.equal(decode(unread, 9), decode(read, 9))


def test_a_decoder_travels_to_other_processes():
    ours = decoder("AUG.AUTO_AUGMENT", "v0", "AUG.MIXUP_MODE", "pair2")
    theirs = pickle.loads(pickle.dumps(ours))
    assert theirs == ours
    assert digest(theirs.decode(picture(50, 40), 4)) == digest(ours.decode(picture(50, 40), 4))


# The recipe.


def test_the_recipe_reads_as_a_list():
    text = str(decoder("AUG.MIXUP_MODE", "pair2"))
    names = "RandomResizedCrop Flip Flip RandAugment RandomErasing PairMix".split()
    assert text.startswith("224 px: ")
    assert [part.split("(")[0] for part in text.removeprefix("224 px: ").split("; ")] == names


@pytest.mark.parametrize(
    ("overrides", "crop", "effects", "erases"),
    [
        ([], "RandomResizedCrop", ["RandAugment"], True),
        (["DATA.IMG_SIZE", 32, "AUG.REPROB", 0.0], "PaddedCrop", ["RandAugment"], False),
        (["AUG.AUTO_AUGMENT", "none"], "RandomResizedCrop", ["ColorJitter"], True),
        (["AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0.0], "RandomResizedCrop", [], True),
        (["AUG.AUTO_AUGMENT", "original"], "RandomResizedCrop", ["AutoAugment"], True),
    ],
)
def test_recipes_take_other_ops(overrides, crop, effects, erases):
    ours = decoder(*overrides)
    assert type(ours.crop).__name__ == crop and (ours.erasing is not None) == erases
    assert [type(op).__name__ for op in ours.effects] == effects


def test_a_decoder_does_not_depend_on_spelling():
    mine, theirs = get_defaults(), get_defaults()
    for name, one, other in (
        ("SCALE", [0.08, 1], (0.08, 1.0)),
        ("RATIO", (3 / 4, 4 / 3), [0.75, 4 / 3]),
        ("FILL", [124.0, 116, 104], (124, 116, 104)),
        ("HFLIP", 1, 1.0),
        ("MIXUP", 1, 1.0),
        ("CUTMIX_MINMAX", (0.25, 0.5), [0.25, 0.5]),
        ("MIXUP_MODE", "pair2", "pair2"),
    ):
        mine.AUG[name], theirs.AUG[name] = one, other
    assert AugmentDecoder.from_config(mine) == AugmentDecoder.from_config(theirs)


@pytest.mark.parametrize(
    "options",
    [
        ("DATA.IMG_SIZE", 225),
        ("DATA.INTERPOLATION", "bilinear"),
        ("AUG.SCALE", (0.09, 1.0)),
        ("AUG.RATIO", (0.7, 4 / 3)),
        ("AUG.HFLIP", 0.4),
        ("AUG.VFLIP", 0.1),
        ("AUG.AUTO_AUGMENT", "rand-m9-mstd0.6-inc1"),
        ("AUG.FILL", [1, 2, 3]),
        ("AUG.REPROB", 0.3),
        ("AUG.REMODE", "rand"),
        ("AUG.RECOUNT", 2),
        ("AUG.MIXUP", 0.7),
        ("AUG.CUTMIX", 0.9),
        ("AUG.CUTMIX_MINMAX", [0.2, 0.4]),
        ("AUG.MIXUP_PROB", 0.9),
        ("AUG.MIXUP_SWITCH_PROB", 0.4),
    ],
)
def test_every_key_of_the_recipe_is_heeded(options):
    assert decoder("AUG.MIXUP_MODE", "pair2", *options) != decoder("AUG.MIXUP_MODE", "pair2")


def test_the_fill_colour_is_the_configs_or_the_means():
    assert fill_color(config()) == (124, 116, 104)
    assert fill_color(config("DATA.MEAN_AND_STD_TYPE", "clip")) == (123, 117, 104)
    assert fill_color(config("DATA.MEAN", [1.5, 0.5, 0.0])) == (255, 128, 0)
    assert fill_color(config("AUG.FILL", [9, 8, 7], "DATA.MEAN_AND_STD_TYPE", "clip")) == (9, 8, 7)
    recipe = ("DATA.IMG_SIZE", 48, "AUG.AUTO_AUGMENT", "rand-m10-n4", "AUG.FILL", [255, 0, 255])
    ours, theirs = decoder(*recipe), decoder(*recipe[:-2])
    assert any(
        not torch.equal(ours.decode(picture(60, 60), seed), theirs.decode(picture(60, 60), seed))
        for seed in range(9)
    )


def test_mean_and_std_come_from_the_type_or_the_config():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert mean_and_std(config()) == (mean, std)
    assert mean_and_std(config("DATA.MEAN_AND_STD_TYPE", "clip")) == clip
    assert mean_and_std(config("DATA.MEAN_AND_STD_TYPE", "half")) == ((0.5,) * 3, (0.5,) * 3)
    assert mean_and_std(config("DATA.MEAN", [0.1, 0.2, 0.3])) == ((0.1, 0.2, 0.3), std)


# The canary.


def test_the_canary_is_the_same_every_time_and_complete():
    digests = decoder("AUG.MIXUP_MODE", "pair2").canary()
    assert digests == decoder("AUG.MIXUP_MODE", "pair2").canary()
    kinds = [name.split("/")[0] for name in digests]
    assert (kinds.count("jpeg"), kinds.count("drawn"), kinds.count("pair")) == (4, 8, 4)
    assert all(len(bytes.fromhex(value)) == 32 for value in digests.values())
    assert len(set(digests.values())) == len(digests)
    unpaired = {name: value for name, value in digests.items() if not name.startswith("pair")}
    assert decoder().canary() == unpaired


def test_the_canary_never_changes():
    """Stores hold it: a change would refuse them all."""
    digests = decoder("AUG.MIXUP_MODE", "pair2").canary()
    text = json.dumps(digests, sort_keys=True).encode()
    assert hashlib.sha256(text).hexdigest() == CANARY


CANARY = "9cffe386e943f4583e4c7b5afdc8241f4dbae5c3f7a320525b5bd0d8a28d0306"


def test_the_canary_does_not_depend_on_a_models_statistics():
    fill = ("AUG.FILL", [1, 2, 3])
    assert decoder(*fill, "DATA.MEAN_AND_STD_TYPE", "clip").canary() == decoder(*fill).canary()


def test_the_canary_sees_another_recipe_and_another_mix():
    pairs = ("AUG.MIXUP_MODE", "pair2")
    ours = decoder(*pairs).canary()
    for options in (
        ("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5"),
        ("DATA.INTERPOLATION", "bilinear"),
        ("AUG.REMODE", "const"),
    ):
        theirs = decoder(*pairs, *options).canary()
        assert theirs["jpeg"] == ours["jpeg"] and theirs != ours
    theirs = decoder(*pairs, "AUG.MIXUP", 0.3).canary()
    # the two that blend
    assert {name for name in ours if ours[name] != theirs[name]} == {"pair/65-113", "pair/151-56"}


@pytest.mark.parametrize("effect", sorted(pillow.EFFECTS))
def test_the_canary_sees_one_effect_that_drifts(effect, monkeypatch):
    before = decoder().canary()
    monkeypatch.setitem(pillow.EFFECTS, effect, lambda image, *_: one_value_off(image))
    assert decoder().canary() != before


def one_value_off(image: Image.Image) -> Image.Image:
    pixels = np.array(image)
    pixels[0, 0, 0] ^= 1
    return Image.fromarray(pixels)


def test_the_canarys_images_never_change():
    """Integer arithmetic: equal everywhere, whatever Pillow or numpy."""
    assert hashlib.sha256(canary.drawn_image().tobytes()).hexdigest() == DRAWN
    image = canary.jpeg_image()
    assert image.size == (80, 60) and image.mode == "RGB"
    assert image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)  # 4:2:0
    assert len(canary.JPEG) * 3 // 4 < 3000


DRAWN = "c9a701ed199f223501ea9aa8faec4cff4ee8653b19e11e18b400aeb0b5b506ac"


# Evaluation.


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (64, 48), (224, 224), (300, 31), (17, 256), (1, 1), (257, 256)]
)
@pytest.mark.parametrize("image_size", [64, 225])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_torchvisions_bits(size, image_size, interpolation):
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(interpolation)
    final = [transforms.ToTensor(), transforms.Normalize(*mean_and_std(config()))]
    cropping = [
        transforms.Resize(int(256 / 224 * image_size), mode),
        transforms.CenterCrop(image_size),
    ]
    straight = [transforms.Resize((image_size, image_size), mode)]
    options = ("DATA.IMG_SIZE", image_size, "DATA.INTERPOLATION", interpolation)
    for crop, first in ((True, cropping), (False, straight)):
        tensor = eval_transform(config(*options, "TEST.CROP", crop))(picture(*size))
        assert torch.equal(tensor, transforms.Compose(first + final)(picture(*size)))
        assert tensor.shape == (3, image_size, image_size)


def test_evaluation_with_random_interpolation_is_bicubic():
    image = picture(80, 60)
    assert torch.equal(
        eval_transform(config("DATA.INTERPOLATION", "random"))(image),
        eval_transform(config())(image),
    )


def test_small_images_are_evaluated_as_they_are():
    functional = pytest.importorskip("torchvision.transforms.functional")
    evaluate = eval_transform(config("DATA.IMG_SIZE", 32))
    whole = functional.normalize(functional.to_tensor(picture(32, 32)), *mean_and_std(config()))
    assert torch.equal(evaluate(picture(32, 32)), whole)
    other = picture(50, 40)
    resized = functional.to_tensor(other.resize((32, 32), Image.Resampling.BICUBIC))
    assert torch.equal(evaluate(other), functional.normalize(resized, *mean_and_std(config())))


def test_the_evaluation_transform_travels_to_other_processes():
    evaluate = eval_transform(config())
    assert isinstance(evaluate, EvalTransform) and pickle.loads(pickle.dumps(evaluate)) == evaluate


# Pairs.


def test_the_mix_of_the_canary_is_that_of_the_config():
    ours = decoder("AUG.MIXUP_MODE", "pair2")
    assert ours.mix == PairMix.from_config(config())
    assert decoder("AUG.MIXUP_MODE", "pair2", "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0).mix is None
    assert decoder().mix is None
