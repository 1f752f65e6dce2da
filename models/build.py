"""Students and teachers by configuration: TinyViT, the CLIP teacher, any timm model, any function
of the user's.
"""

import difflib
import importlib
import json
import re
from collections.abc import Callable
from inspect import signature
from typing import Any

import timm
from torch import nn
from yacs.config import CfgNode

from models.clip_vit import clip_vit_large14_224
from models.hub import nearest_variant, timm_name
from models.pretrained import (
    CLIP_VARIANT,
    HUB,
    PIN,
    ZOO_NAMES,
    LoadReport,
    StateDict,
    classifier_names,
    head_classes,
    load_weights,
    read_state_dict,
    zoo_url,
)
from models.tiny_vit import TinyViT, count_multiply_adds


def build_model(
    cfg: CfgNode, *, load: bool = True, log: Callable[[str], None] = print
) -> nn.Module:
    """The model that a configuration describes, with MODEL.PRETRAINED fitted to it unless `load` is
    off.

    A class count of 0 means the model's usual one; data.build.resolve replaces it by the data's.
    """
    model = _construct(cfg, log)
    if cfg.DISTILL.TWO_HEADS and not separate_heads(model) and ":" not in cfg.MODEL.TYPE:
        raise ValueError(
            f"DISTILL.TWO_HEADS: {cfg.MODEL.NAME} has one head; timm's models with a distillation"
            " head have two, e.g. deit_tiny_distilled_patch16_224"
        )
    if load and cfg.MODEL.PRETRAINED:
        load_named_weights(model, cfg, cfg.MODEL.PRETRAINED, log=log)
    return model


def build_teacher(cfg: CfgNode, *, log: Callable[[str], None] = print) -> nn.Module:
    """The model of a configuration with exactly the weights of MODEL.RESUME or MODEL.PRETRAINED, in
    eval mode and without gradients.

    Where MODEL.NUM_CLASSES is 0 the weights say how many classes there are; `num_outputs` tells
    afterwards.
    """
    model = _construct(cfg, log)
    name = cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED
    if name:
        weights = _read_named_weights(cfg, name, log)
        classes = head_classes(model, weights)
        may_reset = not cfg.MODEL.NUM_CLASSES and hasattr(model, "reset_classifier")
        if may_reset and classes and classes != num_outputs(model):
            model.reset_classifier(classes)
        load_weights(model, weights, exact=True, label=name, log=log)
    elif ":" not in cfg.MODEL.TYPE:
        log(
            f"{cfg.MODEL.NAME} has no weights but random ones: give --resume, --pretrained or"
            " MODEL.PRETRAINED"
        )
    return model.eval().requires_grad_(False)


def load_named_weights(
    model: nn.Module,
    cfg: CfgNode,
    name: str,
    *,
    exact: bool = False,
    log: Callable[[str], None] = print,
) -> LoadReport:
    """Load weights by what a configuration calls them: a path, a URL, a name of the model zoo,
    of the Hub, or `hub`, timm's for this model; each with @sha256=... if you like.
    """
    weights = _read_named_weights(cfg, name, log)
    return load_weights(model, weights, exact=exact, label=name, log=log)


def separate_heads(model: nn.Module) -> bool:
    """Let a model answer with (class head, distillation head) in training mode, where it can;
    whether it can.
    """
    has_two = hasattr(model, "set_distilled_training")  # so do all of timm's
    if has_two:
        model.set_distilled_training(True)
    return has_two


def num_outputs(model: nn.Module) -> int:
    """The number of classes that a model tells apart."""
    classes = getattr(model, "num_classes", 0)
    if isinstance(classes, int) and classes > 0:
        return classes
    heads = classifier_names(model)
    if not heads:
        raise ValueError(
            f"{type(model).__name__} does not say how many classes it has: give it an attribute"
            " num_classes"
        )
    return next(model.get_submodule(heads[0]).parameters()).shape[0]


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    """The number of parameters, or of those that train."""
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad or not trainable
    )


