"""The decoder's bits under the oldest and the newest Pillow and numpy of the range in
requirements.txt, installed aside.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Releases to try for the oldest end: the first of them that has wheels for the running Python is
# it.
PILLOW = ("9.5", "10.0", "10.1", "10.2", "10.3", "10.4", "11.0", "11.1", "11.2", "11.3", "12.0")
NUMPY = ("1.26", "2.0", "2.1", "2.2", "2.3")
CANARY = """
import json, sys
import numpy, PIL
from configs.defaults import get_defaults
from data.augment.decoder import AugmentDecoder
cfg = get_defaults()
cfg.AUG.MIXUP_MODE = "pair2"
digests = AugmentDecoder.from_config(cfg).canary()
json.dump({"versions": [PIL.__version__, numpy.__version__], "digests": digests}, sys.stdout)
"""


def requirement(root: Path, name: str) -> str:
    """The version range of a package, as requirements.txt states it."""
    return re.search(
        rf"(?m)^{name}(\S+)$", (root / "requirements.txt").read_text(encoding="utf-8")
    )[1]


def install(folder: Path, specifiers: list[str]) -> str:
    """Install the first of the specifiers that can be installed; returns it, or skips the test."""
    options = "-q --disable-pip-version-check --retries 1 --no-deps --upgrade".split()
    command = [sys.executable, "-m", "pip", "install", *options]
    for specifier in specifiers:
        done = subprocess.run(
            [*command, "--only-binary", ":all:", "--target", folder, specifier],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return specifier
    pytest.skip(
        f"cannot install {specifiers[-1]}:"
        f" {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
    )


def run(root: Path, libraries: Path | None, *arguments: str) -> str:
    """The output of Python with a folder of libraries before the installed ones."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if libraries:
        environment["PYTHONPATH"] = str(libraries)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_oldest_releases_tried_begin_the_range(root):
    assert requirement(root, "Pillow") == f">={PILLOW[0]},<14"
    assert requirement(root, "numpy") == f">={NUMPY[0]}"


@pytest.mark.proof
@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_goldens_and_canary_at_the_ends_of_the_range(end, root, goldens, tmp_path):
    oldest = end == "oldest"
    installed = []
    for name, versions in (("Pillow", PILLOW), ("numpy", NUMPY)):
        newest = [f"{name}{requirement(root, name)}"]
        tried = [f"{name}=={version}.*" for version in versions] if oldest else newest
        installed.append(install(tmp_path, tried))
    theirs = json.loads(run(root, tmp_path, "-c", CANARY))
    ours = json.loads(run(root, None, "-c", CANARY))
    print(f"{end}: Pillow {theirs['versions'][0]}, numpy {theirs['versions'][1]}")
    for version, specifier in zip(theirs["versions"], installed):
        assert not oldest or version.startswith(specifier.split("==")[1].rstrip("*")), (
            "the environment's own library was used"
        )
    assert theirs["digests"] == ours["digests"]
    names = ("decoder", "plan", "pillow")
    tests = [f"tests/data/augment/test_{name}.py" for name in names]
    tests += ["-k", "golden or pillow or torchvision or timm"]
    output = run(root, tmp_path, "-m", "pytest", "-q", *tests)
    passed = int(re.search(r"(\d+) passed", output)[1])
    assert passed >= 60 and "skipped" not in output
