"""Plans + images -> a batch of training tensors on any device, with the bits of pillow.py.

`pack` runs in a loader process: it cuts the crops out and puts them, with the plans' numbers, in
one buffer. `apply_batch` runs where that buffer is sent; it never waits for the device, and how
many operations it starts does not depend on the number of images, up to the limit below."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, cos, prod, radians, sin
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from data.augment import device_effects, pillow
from data.augment.plan import (
    ColorJitter,
    Crop,
    Effect,
    Flip,
    PaddedCrop,
    Plan,
    RandomErasing,
    RandomResizedCrop,
    Shift,
)
from data.augment.randaugment import AutoAugment, RandAugment
from data.augment.shift import Color

# Pixels of a crop above which Pillow resizes it before it travels; a side counts as no shorter than
# the result's.
LARGE = 1 << 20
# Pixels worked on at a time. They take up to 120 bytes each, and four times as many where they are
# moved: about a gigabyte.
AT_ONCE = 1 << 23
ALIGNMENT = 16  # bytes, of arrays in a buffer
OPS = (RandomResizedCrop, PaddedCrop, Flip, RandAugment, AutoAugment, ColorJitter, RandomErasing)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
POINTWISE = ("Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness")
WITH_FACTOR = ("Color", "Contrast", "Sharpness")
WHOLE = ("AutoContrast", "Equalize")
# an image of all values
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2))


class Place(NamedTuple):
    """Where in a buffer an array lies."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Step(NamedTuple):
    """One operation on some images of a batch."""

    name: str
    images: Place  # int64 [n], their positions in the batch
    arguments: tuple[Place, ...]  # [n, ...] each
    limits: tuple[int, ...] = ()


