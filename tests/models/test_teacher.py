"""A teacher's answers: which outputs, in which precision, and what tells it from others."""

import re
from copy import deepcopy
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from configs import load_config
from models.class_map import map_22k_to_1k
from models.pretrained import weights_digest
from models.teacher import Teacher, teacher_dtype
from tests.support.teachers import Glance


def test_labels_of_1k_in_a_part_of_22k():
    """The 22k positions of three 1k classes, in another order: the 1k data's labels follow."""
    positions = map_22k_to_1k()[[5, 3, 900]]
    teacher = Teacher("", nn.Identity(), 21841, positions.tolist())
    label_map, _ = teacher.label_map(1000)
    assert label_map.labels(torch.tensor([5, 3, 900, 4, -1])).tolist() == [0, 1, 2, -1, -1]
    logits = torch.zeros(1, 21841)
    logits[0, int(positions[1])] = 1
    assert label_map.logits(teacher(logits)).argmax() == 3


def test_classes_are_found_by_the_names_of_its_checkpoint(tmp_path):
    opts = "--opts MODEL.TYPE timm MODEL.NAME test_resnet MODEL.NUM_CLASSES 3 --resume".split()
    cfg = load_config([*opts, str(tmp_path / "named.pth")])
    names = ["cat", "dog", "owl"]
    weights = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({"model": weights, "class_names": names}, tmp_path / "named.pth")
    teacher = Teacher.from_config(cfg, torch.device("cpu"))
    label_map, _ = teacher.label_map(3, ["owl", "cat", "dog"])
    assert label_map.outputs.tolist() == [2, 0, 1]


def test_a_part_of_the_classes_is_renormalised():
    kept = [7, 1, 4]
    images = torch.rand(3, 3, 8, 8)
    whole = torch.softmax(Teacher("", Glance(12), 12)(images).double(), -1)[:, kept]
    statistics = (0.5,) * 3, (0.2,) * 3
    teacher = Teacher("", Glance(12), 12, kept)
    indices, probs = teacher.in_the_loop(3, 1.0, statistics, statistics)(images)
    expected = (whole / whole.sum(-1, keepdim=True)).gather(1, indices)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-3, atol=1e-7)
    assert teacher.num_classes == 3


class Linears(nn.Module):
    """A body and a head."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Linear(8, 64)
        self.head = nn.Linear(64, 50)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, images):
        return self.head(self.body(images))


def test_a_head_stays_in_float32_under_autocast():
    """bfloat16 stands in for float16, which the CPU's autocast has for few operations."""
    model = Linears()
    images = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.body(images)
    expected = nn.functional.linear(features.float(), model.head.weight, model.head.bias).detach()
    found = Teacher("", model, 50, dtype=torch.bfloat16)(images)
    assert features.dtype == torch.bfloat16
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == ["body.weight", "body.bias", "head.weight", "head.bias"]


def test_float32_is_strict_for_the_teacher_alone():
    """Whatever a student computes with: saving, checking and training ask the same function."""
    seen = []

    def tf32() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    class Looks(Glance):
        def forward(self, images):
            seen.append(tf32())
            return super().forward(images)

    before = tf32()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        teacher = Teacher("", Looks(10), 10)
        statistics = (0.5,) * 3, (0.2,) * 3
        teacher(torch.zeros(1, 3, 8, 8))
        teacher.in_the_loop(3, 1.0, statistics, statistics)(torch.zeros(1, 3, 8, 8))
        assert tf32() == (True, "high")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert seen == [(False, "highest")] * 2


