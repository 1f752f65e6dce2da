"""A sample of `make faults`: spoiled files of each kind are read as written, or refused."""

import signal

import pytest

from tests.faults.harness import Kind, spoil
from tests.faults.kinds import KINDS

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="a hang could not be ended")
CASES = 60


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_spoiled_files_teach_nothing_wrong(kind: Kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    found = spoil(kind, tmp_path, CASES, seed=1)
    assert not found.notes, "\n".join(found.notes)
    assert found.cases == CASES and found.survived + found.refused + found.differed == CASES
    assert found.refused or found.survived or not kind.promised


def test_the_harness_sees_what_is_read_silently_and_what_breaks(tmp_path):
    def make(folder):
        (folder / "file").write_bytes(bytes(range(200)))

    careless = Kind(
        "careless", make, lambda folder: (folder / "file").read_bytes(), "file", may_be_pipe=True
    )
    found = spoil(careless, tmp_path / "careless", 40, seed=1)
    assert found.differed > 20 and len(found.notes) == found.differed

    def fragile(folder):
        return {0: 1}[(folder / "file").read_bytes()[0]]

    brittle = Kind("fragile", make, fragile, "file", may_be_pipe=True)
    found = spoil(brittle, tmp_path / "fragile", 40, seed=1)
    assert found.broken and "Error" in found.notes[0]

    def silent(folder):
        if (folder / "file").read_bytes()[:9] != bytes(range(9)):
            raise ValueError("something is wrong")

    unclear = Kind("unclear", make, silent, "file", may_be_pipe=True)
    found = spoil(unclear, tmp_path / "unclear", 40, seed=1)
    assert found.broken and "no line that names the file" in found.notes[0]
