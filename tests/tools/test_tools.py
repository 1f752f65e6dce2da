"""The small programs: curves, predictions, the zoo's check, the demo's picture, counts of code."""

import hashlib
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from configs import dump, load_config
from data.augment.decoder import eval_transform
from data.build import open_run
from models.hub import tiny_vit_settings
from models.pretrained import to_timm
from models.tiny_vit import VARIANTS, TinyViT
from tests.support import training
from tools import demo, plot, predict, size, verify_zoo

SMALL = {
    "img_size": 48,
    "num_classes": 7,
    "embed_dims": [16, 32, 48, 64],
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 3, 4],
    "window_sizes": [3, 3, 3, 3],
}


# what writes a file or folder of the user's choice
WRITERS = (
    "main",
    "save_logits",
    "tools.attention",
    "tools.demo",
    "tools.logits histogram",
    "tools.plot",
    "tools.replay_sheet",
    "tools.study",
)


@pytest.mark.parametrize("program", WRITERS)
def test_what_a_program_writes_is_named_by_one_option(program, capsys):
    name, *words = program.split()
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main([*words, "--help"])
    assert end.value.code == 0
    assert re.search(r"^ +-o\b.* --output [A-Z]+\b", capsys.readouterr().out, re.M)


def metrics(folder, epochs: int, torn: bool = False):
    """A run's folder; `torn`, if its last line is cut short."""
    folder.mkdir(parents=True)
    text = ""
    for epoch in range(1, epochs + 1):
        loss = 3.0 / epoch
        during = {"step": 10 * epoch - 5, "epoch": epoch - 1, "loss": loss, "lr": 1e-3}
        after = {"step": 10 * epoch, "epoch": epoch, "train_loss": loss, "val_top1": 10.0 * epoch}
        after["val_loss"] = None  # was not finite
        text += f"{json.dumps(during)}\n{json.dumps(after)}\n"
    (folder / "metrics.jsonl").write_text(text[:-20] if torn else text)
    return folder


def test_plot_compares_runs_and_tells_their_best(tmp_path, capsys):
    small = metrics(tmp_path / "small" / "a", 4)
    large = metrics(tmp_path / "large" / "b", 2, torn=True)
    assert plot.main([str(small), str(large), "-o", str(tmp_path / "out.png")]) == 0
    printed = capsys.readouterr().out
    assert "small/a: validation top-1 40.00%, training loss 0.75" in printed
    assert "large/b: validation top-1 10.00%" in printed
    assert Image.open(tmp_path / "out.png").size[0] > 900


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ("small/default large/default", "small large"),
        ("small/a small/b", "a b"),
        ("small/a large/b", "small/a large/b"),
        ("small/a", "small/a"),
    ],
)
def test_plot_leaves_out_of_names_what_all_runs_share(places, names):
    runs = plot.told_apart([plot.Run(place, ()) for place in places.split()])
    assert [run.name for run in runs] == names.split()


def test_plot_counts_in_epochs(tmp_path):
    run = plot.Run.read(metrics(tmp_path / "x" / "y", 3))
    epochs, losses = run.series("loss")
    assert epochs.tolist() == [0.5, 1.5, 2.5] and losses.tolist() == [3.0, 1.5, 1.0]
    assert len(run.series("val_loss")[0]) == 0


def test_plot_without_metrics_says_what_is_missing(tmp_path, capsys):
    assert plot.main([str(tmp_path)]) == 2
    assert "give a run's folder" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot.main([str(tmp_path)]) == 2
    assert "holds no metrics yet" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["5m", "21m_384"])
def test_predict_reads_a_model_from_the_shapes_of_its_weights(variant):
    state = TinyViT.from_config(variant).state_dict()
    found = tiny_vit_settings(state, "x")
    for name, value in VARIANTS[variant].items():
        if name not in ("drop_path_rate", "num_heads"):
            assert tuple(np.ravel(found[name])) == tuple(np.ravel(value)), name
    assert tuple(found["num_heads"][1:]) == tuple(VARIANTS[variant]["num_heads"][1:])


