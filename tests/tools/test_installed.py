"""The package that `pip install .` makes: console commands, and no room of ours beside others'."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import ROOT
from tests.support.training import command

PARTS = "configs data models tools pyproject.toml LICENSE".split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which a copy of this checkout is installed."""
    folder = tmp_path_factory.mktemp("installed")
    checkout = folder / "checkout"
    checkout.mkdir()
    for source in (*map(ROOT.joinpath, PARTS), *ROOT.glob("*.py")):
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, checkout / source.name)
    words = "-m pip install --quiet --no-deps --disable-pip-version-check --target".split()
    subprocess.run([sys.executable, *words, folder / "site", checkout], check=True)
    return folder / "site"


def ended(site: Path, folder: Path, name: str, *words: str) -> subprocess.CompletedProcess:
    """A console command's end, started in a folder of the user's."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(site / "bin" / f"tinyvit-{name}"), *words]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)


def test_no_room_of_ours_stands_among_others_packages(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"bin", "tinyvit"}


def test_training_from_anywhere(installed, tmp_path):
    recipe = ["--cfg", "configs/shapes/student.yaml"]  # the package's own
    words = [*command("runs"), "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    trained = ended(installed, tmp_path, "train", *recipe, *words)
    assert trained.returncode == 0, trained.stderr
    assert len([*tmp_path.glob("runs/*/*/checkpoints/last.pth")]) == 1


def test_it_needs_what_is_listed_in_requirements():
    project = (ROOT / "pyproject.toml").read_text()
    listed = (ROOT / "requirements.txt").read_text().partition("# Development")[0]
    for line in listed.splitlines():
        assert line.startswith("#") or f'"{line}"' in project, line


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_every_tool_with_a_command_line_has_a_command(path, installed):
    if "ArgumentParser(" in path.read_text() and path.stem != "size":  # counts a checkout's tokens
        assert (installed / "bin" / f"tinyvit-{path.stem.replace('_', '-')}").is_file()


@pytest.mark.parametrize(
    ("name", "text"),
    [("save-logits", "--check-saved-logits"), ("logits", "verify")],
)
def test_commands_explain_themselves(installed, tmp_path, name, text):
    shown = ended(installed, tmp_path, name, "--help")
    assert shown.returncode == 0 and text in shown.stdout
