"""Updates that happen wholly or not at all: optimizer, running statistics, moving average."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from models.update import (
    EMA,
    guarded_step,
    in_one,
    restore_unless,
    running_statistics,
    set_training_mode,
)

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 5)
    )


def optimizer_of(name: str, model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1, fused=fused)
    momentum = float(name.removeprefix("sgd"))
    return torch.optim.SGD(
        model.parameters(), 0.1, momentum, nesterov=momentum > 0, weight_decay=0.1, fused=fused
    )


def run(
    name: str, flags: list[bool], wait: bool, fused: bool, skip_bad: bool
) -> tuple[list[torch.Tensor], dict]:
    """Parameters and optimizer state after steps with gradients that are not finite where the flag
    is down.
    """
    model = small_model()
    optimizer = optimizer_of(name, model, fused)
    generator = torch.Generator().manual_seed(1)
    for flag in flags:
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if not flag:
                parameter.grad.fill_(torch.nan)
        if skip_bad:
            if flag:
                optimizer.step()
        else:
            guarded_step(optimizer, torch.tensor(flag), wait=wait)
    return [parameter.detach() for parameter in model.parameters()], optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    "flags", [[False, False, True, True], [True, False, True, False, False, True], [False]]
)
@pytest.mark.parametrize(
    ("wait", "fused"), [(False, True), (True, True), (True, False), (False, False), (None, True)]
)
@pytest.mark.parametrize("name", ["adamw", "sgd0.9", "sgd0.0"])
def test_a_step_without_effect_moves_neither_weights_nor_the_optimizers_state(
    name, wait, fused, flags
):
    weights, state = run(name, flags, wait, fused, skip_bad=False)
    expected, expected_state = run(name, flags, True, fused, skip_bad=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    for index, values in expected_state.items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(state[index][key]), torch.as_tensor(value)), (
                index,
                key,
            )
    for index in set(state) - set(expected_state):  # made by a step that had no effect
        assert all(not torch.as_tensor(value).any() for value in state[index].values())


def test_on_the_device_a_guarded_step_asks_for_nothing(monkeypatch):
    model = small_model()
    optimizer = optimizer_of("adamw", model, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def waits(*args):
        raise AssertionError("the device was waited for")

    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    guarded_step(optimizer, GOOD, wait=False)


def test_running_statistics_go_back_where_the_flag_is_down():
    model = small_model()
    images = torch.randn(6, 3, 6, 6)
    for flag in (GOOD, BAD):
        moving = running_statistics(model)
        assert len(moving) == 3
        before, saved = [tensor.clone() for tensor in moving], in_one(moving)
        model(images)
        changed = [tensor.clone() for tensor in moving]
        assert not any(torch.equal(a, b) for a, b in zip(before, changed))
        restore_unless(flag, moving, saved)
        assert all(torch.equal(a, b) for a, b in zip(moving, changed if flag else before))


def test_what_stays_as_it_is_in_training():
    model = small_model()
    set_training_mode(model, frozen=False, keep_statistics=False)
    assert all(module.training for module in model.modules())
    set_training_mode(model, frozen=False, keep_statistics=True)
    assert [name for name, part in model.named_children() if not part.training] == ["1"]
    assert running_statistics(model) == []
    set_training_mode(model, frozen=True, keep_statistics=False)
    assert not any(module.training for module in model.modules())


def test_the_average_against_a_naive_one_and_untouched_by_bad_updates():
    model = small_model()
    average = EMA(model, decay=0.6)
    naive = {name: value.double() for name, value in deepcopy(model).state_dict().items()}
    for update in range(8):
        flag = update % 3 != 2
        model(torch.randn(6, 3, 6, 6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        kept = {name: value.clone() for name, value in average.model.state_dict().items()}
        average.update(update, torch.tensor(flag))
        decay = min(0.6, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            if flag:
                naive[name] = (
                    naive[name] * decay + value.double() * (1 - decay)
                    if value.is_floating_point()
                    else value
                )
            elif value.is_floating_point():
                assert torch.equal(average.model.state_dict()[name], kept[name])
    for name, value in average.model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), naive[name], rtol=1e-5, atol=1e-6), name
    assert not average.model.training and not any(
        p.requires_grad for p in average.model.parameters()
    )
    assert not any(
        a.data_ptr() == b.data_ptr() for a, b in zip(average.model.parameters(), model.parameters())
    )


def test_the_average_of_many_tensors_at_once_is_that_of_each():
    model = small_model()
    average, alone = EMA(model, decay=0.7), deepcopy(model).state_dict()
    for update in range(12):
        flag = torch.tensor(update % 4 != 1)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn(value.shape).to(value.dtype) * 3)
        average.update(update, flag)
        weight = (1 - min(0.7, (1 + update) / (10 + update))) * flag.float()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                alone[name].lerp_(value, weight)
            else:
                alone[name].copy_(value)
        assert all(torch.equal(alone[k], v) for k, v in average.model.state_dict().items())


def test_statistics_that_are_no_numbers_go_back_too():
    model = small_model()
    before = deepcopy(model[1].state_dict())
    moving = running_statistics(model)
    saved = in_one(moving)
    model(torch.full((6, 3, 6, 6), torch.nan))
    assert not model[1].running_mean.isfinite().any()
    restore_unless(BAD, moving, saved)
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())


def test_momentum_is_set_to_zero_once(monkeypatch):
    model = small_model()
    optimizer, made = optimizer_of("sgd0.9", model, fused=True), []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda tensor: made.append(1) or zeros_like(tensor))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        guarded_step(optimizer, GOOD, wait=False)
    assert len(made) == len([*model.parameters()])
