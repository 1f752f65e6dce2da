"""Learning rates against tables of the original, and at the edges."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs import load_config
from lr_scheduler import Schedule, build_scheduler, lr_at

SHORT = Schedule("cosine", 1.0, 0.1, 0.01, 100, 10, decay_updates=30, decay_rate=0.5)


def optimizer_of(*scales):
    groups = [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in scales]
    return torch.optim.SGD(groups, lr=123.0)


def rates(optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def scheduler_of(optimizer, steps_per_epoch, opts="", world_size=1):
    cfg = load_config(["--opts", *opts.split()], world_size)
    return build_scheduler(cfg, optimizer, steps_per_epoch)


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_rates_equal_the_originals(goldens, name):
    table = np.load(goldens / "lr.npz")[name]
    before = json.loads((goldens / "lr_groups.json").read_text())["scal"][name]["before"]
    optimizer = optimizer_of(1.0)
    scheduler = scheduler_of(optimizer, 13, f"TRAIN.LR_SCHEDULER.NAME {name}", world_size=8)
    assert rates(optimizer) == [pytest.approx(before, rel=1e-14)]
    found = []
    for update in range(len(table)):
        scheduler.step_update(update)
        found += rates(optimizer)
    np.testing.assert_allclose(found, table, rtol=1e-13, atol=0)


def test_scaled_groups_equal_the_originals_whatever_ran_before(goldens):
    case = json.loads((goldens / "lr_groups.json").read_text())
    base, tables = case["base"], case["lrs"]
    optimizer = optimizer_of(*(group["lr_scale"] for group in case["groups"]))
    # 8 processes x 128 images: twice the rates
    lr, warm, minimum = (base[key] / 2 for key in ("lr", "warm", "min"))
    opts = (
        f"TRAIN.EPOCHS {base['epochs']} TRAIN.WARMUP_EPOCHS {base['warmup_epochs']}"
        f" TRAIN.BASE_LR {lr} TRAIN.WARMUP_LR {warm} TRAIN.MIN_LR {minimum}"
    )
    scheduler = scheduler_of(optimizer, 13, opts, world_size=8)
    np.testing.assert_allclose(rates(optimizer), tables.pop("init"), rtol=1e-13)
    assert len(tables) > 4
    for key, expected in tables.items():
        update = int(key.removeprefix("after_update_"))
        scheduler.step_update(update)
        np.testing.assert_allclose(rates(optimizer), expected, rtol=1e-13)
        after = rates(optimizer)
        scheduler.step_update(0)
        scheduler.prepare(update + 1)
        assert rates(optimizer) == after


def test_warm_up_is_linear_and_then_joins_the_cosine_under_way():
    found = [lr_at(step, SHORT) for step in range(11)]
    np.testing.assert_allclose(found[:10], np.linspace(0.1, 1.0, 11)[:10], rtol=1e-14)
    assert found[10] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * 0.1)), rel=1e-14)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("cosine", {100: 0.01, 250: 0.01}),
        ("linear", {10: 1.0, 55: 0.505, 100: 0.01, 500: 0.01}),
        ("step", {10: 1, 29: 1, 30: 0.5, 59: 0.5, 60: 0.25, 90: 0.125}),
    ],
)
def test_decay_with_warm_up_without_and_alone(name, table):
    schedule = replace(SHORT, name=name)
    assert {step: lr_at(step, schedule) for step in table} == pytest.approx(table, rel=1e-12)
    assert lr_at(0, replace(schedule, warmup_updates=0)) == 1.0
    whole = replace(schedule, warmup_updates=100)
    assert lr_at(99, whole) == pytest.approx(0.991)
    assert np.isfinite(lr_at(100, whole))


@pytest.mark.parametrize(
    ("opts", "world_size", "factor"),
    [("", 8, 8), ("TRAIN.ACCUMULATION_STEPS 8", 1, 8), ("DATA.BATCH_SIZE 64", 2, 1)],
)
def test_rates_scale_with_the_images_per_update_and_by_group(opts, world_size, factor):
    one, other = optimizer_of(1.0), optimizer_of(1.0, 0.5)
    scheduler_of(one, 10).step_update(200)  # the end of 20 epochs of warm-up
    scheduler_of(other, 10, opts, world_size).step_update(200)
    high, low = rates(other)
    assert [high] == pytest.approx([factor * rate for rate in rates(one)]) and low == high / 2


def test_the_first_update_is_not_scaled_by_layer():
    optimizer = optimizer_of(0.25)
    scheduler = scheduler_of(optimizer, 10)
    scheduler.step_update(1234)
    scheduler.prepare(0)
    assert rates(optimizer) == [lr_at(0, scheduler.schedule)]


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
@pytest.mark.parametrize("epochs", [1, 300])
def test_the_highest_rate_and_the_sum_of_all(name, epochs):
    updates = 17 * epochs
    schedule = replace(SHORT, name=name, updates=updates, warmup_updates=17, decay_updates=80)
    rates = [lr_at(update, schedule) for update in range(updates)]
    peak, total = schedule.peak_and_sum()
    assert peak == pytest.approx(max(rates), rel=0.01)
    assert total == pytest.approx(sum(rates), rel=0.02)
