"""Hostile configurations: each is one line, soon and in little memory, whatever it would cost."""

import json
import subprocess
import sys

import pytest

PRIME = 999_983
DIGITS = "9" * 400
NINE = range(9)
LISTS = (f"&a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 9)}]" for i in NINE)
LATER = (f"L{i}: &a{i} {{{', '.join(f'K{k}: *a{i - 1}' for k in NINE)}}}" for i in range(1, 9))
FILES = {
    "aliases": (
        f"DATA: {{MEAN: [{', '.join(LISTS)}]}}",
        "broken YAML: *a0 stands for another value, write that out",
    ),
    "aliases of groups": (
        f"TRAIN: {{L0: &a0 {{K: 1}}, {', '.join(LATER)}}}",
        "*a0 stands for another value",
    ),
    "merged groups": ("A: &a {B: 1}\nTRAIN: {<<: *a}", "*a stands for another value"),
    "a large file": ("TAG: " + "x" * 100_000, "more than 50,000 characters, which is no recipe"),
    "a long value": ("TAG: " + "x" * 40_000, "TAG: expected at most 3,000 characters"),
    "a long list": (f"DATA: {{MEAN: [{'1, ' * 9000}1]}}", "DATA.MEAN: expected at most 3,000"),
    "a long key": ("? " + "x" * 40_000 + "\n: 1", "unknown key"),
    "a key of two lines": ('"TRAIN.EPOCHS\\nx": 1', "TRAIN.EPOCHS x = 1: unknown key"),
    "400 digits": (f"TRAIN: {{EPOCHS: {DIGITS}}}", "9: expected a number from 1 to 100,000"),
    "400 digits for a fraction": (f"TRAIN: {{BASE_LR: {DIGITS}}}", "TRAIN.BASE_LR = inf: expected"),
    "400 digits in a list": (f"DATA: {{MEAN: [0, 0, {DIGITS}]}}", "numbers from -1,000 to 1,000"),
    "5,000 digits": ("SEED: " + "9" * 5000, "broken YAML: Exceeds the limit"),
    "40,000 digits": ("SEED: 0x" + "f" * 40_000, "SEED: expected at most 3,000 characters"),
    "deep lists": ("TAG: " + "[" * 40_000, "broken YAML: maximum recursion depth"),
    "deep groups": ("{a: " * 10_000, "broken YAML: maximum recursion depth"),
    "a list as key": ("? [a, b]\n: 1", "broken YAML: unhashable"),
    "no such day": ("TAG: 2001-13-45", "broken YAML: month must be in 1..12"),
    "EXPLICIT a number": ("EXPLICIT: 5", "EXPLICIT: expected a list of keys, found a int"),
    "EXPLICIT of lists": ("EXPLICIT: [[1]]", "EXPLICIT: expected a list of keys"),
    "EXPLICIT a group": ("EXPLICIT: {a: 1}", "EXPLICIT: expected a list of keys, found a dict"),
}
OPTIONS = [
    ("TRAIN.EPOCHS", str(10**9), "TRAIN.EPOCHS = 1000000000: expected a number from 1 to 100,000"),
    ("TRAIN.EPOCHS", DIGITS, "9: expected a number from 1 to 100,000"),
    ("TRAIN.BASE_LR", DIGITS, "TRAIN.BASE_LR = inf: expected a number from 0 to 1,000,000,000"),
    ("TRAIN.GLOBAL_BATCH", str(2**61 - 1), "expected a number from 0 to 1,000,000"),
    ("TRAIN.GLOBAL_BATCH", str(PRIME), f"split over 8 processes: use one of 1, {PRIME} processes"),
    ("DATA.IMG_SIZE", str(10**6), "DATA.IMG_SIZE = 1000000: expected a number from 32 to 4,096"),
    ("DATA.BATCH_SIZE", str(10**9), "expected a number from 1 to 1,000,000"),
    ("DATA.NUM_WORKERS", str(10**6), "expected a number from -1 to 1,000"),
    ("MODEL.NUM_CLASSES", str(10**12), "expected a number from 0 to 1,000,000"),
    ("MODEL.TINY_VIT.DEPTHS", "[2,2,6,999999]", "expected 4 whole numbers from 1 to 1,000"),
    ("MODEL.TINY_VIT.WINDOW_SIZES", "[7,7,9999,7]", "expected 4 whole numbers from 1 to 100"),
    ("AUG.RECOUNT", str(10**9), "expected a number from 1 to 1,000"),
    ("TAG", "x" * 100_000, "TAG: expected at most 3,000 characters"),
    ("x" * 100_000, "1", "unknown key"),
    ("DATA.MEAN", "[" * 2900, "expected a list of numbers, got str"),
    ("TRAIN.EPOCHS", "(" + "-" * 2900 + "1)", "expected a whole number, got str"),
    ("DATA.MEAN", "[&a [1,1], *a, *a]", "expected a list of numbers, got str"),
]
LOAD = """
import json, resource, sys
from configs import ConfigError, load_config

resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
for words in json.load(sys.stdin):
    try:
        load_config(words, 8)
        print("accepted")
    except ConfigError as error:
        print(json.dumps(str(error)))
"""


def faults(commands: list[list[str]], root) -> list[str]:
    """What a process of bounded memory and time says of each command line."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        input=json.dumps(commands),
        cwd=root,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(commands), (
        f"after {len(lines)}: {done.returncode} {done.stderr[-900:]}"
    )
    return [json.loads(line) for line in lines]


@pytest.mark.skipif(sys.platform == "win32", reason="bounds of a process's memory are POSIX's")
def test_a_hostile_file_is_one_line_that_names_it(tmp_path, root):
    paths = [tmp_path / f"{name}.yaml" for name in FILES]
    for path, (text, _) in zip(paths, FILES.values()):
        path.write_text(text)
    found = faults([["--cfg", str(path)] for path in paths], root)
    for path, (_, message), error in zip(paths, FILES.values(), found):
        assert error.startswith(f"{path}: ") and message in error, path
        assert len(error.splitlines()) == 1 and len(error) < 2100


@pytest.mark.skipif(sys.platform == "win32", reason="bounds of a process's memory are POSIX's")
def test_a_hostile_option_is_one_line_that_names_it(root):
    found = faults([["--opts", key, value] for key, value, _ in OPTIONS], root)
    for (key, _, message), error in zip(OPTIONS, found):
        assert error.startswith(f"--opts: {key[:400]}") and message in error, key
        assert len(error.splitlines()) == 1 and len(error) < 2100


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such file")
def test_an_endless_file_is_not_read_to_its_end(root):
    (error,) = faults([["--cfg", "/dev/zero"]], root)
    assert error == "/dev/zero: more than 50,000 characters, which is no recipe"
