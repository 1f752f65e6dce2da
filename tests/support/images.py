"""Small image files and data sets for tests."""

import io
import json
import multiprocessing
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from configs import load_config
from data.images import build_dataset
from data.images.datasets import ListedImages


def config(*options: object):
    """A configuration with these keys and values."""
    return load_config(["--opts", *map(str, options)])


def built(split: str, *options: object, **more: object) -> ListedImages:
    """The data set of a config with these options; more: DATA.<KEY>=value."""
    pairs = [item for key, value in more.items() for item in (f"DATA.{key}", value)]
    return build_dataset(config(*options, *pairs), split)


def picture(number: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    """An RGB image that differs from number to number."""
    rng = np.random.Generator(np.random.PCG64(number))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root: Path, names: Sequence[str] | Mapping[str, bytes]) -> Path:
    """Files below a folder: given bytes, or for the i-th name picture(i)."""
    if not isinstance(names, Mapping):
        names = {name: encoded(picture(i)) for i, name in enumerate(names)}
    for name, data in names.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: Mapping[str, bytes | None], **options) -> Path:
    """A tar file; None makes a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return path


def write_parquet(path: Path, paths, images, labels=None, names=None, **columns) -> Path:
    """A file as Hugging Face writes it, two rows a group."""
    import pyarrow
    from pyarrow import parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [{"bytes": data, "path": path} for data, path in zip(images, paths)]
    table = {"image": pyarrow.array(values, kind), **columns}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        table["label"] = pyarrow.array(labels, pyarrow.int64())
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    told = json.dumps({"info": {"features": features}})
    table = pyarrow.table(table).replace_schema_metadata({"huggingface": told})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=2)
    return path


def write_zip(
    path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> Path:
    """A zip file."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.comment = comment
        for name, data in members.items():
            file.writestr(name, data)
    return path


def in_processes(function: Callable, count: int, *args, start: str = "fork") -> list:
    """What a module's own function returns in each of several processes that run at once."""
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    processes = [context.Process(target=_put, args=(queue, function, args)) for _ in range(count)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    return results


def _put(queue, function: Callable, args: tuple) -> None:
    queue.put(function(*args))
