"""The small programs: curves, predictions, the zoo's check, the demo's picture, counts of code."""

import hashlib
import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_hex
from PIL import Image
from timm.data import ImageNetInfo

from configs import dump, load_config
from data.augment.decoder import eval_transform
from data.build import open_run
from logger import NullWriter, TrainingLog
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


def metrics(folder, epochs: int, torn: bool = False, top1: float = 10.0, loss: float = 3.0):
    """A run's folder; `torn`, if its last line is cut short."""
    folder.mkdir(parents=True)
    text = ""
    for epoch in range(1, epochs + 1):
        now = loss / epoch
        during = {"step": 10 * epoch - 5, "epoch": epoch - 0.5, "loss": now, "lr": 1e-3}
        after = {"step": 10 * epoch, "epoch": epoch, "train_loss": now, "val_top1": top1 * epoch}
        after["val_loss"] = None  # was not finite
        text += f"{json.dumps(during)}\n{json.dumps(after)}\n"
    (folder / "metrics.jsonl").write_text(text[:-20] if torn else text)
    return folder


def plotted(*places) -> list[plot.Run]:
    return plot.grouped([plot.Run.read(place) for place in places])


def axes_of(runs, also=(), smooth=1) -> dict:
    """The panels of a picture that can be written, by title."""
    figure = plot.draw(runs, also, smooth)
    figure.savefig(io.BytesIO())
    return {axis.get_title(): axis for axis in figure.axes}


def test_plot_compares_runs_and_tells_their_best(tmp_path, capsys):
    small = metrics(tmp_path / "small" / "a", 2, torn=True)
    large = metrics(tmp_path / "large" / "b", 4)
    assert plot.main([str(small), str(large), "-o", str(tmp_path / "out.png")]) == 0
    head, *rows, _ = capsys.readouterr().out.splitlines()
    assert re.split("  +", head)[:3] == ["run", "seeds", "validation top-1"]
    # the best first; no validation loss was finite
    assert [row.split() for row in rows] == [
        ["large/b", "1", "40", "0.75"],
        ["small/a", "1", "10", "3"],
    ]
    assert Image.open(tmp_path / "out.png").size[0] > 900


def test_plot_takes_seeds_together(tmp_path):
    places = [metrics(tmp_path / "run" / f"x-seed{i}", 3 - i, top1=10.0 + i) for i in range(3)]
    other = metrics(tmp_path / "run" / "y-seed7", 1)
    alone, seeds = sorted(plotted(*places, other, places[0]), key=lambda run: run.seeds)
    assert (alone.name, alone.seeds, seeds.name, seeds.seeds) == ("y-seed7", 1, "x", 3)
    epochs, means, spreads = seeds.series("val_top1")
    assert epochs.tolist() == [1, 2, 3]  # of each the seeds that have got there
    assert means.tolist() == [11, 21, 30]
    assert spreads == pytest.approx([1, 2**0.5, 0])
    assert plot.table([seeds])[1].split()[:5] == ["x", "3", "30", "±", "0"]


def test_plot_keeps_losses_apart_that_would_flatten_each_other(tmp_path):
    labels = metrics(tmp_path / "n" / "labels", 4)
    near = metrics(tmp_path / "n" / "near", 4, loss=2.0)
    hot = metrics(tmp_path / "n" / "hot", 4, loss=40.0)
    figure = plot.draw(plotted(labels, near, hot), (), 1)
    heights = [
        sorted(line.get_ydata()[-1] for line in axis.lines)
        for axis in figure.axes
        if axis.get_title() == "training loss"
    ]
    assert heights == [[0.5, 0.75], [10.0]]


@pytest.mark.parametrize("count", [1, 2, 8, 20])
def test_plot_gives_each_run_a_colour_and_a_row(count, tmp_path):
    places = [metrics(tmp_path / "n" / f"r{i}", 2, top1=10.0 + i) for i in range(count)]
    figure = plot.draw(plotted(*places), (), 1)
    (legend,) = figure.legends
    shown = next(axis for axis in figure.axes if axis.get_title() == "validation top-1 (%)")
    colours = [to_hex(line.get_color()) for line in shown.lines]
    assert len(set(colours)) == count
    assert colours == [to_hex(line.get_color()) for line in legend.get_lines()[1:]]
    ends = [f"{line.get_ydata()[-1]:.4g}" for line in shown.lines]
    assert ends == [text.get_text().split()[2] for text in legend.get_texts()[1:]]