def multiply_adds_in_words(model: nn.Module, image_size: int) -> str:
    """What one image of so many pixels a side costs, in words."""
    try:
        cost = f"{count_multiply_adds(model, image_size) / 1e9:.3f} G"
    except Exception:  # whatever a user's model does when it is run without values
        cost = "unknown"
    return f"{cost} multiply-adds at {image_size} px"


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{spec!r}: expected package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(
            f"{spec!r}: there is no module {error.name} (its folder must be on PYTHONPATH)"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        functions = [known for known in vars(module) if callable(getattr(module, known))]
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{spec!r}: {module.__file__} has no function {name}{hint}")
    return function


def _construct(cfg: CfgNode, log: Callable[[str], None]) -> nn.Module:
    """The bare model."""
    match cfg.MODEL.TYPE:
        case "tiny_vit":
            shape = {name.lower(): value for name, value in cfg.MODEL.TINY_VIT.items()}
            return TinyViT(
                img_size=cfg.DATA.IMG_SIZE,
                num_classes=cfg.MODEL.NUM_CLASSES or 1000,
                drop_rate=cfg.MODEL.DROP_RATE,
                drop_path_rate=cfg.MODEL.DROP_PATH_RATE,
                use_checkpoint=cfg.TRAIN.USE_CHECKPOINT,
                **shape,
            )
        case "clip_vit_large14_224":
            model = clip_vit_large14_224(num_classes=cfg.MODEL.NUM_CLASSES or 21841)
        case "timm":
            options = {}
            if cfg.MODEL.NUM_CLASSES:
                options["num_classes"] = cfg.MODEL.NUM_CLASSES
            model = _timm_model(cfg, log, **options)
        case spec:
            model = load_function(spec)(cfg)
            if not isinstance(model, nn.Module):
                raise ValueError(
                    f"MODEL.TYPE = {spec!r}: expected the function to return a torch.nn.Module, got"
                    f" {type(model).__name__}"
                )
    if cfg.TRAIN.USE_CHECKPOINT:
        _recompute_activations(model)
    return model


def _timm_model(cfg: CfgNode, log: Callable[[str], None], **options: Any) -> nn.Module:
    """A timm model for the configured image size, with drop path where it knows that."""
    name, size, given = cfg.MODEL.NAME, cfg.DATA.IMG_SIZE, json.loads(cfg.MODEL.ARGS or "{}")
    own = timm.get_pretrained_cfg(name)
    if own is not None and own.fixed_input_size and own.input_size[-1] != size:
        given.setdefault("img_size", size)
    if given.get("img_size", size) != size:
        raise ValueError(f"MODEL.ARGS = {cfg.MODEL.ARGS}, but DATA.IMG_SIZE = {size}: set one")
    # Those of the function are none of the model: they would load files.
    foreign = sorted(given.keys() & signature(timm.create_model).parameters)
    if foreign:
        raise ValueError(f"MODEL.ARGS = {cfg.MODEL.ARGS}: leave out {', '.join(foreign)}")
    optional = {"drop_rate": cfg.MODEL.DROP_RATE, "drop_path_rate": cfg.MODEL.DROP_PATH_RATE}
    while True:
        try:
            return timm.create_model(name, **options, **optional, **given)
        except Exception as error:  # of any kind, for an argument that does not fit
            unknown = re.search(r"unexpected keyword argument '(\w+)'|$", str(error))[1]
            if unknown in optional:
                value = optional.pop(unknown)
                log(f"{name} takes no {unknown}: MODEL.{unknown.upper()} {value} has no effect")
            elif cfg.MODEL.ARGS:
                raise ValueError(f"MODEL.ARGS = {cfg.MODEL.ARGS}: {name}: {error}") from None
            else:
                raise


def _recompute_activations(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ValueError(
            f"TRAIN.USE_CHECKPOINT: {type(model).__name__} cannot recompute its activations, leave"
            " it False"
        ) from None


def _read_named_weights(cfg: CfgNode, name: str, log: Callable[[str], None]) -> StateDict:
    if cfg.MODEL.TYPE == "timm" and name == "hub":
        try:
            return _timm_model(cfg, lambda _: None, pretrained=True).state_dict()
        except Exception as error:  # the hub's client raises its own, network and file errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"MODEL.PRETRAINED hub: no weights for {cfg.MODEL.NAME} ({reason}). Without a"
                " connection fetch the file elsewhere and give its path as MODEL.PRETRAINED"
            ) from error
    which = name.partition(PIN)[0]
    if cfg.MODEL.TYPE == "tiny_vit" and which == "hub":
        name = f"{HUB}timm/{timm_name(_zoo_variant(cfg))}.dist_in22k_ft_in1k{name[len(which) :]}"
    variant = ""
    if cfg.MODEL.TYPE == "tiny_vit" and which in ZOO_NAMES:
        variant = _zoo_variant(cfg)
    elif cfg.MODEL.TYPE == "clip_vit_large14_224" and which == "22k":
        variant = CLIP_VARIANT
    if variant:
        name = zoo_url(variant, which) + name.removeprefix(which)
    return read_state_dict(name, log=log)


def _zoo_variant(cfg: CfgNode) -> str:
    """The official variant that a configuration's shape is, or may start from by resizing its
    windows.
    """
    shape = cfg.MODEL.TINY_VIT
    variant = nearest_variant({name.lower(): value for name, value in shape.items()})
    if not variant:
        raise ValueError(
            f"MODEL.PRETRAINED = {cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED!r}: the model zoo has no"
            f" TinyViT of EMBED_DIMS {list(shape.EMBED_DIMS)} and NUM_HEADS"
            f" {list(shape.NUM_HEADS)}; take a recipe of configs/, or give a file"
        )
    return variant
