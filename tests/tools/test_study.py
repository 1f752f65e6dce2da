"""Studies: real commands that go on after a kill, failures that cost no others, tables and pictures
that say what the runs' own files say.
"""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import ImageNetInfo

from configs import load_config, run_folder
from data.store import LogitsStoreReader
from models.checkpoints import load_state
from tests.support.helpers import ROOT, quick_context
from tests.support.jobs import _run_program
from tests.support.real import packaged_weights, unpack
from tools import demo, study, study_runner
from tools.study_runner import Runner, Step

SHIPPED = sorted((ROOT / "tools" / "studies").glob("*.yaml"))
# Others are one of these in larger.
QUICK = [file for file in SHIPPED if "\nbase: " not in file.read_text()]
STUDY = """
question: Does it run?
opts: {TRAIN.EPOCHS: 2, TRAIN.WARMUP_EPOCHS: 0, TEST.EVERY: 1, DATA.NUM_WORKERS: 0}
values: {images: 128}
once:
  teacher: {train: configs/shapes/teacher.yaml, opts: {DATA.SHAPES.TRAIN_IMAGES: "{images}"}}
  logits:
    save: configs/shapes/save_logits.yaml
    teacher: teacher
    opts: {DATA.SHAPES.TRAIN_IMAGES: "{images}", DATA.SUBSET: 0.5}
variants:
  broken: {train: configs/shapes/student.yaml, opts: {DATA.EXCLUDE: no/such.txt}}
  labels:
    train: configs/shapes/student.yaml
    opts: {DATA.SHAPES.TRAIN_IMAGES: 128, DATA.SUBSET: 0.5}
  stored:
    train: configs/shapes/student_distill.yaml
    store: logits
    opts: {DATA.SHAPES.TRAIN_IMAGES: "{images}", DATA.SUBSET: 0.5}
seeds: [0, 1]
table: [val_loss, bytes, teacher_passes]
"""

# the lines of a quick study's picture
IMAGENET = [
    kind + name for kind in ("", "transfer of ", "head on ") for name in ("labels", "test_resnet")
]
TOKENS = ("soft", "soft, online", "hard")
DRAWN = {
    "deit_cifar10": ["none", "soft", "hard", *("token, " + kind for kind in TOKENS), "CNN"],
    "demo": ["scratch", "distilled"],
    "imagenet_10pct": IMAGENET,
    "label_free": ["the teacher's answers alone", "from scratch", "pretrained without labels"],
    "science": ["labels", "stored"],
    "topk": ["labels", "T = 2"],
    "views": ["labels", "stored, alpha 0.5", "online, alpha 0.5"],
}
# the records' bytes of some rows of a quick study: epochs x images x bytes of a record
BYTES = {
    "topk": {"K 1, T 2": 1 * 80 * 8, "K 3, T 2": 1 * 80 * 16},
    "views": {"1 stored, alpha 0.5": 1 * 80 * 44, "2 stored, alpha 0.5": 2 * 80 * 44},
}


class Forked:
    """A command of a study in a process that has its imports already, in place of Popen."""

    started: list[list[str]] = []

    def __init__(self, words, cwd, env, stdout, stderr):
        program = words[1].removesuffix(".py")
        arguments = (program, words[2:], {"OMP_NUM_THREADS": "1"}, str(cwd), stdout.name, "")
        self.process = quick_context().Process(target=_run_program, args=arguments)
        self.process.start()
        self.terminate, self.kill = self.process.terminate, self.process.kill
        self.started.append(words)

    def poll(self):
        return self.process.exitcode


@contextmanager
def forking():
    """The commands that studies start meanwhile, each in a process that is forked."""
    Forked.started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_runner, "subprocess", SimpleNamespace(Popen=Forked))
        yield Forked.started


