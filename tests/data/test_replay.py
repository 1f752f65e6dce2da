"""The promise of the data side: the same bits for any number of workers, ranks and ways of
splitting a step, and in a fresh process.
"""

import hashlib
import json
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from configs import load_config
from data.augment.decoder import AugmentDecoder
from data.augment.pairs import PairMix
from data.augment.rng import sample_seed
from data.build import EpochLoader, open_run, resolve
from data.images.datasets import build_dataset
from data.replay import Batch, ReplayDataset
from data.store import record_dtype
from tests.support.jobs import words

IMAGES = 43  # odd, so that one image is its own partner
OPTS = (
    f"DATA.DATASET shapes DATA.SHAPES.TRAIN_IMAGES {IMAGES} DATA.SHAPES.VAL_IMAGES 13"
    " DATA.IMG_SIZE 48 DATA.SHAPES.SIZE 40 AUG.MIXUP_MODE pair2 DATA.BATCH_SIZE 4 AUG.REPROB 0.5"
)


def config(*opts: str, world_size: int = 1):
    return resolve(load_config(words("--opts", OPTS, *opts), world_size))


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def pass_over(epochs: EpochLoader, epoch: int, start: int = 0) -> list[list[tuple[int, int, str]]]:
    """(position, seed, digest of the image) of every sample, batch by batch."""
    return [
        [
            (int(p), int(s), sha(image))
            for p, s, image in zip(batch.position, batch.seed, batch.image)
        ]
        for batch in epochs.batches(epoch, start)
    ]


@pytest.fixture(scope="module")
def reference() -> list:
    cfg = config("DATA.NUM_WORKERS", 0)
    return [pass_over(open_run(cfg).train_loader(4), epoch) for epoch in range(2)]


def test_an_epoch_holds_every_image_and_the_odd_one_twice(reference):
    positions = [position for batch in reference[0] for position, _, _ in batch]
    assert (
        len(positions) == IMAGES + 1
        and set(positions) == set(range(IMAGES))
        and positions[-1] == positions[-2]
    )
    assert reference[0] != reference[1]
    assert all(
        seed == sample_seed(0, 0, position) for batch in reference[0] for position, seed, _ in batch
    )


@pytest.mark.parametrize(
    ("workers", "start"), [(1, "fork"), (2, "fork"), (4, "fork"), (2, "spawn")]
)
def test_workers_change_nothing_and_see_the_epoch(workers, start, reference):
    epochs = open_run(config("DATA.NUM_WORKERS", workers, "DATA.WORKER_START", start)).train_loader(
        4
    )
    # the same workers serve both epochs
    assert [pass_over(epochs, epoch) for epoch in range(2)] == reference


def steps(world: int, batch: int, accumulation: int, epoch: int) -> list[set]:
    """For each step the set of its pairs of (position, seed, digest), whoever computes them."""
    per_rank = []
    for rank in range(world):
        epochs = open_run(config("DATA.NUM_WORKERS", 0, world_size=world)).train_loader(
            batch, rank, world * batch * accumulation
        )
        batches = pass_over(epochs, epoch)
        per_rank.append(
            [
                list(chain(*batches[i : i + accumulation]))
                for i in range(0, len(batches), accumulation)
            ]
        )
    return [
        {tuple(flat[i : i + 2]) for flat in rank_steps for i in range(0, len(flat), 2)}
        for rank_steps in zip(*per_rank)
    ]


def test_a_step_is_the_same_however_it_is_split():
    expected = steps(1, 12, 1, epoch=1)
    assert len(expected) == 3 and all(len(step) == 6 for step in expected)
    for split in ((1, 4, 3), (2, 6, 1), (3, 4, 1), (3, 2, 2), (2, 2, 3)):
        assert steps(*split, epoch=1) == expected, split


def test_four_ranks_see_what_one_does():
    expected = steps(1, 8, 1, epoch=0)
    assert steps(4, 2, 1, epoch=0) == expected == steps(2, 2, 2, epoch=0)


def test_fast_forward_continues_where_the_epoch_was_left(reference):
    epochs = open_run(config("DATA.NUM_WORKERS", 2)).train_loader(4)
    assert pass_over(epochs, 0, start=20) == reference[0][5:]
    assert pass_over(epochs, 1) == reference[1]


