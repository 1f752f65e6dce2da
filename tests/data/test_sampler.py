"""The order of an epoch: the original's where nothing is padded, and the same steps for every way
of splitting them.
"""

import itertools
import json
import pickle
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data.sampler import CHUNK_UNITS, EpochBatches, EpochSampler


def permutation(num_images: int, seed: int) -> list[int]:
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed)).tolist()


def ranks(num_images: int, world_size: int, epoch: int = 0, **options) -> list[list[int]]:
    """Every rank's positions of an epoch."""
    result = []
    for rank in range(world_size):
        sampler = EpochSampler(num_images, world_size, rank, **options)
        sampler.set_epoch(epoch)
        result.append(list(sampler))
        assert len(result[-1]) == len(sampler)
    return result


def steps(
    num_images: int, world_size: int, batch: int, accumulation: int, epoch: int = 0, **options
) -> list[list[tuple[int, ...]]]:
    """The units (pairs or images) of each global step, sorted: read rank by rank from batches, as a
    training loop does.
    """
    unit = 2 if options.get("paired") else 1
    result: list[list[tuple[int, ...]]] = []
    for rank in range(world_size):
        sampler = EpochSampler(
            num_images, world_size, rank, step_images=world_size * batch * accumulation, **options
        )
        batches = EpochBatches(sampler, batch)
        batches.set_epoch(epoch)
        for number, pairs in enumerate(batches):
            assert len(pairs) == batch
            assert {e for e, _ in pairs} == {epoch}
            positions = [position for _, position in pairs]
            step = number // accumulation
            if step == len(result):
                result.append([])
            result[step] += [tuple(positions[i : i + unit]) for i in range(0, batch, unit)]
        assert number + 1 == len(result) * accumulation == len(batches)
    return [sorted(step) for step in result]


def test_equals_the_original_where_it_neither_pads_nor_drops_nor_fails(goldens):
    compared = Counter()
    for name, case in json.loads((goldens / "sampler.json").read_text()).items():
        fields = {key: int(value) for key, value in re.findall(r"([A-Za-z]+)(\d+)", name)}
        num_images, world_size, pair = fields["N"], fields["W"], fields["pair"]
        positions = ranks(
            num_images, world_size, fields["ep"], shuffle=bool(fields["shuf"]), paired=bool(pair)
        )[fields["r"]]
        whole = num_images % (world_size * (2 if pair else 1)) == 0  # nothing to pad or to drop
        if whole or not (pair or fields["pad"]):
            assert positions == case["idx"], name
            compared[num_images, world_size, pair] += 1
        # the original's padding comes after what is ours
        elif "error" not in case and fields["dl"] == 0:
            common = min(len(positions), len(case["idx"]) - (2 if pair else 1))
            assert positions[:common] == case["idx"][:common], name
    assert set(compared) == {(64, w, p) for w in (1, 2, 4) for p in (0, 1)} | {
        (7, w, 0) for w in (1, 2, 4)
    }


@pytest.mark.parametrize("seed", [0, 5])
def test_an_epoch_is_randperm_seeded_with_seed_plus_epoch(seed):
    assert ranks(101, 1, epoch=3, seed=seed) == [permutation(101, seed + 3)]
    assert ranks(101, 1, epoch=3, seed=seed, shuffle=False) == [list(range(101))]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_images", [1, 2, 7, 8, 30, 31])
def test_units_are_dealt_in_turn_and_none_is_lost_or_padded(num_images, world_size, paired):
    unit = 2 if paired else 1
    order = permutation(num_images, 2)
    if paired and num_images % 2:
        order = order + order[-1:]  # the last image is its own partner
    units = [order[i : i + unit] for i in range(0, len(order), unit)]
    for rank, positions in enumerate(ranks(num_images, world_size, epoch=2, paired=paired)):
        assert positions == list(itertools.chain(*units[rank::world_size]))


def test_an_odd_pair_is_an_image_twice_in_a_row_on_one_rank():
    positions = ranks(31, 4, paired=True)
    last = permutation(31, 0)[-1]
    assert Counter(itertools.chain(*positions))[last] == 2
    assert [p[-2:] for p in positions].count([last, last]) == 1


SPLITS_OF_24 = [
    (1, 24, 1),
    (1, 12, 2),
    (1, 4, 6),
    (2, 12, 1),
    (2, 6, 2),
    (3, 8, 1),
    (3, 4, 2),
    (4, 6, 1),
    (4, 2, 3),
    (6, 4, 1),
    (12, 2, 1),
]


