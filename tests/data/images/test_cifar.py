"""CIFAR in torchvision's files: a small one of the true format, served and downloaded."""

import contextlib
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.images import datasets as datasets_module
from tests.support.images import built


def encoded_batches(names: dict[str, int], label_key: str, classes: int):
    """Files of so many images, with labels that follow from the number within the file."""
    rng = np.random.Generator(np.random.PCG64(0))
    for name, count in names.items():
        images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = (np.arange(count) * 7 % classes).tolist()
        yield (
            name,
            images,
            labels,
            pickle.dumps({"data": images.reshape(count, -1), label_key: labels}),
        )


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, monkeypatch):
    """The archive, what torchvision knows about it, and by split the images and class names."""
    datasets = pytest.importorskip("torchvision.datasets")
    if request.param == "cifar10":
        kind, labels, meta, names = datasets.CIFAR10, "labels", "batches.meta", "label_names"
        counts = {"data_batch_1": 20, "data_batch_2": 15, "test_batch": 12}
    else:
        kind, labels, meta, names = datasets.CIFAR100, "fine_labels", "meta", "fine_label_names"
        counts = {"train": 35, "test": 12}
    classes = [f"kind{i:02d}" for i in range(int(request.param.removeprefix("cifar")))]
    batches = list(encoded_batches(counts, labels, len(classes)))
    files = {name: data for name, *_, data in batches}
    files[meta] = pickle.dumps({names: classes})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    *train, test = ([name, md5(data)] for name, *_, data in batches)
    known = {"filename": meta, "key": names, "md5": md5(files[meta])}
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [test])
    monkeypatch.setattr(kind, "meta", known)
    monkeypatch.setattr(kind, "tgz_md5", md5(buffer.getvalue()))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    expected = {}
    for split, some in (("train", batches[:-1]), ("val", batches[-1:])):
        images = np.concatenate([images for _, images, *_ in some]).transpose(0, 2, 3, 1)
        expected[split] = images, [classes[label] for _, _, labels, _ in some for label in labels]
    return SimpleNamespace(
        name=request.param, kind=kind, archive=buffer.getvalue(), classes=classes, expected=expected
    )


@contextlib.contextmanager
def served(folder: Path, cifar, archive: bytes, monkeypatch):
    """A server of the archive."""
    folder.mkdir()
    (folder / cifar.kind.filename).write_bytes(archive)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/{cifar.kind.filename}"
        monkeypatch.setattr(cifar.kind, "url", address)
        yield
        server.shutdown()


def test_cifar_from_a_download(cifar, tmp_path, monkeypatch):
    root = tmp_path / "data"
    data = {"DATASET": cifar.name, "DATA_PATH": root}
    with pytest.raises(ValueError, match="no such file or folder; .*DATA.DOWNLOAD True to fetch"):
        built("train", **data)
    root.mkdir()
    with pytest.raises(ValueError, match=f"{cifar.name} is not there, or damaged .*DOWNLOAD True"):
        built("train", **data)
    root.rmdir()
    with served(tmp_path / "server", cifar, cifar.archive, monkeypatch):
        built("train", **data, DOWNLOAD=True)
    for split in ("train", "val"):  # now without a server
        images, names = cifar.expected[split]
        for path in (root, root / cifar.kind.base_folder):
            dataset = built(split, DATASET=cifar.name, DATA_PATH=path)
            assert len(dataset) == len(images) and dataset.class_names == cifar.classes
            keys = list(dataset.get_keys())
            assert keys == sorted(f"{name}/{i:05d}" for i, name in enumerate(names))
            packed = pickle.dumps(dataset)
            again = pickle.loads(packed)
            assert len(packed) < 1000
            for i, key in enumerate(keys):
                image, label = again[i]
                assert (np.asarray(image) == images[int(key.split("/")[1])]).all()
                assert cifar.classes[label] == key.split("/")[0]
    damaged = root / cifar.kind.base_folder / cifar.kind.train_list[-1][0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{cifar.name} is not there, or damaged"):
        built("train", **data)


def test_decoded_images_that_are_not_as_they_were_kept_are_decoded_again(cifar, tmp_path, capsys):
    with tarfile.open(fileobj=io.BytesIO(cifar.archive)) as tar:
        tar.extractall(tmp_path)

    def pixels() -> list[bytes]:
        dataset = built("train", DATASET=cifar.name, DATA_PATH=tmp_path)
        return [image.tobytes() for image, _ in dataset]

    expected = pixels()
    array = built("train", DATASET=cifar.name, DATA_PATH=tmp_path).path
    data = array.read_bytes()
    array.write_bytes(data[:128] + data[131:-32] + data[128:131] + data[-32:])
    assert pixels() == expected
    assert capsys.readouterr().err.startswith(f"warning: {array}: it is not as it was written")


def test_decoded_images_that_can_not_be_kept_are_named(cifar, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    with tarfile.open(fileobj=io.BytesIO(cifar.archive)) as tar:
        tar.extractall(tmp_path)
    monkeypatch.setattr(datasets_module, "save_array", refuse)
    with pytest.raises(ValueError, match=r"can't be kept there \(No space left on device\)"):
        built("train", DATASET=cifar.name, DATA_PATH=tmp_path)


def test_a_damaged_download_is_an_error(cifar, tmp_path, monkeypatch):
    with served(tmp_path / "server", cifar, cifar.archive[:-10], monkeypatch):
        with pytest.raises(ValueError, match=f"{cifar.name} is not there, or damaged"):
            built("train", DATASET=cifar.name, DATA_PATH=tmp_path / "data", DOWNLOAD=True)
