"""The CLIP-ViT teacher against the original's names and outputs."""

import json
import math

import pytest
import torch

from models.clip_vit import ClipViT, clip_vit_large14_224

SMALL = {
    "embed_dim": 32,
    "image_resolution": 56,
    "vision_layers": 2,
    "vision_width": 128,
    "vision_patch_size": 14,
    "num_classes": 10,
}


@pytest.fixture(scope="module")
def golden_models(goldens) -> dict:
    return json.loads((goldens / "model.json").read_text())


def golden_fill(model: torch.nn.Module) -> None:
    """Weights by the rule that the golden case states."""
    state = model.state_dict()
    for i, key in enumerate(sorted(state)):
        noise = torch.empty(state[key].shape).normal_(generator=torch.Generator().manual_seed(i))
        if noise.dim() > 1:
            noise /= math.sqrt(noise[0].numel())
        else:
            noise = 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise
        state[key].copy_(noise)


def small(**overrides) -> ClipViT:
    torch.manual_seed(0)
    return ClipViT(**{**SMALL, **overrides}).eval()


def test_names_shapes_and_order_are_the_originals(golden_models):
    with torch.device("meta"):
        model = clip_vit_large14_224(num_classes=21841)
    golden = golden_models["clip_vit_large14_22k"]
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == golden[
        "keys"
    ]
    assert list(model.state_dict()) == golden["order"]


@pytest.mark.parametrize("grad", [True, False], ids=["with gradient", "without"])
def test_outputs_are_the_originals(golden_models, grad):
    golden = golden_models["clip_small"]
    model = ClipViT(**golden["kwargs"]).eval()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == golden[
        "keys"
    ]
    golden_fill(model)
    images = torch.empty(2, 3, 56, 56).normal_(generator=torch.Generator().manual_seed(2024))
    with torch.set_grad_enabled(grad):
        logits = model(images)
    expected = torch.tensor(golden["logits"])
    torch.testing.assert_close(
        logits.detach(), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_the_head_computes_in_float32_under_autocast():
    model = small()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.visual(images)
            logits = model(images)
    assert features.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, model.head(features.float()))
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_half_precision_weights():
    model = small().to(torch.bfloat16)
    assert model(torch.randn(1, 3, 56, 56).bfloat16()).dtype == torch.bfloat16


def test_reset_classifier():
    model = small().double()
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.get_classifier() is model.head
    model.reset_classifier(0)
    assert torch.equal(model(images), model.visual(images)) and model.num_classes == 0


def test_every_parameter_learns():
    model = small().train()
    model(torch.randn(2, 3, 56, 56)).pow(2).sum().backward()
    assert [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ] == []


def test_embeddings_do_not_decay():
    assert small().no_weight_decay() <= {name for name, _ in small().named_parameters()}


def test_official_weights_on_request(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "models.pretrained.load_pretrained", lambda model, *source: asked.append(source)
    )
    clip_vit_large14_224(**SMALL)
    assert asked == []
    clip_vit_large14_224(pretrained=True, **SMALL)
    assert asked == [("clip_vit_large14_224", "22k")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(vision_width=100), "vision_width 100: must be a multiple of 64"),
        (
            lambda: small(image_resolution=57),
            "image_resolution 57: must be a multiple of vision_patch_size 14",
        ),
        (lambda: small(num_classes=-1), "num_classes -1: 0 is the least"),
        (
            lambda: small()(torch.zeros(1, 3, 64, 64)),
            r"images of shape \[1, 3, 64, 64\]: this model takes \[batch, 3, 56, 56\]",
        ),
        (
            lambda: small()(torch.zeros(1, 1, 56, 56)),
            r"images of shape \[1, 1, 56, 56\]: this model takes",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
