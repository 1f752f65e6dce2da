"""Entry points of torch.hub: the TinyViT family and its teacher.

torch.hub.load(repository, "tiny_vit_5m_224", pretrained=True)
"""

from models.clip_vit import clip_vit_large14_224
from models.tiny_vit import (
    tiny_vit_5m_224,
    tiny_vit_11m_224,
    tiny_vit_21m_224,
    tiny_vit_21m_384,
    tiny_vit_21m_512,
)

dependencies = ["torch", "timm", "numpy", "safetensors", "tqdm"]

__all__ = [
    "clip_vit_large14_224",
    "tiny_vit_5m_224",
    "tiny_vit_11m_224",
    "tiny_vit_21m_224",
    "tiny_vit_21m_384",
    "tiny_vit_21m_512",
]
