"""The executor for any device has Pillow's bits, in few steps, little memory, without waiting."""

import json
import pickle
import weakref
from collections import Counter
from dataclasses import replace
from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.augment import device, device_effects, pillow
from data.augment.device import apply_batch, unsupported
from data.augment.plan import Effect, Erasure
from data.augment.rng import choice, generator, integer, uniform
from tests.data.augment.test_decoder import decoder, digest, picture, random_recipe

SIDES = (16, 33, 224)
FILL = (124, 116, 104)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def drawn(rng, width: int, height: int) -> Image.Image:
    """Noise, black and white, one colour, slopes, or all values between two in each channel."""
    kind = integer(rng, 0, 4)
    y, x = np.mgrid[0:height, 0:width]
    low, high = np.sort(rng.integers(0, 256, (2, 3)), axis=0)
    pixels = [
        rng.integers(0, 256, (height, width, 3)),
        rng.integers(0, 2, (height, width, 3)) * 255,
        np.broadcast_to(rng.integers(0, 256, 3), (height, width, 3)),
        np.stack([255 * x // width, 255 * y // height, (x * y) % 200 + 28], axis=2),
        low + (y * width + x)[:, :, None] % (high - low + 1),
    ]
    return Image.fromarray(pixels[kind].astype(np.uint8))


def stack(images: list[Image.Image]) -> torch.Tensor:
    """uint8 [n, 3, S, S]"""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


# ---------------------------------------------------------------- each operation


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("case", range(4))
def test_crops_of_any_size_are_resized_as_by_pillow(size, case):
    rng = generator(case)
    sides = [(integer(rng, 1, 700), integer(rng, 1, 700)) for _ in range(10)]
    sides += [(1, 1), (700, 1), (1, 650), (2, 3), (size, size), (size, 5), (699, 698)]
    images = [drawn(rng, *side) for side in sides]
    filters = [choice(rng, ("bilinear", "bicubic")) for _ in images]
    expected = [
        pillow.resize(image, size, pillow.RESAMPLING[filter])
        for image, filter in zip(images, filters)
    ]
    pixels = [torch.from_numpy(np.array(image)).view(-1, 3) for image in images]
    starts = np.cumsum([0, *map(len, pixels)])
    crops = [
        (start, *side, filter == "bicubic") for start, side, filter in zip(starts, sides, filters)
    ]
    limits = (700, 700, 2 * ceil(2 * max(1, 700 / size)) + 1)
    resized = device_effects.resize(torch.cat(pixels), torch.tensor(crops), size, limits)
    assert torch.equal(resized, stack(expected))


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("name", sorted(pillow.EFFECTS))
def test_effects_have_pillows_bits(name, size):
    rng = generator(size)
    draws = {
        "Rotate": lambda: choice(rng, [0.0, -0.0, 90.0, -180.0, uniform(rng, -60, 60)]),
        "Posterize": lambda: integer(rng, -4, 9),
        "Solarize": lambda: integer(rng, -10, 300),
        "SolarizeAdd": lambda: integer(rng, 0, 250),
        **dict.fromkeys(device.WITH_FACTOR, lambda: choice(rng, [0, 1.0, uniform(rng, 0, 2.8)])),
    }
    draw = draws.get(name, lambda: uniform(rng, -1.1, 1.1))
    filters = ("bilinear", "bicubic") if name in device.GEOMETRIC else ("",)
    images = [drawn(rng, size, size) for _ in range(24)]
    effects = [Effect(name, draw(), choice(rng, filters)) for _ in images]
    expected = [pillow.EFFECTS[name](i, effect, FILL) for i, effect in zip(images, effects)]
    for image, effect, right in zip(stack(images), effects, stack(expected)):
        operation, arguments = device._operation(effect, size, FILL)
        tensors = [torch.as_tensor(np.array([argument])) for argument in arguments]
        assert torch.equal(device_effects.EFFECTS[operation](image[None], *tensors)[0], right)


# ---------------------------------------------------------------- whole batches


def apply_without_waiting(packed) -> torch.Tensor:
    """On a GPU, whatever makes the host wait for it raises."""
    if packed.buffer.device.type != "cuda":
        return apply_batch(packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        return apply_batch(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_golden_images(where, goldens):
    for entry in json.loads((goldens / "augment_index.json").read_text())["configs"].values():
        cases = np.load(goldens / entry["file"])
        names = cases["image"].tolist()
        files = {name: Image.open(goldens / "images" / name) for name in set(names)}
        ours = decoder(*entry["overrides"])
        packed = ours.pack([files[name] for name in names], cases["seed"].tolist())
        batch = apply_without_waiting(packed.to(where))
        assert [digest(image) for image in batch.cpu()] == cases["sha256"].tolist()


def some_sides(case: int) -> list[tuple[int, int]]:
    rng = generator(case)
    longest = (60, 300, 2000)[case % 3]
    sides = [(integer(rng, 1, longest), integer(rng, 1, longest)) for _ in range(2)]
    return [*sides, (integer(rng, 1, 8), integer(rng, 1, longest))]


def differing(case: int, where: str = "cpu") -> list:
    """The image-seeds of a drawn recipe, three of each size, that `decode` answers otherwise."""
    rng = generator(case)
    ours = decoder(*random_recipe(rng))
    images = [picture(*side) for side in some_sides(case) for _ in range(3)]
    seeds = [integer(rng, 0, 2**31 - 1) for _ in images]
    batch = ours.decode_batch(images, seeds, where).cpu()
    return [
        (case, image.size, seed)
        for image, seed, decoded in zip(images, seeds, batch)
        if not torch.equal(decoded, ours.decode(image, seed))
    ]


@pytest.mark.parametrize("part", range(8))
def test_any_recipe_size_and_seed(part):
    """8 x 7 x 9 image-seeds."""
    cases = range(7 * part, 7 * part + 7)
    assert [fault for case in cases for fault in differing(case)] == []


@NEEDS_GPU
def test_any_recipe_size_and_seed_on_a_gpu():
    assert [fault for case in range(56) for fault in differing(case, "cuda")] == []


@pytest.mark.proof
@pytest.mark.parametrize("part", range(1, 24))
def test_any_recipe_size_and_seed_many_times(part):
    """23 x 100 x 9 image-seeds."""
    cases = range(100 * part, 100 * part + 100)
    assert [fault for case in cases for fault in differing(case)] == []


def test_large_crops_travel_resized(monkeypatch):
    ours = decoder(*["DATA.IMG_SIZE", 48, "AUG.SCALE", (0.9, 1.0), "AUG.RATIO", (0.01, 200.0)])
    images = [picture(80, 60).resize(side) for side in ((4000, 3000), (40_000, 2), (90, 70))]
    packed = ours.pack(images * 2, range(6))
    assert packed.buffer.nbytes < 200_000
    assert torch.equal(apply_batch(packed), torch.stack([*map(ours.decode, images * 2, range(6))]))
    # The bits do not depend on who resizes, nor on how many are worked on at a time.
    monkeypatch.setattr(device, "LARGE", 1 << 24)
    monkeypatch.setattr(device, "AT_ONCE", 5_000)
    unresized = ours.pack(images * 2, range(6))
    assert len(unresized.resizes) > 4 and unresized.buffer.nbytes > 50_000_000
    assert torch.equal(apply_batch(unresized), apply_batch(packed))


def test_a_packed_batch_travels():
    ours = decoder("DATA.IMG_SIZE", 48, "AUG.REPROB", 1.0)
    images, seeds = [picture(60, 50).convert("L"), picture(30, 80)], [1, 2]
    packed = pickle.loads(pickle.dumps(ours.pack(images, seeds)))
    assert packed.count == 2
    batch = apply_batch(packed.to("cpu", non_blocking=True))
    assert torch.equal(batch, torch.stack([*map(ours.decode, images, seeds)]))


def test_a_box_without_pixels_erases_nothing():
    ours, image = decoder("DATA.IMG_SIZE", 48), picture(60, 50)
    plan = replace(ours.plan(60, 50, 3), erasures=(Erasure(0, 0, 0, 4, "pixel", 1),))
    batch = apply_batch(device.pack([plan], [image], ours.fill, ours.mean, ours.std))
    assert torch.equal(batch[0], ours.apply(plan, image))


def test_what_the_device_cannot_do_is_named(monkeypatch):
    class Grain:
        def draw(self, rng):
            return (Effect("Grain"),)

    ours = decoder()
    assert unsupported(ours) is None and unsupported(print) == "builtin_function_or_method"
    assert unsupported(replace(ours, effects=(Grain(),))) == "Grain"
    monkeypatch.setitem(pillow.EFFECTS, "Blur", lambda image, effect, fill: image)
    assert unsupported(ours) == "Blur"
    with pytest.raises(ValueError, match="Blur cannot be executed on a device"):
        ours.decode_batch([picture(9, 9)], [1])
    with pytest.raises(ValueError, match="Grain has no form on the device"):
        device._operation(Effect("Grain"), 48, FILL)


# ---------------------------------------------------------------- without a GPU, on fake tensors


class Watch(TorchDispatchMode):
    """Counts operations and the most bytes of new tensors that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.owners, self.bytes = Counter(), Counter(), {}
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            assert tensor.device.type == "cuda"
            storage = tensor.untyped_storage()
            if not operation.is_view:
                self.operations[operation] += 1
                self.bytes[storage._cdata] = storage.nbytes()
                self.peak = max(self.peak, sum(self.bytes.values()))
            self.owners[storage._cdata] += 1
            weakref.finalize(tensor, self._drop, storage._cdata)
        return result

    def _drop(self, storage: int) -> None:
        self.owners[storage] -= 1
        if not self.owners[storage]:
            self.bytes.pop(storage, None)


def watch(packed) -> Watch:
    """One batch on fake CUDA tensors, where waiting for a value raises."""
    with FakeTensorMode():
        fake = torch.empty(packed.buffer.shape, dtype=torch.uint8, device="cuda")
        with Watch() as watched:
            apply_batch(replace(packed, buffer=fake))
    return watched


def pack_many(size: int, count: int, sides: list[tuple[int, int]]):
    """A batch of the default recipe; the same 64 image-seeds again and again."""
    images = [picture(80, 60).resize(side) for side in sides]
    ours = decoder("DATA.IMG_SIZE", size)
    return ours.pack(
        [images[i % len(images)] for i in range(count)], [i % 64 for i in range(count)]
    )


def test_launches_do_not_depend_on_the_number_of_images():
    sides = [(120 + side, 90) for side in range(32)]
    few, many = (watch(pack_many(48, count, sides)) for count in (64, 512))
    assert few.operations == many.operations
    assert few.operations.total() < 500


def test_memory_is_limited():
    sides = [(4000, 3000), (1400, 700), *[(500, 375), (375, 500)] * 7]
    packed = pack_many(224, 384, sides)
    output = 384 * 3 * 224**2 * 5  # bytes, as uint8 and as float32
    assert watch(packed).peak - output < 1 << 30