def test_plot_shows_a_run_of_one_point(tmp_path):
    for axis in axes_of(plotted(metrics(tmp_path / "x" / "y", 1))).values():
        (line,) = axis.lines
        assert line.get_marker() == "o" and len(line.get_xdata()) == 1
        low, high = axis.get_ylim()
        assert low <= 0 < line.get_ydata()[0] < high


@pytest.mark.parametrize("printed", [0, 1])
def test_plot_takes_losses_of_short_runs_from_their_epochs(printed, tmp_path):
    """Which have few updates between lines of the log, or none."""
    folder = metrics(tmp_path / "x" / "y", 3)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [*lines[: 2 * printed : 2], *lines[1::2]]
    (folder / "metrics.jsonl").write_text("\n".join(kept))
    (line,) = axes_of(plotted(folder))["training loss"].lines
    assert line.get_xdata().tolist() == [1, 2, 3] and line.get_ydata().tolist() == [3, 1.5, 1]
    assert line.get_marker() == "."


def test_plot_shows_speed_and_more_and_smooths(tmp_path, capsys):
    folder = metrics(tmp_path / "x" / "y", 3)
    told: list[str] = []
    log = TrainingLog(told.append, NullWriter(), 3, 800, 0)
    for epoch in range(3):
        log.report(10 * epoch + 5, epoch, 5, 10, {"loss": 1.0}, [1e-3], 0, 0.0, 1.0)
    (folder / "log_rank0.txt").write_text("\n".join(told))
    runs = plotted(folder)
    axes = axes_of(runs, ["images/s"], smooth=3)
    speeds = axes["images/s"].lines[0]
    assert speeds.get_xdata().tolist() == [0.5, 1.5, 2.5] and min(speeds.get_ydata()) > 0
    values, means = (line.get_ydata() for line in axes["training loss"].lines)
    assert values.tolist() == [3.0, 1.5, 1.0]
    assert means == pytest.approx([2.25, 5.5 / 3, 1.25])
    assert len(axes["validation top-1 (%)"].lines) == 1
    assert plot.main([str(folder), "--also", "norn"]) == 2
    error = capsys.readouterr().err
    assert "--also norn: these runs have epoch, images/s, loss" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ("/o/small/default /o/large/default", "small large"),
        ("/o/small/a /o/small/b", "a b"),
        ("/o/small/a /o/large/b", "small/a large/b"),
        ("/o/small/a", "small/a"),
        ("/o/small/a /p/small/a", "o p"),
    ],
)
def test_plot_leaves_out_of_names_what_all_runs_share(folders, names):
    assert plot.told_apart(folders.split()) == names.split()


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


@pytest.mark.parametrize("batch_size", ["1", "16"])
def test_predict_answers_beside_what_is_no_image(batch_size, tmp_path, capsys):
    weights, photos = tmp_path / "weights.pth", tmp_path / "photos"
    torch.save(TinyViT(**SMALL).state_dict(), weights)
    photos.mkdir()
    (photos / "b.jpg").write_text("no image")
    words = ["--weights", str(weights), "--json", "--batch-size", batch_size]
    assert predict.main([str(photos), *words]) == 2  # nothing else to answer
    assert capsys.readouterr().err.startswith("error: ")
    for name in ("a.png", "c.png"):
        noise(photos / name)
    assert predict.main([str(photos), *words]) == 1
    out, err = capsys.readouterr()
    answered = [json.loads(line) for line in out.splitlines()]
    assert [Path(line["image"]).name for line in answered] == ["a.png", "c.png"]
    assert answered[0]["classes"] == answered[1]["classes"] and len(answered[0]["classes"]) == 5
    assert err.startswith(f"warning: {photos / 'b.jpg'}: can't be decoded") and err.count("\n") == 1


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
    with pytest.raises(SystemExit):
        size.main(["--help"])
    assert "folder" in capsys.readouterr().out
    assert size.main([str(tmp_path)]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    row = "3 3 1 1 ".split()
    assert [line.split() for line in rows] == [
        [*row, room] for room in ("data", "tests", "product")
    ]