@pytest.mark.parametrize(
    "options", [{}, {"paired": True}, {"paired": True, "shuffle": False}, {"seed": 9}], ids=str
)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("num_images", [48, 119, 240, 251])
def test_the_units_of_every_step_do_not_depend_on_how_the_step_is_split(
    num_images, missing, options
):
    if missing:
        options = {**options, "available": np.random.default_rng(1).random(num_images) < 0.9}
    reference = steps(num_images, *SPLITS_OF_24[0], epoch=1, **options)
    assert reference and all(
        len(step) == 24 // (2 if options.get("paired") else 1) for step in reference
    )
    for split in SPLITS_OF_24[1:]:
        assert steps(num_images, *split, epoch=1, **options) == reference, split


@pytest.mark.parametrize("paired", [False, True])
def test_the_steps_are_consecutive_runs_of_the_epochs_order(paired):
    order = permutation(100, 4)
    expected = [sorted(order[first : first + 24]) for first in range(0, 96, 24)]
    found = steps(100, 3, 4, 2, epoch=4, paired=paired)
    assert [sorted(itertools.chain(*step)) for step in found] == expected


def test_training_cuts_to_whole_steps_and_saving_keeps_all():
    assert [len(p) for p in ranks(47, 2, step_images=12)] == [18, 18]
    assert [len(p) for p in ranks(48, 2, step_images=12)] == [24, 24]
    # 24 pairs, the last with itself
    assert [len(p) for p in ranks(47, 2, paired=True, step_images=12)] == [24, 24]
    assert [len(p) for p in ranks(47, 2)] == [24, 23]
    assert [len(p) for p in ranks(46, 4, paired=True)] == [12, 12, 12, 10]


@pytest.mark.parametrize("paired", [False, True])
def test_missing_images_are_skipped_with_their_partners(paired):
    available = np.ones(21, bool)
    order = permutation(21, 6)
    available[[order[3], order[8], order[9]]] = False
    sampler = EpochSampler(21, 1, 0, paired=paired, available=available)
    sampler.set_epoch(6)
    gone = {2, 3, 8, 9} if paired else {3, 8, 9}
    expected = [position for place, position in enumerate(order) if place not in gone]
    assert list(sampler) == expected + (expected[-1:] if paired else [])
    assert sampler.skipped == len(gone)
    available[order[-1]] = False  # the image that is its own partner
    sampler = EpochSampler(21, 1, 0, paired=paired, available=available)
    sampler.set_epoch(6)
    assert list(sampler) == expected[:-1]
    assert sampler.skipped == len(gone) + 1
    assert EpochSampler(21, 1, 0, paired=paired).skipped == 0


