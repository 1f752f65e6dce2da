"""The recipes under configs/: each loads, says how it is run, and has the original's values."""

from pathlib import Path

import pytest

from configs import dump, load_config

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))
KEYS = """
    TRAIN.EPOCHS TRAIN.WARMUP_EPOCHS TRAIN.BASE_LR TRAIN.MIN_LR TRAIN.WEIGHT_DECAY
    TRAIN.LAYER_LR_DECAY TRAIN.EVAL_BN_WHEN_TRAINING AUG.MIXUP AUG.CUTMIX AUG.MIXUP_MODE
    MODEL.DROP_PATH_RATE MODEL.TINY_VIT.EMBED_DIMS DATA.DATASET DATA.IMG_SIZE TEST.CROP
""".split()
VALUES = """\
tiny_vit_5m
300 20 0.0005 5e-06 0.05 1.0 False 0.8 1.0 batch 0.0 [64,128,160,320] imagenet 224 True
tiny_vit_11m
300 20 0.0005 5e-06 0.05 1.0 False 0.8 1.0 batch 0.1 [64,128,256,448] imagenet 224 True
tiny_vit_21m
300 20 0.0005 5e-06 0.05 1.0 False 0.8 1.0 batch 0.2 [96,192,384,576] imagenet 224 True
tiny_vit_21m_1k_distill
300 20 0.0005 5e-06 0.05 1.0 False 0.8 1.0 pair2 0.1 [96,192,384,576] imagenet 224 True
tiny_vit_11m_22k_distill
90 5 0.00025 5e-06 0.01 1.0 False 0.0 0.0 pair2 0.0 [64,128,256,448] imagenet22k 224 True
tiny_vit_21m_22kto1k
30 5 0.00025 1e-05 1e-08 0.8 True 0.0 0.0 batch 0.1 [96,192,384,576] imagenet 224 True
tiny_vit_21m_224to384
30 5 2e-05 2e-07 1e-08 1.0 True 0.0 0.0 batch 0.1 [96,192,384,576] imagenet 384 False
tiny_vit_21m_384to512
30 5 2e-05 2e-07 1e-08 1.0 True 0.0 0.0 batch 0.1 [96,192,384,576] imagenet 512 False
clip_vit_large_patch14_22k
90 20 0.0005 5e-06 0.05 1.0 False 0.0 0.0 batch 0.1 [96,192,384,576] imagenet22k 224 True
""".splitlines()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_survives_a_dump_and_begins_with_its_command(recipe, root, tmp_path):
    cfg = load_config(["--cfg", str(recipe)], world_size=8)
    assert cfg.is_frozen()
    (tmp_path / "dump.yaml").write_text(dump(cfg))
    assert load_config(["--cfg", str(tmp_path / "dump.yaml")], world_size=8) == cfg
    command = recipe.read_text().splitlines()[0].partition(".py ")[2].split()
    assert command[:2] == ["--cfg", recipe.relative_to(root).as_posix()]
    load_config(command, world_size=8)


def test_students_read_all_that_a_store_keeps():
    recipes = [
        load_config(["--cfg", str(path)]) for path in RECIPES if path.parent.stem != "teacher"
    ]
    assert not any(cfg.DISTILL.LOGITS_TOPK for cfg in recipes)


@pytest.mark.parametrize(("name", "expected"), list(zip(VALUES[::2], VALUES[1::2])))
def test_a_recipe_has_the_originals_values(name, expected):
    cfg = load_config(["--cfg", next(str(path) for path in RECIPES if path.stem == name)])
    assert [str(cfg.value(key)).replace(" ", "") for key in KEYS] == expected.split()
