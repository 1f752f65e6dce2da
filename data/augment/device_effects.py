"""Pillow's operations on a batch of images, bit for bit, on any device with float64.

Images are uint8 [n, 3, S, S]; arguments are tensors with one row per image. What keeps the bits:
every operation is one elementwise kernel of the stated type, so none is fused with another; no
division by a number, which CUDA turns into a product; matrix products only of whole numbers whose
sums stay below 2 ** 53."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

WEIGHT_BITS = 22  # of Pillow's whole-numbered resize weights


def resize(pixels: Tensor, crops: Tensor, size: int, limits: tuple[int, int, int]) -> Tensor:
    """Crops of any size -> uint8 [n, 3, size, size], the width first.

    pixels: uint8 [P, 3], the crops' rows one behind the other; crops: int64 [n, 4] of first pixel,
    width, height, 1 if bicubic or 0 if bilinear; limits: the largest width, height and tap count.
    """
    start, width, height, bicubic = crops.unbind(1)
    widest, highest, taps = limits
    lengths = torch.cat([width, height])
    weights = _weights(lengths, bicubic.repeat(2), size, max(widest, highest), taps)
    across, down = weights.chunk(2)  # [n, size, longest] each
    y = torch.arange(highest, device=pixels.device)[:, None]
    x = torch.arange(widest, device=pixels.device)
    # [n, highest, widest]; what lies beyond a crop is some pixel, its weight is 0
    index = (_column(start) + y * _column(width) + x).clamp(max=len(pixels) - 1)
    rows = pixels[index].transpose(2, 3).flatten(1, 2)  # [n, highest * 3, widest]
    rows = _whole(rows.double() @ across[:, :, :widest].transpose(1, 2))  # [n, highest * 3, size]
    columns = rows.view(len(crops), highest, 3 * size)
    resized = _whole(down[:, :, :highest] @ columns).view(len(crops), size, 3, size)
    return resized.transpose(1, 2).to(torch.uint8)


def _weights(length: Tensor, bicubic: Tensor, size: int, longest: int, taps: int) -> Tensor:
    """Whole-numbered weights of input pixels in output ones, float64 [n, size, longest]."""
    length, bicubic = _column(length).double(), _column(bicubic).bool()  # [n, 1, 1]
    scale = length / length.new_full((), size)
    stretch = scale.clamp(min=1)
    support = torch.where(bicubic, 2 * stretch, stretch)
    output = torch.arange(size, device=length.device).double()[:, None]
    centre = (output + 0.5) * scale  # [n, size, 1]
    first = (centre - support + 0.5).trunc().clamp(min=0)
    end = torch.minimum((centre + support + 0.5).trunc(), length)
    source = first + torch.arange(taps, device=length.device)  # [n, size, taps]
    distance = ((source - centre + 0.5) * stretch.reciprocal()).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(bicubic, cubic, (1 - distance).clamp(min=0))
    weights = torch.where(source < end, weights, 0.0)
    total = torch.zeros_like(centre)
    for tap in weights.split(1, dim=2):  # in this order
        total = total + tap
    weights = weights / total * (1 << WEIGHT_BITS)
    weights = (weights + 0.5 * weights.sign()).trunc()
    # Room for taps behind the last pixel: their weights are 0.
    table = weights.new_zeros(len(length), size, longest + taps)
    return table.scatter_(2, source.long(), weights)[:, :, :longest]


def _whole(sums: Tensor) -> Tensor:
    """Sums of values times weights, rounded to values, still float64."""
    half = 1 << (WEIGHT_BITS - 1)
    return ((sums + half) * 0.5**WEIGHT_BITS).floor().clamp(0, 255)


def affine_bicubic(image: Tensor, motion: Tensor) -> Tensor:
    """Pixel (x, y) from (a x + b y + c, d x + e y + f), or a colour where that is outside.

    motion: float64 [n, 9] of a to f and the colour.
    """
    return _affine(image, motion, (-1, 0, 1, 2), _cubic)


def affine_bilinear(image: Tensor, motion: Tensor) -> Tensor:
    """The same from four pixels instead of sixteen."""
    return _affine(image, motion, (0, 1), _linear)


def _affine(
    image: Tensor, motion: Tensor, taps: tuple[int, ...], interpolate: Callable[..., Tensor]
) -> Tensor:
    count, _, height, width = image.shape
    a, b, c, d, e, f, *_ = (_column(numbers) for numbers in motion.unbind(1))
    fill = motion[:, 6:, None, None].to(torch.uint8)
    centres = torch.arange(width, device=image.device).double() + 0.5
    x = a * centres + b * centres[:, None] + c  # [n, S, S]
    y = d * centres + e * centres[:, None] + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    rows = torch.stack([top + tap for tap in taps], 1).clamp_(0, height - 1)  # [n, taps, S, S]
    flat = image.flatten(2)
    neighbours = []  # for each column int16 [n, 3, taps, S, S]
    for tap in taps:
        columns = (left + tap).clamp_(0, width - 1)
        index = (rows * width + columns[:, None]).long()
        values = flat.gather(2, index.view(count, 1, -1).expand(-1, 3, -1))
        neighbours.append(values.view(count, 3, *index.shape[1:]).short())
    lines = interpolate(*neighbours, (x - left)[:, None, None])  # float64 [n, 3, taps, S, S]
    values = interpolate(*lines.unbind(2), (y - top)[:, None]).clamp_(0, 255)
    return torch.where(inside[:, None], values.to(torch.uint8), fill)


def _cubic(a: Tensor, b: Tensor, c: Tensor, d: Tensor, part: Tensor) -> Tensor:
    """A value between b and c: the order of operations is Pillow's."""
    step = a - b
    value = part * (d - (step + c))
    value += step * 2 + c - d
    value *= part
    value += c - a
    value *= part
    return value.add_(b)


