"""Mixing: the original's bits for images, our corrected labels, on any split and memory format."""

import hashlib
import json

import numpy as np
import pytest
import torch

from configs.defaults import get_defaults
from data.augment.pairs import (
    UNMIXED,
    BatchMix,
    Mix,
    PairMix,
    blend_,
    blended,
    numbers_of,
    share_right,
    smooth_targets,
)
from data.augment.rng import generator

SEEDS = [2147483647, 0, 1, 2147483646, 123456789, 987654321, 5, 5]


def config(*options):
    cfg = get_defaults()
    cfg.merge_from_list(["MODEL.NUM_CLASSES", 10, *options])
    return cfg


def pair_mix(*options) -> PairMix:
    return PairMix.from_config(config(*options))


def random_images(count=8, size=20, seed=0) -> torch.Tensor:
    return torch.randn(count, 3, size, size + 4, generator=torch.Generator().manual_seed(seed))


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def cases(goldens):
    return json.loads((goldens / "mixup.json").read_text()), np.load(goldens / "mixup.npz")


def golden_mixer(kwargs: dict, smoothing: float) -> PairMix:
    values = {
        "AUG.MIXUP": kwargs["mixup_alpha"],
        "AUG.CUTMIX": kwargs["cutmix_alpha"],
        "AUG.MIXUP_PROB": kwargs.get("prob", 1.0),
        "AUG.CUTMIX_MINMAX": kwargs.get("cutmix_minmax"),
        "MODEL.LABEL_SMOOTHING": smoothing,
    }
    return pair_mix(*(part for item in values.items() for part in item))


def test_mixed_images_equal_the_originals(cases):
    index, arrays = cases
    images, labels = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["target"])
    before = sha256(images)
    kinds = set()
    for name, case in index["cases"].items():
        mixer = golden_mixer(case["kwargs"], index["label_smoothing"])
        for memory_format in (torch.contiguous_format, torch.channels_last):
            mixed, targets = mixer(
                images.contiguous(memory_format=memory_format), labels, case["seeds"]
            )
            assert sha256(mixed) == case["sha256"], name
            assert mixed.is_contiguous(memory_format=memory_format)
        picks = np.random.Generator(np.random.PCG64(12345)).integers(0, mixed.numel(), 64)
        assert np.array_equal(mixed.contiguous().numpy().ravel()[picks], arrays[name + "|samples"])
        for i, mix in enumerate(mixer.draw(case["seeds"], 32, 32)):
            # the original's lam of cutmix is not corrected, and its labels have the wrong partner
            if mix.box is None:
                assert np.float32(mix.lam) == np.float32(case["lam"][2 * i])
            else:
                assert mix.lam <= 1 and case["changed_frac"][2 * i] == pytest.approx(1 - mix.lam)
            if mix == UNMIXED:
                assert np.allclose(
                    targets[2 * i : 2 * i + 2],
                    arrays[name + "|target"][2 * i : 2 * i + 2],
                    rtol=0,
                    atol=1e-7,
                )
            kinds.add((mix == UNMIXED, mix.box is None))
    assert sha256(images) == before
    assert kinds == {(True, True), (False, True), (False, False)}


def reference(images, labels, mixes, smoothing, partner):
    """Mixed images and targets by loops over pixels' slices, in float64."""
    images = images.double().numpy()
    smooth = np.full((len(labels), 10), smoothing / 10)
    smooth[np.arange(len(labels)), labels] += 1 - smoothing
    mixed, targets = images.copy(), smooth.copy()
    for i, mix in enumerate(mixes):
        j, lam = partner(i), mix.lam
        if mix.box is None:
            mixed[i] = lam * images[i] + (1 - lam) * images[j]
        else:
            top, bottom, left, right = mix.box
            mixed[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
            assert lam == pytest.approx(1 - (bottom - top) * (right - left) / images[0, 0].size)
        targets[i] = lam * smooth[i] + (1 - lam) * smooth[j]
    return mixed, targets


@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_pairs_and_their_labels_against_a_float64_reference(minmax):
    images, labels = random_images(40), torch.arange(40) % 10
    seeds = np.random.default_rng(3).integers(0, 2**31, 40).tolist()
    mixer = pair_mix("AUG.CUTMIX_MINMAX", minmax, "AUG.MIXUP_PROB", 0.8)
    drawn = mixer.draw(seeds, 20, 24)
    assert len({mix.box is None for mix in drawn}) == 2 and UNMIXED in drawn
    mixed, targets = mixer(images, labels, seeds)
    want_images, want_targets = reference(images, labels, np.repeat(drawn, 2), 0.1, lambda i: i ^ 1)
    assert np.allclose(mixed, want_images, rtol=1e-6, atol=1e-6)
    assert np.allclose(targets, want_targets, rtol=1e-6, atol=1e-7)
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(40))


