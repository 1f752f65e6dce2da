"""The small programs: curves, predictions, the zoo's check, and what the demo makes of its results."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.decoder import eval_transform
from data.build import open_run
from models.pretrained import to_timm
from models.tiny_vit import VARIANTS, TinyViT
from tests.support import training
from tools import demo, plot, predict, verify_zoo

SHORT = ["DATA.SHAPES.TRAIN_IMAGES", 24, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0]

SMALL = {
    "img_size": 48,
    "num_classes": 7,
    "embed_dims": [16, 32, 48, 64],
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 3, 4],
    "window_sizes": [3, 3, 3, 3],
}


def metrics(folder, epochs: int, torn: bool = False):
    folder.mkdir(parents=True)
    lines = []
    for epoch in range(1, epochs + 1):
        lines += [{"step": 10 * epoch - 5, "epoch": epoch - 1, "loss": 3.0 / epoch, "lr": 1e-3}]
        lines += [
            {
                "step": 10 * epoch,
                "epoch": epoch,
                "train_loss": 3.0 / epoch,
                "val_top1": 10.0 * epoch,
                "val_loss": None,
            }
        ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text[:-20] if torn else text)
    return folder


def test_plot_compares_runs_and_tells_their_best(tmp_path, capsys):
    runs = [metrics(tmp_path / "small" / "a", 4), metrics(tmp_path / "large" / "b", 2, torn=True)]
    assert plot.main([*map(str, runs), "-o", str(tmp_path / "out.png")]) == 0
    printed = capsys.readouterr().out
    assert (
        "small/a: validation top-1 40.00%, training loss 0.75" in printed
        and "large/b: validation top-1 10.00%" in printed
    )
    assert Image.open(tmp_path / "out.png").size[0] > 900


def test_plot_leaves_out_of_names_what_all_runs_share(tmp_path):
    def names(*places: str) -> list[str]:
        return [run.name for run in plot.told_apart([plot.Run(place, ()) for place in places])]

    assert names("small/default", "large/default") == ["small", "large"] and names(
        "small/a", "small/b"
    ) == ["a", "b"]
    assert names("small/a", "large/b") == ["small/a", "large/b"] and names("small/a") == ["small/a"]


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
    found = predict.tiny_vit_settings(state, "x")
    for name, value in VARIANTS[variant].items():
        if name not in ("drop_path_rate", "num_heads"):
            assert tuple(np.ravel(found[name])) == tuple(np.ravel(value)), name
    assert tuple(found["num_heads"][1:]) == tuple(VARIANTS[variant]["num_heads"][1:])


def weights(folder, naming=lambda state: state):
    torch.manual_seed(0)
    model = TinyViT(**SMALL)
    path = folder / "weights.pth"
    torch.save({"model": naming(model.state_dict())}, path)
    return model.eval(), path


@pytest.mark.parametrize("naming", [lambda state: state, to_timm], ids=["ours", "timm"])
def test_predict_tells_the_models_classes(naming, tmp_path, capsys):
    model, path = weights(tmp_path, naming)
    image = tmp_path / "photos" / "noise.png"
    image.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(
        image
    )
    assert predict.main([str(image.parent), "--weights", str(path), "--json", "--topk", "3"]) == 0
    line = json.loads(capsys.readouterr().out)
    built, cfg, names = predict.load_model(str(path))
    x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert cfg.DATA.IMG_SIZE == 48 and torch.equal(built(x), model(x)) and not names
    assert line["image"] == str(image) and [entry["name"] for entry in line["classes"]] == [
        f"class {e['class']}" for e in line["classes"]
    ]
    assert (
        len(line["classes"]) == 3
        and line["classes"][0]["probability"] >= line["classes"][1]["probability"]
    )


def test_predict_takes_all_from_a_trainings_own_checkpoint(tmp_path):
    """Model, size, normalisation and names of the classes, also of a model that no shapes could
    tell.
    """
    opts = [
        "MODEL.TYPE",
        "timm",
        "MODEL.NAME",
        "test_byobnet",
        "DATA.MEAN_AND_STD_TYPE",
        "half",
        *SHORT,
    ]
    assert training.run(tmp_path, *opts) == 0
    checkpoint = tmp_path / "test_byobnet" / "default" / "checkpoints" / "last.pth"
    model, cfg, names = predict.load_model(str(checkpoint))
    assert (cfg.MODEL.NAME, cfg.DATA.IMG_SIZE, cfg.DATA.MEAN_AND_STD_TYPE) == (
        "test_byobnet",
        40,
        "half",
    )
    assert len(names) == 10 and names == open_run(cfg).val_loader().dataset.dataset.class_names
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    image.save(tmp_path / "noise.png")
    ((path, classes),) = predict.predict([tmp_path / "noise.png"], str(checkpoint), topk=1)
    probs = model(eval_transform(cfg)(image)[None]).softmax(1)[0]
    assert path == tmp_path / "noise.png" and classes == [
        {
            "class": int(probs.argmax()),
            "name": names[probs.argmax()],
            "probability": round(probs.max().item(), 6),
        }
    ]


def test_predict_names_its_faults(tmp_path, capsys):
    _, path = weights(tmp_path)
    assert predict.main([str(tmp_path / "nothing.jpg"), "--weights", str(path)]) == 2
    assert "nothing.jpg: no such file or folder" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("a\nb\n")
    Image.new("RGB", (50, 50)).save(tmp_path / "i.png")
    assert (
        predict.main(
            [
                str(tmp_path / "i.png"),
                "--weights",
                str(path),
                "--classes",
                str(tmp_path / "names.txt"),
            ]
        )
        == 2
    )
    assert "holds 2 names, the model has 7 classes" in capsys.readouterr().err
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    assert predict.main([str(tmp_path / "i.png"), "--weights", str(tmp_path / "other.pth")]) == 2
    assert (
        "not the weights of a TinyViT classifier; for a timm model name it with --timm"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "there is no such checkpoint file"),
        (b"no", "refused: it is no checkpoint, or a damaged one"),
    ],
)
def test_predict_says_what_is_wrong_with_a_checkpoint(content, text, tmp_path, capsys):
    Image.new("RGB", (50, 50)).save(tmp_path / "i.png")
    if content:
        (tmp_path / "c.pth").write_bytes(content)
    assert predict.main([str(tmp_path / "i.png"), "--weights", str(tmp_path / "c.pth")]) == 2
    assert text in capsys.readouterr().err


def test_imagenet_classes_have_names():
    assert predict.class_names(1000, None)[0].startswith("tench")


def test_the_zoos_check_looks_for_its_images_first(tmp_path, capsys):
    assert verify_zoo.main([str(tmp_path / "none"), "--download"]) == 2
    assert (
        "none: no such file or folder; give ImageNet-1k's validation images"
        in capsys.readouterr().err
    )


def test_the_zoos_check_measures_and_judges(tmp_path, capsys, monkeypatch):
    entry = verify_zoo.Published("5m", "1k", 79.1)
    monkeypatch.setattr(verify_zoo, "ZOO", (entry,))
    assert verify_zoo.main([str(tmp_path), "--checkpoints", str(tmp_path)]) == 1
    assert "tiny_vit_5m_1k.pth: not in" in capsys.readouterr().out
    torch.save({"model": TinyViT.from_config("5m").state_dict()}, tmp_path / entry.file)
    folder = tmp_path / "val" / "n01440764"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (60, 60), (80 * i, 0, 0)).save(folder / f"{i}.png")
    call = [
        str(tmp_path / "val"),
        "--checkpoints",
        str(tmp_path),
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert verify_zoo.main(call) == 1
    assert "published 79.1%: DIFFERS" in capsys.readouterr().out


def test_confusion_matrices_are_drawn(tmp_path, monkeypatch):
    counts = np.array([[9, 1], [0, 5]])
    monkeypatch.setattr(demo, "confusion", lambda weights: (counts, ["a", "b"]))
    demo.draw_confusion(tmp_path)
    assert Image.open(tmp_path / "confusion.png").size[0] > 800
