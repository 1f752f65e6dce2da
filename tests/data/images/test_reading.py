"""Opening images: every kind becomes RGB of 8 bits as in the original, or a named error."""

import ast
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from data.images.reading import IMAGE_FORMATS, CorruptImage, read_rgb
from tests.support.images import encoded, picture

LIMIT = 10**6
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def pixels(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_rgb(data, LIMIT, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(9, 7), (1, 1)])
def test_rgb_is_what_pillow_decodes(kind, size, tmp_path):
    data = encoded(picture(3, size), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (pixels(data) == expected).all()
    assert kind == "JPEG" or (expected == np.asarray(picture(3, size))).all()
    (tmp_path / "a.any").write_bytes(data)
    assert (np.asarray(read_rgb(tmp_path / "a.any", LIMIT)) == expected).all()


def test_grey_and_black_and_white():
    assert (pixels(encoded(Image.fromarray(GREY))) == GREY[..., None]).all()
    assert (pixels(encoded(Image.fromarray(GREY), transparency=8)) == GREY[..., None]).all()
    bits = Image.fromarray(GREY).convert("1")
    assert (pixels(encoded(bits)) == np.asarray(bits)[..., None] * 255).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_dropped_not_blended(mode):
    image = picture(1).convert(mode)
    image.putalpha(Image.fromarray(np.asarray(picture(2))[..., 0]))
    assert (pixels(encoded(image)) == np.asarray(image)[..., :-1]).all()


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"transparency": bytes(range(50))}])
def test_palettes_with_and_without_transparency(options):
    image = picture(1).convert("P", palette=Image.Palette.ADAPTIVE, colors=50)
    data = encoded(image, **options)
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert (pixels(data) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_as_pillow_does(kind):
    data = encoded(picture(5).convert("CMYK"), kind)
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == "CMYK" and (pixels(data) == np.asarray(opened.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "PGM", "TIFF"])
def test_16_bit_grey_is_scaled_not_cut_off(kind):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = b"P5 256 256 65535\n" + values.astype(">u2").tobytes()
    if kind != "PGM":
        data = encoded(Image.fromarray(values), kind)
    assert (pixels(data) == np.rint(values / 257)[..., None]).all()


def test_an_orientation_tag_is_not_applied_as_in_the_original():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(picture(1), "PNG", exif=exif)
    assert (pixels(data) == np.asarray(picture(1))).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that ends after saying its size."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    sized = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + sized + struct.pack(">I", 99) + b"IDAT"


@pytest.mark.parametrize("side", [1001, 9500, 20000, 100000])
def test_a_huge_image_is_refused_before_it_is_decoded(side):
    message = f"a/huge.png: {side} x {side} pixels are more than DATA.MAX_PIXELS = 1000000"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, above 89 million pixels
        with pytest.raises(CorruptImage, match=message):
            read_rgb(png_header(side, side), LIMIT, "a/huge.png")


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("pillows_limit", [10, 40])
def test_our_limit_counts_above_pillows_which_stays_as_it_was(monkeypatch, pillows_limit, action):
    # it warns at 40 of 63 pixels and refuses at 10
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        assert np.asarray(read_rgb(encoded(picture(1)), 63)).shape == (7, 9, 3)
        with pytest.raises(CorruptImage, match="9 x 7 pixels are more than DATA.MAX_PIXELS = 62"):
            read_rgb(encoded(picture(1)), 62, "x")
    assert pillows_limit == Image.MAX_IMAGE_PIXELS


JPEG = encoded(picture(1, (200, 150)), "JPEG", quality=95)
BROKEN = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "headless.jpg": JPEG[2:],
    "empty.jpg": b"",
    "text.jpg": b"<html>not found</html>",
    "zeros.jpg": bytes(5000),
    "truncated.png": encoded(picture(1, (100, 100)))[:2000],
    "damaged.png": encoded(picture(1))[:60] + b"\xff" * 40 + encoded(picture(1))[100:],
    "truncated.webp": encoded(picture(1, (100, 100)), "WEBP")[:300],
    "truncated.bmp": encoded(picture(1), "BMP")[:100],
    "truncated.ppm": encoded(picture(1), "PPM")[:50],
    "truncated.tiff": encoded(picture(1), "TIFF")[:60],
}


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow's, before it gives up
@pytest.mark.parametrize("name", BROKEN)
def test_a_corrupt_image_is_an_error_that_names_it(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    for source, shown in ((tmp_path / name, ""), (BROKEN[name], f"some.tar: {name}")):
        with pytest.raises(CorruptImage, match=rf"{name}: can't be decoded \(.*\)") as error:
            read_rgb(source, LIMIT, shown)
        assert str(error.value).startswith(shown or str(source)) and "\n" not in str(error.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    ("name", "message"), [("a.jpg", "the file is gone"), ("", "can't be read")]
)
def test_a_file_that_is_gone_or_unreadable_is_no_corrupt_image(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as error:
        read_rgb(tmp_path / name, LIMIT)
    assert not isinstance(error.value, CorruptImage)


def test_a_file_that_calls_itself_an_image_starts_no_program(tmp_path, monkeypatch):
    """Pillow hands EPS files to Ghostscript, whatever their names are."""
    marker = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    evil = encoded(picture(1), "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it looks for the program once
    with pytest.raises(OSError):  # the test itself is able to start it
        Image.open(io.BytesIO(evil)).load()
    assert marker.exists()
    marker.unlink()
    (tmp_path / "evil.jpg").write_bytes(evil)
    for source in (tmp_path / "evil.jpg", evil):
        with pytest.raises(CorruptImage, match=r"evil.jpg: can't be decoded \(it is no JPEG, PNG"):
            read_rgb(source, LIMIT, str(tmp_path / "evil.jpg"))
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PCX", "SGI", "TGA", "DDS", "GIF"])
def test_no_format_but_those_that_are_named_is_tried(kind):
    assert set(IMAGE_FORMATS) == {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"}
    data = encoded(picture(1, (32, 32)), kind)
    if kind in IMAGE_FORMATS:
        assert pixels(data).shape == (32, 32, 3)
        return
    with pytest.raises(CorruptImage, match="it is no JPEG"):
        pixels(data)


def test_a_cameras_file_of_several_pictures_is_the_jpeg_that_it_is():
    """Pillow calls it MPO once it is open, so a look at the format afterwards would refuse it."""
    first, second = picture(1, (64, 48)), picture(2, (32, 24))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    opened = Image.open(io.BytesIO(data), formats=["JPEG"])
    assert (opened.format, opened.n_frames) == ("MPO", 2)
    assert (pixels(data) == np.asarray(opened.convert("RGB"))).all()


def test_every_image_that_the_product_opens_is_of_a_stated_format(root):
    folders = ("configs", "data", "models", "tools", "benchmarks")
    files = [
        *root.glob("*.py"),
        *(path for name in folders for path in (root / name).rglob("*.py")),
    ]
    calls = [
        (path.name, {keyword.arg for keyword in node.keywords})
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert calls and all("formats" in keywords for _, keywords in calls), calls


def test_out_of_memory_is_not_taken_for_a_corrupt_image(monkeypatch):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        read_rgb(encoded(picture(1)), LIMIT, "x")
