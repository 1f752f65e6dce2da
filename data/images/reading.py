"""Opening images: a file of IMAGE_FORMATS -> RGB of 8 bits, or an error that names the file.

What Pillow's convert("RGB") makes of an image is kept, as in the original: transparency is dropped,
CMYK and palettes are converted, an orientation tag is not applied, only the first frame of an
animation counts. Grey of 16 bits alone is scaled (0..65535 -> 0..255, rounded), where Pillow would
cut everything above 255 off.
"""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
# All that Pillow is asked to try, whatever a file calls itself: other formats start programs (EPS:
# Ghostscript). A camera's MPO file opens as the JPEG that it is.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_LIMIT_LOCK = threading.Lock()


class CorruptImage(ValueError):
    """An image that can't be decoded; the message names it."""


def read_rgb(source: Path | str | bytes, max_pixels: int, name: str = "") -> Image.Image:
    """Decode an image file, or the bytes of one, to RGB.

    A file that can't be read at all is a plain ValueError: unlike what CorruptImage stands for,
    that may change from run to run.
    """
    name = name or str(source)
    data = source if isinstance(source, bytes) else _bytes_of(source)
    try:
        image = _opened(data)
        if image.width * image.height > max_pixels:
            raise CorruptImage(
                f"{name}: {image.width} x {image.height} pixels are more than DATA.MAX_PIXELS ="
                f" {max_pixels}: raise that limit if you trust the file"
            )
        image.load()
        return _as_rgb(image)
    except (MemoryError, CorruptImage):
        raise
    except Exception as error:  # decoders raise nearly anything when they meet garbage
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = f"it is no {', '.join(IMAGE_FORMATS)} file" if unknown else error
        raise CorruptImage(f"{name}: can't be decoded ({reason}): restore the file") from error


def warn(text: str) -> None:
    """A line for the user, on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _bytes_of(path: Path | str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: the file is gone: restore it, or, if the data has changed, set DATA.REINDEX"
            " True once"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path}: can't be read ({error.strerror}): see to its permissions and its disk"
        ) from error


def _opened(data: bytes) -> Image.Image:
    """The image with only its header read.

    Pillow's limit on pixels, a process-wide setting, gives way: DATA.MAX_PIXELS is judged.
    """
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        with _LIMIT_LOCK:
            limit = Image.MAX_IMAGE_PIXELS
            Image.MAX_IMAGE_PIXELS = None
            try:
                return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # some versions of Pillow open 16-bit grey as 32-bit
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # Pillow warns if it converts such an image in one step
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