def _linear(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    return (b - a) * part + a


def look_up(image: Tensor, tables: Tensor) -> Tensor:
    """Each value's entry in its channel's table, in the image's memory format; tables: [n or 1, 3,
    256] of any type.
    """
    first = torch.arange(0, tables.numel(), 256, device=image.device, dtype=torch.int32)
    index = image + first.view(-1, 3, 1, 1)
    in_memory = index.as_strided((index.numel(),), (1,))
    return tables.flatten().index_select(0, in_memory).as_strided(index.shape, index.stride())


def auto_contrast(image: Tensor) -> Tensor:
    """Each channel's values stretched to 0..255; one value alone stays."""
    low, high = (side(image.flatten(2), 2).double()[..., None] for side in (torch.amin, torch.amax))
    ramp = _ramp(image)
    scale = torch.full_like(high, 255) / (high - low)
    table = (ramp * scale + -low * scale).clamp(0, 255)
    return look_up(image, torch.where(high > low, table, ramp).to(torch.uint8))


def equalize(image: Tensor) -> Tensor:
    """Each channel's values spread so that all are about equally frequent."""
    count, _, height, width = image.shape
    bins = torch.arange(0, count * 3 * 256, 256, device=image.device).view(count, 3, 1)
    values = image.flatten(2)
    index = (values + bins).flatten()
    ones = torch.ones_like(index)
    histogram = torch.zeros(count * 3 * 256, dtype=torch.int64, device=image.device)
    histogram = histogram.scatter_add_(0, index, ones).view(count, 3, 256)
    last = histogram.gather(2, values.amax(2, keepdim=True).long())
    step = (height * width - last) // 255
    divisor = step.clamp(min=1)
    below = histogram.cumsum(2) - histogram
    table = ((step // 2 + below) // divisor).clamp(max=255)
    return look_up(image, torch.where(step > 0, table, _ramp(image)).to(torch.uint8))


def _ramp(image: Tensor) -> Tensor:
    return torch.arange(256, device=image.device)


def color(image: Tensor, factor: Tensor) -> Tensor:
    """Towards or away from the image's greys; factor: float64 [n]."""
    return _blend(_grey(image)[:, None], image, factor)


def contrast(image: Tensor, factor: Tensor) -> Tensor:
    """Towards or away from the mean of the image's greys; factor: float64 [n]."""
    grey = _grey(image).flatten(1)
    count = grey.shape[1]
    mean = (2 * grey.sum(1) + count) // (2 * count)  # rounded
    return _blend(_column(mean)[:, None], image, factor)


def sharpness(image: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the image smoothed by [1 1 1; 1 5 1; 1 1 1] / 13; factor as above."""
    one, five = (float(np.float32(weight / 13)) for weight in (1, 5))
    side, middle = image * one, image * five
    left, right = side[..., :-2], side[..., 2:]
    outer = left + side[..., 1:-1] + right
    inner = left + middle[..., 1:-1] + right
    # from the lowest row to the highest
    inside = outer[..., 2:, :] + 0.5 + inner[..., 1:-1, :] + outer[..., :-2, :]
    smooth = image.clone()
    smooth[..., 1:-1, 1:-1] = inside.clamp(0, 255).to(torch.uint8)
    return _blend(smooth, image, factor)


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image.int().unbind(1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(start: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    start = start.float()
    change = (image - start) * factor.float().view(-1, 1, 1, 1)
    return (start + change).clamp(0, 255).to(torch.uint8)


def flip_horizontal(image: Tensor) -> Tensor:
    """Left becomes right."""
    return image.flip(3)


def flip_vertical(image: Tensor) -> Tensor:
    """Top becomes bottom."""
    return image.flip(2)


def erase(image: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    """Float32 images [n, 3, S, S] with a box of each overwritten.

    boxes: int64 [n, 8] of top, left, height, width, the box's first value in `noise`, and how far
    apart there its channels, rows and columns are (0: one value for all).
    """
    top, left, height, width, start, *strides = (_column(numbers) for numbers in boxes.unbind(1))
    x = torch.arange(image.shape[3], device=image.device) - left  # [n, 1, S]
    y = torch.arange(image.shape[2], device=image.device)[:, None] - top  # [n, S, 1]
    channel = torch.arange(3, device=image.device).view(3, 1, 1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # [n, S, S]
    first = start + y * strides[1] + x * strides[2]
    index = first[:, None] + channel * strides[0][:, None]  # [n, 3, S, S]
    values = noise[index.clamp_(0, len(noise) - 1)]
    return torch.where(inside[:, None], values, image)


def _column(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1)


# In this order pairs of effects seldom need what takes longest, affine_bicubic, more than twice.
EFFECTS: dict[str, Callable[..., Tensor]] = {
    "flip_horizontal": flip_horizontal,
    "flip_vertical": flip_vertical,
    "look_up": look_up,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "bilinear": affine_bilinear,
    "bicubic": affine_bicubic,
}
