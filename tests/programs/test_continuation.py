"""A run that is killed, stopped or moved to another number of processes ends as the one that
nothing happened to.
"""

import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.helpers import ROOT, free_port, torchrun
from tests.support.training import (
    RECORD,
    assert_close,
    command,
    finish,
    folder,
    job,
    metrics,
    recorded_sets,
    same_bits,
    state,
)

# All that a continuation has to carry over: dropout, moving averages, statistics, lines of metrics
# that span a checkpoint.
RUN = (
    "TRAIN.EPOCHS 3 MODEL.DROP_PATH_RATE 0.2 MODEL.DROP_RATE 0.1 TRAIN.EMA_DECAY 0.9"
    " PRINT_FREQ 2 SAVE_FREQ 2"
)
UPDATES = 5  # of an epoch: 43 images in updates of 8
EVERY_STEP = "TRAIN.CHECKPOINT_MINUTES 1e-09"
# Python that a process runs before main.py, so that it meets a signal at a given place.
AT_UPDATE = """
import multiprocessing, os, subprocess
step = main.train_step
def meeting(run, batches):
    if run.progress.update == {update} and rank in {ranks}:
        # as batch systems do
        everyone = [*(child.pid for child in multiprocessing.active_children()), os.getpid()]
        subprocess.run(["kill", "-s", "{signal}"[3:], *map(str, everyone)])
    return step(run, batches)
main.train_step = meeting
"""
IN_SAVING = """
import os, signal
replace, left = os.replace, [{count}]
def meeting(source, target):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.{signal})
    replace(source, target)
main.checkpoints.os = type("os", (), dict(vars(os), replace=staticmethod(meeting)))
"""
IN_EVALUATION = """
import os, signal
evaluate = main.utils.evaluate
def meeting(model, loader, *args, **options):
    def batches():
        for index, batch in enumerate(loader):
            if index == 1 and rank in {ranks}:
                os.kill(os.getpid(), signal.{signal})
            yield batch
    return evaluate(model, batches(), *args, **options)
main.utils.evaluate = meeting
"""