def test_batch_mode_mixes_image_i_with_image_from_the_other_end_by_one_draw():
    images, labels = random_images(6), torch.tensor([3, 1, 4, 1, 5, 9])
    mixer = BatchMix.from_config(config())
    boxes = set()
    for seed in range(6):
        mix = mixer.draw_one(generator(seed), 20, 24)
        boxes.add(mix.box is not None)
        mixed, targets = mixer(images, labels, seed)
        want_images, want_targets = reference(images, labels, [mix] * 6, 0.1, lambda i: 5 - i)
        assert np.allclose(mixed, want_images, rtol=1e-6, atol=1e-6)
        assert np.allclose(targets, want_targets, rtol=1e-6, atol=1e-7)
        assert torch.equal(mixer(images, None, seed)[0], mixed)
    assert boxes == {True, False}
    assert torch.equal(images, random_images(6))


def test_a_pair_depends_on_its_own_seeds_alone():
    images, labels = random_images(8), torch.arange(8)
    mixer = pair_mix()
    mixed, targets = mixer(images, labels, SEEDS)
    for first in range(0, 8, 2):
        part = slice(first, first + 2)
        alone, alone_targets = mixer(images[part], labels[part], SEEDS[part])
        assert torch.equal(alone, mixed[part]) and torch.equal(alone_targets, targets[part])
    swapped, _ = mixer(images[[1, 0]], None, [SEEDS[1], SEEDS[0]])
    assert torch.equal(swapped[[1, 0]], mixed[:2])


def test_an_image_paired_with_itself_goes_through_the_same_arithmetic():
    image = random_images(1)
    pair, labels = image.repeat(2, 1, 1, 1), torch.tensor([7, 7])
    mixer = pair_mix("AUG.CUTMIX", 0.0)
    mix = mixer.draw([123, 123], 20, 24)[0]
    # 123 ^ 123 = 9 ^ 9 = 0
    assert mix == mixer.draw([9, 9], 20, 24)[0] and 0 < mix.lam < 1 and mix.box is None
    mixed, targets = mixer(pair, labels, [123, 123])
    expected = image * np.float32(mix.lam) + image * np.float32(1 - mix.lam)
    assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1], expected[0])
    assert torch.allclose(mixed, pair, rtol=2**-22, atol=0)
    assert torch.allclose(targets, smooth_targets(labels, 10, 0.1), atol=1e-7)
    cut, _ = pair_mix("AUG.MIXUP", 0.0)(pair, None, [123, 123])
    assert torch.equal(cut, pair)


def test_nothing_of_the_given_images_or_of_global_generators_changes():
    images, labels = random_images(), torch.arange(8)
    numpy_state, torch_state = (
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.get_rng_state(),
    )
    first = pair_mix()(images, labels, SEEDS)
    second = pair_mix()(images, labels, torch.tensor(SEEDS))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(images, random_images())
    assert np.random.get_state()[1].tolist() == numpy_state and torch.equal(  # noqa: NPY002
        torch.get_rng_state(), torch_state
    )


def test_numpy_seeds_mix_as_python_integers_do():
    images = random_images()
    assert torch.equal(
        pair_mix()(images, None, np.array(SEEDS, np.int32))[0], pair_mix()(images, None, SEEDS)[0]
    )


def test_half_precision_images_keep_their_type():
    images = random_images().bfloat16()
    mixed, _ = pair_mix()(images, None, SEEDS)
    assert mixed.dtype == torch.bfloat16 and not torch.equal(mixed, images)


def test_without_labels_there_are_no_targets_and_no_class_count_is_needed():
    mixer = pair_mix("MODEL.NUM_CLASSES", 0)
    mixed, targets = mixer(random_images(), None, SEEDS)
    assert targets is None
    assert torch.equal(mixed, pair_mix()(random_images(), torch.arange(8), SEEDS)[0])


