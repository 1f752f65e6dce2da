"""Spoil files of every kind that a run reads, kill programs, fill disks; print what came of it.

    python -m tests.faults                # make faults: about 6 minutes on two cores
    python -m tests.faults --cases 2000   # more of the seconds that files take, and no kills

The exit code is 1 if anything wrong was read, or anything ended in a traceback or not at all.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from tests.faults.harness import Outcomes, spoil
from tests.faults.kinds import KINDS

ROOT = Path(__file__).parents[2]
PROGRAMS = "tests/programs"
# real processes: what happens, in which tests, and how often in each
EVENTS = (
    ("a store's writer, 1 to 4 ranks: SIGKILL", "tests/data/store/test_crash.py", "ten_times", 10),
    ("save_logits.py: SIGKILL", f"{PROGRAMS}/test_save_crash.py", "again_and_again", 10),
    ("main.py, 1 and 2 ranks: SIGKILL", f"{PROGRAMS}/test_continuation.py", "ten_times", 10),
    ("main.py, 1 and 2 ranks: asked to stop", f"{PROGRAMS}/test_continuation.py", "ten_times", 5),
    ("disks that are full or read-only", "tests", "disk or read_only", 1),
)


def row(name: str, found: Outcomes, is_promised: bool) -> str:
    """A line of the table."""
    differed = f"{found.differed}" if is_promised else f"({found.differed})"
    numbers = (found.cases, found.survived, found.refused, differed, found.broken)
    return f"| {name} | {' | '.join(f'{number}' for number in numbers)} |"


def endured(path: str, tests: str, times: int) -> Outcomes:
    """What the tests say of real processes to which something happens so many times in each."""
    selection = ["-m", "proof" if times > 1 else "not proof", "-k", tests]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection, path]
    ended = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    passed, failed = (
        sum(map(int, re.findall(rf"(\d+) {word}", ended.stdout))) for word in ("passed", "failed")
    )
    found = Outcomes(times * (passed + failed), times * passed, broken=times * failed)
    if ended.returncode or not passed:
        found.broken = max(found.broken, 1)
        found.notes.append(ended.stdout[-3000:] + ended.stderr[-1000:])
    return found


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the mutations (0)")
    add("--cases", type=int, help="spoiled files of each kind (400, and then no kills)")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print("| what is spoiled, or happens | cases | survived | refused | wrong | traceback |")
    print("|---|---|---|---|---|---|", flush=True)
    notes, total = [], Outcomes()
    rows = [(kind.name, lambda kind=kind: of_kind(kind, args), kind.promised) for kind in KINDS]
    if args.cases is None:
        rows += [(name, lambda how=how: endured(*how), True) for name, *how in EVENTS]
    for name, look, is_promised in rows:
        found = look()
        print(row(name, found, is_promised), flush=True)
        notes += [f"{name}: {note}" for note in found.notes]
        total.cases += found.cases
        total.survived += found.survived
        total.refused += found.refused
        total.broken += found.broken
        total.differed += found.differed * is_promised
    print(row("all", total, True))
    for note in notes:
        print(f"\nFAILED: {note}", file=sys.stderr)
    return 1 if notes else 0


def of_kind(kind, args: argparse.Namespace) -> Outcomes:
    """Spoiled files of a kind, away from the user's cache."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        return spoil(kind, Path(folder), args.cases or 400, args.seed)


if __name__ == "__main__":
    sys.exit(main())
