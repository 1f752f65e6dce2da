"""Students with two heads learn alike from a store and from a teacher in the loop, and are read off
by each head and by their mean; what cannot work is one line.
"""

import json
from pathlib import Path

import pytest
import torch

from configs import dump, load_config
from models.build import build_model
from tests.support import saving
from tests.support.jobs import words
from tests.support.training import run, same_bits
from tools.predict import predict

SHORT = words("DATA.SHAPES.TRAIN_IMAGES 24 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0")
NAME = "deit_tiny_distilled_patch16_224"
RECIPE = "MODEL: {TYPE: timm, NUM_CLASSES: 10, ARGS: {patch_size: 8, depth: 1, embed_dim: 24}}\n"
TWO_HEADS = words(*SHORT, "MODEL.NAME", NAME, "DISTILL.TWO_HEADS True DISTILL.ALPHA 0.5")
HEADS = ("", "class_head_", "distill_head_")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, list[str]]:
    """The options of a student whose teacher is stored, and whose runs in the loop."""
    root = tmp_path_factory.mktemp("teachers")
    assert saving.run(root / "store", *SHORT) == 0
    teacher = load_config(saving.command(root / "store", *SHORT, flags=()))
    (root / "teacher.yaml").write_text(dump(teacher))
    return {
        "stored": words("DISTILL.TEACHER_LOGITS_PATH", root / "store"),
        "online": words("DISTILL.ONLINE True DISTILL.TEACHER_CFG", root / "teacher.yaml"),
    }


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    """The flags of a model with two heads."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return ["--cfg", str(path)]


@pytest.fixture(scope="module")
def trained(teachers, recipe, tmp_path_factory) -> Path:
    """The folder of a student of a store, with averaged weights."""
    output = tmp_path_factory.mktemp("trained")
    opts = [*TWO_HEADS, *teachers["stored"], "TRAIN.EMA_DECAY 0.9"]
    assert run(output, *opts, flags=recipe) == 0
    return output / NAME / "default"


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fault(capsys, *args, **how) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    assert run(*args, **how) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_it_learns_the_same_from_a_store_and_from_a_teacher_in_the_loop(
    trained, teachers, recipe, tmp_path
):
    opts = [*TWO_HEADS, *teachers["online"], "TRAIN.EMA_DECAY 0.9"]
    assert run(tmp_path, *opts, flags=recipe) == 0
    online = tmp_path / NAME / "default"
    assert lines_of(trained) == lines_of(online)
    one, other = (
        torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
        for folder in (trained, online)
    )
    assert same_bits(one["model"], other["model"])
    assert {"loss", "kl", "label_loss", "top1", "teacher_top1"} < lines_of(trained)[0].keys()
    for line in lines_of(trained)[:-1]:  # at temperature 1 the loss is more by what no student has
        assert line["loss"] > (line["kl"] + line["label_loss"]) / 2 > 0


def test_each_head_is_trained_by_its_own_target(teachers, recipe, tmp_path):
    """With all weight on the labels the distillation head stays as it was, but for weight decay."""
    opts = ["DISTILL.ALPHA 0.0 TRAIN.WEIGHT_DECAY 0.0 DISTILL.HARD True", *teachers["stored"]]
    assert run(tmp_path, *TWO_HEADS, *opts, flags=recipe) == 0
    folder = tmp_path / NAME / "default"
    learnt = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["model"]
    torch.manual_seed(0)
    begun = build_model(load_config(["--cfg", str(folder / "config.yaml")])).state_dict()
    assert torch.equal(learnt["head_dist.weight"], begun["head_dist.weight"])
    assert not torch.equal(learnt["head.weight"], begun["head.weight"])


def test_it_is_read_off_by_either_head_and_their_mean(trained, capsys):
    last = lines_of(trained)[-1]
    path = trained / "checkpoints" / "last.pth"
    flags = ["--cfg", trained / "config.yaml", "--eval", "--resume", path]
    capsys.readouterr()
    assert run(trained / "again", *TWO_HEADS, flags=flags) == 0
    text = capsys.readouterr().out
    for which, name in enumerate(("val", "average")):
        line = [part for part in text.splitlines() if "validation images: top-1" in part][which]
        heads = tuple(last[f"{name}_{head}top1"] for head in HEADS)
        assert f"top-1 {heads[0]:.3f}%" in line
        tail = "top-1 of the class head {:.3f}%, of the distillation head {:.3f}%"
        assert line.endswith(tail.format(*heads[1:]))
        assert {f"{name}_{head}{key}" for head in HEADS for key in ("loss", "top1", "top5")} < set(
            last
        )
    assert last["best_top1"] == max(last["val_top1"], last["average_top1"])


def test_its_mean_predicts_and_teaches(trained, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "red.png")
    path = trained / "checkpoints" / "last.pth"
    ((_, found),) = predict([tmp_path], str(path), topk=1)
    assert found[0]["probability"] > 0.1
    flags = ["--cfg", trained / "config.yaml", "--resume", path, "--skip-eval"]
    opts = words("MODEL.TYPE timm MODEL.NAME", NAME, "DISTILL.LOGITS_TOPK 10 DISTILL.ALPHA 0.5")
    for two in ("False", "True"):
        assert saving.run(tmp_path / two, *opts, "DISTILL.TWO_HEADS", two, flags=flags) == 0
    assert saving.sealed_bytes(tmp_path / "False") == saving.sealed_bytes(tmp_path / "True")
    manifest = json.loads((tmp_path / "True" / "manifest.json").read_text())
    assert NAME + ' {\\"depth\\": 1' in json.dumps(manifest)


@pytest.mark.parametrize(
    ("opts", "text"),
    [
        ("MODEL.NAME deit_tiny_patch16_224", "TWO_HEADS: deit_tiny_patch16_224 has one head"),
        ("DISTILL.ALPHA 1.0", "DISTILL.ALPHA = 1.0: leaves the class head of DISTILL.TWO_HEADS"),
        ("MODEL.TYPE tests.support.teachers:glance MODEL.ARGS {}", "does with a Tensor"),
        ("MODEL.TYPE tests.support.teachers:pair MODEL.ARGS {} DISTILL.TWO_HEADS False", "a tuple"),
        ("MODEL.ARGS 3", "MODEL.ARGS = '3': expected a mapping, e.g. {img_size: 32"),
        ("MODEL.TYPE tiny_vit", "only MODEL.TYPE timm takes arguments"),
    ],
)
def test_what_cannot_work_is_one_line(opts, text, teachers, recipe, tmp_path, capsys):
    opts = [*TWO_HEADS, *teachers["stored"], opts]
    assert text in fault(capsys, tmp_path, *opts, flags=recipe)


def test_a_pair_of_answers_is_no_teacher_and_needs_one(recipe, tmp_path, capsys):
    line = fault(capsys, tmp_path, *TWO_HEADS, flags=recipe)
    assert "DISTILL.TWO_HEADS = True: the distillation head needs a teacher" in line
    assert saving.run(tmp_path / "store", "MODEL.TYPE tests.support.teachers:pair") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "answered 8 images with ['tuple'], not with a tensor [8, 10]" in line