def test_a_missing_label_has_no_mass_and_takes_none_from_its_partner():
    labels = torch.tensor([-1, 4, -1, -1])
    mixer = pair_mix()
    seeds = SEEDS[:4]
    lam = [mix.lam for mix in mixer.draw(seeds, 20, 24)]
    _, targets = mixer(random_images(4), labels, seeds)
    own = smooth_targets(torch.tensor([4]), 10, 0.1)[0]
    assert torch.allclose(targets[0], (1 - lam[0]) * own) and torch.allclose(
        targets[1], lam[0] * own
    )
    assert torch.equal(targets[2:], torch.zeros(2, 10))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smooth_targets(smoothing, dtype):
    labels = torch.tensor([0, 9, -1, 5], dtype=dtype)
    expected = torch.zeros(4, 10)
    for row, label in enumerate(labels.tolist()):
        if label >= 0:
            expected[row] = smoothing / 10
            expected[row, label] += 1 - smoothing
    assert torch.allclose(smooth_targets(labels, 10, smoothing), expected, rtol=0, atol=1e-7)


def test_mixing_that_is_off_leaves_images_alone_and_smooths_labels():
    images, labels = random_images(7), torch.arange(7)
    for options in (("AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0), ("AUG.MIXUP_PROB", 0.0)):
        for mixer, seeds in (
            (pair_mix(*options), list(range(7))),
            (BatchMix.from_config(config(*options)), 0),
        ):
            assert not mixer.enabled
            mixed, targets = mixer(images, labels, seeds)
            assert torch.equal(mixed, images)
            assert torch.allclose(targets, smooth_targets(labels, 10, 0.1))


def test_an_unmixed_pair_keeps_every_bit():
    images = (
        torch.tensor([-0.0, float("inf"), 1.0, float("nan")]).reshape(2, 1, 1, 2).repeat(1, 3, 4, 4)
    )
    mixer = pair_mix("AUG.MIXUP_PROB", 0.5)
    seeds = next([seed, 0] for seed in range(99) if mixer.draw([seed, 0], 4, 8) == [UNMIXED])
    mixed, _ = mixer(images, None, seeds)
    assert mixed.numpy().tobytes() == images.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [2, 5])
@pytest.mark.parametrize(("height", "width"), [(20, 24), (33, 7), (1, 1), (5, 40)])
def test_all_groups_by_masks_are_each_group_by_itself(height, width, group, dtype):
    seeds = np.random.default_rng(7).integers(0, 2**31, 120).tolist()
    mixes = pair_mix("AUG.MIXUP_PROB", 0.8).draw(seeds, height, width)
    mixes += [Mix(1 - 2**-40), Mix(2**-40), Mix(1.0, (0, 0, 3, 3)), Mix(0.0, (0, height, 0, width))]
    assert {(mix == UNMIXED, mix.box is None) for mix in mixes} == {(1, 1), (0, 1), (0, 0)}
    generator = torch.Generator().manual_seed(height)
    groups = torch.randn(len(mixes), group, 3, height, width, generator=generator)
    groups[torch.rand(groups.shape, generator=generator) < 0.1] = 0.0  # of an erased box
    groups = groups.to(dtype)
    expected, numbers = groups.clone(), numbers_of(mixes, height, width)
    for images, mix in zip(expected, numbers[:, 3:9].tolist()):
        blend_(images, *mix)
    found = blended(groups, numbers)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert found.dtype == dtype and torch.equal(found.view(bits), expected.view(bits))


def test_masks_keep_the_memory_format():
    images = random_images().contiguous(memory_format=torch.channels_last)
    mixes = numbers_of(pair_mix().draw(SEEDS, 20, 24), 20, 24)
    mixed = blended(images.unflatten(0, (4, 2)), mixes).flatten(0, 1)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed, pair_mix()(images, None, SEEDS)[0])


