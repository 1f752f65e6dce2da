"""Opening images: any file that Pillow reads -> RGB of 8 bits, or an error that names the file."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif")
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, struct.error, zlib.error, zipfile.BadZipFile)


class CorruptImage(ValueError):
    """An image that can't be decoded; the message names it."""


def read_rgb(source: Path | str | bytes, max_pixels: int, name: str = "") -> Image.Image:
    """Decode an image file, or the bytes of one, to RGB.

    Transparency is dropped, 16-bit grey is scaled to 8 bits, an orientation tag is not applied (the original does not either).
    """
    name = name or str(source)
    try:
        with _unlimited(), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > max_pixels:
                raise CorruptImage(f"{name}: {image.width} x {image.height} pixels are more than DATA.MAX_PIXELS = {max_pixels}: "
                                   "leave it out (DATA.EXCLUDE), or raise that limit if you trust the file")
            image.load()
            return _as_rgb(image)
    except CorruptImage:
        raise
    except FileNotFoundError:
        raise CorruptImage(f"{name}: the file is gone; if the data has changed, set DATA.REINDEX True once") from None
    except MemoryError:
        raise
    except _UNREADABLE as error:
        raise CorruptImage(f"{name}: can't be decoded ({error}): restore the file, leave it out (DATA.EXCLUDE), or set "
                           "DATA.ON_CORRUPT neighbour") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I"):  # 16-bit grey, which some versions of Pillow open as 32-bit
        return Image.fromarray((np.asarray(image).astype(np.uint32).clip(0, 65535) / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # Pillow warns if it converts such an image in one step
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


class _unlimited:
    """Pillow's own limit on pixels, a process-wide setting, is set aside while a file is opened: ours is judged instead."""

    _lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None

    def __exit__(self, *error: object) -> None:
        Image.MAX_IMAGE_PIXELS = self._limit
        self._lock.release()


class TarBytes:
    """Members of a tar file by offset, from any number of threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path, self._handle, self._owner = path, -1, 0

    def __getstate__(self) -> dict:
        return {"path": self.path, "_handle": -1, "_owner": 0}

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; a file that has become shorter is an error."""
        if self._owner != os.getpid():  # a handle inherited by fork would share its position
            self._handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._owner = os.getpid()
        data = os.pread(self._handle, size, offset) if hasattr(os, "pread") else self._seek_and_read(offset, size)
        if len(data) != size:
            raise CorruptImage(f"{self.path}: ends before byte {offset + size}: the tar is truncated, restore it")
        return data

    def _seek_and_read(self, offset: int, size: int) -> bytes:
        os.lseek(self._handle, offset, os.SEEK_SET)
        return os.read(self._handle, size)


class ZipFolder:
    """Members of many zip files in one folder; the most recently used ones stay open, for each process its own."""

    def __init__(self, folder: Path, limit: int = 64) -> None:
        self.folder, self.limit = folder, limit
        self._open: OrderedDict[str, zipfile.ZipFile] = OrderedDict()
        self._owner = os.getpid()

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "limit": self.limit, "_open": OrderedDict(), "_owner": 0}

    def read(self, archive: str, member: str) -> bytes:
        """The bytes of a member of `archive`."""
        if self._owner != os.getpid():
            self._open, self._owner = OrderedDict(), os.getpid()
        path = self.folder / archive
        try:
            if archive not in self._open:
                self._open[archive] = zipfile.ZipFile(path)
            self._open.move_to_end(archive)
            if len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
            return self._open[archive].read(member)
        except FileNotFoundError:
            raise CorruptImage(f"{path}: there is no such zip file: restore it, or take its class out of the list of names") from None
        except KeyError:
            raise CorruptImage(f"{path}: has no member {member}: DATA.FNAME_FORMAT must fit, or the name must leave the list") from None
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CorruptImage(f"{path}: member {member} can't be read ({error}): restore the zip file") from None


def warn(text: str) -> None:
    """A line for the user, on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