@dataclass
class PackedBatch:
    """What a batch needs on the device, in one buffer; it can be pickled, pinned and sent."""

    count: int
    size: int
    buffer: Tensor  # uint8
    values: Place  # float32 [3, 256]: what a channel's 256 values become
    resizes: list[Step]
    effects: list[Step]
    erasures: list[Step]
    others: dict[str, Place]  # what else of the batch travels in the buffer

    def __getitem__(self, place: Place) -> Tensor:
        size = prod(place.shape) * place.dtype.itemsize
        part = self.buffer[place.offset : place.offset + size]
        return part.view(place.dtype).view(place.shape)

    def pin_memory(self) -> "PackedBatch":
        """The same in memory that a GPU reads by itself."""
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """The same on a device, sent as one copy."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=non_blocking))


def apply_batch(packed: PackedBatch) -> Tensor:
    """The training tensors, float32 [B, 3, S, S], where the packed batch is."""
    if packed.resizes:
        shape = (packed.count, 3, packed.size, packed.size)
        images = torch.empty(shape, dtype=torch.uint8, device=packed.buffer.device)
    else:
        pixels = Place(0, torch.uint8, (packed.count, packed.size, packed.size, 3))
        images = packed[pixels].permute(0, 3, 1, 2)
    if packed.effects:  # which write to it
        images = images.contiguous()
    for step in packed.resizes:
        pixels, crops = (packed[place] for place in step.arguments)
        resized = device_effects.resize(pixels, crops, packed.size, step.limits)
        images.index_copy_(0, packed[step.images], resized)
    for step in packed.effects:
        chosen = packed[step.images]
        arguments = [packed[place] for place in step.arguments]
        changed = device_effects.EFFECTS[step.name](images[chosen], *arguments)
        images.index_copy_(0, chosen, changed)
    output = device_effects.look_up(images, packed[packed.values])
    for step in packed.erasures:
        chosen = packed[step.images]
        boxes, noise = (packed[place] for place in step.arguments)
        output.index_copy_(0, chosen, device_effects.erase(output[chosen], boxes, noise))
    return output


def unsupported(decoder) -> str | None:
    """The name of something in a recipe that has no form on the device."""
    if not hasattr(decoder, "plan"):
        return type(decoder).__name__
    ops = [decoder.crop, *decoder.flips, *decoder.effects, decoder.erasing]
    for op in ops:
        if op is not None and type(op) not in OPS:
            return type(op).__name__
    known = {*GEOMETRIC, *POINTWISE, *WITH_FACTOR, *WHOLE}
    return next((name for name in pillow.EFFECTS if name not in known), None)


def differing_operation(
    decoder, cases: Sequence[tuple[Image.Image, int]], device: torch.device
) -> str | None:
    """What a device computes otherwise than Pillow, for some (image, seed); None if nothing."""
    images, seeds = zip(*cases)
    batch = apply_batch(decoder.pack(images, seeds).to(device)).cpu()
    for image, seed, found in zip(images, seeds, batch):
        plan = decoder.plan(*image.size, seed)
        if torch.equal(found, decoder.apply(plan, image)):
            continue
        # The first part of the plan with which the two differ.
        for count, name in enumerate(["the crop", *map(str, plan.effects), "erasing"]):
            part = replace(plan, effects=plan.effects[:count])
            if name != "erasing":
                part = replace(part, erasures=())
            settings = decoder.fill, decoder.mean, decoder.std
            again = apply_batch(pack([part], [image], *settings).to(device)).cpu()[0]
            if not torch.equal(again, decoder.apply(part, image)):
                return name
        return "a batch of several images"
    return None


def pack(
    plans: Sequence[Plan],
    images: Iterable[Image.Image],
    fill: Color,
    mean: pillow.Statistics,
    std: pillow.Statistics,
    others: Mapping[str, Tensor] = MappingProxyType({}),
) -> PackedBatch:
    """What `apply_batch` needs of images and their plans; the rest is as in `pillow.apply`."""
    size = plans[0].size
    crops = [cut(pillow.as_rgb(image), plan.crop, size) for plan, image in zip(plans, images)]
    buffer = bytearray().join(crop.tobytes() for crop in crops)
    resizes = _resizes(plans, crops, buffer)
    effects = _effects(plans, fill, buffer)
    erasures = _erasures(plans, buffer)
    values = _add(pillow.to_float(RAMP, mean, std)[:, 0].numpy(), buffer)
    places = {name: _add(tensor.numpy(), buffer) for name, tensor in others.items()}
    packed = torch.frombuffer(buffer, dtype=torch.uint8)
    return PackedBatch(len(plans), size, packed, values, resizes, effects, erasures, places)


def _add(values: npt.ArrayLike, buffer: bytearray) -> Place:
    """Append an array to the buffer."""
    array = np.ascontiguousarray(values)
    buffer += bytes(-len(buffer) % ALIGNMENT)
    place = Place(len(buffer), torch.from_numpy(array).dtype, array.shape)
    buffer += array.tobytes()
    return place


def _resizes(plans: Sequence[Plan], crops: list[Image.Image], buffer: bytearray) -> list[Step]:
    """Steps that resize crops, those of like size together; their pixels fill the buffer."""
    size = plans[0].size
    if all(crop.size == (size, size) for crop in crops):
        return []
    pixels = Place(0, torch.uint8, (len(buffer) // 3, 3))
    starts = accumulate((crop.width * crop.height for crop in crops), initial=0)
    rows = [
        (start, *crop.size, plan.crop.filter == "bicubic")
        for start, crop, plan in zip(starts, crops, plans)
    ]
    rest = sorted(range(len(crops)), key=lambda i: max(crops[i].size), reverse=True)
    steps = []
    while rest:
        longest = max(*crops[rest[0]].size, size)
        chunk = _parts(rest, longest**2)[0]
        rest = rest[len(chunk) :]
        widest, highest = np.max([crops[i].size for i in chunk], axis=0).tolist()
        limits = (widest, highest, 2 * ceil(2 * longest / size) + 1)
        arguments = (pixels, _add([rows[i] for i in chunk], buffer))
        steps.append(Step("resize", _add(chunk, buffer), arguments, limits))
    return steps


def cut(image: Image.Image, crop: Crop | Shift, size: int) -> Image.Image:
    """The part of an image that is seen, resized already if that is not left to the device."""
    if isinstance(crop, Shift) or max(crop.width, size) * max(crop.height, size) > LARGE:
        return pillow.cropped(image, crop, size)
    return image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))


def _parts(images: list[int], pixels: int) -> list[list[int]]:
    """Images of so many pixels in groups to be worked on at a time."""
    most = max(1, AT_ONCE // pixels)
    return [images[start : start + most] for start in range(0, len(images), most)]


def _effects(plans: Sequence[Plan], fill: Color, buffer: bytearray) -> list[Step]:
    """Steps that do what each plan says in its order, for all images that are due together."""
    size = plans[0].size
    queues = []
    for plan in plans:
        flips = [(f"flip_{axis}", ()) for axis in plan.flips]
        queues.append(deque(flips + [_operation(effect, size, fill) for effect in plan.effects]))
    steps = []
    while any(queues):
        for name in device_effects.EFFECTS:
            due = [i for i, queue in enumerate(queues) if queue and queue[0][0] == name]
            for part in _parts(due, 4 * size**2 if name in pillow.RESAMPLING else size**2):
                columns = zip(*(queues[i].popleft()[1] for i in part))
                arguments = tuple(_add(column, buffer) for column in columns)
                steps.append(Step(name, _add(part, buffer), arguments))
    return steps


def _operation(effect: Effect, size: int, fill: Color) -> tuple[str, tuple]:
    """The operation on the device that an effect is, and its arguments there."""
    if effect.name in GEOMETRIC:
        return effect.filter, ((*_matrix(effect, size), *fill),)
    if effect.name in POINTWISE:
        changed = pillow.EFFECTS[effect.name](RAMP, effect, fill)
        return "look_up", (np.asarray(changed)[0].T,)
    if effect.name in WITH_FACTOR:
        return effect.name, (effect.argument,)
    if effect.name in WHOLE:
        return effect.name, ()
    raise ValueError(f"the augmentation {effect.name} has no form on the device")


def _matrix(effect: Effect, size: int) -> tuple[float, ...]:
    """Where pixel (x, y) of a size x size image comes from: (a x + b y + c, d x + e y + f)."""
    name, argument, _ = effect
    if name == "ShearX":
        return 1, argument, 0, 0, 1, 0
    if name == "ShearY":
        return 1, 0, 0, argument, 1, 0
    if name == "TranslateXRel":
        return 1, 0, argument * size, 0, 1, 0
    if name == "TranslateYRel":
        return 1, 0, 0, 0, 1, argument * size
    # as Image.rotate rounds it
    angle, centre = -radians(argument % 360), size / 2
    cosine, sine = round(cos(angle), 15), round(sin(angle), 15)
    c = cosine * -centre + sine * -centre + centre
    f = -sine * -centre + cosine * -centre + centre
    return cosine, sine, c, -sine, cosine, f


def _erasures(plans: Sequence[Plan], buffer: bytearray) -> list[Step]:
    """Steps that write the first box of each image, then each second one, ..."""
    noise = [np.zeros(1, np.float32)]  # what boxes without pixels point to
    start = 1
    parts = []
    for number in range(max(len(plan.erasures) for plan in plans)):
        due = [i for i, plan in enumerate(plans) if len(plan.erasures) > number]
        for part in _parts(due, plans[0].size ** 2):
            boxes = []
            for box in (plans[i].erasures[number] for i in part):
                values = pillow.noise(box)
                strides = values.expand(3, box.height, box.width).stride()
                boxes.append((*box[:4], start, *strides))
                noise.append(values.numpy().ravel())
                start += values.numel()
            parts.append((part, boxes))
    everything = _add(np.concatenate(noise), buffer)
    return [
        Step("erase", _add(part, buffer), (_add(boxes, buffer), everything))
        for part, boxes in parts
    ]
