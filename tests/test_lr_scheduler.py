"""Learning rates against tables of the original, and at the edges."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from configs import load_config
from lr_scheduler import Schedule, build_scheduler, lr_at

SHORT = Schedule(
    "cosine",
    base=1.0,
    warmup=0.1,
    minimum=0.01,
    updates=100,
    warmup_updates=10,
    decay_updates=30,
    decay_rate=0.5,
)


def optimizer_of(*scales):
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in scales
    ]
    return torch.optim.SGD(groups, lr=123.0)


def config(*opts, world_size=1):
    return load_config(["--opts", *opts], world_size=world_size)


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_rates_equal_the_originals(goldens, name):
    table = np.load(goldens / "lr.npz")[name]
    before = json.loads((goldens / "lr_groups.json").read_text())["scal"][name]["before"]
    optimizer = optimizer_of(1.0)
    scheduler = build_scheduler(
        config("TRAIN.LR_SCHEDULER.NAME", name, world_size=8), optimizer, steps_per_epoch=13
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before, rel=1e-14)
    rates = []
    for update in range(len(table)):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, table, rtol=1e-13, atol=0)


def test_scaled_groups_equal_the_originals(goldens):
    case = json.loads((goldens / "lr_groups.json").read_text())
    base, tables = case["base"], case["lrs"]
    optimizer = optimizer_of(*(group["lr_scale"] for group in case["groups"]))
    cfg = config(
        "TRAIN.EPOCHS",
        base["epochs"],
        "TRAIN.WARMUP_EPOCHS",
        base["warmup_epochs"],
        "TRAIN.BASE_LR",
        base["lr"] / 2,
        # 8 x 128 images: twice the rates
        "TRAIN.WARMUP_LR",
        base["warm"] / 2,
        "TRAIN.MIN_LR",
        base["min"] / 2,
        world_size=8,
    )
    scheduler = build_scheduler(cfg, optimizer, steps_per_epoch=13)

    def check(expected):
        np.testing.assert_allclose(
            [group["lr"] for group in optimizer.param_groups], expected, rtol=1e-13
        )

    check(tables.pop("init"))
    updates = {int(key.removeprefix("after_update_")): expected for key, expected in tables.items()}
    assert len(updates) > 4
    for update, expected in updates.items():
        scheduler.step_update(update)
        check(expected)
        scheduler.step_update(0)
        scheduler.prepare(update + 1)
        check(expected)


def test_warm_up_is_linear_and_then_joins_the_cosine_under_way():
    rates = [lr_at(step, SHORT) for step in range(12)]
    np.testing.assert_allclose(rates[:10], np.linspace(0.1, 1.0, 11)[:10], rtol=1e-14)
    assert rates[10] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * 0.1)), rel=1e-14)


def test_linear_ends_at_one_percent_and_step_halves():
    linear = dataclasses.replace(SHORT, name="linear")
    assert [lr_at(step, linear) for step in (10, 55, 100, 500)] == pytest.approx(
        [1.0, 0.505, 0.01, 0.01], rel=1e-12
    )
    step = dataclasses.replace(SHORT, name="step")
    assert [lr_at(at, step) for at in (10, 29, 30, 59, 60, 90)] == [1, 1, 0.5, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_no_warm_up_and_nothing_but_warm_up(name):
    assert lr_at(0, dataclasses.replace(SHORT, name=name, warmup_updates=0)) == 1.0
    whole = dataclasses.replace(SHORT, name=name, warmup_updates=100)
    assert lr_at(99, whole) == pytest.approx(0.991)
    assert np.isfinite(lr_at(100, whole))


def test_the_cosine_stays_at_its_minimum_after_the_end():
    assert lr_at(100, SHORT) == lr_at(250, SHORT) == pytest.approx(0.01)


def test_rates_scale_with_the_images_per_update():
    def rate(*opts, world_size=1):
        optimizer = optimizer_of(1.0, 0.5)
        scheduler = build_scheduler(config(*opts, world_size=world_size), optimizer, 10)
        scheduler.step_update(200)  # the end of 20 epochs of warm-up
        assert optimizer.param_groups[1]["lr"] == 0.5 * optimizer.param_groups[0]["lr"]
        return optimizer.param_groups[0]["lr"]

    one = rate()
    assert rate(world_size=8) == pytest.approx(8 * one)
    assert rate("TRAIN.ACCUMULATION_STEPS", 8) == pytest.approx(8 * one)
    assert rate("DATA.BATCH_SIZE", 64, world_size=2) == pytest.approx(one)


def test_a_step_is_a_pure_function_of_its_number():
    optimizer = optimizer_of(0.25)
    scheduler = build_scheduler(config(), optimizer, 10)
    scheduler.step_update(1234)
    rate = optimizer.param_groups[0]["lr"]
    for step in (0, 3000, 7, 1234, 1234):
        scheduler.step_update(step)
    assert optimizer.param_groups[0]["lr"] == rate
    scheduler.prepare(0)
    assert optimizer.param_groups[0]["lr"] == lr_at(0, scheduler.schedule)


def test_unknown_schedule():
    with pytest.raises(
        ValueError, match=r"TRAIN.LR_SCHEDULER.NAME = 'poly': expected cosine, linear or step"
    ):
        lr_at(50, dataclasses.replace(SHORT, name="poly"))
