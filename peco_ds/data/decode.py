"""Decode the bytes of an image file to upright 8-bit RGB, or say why that is not possible.

Ordinary JPEGs (grey or three channels, no EXIF rotation) are decoded natively by torchvision, where it still can.
Everything else is decoded by Pillow, which knows CMYK, palettes, 16 bit, alpha, EXIF and the other formats. Both are
strict: a file that ends early is refused, never returned with a grey lower half. Embedded colour profiles are ignored,
as is usual in ImageNet training.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from peco_ds.data.image_formats import HEAD_BYTES, is_decoded, kind_of

try:
    from torchvision.io import ImageReadMode

    # The operator behind torchvision.io.decode_jpeg. The function warns of its removal at every image, which takes a
    # twentieth of the decoding's time.
    decode_jpeg = torch.ops.image.decode_jpeg
except (ImportError, AttributeError):
    # Once the operator is removed, Pillow decodes every image, only slower.
    decode_jpeg = None

# Pillow warns of a decompression bomb from this size on; here it is a refusal, since a loader process would hold 3
# bytes for each.
MAX_PIXELS = 89_478_485

# Each scan of a progressive JPEG may touch every pixel again: a file of a megabyte could keep a loader busy for hours.
# Ordinary ones have about ten.
MAX_SCANS = 200
_START_OF_SCAN = b"\xff\xda"

# Nothing else is tried: some of Pillow's other readers start external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


class DecodeError(ValueError):
    """The bytes are not a sound image; the message says why."""


@dataclass(frozen=True)
class ImageKind:
    """The kind of an image file, by its content and not its name."""

    # "jpg", "png" or "webp"; empty for a format that image shards do not hold.
    extension: str
    # Every decoder gives the same upright RGB, so the bytes may be passed on unchanged.
    plain: bool
    lossless: bool


def decode_rgb(data: bytes) -> torch.Tensor:
    """Decode an image file.

    EXIF orientation is applied. Of an animation the first frame is taken. 16 bits are scaled to 8. Transparency is laid
    over white, the background such images are drawn for; dropping alpha would show what lies under it, most often
    black or noise.

    Returns: [3, H, W] uint8, RGB, channels last in memory.
    Raises: DecodeError if the bytes are no image, end early, are empty or hold more than MAX_PIXELS pixels or
        MAX_SCANS scans.
    """
    header = _read_jpeg_header(data)
    # Both decoders refuse a file that ends early, but they may accept one whose end is zeros, as an interrupted copy
    # leaves it.
    if header is not None and data.rfind(b"\xff\xd9") < header.scan_start:
        raise DecodeError("JPEG without an end mark: cut short, or its end was never written")
    if header is not None and not header.single_scan and data.count(_START_OF_SCAN, header.scan_start) > MAX_SCANS:
        raise DecodeError(f"JPEG of more than {MAX_SCANS} scans; save it again")
    if header is not None and header.ordinary and decode_jpeg is not None:
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB.value, False)
        except RuntimeError:
            # Pillow, below, gives the readable reason.
            pass
    with _opened(data) as image:
        return torch.from_numpy(_upright_rgb(image)).permute(2, 0, 1)


def decode_map(data: bytes) -> torch.Tensor:
    """Decode a class map: a PNG of one channel of 8 bits, or of palette indices, whose numbers are the classes.

    Returns: [H, W] uint8.
    Raises: DecodeError if the bytes are no such PNG, a map in colours among others.
    """
    with _opened(data) as image:
        if image.format != "PNG":
            raise DecodeError(f"a {image.format}, a class map is a PNG: other formats may change its numbers")
        if image.mode not in ("L", "P"):
            raise DecodeError(
                f"a map of mode {image.mode} ({'+'.join(image.getbands())}), wants one channel of class numbers; maps "
                "in colours have to be converted first"
            )
        return torch.from_numpy(np.array(image))


def image_kind(data: bytes) -> ImageKind:
    """The kind of an image file, from its header.

    Raises: DecodeError if the header is of no known format; a damaged body is found by `decode_rgb`.
    """
    header = _read_jpeg_header(data)
    if header is not None and header.ordinary:
        return ImageKind("jpg", plain=True, lossless=False)
    with _opened(data) as image:
        one_upright_opaque_frame = (
            image.mode in ("L", "RGB")
            and "transparency" not in image.info
            and not getattr(image, "is_animated", False)
            and image.getexif().get(_EXIF_ORIENTATION, 1) in (0, 1)
        )
        if image.format == "PNG":
            bit_depth = data[24]
            return ImageKind("png", plain=one_upright_opaque_frame and bit_depth == 8, lossless=True)
        if image.format == "WEBP":
            return ImageKind("webp", plain=one_upright_opaque_frame, lossless=b"VP8L" in data[:1024])
        is_jpeg = image.format in ("JPEG", "MPO")
        return ImageKind("jpg" if is_jpeg else "", plain=False, lossless=not is_jpeg)


class _opened:
    """`with _opened(data) as image`: a Pillow image whose every failure, opening or decoding, leaves as DecodeError."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> Image.Image:
        if not self._data:
            raise DecodeError("empty file")
        try:
            image = Image.open(io.BytesIO(self._data), formats=_FORMATS)
        except Image.UnidentifiedImageError:
            kind = kind_of(self._data[:HEAD_BYTES])
            found = f"{kind}, " if kind and not is_decoded(kind) else ""
            raise DecodeError(f"{found}none of the formats {', '.join(_FORMATS)}") from None
        except Exception as error:
            raise _decode_error(error) from None
        if image.width * image.height > MAX_PIXELS:
            raise DecodeError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
        return image

    def __exit__(self, kind, error, traceback) -> None:
        # On damaged bytes Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, IndexError and more.
        if isinstance(error, Exception) and not isinstance(error, DecodeError):
            raise _decode_error(error) from None