class Convolves(nn.Module):
    """A patch embedding and, with `depth`, convolutions beyond it; notes how images lie."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.num_classes = 5
        sizes = [3, *[4] * depth, 5]
        self.layers = nn.Sequential(*(nn.Conv2d(*pair, 2, 2) for pair in pairwise(sizes)))
        self.seen: list[bool] = []

    def forward(self, images):
        self.seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return self.layers(images).mean((2, 3))


def convolves(cfg) -> nn.Module:
    torch.manual_seed(0)
    return Convolves(cfg.SEED)


LAST = {"memory_format": "channels_last"}


@pytest.mark.parametrize(
    ("opts", "dtype", "written", "expected"),
    [
        ("SEED 2", torch.bfloat16, None, LAST),
        ("SEED 0", torch.bfloat16, None, {}),  # as of a ViT
        ("SEED 2", None, None, {}),
        ("SEED 2 TRAIN.CHANNELS_LAST False", torch.bfloat16, None, {}),
        ("SEED 2", torch.bfloat16, {"name": "of before"}, {}),
        ("SEED 2", torch.bfloat16, LAST, LAST),
    ],
)
def test_channels_come_last_where_that_is_faster(opts, dtype, written, expected, monkeypatch):
    """bfloat16 on the CPU stands in for float16 on CUDA."""
    monkeypatch.setattr("models.teacher.teacher_dtype", lambda cfg, device: dtype)
    words = ["--opts", "MODEL.TYPE", f"{__name__}:convolves", *opts.split()]
    teacher = Teacher.from_config(load_config(words), torch.device("cpu"), written=written)
    identity = teacher.identity()
    assert {key: value for key, value in identity.items() if key == "memory_format"} == expected
    teacher(torch.zeros(2, 3, 16, 16))
    assert teacher.model.seen == [bool(expected)]


def test_weights_are_the_same_however_they_lie():
    model = Convolves(2)
    digest = weights_digest(model.state_dict())
    teacher = Teacher("", model, 5, memory_format=torch.channels_last)
    assert model.layers[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.layers[1].weight.is_contiguous()
    assert teacher.identity()["weights_sha256"] == digest


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (lambda logits: logits[:, :4], r"\[3, 4\]"),
        (lambda logits: logits[:2], r"\[2, 5\]"),
        (lambda logits: logits[..., None], r"\[3, 5, 1\]"),
        (lambda logits: (logits, logits), r"\['tuple'\]"),
        (lambda logits: {"logits": logits}, r"\['dict'\]"),
    ],
)
def test_an_answer_that_is_no_row_of_classes_an_image_is_refused(answer, shown):
    class Talks(Glance):
        def forward(self, images):
            return answer(super().forward(images))

    with pytest.raises(ValueError) as caught:
        Teacher("chatter", Talks(5), 5)(torch.zeros(3, 3, 8, 8))
    assert re.fullmatch(
        rf"the teacher chatter answered 3 images with {shown}, not with a tensor \[3, 5\]:"
        " correct the model or its class count",
        str(caught.value),
    )


def test_in_the_loop_it_sees_its_own_normalisation():
    teacher = Teacher("", Glance(10), 10)
    pixels = torch.rand(4, 3, 40, 40)
    own = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def normalised(statistics):
        mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
        return (pixels - mean) / std

    probs, classes = torch.softmax(teacher(normalised(own)) / 2, -1).sort(descending=True)
    for statistics in (own, ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))):
        found = teacher.in_the_loop(3, 2.0, statistics, own)(normalised(statistics))
        assert torch.equal(found[0], classes[:, :3])
        torch.testing.assert_close(found[1].float(), probs[:, :3], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("opts", "device", "expected"),
    [
        ("", "cpu", None),
        ("", "cuda", torch.float16),
        ("AMP_DTYPE bf16", "cuda", torch.float16),
        ("AMP_DTYPE off", "cuda", None),
        ("AMP_ENABLE False", "cuda", None),
        ("AMP_DTYPE fp16", "cpu", None),
    ],
)
def test_never_bfloat16(opts, device, expected):
    assert teacher_dtype(load_config(["--opts", *opts.split()]), torch.device(device)) == expected


def test_the_digest_of_weights_knows_names_shapes_and_values():
    moved = Glance(10)
    moved.head.bias.data[3] = moved.head.bias.data[3].nextafter(torch.tensor(9.0))
    half = nn.Linear(2, 3, bias=False).bfloat16()
    whole = deepcopy(half).float()
    models = [Glance(10), moved, Glance(10, seed=1), nn.Linear(2, 3), half, whole]
    digests = [weights_digest(model.state_dict()) for model in models]
    assert len(set(digests)) == len(digests) and len(digests[0]) == 64
    assert weights_digest(Glance(10).state_dict()) == digests[0]