def called(*words: object) -> tuple[int, str, str]:
    """Exit status, output and errors of the study's command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = study.main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def tags(commands: list[list[str]]) -> list[str]:
    return [words[words.index("--tag") + 1] for words in commands]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> SimpleNamespace:
    """A study that was killed while it ran, and then called again to its end."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "small.yaml").write_text(STUDY)
    output = folder / "out"
    call = [folder / "small.yaml", "--output", output, "--jobs", 2]
    words = [sys.executable, "-m", "tools.study", *map(str, call)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        deadline, log = time.monotonic() + 240, output / "logs" / "teacher.log"
        while not (log.exists() and "exit status 0" in log.read_text()):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    # Its commands go on; each has its lock by the time that it says something.
    while not all(log.stat().st_size for log in (output / "logs").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with forking() as started:
        status, out, err = called(*call)
    return SimpleNamespace(
        call=call,
        file=folder / "small.yaml",
        output=output,
        started=started,
        status=status,
        out=out,
        err=err,
    )


def test_a_killed_study_goes_on_and_repeats_nothing(killed):
    assert killed.status == 1, killed.err  # as one variant fails
    assert "teacher:\n  (done before)" in killed.out and "teacher" not in tags(killed.started)
    for metrics in killed.output.glob("*/*/metrics.jsonl"):
        epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
        assert epochs == [1, 2], metrics
    assert (killed.output / "logs" / "teacher.log").read_text().count("finished: 2 epochs") == 1
    assert "in use by" not in killed.err
    assert not list(killed.output.rglob("*lock"))


def test_a_failed_run_is_named_and_the_rest_goes_on(killed):
    for seed in (0, 1):
        name = f"broken-seed{seed}"
        log = killed.output / "logs" / f"{name}.log"
        (line,) = re.findall(rf"^FAILED {name}: (.*)$", killed.err, re.MULTILINE)
        assert line.startswith("error: ") and "no/such.txt" in line and str(log) in line
    assert killed.err.count("FAILED") == 2
    assert "6 of 8 commands are done." in (killed.output / "table.md").read_text()


def test_tables_hold_what_the_runs_wrote(killed):
    """Against the last line of each run's metrics and the store's own files."""
    last = {}
    for path in killed.output.glob("*/*/metrics.jsonl"):
        last[path.parent.name] = json.loads(path.read_text().splitlines()[-1])["val_loss"]
    size = sum(np.load(file).nbytes for file in (killed.output / "logits").glob("*.npy"))
    rows = {
        row["run"]: row for row in csv.DictReader((killed.output / "table.csv").open(newline=""))
    }
    results = json.loads((killed.output / "results.json").read_text())
    table = (killed.output / "table.md").read_text()
    assert list(rows) == ["teacher", "labels", "stored"] == [r["run"] for r in results["rows"]]
    for row in results["rows"]:
        name = row["run"]
        mine = [value for tag, value in last.items() if tag.split("-")[0] == name]
        spread = stdev(mine) if len(mine) == 2 else None
        assert row["seeds"] == len(mine) == int(rows[name]["seeds"]) == (1 + (name != "teacher"))
        assert row["val_loss"] == pytest.approx(mean(mine))
        assert float(rows[name]["val_loss"]) == row["val_loss"]
        assert row["val_loss spread"] == (spread and pytest.approx(spread))
        assert sorted(run["val_loss"] for run in row["runs"]) == sorted(mine)
        shown = f"{round(mean(mine), 2)}" + (f" ± {round(spread, 2)}" if spread else "")
        assert f"| {name} | {len(mine)} | {shown} |" in table
    images = len((killed.output / "logits" / "keys.txt").read_text().splitlines())
    assert rows["stored"]["teacher_passes"] == str(2 * images)  # of two epochs
    assert rows["stored"]["bytes"] == str(size) and f"| {size:,} | {2 * images} |" in table
    assert (rows["labels"]["bytes"], rows["labels"]["teacher_passes"]) == ("", "0")
    assert results["failed"].keys() == {"broken-seed0", "broken-seed1"}
    assert Image.open(killed.output / "plot.png").width > 800


def test_a_variant_that_changed_is_no_finished_one(killed):
    """main.py then says what differs; all else is left alone."""
    changed = STUDY.replace("labels:", "labels: # ").replace(
        "DATA.SHAPES.TRAIN_IMAGES: 128", "DISTILL.ALPHA: 0.5, DATA.SHAPES.TRAIN_IMAGES: 128"
    )
    file = killed.file.with_name("changed.yaml")
    file.write_text(changed)
    with forking() as started:
        status, _, err = called(file, *killed.call[1:], "--seeds", 0)
    assert status == 1 and tags(started) == ["broken-seed0", "labels-seed0"]
    assert re.search("FAILED labels-seed0: error: .*DISTILL.ALPHA 1.0 -> 0.5", err)


def test_what_is_on_disk_counts_without_a_log(killed):
    """As if all but one had been made on a cluster; only what failed is tried again. How long those
    took is not known.
    """
    for log in (killed.output / "logs").iterdir():
        if log.stem != "stored-seed0":
            log.unlink()
    file = killed.file.with_name("timed.yaml")
    file.write_text(STUDY.replace("bytes,", "bytes, seconds,"))
    with forking() as started:
        assert called(file, *killed.call[1:])[0] == 1
    assert tags(started) == ["broken-seed0", "broken-seed1"]
    table = json.loads((killed.output / "results.json").read_text())
    assert [row["seeds"] for row in table["rows"]] == [1, 2, 2]
    *others, stored = [row["seconds"] for row in table["rows"]]
    assert others == [None, None] and stored == table["seconds"]["stored-seed0"] > 0


def step(name: str, code: str, tmp_path: Path, *needs: Step) -> Step:
    cfg = load_config(["--output", str(tmp_path), "--tag", name])
    return Step(name, name, "check", ["-c", code], cfg, {}, [*needs], None)


def test_jobs_run_at_the_same_time(tmp_path):
    """Each of three waits for the files of all."""
    code = """
import sys, time; from pathlib import Path
Path({0!r}, {1!r}).touch()
while len(list(Path({0!r}).glob("*.here"))) < 3: time.sleep(0.01)
"""
    steps = [step(n, code.format(str(tmp_path), f"{n}.here"), tmp_path) for n in "abc"]
    runner = Runner(steps, tmp_path, 3, SimpleNamespace(received=None))
    runner.run()
    assert runner.done == {"a", "b", "c"} and not runner.failed


def test_each_job_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """Of those that the study may use, and a share of the cores; each stays until the other has
    begun.
    """
    code = """
import os, sys, time; from pathlib import Path
folder, name = Path({0!r}), {1!r}
names = "CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE"
(folder / name).write_text(" of ".join(map(os.environ.get, names)))
while len(list(folder.glob("?.gpu"))) < 2: time.sleep(0.01)
"""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5,GPU-7")
    steps = [step(n, code.format(str(tmp_path), f"{n}.gpu"), tmp_path) for n in "ab"]
    Runner(steps, tmp_path, 2, SimpleNamespace(received=None)).run()
    assert [(tmp_path / f"{n}.gpu").read_text() for n in "ab"] == ["GPU-5 of 2", "GPU-7 of 2"]


def test_a_run_that_a_killed_study_has_left_is_waited_for(tmp_path):
    """Its lock came after a second command had begun, which therefore failed."""
    code = """
import os, sys, time; from pathlib import Path
from data.store.files import lock_holder, sole_user
folder = Path({0!r})
if (folder / "left").exists():
    sys.exit(0 if (folder / "left").read_text() == "ended" else 3)
folder.mkdir(parents=True, exist_ok=True)
(folder / "left").touch()
if os.fork() == 0:
    with sole_user(folder / "lock"):
        time.sleep(1)
        (folder / "left").write_text("ended")
    os._exit(0)
while not lock_holder(folder / "lock"): time.sleep(0.01)
sys.exit("error: in use by another process")
"""
    left = step("left", "", tmp_path)
    left.words[1] = code.format(str(run_folder(left.cfg)))
    runner = Runner([left], tmp_path, 1, SimpleNamespace(received=None))
    runner.run()
    assert runner.done == {"left"} and not runner.failed
    log = (tmp_path / "logs" / "left.log").read_text()
    assert re.findall(r"^exit status (\d)", log, re.MULTILINE) == ["1", "0"]


def test_what_needs_a_failed_step_is_not_run_and_each_says_why(tmp_path):
    bad = step("bad", "print('working'); raise ValueError('no room')", tmp_path)
    after = step("after", "1", tmp_path, bad)
    last = step("last", "1", tmp_path, after)
    free = step("free", "1", tmp_path)
    runner = Runner([bad, after, last, free], tmp_path, 1, SimpleNamespace(received=None))
    runner.run()
    log = tmp_path / "logs" / "bad.log"
    assert re.fullmatch(
        rf"ValueError: no room \(exit status 1 after [\d.]+ s, {log}\)", runner.failed.pop("bad")
    )
    needs = {"after": "not run, it needs bad", "last": "not run, it needs after"}
    assert runner.failed == needs and runner.done == {"free"}
    assert "working" in log.read_text()


def test_a_request_to_stop_reaches_the_commands(tmp_path):
    """They may save what they have; nothing is begun any more, and nothing has failed."""
    asked = tmp_path / "asked"
    code = f"""
import pathlib, signal, sys, time
def stop(*_): pathlib.Path({str(asked)!r}).touch(); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(tmp_path / "begun")!r}).touch()
time.sleep(60)
"""

    class Stop:
        @property
        def received(self):
            return "SIGTERM" if (tmp_path / "begun").exists() else None

    steps = [step("first", code, tmp_path), step("second", "1", tmp_path)]
    runner = Runner(steps, tmp_path, 1, Stop())
    runner.run()
    assert asked.exists() and not runner.done and not runner.failed
    assert not (tmp_path / "logs" / "second.log").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sedes: [1]", "sedes is unknown; did you mean seeds?"),
        ("seeds: 3", "seeds: expected a list"),
        ("once: {a: {train: configs/no.yaml}}", "/configs/no.yaml: no such file"),
        ("once: {a: {trian: x}}", "once.a: trian is unknown; did you mean train?"),
        ("variants: {}", "variants: name runs"),
        ("variants: {a: configs/no.yaml}", "variants: name runs"),
        ("variants: {a: {store: logits}}", "variants.a: expected a recipe under one of train, "),
        (
            "variants: {a: {train: R, store: logit}}",
            "store: logit is unknown; did you mean logits?",
        ),
        ("variants: {a: {train: R, online: techer}}", "online: techer is unknown; did you mean te"),
        ("variants: {a: {train: R, opts: {SEEDS: 1}}}", "unknown key; did you mean SEED?"),
        ("variants: {a: {train: R, opts: {SAVE_FREQ: x}}}", "variants.a: --opts: SAVE_FREQ = 'x'"),
        ("variants: {a: {train: R}, b: {train: R, x: 1}}", "variants.b: repeats a"),
        ("variants: {a b: {train: R}, a-b: {train: R, store: logits}}", "a-b-seed0 stands there"),
        ("variants: {'{alhpa}': {train: R}}", "alhpa is unknown; did you mean images?"),
        ("question: [1", "broken YAML"),
    ],
)
def test_faults_are_told_in_one_line_before_anything_runs(change, message, tmp_path):
    key = change.partition(":")[0]
    lines = re.sub(rf"(?ms)^{key}:.*?(?=^\S|\Z)", "", STUDY) + change + "\n"
    file = tmp_path / "x.yaml"
    file.write_text(lines.replace("train: R", "train: configs/shapes/student.yaml"))
    status, out, err = called(file, "--print", "--output", tmp_path / "out")
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert err.startswith(f"error: {file}: ") and not (tmp_path / "out").exists()


