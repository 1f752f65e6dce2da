"""Fixtures shared by the tests: the checked cases and the real data, where they are at hand."""

import os
from pathlib import Path

# One thread a process, here and in the processes that tests start: several processes share few
# cores, and threads that wait for
# each other on a busy machine are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TINYVIT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of cases that were made with the original."""
    folder = ROOT / "tests" / "goldens"
    assert (folder / "augment_index.json").is_file(), f"{folder} is incomplete: restore it with git"
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images, or the test is skipped."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TINYVIT_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Lists of images that tests make stay out of the user's cache, also in the processes that
    tests start.
    """
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before