def _decode_error(error: Exception) -> DecodeError:
    return DecodeError(" ".join(str(error).split()) or type(error).__name__)


def _upright_rgb(image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8."""
    image.load()
    # Pillow has this mode for some 16-bit greys.
    widened_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)
    # Pillow's own convert("RGB") clips these at 255
    if image.mode in _SIXTEEN_BIT_MODES or widened_16_bit:
        grey = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DecodeError(f"pixels of mode {image.mode} have no stated range to map to 8 bits")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, "white")
        canvas.alpha_composite(rgba)
        image = canvas
    return np.array(image.convert("RGB"))


class _JpegHeader(NamedTuple):
    # 8-bit grey or three channels, of a size that is decoded, upright.
    ordinary: bool
    # Bytes before the first scan.
    scan_start: int
    # A sequential JPEG whose first scan has all channels: decoders take no other scan.
    single_scan: bool


def _read_jpeg_header(data: bytes) -> _JpegHeader | None:
    """Walk the marker segments up to the first scan, in microseconds; None if the bytes are no JPEG.

    Source: ITU-T T.81 annex B (markers and segments).
    """
    if data[:2] != b"\xff\xd8":
        return None
    ordinary_frame, upright = False, True
    sequential_components = 0
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte before a marker
            position += 1
            continue
        if marker == 0xDA:  # start of scan
            return _JpegHeader(
                ordinary_frame and upright,
                position,
                sequential_components > 0 and data[position + 4 : position + 5] == bytes([sequential_components]),
            )
        if marker in (0xD8, 0xD9):
            return None
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = data[position + 4 : position + 10]
            if len(frame) < 6:
                return None
            bits, height, width, components = struct.unpack(">BHHB", frame)
            ordinary_frame = bits == 8 and components in (1, 3) and 0 < height * width <= MAX_PIXELS
            sequential_components = components if marker in (0xC0, 0xC1) else 0
        elif marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            upright = upright and not _needs_rotation(data[position + 10 : end])
        position = end
    return None


def _needs_rotation(tiff: bytes) -> bool:
    """Whether an EXIF block states an orientation other than upright; a block that cannot be read states none.

    Source: TIFF 6.0 section 2 (header and first directory).
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return False
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _EXIF_ORIENTATION:
                return 2 <= value <= 8
    except struct.error:
        pass
    return False
