"""The teacher CLIP-ViT: the vision tower of CLIP with a linear classifier; parameter names of the
official checkpoint.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

HEAD_DIM = 64  # channels of one attention head


class QuickGelu(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP over tokens [B, N, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // HEAD_DIM, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGelu())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTower(nn.Module):
    """Images [B, 3, S, S] -> the projected class token [B, embed_dim]."""

    def __init__(
        self, embed_dim: int, image_resolution: int, layers: int, width: int, patch_size: int
    ):
        super().__init__()
        points = (image_resolution // patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(points + 1, width) * width**-0.5)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([token, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class ClipViT(nn.Module):
    """CLIP's vision tower, then a linear layer to classes, which is computed in its own precision
    also under autocast.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        image_resolution: int = 224,
        vision_layers: int = 24,
        vision_width: int = 1024,
        vision_patch_size: int = 14,
        num_classes: int = 21841,
    ):
        super().__init__()
        if vision_width % HEAD_DIM:
            raise ValueError(
                f"vision_width {vision_width}: must be a multiple of {HEAD_DIM}, a head's size"
            )
        if image_resolution % vision_patch_size:
            raise ValueError(
                f"image_resolution {image_resolution}: must be a multiple of vision_patch_size"
                f" {vision_patch_size}"
            )
        self.image_resolution = image_resolution
        self.num_features = embed_dim
        self.visual = VisionTower(
            embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size
        )
        self.reset_classifier(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, image_resolution, image_resolution] -> logits [B, num_classes], or features [B,
        embed_dim] if there are no classes.
        """
        side = self.image_resolution
        if images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images of shape {list(images.shape)}: this model takes [batch, 3, {side}, {side}]"
            )
        features = self.visual(images)
        if self.num_classes == 0:
            return features
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one; 0 classes leave the features."""
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes}: 0 is the least")
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = self.visual.proj
            self.head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"visual.class_embedding", "visual.positional_embedding"}


def clip_vit_large14_224(
    num_classes: int = 21841, pretrained: bool = False, **overrides: Any
) -> ClipViT:
    """CLIP-ViT-L/14 at 224 pixels, the official teacher for ImageNet-22k, with its weights if
    asked.
    """
    model = ClipViT(num_classes=num_classes, **overrides)
    if pretrained:
        from models.pretrained import load_pretrained

        load_pretrained(model, "clip_vit_large14_224", "22k")
    return model
