"""Where randomness comes from: seeds as pure functions, and the draw rules every replayable op
uses.
"""

from collections.abc import Sequence
from typing import TypeVar

from numpy.random import PCG64, Generator, SeedSequence

Item = TypeVar("Item")

SEED_LIMIT = 2**31  # seeds of images are stored as int32


def sample_seed(base: int, epoch: int, position: int) -> int:
    """The seed in [0, 2**31) of the image at `position` in `epoch`: a pure function, so any process
    finds the same one.
    """
    return int(SeedSequence(base, spawn_key=(epoch, position)).generate_state(1)[0]) % SEED_LIMIT


def pair_seed(seed_a: int, seed_b: int) -> int:
    """The seed of what two images share; either order gives the same one."""
    return int(seed_a) ^ int(seed_b)


def run_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """The seed in [0, 2**63) of one process in one step of a run."""
    return (
        int(SeedSequence(seed, spawn_key=(epoch, step, rank)).generate_state(1, "uint64")[0]) >> 1
    )


def generator(seed: int) -> Generator:
    """The generator from which everything about one image, pair or step is drawn."""
    return Generator(PCG64(int(seed)))


def uniform(rng: Generator, low: float, high: float) -> float:
    """A number in [low, high)."""
    return rng.random() * (high - low) + low


def integer(rng: Generator, low: int, high: int) -> int:
    """A whole number in [low, high], both ends included."""
    return min(int(rng.random() * (high - low + 1)) + low, high)


def gauss(rng: Generator, mean: float, std: float) -> float:
    """A normally distributed number."""
    return rng.normal(mean, std)


def beta(rng: Generator, a: float, b: float) -> float:
    """A beta distributed number in [0, 1]."""
    return rng.beta(a, b)


def choice(rng: Generator, items: Sequence[Item]) -> Item:
    """One of `items`."""
    return items[integer(rng, 0, len(items) - 1)]


def shuffle(rng: Generator, items: Sequence[Item]) -> list[Item]:
    """The items in a random order, as a new list (Fisher-Yates, from the end)."""
    shuffled = list(items)
    for i in range(len(shuffled) - 1, 0, -1):
        j = integer(rng, 0, i)
        shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled
