"""The documents tell the truth: their examples run, and every flag, key and file they name exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import load_config
from configs.defaults import get_defaults
from models.build import build_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = ["DATA.SHAPES.TRAIN_IMAGES", "512", "DATA.SHAPES.VAL_IMAGES", "20", "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "1",
        "TRAIN.WARMUP_EPOCHS", "0"]  # fmt: skip


def marked(page: Path, kind: str) -> list[tuple[str, str]]:
    """(name, text) of the code blocks under a comment <!-- kind: name -->."""
    pattern = rf"<!-- {kind}:? ?([\w.-]*) -->\n```\w*\n(.*?)```"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL)


def all_keys(node, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in node.items():
        keys.add(f"{prefix}{name}")
        keys |= all_keys(value, f"{prefix}{name}.") if hasattr(value, "items") else set()
    return keys


def flags_of(program: str) -> set[str]:
    """The flags a program's --help names."""
    words = ["-m", program] if program.startswith("tools.") else [program]
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout))


def commands(page: Path) -> list[list[str]]:
    """The commands in a page's code blocks, continuation lines joined."""
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.fixture(scope="module")
def known_flags() -> dict[str, set[str]]:
    """The flags of every program that a page names."""
    programs = {name for page in PAGES for words in commands(page) for name in programs_in(words)}
    return {program: flags_of(program) for program in sorted(programs)}


def programs_in(words: list[str]) -> list[str]:
    if "-m" in words and words[words.index("-m") + 1].startswith("tools."):
        return [words[words.index("-m") + 1]]
    return [word for word in words if word in ("main.py", "save_logits.py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_keys_and_files_in_commands_exist(page, known_flags):
    keys = all_keys(get_defaults())
    for words in commands(page):
        for program in programs_in(words):
            rest = words[words.index(program) + 1 :]
            unknown = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)} - known_flags[program]
            assert not unknown, f"{page.name}: {program} has no {unknown}"
        named = {word for word in words if re.fullmatch(r"[A-Z][A-Z_]+(\.[A-Z_]+)+", word)}
        assert named <= keys, f"{page.name}: no such keys {named - keys}"
        for word in words:
            if word.startswith(("configs/", "tools/")) and word.endswith((".yaml", ".py")):
                assert (ROOT / word).is_file(), f"{page.name}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_links_in_the_text_exist(page):
    text, keys = page.read_text(encoding="utf-8"), all_keys(get_defaults())
    named = set(re.findall(r"`((?:DATA|MODEL|DISTILL|TRAIN|AUG|TEST)\.[A-Z_.]+[A-Z])\b", text))
    assert named <= keys, f"no such keys: {named - keys}"
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """A command of the documents, from a folder whose Python files can be imported beside ours."""
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder that looks like the repository's root to the commands of the documents."""
    for name in ("configs", "main.py", "save_logits.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize(("name", "text"), marked(ROOT / "CONTRIBUTING.md", "command"), ids=["data-set", "model"])
def test_examples_of_contributing_train(name, text, workplace):
    for file, source in marked(ROOT / "CONTRIBUTING.md", "file"):
        (workplace / file).write_text(source)
        assert len(source.splitlines()) <= 30
    words = shlex.split(text)[1:]
    run([*words, "--opts", *TINY[2:6]] if "my_images" in text else [*words, "--opts", *TINY[:6]], workplace)
    assert list(workplace.glob("output/*/*/checkpoints/last.pth"))


def test_own_augmentation_runs(workplace):
    ((_, source),) = marked(ROOT / "CONTRIBUTING.md", "run")
    assert len(source.splitlines()) <= 30
    run(["-c", source], workplace)


def test_the_readmes_own_loop_runs(workplace):
    """A teacher's store is written by the real program, then read by the README's loop."""
    ((_, source),) = marked(ROOT / "README.md", "run")
    assert len(source.splitlines()) <= 25
    recipe = ["--cfg", "configs/shapes/save_logits.yaml"]
    teacher = build_model(load_config(["--cfg", str(ROOT / recipe[1]), "--opts", "MODEL.NUM_CLASSES", "10"]))
    torch.save(teacher.state_dict(), workplace / "teacher.pth")
    opts = [*TINY, "DISTILL.TEACHER_LOGITS_PATH", "logits"]
    run(["save_logits.py", *recipe, "--skip-eval", "--resume", "teacher.pth", "--opts", *opts], workplace)
    source = source.replace('"DISTILL.TEACHER_LOGITS_PATH"', ", ".join(f'"{word}"' for word in [*TINY, "DISTILL.TEACHER_LOGITS_PATH"]))
    run(["-c", source + "\nassert torch.isfinite(loss) and epoch == 0\n"], workplace)


def test_results_say_how_they_were_made():
    """Every section of the results names a command."""
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert re.search(r"`[^`]*(python|make|torchrun)[^`]*`|```", section), section.splitlines()[0]
