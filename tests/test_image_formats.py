"""The first bytes of a file tell what it is, whatever its name says."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from peco_ds.data.decode import image_kind
from peco_ds.data.image_formats import HEAD_BYTES, contradicts, is_decoded, kind_of, suffix_of, without_suffix

PIXELS = Image.fromarray(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_what_pillow_writes_is_known_and_decoded(name):
    file = io.BytesIO()
    PIXELS.save(file, name)
    assert kind_of(file.getvalue()[:HEAD_BYTES]) == name and is_decoded(name)
    image_kind(file.getvalue())
    assert not contradicts(f"x.{name}", name) and contradicts("x", name) and contradicts("x.jpg_large", name)


@pytest.mark.parametrize("name, kind", [("AVIF", "AVIF image"), ("JPEG2000", "JPEG 2000 image"), ("DDS", None)])
def test_other_images_are_known_and_not_decoded(name, kind):
    file = io.BytesIO()
    PIXELS.save(file, name)
    found = kind_of(file.getvalue()[:HEAD_BYTES])
    assert found.endswith("image") and found == (kind or found) and not is_decoded(found)


@pytest.mark.parametrize(
    "head, kind",
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIF image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF image"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "film"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL image"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "SVG image"),
        (b"PK\x03\x04rest", "archive"),
        (b"\x1f\x8b\x08rest", "archive"),
        # text that begins as the signature of an image does
        (b"BMW and other makes of cars", ""),
        (b"P1 is the first of the parts", ""),
        (b"<html><body>404</body></html>", ""),
        (b"", ""),
    ],
)
def test_what_is_no_image_to_take_is_told_apart(head, kind):
    assert kind_of(head) == kind


def test_a_tar_is_known():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    assert kind_of(file.getvalue()[:HEAD_BYTES]) == "tar"


def test_only_the_suffix_of_an_image_is_cut_off():
    cut = {name: without_suffix(name) for name in ("a/b.JPEG", "b.c.jpg", "v1.5", "e", ".jpg", "d.jpg_large", "x.y/z")}
    assert cut == {
        "a/b.JPEG": "a/b",
        "b.c.jpg": "b.c",
        "v1.5": "v1.5",
        "e": "e",
        ".jpg": ".jpg",
        "d.jpg_large": "d.jpg_large",
        "x.y/z": "x.y/z",
    }
    assert suffix_of("a.b/c") == "" and suffix_of("a/.jpg") == "" and suffix_of("a/c.TIF") == ".tif"
