"""Teachers for tests: small, fast, and the same in every process. Their functions are values of
MODEL.TYPE.
"""

import os

import torch
from torch import Tensor, nn


class Glance(nn.Module):
    """Looks at a coarse grid of each image by itself: what it says does not depend on the rest of
    the batch, to the last bit.
    """

    def __init__(self, num_classes: int, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.grid = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(48, width)
        self.head = nn.Linear(width, num_classes)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat(
            [
                self.head(torch.tanh(self.hidden(self.grid(image).flatten(1))))
                for image in images.split(1)
            ]
        )


class Scripted(Glance):
    """Runs the Python text of the environment variable TEACHER_SCRIPT before each answer; `call`
    counts from 0.
    """

    call = 0

    def forward(self, images: Tensor) -> Tensor:
        exec(os.environ.get("TEACHER_SCRIPT", ""), {"call": self.call})
        self.call += 1
        return super().forward(images)


class Crowd(Scripted):
    """What it says of an image depends on all images of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1 + images.mean())


class Pair(Glance):
    """Answers with two heads, whatever its mode."""

    def __init__(self, num_classes: int, seed: int = 0) -> None:
        super().__init__(num_classes, seed)
        self.other = Glance(num_classes, seed + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(images), self.other(images)


def glance(cfg) -> nn.Module:
    """MODEL.NUM_CLASSES outputs (default 10); SEED chooses the weights."""
    return Glance(cfg.MODEL.NUM_CLASSES or 10, cfg.SEED)


def scripted(cfg) -> nn.Module:
    return Scripted(cfg.MODEL.NUM_CLASSES or 10, cfg.SEED)


def crowd(cfg) -> nn.Module:
    return Crowd(cfg.MODEL.NUM_CLASSES or 10, cfg.SEED)


def pair(cfg) -> nn.Module:
    return Pair(cfg.MODEL.NUM_CLASSES or 10, cfg.SEED)
