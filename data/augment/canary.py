"""Digests of decoded built-in images: they tell when another Pillow or numpy gives other bits."""

import base64
import io
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.augment.pairs import PairMix

# Between them these seeds draw a flip, an erased box and all fifteen effects of the default recipe.
SEEDS = (106, 5, 9, 23, 65, 113, 151, 56)
# drawn_image(80, 60), quality 75, colours at half the resolution: their upsampling is where
# decoders differ.
JPEG = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcp
LDAxNDQ0Hyc5PTgyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIy
MjIyMjIyMjIyMjIyMjL/wAARCAA8AFADASIAAhEBAxEB/8QAGwABAQACAwEAAAAAAAAAAAAABAUDBgACBwH/xAAvEAABAwMD
AgQDCQAAAAAAAAACAAEEAxFhEiExBVETQXGRIoGxFCNCUqGi0fDx/8QAGgEAAgMBAQAAAAAAAAAAAAAABAUDBgcBAv/EADUR
AAAFAQQIAgkFAAAAAAAAAAABAgMREgQFUZETFSExQWFigQYzFCIyUnGCodHhFiOSwfH/2gAMAwEAAhEDEQA/APEgoPdVwoJo
UMIwUH7K2re1V1VdojPECsv6QDChhWAoJgR8IwUMIdT2quqvtEZ4hsy/WBhQVgKCYEdHCPhQKe1V1VdojPEN2X6wIKCsBQTA
oYRwj4Q6ntVdVfaIzxDZl+sBYdPwurayvQdn87YbhRPALs925wuE4Xh8qvM0u33Yj+U+1y3C0sqJ5tPCCIRxoKxTjaiZrfNL
CPuusWno1PbdctT6robUaDqNW7hEZzvGGXC0m8Lc3Z1HBHv+BEZ/0O9CNSjjYB38yflZlxcVEUo1HJjbGmkMoJDZQRDCccHf
ULWfsyohQwiJ1KhqAXty106uu9VWQlEoqpjjhIq1+2VtlSHUbJ2H9wQI+/CsBHwmBHRwj4R6ntVdVXaIzxC1l+sTvsTmWpht
drXtdXWgWJ7C9mxtbmyvRIHiQaZMPF32bfl/0U1unWF2Frs/dlAduLw963maX5YpzmauW4WBFt0qCKYgaKEfCoSY5eExs19P
PoqgUEcY92s7bL1bEpsbKmlHUTnaIzneMRua9lWO1t2pO9J5kew/pIjLiuSOguZaoxCLflO9vdEbosl/xUvd/wCEitNlcsyo
cL8jbLL4puq0Nk4TpFPA9hl8fxJAAAVQ2ABdyfhmW3x4nh0Qp86RZr25svvTuiUYdjf7yrv8bta3o3ksoUEwbcVdZVLKTVz3
R/v0FUvq/W7xdJFnP1E8cT+2R4gYUMKwEdMCgjhHwvK3tVdVXaIzxAbL9fIO6dCE4NN9F+Xf3dbK0Et344d35/v+p3RaTN0m
h5PYm/c6J4Y343Shy1K8PLNXmaX5YpzmauW4G+kqd2YDycI+/CsBHwkgA9kYAaydqcO6uqrtEZ4jFmXjcBgoKxTj4SQBuyOI
Mh1OndWz2q+0RniG7LxubAYI+FXChskgA7I4A3ZQKdO6uqrtEZ4hsy8awYI+FXCPhJAG7I4AyHU6d1dVfaIzxDdh43A2COiJ
Tb1+q2JYIjWih8/qpfdBKX+nzNXmaXb7sRnM1ctwcJ/eIuED/9k=
"""


def drawn_image(width: int = 120, height: int = 90) -> Image.Image:
    """A picture with slopes, edges, saturated areas and grain, drawn in integers, so that it is the
    same everywhere.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    grain = (x * x * 31 + y * y * 17 + x * y * 7) % 23 - 11
    red = 255 * x // width + grain
    green = 255 * y // height - grain
    blue = np.where((x // 8 + y // 8) % 2, 200, 60) + grain
    disc = (x - width // 3) ** 2 + (y - height // 2) ** 2 < (height // 4) ** 2
    pixels = np.stack(
        [np.where(disc, 250, red), np.where(disc, 40, green), np.where(disc, 20, blue)], axis=-1
    )
    pixels[:, -width // 6 :] = pixels[:, -width // 6 :] * 2 - 100
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg_image() -> Image.Image:
    """The embedded JPEG, decoded."""
    image = Image.open(io.BytesIO(base64.b64decode(JPEG)), formats=["JPEG"])
    image.load()
    return image


def digests(decode: Callable[[Image.Image, int], Tensor], mix: PairMix | None) -> dict[str, str]:
    """sha256 by name: of the JPEG's pixels, of both images decoded under fixed seeds, and of those
    of the drawn one mixed in pairs.
    """
    drawn, jpeg = drawn_image(), jpeg_image()
    images = {f"drawn/{seed}": decode(drawn, seed) for seed in SEEDS}
    if mix:
        mixed, _ = mix(torch.stack(list(images.values())), None, SEEDS)
        images |= {
            f"pair/{SEEDS[i]}-{SEEDS[i + 1]}": mixed[i : i + 2] for i in range(0, len(SEEDS), 2)
        }
    images |= {f"jpeg/{seed}": decode(jpeg, seed) for seed in SEEDS[:3]}
    content = {"jpeg": jpeg.tobytes()} | {
        name: image.numpy().tobytes() for name, image in images.items()
    }
    return {name: sha256(data).hexdigest() for name, data in content.items()}
