"""The documents tell the truth: examples run, and every key, link and test they name exists."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import load_config
from configs.defaults import get_defaults
from models.build import build_model, count_parameters
from models.pretrained import zoo_url
from models.tiny_vit import TinyViT
from tests.docs.documents import PAGES, README, marked
from tests.support.helpers import ROOT
from tools import verify_zoo

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
FOLDERS = ("configs", "data", "models", "tools", "benchmarks", "tests")
FEW = "DATA.SHAPES.TRAIN_IMAGES 512 DATA.SHAPES.VAL_IMAGES 20".split()
SHORT = "DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0".split()


def all_keys(node, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in node.items():
        keys.add(f"{prefix}{name}")
        if hasattr(value, "items"):
            keys |= all_keys(value, f"{prefix}{name}.")
    return keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_links_in_the_text_exist(page):
    text, keys = page.read_text(encoding="utf-8"), all_keys(get_defaults())
    named = set(re.findall(r"`((?:DATA|MODEL|DISTILL|TRAIN|AUG|TEST)\.[A-Z_.]+[A-Z])\b", text))
    assert named <= keys, f"no such keys: {named - keys}"
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    files = [*ROOT.glob("*.py")]
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*.py")
    for name in set(re.findall(r"`([\w/]+\.py)`", text)) - {"my_images.py", "my_models.py"}:
        assert any(str(file).endswith(f"/{name}") for file in files), f"{page.name} names {name}"


def run(words: list[str], folder: Path) -> None:
    """A command of the documents, from a folder whose Python files can be imported beside ours."""
    paths = os.pathsep.join([str(ROOT), str(folder)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder that looks like the repository's root to the commands of the documents."""
    for name in ("configs", "main.py", "save_logits.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("text", [text for _, text in marked(CONTRIBUTING, "command")])
def test_examples_of_contributing_train(text, workplace):
    for file, source in marked(CONTRIBUTING, "file"):
        (workplace / file).write_text(source)
        assert len(source.splitlines()) <= 30
    _, *words = shlex.split(text)
    run([*words, "--opts", *SHORT, *FEW], workplace)
    assert list(workplace.glob("output/*/*/checkpoints/last.pth"))


def test_own_augmentation_runs(workplace):
    ((_, source),) = marked(CONTRIBUTING, "run")
    assert len(source.splitlines()) <= 30
    run(["-c", source], workplace)


def test_the_readmes_own_loop_runs(workplace):
    """A teacher's store is written by the real program, then read by the README's loop."""
    ((_, source),) = marked(ROOT / "README.md", "run")
    assert len(source.splitlines()) <= 25
    recipe = "configs/shapes/save_logits.yaml"
    cfg = load_config(["--cfg", str(ROOT / recipe), "--opts", "MODEL.NUM_CLASSES", "10"])
    torch.save(build_model(cfg).state_dict(), workplace / "teacher.pth")
    small = [*FEW, *SHORT, "DISTILL.TEACHER_LOGITS_PATH"]
    words = f"save_logits.py --cfg {recipe} --skip-eval --resume teacher.pth --opts".split()
    run([*words, *small, "output/demo/logits"], workplace)
    source = source.replace('"DISTILL.TEACHER_LOGITS_PATH"', str(small)[1:-1])
    run(["-c", source + "\nassert torch.isfinite(loss) and epoch == 0\n"], workplace)


def test_the_detector_of_a_page_learns(tmp_path, monkeypatch):
    """Its own program in small, with a teacher's weights: the loss falls."""
    ((name, source),) = marked(ROOT / "docs" / "DENSE.md", "file")
    for shown, small in (("batch: int = 4", "batch: int = 2"), ("1_000_200", "1_000_005")):
        assert source.count(shown) == 1
        source = source.replace(shown, small)
    (tmp_path / name).write_text(source)
    cfg = load_config(["--cfg", str(ROOT / "configs/shapes/teacher.yaml")])
    torch.save(build_model(cfg).state_dict(), tmp_path / "teacher.pth")
    monkeypatch.setattr(sys, "argv", [name, "16", str(tmp_path / "teacher.pth")])
    page = runpy.run_path(str(tmp_path / name), run_name="__main__")
    losses = page["losses"]
    assert len(losses) == 16 and sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert 0 <= page["precision"] < 0.5


class Oracle(torch.nn.Module):
    """Answers with the boxes that are drawn, then with the first of a picture once more and with
    one beside it, of other scores.
    """

    def __init__(self, targets: list[dict], scores_of_wrong: float):
        super().__init__()
        self.targets = iter(targets)
        self.scores_of_wrong = scores_of_wrong

    def forward(self, pictures: list[torch.Tensor]) -> list[dict]:
        boxes, labels = next(self.targets).values()
        scores = torch.tensor([1.0] * len(boxes) + [self.scores_of_wrong] * 2)
        boxes = torch.cat([boxes, boxes[:1], boxes[:1] + 400])
        labels = torch.cat([labels, labels[:1], labels[:1]])
        return [{"boxes": boxes, "labels": labels, "scores": scores}]


def test_the_average_precision_of_a_page_is_right(tmp_path):
    """Wrong answers below the right ones cost nothing; above them, a share of each kind's."""
    ((name, source),) = marked(ROOT / "docs" / "DENSE.md", "file")
    (tmp_path / name).write_text(source)
    page = runpy.run_path(str(tmp_path / name))
    numbers = range(40)
    targets = [page["scene"](number)[1] for number in numbers]
    measure = page["average_precision"]
    assert measure(Oracle(targets, 0.5), numbers) == 1
    shares = []
    for kind in range(10):
        right = sum((target["labels"] == kind).sum().item() for target in targets)
        wrong = 2 * sum(target["labels"][0] == kind for target in targets)
        shares.append(right / (right + wrong))
    assert measure(Oracle(targets, 2.0), numbers) == pytest.approx(sum(shares) / 10)
    others = [{**target, "labels": (target["labels"] + 1) % 10} for target in targets]
    assert measure(Oracle(others, 0.5), numbers) == 0


def test_the_readmes_table_of_models_is_right():
    """Links lead where the code fetches from; published figures, parameters and multiply-adds are
    those that the code knows or counts.
    """
    text = README.read_text(encoding="utf-8")
    links = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.MULTILINE))
    shown = {links[name]: float(top1) for top1, name in re.findall(r"\[([\d.]+)\]\[(\w+)\]", text)}
    assert shown == {zoo_url(entry.variant, entry.which): entry.top1 for entry in verify_zoo.ZOO}
    weights = {links[name] for name in re.findall(r"\[weights\]\[(\w+)\]", text)}
    assert weights == {zoo_url(size, "22k_distill") for size in ("5m", "11m", "21m")}
    for name, parameters, adds, size in re.findall(
        r"^\| TinyViT-(\S+) \| ([\d.]+) M \| ([\d.]+) G \| (\d+) \|", text, re.MULTILINE
    ):
        model = TinyViT.from_config(name.lower().replace("-", "_"))
        assert model.img_size == int(size) and f"{count_parameters(model) / 1e6:.1f}" == parameters
        assert f"{model.flops() / 1e9:.1f}" == adds
