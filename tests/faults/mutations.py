"""What can happen to a file: seeded mutations of its bytes, and other things in its place."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANDOM_VALUES = (None, 0, -1, 1e308, 10**30, "x", [], {}, True, [1, [2]], {"a": {}}, float("nan"))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file after one fault, often near an end, where formats keep structure."""
    body = bytearray(data)
    edge = min(len(body), 4096)
    place = rng.choice(
        [rng.randrange(len(body)), rng.randrange(edge), len(body) - 1 - rng.randrange(edge)]
    )
    length = rng.choice([1, 2, 8, 64, 4096])
    match rng.randrange(9):
        case 0 | 1:
            body[place] ^= 1 << rng.randrange(8)
        case 2:
            del body[place:]
        case 3:
            del body[place : place + length]
        case 4:
            body[place:place] = rng.randbytes(length)
        case 5:
            body[place : place + length] = bytes(len(body[place : place + length]))
        case 6:
            body[place : place + length] = b"\xff" * len(body[place : place + length])
        case 7:
            body[place : place + length] = body[place : place + length] * 2
        case 8:
            other = rng.randrange(len(body))
            ours, theirs = body[place : place + length], body[other : other + length]
            body[other : other + length], body[place : place + length] = ours, theirs
    return bytes(body)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file that is still JSON, but for one value that is gone or another one."""
    tree = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(RANDOM_VALUES)
    return json.dumps(tree).encode()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


REPLACED: tuple[Callable[[Path], None], ...] = (emptied, removed, a_folder, a_dangling_link, a_fifo)


def exchanged(path: Path) -> None:
    """A file, and what shares its name, for those of the next one of its kind."""
    other = _next(path)
    for one in list(path.parent.glob(f"{path.stem}.*")):
        shutil.copyfile(other.with_suffix(one.suffix), one)


def exchanged_alone(path: Path) -> None:
    """A file for the next one of its kind."""
    shutil.copyfile(_next(path), path)


def _next(path: Path) -> Path:
    others = sorted(path.parent.glob(f"{path.name[:3]}*{path.suffix}"))
    return others[(others.index(path) + 1) % len(others)]


def restore(folder: Path, kept: Path) -> None:
    """Make a folder what it was."""
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
