"""Configuration: defaults, recipes, merging, and every error a user can provoke."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

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
from configs.defaults import get_defaults

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))


def opts(*words: str, world_size: int = 1):
    return load_config(["--opts", *words], world_size)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_survives_a_dump(recipe, tmp_path):
    cfg = load_config(["--cfg", str(recipe)], world_size=8)
    assert cfg.is_frozen()
    (tmp_path / "dump.yaml").write_text(dump(cfg))
    assert load_config(["--cfg", str(tmp_path / "dump.yaml")], world_size=8) == cfg


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_its_own_command(recipe, root):
    command = recipe.read_text().splitlines()[0].removeprefix("# ").split()
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    assert command[at + 2] == str(recipe.relative_to(root)).replace(os.sep, "/")
    load_config(command[at + 1 :], world_size=8)


def values(name: str) -> tuple:
    cfg = load_config(["--cfg", next(str(path) for path in RECIPES if path.stem == name)])
    train, aug, model = cfg.TRAIN, cfg.AUG, cfg.MODEL
    return (
        train.EPOCHS,
        train.WARMUP_EPOCHS,
        train.BASE_LR,
        train.MIN_LR,
        train.WEIGHT_DECAY,
        train.LAYER_LR_DECAY,
        train.EVAL_BN_WHEN_TRAINING,
        aug.MIXUP,
        aug.CUTMIX,
        cfg.is_paired,
        model.DROP_PATH_RATE,
        model.TINY_VIT.EMBED_DIMS[0],
        cfg.DATA.DATASET,
        cfg.DATA.IMG_SIZE,
        cfg.TEST.CROP,
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "tiny_vit_5m",
            (
                300,
                20,
                5e-4,
                5e-6,
                0.05,
                1.0,
                False,
                0.8,
                1.0,
                False,
                0.0,
                64,
                "imagenet",
                224,
                True,
            ),
        ),
        (
            "tiny_vit_11m",
            (
                300,
                20,
                5e-4,
                5e-6,
                0.05,
                1.0,
                False,
                0.8,
                1.0,
                False,
                0.1,
                64,
                "imagenet",
                224,
                True,
            ),
        ),
        (
            "tiny_vit_21m",
            (
                300,
                20,
                5e-4,
                5e-6,
                0.05,
                1.0,
                False,
                0.8,
                1.0,
                False,
                0.2,
                96,
                "imagenet",
                224,
                True,
            ),
        ),
        (
            "tiny_vit_21m_1k_distill",
            (300, 20, 5e-4, 5e-6, 0.05, 1.0, False, 0.8, 1.0, True, 0.1, 96, "imagenet", 224, True),
        ),
        (
            "tiny_vit_11m_22k_distill",
            (
                90,
                5,
                2.5e-4,
                5e-6,
                0.01,
                1.0,
                False,
                0.0,
                0.0,
                False,
                0.0,
                64,
                "imagenet22k",
                224,
                True,
            ),
        ),
        (
            "tiny_vit_21m_22kto1k",
            (30, 5, 2.5e-4, 1e-5, 1e-8, 0.8, True, 0.0, 0.0, False, 0.1, 96, "imagenet", 224, True),
        ),
        (
            "tiny_vit_21m_224to384",
            (30, 5, 2e-5, 2e-7, 1e-8, 1.0, True, 0.0, 0.0, False, 0.1, 96, "imagenet", 384, False),
        ),
        (
            "tiny_vit_21m_384to512",
            (30, 5, 2e-5, 2e-7, 1e-8, 1.0, True, 0.0, 0.0, False, 0.1, 96, "imagenet", 512, False),
        ),
        (
            "clip_vit_large_patch14_22k",
            (
                90,
                20,
                5e-4,
                5e-6,
                0.05,
                1.0,
                False,
                0.0,
                0.0,
                False,
                0.1,
                96,
                "imagenet22k",
                224,
                True,
            ),
        ),
    ],
)
def test_recipe_values(name, expected):
    assert values(name) == expected


def test_opts_win_over_files_and_flags_over_opts(tmp_path):
    (tmp_path / "a.yaml").write_text("TAG: from-a\nSEED: 1\nTRAIN: {EPOCHS: 40, BASE_LR: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("BASE: [a.yaml]\nSEED: 2\n")
    cfg = load_config(
        [
            "--cfg",
            str(tmp_path / "b.yaml"),
            "--opts",
            "TRAIN.EPOCHS",
            "50",
            "TAG",
            "from-opts",
            "--tag",
            "from-flag",
        ]
    )
    assert (cfg.SEED, cfg.TRAIN.EPOCHS, cfg.TRAIN.BASE_LR, cfg.TAG) == (2, 50, 1e-3, "from-flag")
    assert cfg.EXPLICIT == ["SEED", "TAG", "TRAIN.BASE_LR", "TRAIN.EPOCHS"]


def test_a_dump_remembers_what_was_explicit(tmp_path):
    cfg = opts("AUG.REPROB", "0.5", "TAG", "12")
    (tmp_path / "dump.yaml").write_text(dump(cfg))
    again = load_config(["--cfg", str(tmp_path / "dump.yaml")])
    assert again == cfg and again.EXPLICIT == ["AUG.REPROB", "TAG"] and again.TAG == "12"


def test_original_flags_reach_their_keys():
    flags = (
        "--batch-size 6 --data-path d --pretrained p --resume r --accumulation-steps 2"
        " --use-checkpoint --disable_amp --output o --tag t --eval --throughput --use-wandb"
        " --local_rank 3"
    )
    cfg = load_config(flags.split())
    assert (cfg.DATA.BATCH_SIZE, cfg.DATA.DATA_PATH, cfg.MODEL.PRETRAINED, cfg.MODEL.RESUME) == (
        6,
        "d",
        "p",
        "r",
    )
    assert (
        cfg.TRAIN.ACCUMULATION_STEPS,
        cfg.TRAIN.USE_CHECKPOINT,
        cfg.AMP_ENABLE,
        cfg.OUTPUT,
        cfg.TAG,
    ) == (2, True, False, "o", "t")
    assert (cfg.EVAL_MODE, cfg.THROUGHPUT_MODE, cfg.USE_WANDB) == (True, True, True)
    assert load_config(["--only-cpu", "--local-rank", "0"]).DEVICE == "cpu"
    assert load_config(["--use-sync-bn"]).TRAIN.SYNC_BN


def test_help_explains_every_flag():
    parser = argument_parser("x")
    assert all(action.help for action in parser._actions)


def test_a_store_or_an_online_teacher_turns_distillation_and_pairs_on():
    assert not opts().is_paired
    for cfg in (
        opts("DISTILL.TEACHER_LOGITS_PATH", "store"),
        opts("DISTILL.ONLINE", "True", "DISTILL.TEACHER_CFG", "t.yaml"),
    ):
        assert cfg.DISTILL.ENABLED and cfg.is_paired
    assert not opts(
        "DISTILL.TEACHER_LOGITS_PATH", "store", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"
    ).is_paired


def test_timm_models_bring_their_own_input():
    timm_model = ("MODEL.TYPE", "timm", "MODEL.NAME", "tf_efficientnet_lite2")
    cfg = opts(*timm_model)
    assert (cfg.DATA.MEAN, cfg.DATA.STD, cfg.DATA.IMG_SIZE) == ([0.5] * 3, [0.5] * 3, 260)
    cfg = opts(*timm_model, "DATA.IMG_SIZE", "224", "DATA.MEAN_AND_STD_TYPE", "clip")
    assert (cfg.DATA.MEAN, cfg.DATA.IMG_SIZE) == ([], 224)


def test_learning_rates_scale_with_the_images_per_update():
    rates = learning_rates(opts("TRAIN.ACCUMULATION_STEPS", "2", world_size=8))
    assert rates == (5e-4 * 4, 5e-7 * 4, 5e-6 * 4)
    cfg = opts(world_size=8)
    assert cfg.TRAIN.BASE_LR == 5e-4, "given values stay as given"


@pytest.mark.parametrize(
    ("world", "plan"),
    [(1, (128, 8, 1024)), (2, (128, 4, 1024)), (8, (128, 1, 1024)), (16, (64, 1, 1024))],
)
def test_global_batch_splits_over_any_fitting_world(world, plan):
    assert batch_plan(opts("TRAIN.GLOBAL_BATCH", "1024", world_size=world)) == plan


def test_global_batch_keeps_pairs_whole():
    assert (
        batch_plan(
            opts("TRAIN.GLOBAL_BATCH", "12", "DATA.BATCH_SIZE", "3", "AUG.MIXUP_MODE", "pair2")
        ).per_process
        == 2
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"12 cannot be split over 4 processes in whole pairs: use one of 1, 2, 3, 6 processes"
        ),
    ):
        opts("TRAIN.GLOBAL_BATCH", "12", "AUG.MIXUP_MODE", "pair2", world_size=4)


def test_replace_leaves_the_original_alone():
    cfg = opts()
    other = cfg.replace({"MODEL.NUM_CLASSES": 10})
    assert (cfg.MODEL.NUM_CLASSES, other.MODEL.NUM_CLASSES) == (0, 10) and other.is_frozen()


@pytest.mark.parametrize(
    "policy",
    [
        "none",
        "",
        "original",
        "v0-mstd0.5",
        "rand",
        "rand-m9-n3-mstd0.5-inc1",
        "rand-mstdinf-w0-mmax9",
    ],
)
def test_policies_that_exist(policy):
    assert opts("AUG.AUTO_AUGMENT", policy).AUG.AUTO_AUGMENT == policy


def test_run_folder_is_a_pure_function():
    assert run_folder(opts("OUTPUT", "o", "MODEL.NAME", "m", "TAG", "t")) == Path("o/m/t")


ERRORS = [
    (["TRAIN.EPOCS", "3"], "TRAIN.EPOCS = '3': unknown key; did you mean TRAIN.EPOCHS?"),
    (["EPOCHS", "3"], "did you mean TRAIN.EPOCHS?"),
    (["AUG.MIXUP.PROB", "3"], "AUG.MIXUP.PROB = '3': unknown key; did you mean AUG.MIXUP_PROB?"),
    (["TRAIN", "3"], "TRAIN = 3: is a group of keys"),
    (["WORLD_SIZE", "3"], "WORLD_SIZE = 3: is set by the program"),
    (["TRAIN.EPOCHS", "many"], "TRAIN.EPOCHS = 'many': expected a whole number, got str"),
    (["TRAIN.EPOCHS", "1.5"], "TRAIN.EPOCHS = 1.5: expected a whole number, got float"),
    (["TRAIN.AUTO_RESUME", "1"], "expected True or False, got int"),
    (["AUG.SCALE", "0.5"], "expected a list of numbers, got float"),
    (["DISTILL.LOGITS_TOPK", "0"], "DISTILL.LOGITS_TOPK = 0: must be at least 1"),
    (["DISTILL.LOGITS_TOPK", "-1"], "DISTILL.LOGITS_TOPK = -1: must be at least 0"),
    (
        ["DATA.BATCH_SIZE", "7", "AUG.MIXUP_MODE", "pair2"],
        "= 7: images are mixed in pairs, the batch must be even (e.g. 8)",
    ),
    (
        ["MODEL.TINY_VIT.NUM_HEADS", "[3,5,12,18]"],
        "stage 1 has 5 heads, which do not divide its 192 channels",
    ),
    (["MODEL.TINY_VIT.DEPTHS", "[2,2]"], "MODEL.TINY_VIT.DEPTHS = [2, 2]: expected 4 numbers"),
    (["MODEL.TINY_VIT.DEPTHS", "[2,0,2,2]"], "four whole numbers from 1 up"),
    (["MODEL.TINY_VIT.LOCAL_CONV_SIZE", "2"], "an odd number from 1 up"),
    (
        ["TRAIN.LR_SCHEDULER.NAME", "cosin"],
        "TRAIN.LR_SCHEDULER.NAME = 'cosin': did you mean cosine?",
    ),
    (["TRAIN.OPTIMIZER.NAME", "adam"], "TRAIN.OPTIMIZER.NAME = 'adam': did you mean adamw?"),
    (["TRAIN.OPTIMIZER.BETAS", "(0.9, 1.0)"], "TRAIN.OPTIMIZER.BETAS = [0.9, 1.0]: both in [0, 1)"),
    (["AUG.REMODE", "noise"], "AUG.REMODE = 'noise': (one of const, rand, pixel)"),
    (["DATA.INTERPOLATION", "bicubik"], "did you mean bicubic?"),
    (["AUG.AUTO_AUGMENT", "augmix-m3"], "AUG.AUTO_AUGMENT = 'augmix-m3': (one of rand-m9"),
    (["AUG.AUTO_AUGMENT", "rand-m9-q5"], "option 'q5' is not one of"),
    (["AUG.AUTO_AUGMENT", "rand-m9.5"], "option 'm9.5' is not one of"),
    (["AUG.AUTO_AUGMENT", "v0-m9"], "option 'm9' is not one of mstd0.5"),
    (["AUG.SCALE", "(0.5, 0.1)"], "AUG.SCALE = [0.5, 0.1]: needs 0 < smallest <= largest <= 1"),
    (["AUG.CUTMIX_MINMAX", "[0.5, 0.5]"], "AUG.CUTMIX_MINMAX = [0.5, 0.5]: needs"),
    (["AUG.FILL", "[1, 2, 300]"], "AUG.FILL = [1, 2, 300]: three whole numbers from 0 to 255"),
    (["DATA.STD", "[1, 1, 0]"], "DATA.STD = [1, 1, 0]: must be above 0"),
    (["DATA.MEAN", "[1, 'x', 0]"], "'x' is not a number"),
    (["TRAIN.EPOCHS", "-3"], "TRAIN.EPOCHS = -3: must be at least 1"),
    (["TRAIN.EPOCHS", "0"], "TRAIN.EPOCHS = 0: must be at least 1"),
    (["TRAIN.EPOCHS", "10"], "warm-up is longer than training (TRAIN.EPOCHS = 10)"),
    (["TRAIN.START_EPOCH", "300"], "no epoch left before TRAIN.EPOCHS = 300"),
    (["AUG.MIXUP_PROB", "1.5"], "AUG.MIXUP_PROB = 1.5: must be between 0 and 1"),
    (["AUG.MIXUP_PROB", "nan"], "AUG.MIXUP_PROB"),
    (["DATA.IMG_SIZE", "31"], "DATA.IMG_SIZE = 31: must be at least 32"),
    (["DATA.SUBSET", "0"], "DATA.SUBSET = 0.0: a fraction above 0 and at most 1"),
    (["MODEL.TYPE", "swin"], "MODEL.TYPE = 'swin': (one of tiny_vit,"),
    (["MODEL.TYPE", "timm", "MODEL.NAME", "resnet50x"], "did you mean resnet50"),
    (["DATA.DATASET", "imagenett"], "DATA.DATASET = 'imagenett': did you mean imagenet?"),
    (["DISTILL.ONLINE", "True"], "name the teacher's recipe in DISTILL.TEACHER_CFG"),
    (
        ["DISTILL.ONLINE", "True", "DISTILL.TEACHER_LOGITS_PATH", "s"],
        "the run already reads the store s",
    ),
    (["DISTILL.TEMPERATURE", "0"], "DISTILL.TEMPERATURE = 0.0: must be above 0"),
    (["TRAIN.SYNC_BN", "True", "DEVICE", "cpu"], "leave --use-sync-bn out on the CPU"),
    (["TAG", "a/b"], "TAG = 'a/b': a folder name, without slashes"),
    (["OUTPUT", ""], "OUTPUT = '': name a folder"),
    (["OUTPUT", __file__], "is a file, choose another folder"),
    (["TRAIN.EPOCHS"], "--opts: expected KEY VALUE pairs, got 1 words: TRAIN.EPOCHS"),
    (["TRAIN.EPOCHS=3"], "got 1 words: TRAIN.EPOCHS=3; write KEY VALUE, without ="),
]


@pytest.mark.parametrize(
    ("words", "message"),
    ERRORS,
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_faults_on_the_command_line(words, message):
    with pytest.raises(ConfigError) as caught:
        opts(*words)
    text = str(caught.value)
    assert (
        message in text
        and text.startswith(("--opts: ", "TRAIN.WARMUP_EPOCHS"))
        and "\n" not in text
    )


FILES = [
    ("TRAIN: {EPOCS: 3}", "TRAIN.EPOCS = 3: unknown key; did you mean TRAIN.EPOCHS?"),
    ("TRAIN: 3", "TRAIN = 3: is a group of keys, not a value"),
    ("TRAIN: {EPOCHS: 3.5}", "TRAIN.EPOCHS = 3.5: expected a whole number, got float"),
    ("TAG: 12", "TAG = 12: expected text (quote it), got int"),
    ("AUG: {MIXUP_PROB: 2}", "AUG.MIXUP_PROB = 2.0: must be between 0 and 1"),
    ("TRAIN: [", "broken YAML"),
    ("TAG: !!python/object/apply:os.system ['true']", "line 1: YAML tags are not allowed"),
    ("SEED: 1\nSEED: 2", "line 1: key SEED stands there twice"),
    ("- 1", "expected KEY: value lines, found a list"),
    ("BASE: [absent.yaml]", "absent.yaml: no such file (BASE of"),
    ("BASE: 5", "BASE = 5: expected a list of YAML files"),
    ("BASE: [bad.yaml]", "BASE goes round in a circle: bad.yaml -> bad.yaml"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[text for text, _ in FILES])
def test_faults_in_files(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--cfg", str(tmp_path / "bad.yaml")])
    assert (
        message in str(caught.value)
        and str(tmp_path) in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        load_config(["--cfg", "nowhere.yaml"])


def test_longer_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("BASE: [b.yaml]")
    (tmp_path / "b.yaml").write_text("BASE: [a.yaml]")
    with pytest.raises(ConfigError, match=r"a.yaml -> b.yaml -> a.yaml"):
        load_config(["--cfg", str(tmp_path / "a.yaml")])


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere"
)
def test_output_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="no permission to write"):
        opts("OUTPUT", str(tmp_path / "o"))


def test_eval_and_saving_do_not_judge_the_schedule():
    assert load_config(
        ["--eval", "--opts", "TRAIN.EPOCHS", "2", "DATA.BATCH_SIZE", "3", "AUG.MIXUP_MODE", "pair2"]
    ).EVAL_MODE
    assert opts("DISTILL.SAVE_TEACHER_LOGITS", "True", "TRAIN.EPOCHS", "2").TRAIN.EPOCHS == 2


def test_only_loading_and_resolving_defrost(root):
    users = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if ".venv" not in path.parts
        and "tests" not in path.parts
        and re.search(r"\.defrost\(", path.read_text())
    ]
    assert sorted(users) == [Path("configs/config.py")]


def test_loading_a_config_imports_neither_torch_nor_timm(root):
    code = (
        "import sys, configs; configs.load_config([]); sys.exit(any(name in sys.modules for name in"
        " ('torch', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_every_key_is_explained(root):
    lines = (root / "configs/defaults.py").read_text().splitlines()
    declared = re.compile(r"_C\.[A-Z_.]+ = (?!CfgNode)")
    keys = [above + line for above, line in pairwise(lines) if declared.match(line)]
    plain = (
        "DROP_RATE",
        "DROP_PATH_RATE",
        "TINY_VIT.",
        "EPOCHS",
        "WEIGHT_DECAY",
        "START_EPOCH",
        "_LR",
        "EPS",
        "BETAS",
        "MIXUP_PROB",
        "FLIP",
        "TAG",
        "VAL_IMAGES",
        "WANDB_PROJECT",
    )
    unexplained = [
        line for line in keys if "# " not in line and not any(name in line for name in plain)
    ]
    assert unexplained == [] and len(keys) > 100
    assert get_defaults() == get_defaults()


def test_what_differs_from_the_defaults_fits_on_a_line():
    cfg = load_config(
        [
            "--batch-size",
            "64",
            "--opts",
            "TRAIN.EPOCHS",
            "30",
            "DISTILL.ONLINE",
            "True",
            "DISTILL.TEACHER_CFG",
            "t.yaml",
        ]
    )
    said = choices_in_words(cfg)
    assert (
        said == "DATA.BATCH_SIZE 64, DISTILL.ENABLED True, DISTILL.ONLINE True, DISTILL.TEACHER_CFG"
        " t.yaml, TRAIN.EPOCHS 30, AUG.MIXUP_MODE pair2"
    )
    assert choices_in_words(load_config([])) == "the defaults"
