"""TinyViT's maps for dense tasks, by timm's contract and against timm's own model; MobileSAM's last
stage against one written out.
"""

import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import freeze

from models.build import load_weights
from models.pretrained import to_timm
from models.tiny_vit import TinyViT, tiny_vit_5m_224
from tests.models.test_tiny_vit import TINY, fill, images, tiny

Tensors = dict[str, torch.Tensor]


# timm's contract


@pytest.fixture(scope="module")
def twins() -> tuple[TinyViT, torch.nn.Module]:
    """Ours and timm's with equal weights, in float64."""
    ours = fill(TinyViT.from_config("5m", num_classes=5)).double().eval()
    theirs = timm.create_model("tiny_vit_5m_224", num_classes=5).double().eval()
    theirs.load_state_dict(to_timm(ours.state_dict()))
    return ours, theirs


def assert_all_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert [map_.shape for map_ in found] == [map_.shape for map_ in wanted]
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * theirs.abs().max().item())


@pytest.mark.parametrize("size", [(64, 64), (32, 33), (75, 107)])
@torch.no_grad()
def test_features_and_head_are_timms(twins, size):
    batch = images(2, 3, *size, dtype=torch.float64)
    maps, pooled, logits = [], [], []
    for model in twins:
        maps.append(model.forward_features(batch))
        pooled.append(model.forward_head(maps[-1], pre_logits=True))
        logits.append(model.forward_head(maps[-1]))
    assert maps[0].shape == (2, 320, *(math.ceil(side / 32) for side in size))
    assert pooled[0].shape == (2, 320) and logits[0].shape == (2, 5)
    for pair in (maps, pooled, logits):
        assert_all_close(pair[:1], pair[1:])
    assert torch.equal(logits[0], twins[0](batch))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm": True},
        {"indices": 2},
        {"indices": [0, -1]},
        {"indices": [2, 1], "stop_early": True},
        {"indices": [1], "intermediates_only": True},
        {"indices": [1, 3], "output_fmt": "NCHW", "intermediates_only": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_intermediates_are_timms(twins, arguments):
    batch = images(1, 3, 70, 90, dtype=torch.float64)
    found, wanted = (model.forward_intermediates(batch, **arguments) for model in twins)
    if not arguments.get("intermediates_only"):
        assert_all_close([found[0]], [wanted[0]])
        found, wanted = found[1], wanted[1]
    assert_all_close(found, wanted)


def test_intermediates_alone_run_no_stage_above():
    model = tiny()
    model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("a stage too many"))
    model.layers[1].downsample.register_forward_pre_hook(lambda *_: pytest.fail("a merging"))
    model.forward_intermediates(images(1, 3, 64, 64), [0, 1], intermediates_only=True)


def test_maps_come_before_the_merging():
    model = tiny().eval()
    with torch.no_grad():
        _, maps = model.forward_intermediates(images(1, 3, 64, 64))
        assert torch.equal(model.layers[1](model.layers[0].downsample(maps[0])), maps[1])


@pytest.mark.parametrize("indices", [None, (1, 3), (0, -3), [2]], ids=str)
def test_features_only_through_timm(indices):
    """The maps, their numbers, and no parameter that they do not need."""
    options = {} if indices is None else {"out_indices": indices}
    found, wanted = (
        timm.create_model(name, features_only=True, in_chans=4, **options).eval()
        for name in ("tinyvit_5m_224", "tiny_vit_5m_224")
    )
    assert found.feature_info.channels() == wanted.feature_info.channels()
    assert found.feature_info.reduction() == wanted.feature_info.reduction()
    whole = fill(tiny_vit_5m_224(in_chans=4)).eval()
    load_weights(found.model, whole.state_dict(), log=lambda _: None)
    batch = images(1, 4, 70, 90)
    maps = found(batch)
    stages = range(4) if indices is None else sorted(range(4)[i] for i in indices)
    with torch.no_grad():
        _, every = whole.forward_intermediates(batch)
    for map_, stage in zip(maps, stages, strict=True):
        torch.testing.assert_close(map_, every[stage])
    sum(map_.sum() for map_ in maps).backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