def test_pairs_kept_vary_with_the_epoch_and_so_does_the_length():
    available = np.random.default_rng(0).random(400) < 0.5
    sampler = EpochSampler(400, 1, 0, paired=True, available=available)
    lengths = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        positions = list(sampler)
        assert available[positions].all()
        assert len(positions) == len(sampler) == sampler.length(epoch) == 400 - sampler.skipped
        pairs = np.array(permutation(400, epoch)).reshape(-1, 2)
        assert positions == pairs[available[pairs].all(1)].ravel().tolist()
        lengths.append(len(positions))
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("num_images", [40, 2 * CHUNK_UNITS * 3 + 5])
@pytest.mark.parametrize("paired", [False, True])
def test_fast_forward_gives_the_rest_of_the_same_epoch(num_images, paired):
    for rank in range(3):
        sampler = EpochSampler(num_images, 3, rank, paired=paired)
        sampler.set_epoch(2)
        whole = list(sampler)
        for start in (0, 2, 8, len(whole) // 4 * 2, len(whole)):
            sampler.set_epoch(2, start)
            assert list(sampler) == whole[start:]
            assert len(sampler) == len(whole)
        batches = EpochBatches(sampler, 4)
        batches.set_epoch(2)
        every = list(batches)
        assert [position for batch in every for _, position in batch] == whole
        batches.set_epoch(2, 8)
        assert list(batches) == every[2:]
        assert len(batches) == len(every)


def test_positions_come_as_python_integers_in_small_pieces():
    sampler = EpochSampler(3 * CHUNK_UNITS, 1, 0, shuffle=False)
    assert all(type(position) is int for position in itertools.islice(sampler, 10))
    assert list(sampler) == list(range(3 * CHUNK_UNITS))


@pytest.mark.skipif(not hasattr(sys, "getallocatedblocks"), reason="needs CPython")
def test_memory_beyond_the_permutation_is_constant():
    sampler = EpochSampler(300_000, 1, 0, paired=True)
    positions = iter(sampler)
    next(positions)
    before = sys.getallocatedblocks()
    for _ in itertools.islice(positions, 200_000):
        pass
    # a list of all positions would hold 300,000 integers
    assert sys.getallocatedblocks() - before < CHUNK_UNITS


def test_a_running_iteration_keeps_its_epoch():
    batches = EpochBatches(EpochSampler(16, 1, 0), 4)
    first = iter(batches)
    batches.set_epoch(1)
    assert list(first) == [[(0, p) for p in permutation(16, 0)[i : i + 4]] for i in range(0, 16, 4)]
    assert [e for batch in batches for e, _ in batch] == [1] * 16


def test_only_wanted_batches_are_dealt_and_they_are_composed_as_ever():
    batches = EpochBatches(EpochSampler(30, 2, 1, paired=True), 4)
    batches.set_epoch(3)
    every = list(batches)
    asked = []

    def wanted(number, positions):
        asked.append((number, positions))
        return number % 2 == 1

    batches.set_epoch(3, 0, wanted)
    assert list(batches) == every[1::2]
    assert asked == [
        (number, [position for _, position in batch]) for number, batch in enumerate(every)
    ]
    batches.set_epoch(3, 4, wanted)
    assert list(batches) == every[2::2]  # counted from where it starts
    batches.set_epoch(3)
    assert list(batches) == every


def test_a_sampler_survives_pickling():
    sampler = EpochSampler(50, 2, 1, seed=3, paired=True, step_images=8)
    sampler.set_epoch(4, 6)
    copy = pickle.loads(pickle.dumps(EpochBatches(sampler, 2)))
    assert list(copy) == list(EpochBatches(sampler, 2))


class Echo(Dataset):
    """Returns what it is asked for."""

    def __getitem__(self, index):
        return index

    def __len__(self):
        return 30


def test_a_loader_takes_the_batches_and_a_plain_sampler_too():
    loader = DataLoader(
        Echo(), batch_sampler=EpochBatches(EpochSampler(30, 2, 0, paired=True), 4), collate_fn=list
    )
    loader.batch_sampler.set_epoch(2)
    assert [item for batch in loader for item in batch] == [
        (2, p) for p in ranks(30, 2, epoch=2, paired=True)[0]
    ]
    assert len(loader) == 4
    loader = DataLoader(Echo(), batch_size=5, sampler=EpochSampler(30, 1, 0), collate_fn=list)
    assert [item for batch in loader for item in batch] == permutation(30, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EpochSampler(0, 1, 0), "an epoch of 0 images"),
        (lambda: EpochSampler(8, 2, 2), "rank 2 of 2 processes"),
        (lambda: EpochSampler(8, 0, 0), "rank 0 of 0 processes"),
        (lambda: EpochSampler(8, 1, 0, step_images=0), "step_images 0"),
        (
            lambda: EpochSampler(8, 1, 0, step_images=16),
            "epoch 0 has 8 images, fewer than one global step of 16: set TRAIN.GLOBAL_BATCH 8,",
        ),
        (
            lambda: EpochSampler(13, 3, 0, step_images=18, paired=True),
            "fewer than one global step of 18: set TRAIN.GLOBAL_BATCH 12, which wins over DATA.BA",
        ),
        (
            lambda: EpochSampler(2, 4, 0, step_images=16),
            "fewer than one global step of 16: use fewer processes, or use more data",
        ),
        (
            lambda: EpochSampler(64, 3, 0, step_images=16),
            "a step of 16 images can't be dealt to 3 processes in whole images",
        ),
        (
            lambda: EpochSampler(64, 4, 0, step_images=12, paired=True),
            "a step of 12 images can't be dealt to 4 processes in whole pairs",
        ),
        (
            lambda: EpochSampler(8, 1, 0, available=np.ones(7, bool)),
            r"available is bool\[7\], expected one bool for each of 8 positions",
        ),
        (lambda: EpochSampler(8, 1, 0, available=np.arange(8)), r"available is int64\[8\]"),
        (
            lambda: EpochSampler(8, 1, 0, step_images=4, available=np.arange(8) < 3),
            r"3 images \(5 of 8 are not available\), fewer than",
        ),
        (
            lambda: EpochSampler(8, 1, 0, step_images=4, paired=True, available=np.arange(8) < 2),
            r"\d of 8 are not available: pairs are mixed, and of most a partner is not in",
        ),
        (
            lambda: EpochSampler(8, 2, 0).set_epoch(0, 5),
            "can't start at position 5: rank 0 has 4 positions in epoch 0",
        ),
        (
            lambda: EpochSampler(8, 2, 0, paired=True).set_epoch(0, 1),
            "can't start at position 1: it would split a pair",
        ),
        (
            lambda: EpochBatches(EpochSampler(8, 1, 0, paired=True), 3),
            "a batch of 3 images splits a pair: use an even batch size",
        ),
        (lambda: EpochBatches(EpochSampler(8, 1, 0), 0), "a batch of 0 images"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
