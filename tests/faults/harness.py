"""Spoil a whole file in some way, read it as a run does, and judge what came of it."""

import random
import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.kinds import Kind
from tests.faults.mutations import REPLACED, a_fifo, mutated, mutated_json, restore

LIMIT = 30  # seconds that reading may take


class Hang(BaseException):
    """Reading took too long: nothing that product code may catch."""


@dataclass
class Outcomes:
    """How often spoiled files of a kind were read, and what came of it."""

    cases: int = 0
    survived: int = 0  # what was read is what was written
    refused: int = 0  # by an error that a program tells in one line
    differed: int = 0  # something else was read, and nothing said
    broken: int = 0  # a traceback, or no end
    notes: list[str] = field(default_factory=list)  # of the last two


def spoil(kind: Kind, folder: Path, cases: int, seed: int) -> Outcomes:
    """Spoil files of a kind so many times, each time from whole ones."""
    rng = random.Random(f"{seed} {kind.name}")
    whole, place, found = folder / "whole", folder / "place", Outcomes()
    place.mkdir(parents=True)
    kind.make(place)
    shutil.copytree(place, whole)
    expected = kind.read(place)
    for number in range(cases):
        restore(place, whole)
        path = rng.choice(sorted(path for path in place.glob(kind.files) if path.is_file()))
        how = change(kind, path, number, rng)
        judge(kind, place, expected, f"case {number}, {path.name}: {how}", found)
    return found


def change(kind: Kind, path: Path, number: int, rng: random.Random) -> str:
    """Spoil a file, and say how; the first cases put other things in its place."""
    places = [place for place in REPLACED if place is not a_fifo or not kind.may_be_pipe]
    replaced = (*places, *kind.more)
    if number < len(replaced):
        replaced[number](path)
        return replaced[number].__name__
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.5:
        path.write_bytes(mutated_json(data, rng))
        return "another value"
    path.write_bytes(mutated(data, rng))
    return "other bytes"


def judge(kind: Kind, place: Path, expected: object, what: str, found: Outcomes) -> None:
    """Read what was spoiled, and count what came of it."""
    found.cases += 1
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = kind.read(place)
    except (ValueError, OSError) as error:
        # ours tell the path, or the key of a configuration; so does the system
        if "\n" in str(error) or not (str(place) in str(error) or getattr(error, "key", "")):
            found.broken += 1
            found.notes.append(f"{what}: {error!r} is no line that names the file")
        else:
            found.refused += 1
    except (Exception, Hang) as error:
        found.broken += 1
        found.notes.append(f"{what}: {''.join(traceback.format_exception(error)[-4:])}")
    else:
        if got == expected:
            found.survived += 1
        else:
            found.differed += 1
            if kind.promised:
                found.notes.append(f"{what}: read as something else")


@contextmanager
def bounded() -> Iterator[None]:
    """Raise Hang in what takes longer than the limit."""

    def end(number: int, frame: object) -> None:
        raise Hang(f"no end within {LIMIT} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
