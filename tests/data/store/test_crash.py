"""Real crashes: killed writers, full and read-only file systems, each in processes of their own."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.store import LogitsStoreReader, LogitsStoreWriter

ROOT = Path(__file__).resolve().parents[3]
IMAGES = 2400
KEYS = [f"class {i % 7}/image {i:05d}.jpg" for i in range(IMAGES)]

# A job: begins or resumes epoch 0 with a world size, writes the batches that are not whole, seals.
# It tells each step in a line and waits for one, so that no kill comes long after its moment.
JOB = """
import sys
import numpy as np
from data.store import LogitsStoreWriter
from tests.support.store_samples import batches, manifest, records_of
from tests.data.store.test_crash import IMAGES, KEYS, fast_records

def tell(*words):
    print(*words, flush=True)
    sys.stdin.readline()

root, world = sys.argv[1], int(sys.argv[2])
writers = [LogitsStoreWriter(root, manifest(), KEYS) for _ in range(world)]
missing = set(writers[0].missing(0).tolist())
for rank, writer in enumerate(writers):
    writer.begin_epoch(0, rank)
plans = [batches(0, IMAGES, 64 // world, world, rank) for rank in range(world)]
for step in range(max(map(len, plans))):
    for writer, plan in zip(writers, plans):
        if step < len(plan) and not missing.isdisjoint(plan[step].tolist()):
            writer.append(plan[step], fast_records(0, plan[step]))
    tell("step", step)
for writer in writers:
    writer.end_epoch()
tell("sealing")
writers[0].seal(0)
tell("sealed")
"""


def fast_records(epoch: int, positions: np.ndarray) -> np.ndarray:
    """Records of any number of images without a generator for each."""
    from data.store.format import pack_records
    from tests.support.store_samples import CLASSES, K

    seeds = (positions.astype(np.int64) * 2654435761 + epoch) % 2**31
    return pack_records(
        seeds, (seeds[:, None] + np.arange(K)) % CLASSES, np.full((len(positions), K), 0.1), CLASSES
    )


def start(root: Path, world: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command, pipe = [sys.executable, "-c", JOB, str(root), str(world)], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def kill_after(process: subprocess.Popen, lines: int) -> None:
    """SIGKILL while the job is doing what follows its so many-th line."""
    for told in range(1, lines + 1):
        if not process.stdout.readline():
            break
        process.stdin.write("go on\n")
        process.stdin.flush()
        if told == lines:
            process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


def finish(root: Path, world: int) -> None:
    process = start(root, world)
    output = process.communicate(timeout=60)[0]  # its stdin ends, so it waits for nothing
    assert process.returncode == 0 and output.endswith("sealed\n")


def kill_and_finish(folder: Path, kills: int, seed: int, worlds: tuple[int, ...]) -> None:
    """A job killed again and again, at moments drawn from a seed, ends with the bytes of one that
    never was.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    finish(folder / "whole", 1)
    root, steps, killed = folder / "it's killed", -(-IMAGES // 64) + 3, 0
    while killed < kills:
        process = start(root, int(rng.choice(worlds)))
        kill_after(process, int(rng.integers(1, steps)))
        killed += process.returncode == -signal.SIGKILL
        reader = LogitsStoreReader(root)
        if reader.epochs():  # it was quicker than the signal: nothing is sealed that is not whole
            assert not any(reader.faults(0))
            shutil.rmtree(root)
    finish(root, worlds[-1])
    assert not any(reader.faults(0))
    assert (root / "epoch_0000.npy").read_bytes() == (
        folder / "whole" / "epoch_0000.npy"
    ).read_bytes()
    with LogitsStoreWriter(root, reader.manifest, reader.keys) as writer:
        assert writer.missing(0).tolist() == []
    assert {path.suffix for path in root.iterdir()} <= {".json", ".npy", ".txt"}


@pytest.mark.parametrize("worlds", [(1,), (1, 2, 4)])
def test_a_killed_writer_is_resumed_with_equal_bytes(tmp_path, worlds):
    kill_and_finish(tmp_path, kills=3, seed=len(worlds), worlds=worlds)


@pytest.mark.proof
@pytest.mark.parametrize("worlds", [(1,), (2,), (1, 2, 3, 4)])
def test_a_writer_killed_ten_times(tmp_path, worlds):
    kill_and_finish(tmp_path, kills=10, seed=100 + len(worlds), worlds=worlds)


def test_killed_while_sealing(tmp_path):
    """Killed as soon as it says that it seals: either nothing is sealed or all is."""
    finish(tmp_path / "whole", 1)
    root = tmp_path / "store"
    kill_after(start(root, 2), -(-IMAGES // 64) + 1)
    if LogitsStoreReader(root).epochs() == []:
        finish(root, 1)
    assert (root / "epoch_0000.npy").read_bytes() == (
        tmp_path / "whole" / "epoch_0000.npy"
    ).read_bytes()


def test_a_torn_tail_is_cut_and_computed_again(tmp_path):
    root = tmp_path / "store"
    kill_after(start(root, 1), 10)
    (part,) = root.glob("epoch_0000.parts/*.part")
    with open(part, "r+b") as file:
        file.truncate(part.stat().st_size - 5)
    before = part.read_bytes()
    with LogitsStoreWriter(root, LogitsStoreReader(root).manifest, KEYS) as writer:
        missing = writer.missing(0)
        # it may have been quick with the eleventh
        assert len(missing) in {IMAGES - 64 * kept for kept in (9, 10)}
    assert part.read_bytes() == before
    finish(root, 1)
    finish(tmp_path / "other", 1)
    assert (root / "epoch_0000.npy").read_bytes() == (
        tmp_path / "other" / "epoch_0000.npy"
    ).read_bytes()


FULL_DISK = """
import os, sys
from pathlib import Path
import numpy as np
from data.store import LogitsStoreReader, LogitsStoreWriter
from data.store.files import StoreError
from tests.support.store_samples import batches, manifest
from tests.data.store.test_crash import IMAGES, KEYS, fast_records

root = Path(sys.argv[1]) / "it's full"
writer = LogitsStoreWriter(root, manifest(), KEYS)
try:
    writer.check_disk(range(1000))
except StoreError as error:
    assert "writing 1,000 epochs" in str(error) and "are free: free some space" in str(error), error
else:
    raise SystemExit("a thousand epochs fit?")
writer.begin_epoch(0)
filler = Path(sys.argv[1]) / "filler"
plan = batches(0, IMAGES, 64)

def fill(leave):
    usage = os.statvfs(root)
    filler.write_bytes(bytes(max(0, usage.f_bavail * usage.f_frsize - leave)))

writer.append(plan[0], fast_records(0, plan[0]))
fill(leave=16384)
failed = 0
for positions in plan[1:]:
    try:
        writer.append(positions, fast_records(0, positions))
    except StoreError as error:
        assert "No space left on device" in str(error) and "free some space" in str(error), error
        failed += 1
assert 0 < failed < len(plan) - 1, failed
writer.end_epoch()
assert LogitsStoreReader(root).epochs() == []
filler.unlink()
missing = writer.missing(0)
assert 0 < len(missing) < IMAGES
writer.begin_epoch(0)
writer.append(missing, fast_records(0, missing))
writer.end_epoch()
fill(leave=8192)
try:
    writer.seal(0)
except StoreError as error:
    assert "epoch_0000.npy" in str(error) and "No space left on device" in str(error), error
else:
    raise SystemExit("sealed on a full disk?")
assert LogitsStoreReader(root).epochs() == [] and not list(root.glob("*.npy*"))
filler.unlink()
writer.seal(0)
writer.close()
sealed = LogitsStoreReader(root).open_epoch(0)
np.testing.assert_array_equal(sealed, fast_records(0, np.arange(IMAGES)))
print("done")
"""

READ_ONLY = """
import subprocess, sys
from pathlib import Path
import numpy as np
from data.store import LogitsStoreReader, LogitsStoreWriter
from data.store.files import StoreError
from tests.support.store_samples import manifest
from tests.data.store.test_crash import IMAGES, KEYS, fast_records

mount = sys.argv[1]
root = Path(mount) / "it's read-only"
with LogitsStoreWriter(root, manifest(), KEYS) as writer:
    for epoch in range(2):
        writer.begin_epoch(epoch)
        writer.append(np.arange(IMAGES), fast_records(epoch, np.arange(IMAGES)))
        writer.end_epoch()
    writer.seal(0)
subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True)
reader = LogitsStoreReader(root)
reader.check_epochs([0])
np.testing.assert_array_equal(reader.open_epoch(0), fast_records(0, np.arange(IMAGES)))
writer = LogitsStoreWriter(root, manifest(), KEYS)
other = lambda: LogitsStoreWriter(Path(mount) / "new", manifest(), KEYS)
begin = lambda: writer.begin_epoch(1)
for call in (other, begin, lambda: writer.begin_epoch(1, 1), lambda: writer.seal(1)):
    try:
        call()
    except StoreError as error:
        assert "Read-only file system" in str(error) and "check the mount" in str(error), error
    else:
        raise SystemExit("written to a read-only file system?")
assert reader.epochs() == [0]
subprocess.run(["mount", "-o", "remount,bind,rw", mount], check=True)
writer.seal(1)
np.testing.assert_array_equal(reader.open_epoch(1), fast_records(1, np.arange(IMAGES)))
print("done")
"""


def run_on_small_disk(folder: Path, code: str) -> None:
    """Run code on a file system of 1 MB in a mount namespace of its own; needs root or user
    namespaces.
    """
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    if shutil.which("unshare") is None:
        pytest.skip("a small file system needs `unshare` (util-linux)")
    for options in ("-Urm", "-m"):
        probe = subprocess.run(
            ["unshare", options, "mount", "-t", "tmpfs", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
        )
        if probe.returncode == 0:
            break
    else:
        pytest.skip(f"a small file system can't be mounted here: {probe.stderr.strip()}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["unshare", options, "sh", "-c", script, "sh", str(folder), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "done\n", done.stderr + done.stdout


def test_a_full_disk(tmp_path):
    run_on_small_disk(tmp_path, FULL_DISK)


def test_a_read_only_file_system(tmp_path):
    run_on_small_disk(tmp_path, READ_ONLY)