def test_a_fresh_process_finds_the_same_bits(root, reference):
    code = """
import json
from tests.data.test_replay import config, open_run, pass_over
print(json.dumps(pass_over(open_run(config("DATA.NUM_WORKERS", 0)).train_loader(4), 1)[:3]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert [[tuple(sample) for sample in batch] for batch in json.loads(done.stdout)] == reference[
        1
    ][:3]


def test_another_base_seed_gives_other_images():
    first = [
        pass_over(open_run(config("DATA.NUM_WORKERS", 0, "DATA.SEED", seed)).train_loader(4), 0)[0]
        for seed in (0, 1)
    ]
    assert not {digest for *_, digest in first[0]} & {digest for *_, digest in first[1]}


def test_validation_deals_every_image_once():
    seen = []
    for rank in range(3):
        epochs = open_run(config("DATA.NUM_WORKERS", 0, world_size=3)).val_loader(rank)
        seen += [sha(image) for images, _ in epochs.batches(0) for image in images]
    alone = [
        sha(image)
        for images, _ in open_run(config("DATA.NUM_WORKERS", 0)).val_loader().batches(0)
        for image in images
    ]
    assert len(alone) == 13 and sorted(seen) == sorted(alone)


class OneEpochStore:
    """A store in memory whose records tell their position."""

    root, k = "memory", 5

    def __init__(self, images: int) -> None:
        self.records = np.zeros(images, record_dtype(5, 1000))
        for i, record in enumerate(self.records):
            record["seed"], record["index"], record["prob"] = (
                1000 + i,
                [i, 1, 2, 3, 4],
                [0.5, 0.25, 0.125, 0.0625, 0.03125],
            )

    def __len__(self) -> int:
        return len(self.records)

    def open_records(self, epoch: int) -> np.ndarray:
        return self.records


def test_stored_seeds_and_records_are_used():
    cfg = config()
    images, decoder = build_dataset(cfg, "train"), AugmentDecoder.from_config(cfg)
    sample = ReplayDataset(images, decoder, OneEpochStore(IMAGES))[7]
    assert isinstance(sample, Batch) and sample.seed == 1007 and sample.position == 7
    assert (
        torch.equal(sample.image, decoder.decode(images[7][0], 1007))
        and sample.label == images[7][1]
    )
    assert sample.indices.tolist() == [7, 1, 2, 3, 4] and sample.probs.dtype == torch.float32
    fewer = ReplayDataset(images, decoder, OneEpochStore(IMAGES), topk=2)[(0, 7)]
    assert fewer.indices.tolist() == [7, 1] and fewer.probs.tolist() == [0.5, 0.25]


def test_more_columns_than_stored_and_another_number_of_images_are_refused():
    cfg = config()
    images, decoder = build_dataset(cfg, "train"), AugmentDecoder.from_config(cfg)
    with pytest.raises(
        ValueError,
        match="store memory holds top-5, 9 are asked for: set DISTILL.LOGITS_TOPK 5 or less",
    ):
        ReplayDataset(images, decoder, OneEpochStore(IMAGES), topk=9)
    with pytest.raises(
        ValueError,
        match=f"store memory was written for {IMAGES + 1} images, the data set has {IMAGES}",
    ):
        ReplayDataset(images, decoder, OneEpochStore(IMAGES + 1))


def test_a_part_of_the_data_is_found_by_the_stores_positions():
    cfg = config()
    images, decoder = build_dataset(cfg, "train"), AugmentDecoder.from_config(cfg)
    local = np.full(IMAGES + 5, -1)
    local[5:] = np.arange(IMAGES)  # the store has five images more, at its beginning
    replay = ReplayDataset(images, decoder, OneEpochStore(IMAGES + 5), index_of=local)
    assert replay.available.sum() == IMAGES and len(replay) == IMAGES + 5
    assert torch.equal(replay[12].image, decoder.decode(images[7][0], 1012))


def test_a_plain_loop_over_the_wrapper():
    """A foreign loop: PyTorch's own loader, an epoch set by hand, pairs mixed afterwards."""
    cfg = config()
    replay = ReplayDataset(
        build_dataset(cfg, "train"), AugmentDecoder.from_config(cfg), OneEpochStore(IMAGES)
    )
    replay.set_epoch(0)
    for batch in DataLoader(replay, batch_size=6, drop_last=True):
        mixed, targets = PairMix.from_config(cfg)(batch.image, None, batch.seed)
        assert mixed.shape == (6, 3, 48, 48) and targets is None and batch.indices.shape == (6, 5)


def test_resolve_tells_what_the_data_knows():
    cfg = config()
    assert (cfg.MODEL.NUM_CLASSES, cfg.AUG.FILL) == (10, [124, 116, 104]) and cfg.is_frozen()
    assert resolve(cfg) == cfg
    with pytest.raises(
        ValueError, match="7 classes .* the 10 of .*: set MODEL.NUM_CLASSES 10 or m"
    ):
        config("MODEL.NUM_CLASSES", 7)
    with pytest.raises(ValueError, match="7 classes .* they are those of the given weights: give"):
        resolve(cfg.replace({"MODEL.NUM_CLASSES": 0}), num_outputs=7)
