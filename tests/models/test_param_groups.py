"""Parameter groups against the original's, and the optimizers over them."""

import json
from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from configs import load_config
from models.param_groups import (
    build_optimizer,
    freeze_backbone,
    load_optimizer,
    parameter_groups,
)
from models.tiny_vit import TinyViT


def config(opts=""):
    return load_config(["--opts", *opts.split()])


def small_tiny_vit(**overrides):
    ones = (1, 1, 1, 1)
    small = {"embed_dims": (32, 32, 32, 32), "depths": ones, "num_heads": ones, "num_classes": 5}
    return TinyViT(**small | overrides)


class Plain(nn.Module):
    """A model of no known kind."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.ones(3, 4))
        self.grid = nn.Module()
        self.grid.bias = nn.Parameter(torch.ones(2, 2))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd"])
def test_groups_equal_the_originals(goldens, optimizer_name):
    case = json.loads((goldens / "lr_groups.json").read_text())["groups"]
    model = TinyViT.from_config("5m")
    cfg = config(
        f"TRAIN.WEIGHT_DECAY 1e-08 TRAIN.LAYER_LR_DECAY 0.8 TRAIN.OPTIMIZER.NAME {optimizer_name}"
    )
    optimizer = build_optimizer(cfg, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(optimizer.param_groups) == len(case)
    for group, expected in zip(optimizer.param_groups, case):
        assert (
            [names[id(parameter)] for parameter in group["params"]]
            == group["names"]
            == expected["names"]
        )
        assert group["lr_scale"] == pytest.approx(expected["lr_scale"], rel=1e-14)
        assert group["weight_decay"] == expected["weight_decay"]


def test_without_layer_decay_there_are_two_groups_of_scale_one():
    model = small_tiny_vit()
    decayed, spared = build_optimizer(config("TRAIN.WEIGHT_DECAY 0.05"), model).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert decayed["lr_scale"] == spared["lr_scale"] == 1.0
    assert all(parameter.ndim > 1 for parameter in decayed["params"]) and not any(
        "bias" in name for name in decayed["names"]
    )
    assert any(name.endswith("attention_biases") for name in spared["names"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_any_module_has_groups():
    decayed, spared = parameter_groups(Plain(), 0.1)
    assert decayed["names"] == ["table", "body.0.weight", "fc.weight"]
    assert spared["names"] == [
        "scale",
        "grid.bias",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "fc.bias",
    ]
    _, spared = parameter_groups(timm.create_model("vit_tiny_patch16_224"), 0.1)
    assert {"pos_embed", "cls_token"} <= set(spared["names"])  # what timm's model itself exempts


def test_zero_weight_decay_keeps_the_groups():
    assert [len(group["names"]) for group in parameter_groups(Plain(), 0.0)] == [3, 6]


def test_freezing_the_backbone_leaves_the_head():
    model = small_tiny_vit()
    optimizer = build_optimizer(config("TRAIN.FREEZE backbone TRAIN.LAYER_LR_DECAY 0.5"), model)
    assert [group["names"] for group in optimizer.param_groups] == [["head.weight"], ["head.bias"]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()(
        torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ).square().mean().backward()
    optimizer.step()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"head.weight", "head.bias"}
    plain = Plain()
    freeze_backbone(plain)
    assert [name for name, parameter in plain.named_parameters() if parameter.requires_grad] == [
        "fc.weight",
        "fc.bias",
    ]


def test_optimizers_take_their_settings():
    cfg = config("TRAIN.OPTIMIZER.EPS 1e-06 TRAIN.OPTIMIZER.BETAS (0.8,0.95)")
    adamw = build_optimizer(cfg, Plain())
    assert isinstance(adamw, torch.optim.AdamW)
    assert (
        adamw.defaults["eps"] == 1e-6
        and adamw.defaults["betas"] == (0.8, 0.95)
        and adamw.defaults["fused"]
    )
    sgd = build_optimizer(config("TRAIN.OPTIMIZER.NAME sgd TRAIN.OPTIMIZER.MOMENTUM 0.8"), Plain())
    assert (
        isinstance(sgd, torch.optim.SGD)
        and sgd.defaults["nesterov"]
        and sgd.defaults["momentum"] == 0.8
    )


def test_adamw_equals_the_written_rule():
    """Three steps against decoupled weight decay and bias-corrected moments in float64."""
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(config("TRAIN.WEIGHT_DECAY 0.1"), model)
    values = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    first, second = (
        {name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2)
    )
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.arange(6.0).view(2, 3) * step).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * step
        gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
        optimizer.step()
        for name, parameter in model.named_parameters():
            first[name] = 0.9 * first[name] + 0.1 * gradients[name]
            second[name] = 0.999 * second[name] + 0.001 * gradients[name] ** 2
            values[name] = values[name] * (1 - 0.01 * step * (0.1 if name == "weight" else 0))
            moment = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            values[name] = values[name] - 0.01 * step * first[name] / (1 - 0.9**step) / moment
            assert torch.allclose(parameter.detach().double(), values[name], rtol=1e-5, atol=1e-7)
            parameter.data.copy_(values[name])


def test_optimizer_state_survives_a_safe_checkpoint(tmp_path):
    model = Plain()
    optimizer = build_optimizer(config(), model)
    model.fc(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    other = build_optimizer(config(), Plain())
    other.load_state_dict(torch.load(tmp_path / "optimizer.pth", weights_only=True))
    assert [group["names"] for group in other.param_groups] == [
        group["names"] for group in optimizer.param_groups
    ]


def test_layer_decay_on_a_model_without_depths():
    with pytest.raises(
        ValueError,
        match="TRAIN.LAYER_LR_DECAY 0.8: Plain does not say .* set it to 1.0, or give .* lr_scales",
    ):
        build_optimizer(config("TRAIN.LAYER_LR_DECAY 0.8"), Plain())


def test_nothing_to_train():
    with pytest.raises(ValueError, match="TRAIN.FREEZE backbone: Sequential has no classifier"):
        build_optimizer(config("TRAIN.FREEZE backbone"), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="TRAIN.FREEZE backbone: TinyViT has no classifier"):
        build_optimizer(config("TRAIN.FREEZE backbone"), small_tiny_vit(num_classes=0))
    with pytest.raises(ValueError, match="GELU has no parameter to train"):
        parameter_groups(nn.GELU(), 0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_does_not_choose_the_kernels(name, fused):
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(config(f"TRAIN.OPTIMIZER.NAME {name}"), model)
    states = []
    for there in (fused, not fused):
        for group in optimizer.param_groups:
            group["fused"] = there
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states.append(deepcopy(optimizer.state_dict()))
    load_optimizer(optimizer, states[0])
    assert all(group["fused"] is not fused for group in optimizer.param_groups)
    assert states[0]["param_groups"][0]["fused"] is fused  # is left alone
    for index, values in states[0]["state"].items():
        for key, value in values.items():
            assert torch.equal(optimizer.state_dict()["state"][index][key], value)
    optimizer.step()