def test_numbers_drawn_before_mix_as_seeds_do():
    images, labels = random_images(), torch.arange(8)
    numbers = numbers_of(pair_mix().draw(SEEDS, 20, 24), 20, 24)
    for found, expected in zip(
        pair_mix()(images, labels, SEEDS, numbers), pair_mix()(images, labels, SEEDS)
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mixing", ["pairs", "a batch", "none"])
def test_a_mixed_image_is_right_by_the_part_that_it_shows(mixing):
    options = () if mixing != "none" else ("AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)
    mixer = BatchMix.from_config(config()) if mixing == "a batch" else pair_mix(*options)
    seeds = 3 if mixing == "a batch" else SEEDS
    images, labels = random_images(), torch.tensor([7, 7, 2, 3, -1, 5, -1, -1])
    drawn = mixer.draw(seeds, 20, 24)
    lam = (
        [1.0] * 8
        if mixing == "none"
        else [mix.lam for mix in drawn for _ in range(8 // len(drawn))]
    )
    partner = [7 - i if mixing == "a batch" else i ^ 1 for i in range(8)]
    columns = [labels, labels[partner], torch.full((8,), 5), torch.full((8,), 9)]
    expected = [
        sum(
            lam[i] * (labels[i] == answers[i] >= 0)
            + (1 - lam[i]) * (labels[partner[i]] == answers[i] >= 0)
            for i in range(8)
        )
        for answers in columns
    ]
    answers = torch.stack(columns, 1).clamp(min=0)
    found = share_right(labels, answers, mixer.numbers(images, seeds))
    assert found.tolist() == pytest.approx([100 * float(value) / 8 for value in expected], rel=1e-6)


def test_probability_and_switch_are_honoured():
    seeds = np.random.default_rng(0).integers(0, 2**31, 4000).tolist()
    drawn = pair_mix("AUG.MIXUP_PROB", 0.7, "AUG.MIXUP_SWITCH_PROB", 0.2).draw(seeds, 224, 224)
    mixed = [mix for mix in drawn if mix != UNMIXED]
    assert len(mixed) / len(drawn) == pytest.approx(0.7, abs=0.04)
    assert sum(mix.box is not None for mix in mixed) / len(mixed) == pytest.approx(0.2, abs=0.04)
    assert all(mix.box is None for mix in pair_mix("AUG.CUTMIX", 0.0).draw(seeds, 224, 224))
    assert all(mix.box for mix in pair_mix("AUG.MIXUP", 0.0).draw(seeds, 224, 224))


@pytest.mark.parametrize("minmax", [None, (0.1, 1.0), (0.3, 0.6)])
def test_boxes_lie_inside_the_image_and_lam_is_what_they_leave(minmax):
    seeds = np.random.default_rng(1).integers(0, 2**31, 2000).tolist()
    for mix in pair_mix("AUG.MIXUP", 0.0, "AUG.CUTMIX_MINMAX", minmax).draw(seeds, 32, 48):
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 48
        assert mix.lam == 1 - (bottom - top) * (right - left) / (32 * 48)
        if minmax:
            assert int(32 * minmax[0]) <= bottom - top < int(32 * minmax[1])
            assert int(48 * minmax[0]) <= right - left < int(48 * minmax[1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("AUG.MIXUP", 0.4),
        ("AUG.CUTMIX", 0.5),
        ("AUG.CUTMIX_MINMAX", (0.2, 0.8)),
        ("AUG.MIXUP_PROB", 0.5),
        ("AUG.MIXUP_SWITCH_PROB", 0.1),
    ],
)
def test_each_key_changes_bits(key, value):
    plain, _ = pair_mix()(random_images(), None, SEEDS)
    other, _ = pair_mix(key, value)(random_images(), None, SEEDS)
    assert not torch.equal(plain, other)


def test_a_draw_reads_as_words():
    assert str(UNMIXED) == "not mixed"
    assert str(Mix(0.25)) == "mixup: 0.250 of itself"
    assert (
        str(Mix(0.75, (0, 8, 4, 8)))
        == "cutmix: rows 0-8, columns 4-8 from the partner, keeps 0.750"
    )


@pytest.mark.parametrize(
    ("options", "labels", "seeds", "message"),
    [
        ((), None, [1, 2, 3], "a batch of 3 images can't be mixed in pairs: use an even batch"),
        ((), None, [1, 2], "2 seeds for 3 images"),
        (("MODEL.NUM_CLASSES", 0, "AUG.MIXUP_PROB", 0.0), [1, 2, 3], [1, 2, 3], "NUM_CLASSES"),
    ],
)
def test_errors_say_what_is_wrong(options, labels, seeds, message):
    labels = None if labels is None else torch.tensor(labels)
    with pytest.raises(ValueError, match=message):
        pair_mix(*options)(random_images(3), labels, seeds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits():
    images, labels = random_images(), torch.arange(8)
    for mixer, seeds in ((pair_mix(), SEEDS), (BatchMix.from_config(config()), 3)):
        want = mixer(images, labels, seeds)
        there = images.cuda(), labels.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = mixer(*there, seeds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


def test_mixes_that_a_foreign_collation_leaves_empty_are_drawn():
    mix = PairMix(mixup_alpha=0.8, cutmix_alpha=1.0)
    images, seeds = torch.rand(4, 3, 8, 8), [1, 2, 3, 4]
    expected, _ = mix(images, None, seeds)
    for empty in (torch.empty(0), torch.empty(4, 0)):  # as `Batch` has it, and a stack of such
        assert torch.equal(mix(images, None, seeds, empty)[0], expected)