def split(world: int) -> list[object]:
    return ["DATA.BATCH_SIZE", 8 // world]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The output of the run that nothing happens to, by number of processes and epochs."""

    @cache
    def output(world: int, epochs: int = 3) -> Path:
        folder = tmp_path_factory.mktemp(f"world{world}")
        finish(folder, RUN, *split(world), "TRAIN.EPOCHS", epochs, world=world)
        return folder

    return output


def accuracies(output: Path) -> list[str]:
    """The lines of the log that tell accuracies, without the time; an evaluation that was made
    twice must say the same.
    """
    lines = re.findall(
        r"INFO (epoch \d+[^:]*: .*validation images: .*)",
        (folder(output) / "log_rank0.txt").read_text(),
    )
    return sorted(set(lines))


def stop_requests(output: Path) -> int:
    """How often the log says that the run was asked to stop, and that it can go on."""
    return (
        (folder(output) / "log_rank0.txt")
        .read_text()
        .count("INFO stopped on request: the same command goes on from here\n")
    )


def assert_same_end(output: Path, expected: Path) -> None:
    """Weights, metrics and printed accuracies to the last bit."""
    ours, theirs = state(output), state(expected)
    for key in ("model", "model_ema", "optimizer", "progress", "measured", "step", "metric_lines"):
        assert same_bits(ours[key], theirs[key]), key
    assert (folder(output) / "metrics.jsonl").read_bytes() == (
        folder(expected) / "metrics.jsonl"
    ).read_bytes()
    epochs = ours["progress"]["epoch"]
    assert accuracies(output) == accuracies(expected) and len(accuracies(output)) == 2 * epochs
    assert (
        ours["step"] == UPDATES * epochs and len(metrics(output)) == UPDATES * epochs // 2 + epochs
    )


def endure(output: Path, world: int, *events: tuple[str, int], epochs: int = 3) -> None:
    """Start a run again and again, each time with something that happens to it and the exit code it
    must have; at last to its end.
    """
    opts = [RUN, *split(world), EVERY_STEP, "TRAIN.EPOCHS", epochs]
    for prepare, code in events:
        with job(
            output, *opts, "DATA.NUM_WORKERS", 2 if world == 1 else 0, world=world, prepare=prepare
        ) as started:
            codes = started.wait().codes
            assert code in codes and 0 not in codes and (code != 75 or set(codes) == {75}), (
                f"{codes}\n{started.text()}\n{started.text(world - 1)}"
            )
    finish(output, *opts, world=world)


def test_killed_twice_and_stopped_once_it_ends_as_if_nothing_had_happened(untouched, tmp_path):
    killed = (
        AT_UPDATE.format(update=3, ranks=[0], signal="SIGKILL"),
        IN_SAVING.format(count=3, signal="SIGKILL"),
    )
    stopped = (
        AT_UPDATE.format(update=7, ranks=[0], signal="SIGINT"),
        IN_EVALUATION.format(ranks=[0], signal="SIGUSR1"),
    )
    endure(tmp_path, 1, *((event, -9) for event in killed), *((event, 75) for event in stopped))
    assert stop_requests(tmp_path) == 2
    assert_same_end(tmp_path, untouched(1))


def test_so_it_does_with_two_processes_of_which_one_meets_the_signal(untouched, tmp_path):
    killed, stopped = (
        AT_UPDATE.format(update=update, ranks=[1], signal=signal)
        for update, signal in ((6, "SIGKILL"), (8, "SIGTERM"))
    )
    endure(
        tmp_path,
        2,
        (killed, -9),
        (stopped, 75),
        (IN_EVALUATION.format(ranks=[1], signal="SIGTERM"), 75),
    )
    assert stop_requests(tmp_path) == 2
    assert_same_end(tmp_path, untouched(2))


def test_what_was_done_since_the_last_checkpoint_is_done_again_and_the_same(tmp_path):
    """Checkpoints come after epochs alone; an update takes two passes, and every second epoch is
    evaluated.
    """
    opts = [RUN, "DATA.BATCH_SIZE 4 TRAIN.ACCUMULATION_STEPS 2 TEST.EVERY 2"]
    finish(tmp_path / "untouched", *opts)
    for update in (4, 8, 13):
        with job(
            tmp_path / "killed",
            *opts,
            prepare=AT_UPDATE.format(update=update, ranks=[0], signal="SIGKILL").replace(
                "everyone =", "run.saver.wait(); everyone ="
            ),
        ) as started:
            assert started.wait().codes == [-9], started.text()
    finish(tmp_path / "killed", *opts)
    log = (folder(tmp_path / "killed") / "log_rank0.txt").read_text()
    # the first was killed before there was one
    assert re.findall(r"last.pth: (\d+) updates are done", log) == ["5", "10"]
    for key in ("model", "model_ema", "optimizer", "measured", "step", "metric_lines"):
        assert same_bits(state(tmp_path / "killed")[key], state(tmp_path / "untouched")[key]), key
    ours, theirs = (
        (folder(tmp_path / output) / "metrics.jsonl").read_bytes()
        for output in ("killed", "untouched")
    )
    assert ours == theirs and state(tmp_path / "killed")["step"] == 3 * UPDATES


@pytest.mark.proof
@pytest.mark.parametrize("world", [1, 2])
def test_killed_ten_times_and_stopped_five_times_at_random(world, untouched, tmp_path):
    rng = random.Random(world)
    events, done = [], 0
    for kind in rng.sample(["SIGKILL"] * 10 + ["SIGTERM"] * 5, 15):
        update = rng.randint(done, done + 1)
        done = update + (kind == "SIGTERM")
        events.append(
            (
                AT_UPDATE.format(update=update, ranks=[rng.randrange(world)], signal=kind),
                -9 if kind == "SIGKILL" else 75,
            )
        )
    assert done < 5 * UPDATES
    endure(tmp_path, world, *events, epochs=5)
    assert_same_end(tmp_path, untouched(world, epochs=5))


# ---- another number of processes


ELASTIC = (
    "TRAIN.GLOBAL_BATCH 16 DATA.SHAPES.TRAIN_IMAGES 101 TRAIN.OPTIMIZER.NAME sgd TRAIN.EPOCHS 2"
    " TRAIN.EVAL_BN_WHEN_TRAINING True MODEL.DROP_PATH_RATE 0.0 TRAIN.WARMUP_EPOCHS 0"
    " TRAIN.BASE_LR 1.0 AUG.MIXUP_MODE pair2"
)


@pytest.mark.parametrize(
    "stops",
    [
        {2: (3, "SIGKILL"), 1: None},
        pytest.param({4: (3, "SIGKILL"), 2: (8, "SIGTERM"), 1: None}, marks=pytest.mark.proof),
    ],
)
def test_a_run_moves_to_other_numbers_of_processes_in_the_middle_of_an_epoch(stops, tmp_path):
    for output in ("fixed", "moving"):
        (tmp_path / output / "record").mkdir(parents=True)
    finish(
        tmp_path / "fixed",
        ELASTIC,
        "DATA.BATCH_SIZE 16",
        prepare=RECORD,
        env={"RECORD": str(tmp_path / "fixed" / "record")},
    )
    for world, stop in stops.items():
        prepare = RECORD + (
            AT_UPDATE.format(update=stop[0], ranks=[world - 1], signal=stop[1]) if stop else ""
        )
        # A smaller BATCH_SIZE than a process's share makes it accumulate: here 2 passes of 4, or of
        # 8, in the end.
        with job(
            tmp_path / "moving",
            ELASTIC,
            EVERY_STEP,
            "DATA.BATCH_SIZE",
            8 // len(stops) * 2,
            world=world,
            prepare=prepare,
            env={"RECORD": str(tmp_path / "moving" / "record")},
        ) as started:
            codes = started.wait().codes
            assert (0 not in codes) if stop else codes == [0], f"{codes}\n{started.text()}"
    assert "WORLD_SIZE 2 -> 1" in (folder(tmp_path / "moving") / "log_rank0.txt").read_text()
    fixed, moving = (recorded_sets(tmp_path / output / "record") for output in ("fixed", "moving"))
    assert moving == fixed and [len(images) for images in fixed.values()] == [16] * 12
    assert_close(state(tmp_path / "moving")["model"], state(tmp_path / "fixed")["model"])


def test_torchrun_starts_a_run_again_whose_process_was_killed(untouched, tmp_path):
    prepare = AT_UPDATE.format(update=6, ranks=[1], signal="SIGKILL")
    (tmp_path / "program.py").write_text(
        "import os, sys, main\nimport torch\ntorch.set_num_threads(1)\nrank ="
        " int(os.environ['RANK'])\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n   "
        f" exec({prepare!r})\nsys.exit(main.main(sys.argv[1:]))\n"
    )
    arguments = [tmp_path / "program.py", *command(tmp_path, RUN, *split(2), EVERY_STEP)]
    done = torchrun(["--max-restarts=1", *arguments], 2)
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    assert_same_end(tmp_path, untouched(2))


# A loader process dies during the forward pass; the main process goes on when that is certain.
LOADER_DIES = """
import multiprocessing, os
forward = main.forward
def meeting(run, batch, index):
    if run.progress.update == 2:
        worker = multiprocessing.active_children()[0]
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    return forward(run, batch, index)
main.forward = meeting
"""


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs POSIX signals")
def test_a_loader_process_killed_during_a_pass_is_one_line(untouched, tmp_path):
    opts = [RUN, *split(1), EVERY_STEP]
    workers = "DATA.NUM_WORKERS 2 DATA.PREFETCH 1"
    with job(tmp_path, *opts, workers, prepare=LOADER_DIES) as started:
        codes, text = started.wait()
    assert codes == [2] and "Traceback" not in text, text
    assert text.splitlines()[-1].startswith("error: a loader process has died (pid ")
    finish(tmp_path, *opts)
    assert_same_end(tmp_path, untouched(1))


@pytest.mark.skipif(sys.platform != "linux", reason="needs the signal of a parent's death")
def test_ranks_stop_with_their_state_saved_when_torchrun_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, sys, main\nimport torch\ntorch.set_num_threads(1)\n"
        "code = main.main(sys.argv[1:])\n"
        "os.write(1, f'exit code {code}\\n'.encode())\n"  # one write: two ranks share the pipe
    )
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    agent += [f"--master-port={free_port()}", str(tmp_path / "program.py")]
    agent += command(tmp_path, RUN, *split(2), "TRAIN.EPOCHS 60 DATA.NUM_WORKERS 1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        agent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with running:
        for line in running.stdout:
            if "epoch 1/60, update" in line:
                break
        running.kill()
        rest = running.stdout.read()  # to its end: no rank or loader process holds it any more
    assert rest.count("exit code 75") == 2, rest
    assert 0 < state(tmp_path)["step"] < 60 * UPDATES


@pytest.mark.proof
def test_two_nodes_with_an_agent_each_start_again_together(untouched, tmp_path):
    prepare = AT_UPDATE.format(update=6, ranks=[1], signal="SIGKILL")
    (tmp_path / "program.py").write_text(
        "import os, sys, main\nimport torch\ntorch.set_num_threads(1)\nrank ="
        " int(os.environ['RANK'])\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n   "
        f" exec({prepare!r})\nsys.exit(main.main(sys.argv[1:]))\n"
    )
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=1",
        str(tmp_path / "program.py"),
        *command(tmp_path, RUN, *split(2), EVERY_STEP),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            agent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in agents]
    assert [process.returncode for process in agents] == [0, 0], "\n".join(texts)
    assert_same_end(tmp_path, untouched(2))
