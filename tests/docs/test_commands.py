"""Every command of the README and of docs/ runs: a small twin of each, in the order of its page,
and its results are looked at.

A command of a program that nothing here knows is an error, so that the documents cannot show what
is not tested. Two kinds have no twin, as they take long: `make` is asked for what it would do,
benchmarks are stopped when they have read their flags. Tests that are named are there."""

import importlib
import io
import json
import re
import runpy
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import run_folder
from data.store.reader import LogitsStoreReader
from tests.docs.documents import (
    PAGES,
    README,
    SHELL,
    STARTS,
    blocks,
    commands,
    commands_in,
    inline_commands,
    joined,
    marked,
)
from tests.docs.twins import (
    SHAPES,
    TRAIN,
    VAL,
    WNIDS,
    Command,
    config_of,
    parsed,
    shrink_the_world,
    twin,
    write_stand_ins,
)
from tests.support.helpers import ROOT, torchrun
from tools import contract
from tools.study_runner import PYTHON

# whose commands test_docs.py runs as they are
DOCUMENTS = [page for page in PAGES if page.name != "CONTRIBUTING.md"]
FILES = {name for page in DOCUMENTS for name, _ in marked(page, "file")}
WITH_PYTHON = [page for page in DOCUMENTS if blocks(page, "python")]
# Chains of recipes, each of which needs those before; the others stand alone.
SHAPES_CHAIN = (
    "shapes/teacher.yaml",
    "shapes/save_logits.yaml",
    "shapes/student.yaml",
    "shapes/student_distill.yaml",
)
CIFAR_CHAIN = (
    "cifar/tiny_vit_11m_cifar10_teacher.yaml",
    "cifar/save_logits.yaml",
    "cifar/tiny_vit_5m_cifar10.yaml",
    "cifar/tiny_vit_5m_cifar10_distill.yaml",
)
ALL_RECIPES = [
    path.relative_to(ROOT / "configs").as_posix()
    for path in sorted((ROOT / "configs").glob("*/*.yaml"))
]
RECIPES = [
    SHAPES_CHAIN,
    CIFAR_CHAIN,
    *((name,) for name in ALL_RECIPES if name not in (*SHAPES_CHAIN, *CIFAR_CHAIN)),
]
# Text that a tool prints, the file that it leaves, and more words for its twin.
TOOLS = {
    "tools.attention": ("attention.png: blocks ", "attention.png"),
    "tools.plot": ("validation top-1", "curves.png"),
    # a model that hardly trained answers to noise, which int8 changes more than a real one's
    "tools.export": (": written", "", "--tolerance", "2"),
    "tools.predict": ("photo.jpg\n", ""),
    "tools.replay_sheet": ("replay_sheet.png: ", "replay_sheet.png"),
    "tools.logits info": ("sealed epochs: 0", ""),
    "tools.logits verify": ("1 sealed epoch (0), unfinished: none: 0 faults", ""),
    "tools.logits estimate": ("300 epochs:", ""),
    "tools.logits merge": ("sealed now: 0", "merged/epoch_0000.npy"),
    "tools.logits card": ("README.md: written", "stores/imagenet/README.md"),
    "tools.logits fetch": ("1 epoch fetched (0), sealed now: 0", "fetched/epoch_0000.npy"),
    "tools.logits histogram": ("logits.png: written", "logits.png"),
    "tools.logits convert": (
        "1 epoch (0) of 24 images",
        "converted/epoch_0000.npy",
        *"--opts DATA.CLASS_LIST imagenet1k DATA.IMG_SIZE 40".split(),
    ),
    "tools.logits suspects": (
        "of 24 images, the least believed first",
        "suspects.png",
        *"--opts DATA.CLASS_LIST imagenet1k".split(),
    ),
    "tools.verify_zoo": ("0 of 8 checkpoints agree", "", "--workers", "0"),
    "tools.size": ("product", ""),
    # what it starts is main.py and save_logits.py; tests/tools/test_study.py runs them
    "tools.study": ("main.py --cfg configs/", "", "--print"),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """What all pages find; nobody changes it."""
    root = tmp_path_factory.mktemp("documents")
    write_stand_ins(root)
    return root


@pytest.fixture
def workplace(stand_ins, tmp_path, monkeypatch):
    """A folder that looks like the repository's root to the commands of a page, and is where they
    start.
    """
    for path in stand_ins.iterdir():
        (tmp_path / path.name).symlink_to(path)
    shrink_the_world(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # for my_package
    monkeypatch.setenv("TINYVIT_ZOO_URL", stand_ins.as_uri())
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", stand_ins.as_uri())
    return tmp_path


def five_commands() -> list[list[str]]:
    """The README's way through ImageNet-1k."""
    (block,) = (text for text in blocks(README, "") if text.startswith("# 1. "))
    return commands_in(block)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page, workplace):
    in_blocks = []
    for words in commands(page):
        if words not in in_blocks and (page != README or words not in five_commands()):
            assert "..." not in words, f"{page.name}: write the command out: {' '.join(words)}"
            in_blocks.append(words)
    for words in [*in_blocks, *inline_commands(page)]:
        judge(words)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_no_command_is_missed(page):
    """Whatever has flags is a command that begins as commands do."""
    for text in blocks(page, *SHELL):
        for line in joined(text):
            assert " --" not in line or line.startswith((*STARTS, "#")), f"{page.name}: {line}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("make unknown", "No rule to make target"),
        ("python other.py ...", "No module named 'other'"),
        ("python -m tools.unknown", "nothing here knows tools.unknown"),
        ("python other.py --flag", "nothing here knows other.py"),
        ("python -m tools.logits unknown STORE", "nothing here knows tools.logits unknown"),
        ("torchrun --unknown 8 ...", "2"),
        ("python -m benchmarks.unknown", "No module named"),
        ("python -m benchmarks.store --unknown", "2"),
        ("python main.py --throughput --unknown", "unrecognized arguments: --unknown"),
        ("python main.py --throughput --opts DATA.UNKNOWN 1", "DATA.UNKNOWN = '1': unknown key"),
        (
            "python main.py --cfg configs/unknown.yaml --throughput",
            "configs/unknown.yaml: no such file",
        ),
        (
            "python main.py --data-path ./ImageNet --eval --resume ./checkpoints/unknown.pth",
            "there is no such checkpoint file",
        ),
    ],
)
def test_what_does_not_run_is_noticed(text, reason, workplace):
    with pytest.raises((AssertionError, ImportError, SystemExit, ValueError), match=reason):
        judge(text.split())


def judge(words: list[str]) -> str:
    """Run what stands for a command and assert its results; one that ends in ... is asked for its
    help. What main.py printed.
    """
    text = " ".join(words)
    shortened = "..." in words
    words = [word for word in words if word != "..."]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        return ""
    # the launcher's flags alone
    if not any(word.endswith(".py") or word == "-m" for word in words):
        parsed([*words, "main.py"])
        return ""
    command = parsed(words)
    if shortened:
        assert run(command.program, "--help")[0] == 0
    elif command.program in ("main.py", "save_logits.py"):
        config_of(command)  # as it stands there, for all of its processes
        small = twin(command)
        if command.program == "main.py":
            use_store(config_of(small))
        code, out = run(small.program, *small.arguments)
        assert_ran(small, code, out, text)
        return out
    elif command.program == "pytest":  # which the suite runs anyway
        files = [word for word in command.arguments if not word.startswith("-")]
        assert all((ROOT / word).is_file() for word in files), text
    elif command.program.startswith("benchmarks."):
        assert_begins(command)
    elif command.program in FILES:  # test_docs.py runs it
        pass
    elif command.program == "tools.contract":
        assert_contracts(command)
    else:
        assert_tool_ran(command)
    return ""


def run(program: str, *words: str) -> tuple[int, str]:
    """Exit code and output of a program in this process."""
    module = importlib.import_module(program.removesuffix(".py"))
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told), redirect_stderr(told):
        patch.setattr(sys, "argv", [program, *words])
        try:
            code = module.main(list(words))
        except SystemExit as end:
            code = end.code
    return code or 0, told.getvalue()


def use_store(cfg) -> None:
    """A student finds the store of its own data, unless a command of the page has written one."""
    logits = Path("teacher_logits")
    is_written = logits.exists() and not logits.is_symlink()
    if cfg.DISTILL.TEACHER_LOGITS_PATH and not cfg.EVAL_MODE and not is_written:
        logits.unlink(missing_ok=True)
        logits.symlink_to(Path("stores", cfg.DATA.DATASET).absolute())


def assert_ran(small: Command, code: int, out: str, text: str) -> None:
    """main.py or save_logits.py did what its flags ask for."""
    cfg = config_of(small)
    words = small.arguments
    assert code == 0, f"{text}\n{out}"
    if small.program == "save_logits.py":
        assert_store(cfg, out, is_check="--check-saved-logits" in words)
    elif cfg.THROUGHPUT_MODE:
        name = cfg.MODEL.NAME
        assert re.search(rf"model {name}: [\d,]+ parameters, [\d.]+ G multiply-adds", out), out
        assert re.search(rf"{name}: [\d,.]+ images/s", out), out
    elif cfg.EVAL_MODE:
        images = f"{cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED}: {VAL * len(WNIDS)} validation images"
        accuracies = r": top-1 [\d.]+%, top-5 [\d.]+%"
        assert re.search(re.escape(images) + accuracies, out), f"{text}\n{out}"
    else:
        assert_trained(cfg, out)
    for flag in set(words) & {"--per-class-csv", "--save-model"}:
        assert Path(words[words.index(flag) + 1]).stat().st_size > 0


def assert_store(cfg, out: str, is_check: bool) -> None:
    """A sealed store, or a check of one that passed."""
    if is_check:
        assert "PASSED: the store holds what the teacher says" in out, out
    store = LogitsStoreReader(Path(cfg.DISTILL.TEACHER_LOGITS_PATH))
    images = round(SHAPES * cfg.DATA.SUBSET) if cfg.DATA.DATASET == "shapes" else TRAIN * len(WNIDS)
    assert store.epochs() == [0] and len(store) == images
    assert (store.open_epoch(0)["prob"][:, 0] > 0).all()


