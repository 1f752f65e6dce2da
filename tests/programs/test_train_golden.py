"""A whole training beside the original's: the same losses, gradient norms, learning rates and final
weights.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

import main
from tests.support.jobs import words
from tools import logits

COMMAND = "--only-cpu --cfg configs/1k/tiny_vit_5m.yaml --batch-size 16 --disable_amp"
OPTS = (
    "--opts DATA.IMG_SIZE 64 MODEL.TINY_VIT.DEPTHS [1,1,1,1] MODEL.TINY_VIT.NUM_HEADS [1,1,1,1]"
    " MODEL.TINY_VIT.WINDOW_SIZES [2,2,4,2] MODEL.TINY_VIT.EMBED_DIMS [16,32,32,32] PRINT_FREQ 1"
    " MODEL.DROP_PATH_RATE 0.0 MODEL.NUM_CLASSES 1000 DISTILL.LOGITS_TOPK 10 DATA.NUM_WORKERS 0"
    " TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 TRAIN.BASE_LR 0.01 TRAIN.AUTO_RESUME False"
)


def trained(
    goldens, output, monkeypatch, store: Path | None = None
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What each update measured, and the final weights."""
    train = goldens / "train"
    monkeypatch.chdir(main.Path(main.__file__).parent)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output.mkdir(exist_ok=True)
    try:
        paths = ["--data-path", train / "data", "--pretrained", train / "init.pth"]
        paths += ["--output", output, "--save-model", output / "weights"]
        last = ["DISTILL.TEACHER_LOGITS_PATH", store or train / "store"]
        assert main.main(words(COMMAND, *paths, OPTS, *last)) == 0
    finally:
        torch.set_num_threads(threads)
    lines = map(
        json.loads,
        (output / "TinyViT-5M-1k" / "default" / "metrics.jsonl").read_text().splitlines(),
    )
    lines = list(lines)
    # 10 folders and 1000 outputs: nothing says which is which
    assert not any("top1" in key for line in lines for key in line)
    return [line for line in lines if "lr" in line], safetensors.numpy.load_file(output / "weights")


def relative(lines: list[dict], name: str, expected: np.ndarray) -> np.ndarray:
    assert len(lines) == len(expected) == 24
    return np.abs(np.array([line[name] for line in lines]) - expected) / np.abs(expected)


def test_it_trains_like_the_original(goldens, tmp_path, monkeypatch):
    expected = np.load(goldens / "train" / "plain.npz")
    lines, weights = trained(goldens, tmp_path, monkeypatch)
    assert relative(lines, "loss", expected["loss"]).max() < 1e-5
    norm = relative(lines, "norm", expected["norm"])
    assert norm[:10].max() < 1e-5 and norm.max() < 1e-4
    assert (
        relative(lines, "lr", expected["lr_max"]).max() < 1e-15
        and relative(lines, "lr_min", expected["lr_min"]).max() < 1e-15
    )
    start = torch.load(goldens / "train" / "init.pth", weights_only=True)
    start = start.get("model", start)
    errors = {"weight": 0.0, "statistic": 0.0}
    lengths = dict(errors)
    names = [
        key[2:]
        for key in expected.files
        if key.startswith("w:") and not key.endswith(("attention_bias_idxs", "num_batches_tracked"))
    ]
    assert set(names) == {name for name in weights if not name.endswith("num_batches_tracked")}
    for name in names:
        kind = "statistic" if "running" in name else "weight"
        theirs = expected[f"w:{name}"].astype(np.float64)
        errors[kind] += np.square(weights[name] - theirs).sum()
        lengths[kind] += np.square(theirs - (start[name].numpy() if kind == "weight" else 0)).sum()
    assert errors["weight"] < 0.02**2 * lengths["weight"]
    assert errors["statistic"] < 0.001**2 * lengths["statistic"]


def test_a_converted_store_trains_the_same(goldens, tmp_path, monkeypatch):
    recipe = [
        "--cfg",
        str(main.Path(main.__file__).parent / "configs/1k/tiny_vit_5m.yaml"),
        "--data-path",
        str(goldens / "train" / "data"),
    ]
    opts = words("--opts DATA.IMG_SIZE 64 AUG.MIXUP_MODE pair2 MODEL.NUM_CLASSES 1000")
    assert (
        logits.main(
            ["convert", str(goldens / "train" / "store"), str(tmp_path / "store"), *recipe, *opts]
        )
        == 0
    )
    direct, _ = trained(goldens, tmp_path / "direct", monkeypatch)
    converted, _ = trained(goldens, tmp_path / "converted", monkeypatch, tmp_path / "store")
    assert converted == direct
