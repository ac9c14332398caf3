"""What a file is, by its first bytes and by its name; nothing is decoded here, and no decoder is imported."""

from __future__ import annotations

import re

# Formats that are decoded, by Pillow's names, and the suffixes that each of them goes by.
_SUFFIXES = {
    "JPEG": ".jpg .jpeg .jpe .jfif .jfi .jif .pjpeg .pjp",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp .dib",
    "TIFF": ".tif .tiff",
    "PPM": ".ppm .pgm .pbm .pnm",
}
_FORMAT_OF_SUFFIX = {suffix: name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
IMAGE_SUFFIXES = frozenset(_FORMAT_OF_SUFFIX)
# Of these a sample has one at most; some are images that are not decoded here.
IMAGE_LIKE_SUFFIXES = IMAGE_SUFFIXES | frozenset(".avif .heic .heif .jxl .jp2 .j2k .jpx .tga .psd".split())
# Cameras' own formats begin as a TIFF does, and what a TIFF reader finds in them is a thumbnail.
_RAW_SUFFIXES = frozenset(
    ".cr2 .cr3 .nef .nrw .arw .srf .sr2 .dng .orf .rw2 .pef .srw .raf .3fr .erf .kdc .iiq".split()
)

# As many bytes as `kind_of` looks at.
HEAD_BYTES = 512
_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JPEG XL image"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL image"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "JPEG 2000 image"),
    (b"8BPS", "Photoshop image"),
    (b"v/1\x01", "OpenEXR image"),
    (b"#?RADIANCE", "Radiance image"),
    (b"DDS ", "DirectDraw image"),
    (b"PK\x03\x04", "archive"),
    (b"\x1f\x8b", "archive"),
    (b"BZh", "archive"),
    (b"\xfd7zXZ\0", "archive"),
    (b"\x28\xb5\x2f\xfd", "archive"),
    (b"7z\xbc\xaf\x27\x1c", "archive"),
    (b"Rar!", "archive"),
)
# Text may begin with two letters alike, so more than the letters is looked at.
_PPM = re.compile(rb"P[1-6]\s(?:\s|#[^\n]*\n)*[0-9]")
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]", re.S
)


def kind_of(head: bytes) -> str:
    """What the first `HEAD_BYTES` bytes of a file say it is.

    Returns: one of Pillow's names where the format is decoded here ("JPEG"); words where it is known and not decoded
        ("AVIF image", "archive"); "" for anything else.
    Source: the formats' own signatures, as the PRONOM registry of the UK National Archives lists them.
    """
    found = next((name for start, name in _STARTS if head.startswith(start)), "")
    if found:
        return found
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if _PPM.match(head):
        return "PPM"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        # An AVIF may begin with HEIF's general brand; its own then stands among the compatible ones.
        box = head[8 : int.from_bytes(head[:4], "big")]
        if brand in (b"avif", b"avis") or brand == b"mif1" and b"avif" in box:
            return "AVIF image"
        return "HEIF image" if brand[:3] in (b"hei", b"hev", b"mif", b"msf") else "film"
    if head[257:262] == b"ustar":
        return "tar"
    return "SVG image" if _SVG.match(head) else ""


def is_decoded(kind: str) -> bool:
    """Whether images of this kind (`kind_of`) are decoded here."""
    return kind in _SUFFIXES


def suffix_of(name: str) -> str:
    """`a/b.JPEG` -> `.jpeg`; "" where the file name has no dot, or none but its first character."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def without_suffix(name: str) -> str:
    """A path or file name less the suffix of an image; what follows another dot is part of the name."""
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix in IMAGE_SUFFIXES else name


def is_raw(name: str) -> bool:
    return suffix_of(name) in _RAW_SUFFIXES


def contradicts(name: str, kind: str) -> bool:
    """Whether a file of a decoded kind goes by the suffix of another one, or by none of an image's."""
    return _FORMAT_OF_SUFFIX.get(suffix_of(name)) != kind