def test_frozen_stages_stay_in_training():
    """As the document tells: timm's own `freeze`, on our names."""
    model = tiny().train()
    freeze(model, ["patch_embed", "layers.0", "layers.1"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    model.train()(images(4, 3, 64, 64)).pow(2).sum().backward()
    optimizer.step()
    frozen = ("patch_embed.", "layers.0.", "layers.1.")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_onnx_export_with_gradients_on():
    """Its decompositions give attention other strides: the program must hold no view of it."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, batch = tiny(depths=(1, 1, 1, 1)).eval(), images(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (batch,), dynamo=True, verbose=False)
    torch.testing.assert_close(program(batch)[0], model(batch), rtol=1e-4, atol=1e-4)


# Weights by path


def test_weights_by_path_bring_their_classes(tmp_path, capsys):
    source = fill(TinyViT.from_config("5m", num_classes=7)).eval()
    path = tmp_path / "best.pth"
    torch.save({"model": source.state_dict()}, path)
    batch = images(1, 3, 64, 64)
    for model in (
        TinyViT.from_config("5m", pretrained=path),
        tiny_vit_5m_224(pretrained=str(path)),
        timm.create_model("tinyvit_5m_224", pretrained=str(path)),
    ):
        assert model.num_classes == 7
        assert torch.equal(model.eval()(batch), source(batch))
    assert f"weights of {path}: " in capsys.readouterr().out
    fresh = TinyViT.from_config("5m", pretrained=path, num_classes=3)
    assert fresh.head.weight.shape == (3, 320) and not fresh.head.weight.any()
    with pytest.raises(ValueError, match="no-file.pth: there is no such checkpoint file"):
        TinyViT.from_config("5m", pretrained="no-file.pth")


# MobileSAM's encoder


def conv_bn(x: torch.Tensor, state: Tensors, name: str, stride: int = 1) -> torch.Tensor:
    kernel = state[f"{name}.c.weight"]
    groups = x.shape[1] // kernel.shape[1]
    x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, 1, groups)
    mean, variance = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
    return F.batch_norm(x, mean, variance, state[f"{name}.bn.weight"], state[f"{name}.bn.bias"])


def attend(x: torch.Tensor, state: Tensors, name: str, heads: int, window: int) -> torch.Tensor:
    """Attention among the points of each window of a map [B, H, W, C] padded with zeros."""
    batch, height, width, dim = x.shape
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    padded = F.layer_norm(padded, (dim,), state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    qkv = F.linear(padded, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])
    points = torch.arange(window).expand(window, window)
    points = torch.stack([points.T.flatten(), points.flatten()], 1)
    apart = (points[:, None] - points).abs()
    bias = state[f"{name}.attention_biases"][:, apart[..., 0] * window + apart[..., 1]]
    out = torch.empty_like(padded)
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            part = (slice(None), slice(top, top + window), slice(left, left + window))
            mixed = []
            for head, share in enumerate(qkv[part].flatten(1, 2).chunk(heads, -1)):
                query, key, value = share.chunk(3, -1)
                scores = query @ key.mT / math.sqrt(dim / heads) + bias[head]
                mixed.append(scores.softmax(-1) @ value)
            out[part] = torch.cat(mixed, -1).view(batch, window, window, dim)
    out = F.linear(out, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])
    return out[:, :height, :width]


def mlp(x: torch.Tensor, state: Tensors, name: str) -> torch.Tensor:
    x = F.layer_norm(x, x.shape[-1:], state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    x = F.gelu(F.linear(x, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
    return F.linear(x, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])


def inverted(x: torch.Tensor, state: Tensors, name: str, stride: int = 1) -> torch.Tensor:
    x = F.gelu(conv_bn(x, state, f"{name}.conv1"))
    x = F.gelu(conv_bn(x, state, f"{name}.conv2", stride))
    return conv_bn(x, state, f"{name}.conv3")


def mobile_sam_map(x: torch.Tensor, state: Tensors, shape: dict) -> torch.Tensor:
    """The encoder of MobileSAM up to its neck: TinyViT whose third merging has stride 1."""
    x = F.gelu(conv_bn(x, state, "patch_embed.seq.0", 2))
    x = conv_bn(x, state, "patch_embed.seq.2", 2)
    for stage, depth in enumerate(shape["depths"]):
        for i in range(depth):
            block = f"layers.{stage}.blocks.{i}"
            if stage == 0:
                x = F.gelu(x + inverted(x, state, block))
                continue
            heads, window = shape["num_heads"][stage], shape["window_sizes"][stage]
            x = x.permute(0, 2, 3, 1)
            x = x + attend(x, state, f"{block}.attn", heads, window)
            x = conv_bn(x.permute(0, 3, 1, 2), state, f"{block}.local_conv").permute(0, 2, 3, 1)
            x = (x + mlp(x, state, f"{block}.mlp")).permute(0, 3, 1, 2)
        if stage < 3:
            x = inverted(x, state, f"layers.{stage}.downsample", 1 if stage == 2 else 2)
    return x


@torch.no_grad()
def test_a_last_stride_of_one_is_mobile_sams():
    ours, usual = tiny(last_stride=1).double().eval(), tiny().double().eval()
    assert list(ours.state_dict()) == list(usual.state_dict())
    batch = images(2, 3, 80, 112, dtype=torch.float64)
    found = ours.forward_features(batch)
    assert found.shape == (2, 64, 5, 7) and usual.forward_features(batch).shape == (2, 64, 3, 4)
    wanted = mobile_sam_map(batch, ours.state_dict(), TINY)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert [entry["reduction"] for entry in ours.feature_info] == [4, 8, 16, 16]
    _, maps = ours.forward_intermediates(batch)
    assert [tuple(map_.shape[2:]) for map_ in maps] == [(20, 28), (10, 14), (5, 7), (5, 7)]
