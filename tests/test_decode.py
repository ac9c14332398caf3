"""Every kind of image file comes out as the upright RGB a person sees, or is refused with a reason."""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
import zlib
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision.io
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from peco_ds.data import decode
from peco_ds.data.decode import DecodeError, decode_rgb, image_kind


@pytest.fixture(scope="module")
def photograph(real_data) -> Image.Image:
    """A real image, small and not square, so that a wrong rotation shows."""
    return Image.open(real_data.kodak[0]).convert("RGB").resize((96, 64), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    decoded = decode_rgb(data)
    assert decoded.dtype == torch.uint8 and decoded.shape[0] == 3
    return decoded.permute(1, 2, 0).numpy().astype(int)


def worst(a, b) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def png_16_bit(samples: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG of [H, W, C] uint16, written from the specification because Pillow writes no 16-bit colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_ordinary_jpegs_decode_natively_to_what_pillow_gives(real_data):
    differences = []
    for path in real_data.imagenet[:60]:
        data = path.read_bytes()
        assert image_kind(data) == decode.ImageKind("jpg", plain=True, lossless=False)
        reference = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        differences.append(worst(pixels_of(data), reference))
    # 0 where both link the same libjpeg; another one may round the colour transform otherwise
    assert max(differences) <= 2


def test_the_native_path_is_the_one_ordinary_jpegs_take(real_data, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("ordinary JPEG went through Pillow")

    monkeypatch.setattr(decode.Image, "open", refuse)
    for path in real_data.imagenet[:20]:
        decode_rgb(path.read_bytes())


@pytest.fixture
def decode_by_pillow_alone(monkeypatch) -> ModuleType:
    """The module as it loads where torchvision has no decoder any more."""
    for name in ("decode_jpeg", "ImageReadMode"):
        monkeypatch.delattr(torchvision.io, name, raising=False)
    spec = importlib.util.spec_from_file_location("decode_by_pillow_alone", decode.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_without_torchvision_s_decoder_pillow_serves_the_same_images(real_data, decode_by_pillow_alone):
    for path in real_data.imagenet[:60]:
        data = path.read_bytes()
        decoded, native = decode_by_pillow_alone.decode_rgb(data), decode_rgb(data)
        assert decoded.dtype == torch.uint8 and decoded.shape == native.shape and decoded.stride() == native.stride()
        assert worst(decoded, native) <= 2  # as above
        assert decode_by_pillow_alone.image_kind(data).plain


def test_without_torchvision_s_decoder_a_jpeg_cut_short_is_still_refused(real_data, decode_by_pillow_alone):
    data = real_data.imagenet[0].read_bytes()
    for length in range(0, len(data) - 1, 997):
        with pytest.raises(decode_by_pillow_alone.DecodeError):
            decode_by_pillow_alone.decode_rgb(data[:length])


def test_grey_jpeg_gets_three_equal_channels(photograph):
    decoded = pixels_of(encoded(photograph.convert("L"), "JPEG", quality=95))
    assert worst(decoded[..., 0], decoded[..., 1]) == worst(decoded[..., 0], decoded[..., 2]) == 0
    assert np.abs(decoded[..., 0] - np.asarray(photograph.convert("L"), dtype=int)).mean() < 3


def test_cmyk_jpeg_is_not_a_negative(photograph):
    data = encoded(photograph.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # stored inverted, as Photoshop does
    assert not image_kind(data).plain
    assert np.abs(pixels_of(data) - np.asarray(photograph, dtype=int)).mean() < 4


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(photograph, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image_format, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(photograph, image_format, exif=exif, **options)
        assert not image_kind(data).plain
        with Image.open(io.BytesIO(encoded(photograph, image_format, **options))) as unrotated:
            tagged = unrotated.convert("RGB")
        tagged.getexif()[0x0112] = orientation
        assert worst(pixels_of(data), ImageOps.exif_transpose(tagged)) == 0, image_format


def test_exif_that_says_upright_keeps_a_jpeg_ordinary(photograph):
    for orientation in (0, 1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert image_kind(encoded(photograph, "JPEG", exif=exif)).plain


def test_sixteen_bit_grey_is_scaled_and_not_clipped(photograph):
    grey = np.asarray(photograph.convert("L"))
    for data in (
        encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
    ):
        assert worst(pixels_of(data), np.repeat(grey[..., None], 3, axis=2)) == 0
        assert not image_kind(data).plain


def test_sixteen_bit_colour_is_scaled_and_not_clipped(photograph):
    deep = np.asarray(photograph).astype(np.uint16) * 257
    data = png_16_bit(deep, color_type=2)
    assert worst(pixels_of(data), photograph) <= 1
    kind = image_kind(data)
    assert not kind.plain and kind.lossless


def test_transparency_is_laid_over_white(photograph):
    alpha = np.zeros((64, 96), dtype=np.uint8)
    alpha[:, 48:] = 255
    alpha[:, 30:48] = 128
    layered = photograph.copy()
    layered.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    for data in (encoded(layered, "PNG"), encoded(layered, "WEBP", lossless=True, exact=True)):
        expected = np.asarray(photograph) * share + 255 * (1 - share)
        assert worst(pixels_of(data), expected.round()) <= 1
        assert not image_kind(data).plain
    grey = np.asarray(photograph.convert("L"))
    data = encoded(Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))), "PNG")
    assert worst(pixels_of(data)[..., 0], (grey * share[..., 0] + 255 * (1 - share[..., 0])).round()) <= 1


def test_palettes_give_their_colours_and_transparent_entries_white(photograph):
    palette = photograph.quantize(32)
    expected = np.array(palette.convert("RGB"))
    assert worst(pixels_of(encoded(palette, "PNG")), expected) == 0
    numbers = np.asarray(palette)
    expected[numbers == 5] = 255
    for image_format in ("PNG", "GIF"):
        data = encoded(palette, image_format, transparency=5)
        assert worst(pixels_of(data), expected) == 0, image_format
        assert not image_kind(data).plain


@pytest.mark.parametrize("image_format, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_an_animation_the_first_frame_is_taken(photograph, image_format, options):
    first = photograph.quantize(16).convert("RGB")
    second = ImageOps.mirror(ImageOps.invert(first))
    data = encoded(first, image_format, save_all=True, append_images=[second], **options)
    assert worst(pixels_of(data), first) == 0
    assert not image_kind(data).plain


def test_plain_png_and_webp_may_be_passed_on_as_they_are(real_data, photograph):
    png = real_data.kodak[0].read_bytes()
    assert image_kind(png) == decode.ImageKind("png", plain=True, lossless=True)
    assert worst(pixels_of(png), Image.open(real_data.kodak[0]).convert("RGB")) == 0
    webp = encoded(photograph, "WEBP", lossless=True)
    assert image_kind(webp) == decode.ImageKind("webp", plain=True, lossless=True)
    assert worst(pixels_of(webp), photograph) == 0
    assert image_kind(encoded(photograph, "WEBP", quality=80)) == decode.ImageKind("webp", plain=True, lossless=False)


def test_other_formats_decode_but_are_not_for_shards(photograph):
    for image_format in ("BMP", "TIFF", "PPM"):
        data = encoded(photograph, image_format)
        assert worst(pixels_of(data), photograph) == 0
        assert image_kind(data) == decode.ImageKind("", plain=False, lossless=True)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused_not_filled_with_grey(photograph, progressive):
    data = encoded(photograph, "JPEG", quality=90, progressive=progressive)
    decode_rgb(data)
    for length in range(0, len(data) - 1, 7):
        with pytest.raises(DecodeError):
            decode_rgb(data[:length])
    with pytest.raises(DecodeError):
        # a hole, as an interrupted download leaves it
        decode_rgb(data[: len(data) // 2] + bytes(len(data) // 2))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_cut_short_are_refused(photograph, image_format):
    data = encoded(photograph, image_format)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(DecodeError):
            decode_rgb(data[: int(len(data) * share)])


def test_bytes_behind_the_end_of_an_image_do_no_harm(real_data):
    data = real_data.imagenet[0].read_bytes()
    assert torch.equal(decode_rgb(data + b"camera notes" * 9), decode_rgb(data))


def test_the_reason_is_readable(photograph):
    with pytest.raises(DecodeError, match="empty"):
        decode_rgb(b"")
    with pytest.raises(DecodeError, match="none of the formats"):
        decode_rgb(b"<html>404 not found</html>")
    with pytest.raises(DecodeError, match="range"):
        decode_rgb(encoded(photograph.convert("F"), "TIFF"))


def test_absurdly_large_images_are_refused_before_they_are_decoded(photograph, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 96 * 64 - 1)
    for image_format in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(DecodeError, match="96 x 64"):
            decode_rgb(encoded(photograph, image_format))
    monkeypatch.setattr(decode, "MAX_PIXELS", 96 * 64)
    decode_rgb(encoded(photograph, "JPEG"))


def test_a_bomb_of_two_hundred_million_pixels_is_refused():
    bomb = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    bomb[16:24] = struct.pack(">II", 20_000, 10_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(DecodeError, match="pixels"):
        decode_rgb(bytes(bomb))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_decode_or_raise_decode_error_and_nothing_else(real_data, data):
    image_format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
    image = Image.open(real_data.imagenet[1]).convert("RGB").resize((24, 16))
    damaged = bytearray(encoded(image, image_format))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image_kind(bytes(damaged))
        assert decode_rgb(bytes(damaged)).shape[0] == 3
    except DecodeError as error:
        assert "\n" not in str(error) and "0x" not in str(error)


def test_a_sequential_jpeg_with_a_second_scan_of_all_channels_is_refused_at_once(photograph):
    data = encoded(photograph.resize((960, 640)), "JPEG")
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(DecodeError):
        decode_rgb(data[:scan] + data[scan:-2] * 300 + b"\xff\xd9")


def test_a_sequential_jpeg_of_a_scan_a_channel_is_read():
    """Written from the specification, as Pillow writes none: 8 x 8 pixels of one value a channel, three scans."""
    table = bytes([0xFF, 0xDB, 0, 67, 0]) + bytes([1] * 64)
    frame = bytes([0xFF, 0xC0, 0, 17, 8, 0, 8, 0, 8, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    # One code of one bit in both tables: DC category 0 (the value stays 0) and AC end of block.
    codes = b"".join(bytes([0xFF, 0xC4, 0, 20, kind, 1]) + bytes(15) + bytes([0]) for kind in (0x00, 0x10))
    scans = b"".join(bytes([0xFF, 0xDA, 0, 8, 1, channel, 0, 0, 63, 0, 0x3F]) for channel in (1, 2, 3))
    pixels = pixels_of(b"\xff\xd8" + table + frame + codes + scans + b"\xff\xd9")
    assert pixels.shape == (8, 8, 3) and (pixels == 128).all()