def assert_trained(cfg, out: str) -> None:
    """A run of one epoch from the right start, with its checkpoints and accuracies."""
    folder = run_folder(cfg)
    assert "finished: 1 epoch," in out and (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.pth").is_file()
    if cfg.DATA.DATASET == "folder":
        assert "nothing is evaluated" in out
    else:
        assert (folder / "checkpoints" / "best.pth").is_file()
        assert "val_top1" in json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    if cfg.MODEL.PRETRAINED:
        assert f"weights of {cfg.MODEL.PRETRAINED}: " in out
    if cfg.DISTILL.ONLINE:
        assert "in the loop" in out
    elif cfg.DISTILL.ENABLED:
        assert f"store {Path(cfg.DISTILL.TEACHER_LOGITS_PATH)}: top-" in out


def assert_tool_ran(command: Command) -> None:
    """A tool printed and wrote what it is for; one that is named without its arguments explains
    itself.
    """
    words = command.arguments
    name = command.program
    if name == "tools.logits":
        name = f"{name} {words[0]}"
        if len(words) == 1:
            words = [*words, "--help"]
    assert name in TOOLS, f"nothing here knows {name}: give it a twin"
    if words[-1:] == ["--help"]:
        code, out = run(command.program, *words)
        assert code == 0 and f"usage: python -m {name}" in out
        return
    said, file, *more = TOOLS[name]
    code, out = run(command.program, *words, *more)
    # Random weights have other accuracies than the published ones, and that is what its exit code
    # tells.
    assert code == (name == "tools.verify_zoo") and said in out, f"{name}\n{out}"
    assert Path(file).exists()


def assert_contracts(command: Command) -> None:
    """A search comes to the first training, by small images and whatever the machine's speed."""
    args, cfg = contract.parse(command.arguments)
    args.print, args.candidates = True, 1
    args.limit = [[size, 1e-9] for size, _ in args.limit]
    args.factors = [factor for factor in args.factors if factor.startswith("D")]
    cfg = cfg.replace({"MODEL.NUM_CLASSES": 1000, "DATA.IMG_SIZE": 32, "TEST.BATCH_SIZE": 1})
    told = io.StringIO()
    with redirect_stdout(told):
        assert contract.run((args, cfg), SimpleNamespace(received=None)) == 0
    (words,) = commands_in(told.getvalue().replace(PYTHON, "python"))
    assert config_of(parsed(words)).DATA.HELD_OUT == args.held_out


class Began(Exception):
    """A benchmark has read its command line and would measure now."""


def assert_begins(command: Command) -> None:
    """A benchmark, which would take long, knows its flags and comes to its measurements."""
    parse_args = ArgumentParser.parse_args

    def began(*_: object) -> None:
        raise Began

    def parse(parser: ArgumentParser, *words: object) -> None:
        parse_args(parser, *words)
        raise Began

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", parse)
        patch.setattr("benchmarks.timing.alternate", began)  # for those without flags
        patch.setattr(sys, "argv", [command.program, *command.arguments])
        with pytest.raises(Began):
            runpy.run_module(command.program, run_name="__main__")


def test_imagenet_in_five_commands(workplace):
    """One after the other, each on what the one before wrote; training by two processes under
    torchrun.
    """
    save, check, train, evaluate, plot = five_commands()
    judge(save)
    judge(check)
    small = twin(parsed(train))
    done = torchrun([ROOT / small.program, *small.arguments], nproc=2, cwd=workplace)
    assert_ran(small, done.returncode, done.stdout + done.stderr, " ".join(train))
    assert "3 updates (1 epoch of 3) of 8 images (2 ranks x 1 batch of 4)" in done.stdout
    (metrics,) = workplace.glob("output/*/*/metrics.jsonl")
    best = json.loads(metrics.read_text().splitlines()[-1])["best_top1"]
    assert f"top-1 {best:.3f}%" in judge(evaluate)
    judge(plot)


@pytest.mark.parametrize("names", RECIPES, ids=lambda names: names[-1])
def test_first_lines_of_recipes_run(names, workplace):
    """Those that no page shows."""
    pages = [words for page in DOCUMENTS for words in commands(page)]
    for name in names:
        first = (ROOT / "configs" / name).read_text().splitlines()[0]
        (words,) = commands_in(first.removeprefix("# "))
        if words not in pages:
            judge(words)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_a_page_runs(page, workplace):
    """Blocks of Python, one after the other, but for those that test_docs.py runs."""
    (workplace / "store").symlink_to(workplace / "stores" / "imagenet")
    demo = workplace / "output" / "demo"
    student = demo / "shapes-distilled" / "distilled-seed0" / "checkpoints"
    student.mkdir(parents=True)
    (demo / "first.png").symlink_to(workplace / "photo.jpg")
    (student / "last.pth").symlink_to(workplace / "checkpoints" / "tiny_vit_5m_1k.pth")
    elsewhere = [source for kind in ("run", "file") for _, source in marked(page, kind)]
    names = {}
    for text in blocks(page, "python"):
        if text not in elsewhere:
            exec(text, names)