def test_a_column_that_nothing_has_is_an_error(killed):
    """In one line after the table, and without a run anew once the name is right."""
    file = killed.file.with_name("column.yaml")
    file.write_text(STUDY.replace("  broken:", "  # ").replace("bytes,", "byts,"))
    with forking() as started:
        status, out, err = called(file, *killed.call[1:])
    assert status == 2 and not started and "| stored | 2 |" in out
    assert err == f"error: {file}: table: byts is unknown; did you mean bytes?\n"


def test_missing_files_and_odd_options_are_told_in_one_line(tmp_path):
    for name, near in (("sciense", "science"), ("topk.yml", "topk")):
        place = os.path.relpath(ROOT / "tools" / "studies" / f"{near}.yaml")
        error = called(tmp_path / name)[2]
        assert error == f"error: {tmp_path}/{name}: no such file; did you mean {place}?\n"
    assert called(tmp_path / "0.yaml")[2].count("/studies/") == len(SHIPPED)
    shipped = ROOT / "tools" / "studies" / "views.yaml"
    assert (
        "--opts: lenth is unknown; did you mean length?" in called(shipped, "--opts", "lenth", 2)[2]
    )
    assert "expected KEY VALUE pairs" in called(SHIPPED[0], "--opts", "SEED")[2]


