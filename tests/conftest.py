"""Fixtures shared by the tests: the checked cases and the real data, where they are at hand."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TINYVIT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of cases checked against the original, or the test is skipped."""
    folder = SHARED / "goldens"
    if not folder.is_dir():
        pytest.skip(f"no goldens at {folder}: set TINYVIT_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, or the test is skipped."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TINYVIT_SHARED to the folder that holds it")
    return folder
