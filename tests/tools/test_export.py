"""Exports answer as their checkpoint does, or are not there."""

import json
import re
import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from configs import dump, load_config
from data.augment.decoder import eval_transform
from models.build import build_model
from models.pretrained import read_notes
from models.tiny_vit import TinyViT
from tools import export
from tools.predict import load_model

SMALL = """
--cfg configs/shapes/student.yaml --opts DATA.SHAPES.TRAIN_IMAGES 20 DATA.SHAPES.VAL_IMAGES 20
MODEL.NUM_CLASSES 10 DATA.IMG_SIZE 40 DATA.MEAN_AND_STD_TYPE half MODEL.TINY_VIT.DEPTHS [1,1,1,1]
MODEL.TINY_VIT.EMBED_DIMS [8,16,16,16] MODEL.TINY_VIT.NUM_HEADS [1,1,1,2]
MODEL.TINY_VIT.WINDOW_SIZES [3,3,3,2] OUTPUT /home/someone/output
"""
NAMES = [f"shape {i}" for i in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, root):
    """A checkpoint of a training, as far as its weights and notes go; and the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        cfg = load_config(SMALL.split())
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_zero = name.endswith("conv3.bn.weight")  # at first, a block's branch
            parameter += (0.5 if is_zero else 0.05) * torch.randn_like(parameter)
        for _ in range(20):
            model.train()(images(16))  # for the running statistics
        logits = model.eval()(images(64))
        model.head.bias -= logits.mean(0)  # or all images would be of one class
        for parameter in model.head.parameters():
            parameter *= 3 / logits.std(0).mean()
    assert model(images(16)).argmax(1).unique().numel() > 3
    averaged = {name: value + 0 for name, value in model.state_dict().items()}
    averaged["head.bias"] = averaged["head.bias"] + 1
    path = tmp_path_factory.mktemp("trained") / "best.pth"
    notes = {"config": dump(cfg), "class_names": NAMES, "progress": {"best": 43.219876, "epoch": 3}}
    notes["sources"] = {"images": 20, "keys_sha256": "ab" * 32, "teacher": {"name": "large"}}
    torch.save({"model": model.state_dict(), "model_ema": averaged, **notes}, path)
    return path, model, cfg


def run(trained, output, *words):
    return export.main([str(trained[0]), "-o", str(output), *map(str, words)])


def off(found, expected):
    """The largest difference as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def images(count):
    """Coloured gradients with some noise."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.randn(count, 3, 3, 3, generator=generator)
    noise = torch.randn(count, 3, 40, 40, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=40, mode="bilinear") + 0.3 * noise


@pytest.mark.parametrize(
    ("precision", "opset", "error"),
    [("float32", 20, 1e-4), ("float16", 18, 0.05), ("int8", 18, 0.8)],
)
def test_onnx_answers_alike_for_any_batch(precision, opset, error, trained, tmp_path, capsys):
    path = tmp_path / "new" / "x.onnx"
    words = ["--precision", precision, "--opset", opset, "--tolerance", error]
    assert run(trained, path, *words) == 0
    assert f"x.onnx ({precision}): 20 images, largest difference " in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path)
    for count in (1, 3):
        (logits,) = session.run(["logits"], {"images": images(count).numpy()})
        assert off(torch.from_numpy(logits), trained[1](images(count))) < error
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("MatMulInteger" in operators) == (precision == "int8")
    assert "BatchNormalization" not in operators
    (taken,) = session.get_inputs()
    assert taken.shape == ["batch", 3, 40, 40] and taken.type == "tensor(float)"
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["mean"]) == [0.5] * 3 and json.loads(told["class_names"]) == NAMES
    assert [file.name for file in path.parent.iterdir()] == ["x.onnx"]


def test_a_program_of_pytorch_answers_alike(trained, tmp_path):
    assert run(trained, tmp_path / "x.pt2") == 0
    program = torch.export.load(tmp_path / "x.pt2").module()
    for count in (1, 3):
        assert off(program(images(count)), trained[1](images(count))) < 1e-4


def test_safetensors_keep_what_the_checkpoint_says(trained, tmp_path):
    assert run(trained, tmp_path / "x.safetensors") == 0
    model, cfg, names = load_model(str(tmp_path / "x.safetensors"))
    assert off(model(images(2)), trained[1](images(2))) < 1e-4 and names == NAMES
    assert (cfg.DATA.IMG_SIZE, cfg.DATA.MEAN_AND_STD_TYPE) == (40, "half")
    config = read_notes(tmp_path / "x.safetensors")["config"]
    assert "OUTPUT: output\n" in config and "/home" not in config
    assert run(trained, tmp_path / "half.safetensors", "--precision", "float16") == 0
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "x")]
    assert sizes[0] < 0.7 * sizes[1]


def test_averaged_weights_are_exported_on_request(trained, tmp_path):
    assert run(trained, tmp_path / "x.safetensors", "--ema") == 0
    model = TinyViT.from_pretrained(tmp_path / "x.safetensors")
    assert off(model(images(2)), trained[1](images(2)) + 1) < 1e-4


def test_timm_loads_its_own_naming(tmp_path):
    """By the name of the variant alone."""
    torch.manual_seed(0)
    model = TinyViT.from_config("5m").eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.effect_noise((240, 230), 80).convert("RGB").save(photos / "noise.png")
    words = ["--format", "timm", "--images", photos]
    assert run([tmp_path / "own.pth"], tmp_path / "x.safetensors", *words) == 0
    path = tmp_path / "x.safetensors"
    theirs = timm.create_model("tiny_vit_5m_224", num_classes=1000, checkpoint_path=path)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs.eval()(x), model(x), rtol=0, atol=1e-5)


def test_a_folder_for_the_hub_has_a_card(trained, tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / ".git").touch()
    assert run(trained, tmp_path / "birds", "--format", "hub") == 0
    for model in (
        timm.create_model(f"local-dir:{tmp_path / 'birds'}", pretrained=True).eval(),
        TinyViT.from_pretrained(tmp_path / "birds"),
    ):
        assert off(model(images(2)), trained[1](images(2))) < 1e-4
    card = (tmp_path / "birds" / "README.md").read_text()
    for text in (
        '"best": 43.22,',
        '"name": "large"',
        "abab",
        "MEAN_AND_STD_TYPE: half",
        "20 images",
    ):
        assert text in card
    assert "/home/someone" not in card and (tmp_path / "birds" / ".git").exists()


def write_pictures(root: Path, count: int = 3) -> None:
    """Class folders of one colour and of noise each."""
    torch.manual_seed(0)
    for label in range(10):
        (root / NAMES[label]).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / NAMES[label] / f"{index}.png")


def test_top1_is_told_of_class_folders(trained, tmp_path, capsys):
    write_pictures(tmp_path / "val")
    _, model, cfg = trained
    for first in (0, 4):  # without the first folders the others keep their numbers
        right = []
        for label, name in list(enumerate(NAMES))[first:]:
            for path in (tmp_path / "val" / name).iterdir():
                logits = model(eval_transform(cfg)(Image.open(path))[None])
                right.append(logits.argmax().item() == label)
        assert run(trained, tmp_path / "x.safetensors", "--images", tmp_path / "val") == 0
        percent = f"{100 * sum(right) / len(right):.2f}%"
        told = f": {len(right)} images, .* top-1 {percent} before and {percent} after"
        assert re.search(told, capsys.readouterr().out) and sum(right)
        for name in NAMES[:4]:
            shutil.rmtree(tmp_path / "val" / name, ignore_errors=True)
    words = ["--images", tmp_path / "val" / NAMES[5], "--count", 2]
    assert run(trained, tmp_path / "x.safetensors", *words) == 0
    told = capsys.readouterr().out
    assert ": 2 images" in told and "top-1" not in told


def test_what_answers_otherwise_is_not_kept(trained, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_text("an older one")
    words = ["--precision", "float16", "--tolerance", "1e-9"]
    assert run(trained, tmp_path / "x.safetensors", *words) == 1
    assert "tolerance 1e-09: NOT WRITTEN, it differs" in capsys.readouterr().out
    assert (tmp_path / "x.safetensors").read_text() == "an older one"
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-o x.h5", "x.h5: not the suffix of any format: there are .onnx, .pt2, .safetensors and"),
        ("-o x.pt2 --format onnx", "x.pt2: not the suffix of onnx: there are .onnx, "),
        ("-o x.onnx --opset 99", "--opset 99: from 18 to "),
        ("-o x.pt2 --precision int8", "--precision int8 is for onnx, not for pt2"),
        ("-o x.pt2 --images nowhere", "error: --images nowhere: no such folder\n"),
        ("-o x.pt2 --images two", "no images to compare on: "),
        ("-o x.pt2 --images empty", "empty"),
    ],
)
def test_faults_are_one_line(words, text, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("a", "b"):
        Path("two", name).mkdir(parents=True)
        Image.effect_noise((40, 40), 80).convert("RGB").save(f"two/{name}/0.png")
    assert export.main([str(trained[0]), *words.split()]) == 2
    told = capsys.readouterr().err
    assert text in told and told.startswith("error: ") and told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "two"]


@pytest.mark.parametrize("place", ["", "gone"])
def test_images_that_have_moved_are_named_by_an_option_of_its_own(place, tmp_path):
    """As where a checkpoint goes without its data, or is one of weights alone."""
    place = place and str(tmp_path / place)
    cfg = load_config(["--eval", "--opts", "DATA.DATA_PATH", place])
    with pytest.raises(ValueError, match="no images to compare on: ") as raised:
        export.open_images(cfg, 1000, (), None, 4)
    told = str(raised.value)
    assert told.endswith("; name a folder: --images FOLDER") and (place or "names none") in told
    assert "--data-path" not in told and "--cfg" not in told


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, "not the weights of a TinyViT classifier"),
        (None, "there is no such checkpoint file"),
    ],
)
def test_files_of_other_models_are_one_line(content, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content:
        torch.save(content, "other.pth")
    assert export.main(["other.pth", "-o", "x.onnx"]) == 2
    assert text in capsys.readouterr().err


def test_a_missing_extra_is_named(trained, tmp_path, monkeypatch, capsys):
    real = export.find_spec
    monkeypatch.setattr(
        export, "find_spec", lambda name: None if name == "onnxscript" else real(name)
    )
    assert run(trained, tmp_path / "x.onnx") == 2
    assert "ONNX needs more packages: pip install onnxscript\n" in capsys.readouterr().err
