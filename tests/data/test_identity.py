"""What makes two stores two: the recipe's keys, and a version of what the draws mean."""

import pytest

from configs import load_config
from data.augment import AugmentDecoder
from data.augment.plan import RECIPE_VERSION
from data.identity import RECIPE_KEYS, IdentityError, adopted_values, identity_of


def identity(*opts) -> dict:
    cfg = load_config(["--opts", "AUG.MIXUP_MODE", "pair2", "DATA.IMG_SIZE", "48", *opts])
    return identity_of(cfg, 10, "digest")


def test_the_recipe_is_keys_and_a_version_and_no_class_of_ours():
    assert identity()["recipe"].keys() == {"version", *RECIPE_KEYS}
    assert identity()["recipe"]["version"] == RECIPE_VERSION
    assert "RandAugment(" not in str(identity())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.IMG_SIZE", "49"),
        ("DATA.INTERPOLATION", "bilinear"),
        ("AUG.SCALE", "(0.09, 1.0)"),
        ("AUG.RATIO", "(0.7, 1.4)"),
        ("AUG.HFLIP", "0.4"),
        ("AUG.VFLIP", "0.9"),
        ("AUG.AUTO_AUGMENT", "rand-m9-mstd0.9-inc1"),
        ("AUG.FILL", "[1, 2, 3]"),
        ("AUG.REPROB", "0.9"),
        ("AUG.REMODE", "rand"),
        ("AUG.RECOUNT", "2"),
        ("AUG.MIXUP", "0.7"),
        ("AUG.CUTMIX", "0.9"),
        ("AUG.CUTMIX_MINMAX", "[0.2, 0.4]"),
        ("AUG.MIXUP_PROB", "0.9"),
        ("AUG.MIXUP_SWITCH_PROB", "0.1"),
    ],
)
def test_whatever_changes_bits_makes_another_store(key, value):
    assert identity(key, value) != identity()
    cfgs = [["DATA.IMG_SIZE", "48"], ["DATA.IMG_SIZE", "48", key, value]]
    ours, theirs = (
        AugmentDecoder.from_config(load_config(["--opts", "AUG.MIXUP_MODE", "pair2", *opts]))
        for opts in cfgs
    )
    assert ours != theirs


def test_a_store_older_than_a_key_serves_runs_that_leave_it_alone():
    manifest = identity()
    del manifest["recipe"]["AUG.RECOUNT"]
    plain = ["AUG.MIXUP_MODE", "pair2", "DATA.IMG_SIZE", "48"]
    values = adopted_values(load_config(["--opts", *plain]), manifest, "logits")
    assert "AUG.RECOUNT" not in values
    assert values["AUG.REPROB"] == manifest["recipe"]["AUG.REPROB"]
    with pytest.raises(IdentityError, match=r"AUG\.RECOUNT = 2, .* logits was written before"):
        adopted_values(load_config(["--opts", *plain, "AUG.RECOUNT", "2"]), manifest, "logits")


@pytest.mark.parametrize(
    ("key", "value"),
    [("DATA.MEAN_AND_STD_TYPE", "half"), ("MODEL.LABEL_SMOOTHING", "0.0"), ("SEED", "3")],
)
def test_what_is_each_models_own_does_not(key, value):
    assert identity("AUG.FILL", "[1, 2, 3]", key, value) == identity("AUG.FILL", "[1, 2, 3]")