@pytest.mark.parametrize("jobs", [0, -1])
def test_less_than_one_job_is_an_error(jobs, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(STUDY)
    status, out, err = called(file, "--jobs", jobs, "--output", tmp_path / "out")
    assert (status, out, err) == (2, "", f"error: --jobs {jobs}: give 1 or more\n")


@pytest.mark.parametrize(
    ("name", "values"),
    [("imagenet_30pct", "imagenet, cifar100"), ("label_free", "labelled, unlabelled")],
)
@pytest.mark.parametrize("option", [("--data-path", "X"), ("--opts", "DATA.DATA_PATH", "X")])
def test_one_data_set_is_not_taken_for_two(name, values, option):
    """Entries with a DATA.DATA_PATH of their own would all get the same."""
    file = ROOT / "tools" / "studies" / f"{name}.yaml"
    status, out, err = called(file, "--print", *option)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: {file}: ") and f"set {values} in place of --data-path" in err


def test_printed_commands_come_after_those_they_need(tmp_path):
    """With their data, their options and one seed each, as a shell reads them."""
    file = tmp_path / "x.yaml"
    file.write_text(STUDY)
    output = tmp_path / "my out"
    call = ("--print", "--seeds", 7, "--data-path", tmp_path, "--opts", "images", 64, "SEED", 1)
    status, out, _ = called(file, "--output", output, *call)
    lines = out.splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    assert status == 0 and not output.exists()
    assert tags(commands) == [
        "teacher",
        "logits",
        *(f"{n}-seed7" for n in ("broken", "labels", "stored")),
    ]
    assert lines[1].endswith("  # after teacher") and lines[4].endswith("  # after logits")
    for words in commands:
        opts = words[words.index("--opts") + 1 :]
        opts = dict(zip(opts[::2], opts[1::2]))
        assert opts["DATA.DATA_PATH"] == str(tmp_path)
        assert opts["SEED"] == ("7" if "seed7" in tags([words])[0] else "1")
    assert "DATA.SHAPES.TRAIN_IMAGES 64" in lines[0] and "TRAIN_IMAGES 128" in lines[3]
    assert f"DISTILL.TEACHER_LOGITS_PATH '{output}/logits'" in lines[4]


def test_lists_of_values_make_a_variant_for_each_pair(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("""
values: {alpha: [1.0, 0.5], epochs: [1, 3]}
once:
  teacher: {train: configs/shapes/teacher.yaml}
  logits-{epochs}: {save: configs/shapes/save_logits.yaml, opts: {TRAIN.EPOCHS: "{epochs}"}}
variants:
  "{epochs} epochs, alpha {alpha}":
    train: configs/shapes/student_distill.yaml
    store: logits-{epochs}
    opts: {DISTILL.ALPHA: "{alpha}"}
    x: "{epochs}"
  online: {train: configs/shapes/student.yaml, online: teacher}
""")
    _, _, steps = study.parse([str(file), "--output", str(tmp_path)])
    found = [
        (step.name, step.cfg.DISTILL.ALPHA, step.needs[0].name, step.needs[0].cfg.TRAIN.EPOCHS)
        for step in steps[3:-1]
    ]
    assert found == [
        (f"{epochs}-epochs-alpha-{alpha}-seed0", alpha, f"logits-{epochs}", epochs)
        for epochs in (1, 3)
        for alpha in (1.0, 0.5)
    ]
    online = steps[-1].cfg.DISTILL
    assert online.ONLINE and online.TEACHER_WEIGHTS == str(steps[0].result)


def keep_figure(savefig, figures: list):
    """The same savefig, noting what it saves under which name."""

    def save(figure, path, **options):
        figures.append((figure, Path(path).name))
        savefig(figure, path, **options)

    return save


def folders(root: Path) -> list[str]:
    """Options by which a study finds real files: a teacher's and a student's, and of the latter
    only pictures without classes.
    """
    for split, count in (("train", 60), ("val", 5)):
        for label, colour in enumerate(("red", "green", "blue")):
            (root / "labelled" / split / colour).mkdir(parents=True)
            for number in range(count):
                image = Image.effect_noise((48, 48), 20 + number).convert("RGB")
                image.putpixel((label, label), (255, 0, 0))
                image.save(root / "labelled" / split / colour / f"{number}.png")
    (root / "photos").mkdir()
    for path in (root / "labelled" / "train").glob("*/*.png"):
        shutil.copy(path, root / "photos" / f"{path.parent.name}{path.name}")
    words = ["labelled", root / "labelled", "unlabelled", root / "photos"]
    words += ["unlabelled_kind", "folder"]
    for name in ("teacher", "save_logits", "student"):
        recipe = ROOT / "configs" / "shapes" / f"{name}.yaml"
        text = f"BASE: [{recipe}]\nDATA: {{DATASET: cifar10, SUBSET: 1.0}}\n"
        (root / f"{name}.yaml").write_text(text)
        words += [name.removesuffix("_logits"), root / f"{name}.yaml"]
    return [*map(str, words), "DATA.INDEX_DIR", str(root / "index")]


def test_pictures_without_labels_come_before_few_labels(tmp_path):
    """Each student starts with the weights that learnt from a store of a folder without classes."""
    opts = folders(tmp_path)
    output = tmp_path / "out"
    call = [ROOT / "tools/studies/label_free.yaml", "--quick", "--output", output, "--opts", *opts]
    with forking():
        status, out, err = called(*call, "few", 0.4)
    assert status == 0, err
    folder = next(output.glob("*/pretraining-seed0"))
    assert load_config(["--cfg", str(folder / "config.yaml")]).DATA.DATASET == "folder"
    log = (output / "logs" / "0.4-of-the-labels-pretrained-seed0.log").read_text()
    assert f"weights of {folder / 'checkpoints' / 'last.pth'}: " in log
    assert "180 images" in (output / "logs" / "logits.log").read_text()
    for step in study.parse([str(call[0])])[2]:
        if step.row.endswith(", pretrained"):
            assert f"/pretraining-seed{step.seed}/" in step.cfg.MODEL.PRETRAINED


def test_a_variant_goes_on_with_another_of_the_same_seed(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("""
base: small.yaml
values: {images: 64}
variants:
  first, of all: {train: configs/shapes/student.yaml}
  then: {train: configs/shapes/student.yaml, start: "first, of all"}
""")
    (tmp_path / "small.yaml").write_text(STUDY)
    _, settings, steps = study.parse([str(file), "--output", str(tmp_path)])
    starts = {step.name: step.cfg.MODEL.PRETRAINED for step in steps[-2:]}
    tag = "shapes-student/first-of-all-seed{}/checkpoints/last.pth"
    assert starts == {f"then-seed{seed}": str(tmp_path / tag.format(seed)) for seed in (0, 1)}
    assert [step.name for step in steps[:2]] == ["teacher", "logits"]  # of the base
    assert steps[0].cfg.DATA.SHAPES.TRAIN_IMAGES == 64 and settings["seeds"] == [0, 1]


def imagenet_and_cifar(shared_data: Path, folder: Path) -> dict[str, list[str]]:
    """Real images below imagenet/ and cifar10/; keys of ImageNet's training images by class.

    Of classes with at least four images one is for validation; all others are empty.
    """
    unpack(shared_data / "imagenet_val_sample.tar", folder)
    unpack(shared_data / "cifar10.tar.gz", folder, r"/00[01]\d\.jpg$")
    keys = {}
    for name in ImageNetInfo("imagenet-1k").label_names():
        images = sorted((folder / "imagenet_val_sample" / name).glob("*.JPEG"))
        images = images if len(images) >= 4 else []
        for split, some in (("val", images[:1]), ("train", images[1:])):
            (folder / "imagenet" / split / name).mkdir(parents=True)
            for image in some:
                image.rename(folder / "imagenet" / split / name / image.name)
        keys[name] = [f"{name}/{image.name}" for image in images[1:]]
    return keys


def backbone(step: Step) -> dict[str, torch.Tensor]:
    """The last weights of a run, without the head."""
    weights = load_state(step.result)["model"]
    return {name: value for name, value in weights.items() if not name.startswith("head.")}


@pytest.mark.proof
def test_real_images_and_a_real_teacher(shared_data, tmp_path):
    """The study of ImageNet's subsets in small: the numbers of images, what a real teacher says of
    them, and the weights that transfers begin with.
    """
    weights = packaged_weights("lite0", "tf_efficientnet_lite0", tmp_path)
    keys = imagenet_and_cifar(shared_data, tmp_path)
    opts = f"""imagenet {tmp_path}/imagenet cifar100 {tmp_path}/cifar10 transfer cifar10 share 0.5
        size 48 teacher tf_efficientnet_lite0 weights {weights} epochs 3 stored 2 transfer_epochs 1
        DISTILL.OTHER_SIZE True DATA.INDEX_DIR {tmp_path}/index DATA.MEAN_AND_STD_TYPE half
        DATA.BATCH_SIZE 16 DATA.NUM_WORKERS 0 TRAIN.WARMUP_EPOCHS 0 TRAIN.BASE_LR 0.01
        MODEL.TINY_VIT.DEPTHS [1,1,1,1] MODEL.TINY_VIT.NUM_HEADS [1,1,2,2]
        MODEL.TINY_VIT.EMBED_DIMS [16,32,48,64] AUG.AUTO_AUGMENT none AUG.REPROB 0.0
        AUG.SCALE [0.7,1.0] AUG.MIXUP 0.0 AUG.CUTMIX 0.0""".split()
    file, output = ROOT / "tools/studies/imagenet_10pct.yaml", tmp_path / "out"
    call = [file, "--output", output, "--opts", *opts]
    with forking():
        status, _, err = called(*call)
    assert (status, err) == (0, "")

    store = LogitsStoreReader(output / "tf_efficientnet_lite0")
    counts = [max(1, len(names) // 2) for names in keys.values() if names]
    chosen = list(store.keys)
    assert len(chosen) == len({*chosen}) == sum(counts) > 80 and store.epochs() == [0, 1]
    assert {*chosen} <= {key for names in keys.values() for key in names}
    labels = [[*keys].index(key.partition("/")[0]) for key in chosen]  # ImageNet's ids
    for epoch in store.epochs():
        right = (store.open_epoch(epoch)["index"][:, 0] == labels).mean()
        assert 100 * right == pytest.approx(store.seal(epoch)["teacher"]["top1"])
        assert right > 0.7

    rows = {row["run"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    kinds = [f"tf_efficientnet_lite0, alpha {alpha}" for alpha in (0.5, 1.0)]
    kinds.insert(0, "labels")
    assert [*rows] == [start + kind for start in ("", "transfer of ", "head on ") for kind in kinds]
    for name, row in rows.items():
        passes = 2 * len(chosen) if name in kinds[1:] else 0  # two epochs serve three
        assert row["teacher_passes"] == passes and row["bytes"] == (passes * 44 or None)
    steps = {step.row: step for step in study.parse([*map(str, call)])[2]}
    for kind in kinds:
        first, moved, same = steps[kind], steps[f"transfer of {kind}"], steps[f"head on {kind}"]
        begun = backbone(first)
        for step in (moved, same):
            log = (output / "logs" / f"{step.name}.log").read_text()
            assert f"weights of {first.result}: " in log and "data: 200 images" in log
            equal = [torch.equal(value, begun[name]) for name, value in backbone(step).items()]
            assert all(equal) if step is same else not all(equal)


def test_a_study_in_larger(tmp_path):
    """It is the one that it names as its base, but for its values."""
    small, large = (ROOT / f"tools/studies/imagenet_{share}pct.yaml" for share in (10, 30))
    steps, others = (study.parse([str(f), "--output", str(tmp_path)])[2] for f in (small, large))
    assert [step.name for step in steps] == [step.name for step in others]
    for step, other in zip(steps, others):
        is_transfer = step.name.startswith(("transfer", "head"))
        shares = [1.0, 1.0] if is_transfer else [0.1, 0.3]
        assert [step.cfg.DATA.SUBSET, other.cfg.DATA.SUBSET] == shares
        if step.kind == "train":
            assert [step.cfg.MODEL.NAME, other.cfg.MODEL.NAME] == [
                "TinyViT-5M-1k",
                "TinyViT-11M-1k",
            ]


@pytest.mark.parametrize("file", QUICK, ids=lambda file: file.stem)
def test_a_shipped_study_runs_quick(file, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", keep_figure(Figure.savefig, figures))
    with forking() as started:
        if file.stem == "demo":
            status = demo.main(["--quick", "--output", str(tmp_path), "--jobs", "2"])
        else:
            call = [file, "--quick", "--output", tmp_path, "--jobs", 2]
            if file.stem.startswith("imagenet"):
                weights = timm.create_model("test_resnet", num_classes=10).state_dict()
                torch.save(weights, tmp_path / "weights.pth")
                call += ["--opts", "weights", tmp_path / "weights.pth"]
            status, _, err = called(*call)
            assert not err
    results = json.loads((tmp_path / "results.json").read_text())
    assert status == 0 and started and not results["failed"]
    (axis,) = next(figure for figure, name in figures if name == "plot.png").axes
    _, labels = axis.get_legend_handles_labels()
    assert labels == DRAWN[file.stem]
    assert "prove nothing" in axis.get_title()
    assert "prove nothing" in (tmp_path / "table.md").read_text()
    for row in results["rows"]:
        assert row["val_top1"] >= 0 and row["seeds"] == 1
    assert Image.open(tmp_path / "plot.png").width > 800
    rows = {row["run"]: row for row in results["rows"]}
    for name, size in BYTES.get(file.stem, {}).items():
        assert rows[name]["bytes"] == size
    if file.stem == "demo":
        result = json.loads((tmp_path / "result.json").read_text())
        keys = ["teacher", "scratch", "distilled", "check_passed", "store_bytes", "seconds"]
        assert list(result) == keys and result["check_passed"]
        for name in ("curves", "replay_sheet", "confusion"):
            assert Image.open(tmp_path / f"{name}.png").width > 600
