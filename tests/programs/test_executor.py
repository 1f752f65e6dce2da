"""AUG.EXECUTOR device makes the same store and weights as Pillow, and may take its place."""

import pytest
import torch

from configs import load_config
from data.augment import device_effects, pillow
from data.build import open_run
from data.replay import on_device
from tests.support import saving, training
from tests.support.training import same_bits, state

SHORT = ["TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0, "DATA.SHAPES.TRAIN_IMAGES", 32]
RECIPES = {
    "default": [],
    "small": ["DATA.IMG_SIZE", 32, "AUG.REMODE", "rand"],
    "jitter": ["AUG.AUTO_AUGMENT", "none", "DATA.INTERPOLATION", "random", "AUG.REPROB", 1.0],
}


def sealed(root) -> list[bytes]:
    return [path.read_bytes() for path in sorted(root.glob("epoch_*.npy"))]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("workers", [0, 2])
def test_stores_and_weights_are_the_same(recipe, workers, tmp_path):
    opts = [*SHORT, *RECIPES[recipe], "DATA.NUM_WORKERS", workers]
    for executor in ("pillow", "device"):
        store = tmp_path / executor / "store"
        chosen = [*opts, "AUG.EXECUTOR", executor]
        assert saving.run(store, *chosen) == 0
        chosen += ["DISTILL.TEACHER_LOGITS_PATH", store]
        assert training.run(tmp_path / executor, *chosen) == 0
    assert sealed(tmp_path / "pillow" / "store") == sealed(tmp_path / "device" / "store")
    states = [state(tmp_path / executor) for executor in ("pillow", "device")]
    assert same_bits(states[0]["model"], states[1]["model"])
    assert states[0]["measured"] == states[1]["measured"]


def test_a_store_is_checked_and_a_run_continued_by_the_other(tmp_path):
    store = tmp_path / "store"
    assert saving.run(store, *SHORT, "AUG.EXECUTOR", "device") == 0
    check = ["--check-saved-logits", "--exact"]
    assert saving.run(store, *SHORT, "AUG.EXECUTOR", "pillow", flags=check) == 0
    for tag, first, second in (("mixed", "device", "pillow"), ("plain", "pillow", "pillow")):
        opts, flags = [*SHORT, "AUG.EXECUTOR", first], ["--tag", tag]
        assert training.run(tmp_path, *opts, "TRAIN.EPOCHS", 1, flags=flags) == 0
        opts = [*SHORT, "AUG.EXECUTOR", second, "TRAIN.EPOCHS", 3]
        assert training.run(tmp_path, *opts, flags=flags) == 0
    mixed, plain = (state(tmp_path, tag=tag)["model"] for tag in ("mixed", "plain"))
    assert same_bits(mixed, plain)


def data(executor: str, tmp_path, *more: object):
    opts = f"DATA.DATASET shapes DATA.IMG_SIZE 48 DATA.NUM_WORKERS 0 AUG.EXECUTOR {executor}"
    words = [*opts.split(), "DATA.INDEX_DIR", str(tmp_path), *map(str, more)]
    return open_run(load_config(["--opts", *words]))


@pytest.mark.parametrize(
    ("executor", "device", "expected"),
    [
        ("pillow", "cuda", "bytes"),
        ("pillow", "cpu", "pillow"),
        ("auto", "cpu", "pillow"),
        ("device", "cpu", "device"),
    ],
)
def test_the_choice(executor, device, expected, tmp_path):
    chosen = data(executor, tmp_path).choose_executor(torch.device(device), print)
    assert chosen == expected


@pytest.mark.parametrize("executor", ["auto", "device"])
def test_another_bit_is_found_and_its_operation_named(executor, tmp_path, monkeypatch):
    def drifted(images, *arguments):
        return images ^ 1

    monkeypatch.setitem(device_effects.EFFECTS, "Sharpness", drifted)
    run, said = data(executor, tmp_path), []

    if executor == "device":
        with pytest.raises(ValueError, match=r"AUG.EXECUTOR = device: .* in sharpness x"):
            run.choose_executor(torch.device("cpu"), said.append)
    else:
        assert run.choose_executor(torch.device("cpu"), said.append) == "pillow"


def test_an_effect_of_the_users_own_is_left_to_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(pillow.EFFECTS, "Grey", lambda image, effect, fill: image)
    with pytest.raises(ValueError, match="Grey has no form on a device: set AUG.EXECUTOR pillow"):
        data("device", tmp_path).choose_executor(torch.device("cpu"), print)


@pytest.mark.parametrize("executor", ["bytes", "device"])
@pytest.mark.parametrize("size", [32, 48])
def test_a_foreign_loop_needs_a_collate_function_and_one_call(executor, size, tmp_path):
    few = ["DATA.SHAPES.TRAIN_IMAGES", 32, "AUG.MIXUP_MODE", "pair2", "DATA.IMG_SIZE", size]
    run = data("device", tmp_path, *few)
    plain = run.train_loader(8)
    packed = run.train_loader(8, executor=executor)
    for ours, theirs in zip(plain.batches(0), on_device(packed.batches(0), "cpu")):
        assert all(map(torch.equal, ours, theirs)) and len(ours.mixes) == 4
        mixed = run.mix(ours.image, ours.label, ours.seed)
        assert all(map(torch.equal, run.mix(*theirs[:3], theirs.mixes), mixed))