def noise(path):
    """A picture file of noise; the picture."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(path)
    return image


@pytest.mark.parametrize("naming", [dict, to_timm], ids=["ours", "timm"])
def test_predict_tells_the_models_classes(naming, tmp_path, capsys):
    model = TinyViT(**SMALL).eval()
    weights, photos = tmp_path / "weights.pth", tmp_path / "photos"
    torch.save({"model": naming(model.state_dict())}, weights)
    photos.mkdir()
    noise(photos / "noise.png")
    assert predict.main([str(photos), "--weights", str(weights), "--json", "--topk", "3"]) == 0
    line = json.loads(capsys.readouterr().out)
    built, cfg, names = predict.load_model(str(weights))
    x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert cfg.DATA.IMG_SIZE == 48 and torch.equal(built(x), model(x)) and not names
    assert line["image"] == str(photos / "noise.png")
    classes = line["classes"]
    assert [entry["name"] for entry in classes] == [f"class {entry['class']}" for entry in classes]
    assert len(classes) == 3 and classes[0]["probability"] >= classes[1]["probability"]


def test_predict_takes_all_from_a_trainings_own_checkpoint(tmp_path):
    """Model, size, normalisation and class names, also of a model that no shapes could tell."""
    opts = (
        "MODEL.TYPE timm MODEL.NAME test_byobnet DATA.MEAN_AND_STD_TYPE half"
        " DATA.SHAPES.TRAIN_IMAGES 24 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
    )
    assert training.run(tmp_path, *opts.split()) == 0
    checkpoint = tmp_path / "test_byobnet" / "default" / "checkpoints" / "last.pth"
    model, cfg, names = predict.load_model(str(checkpoint))
    assert (cfg.MODEL.NAME, cfg.DATA.IMG_SIZE) == ("test_byobnet", 40)
    assert cfg.DATA.MEAN_AND_STD_TYPE == "half"
    assert len(names) == 10 and names == open_run(cfg).images.class_names
    image = noise(tmp_path / "noise.png")
    ((path, (best,)),) = predict.predict([tmp_path / "noise.png"], str(checkpoint), topk=1)
    probability, index = model(eval_transform(cfg)(image)[None]).softmax(1)[0].max(0)
    assert path == tmp_path / "noise.png"
    assert (best["class"], best["name"]) == (index, names[index])
    assert best["probability"] == round(probability.item(), 6)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("nothing.jpg --weights weights.pth", "no such file or folder: name images, or folders"),
        ("names.txt --weights weights.pth", "GIF, TIFF, PPM file): restore the file\n"),
        ("i.png --weights weights.pth --classes names.txt", "2 names, the model has 7 classes"),
        ("i.png --weights other.pth", "for a timm model name it with --timm"),
        ("i.png --weights no.pth", "there is no such checkpoint file"),
        ("i.png --weights names.txt", "checkpoint, or a damaged one"),
    ],
)
def test_predict_names_its_faults(words, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise("i.png")
    (tmp_path / "names.txt").write_text("a\nb\n")
    torch.save(TinyViT(**SMALL).state_dict(), "weights.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, "other.pth")
    assert predict.main(words.split()) == 2
    assert text in capsys.readouterr().err


def called(cfg):
    Path("called").touch()
    return TinyViT(**SMALL)


def test_no_checkpoint_says_what_predict_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise("i.png")
    config = dump(load_config(["--opts", "MODEL.TYPE", f"{__name__}:called"]))
    torch.save({"model": TinyViT(**SMALL).state_dict(), "config": config}, "weights.pth")
    assert predict.main(["i.png", "--weights", "weights.pth"]) == 2
    line = f"error: weights.pth: its model is made by {__name__}:called, which no file of weights"
    assert line in capsys.readouterr().err and not Path("called").exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embed.seq.2.c.weight", ()),
        ("patch_embed.seq.2.c.weight", (7, 1)),
        ("layers.1.blocks.0.attn.attention_biases", (49,)),
        ("layers.1.blocks.0.attn.attention_biases", (0, 49)),
        ("layers.1.blocks.0.mlp.fc1.weight", ()),
        ("layers.1.blocks.0.attn.proj.weight", None),
        ("head.weight", (5,)),
    ],
)
def test_predict_takes_no_odd_shape_for_a_model(name, shape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise("i.png")
    state = TinyViT(**SMALL).state_dict()
    state[name] = None if shape is None else torch.zeros(shape)
    torch.save({key: value for key, value in state.items() if value is not None}, "odd.pth")
    assert predict.main(["i.png", "--weights", "odd.pth"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1


def test_predict_takes_a_pinned_file_of_timm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise("i.png")
    torch.save(timm.create_model("test_byobnet", num_classes=3).state_dict(), "timm.pth")
    digest = hashlib.sha256(Path("timm.pth").read_bytes()).hexdigest()
    words = ["i.png", "--timm", "test_byobnet", "--weights"]
    assert predict.main([*words, f"timm.pth@sha256={digest[:8]}"]) == 0
    assert "class 2" in capsys.readouterr().out
    assert predict.main([*words, "timm.pth@sha256=00000000"]) == 2
    assert f"timm.pth: its sha256 is {digest}" in capsys.readouterr().err


def test_imagenet_classes_have_names():
    assert predict.class_names(1000, None)[0].startswith("tench")
    ids = ImageNetInfo("imagenet-1k").label_names()
    assert predict.class_names(1000, None, ids)[0].startswith("tench")


def test_a_thousand_classes_of_ones_own_keep_their_names():
    names = [f"bird {i}" for i in range(1000)]
    assert predict.class_names(1000, None, names) == names


def test_the_zoos_check_looks_for_its_images_first(tmp_path, capsys):
    assert verify_zoo.main([str(tmp_path / "none"), "--download"]) == 2
    assert "none: no such file or folder" in capsys.readouterr().err


def test_the_zoos_check_measures_and_judges(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify_zoo, "ZOO", (verify_zoo.Published("5m", "1k", 79.1),))
    monkeypatch.chdir(tmp_path)
    call = "val --checkpoints . --workers 0 --device cpu".split()
    folder = tmp_path / "val" / "n01440764"
    folder.mkdir(parents=True)
    noise(folder / "0.png")
    assert verify_zoo.main(call) == 1
    assert "tiny_vit_5m_1k.pth: not in" in capsys.readouterr().out
    torch.save({"model": TinyViT.from_config("5m").state_dict()}, "tiny_vit_5m_1k.pth")
    assert verify_zoo.main(call) == 1
    assert "published 79.1%: DIFFERS" in capsys.readouterr().out


def test_confusion_matrices_are_drawn(tmp_path, monkeypatch):
    counts = np.array([[9, 1], [0, 5]])
    monkeypatch.setattr(demo, "confusion", lambda weights: (counts, ["a", "b"]))
    demo.draw_confusion(tmp_path)
    assert Image.open(tmp_path / "confusion.png").size[0] > 800


def test_code_is_counted_without_docstrings_and_comments(tmp_path, capsys):
    text = f'"""Doc."""\n# why\nx = "text"  # {"-" * 90}\n'
    counts = {"tokens": 3, "lines": 3, "wide": 1, "comments": 1}
    assert size.measure(text) == counts
    for folder in ("data", "tests/data", ".venv"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text(text)
    assert size.main([str(tmp_path)]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    row = "3 3 1 1 ".split()
    assert [line.split() for line in rows] == [
        [*row, room] for room in ("data", "tests", "product")
    ]
