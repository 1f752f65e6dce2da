"""Where values come from, what becomes of them, and what follows from them."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from configs import (
    ConfigError,
    argument_parser,
    batch_plan,
    choices_in_words,
    dump,
    learning_rates,
    load_config,
    run_folder,
)
from configs.config import flatten
from configs.continuation import check_continuation
from configs.defaults import REMOVED
from configs.validate import RANGES


def opts(text: str = "", world_size: int = 1):
    return load_config(["--opts", *text.split()], world_size)


def from_yaml(folder: Path, text: str):
    (folder / "recipe.yaml").write_text(text)
    return load_config(["--cfg", str(folder / "recipe.yaml")])


def test_flags_win_over_opts_over_the_file_over_its_bases(tmp_path):
    (tmp_path / "a.yaml").write_text("TAG: a\nSEED: 1\nTRAIN: {EPOCHS: 40, BASE_LR: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("BASE: [a.yaml]\nSEED: 2\n")
    words = "--opts TRAIN.EPOCHS 50 TAG opts --tag flag".split()
    cfg = load_config(["--cfg", str(tmp_path / "b.yaml"), *words])
    assert (cfg.SEED, cfg.TRAIN.EPOCHS, cfg.TRAIN.BASE_LR, cfg.TAG) == (2, 50, 1e-3, "flag")
    assert cfg.EXPLICIT == ["SEED", "TAG", "TRAIN.BASE_LR", "TRAIN.EPOCHS"]


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("AUG.MIXUP", "1", 1.0),
        ("TRAIN.BASE_LR", "1e-3", 1e-3),
        ("TRAIN.WEIGHT_DECAY", "0", 0.0),
        ("TRAIN.AUTO_RESUME", "false", False),
        ("AUG.SCALE", "[0.2,1]", (0.2, 1)),
        ("AUG.SCALE", "(0.2,1)", (0.2, 1)),
        ("AUG.SCALE", "null", (0.08, 1.0)),
        ("DATA.MEAN", "(0,0,0)", [0, 0, 0]),
        ("DATA.MEAN", "null", []),
        ("AUG.CUTMIX_MINMAX", "(0.2,0.8)", [0.2, 0.8]),
        ("AUG.CUTMIX_MINMAX", "None", None),
        ("TAG", "'12'", "12"),
        ("TAG", "run-1.5", "run-1.5"),
    ],
)
def test_values_become_what_their_key_is_and_survive_a_dump(key, text, expected, tmp_path):
    nested = key.replace(".", ":\n  ") + f": {text}"
    for cfg in (from_yaml(tmp_path, nested), opts(f"{key} {text}".replace("'", ""))):
        assert cfg.value(key) == expected and type(cfg.value(key)) is type(expected)
        assert from_yaml(tmp_path, dump(cfg)) == cfg and cfg.EXPLICIT == [key]


def test_every_flag_reaches_its_key_and_is_explained():
    cfg = load_config(
        "--batch-size 6 --data-path d --pretrained p --resume r --accumulation-steps 2"
        " --use-checkpoint --disable_amp --output o --tag t --eval --throughput --use-wandb"
        " --use-sync-bn --device cuda --local_rank 3".split()
    )
    assert choices_in_words(cfg) == (
        "DATA.BATCH_SIZE 6, DATA.DATA_PATH d, MODEL.PRETRAINED p, MODEL.RESUME r,"
        " TRAIN.ACCUMULATION_STEPS 2, TRAIN.USE_CHECKPOINT True, TRAIN.SYNC_BN True,"
        " AMP_ENABLE False, DEVICE cuda, OUTPUT o, TAG t, EVAL_MODE True, THROUGHPUT_MODE True,"
        " USE_WANDB True"
    )
    assert choices_in_words(load_config([])) == "the defaults"
    cfg = load_config(["--only-cpu", "--disable-amp", "--local-rank", "0"])
    assert (cfg.DEVICE, cfg.AMP_ENABLE) == ("cpu", False)
    assert all(action.help for action in argument_parser("x")._actions)


def test_a_store_or_an_online_teacher_turns_distillation_and_pairs_on():
    assert not opts().is_paired
    store = "DISTILL.TEACHER_LOGITS_PATH store"
    for cfg in (opts(store), opts("DISTILL.ONLINE True DISTILL.TEACHER_CFG t.yaml")):
        assert cfg.DISTILL.ENABLED and cfg.is_paired
    unmixed = opts(f"{store} AUG.MIXUP 0 AUG.CUTMIX 0 AUG.MIXUP_MODE batch")
    assert not unmixed.is_paired and unmixed.AUG.MIXUP_MODE == "pair2"


def test_a_key_of_an_earlier_version_is_a_line_and_stops_nothing(tmp_path, capsys, monkeypatch):
    key = "DISTILL.STAGE_DIR"
    content = yaml.safe_load(dump(opts("SEED 1")))
    content["DISTILL"]["STAGE_DIR"] = "/disk"
    del content["DISTILL"]["OTHER_SIZE"]  # which that version did not have yet
    before = yaml.safe_dump(content)
    assert check_continuation(before, opts("SEED 1"), "c") == []
    assert from_yaml(tmp_path, before) == opts("SEED 1")
    assert capsys.readouterr().err == "", "a dump holds it, but nobody chose it"
    assert opts(f"{key} /disk SEED 1") == opts("SEED 1")
    assert re.fullmatch(rf"note: --opts: {key} .*{REMOVED[key]}\n", capsys.readouterr().err)
    monkeypatch.setenv("RANK", "1")
    from_yaml(tmp_path, "DISTILL: {STAGE_DIR: /disk}")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("5", "expected KEY: value lines, found a int"),
        ("SEED: [", "broken YAML"),
        ("A: [&a [1], *a]", r"\*a stands for another value"),
        ("SEED: 1", r"its configuration is not whole \(KeyError"),
        ("WORLD_SIZE: [1]\nDATA: {BATCH_SIZE: x}\nTRAIN: {GLOBAL_BATCH: 0}", "is not whole"),
        ("x" * 60_000, "more than 50,000 characters"),
    ],
)
def test_a_checkpoint_of_a_damaged_configuration_is_named(before, message):
    with pytest.raises(ConfigError, match=f"last.pth: .*{message}"):
        check_continuation(before, opts("SEED 1"), "last.pth")


def test_timm_models_bring_their_own_input():
    timm_model = "MODEL.TYPE timm MODEL.NAME tf_efficientnet_lite2"
    cfg = opts(timm_model)
    assert (cfg.DATA.MEAN, cfg.DATA.STD, cfg.DATA.IMG_SIZE) == ([0.5] * 3, [0.5] * 3, 260)
    cfg = opts(f"{timm_model} DATA.IMG_SIZE 224 DATA.MEAN_AND_STD_TYPE clip")
    assert (cfg.DATA.MEAN, cfg.DATA.IMG_SIZE) == ([], 224)


def test_learning_rates_scale_with_the_images_per_update_and_given_values_stay():
    cfg = opts("TRAIN.ACCUMULATION_STEPS 2", world_size=8)
    assert learning_rates(cfg) == (5e-4 * 4, 5e-7 * 4, 5e-6 * 4) and cfg.TRAIN.BASE_LR == 5e-4


@pytest.mark.parametrize(
    ("text", "world", "plan"),
    [
        ("TRAIN.GLOBAL_BATCH 1024", 1, (128, 8, 1024)),
        ("TRAIN.GLOBAL_BATCH 1024", 2, (128, 4, 1024)),
        ("TRAIN.GLOBAL_BATCH 1024", 8, (128, 1, 1024)),
        ("TRAIN.GLOBAL_BATCH 1024", 16, (64, 1, 1024)),
        ("TRAIN.GLOBAL_BATCH 12 DATA.BATCH_SIZE 3", 1, (3, 4, 12)),
        ("TRAIN.GLOBAL_BATCH 12 DATA.BATCH_SIZE 3 AUG.MIXUP_MODE pair2", 1, (2, 6, 12)),
        ("TRAIN.GLOBAL_BATCH 12 DATA.BATCH_SIZE 1 AUG.MIXUP_MODE pair2", 2, (2, 3, 12)),
        ("TRAIN.ACCUMULATION_STEPS 2 DATA.BATCH_SIZE 3", 4, (3, 2, 24)),
    ],
)
def test_a_global_batch_splits_over_any_fitting_world_in_whole_pairs(text, world, plan):
    assert batch_plan(opts(text, world)) == plan


def test_replacing_leaves_the_original_alone_and_keeps_types():
    cfg = opts()
    other = cfg.replace({"MODEL.NUM_CLASSES": 10.0, "AUG.SCALE": [0.5, 1], "SEED": 3})
    assert (cfg.MODEL.NUM_CLASSES, cfg.SEED) == (0, 0) and other.is_frozen()
    assert (repr(other.MODEL.NUM_CLASSES), other.AUG.SCALE, other.SEED) == ("10", (0.5, 1), 3)


@pytest.mark.parametrize(
    "policy", "none original v0-mstd0.5 rand rand-m9-n3-mstd0.5-inc1 rand-mstdinf-w0-mmax9".split()
)
def test_policies_that_exist(policy):
    assert opts(f"AUG.AUTO_AUGMENT {policy}").AUG.AUTO_AUGMENT == policy
    assert load_config(["--opts", "AUG.AUTO_AUGMENT", ""]).AUG.AUTO_AUGMENT == ""


def test_names_make_a_folder_inside_the_output():
    assert run_folder(opts("OUTPUT o MODEL.NAME m TAG t")) == Path("o/m/t")
    assert run_folder(opts("OUTPUT o MODEL.NAME group/m.v1 TAG ..t")) == Path("o/group/m.v1/..t")


def test_evaluating_and_saving_do_not_judge_the_schedule():
    odd = "TRAIN.EPOCHS 2 DATA.BATCH_SIZE 3 AUG.MIXUP_MODE batch DISTILL.ENABLED False"
    words = [*odd.split(), "DISTILL.TEACHER_LOGITS_PATH", "s"]
    assert load_config(["--eval", "--opts", *words]).is_paired
    assert opts("DISTILL.SAVE_TEACHER_LOGITS True TRAIN.EPOCHS 2").TRAIN.EPOCHS == 2


def test_every_number_has_a_range():
    ranged = {key for keys in RANGES.values() for key in keys.split()}
    numbers = {key for key, value in flatten(opts()).items() if type(value) in (int, float)}
    assert numbers - ranged == {"WORLD_SIZE", "LOCAL_RANK"}


def test_nothing_but_the_config_itself_defrosts(root):
    files = [*root.glob("*.py")]
    for folder in ("configs", "data", "models", "tools", "benchmarks"):
        files += (root / folder).rglob("*.py")
    users = [path for path in files if ".defrost(" in path.read_text()]
    assert users == [root / "configs/config.py"]


def test_loading_a_config_imports_neither_torch_nor_timm(root):
    code = (
        "import sys, configs as c; c.load_config([]); assert not {'torch', 'timm'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_every_key_is_explained(root):
    lines = (root / "configs/defaults.py").read_text().splitlines()
    declared = re.compile(r"_C\.[A-Z_.0-9]+ = (?!CfgNode)")
    above = [before for before, line in pairwise(lines) if declared.match(line)]
    assert all(line.startswith("# ") for line in above) and len(above) >= len(flatten(opts()))
