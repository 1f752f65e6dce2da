"""Which parameters train, with which weight decay and which share of the learning rate; the
optimizer over them.
"""

from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from models.pretrained import classifier_names

_FUSED_DEVICES = {"cpu", "cuda", "mps"}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over the model's parameter groups; the scheduler sets their learning rates.

    With TRAIN.FREEZE backbone all parameters but the classifier's stop requiring gradients.
    """
    if cfg.TRAIN.FREEZE == "backbone":
        freeze_backbone(model)
    groups = parameter_groups(model, cfg.TRAIN.WEIGHT_DECAY, cfg.TRAIN.LAYER_LR_DECAY)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    settings = cfg.TRAIN.OPTIMIZER
    if settings.NAME == "adamw":
        fused = devices <= _FUSED_DEVICES
        return torch.optim.AdamW(
            groups, cfg.TRAIN.BASE_LR, tuple(settings.BETAS), settings.EPS, fused=fused
        )
    return torch.optim.SGD(
        groups,
        cfg.TRAIN.BASE_LR,
        settings.MOMENTUM,
        nesterov=settings.MOMENTUM > 0,
        fused=devices == {"cuda"},  # so that an update without effect need not ask the device
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Bring an optimizer to a checkpoint's state.

    Whether its kernels are fused is this run's affair: another device may have written the state.
    """
    fused = optimizer.param_groups[0]["fused"]
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_lr_decay: float = 1.0
) -> list[dict]:
    """Groups of trainable parameters by weight decay, then `lr_scale`, each in the order first met.

    Parameters of one dimension, biases and what the model itself names (attention biases,
    embeddings) do not decay.
    """
    scales = _lr_scales(model, layer_lr_decay)
    exempt: set[str] = set()
    keywords = {"attention_biases"}
    if hasattr(model, "no_weight_decay"):
        exempt |= set(model.no_weight_decay())
    if hasattr(model, "no_weight_decay_keywords"):
        keywords |= set(model.no_weight_decay_keywords())
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = (
            parameter.ndim <= 1
            or name.endswith(".bias")
            or name in exempt
            or any(keyword in name for keyword in keywords)
        )
        scale = scales.get(name, 1.0)
        if (spared, scale) not in groups:
            decay = 0.0 if spared else weight_decay
            groups[spared, scale] = {
                "params": [],
                "names": [],
                "weight_decay": decay,
                "lr_scale": scale,
            }
        group = groups[spared, scale]
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter to train")
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def freeze_backbone(model: nn.Module) -> None:
    """Stop gradients of everything but the classifier."""
    heads = tuple(f"{name}." for name in classifier_names(model))
    if not heads:
        raise ValueError(
            f"TRAIN.FREEZE backbone: {type(model).__name__} has no classifier that get_classifier()"
            " or the name head, fc or classifier would give, so nothing would train"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(heads))


def _lr_scales(model: nn.Module, layer_lr_decay: float) -> dict[str, float]:
    if layer_lr_decay == 1:
        return {}
    if not hasattr(model, "lr_scales"):
        raise ValueError(
            f"TRAIN.LAYER_LR_DECAY {layer_lr_decay}: {type(model).__name__} does not say how deep"
            " its parameters lie; set it to 1.0, or give the model a method lr_scales(decay) ->"
            " {parameter name: factor}"
        )
    return model.lr_scales(layer_lr_decay)
