"""What is damaged outside of the program, and what must come of it: an error that names file or key and the reason, or
a counted skip.

Each table has one row a kind of damage. A row is met by the reader that a stage meets it with; nothing may hang, take
memory without end, run code, leave its folder, end in any other exception, or be trained on.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from beit_samples import drawn, mim_shapes, sample
from bounds import bounded
from PIL import Image
from safetensors.torch import save_file

from peco_ds.config import FinetuneRecipe, ModelSettings, PretrainRecipe, TokenizerSettings, ViewSettings
from peco_ds.convert.read import read_weights
from peco_ds.convert.release import write_release
from peco_ds.convert.to_hf import to_hf
from peco_ds.convert.to_timm import to_timm
from peco_ds.convert.to_unilm import to_unilm
from peco_ds.data.image_set import ImageSet
from peco_ds.data.image_shards import IndexJob, make_shard, prepare_folder
from peco_ds.data.indexed_tar import IndexedTar, build_index, index_name, write_index
from peco_ds.data.label_lists import labels_from_list, read_classes
from peco_ds.data.loaders import masked_batches
from peco_ds.data.token_shards import TokenSet
from peco_ds.data.views import cut
from peco_ds.deepspeed_json import merge_deepspeed, read_deepspeed_json
from peco_ds.errors import UserError
from peco_ds.models.feature_nets import load_feature_net
from peco_ds.models.tokenizers import build_tokenizer, load_tokenizer, save_tokenizer
from peco_ds.models.weight_files import foreign_classes, read_tensor_file
from peco_ds.recipe_files import load_recipe
from peco_ds.runtime.checkpoint.files import list_checkpoints, newest_whole, verify
from peco_ds.runtime.run_folder import read_provenance, read_settings
from peco_ds.runtime.run_weights import read_run
from peco_ds.schema import (
    ImageManifest,
    Shard,
    TokenManifest,
    ViewRecipe,
    read_manifest,
    sha256_of_file,
    write_json,
    write_manifest,
)


@pytest.fixture(autouse=True)
def within_bounds():
    with bounded():
        yield


def refused(read, *words: str) -> str:
    """The one line with which `read()` refuses; it holds all the words."""
    with pytest.raises(UserError) as caught:
        read()
    line = " ".join(str(caught.value).split())
    assert len(line) < 1500, "an error is a line to read"
    for word in words:
        assert word in line, line
    return line


def flipped(data: bytes, place: float = 0.5, bit: int = 1) -> bytes:
    changed = bytearray(data)
    changed[int(place * (len(data) - 1))] ^= bit
    return bytes(changed)


# -------------------------------------------------------------------------------------------- images


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shard_of(tar: Path) -> Shard:
    samples, index_sha256 = write_index(tar, tar.parent / index_name(tar.name))
    return Shard(tar.name, samples, tar.stat().st_size, sha256_of_file(tar), index_sha256)


def image_set(folder: Path, members: list[tuple[str, bytes]], classes: list[str] | None = None) -> ImageSet:
    folder.mkdir(exist_ok=True)
    shard = shard_of(tar_of(folder / "a.tar", members))
    write_manifest(folder, ImageManifest([shard], shard.samples, classes))
    return ImageSet(folder)


@pytest.fixture(scope="session")
def photograph(real_data) -> Image.Image:
    return Image.open(real_data.imagenet[3]).convert("RGB").resize((96, 64))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels and whose data holds a few."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def jpeg_of_size(data: bytes, width: int, height: int) -> bytes:
    place = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def jpeg_of_many_scans(image: Image.Image) -> bytes:
    data = saved(image, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 500 + b"\xff\xd9"


BAD_IMAGES = {
    "a JPEG cut in the middle": (lambda p: saved(p, "JPEG")[: len(saved(p, "JPEG")) // 2], "jpg", "end mark"),
    "a JPEG whose end is a hole of zeros": (
        lambda p: saved(p, "JPEG")[:900] + bytes(len(saved(p, "JPEG")) - 900),
        "jpg",
        "end mark",
    ),
    "a JPEG header and nothing behind it": (lambda p: saved(p, "JPEG")[:30], "jpg", ""),
    "a JPEG that says it has no rows": (lambda p: jpeg_of_size(saved(p, "JPEG"), 96, 0), "jpg", ""),
    "a JPEG that says it has 65500 x 65500 pixels": (
        lambda p: jpeg_of_size(saved(p, "JPEG"), 65500, 65500),
        "jpg",
        "pixels",
    ),
    "a progressive JPEG of five hundred scans": (jpeg_of_many_scans, "jpg", "scans"),
    "a file of zero bytes": (lambda p: b"", "jpg", "empty file"),
    "zeros": (lambda p: bytes(4000), "jpg", "none of the formats"),
    "an HTML page": (
        lambda p: b"<!doctype html><html><title>403 Forbidden</title></html>",
        "jpg",
        "none of the formats",
    ),
    "a git-LFS pointer": (
        lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 368\n",
        "png",
        "none of the formats",
    ),
    "an SVG": (
        lambda p: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "png",
        "none of the formats",
    ),
    "an EPS, which Pillow would give to Ghostscript": (
        lambda p: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "jpg",
        "none of the formats",
    ),
    "a PNG cut short": (lambda p: saved(p, "PNG")[:-200], "png", ""),
    "a PNG with a flipped byte": (lambda p: flipped(saved(p, "PNG")), "png", ""),
    "a PNG that promises 100000 x 100000 pixels": (lambda p: png_of_size(100_000, 100_000), "png", "pixels"),
    "a PNG whose data are fewer than its pixels": (lambda p: png_of_size(3000, 3000), "png", ""),
    "a PNG without a column": (lambda p: png_of_size(0, 5), "png", ""),
    "a WebP cut short": (lambda p: saved(p, "WEBP")[:-100], "webp", ""),
    "a GIF cut short": (lambda p: saved(p, "GIF")[:300], "png", ""),
    "a TIFF cut short": (lambda p: saved(p, "TIFF")[:-3000], "png", ""),
    "a TIFF of floats without a range": (
        lambda p: saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
        "png",
        "mode F",
    ),
}


@pytest.mark.parametrize("how", BAD_IMAGES)
def test_a_bad_image_is_named_and_counted_and_the_next_one_takes_its_place(photograph, tmp_path, how):
    make, extension, words = BAD_IMAGES[how]
    good, other = saved(photograph, "PNG"), saved(photograph.rotate(90, expand=True), "PNG")
    images = image_set(
        tmp_path / "set", [("first.png", good), (f"damaged.{extension}", make(photograph)), ("last.png", other)]
    )
    used, key, image, bad = images.decode_or_next(1)
    assert (used, key) == (2, "last") and len(bad) == 1 and bad[0].startswith("damaged: ") and words in bad[0], bad
    assert torch.equal(image, images.decode(2)[1]) and np.array_equal(
        image.permute(1, 2, 0).numpy(), np.asarray(photograph.rotate(90, expand=True))
    )


ODD_IMAGES = {
    "CMYK": (lambda p: saved(p.convert("CMYK"), "JPEG", quality=98), "jpg"),
    "grey": (lambda p: saved(p.convert("L"), "JPEG", quality=98), "jpg"),
    "16 bits": (lambda p: saved(Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 257), "PNG"), "png"),
    "a palette": (lambda p: saved(p.quantize(255), "PNG"), "png"),
    "an alpha channel that hides nothing": (lambda p: saved(p.convert("RGBA"), "PNG"), "png"),
    "an animation": (
        lambda p: saved(p.quantize(255), "GIF", save_all=True, append_images=[p.rotate(180).quantize(255)]),
        "png",
    ),
    "a PNG that is called a JPEG": (lambda p: saved(p, "PNG"), "jpg"),
    "EXIF that is no TIFF": (
        lambda p: saved(p, "JPEG", quality=98, exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" + bytes(9)),
        "jpg",
    ),
    "bytes behind its end": (lambda p: saved(p, "JPEG", quality=98) + b"appended by a camera", "jpg"),
}


@pytest.mark.parametrize("how", ODD_IMAGES)
def test_an_odd_image_is_read_as_what_it_shows(photograph, tmp_path, how):
    make, extension = ODD_IMAGES[how]
    _, image = image_set(tmp_path / "set", [(f"odd.{extension}", make(photograph))]).decode(0)
    shown = np.asarray(photograph.convert("L").convert("RGB") if how in ("grey", "16 bits") else photograph).astype(
        float
    )
    assert image.shape == (3, 64, 96) and np.abs(image.permute(1, 2, 0).numpy() - shown).mean() < 8


def test_an_image_of_one_pixel_is_read(tmp_path):
    _, image = image_set(tmp_path / "set", [("dot.png", saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"))]).decode(0)
    assert image.flatten().tolist() == [9, 8, 7]


def test_a_byte_flipped_on_disk_is_a_bad_image_and_never_another_one(photograph, tmp_path):
    images = image_set(
        tmp_path / "set", [("a.png", saved(photograph, "PNG")), ("b.png", saved(photograph.rotate(180), "PNG"))]
    )
    tar = tmp_path / "set" / "a.tar"
    data = bytearray(tar.read_bytes())
    data[tarfile.BLOCKSIZE + 3000] ^= 4
    tar.write_bytes(data)
    _, key, _, bad = ImageSet(images.folder).decode_or_next(0)
    assert key == "b" and "'a'" in bad[0] and "CRC-32" in bad[0]


LABELS = {
    b"cat": "a word",
    b"-1": "negative",
    b"2": "as many as there are classes",
    b"99999999": "too large",
    b"": "empty",
    b"1.0": "a fraction",
    "\u0663".encode(): "another script's digit",
    b"0 1": "two",
    b"7" * 5000: "thousands of digits",
}


@pytest.mark.parametrize("label", LABELS, ids=LABELS.get)
def test_a_label_that_is_none_stops_the_run_and_names_the_key(photograph, tmp_path, label):
    images = image_set(
        tmp_path / "set", [("a.png", saved(photograph, "PNG")), ("a.cls", label)], classes=["cat", "dog"]
    )
    refused(lambda: images.label(0), "a.tar", "a", ".cls holds", "classes 0 to 1")


def test_a_label_that_is_missing_stops_the_run_and_names_the_key(photograph, tmp_path):
    images = image_set(tmp_path / "set", [("a.png", saved(photograph, "PNG"))], classes=["cat", "dog"])
    refused(lambda: images.label(0), "a.tar: a: has no .cls")


@pytest.mark.parametrize(
    "label",
    [b"cat", b"-1", b"", b"9" * 9, b"7" * 5000],
    ids=["a word", "negative", "empty", "a class for every person", "more digits than Python reads"],
)
def test_tars_with_a_label_that_is_none_are_not_indexed(photograph, tmp_path, label):
    tar = tar_of(tmp_path / "a.tar", [("x/a.png", saved(photograph, "PNG")), ("x/a.cls", label)])
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    refused(
        lambda: make_shard(tmp_path / "out", IndexJob("a.tar", str(tar)), lambda: None), "a.tar", "'x/a'", ".cls holds"
    )


def test_a_sample_without_an_image_is_not_indexed(tmp_path):
    tar = tar_of(tmp_path / "a.tar", [("a.txt", b"a caption")])
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    refused(lambda: make_shard(tmp_path / "out", IndexJob("a.tar", str(tar)), lambda: None), "'a' has no image")


LISTS = {
    "a list that is no text": (lambda f: read_classes(f), b"\xff\xfecat", "cannot be read as text"),
    "a list with a name twice": (lambda f: read_classes(f), b"cat\ndog\ncat\n", "'cat' stands twice"),
    "a list that is empty": (lambda f: read_classes(f), b"\n\n", "is empty"),
    "labels in a CSV with a field of a megabyte": (
        lambda f: labels_from_list(["a.jpg"], f, None),
        b"ImageId,P\na," + b"n" * 1_000_000,
        "not CSV",
    ),
    "a number of five thousand digits": (
        lambda f: labels_from_list(["a.jpg"], f, f.with_name("classes")),
        b"a.jpg " + b"9" * 5000,
        "is outside 0..1",
    ),
    "a negative number": (
        lambda f: labels_from_list(["a.jpg"], f, f.with_name("classes")),
        b"a.jpg -1",
        "'-1' is not in",
    ),
    "one line for two images": (
        lambda f: labels_from_list(["a.jpg", "b.jpg"], f, None),
        b"cat\n",
        "1 lines for 2 images",
    ),
}


@pytest.mark.parametrize("how", LISTS)
def test_a_damaged_list_of_labels_is_refused_by_name(tmp_path, how):
    read, content, words = LISTS[how]
    (tmp_path / "classes").write_text("wolf\nbear\n")
    (tmp_path / "list").write_bytes(content)
    refused(lambda: read(tmp_path / "list"), str(tmp_path / "list"), words)


# ------------------------------------------------------------------------------------------------ tars

MEMBERS = [("a.jpg", b"A" * 700), ("a.cls", b"1"), ("b.jpg", b"B" * 900)]


def member_of(tar: Path, **fields) -> None:
    """A tar of one good member and one of another kind."""
    with tarfile.open(tar, "w") as file:
        good = tarfile.TarInfo("good.jpg")
        good.size = 4
        file.addfile(good, io.BytesIO(b"good"))
        odd = tarfile.TarInfo(fields.pop("name", "odd.jpg"))
        for name, value in fields.items():
            setattr(odd, name, value)
        file.addfile(odd)


def header_of(tar: Path, change) -> None:
    """The second header changed, its checksum set right."""
    tar_of(tar, MEMBERS)
    data = bytearray(tar.read_bytes())
    header = bytearray(data[1536:2048])
    change(header)
    header[148:156] = b"        "
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[1536:2048] = header
    tar.write_bytes(data)


def size_field(number: int):
    def change(header: bytearray) -> None:
        header[124:136] = (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=True)

    return change


def pax_of(tar: Path, records: bytes) -> None:
    """An extended header before a member."""
    with open(tar, "wb") as file:
        extended = tarfile.TarInfo("pax")
        extended.type, extended.size = tarfile.XHDTYPE, len(records)
        file.write(extended.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0"))
        member = tarfile.TarInfo("a.jpg")
        member.size = 4
        file.write(member.tobuf(tarfile.USTAR_FORMAT) + b"data".ljust(512, b"\0") + bytes(1024))


def changed_bytes(tar: Path, change) -> None:
    tar_of(tar, MEMBERS)
    tar.write_bytes(change(tar.read_bytes()))


TARS = {
    "cut in a header": (lambda t: changed_bytes(t, lambda d: d[:1700]), "is cut short"),
    "cut in a member": (lambda t: changed_bytes(t, lambda d: d[:900]), "cut short"),
    "without its end mark": (lambda t: changed_bytes(t, lambda d: d[:3584]), "is cut short"),
    "with a wrong checksum": (lambda t: changed_bytes(t, lambda d: d[:1600] + b"X" + d[1601:]), "damaged header"),
    "of zero bytes": (lambda t: t.write_bytes(b""), "not a whole, uncompressed tar at its start"),
    "compressed": (lambda t: changed_bytes(t, gzip.compress), "not a whole, uncompressed tar at its start"),
    "really an image": (
        lambda t: t.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20),
        "not a whole, uncompressed tar at its start",
    ),
    "missing": (lambda t: None, "no such tar"),
    "really a folder": (lambda t: t.mkdir(), "a folder, pipe or device"),
    "really a pipe": (lambda t: os.mkfifo(t), "a folder, pipe or device"),
    "with a hard link": (lambda t: member_of(t, type=tarfile.LNKTYPE, linkname="good.jpg"), "'odd.jpg' is a link"),
    "with a symbolic link": (
        lambda t: member_of(t, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "'odd.jpg' is a link",
    ),
    "with a character device": (
        lambda t: member_of(t, type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        "'odd.jpg' is a link, device",
    ),
    "with a block device": (lambda t: member_of(t, type=tarfile.BLKTYPE), "'odd.jpg' is a link, device"),
    "with a pipe": (lambda t: member_of(t, type=tarfile.FIFOTYPE), "'odd.jpg' is a link, device"),
    "with a sparse file": (
        lambda t: pax_of(
            t,
            b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n26 GNU.sparse.name=a.jpg\n31 GNU.sparse.realsize=999999\n",
        ),
        "",
    ),
    "with a member above its folder": (lambda t: tar_of(t, [("../../a.jpg", b"x")]), "'../../a.jpg' points outside"),
    "with an absolute member": (lambda t: tar_of(t, [("/etc/a.jpg", b"x")]), "'/etc/a.jpg' points outside"),
    "with .. inside a name": (lambda t: tar_of(t, [("a/../../b.jpg", b"x")]), "points outside"),
    "with .. in an extended header": (lambda t: pax_of(t, b"20 path=../../a.jpg\n"), "'../../a.jpg' points outside"),
    "with a member twice": (lambda t: tar_of(t, [("a.jpg", b"x"), ("a.JPG", b"y")]), "key 'a' has two members .jpg"),
    "with a key that comes back": (
        lambda t: tar_of(t, [("a.jpg", b"x"), ("b.jpg", b"y"), ("a.cls", b"1")]),
        "key 'a' comes back",
    ),
    "with a member of a negative size": (lambda t: header_of(t, size_field(-4096)), ""),
    "with a member of eight exabytes": (lambda t: header_of(t, size_field(1 << 62)), ""),
    "with a size that is no number": (
        lambda t: header_of(t, lambda h: h.__setitem__(slice(124, 136), b"0000000x000\0")),
        "damaged header",
    ),
    "with an extended header of wrong lengths": (lambda t: pax_of(t, b"999999999 path=a.jpg\n"), ""),
    "with an extended header that gives a size of words": (lambda t: pax_of(t, b"13 size=many\n"), ""),
    "with an extended header of a size below zero": (lambda t: pax_of(t, b"14 size=-5120\n"), ""),
}


@pytest.mark.parametrize("how", TARS)
def test_a_damaged_tar_is_not_indexed(tmp_path, how):
    make, words = TARS[how]
    make(tmp_path / "a.tar")
    refused(lambda: build_index(tmp_path / "a.tar"), str(tmp_path / "a.tar"), words)


def test_files_that_belong_to_no_sample_are_left_out_of_the_index(tmp_path):
    tar_of(tmp_path / "a.tar", [("README", b"no dot"), (".hidden", b"no stem"), *MEMBERS])
    assert [entry["key"] for entry in build_index(tmp_path / "a.tar")["samples"]] == ["a", "b"]


def test_an_empty_tar_is_a_shard_of_no_samples_and_a_set_of_none_is_refused(tmp_path):
    shard = shard_of(tar_of(tmp_path / "a.tar", []))
    write_manifest(tmp_path, ImageManifest([shard], 0))
    refused(lambda: read_manifest(tmp_path, ImageManifest), "manifest.json", "holds none")


# --------------------------------------------------------------------------------------------- indexes


def spans(change):
    """An index in which the place of a member is another."""

    def damage(index: dict) -> dict:
        index["samples"][1]["members"]["jpg"] = change(index["samples"][1]["members"]["jpg"])
        return index

    return damage


INDEXES = {
    "of JSON nested without end": (b"[" * 100_000, "nested too deep"),
    "cut short": (lambda text: text[:-9], "not JSON"),
    "empty": (b"", "not JSON"),
    "a NumPy archive": (b"PK\x03\x04\x14\x00\xff\xfe", "not JSON"),
    "a list": (b"[]", "is no index"),
    "of another version": (lambda i: {**i, "format_version": 9}, "is no index of format version"),
    "without samples": (lambda i: {k: v for k, v in i.items() if k != "samples"}, "samples is no list"),
    "with samples by name": (lambda i: {**i, "samples": {"a": 1}}, "samples is no list"),
    "without a size": (lambda i: {k: v for k, v in i.items() if k != "tar_bytes"}, "tar_bytes"),
    "with a size in words": (lambda i: {**i, "tar_bytes": "many"}, "tar_bytes"),
    "with a sample that is a number": (lambda i: {**i, "samples": [7]}, "sample 0 has no key"),
    "with a sample without members": (lambda i: {**i, "samples": [{"key": "a"}]}, "sample 0 has no key and members"),
    "with a key that is a number": (lambda i: {**i, "samples": [{"key": 5, "members": {}}]}, "sample 0 has no key"),
    "with an offset beyond the end": (spans(lambda s: [10**9, s[1], s[2]]), "'b', member .jpg: ends at byte"),
    "with a negative offset": (spans(lambda s: [-512, s[1], s[2]]), "'b', member .jpg"),
    "with a size of an exabyte": (spans(lambda s: [s[0], 10**18, s[2]]), "'b', member .jpg"),
    "with a number that no machine holds": (spans(lambda s: [s[0], 10**40, s[2]]), "'b', member .jpg"),
    "with a fraction of a byte": (spans(lambda s: [s[0] + 0.5, s[1], s[2]]), "'b', member .jpg"),
    "with an offset in words": (spans(lambda s: ["first", s[1], s[2]]), "'b', member .jpg"),
    "with two numbers for three": (spans(lambda s: s[:2]), "'b', member .jpg"),
    "with a number that is none": (lambda text: text.replace(b"900", b"NaN"), "no finite number"),
    "with a key twice in an object": (
        lambda text: text.replace(b'"tar_bytes"', b'"tar_bytes": 5, "tar_bytes"'),
        "stands twice",
    ),
}


def written(path: Path, change) -> None:
    """A JSON file after `change`: bytes that replace it, a function of its bytes, or one of its value."""
    text = path.read_bytes()
    if isinstance(change, bytes):
        path.write_bytes(change)
        return
    try:
        path.write_text(json.dumps(change(json.loads(text))))
    except (TypeError, AttributeError, KeyError):  # a function of the bytes
        path.write_bytes(change(text))


@pytest.mark.parametrize("how", INDEXES)
def test_a_damaged_index_is_refused(tmp_path, how):
    change, words = INDEXES[how]
    tar = tar_of(tmp_path / "a.tar", MEMBERS)
    index = tmp_path / "a.index.json"
    write_index(tar, index)
    written(index, change)
    refused(lambda: IndexedTar(tar, index), str(index), words)


def test_an_index_that_is_missing_changed_or_of_another_tar_is_refused(tmp_path):
    tar, index = tar_of(tmp_path / "a.tar", MEMBERS), tmp_path / "a.index.json"
    refused(lambda: IndexedTar(tar, index), "a.index.json: no such index")
    _, sha256 = write_index(tar, index)
    index.write_bytes(index.read_bytes() + b"\n")
    refused(lambda: IndexedTar(tar, index, sha256), "is not the index its manifest names")
    other = tar_of(tmp_path / "b.tar", [("a.jpg", b"Z" * 700), ("a.cls", b"1"), ("b.jpg", b"Y" * 900)])
    write_index(other, index)
    # of the same size, as only its bytes tell
    refused(lambda: IndexedTar(tar, index).read(0), "a.tar", "'a'", "CRC-32 differs")


# ------------------------------------------------------------------------------------------- manifests


def first_shard(**fields):
    def change(raw: dict) -> dict:
        raw["shards"][0] |= fields
        return raw

    return change


def with_fields(**fields):
    return lambda raw: {**raw, **fields}


ANY_MANIFEST = {
    "cut short": (lambda text: text[: len(text) // 2], "not readable as JSON"),
    "empty": (b"", "not readable as JSON"),
    "nested without end": (b'{"kind":' + b"[" * 100_000, "nested too deep"),
    "nested without end in a field": (
        lambda text: text.replace(b'"samples"', b'"more": ' + b"[" * 500 + b"]" * 500 + b', "samples"', 1),
        "",
    ),
    "with a key twice": (
        lambda text: text.replace(b'"format_version"', b'"kind": "images", "format_version"', 1),
        "'kind' stands twice",
    ),
    "with a number that is none": (
        lambda text: text.replace(b'"format_version"', b'"x": NaN, "format_version"', 1),
        "NaN is no finite number",
    ),
    "with an infinite number": (
        lambda text: text.replace(b'"format_version"', b'"x": 1e999, "format_version"', 1),
        "1e999 is no finite number",
    ),
    "not UTF-8": (lambda text: text.replace(b"a.tar", b"\xff.tar"), "not readable as JSON"),
    "a list": (b"[1, 2]", "describes None"),
    "of another version": (with_fields(format_version=2), "format version 2"),
    "of version true": (with_fields(format_version=True), "format version True"),
    "with a field that nobody knows": (with_fields(colour="red"), "colour"),
    "with shards by name": (with_fields(shards={"a.tar": 1}), "shards"),
    "with a shard that is a name": (with_fields(shards=["a.tar"]), "shards.0"),
    "without shards": (with_fields(shards=[]), "samples: "),
    "with a negative number of samples": (with_fields(samples=-3), "samples: "),
    "with samples in quotes": (with_fields(samples="3"), "samples: "),
    "with another number of samples than its shards": (with_fields(samples=4000), "samples: 4000"),
    "with a number of samples that no machine holds": (with_fields(samples=10**30), "samples: "),
    "with a shard above its folder": (first_shard(name="../../a.tar"), "'../../a.tar' is no plain file name"),
    "with a shard of an absolute name": (first_shard(name="/etc/passwd"), "'/etc/passwd' is no plain file name"),
    "with a shard in a folder": (first_shard(name="x/a.tar"), "is no plain file name"),
    "with a shard without a name": (first_shard(name=""), "is no plain file name"),
    "with a shard called ..": (first_shard(name=".."), "is no plain file name"),
    "with a NUL in a name": (first_shard(name="a\0.tar"), "is no plain file name"),
    "with a path above its folder": (first_shard(path="../../a.tar"), "no absolute path"),
    "with a path that climbs": (first_shard(path="/data/../etc/a.tar"), "no absolute path"),
    "with a negative size": (first_shard(bytes=-1), "shards.0.bytes"),
    "with a fraction of samples": (first_shard(samples=1.5), "shards.0.samples"),
    "with a hash that is none": (first_shard(sha256="abc"), "shards.0.sha256"),
    "with an empty hash of the index": (first_shard(index_sha256=""), "shards.0.index_sha256"),
    "with a shard twice": (lambda raw: {**raw, "shards": raw["shards"] * 2, "samples": 6}, "'a' stands twice"),
}
OF_TOKENS = {
    "of no codes": (with_fields(num_codes=0), "num_codes"),
    "of more codes than are stored": (with_fields(num_codes=70000), "num_codes"),
    "of a grid of one number": (with_fields(grid=[4]), "grid"),
    "of a negative grid": (with_fields(grid=[-4, 4]), "grid.0"),
    "of no views": (with_fields(num_views=0), "num_views"),
    "of negative soft codes": (with_fields(topk=-1), "topk"),
    "of views that are a list": (with_fields(views=[1, 2]), "views"),
    "of views with a scale of words": (
        lambda raw: {**raw, "views": {**raw["views"], "scale": ["low", "high"]}},
        "views.scale",
    ),
    "of shards that lie elsewhere": (first_shard(path="/elsewhere/a.tar"), "token shards lie beside their manifest"),
}


@pytest.fixture
def manifests(tmp_path):
    """The manifests of a set of images and of its tokens, without the tars."""
    shard = Shard("a.tar", 3, 4096, "a" * 64, "b" * 64)
    images = ImageManifest([shard], 3, ["cat", "dog"])
    tokens = TokenManifest(
        [shard],
        3,
        images.fingerprint(),
        {"a.tar": "a" * 64},
        "c" * 64,
        64,
        (4, 4),
        2,
        ViewRecipe(32, (0.2, 1.0), (0.75, 1.3), 0.5, 0.4, 0),
    )
    for name, manifest in (("images", images), ("tokens", tokens)):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, manifest)
    return tmp_path


@pytest.mark.parametrize("how", ANY_MANIFEST)
def test_a_damaged_manifest_of_images_is_refused(manifests, how):
    change, words = ANY_MANIFEST[how]
    written(manifests / "images" / "manifest.json", change)
    refused(lambda: ImageSet(manifests / "images"), str(manifests / "images" / "manifest.json"), words)


@pytest.mark.parametrize("how", [*ANY_MANIFEST, *OF_TOKENS])
def test_a_damaged_manifest_of_tokens_is_refused(manifests, how):
    change, words = (ANY_MANIFEST | OF_TOKENS)[how]
    images = ImageSet(manifests / "images").manifest
    written(manifests / "tokens" / "manifest.json", change)
    views = ViewSettings(tokenizer_px=32, tokenizer_precision="fp32", scale=(0.2, 1.0), ratio=(0.75, 1.3), count=2)
    refused(
        lambda: TokenSet(manifests / "tokens", images, num_codes=64, grid=4, views=views),
        str(manifests / "tokens" / "manifest.json"),
        words,
    )


@pytest.mark.parametrize("kind, manifest_type", [("images", ImageManifest), ("tokens", TokenManifest)])
def test_each_field_of_a_manifest_that_is_missing_or_of_another_type_is_named(manifests, kind, manifest_type):
    path = manifests / kind / "manifest.json"
    whole = json.loads(path.read_text())
    optional = {
        field.name
        for field in dataclasses.fields(manifest_type)
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    }
    for name in whole:
        for changed in ([] if name in optional else [{k: v for k, v in whole.items() if k != name}]) + [
            {**whole, name: {"x": [1.5]}}
        ]:
            path.write_text(json.dumps(changed))
            words = "describes" if name == "kind" else "format version" if name == "format_version" else f"{name}"
            refused(lambda: read_manifest(manifests / kind, manifest_type), str(path), words)


def test_no_manifest_or_record_makes_a_writer_leave_its_folder(tmp_path):
    """Shard names become files that are written, replaced and removed: by tokenizing, and by a packing that is started
    again.
    """
    for name in ("../outside.tar", "/tmp/outside.tar", "..", "a/../../outside.tar"):
        with pytest.raises(ValueError, match="no plain file name"):
            Shard(name, 1, 1, "a" * 64, "b" * 64)
    victim = tmp_path / "victim.tar"
    victim.write_bytes(b"not ours")
    out = tmp_path / "out"
    (out / ".pack").mkdir(parents=True)
    shard = {
        "name": "../victim.tar",
        "samples": 1,
        "bytes": 8,
        "sha256": "a" * 64,
        "index_sha256": "b" * 64,
        "path": "",
    }
    (out / ".pack" / "x.record.json").write_text(
        json.dumps({"job_digest": "d", "units": 1, "shard": shard, "rejected": []})
    )
    write_json(out / ".pack" / "plan.json", {"quality": "92"})
    assert prepare_folder(out, [], {"quality": "92"}) == ([], [])
    assert victim.read_bytes() == b"not ours" and not (out / ".pack" / "x.record.json").exists()


# --------------------------------------------------------------------------------------- token records

ROW = [0, 0, 20, 30, 0, 1, 1, 1, 0]  # as schema.VIEW_COLUMNS


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, codes=np.zeros((2, 16), np.uint16))
    return file.getvalue()


def rows_with(**columns) -> bytes:
    names = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation", "jitter_order")
    rows = np.array([ROW, ROW], np.float32)
    for name, value in columns.items():
        rows[1, names.index(name)] = value
    return npy(rows)


class Payload:
    """A pickle of it makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def pickled_npy(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([[Payload(marker)] * 16] * 2, dtype=object), allow_pickle=True)
    return file.getvalue()


CODES, ROWS = npy(np.arange(32, dtype=np.uint16).reshape(2, 16)), npy(np.array([ROW, ROW], np.float32))
RECORDS = {
    "a code out of the vocabulary": (
        [("codes.npy", npy(np.full((2, 16), 64, np.uint16))), ("views.npy", ROWS)],
        "code 64 in a vocabulary of 64",
    ),
    "codes of another type": ([("codes.npy", npy(np.zeros((2, 16), np.int64))), ("views.npy", ROWS)], "int64"),
    "codes of the other byte order": ([("codes.npy", npy(np.zeros((2, 16), ">u2"))), ("views.npy", ROWS)], ">u2"),
    "codes of another shape": ([("codes.npy", npy(np.zeros((2, 9), np.uint16))), ("views.npy", ROWS)], "(2, 9)"),
    "codes, columns first": (
        [("codes.npy", npy(np.asfortranarray(np.zeros((2, 16), np.uint16)))), ("views.npy", ROWS)],
        "columns first",
    ),
    "codes of one view": ([("codes.npy", npy(np.zeros((1, 16), np.uint16))), ("views.npy", ROWS)], "(1, 16)"),
    "codes cut short": ([("codes.npy", CODES[:-7]), ("views.npy", ROWS)], "57 bytes for 64"),
    "bytes behind the codes": ([("codes.npy", CODES + b"more"), ("views.npy", ROWS)], "68 bytes for 64"),
    "a header that promises a petabyte": (
        [("codes.npy", CODES.replace(b"(2, 16)", b"(9**15,)")), ("views.npy", ROWS)],
        "codes.npy",
    ),
    "a shape beyond memory": (
        [("codes.npy", CODES.replace(b"(2, 16), }        ", b"(2, 99999999999), }")), ("views.npy", ROWS)],
        "codes.npy",
    ),
    "an archive for an array": ([("codes.npy", archive()), ("views.npy", ROWS)], "not an .npy array"),
    "text for an array": ([("codes.npy", b"0 1 2 3"), ("views.npy", ROWS)], "not an .npy array"),
    "an empty array file": ([("codes.npy", b""), ("views.npy", ROWS)], "not an .npy array"),
    "no codes": ([("views.npy", ROWS)], "has no codes.npy"),
    "no views": ([("codes.npy", CODES)], "has no views.npy"),
    "views of another shape": ([("codes.npy", CODES), ("views.npy", npy(np.zeros((2, 5), np.float32)))], "(2, 5)"),
    "views of another type": ([("codes.npy", CODES), ("views.npy", npy(np.array([ROW, ROW], np.float64)))], "float64"),
    "a view that is no number": ([("codes.npy", CODES), ("views.npy", rows_with(brightness=np.nan))], "not finite"),
    "a view without a height": ([("codes.npy", CODES), ("views.npy", rows_with(height=0))], "view 1 has the box"),
    "a view above the image": ([("codes.npy", CODES), ("views.npy", rows_with(top=-4))], "view 1 has the box"),
    "a view between two pixels": ([("codes.npy", CODES), ("views.npy", rows_with(left=0.5))], "view 1 has the box"),
    "a view in no order of jitter": (
        [("codes.npy", CODES), ("views.npy", rows_with(jitter_order=77))],
        "jitter order 77",
    ),
    "half a flip": ([("codes.npy", CODES), ("views.npy", rows_with(flip=0.5))], "flip 0.5"),
}
SOFT = [
    ("topk_codes.npy", npy(np.zeros((2, 16, 2), np.uint16))),
    ("topk_probs.npy", npy(np.full((2, 16, 2), 0.5, np.float16))),
]
SOFT_RECORDS = {
    "soft codes out of the vocabulary": (
        [("topk_codes.npy", npy(np.full((2, 16, 2), 99, np.uint16))), SOFT[1]],
        "code 99",
    ),
    "a soft code that is likelier than 1": (
        [SOFT[0], ("topk_probs.npy", npy(np.full((2, 16, 2), 1.5, np.float16)))],
        "no probability",
    ),
    "a soft code of no likelihood": (
        [SOFT[0], ("topk_probs.npy", npy(np.full((2, 16, 2), np.nan, np.float16)))],
        "no probability",
    ),
    "a patch whose soft codes have no likelihood at all": (
        [SOFT[0], ("topk_probs.npy", npy(np.zeros((2, 16, 2), np.float16)))],
        "no probability",
    ),
    "a soft code named twice": (SOFT, "names a code twice"),
    "no soft codes": ([], "topk_codes.npy"),
}


def token_set(
    folder: Path,
    members: list[tuple[str, bytes]],
    *,
    key: str = "a",
    topk: int = 0,
    image: bytes = b"",
    tokenizer: str = "c" * 64,
) -> tuple[ImageSet, TokenSet]:
    """One image and its record, made by hand."""
    images = image_set(folder / "images", [("a.png", image)])
    (folder / "tokens").mkdir()
    shard = shard_of(tar_of(folder / "tokens" / "a.tar", [(f"{key}.{name}", data) for name, data in members]))
    packed = images.manifest
    views = ViewRecipe(32, (0.2, 1.0), (0.75, 4 / 3), 0.5, 0.4, 0)
    manifest = TokenManifest(
        [shard], 1, packed.fingerprint(), {"a.tar": packed.shards[0].sha256}, tokenizer, 64, (4, 4), 2, views, topk
    )
    write_manifest(folder / "tokens", manifest)
    return images, TokenSet(
        folder / "tokens",
        packed,
        num_codes=64,
        grid=4,
        views=ViewSettings(tokenizer_px=32, tokenizer_precision="fp32", scale=(0.2, 1.0), count=2, topk=topk),
    )


@pytest.mark.parametrize("how", [*RECORDS, *SOFT_RECORDS])
def test_a_damaged_token_record_stops_the_run_and_names_shard_and_key(tmp_path, how):
    soft = how in SOFT_RECORDS
    members, words = (RECORDS | SOFT_RECORDS)[how]
    _, tokens = token_set(
        tmp_path, [("codes.npy", CODES), ("views.npy", ROWS), *members] if soft else members, topk=2 * soft
    )
    refused(lambda: tokens.read(0, "a"), "a.tar: a", words)


def test_a_pickle_in_a_token_record_is_refused_and_not_run(tmp_path):
    _, tokens = token_set(tmp_path, [("codes.npy", pickled_npy(tmp_path / "ran")), ("views.npy", ROWS)])
    refused(lambda: tokens.read(0, "a"), "a.tar: a.codes.npy", "pickled objects")
    assert not (tmp_path / "ran").exists()


def test_a_record_of_another_image_is_refused(tmp_path):
    _, tokens = token_set(tmp_path, [("codes.npy", CODES), ("views.npy", ROWS)], key="b")
    refused(lambda: tokens.read(0, "a"), "a.tar: b", "the image at this place is a")


def test_a_flipped_byte_of_a_token_record_is_refused_when_it_is_read(tmp_path):
    _, tokens = token_set(tmp_path, [("codes.npy", CODES), ("views.npy", ROWS)])
    tar = tmp_path / "tokens" / "a.tar"
    data = bytearray(tar.read_bytes())
    data[tarfile.BLOCKSIZE + 140] ^= 1
    tar.write_bytes(data)
    refused(lambda: tokens.read(0, "a"), "a.tar", "'a'", "codes.npy", "CRC-32")


def test_a_view_that_is_not_in_its_image_stops_the_run(photograph, tmp_path):
    images, tokens = token_set(
        tmp_path, [("codes.npy", CODES), ("views.npy", rows_with(height=65))], image=saved(photograph, "PNG")
    )
    record, (_, image) = tokens.read(0, "a"), images.decode(0)
    assert cut(image, record.views[0], 32).shape == (3, 32, 32)
    refused(lambda: cut(image, record.views[1], 32), "is not in an image of 64 x 96", "tokenize")
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", []).recipe
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, num_workers=0),
        views=tokens_views(),
        mask=dataclasses.replace(recipe.mask, count=4, min_block=2),
        model=dataclasses.replace(recipe.model, image_px=32, patch_px=8),
    )
    places = [np.arange(epoch, epoch + 1) for epoch in range(2)]  # both views of the one image
    batches = masked_batches(images, tokens, places, recipe, torch.device("cpu"))
    refused(lambda: list(batches), "is not in an image of 64 x 96")


def tokens_views() -> ViewSettings:
    return ViewSettings(tokenizer_px=32, tokenizer_precision="fp32", scale=(0.2, 1.0), count=2)


# ------------------------------------------------------------------------ recipes and DeepSpeed's JSON

RECIPES = {
    "a Python object": ("optim: !!python/object/apply:os.system ['touch MARKER']\n", "not YAML"),
    "a Python name": ("optim: {lr: !!python/name:os.system }\n", "not YAML"),
    "an unknown tag": ("optim: {lr: !float32 1}\n", "not YAML"),
    "a key twice": ("optim: {lr: 1.0e-3}\noptim: {lr: 2.0e-3}\n", "'optim' stands twice"),
    "a setting twice in a section": ("optim:\n  lr: 1.0e-3\n  lr: 2.0e-3\n", "'lr' stands twice"),
    "a setting in two spellings": ("optim: {lr: 1.0e-3}\noptim.lr: 2.0e-3\n", "'optim.lr' is set twice"),
    "aliases that grow without end": (
        "a: &a {x: 1}\n"
        + "".join(
            f"{n}: &{n} {{" + ", ".join(f"{k}: *{m}" for k in range(9)) + "}\n" for m, n in zip("abcdefgh", "bcdefghi")
        ),
        "aliases are not read",
    ),
    "an alias of itself": ("optim: &a {lr: *a}\n", "aliases are not read"),
    "a merge of an alias": ("optim: &a {lr: 1.0}\nrun: {<<: *a}\n", "aliases are not read"),
    "a list": ("- optim\n- run\n", "holds list"),
    "words": ("lr is 3", "holds str"),
    "a setting that is no number": ("optim: {lr: .nan}\n", "optim.lr"),
    "an infinite setting": ("optim: {lr: 1.0e+999}\n", "optim.lr"),
    "a number of five thousand digits": ("optim: {lr: " + "9" * 5000 + "}\n", "not YAML"),
    "a month that does not exist": ("optim: {lr: 2001-13-41}\n", "not YAML"),
    "brackets without end": ("[" * 1500, "not YAML"),
    "a tab for spaces": ("optim:\n\tlr: 1\n", "not YAML"),
    "bytes that are no text": (b"\xff\xfeoptim", "not YAML"),
    "a control character": (b"optim: {lr: \x00}\n", "not YAML"),
    "two documents": ("optim: {lr: 1}\n---\nrun: {}\n", "not YAML"),
    "more than any recipe holds": ("# " + "x" * 2_000_000, "at most"),
    "a list of thousands for a number": ("optim: {lr: [" + "1, " * 20_000 + "1]}\n", "optim.lr = a list of"),
    "an unknown key of thousands of letters": ("? " + "k" * 100_000 + "\n: 1\n", "unknown setting"),
    "a section where a value stands": ("optim: {lr: {x: 1}}\n", "'optim.lr.x'"),
    "a value where a section stands": ("optim: 5\n", "'optim'"),
}


@pytest.mark.parametrize("how", RECIPES)
def test_a_damaged_recipe_is_refused(tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = RECIPES[how]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: load_recipe(PretrainRecipe, path, []), str(path), words)
    assert not (tmp_path / "MARKER").exists()


@pytest.mark.parametrize(
    "text",
    [
        "optim.lr=!!python/object/apply:os.system ['touch MARKER']",
        "optim.lr=[",
        "optim.lr=.nan",
        "optim.lr={a: 1}",
        "optim.lr",
        "optim.lr=&a [*a]",
    ],
)
def test_a_damaged_override_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: load_recipe(PretrainRecipe, "peco_vitb16", [text]), "optim.lr")
    assert not (tmp_path / "MARKER").exists()


BLOCKS = {
    "zero_optimization": 3,
    "bf16": True,
    "fp16": "on",
    "optimizer": [],
    "scheduler": "cosine",
    "activation_checkpointing": 5,
    "data_types": "fp32",
    "checkpoint": [1],
    "flops_profiler": True,
    "comms_logger": "yes",
    "aio": 1,
    "tensorboard": "runs",
    "wandb": True,
    "csv_monitor": 1,
    "autotuning": True,
    "compile": True,
    "torch_autocast": True,
    "data_efficiency": 0,
    "pipeline": 2,
    "weight_quantization": True,
    "timers": 3,
    "train_batch_size": "many",
    "train_micro_batch_size_per_gpu": [4],
    "gradient_accumulation_steps": True,
    "gradient_clipping": {"norm": 1},
    "steps_per_print": "often",
    "wall_clock_breakdown": "no",
    "communication_data_type": 32,
    "prescale_gradients": 1,
    "gradient_predivide_factor": "half",
    "dump_state": "yes",
    "zero_allow_untested_optimizer": "yes",
}


@pytest.mark.parametrize("key", BLOCKS)
def test_a_block_of_a_deepspeed_json_of_another_type_is_named(tmp_path, key):
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, key: BLOCKS[key]}))
    refused(lambda: read_deepspeed_json(tmp_path / "mine.json"), str(tmp_path / "mine.json"), key)


JSONS = {
    "a key twice": (
        b'{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 3}}',
        "'zero_optimization' stands twice",
    ),
    "a key twice in a block": (b'{"zero_optimization": {"stage": 1, "stage": 3}}', "'stage' stands twice"),
    "brackets without end": (b'{"zero_optimization": ' + b"[" * 100_000, "nested too deep"),
    "a number that is none": (b'{"zero_optimization": {"stage": NaN}}', "no finite number"),
    "an infinite number": (b'{"zero_optimization": {"stage": 3, "reduce_bucket_size": Infinity}}', "no finite number"),
    "a stage of true": (b'{"zero_optimization": {"stage": true}}', "zero_optimization.stage"),
    "a stage of words": (b'{"zero_optimization": {"stage": [3]}}', "zero_optimization.stage"),
    "an offload that is a word": (
        b'{"zero_optimization": {"stage": 3, "offload_optimizer": "cpu"}}',
        "offload_optimizer",
    ),
    "a number of five thousand digits": (b'{"zero_optimization": {"stage": ' + b"9" * 5000 + b"}}", "not JSON"),
    "a web page": (b"<!doctype html><html></html>", "not JSON"),
    "bytes that are no text": (b"\xff\xfe{}", "not JSON"),
}


@pytest.mark.parametrize("how", JSONS)
def test_a_damaged_deepspeed_json_is_refused(tmp_path, how):
    content, words = JSONS[how]
    (tmp_path / "mine.json").write_bytes(content)
    refused(lambda: read_deepspeed_json(tmp_path / "mine.json"), str(tmp_path / "mine.json"), words)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"params": 3},
        {"type": ["AdamW"]},
        {"type": "AdamW", "params": {"lr": "fast"}},
        {"type": "AdamW", "params": {"betas": 0.9}},
    ],
)
def test_an_optimizer_block_of_another_type_is_named_when_it_is_compared(tmp_path, optimizer):
    recipe = load_recipe(PretrainRecipe, "peco_vitb16", []).recipe
    (tmp_path / "mine.json").write_text(json.dumps({"optimizer": optimizer}))
    raw = read_deepspeed_json(tmp_path / "mine.json")
    refused(lambda: merge_deepspeed(raw, tmp_path / "mine.json", recipe.run, recipe.optim, 1), "mine.json", "optimizer")


# --------------------------------------------------------------------------------------------- weights


def pickled(content, path: Path, **options) -> Path:
    torch.save(content, path, **options)
    return path


def compressed(path: Path) -> Path:
    """A file of torch.save whose tensor is packed: 64 MiB of zeros in some kilobytes."""
    pickled({"a": torch.zeros(1 << 24)}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    return path


class Calls:
    """A pickle of it calls something when it is read."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


WEIGHTS = {
    "a pickle that opens a file": (
        lambda f, m: pickled({"a": torch.ones(2), "x": Payload(m)}, f / "w.pth"),
        "was not run",
    ),
    "an old pickle that opens a file": (
        lambda f, m: pickled({"a": torch.ones(2), "x": Payload(m)}, f / "w.pth", _use_new_zipfile_serialization=False),
        "was not run",
    ),
    "a pickle that runs a command": (
        lambda f, m: pickled({"x": Calls(os.system, f"touch {m}")}, f / "w.pth"),
        "was not run",
    ),
    "a pickle that evaluates a text": (
        lambda f, m: pickled({"x": Calls(eval, f"open({str(m)!r}, 'w')")}, f / "w.pth"),
        "was not run",
    ),
    "a bare pickle": (
        lambda f, m: (f / "w.pth").write_bytes(pickle.dumps({"x": Payload(m)})) and f / "w.pth",
        "not a readable weights file",
    ),
    "a pickle called safetensors": (
        lambda f, m: pickled({"x": Payload(m)}, f / "w.safetensors"),
        "not a readable weights file",
    ),
    "a pickle cut short": (lambda f, m: cut_file(pickled({"a": torch.randn(50, 50)}, f / "w.pth"), 0.6), "cut short"),
    "a safetensors cut short": (lambda f, m: cut_file(tensors_file(f / "w.safetensors"), 0.6), "cut short"),
    "a safetensors with a header of an exabyte": (
        lambda f, m: put_bytes(f / "w.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
        "not a readable weights file",
    ),
    "a safetensors with a header of garbage": (
        lambda f, m: put_bytes(f / "w.safetensors", struct.pack("<Q", 8) + b"\xff" * 8),
        "not a readable weights file",
    ),
    "a list of tensors": (lambda f, m: pickled([torch.ones(2)], f / "w.pth"), "holds a list"),
    "a packed archive": (lambda f, m: compressed(f / "w.pth"), "compressed"),
    "a tensor of a million times its bytes": (
        lambda f, m: pickled({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, f / "w.pth"),
        "expanded",
    ),
    "a sparse tensor": (lambda f, m: pickled({"a": torch.eye(4).to_sparse()}, f / "w.pth"), "sparse"),
    "a tensor without data": (lambda f, m: pickled({"a": torch.ones(3, device="meta")}, f / "w.pth"), ""),
    "a web page": (lambda f, m: put_bytes(f / "w.pth", b"<!doctype html><html>log in</html>"), "web page"),
    "an empty file": (lambda f, m: put_bytes(f / "w.pth", b""), "it is empty"),
    "a git-LFS pointer": (
        lambda f, m: put_bytes(f / "w.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
}


def put_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def cut_file(path: Path, share: float) -> Path:
    return put_bytes(path, path.read_bytes()[: int(share * path.stat().st_size)])


def tensors_file(path: Path) -> Path:
    save_file({"a": torch.randn(50, 50)}, path)
    return path


@pytest.mark.parametrize("how", WEIGHTS)
def test_a_damaged_or_malicious_weights_file_is_refused_and_nothing_in_it_runs(tmp_path, how):
    make, words = WEIGHTS[how]
    path = make(tmp_path, tmp_path / "ran")
    refused(lambda: read_tensor_file(path), str(path), words)
    refused(lambda: read_weights(path), str(path))
    refused(lambda: load_feature_net(str(path)), str(path))
    assert not (tmp_path / "ran").exists()


def test_a_dictionary_that_holds_itself_is_read_to_its_end(tmp_path):
    content = {"a": torch.ones(2)}
    content["self"] = content
    assert torch.equal(read_tensor_file(pickled(content, tmp_path / "w.pth"))["a"], torch.ones(2))


SMALL = ModelSettings(image_px=32, patch_px=8, width=24, depth=2, heads=3, drop_path=0.0)
TENSORS = {
    "of whole numbers": (
        lambda t: t | {"blocks.0.attn.proj.weight": torch.ones(24, 24, dtype=torch.long)},
        "blocks.0.attn.proj.weight is torch.int64",
    ),
    "of complex numbers": (
        lambda t: t | {"norm.bias": torch.ones(24, dtype=torch.complex64)},
        "norm.bias is torch.complex64",
    ),
    "of another shape": (lambda t: t | {"norm.bias": torch.ones(25)}, "norm.bias has shape (25,)"),
    "without a number": (lambda t: t | {"patch_embed.proj.weight": torch.ones(24, 3, 0, 0)}, "patch_embed.proj.weight"),
    "of no dimensions": (lambda t: t | {"lm_head.weight": torch.tensor(1.0)}, "lm_head.weight has shape ()"),
    "of a layer without dimensions": (
        lambda t: t | {"blocks.0.mlp.fc1.weight": torch.tensor(1.0)},
        "blocks.0.mlp.fc1.weight has shape ()",
    ),
    "of block 999999": (lambda t: t | {"blocks.999999.gamma_1": torch.ones(24)}, "block 999999"),
    "of a block that is no number": (lambda t: t | {"blocks.\u00b2.gamma_1": torch.ones(24)}, "has no place"),
    "of a layer scale that is no number": (
        lambda t: t | {"blocks.1.gamma_1": torch.full((24,), float("nan"))},
        "not finite",
    ),
    "of a bias table without heads": (
        lambda t: t | {"rel_pos_bias.relative_position_bias_table": torch.ones(52, 0)},
        "relative_position_bias_table",
    ),
    "that is missing": (
        lambda t: {name: tensor for name, tensor in t.items() if name != "norm.bias"},
        "norm.bias is missing",
    ),
    "that has no place": (lambda t: t | {"surprise": torch.ones(2)}, "surprise has no place"),
}


@pytest.mark.parametrize("how", TENSORS)
def test_weights_with_a_tensor_that_is_none_of_the_models_are_refused(tmp_path, how):
    change, words = TENSORS[how]
    refused(lambda: read_weights(pickled(change(drawn(mim_shapes(SMALL, 20))), tmp_path / "w.pth")), "w.pth", words)


CONFIGS = {
    ("timm", "mean of words"): (
        lambda c: {**c, "pretrained_cfg": {**c["pretrained_cfg"], "mean": ["a", "b", "c"]}},
        "mean",
    ),
    ("timm", "mean of two"): (lambda c: {**c, "pretrained_cfg": {**c["pretrained_cfg"], "mean": [0.5, 0.5]}}, "mean"),
    ("timm", "deviation of zero"): (
        lambda c: {**c, "pretrained_cfg": {**c["pretrained_cfg"], "std": [0.0, 1.0, 1.0]}},
        "std",
    ),
    ("timm", "crop in words"): (lambda c: {**c, "pretrained_cfg": {**c["pretrained_cfg"], "crop_pct": "all"}}, "crop"),
    ("timm", "pretrained_cfg a list"): (lambda c: {**c, "pretrained_cfg": [1]}, "config.json"),
    ("timm", "names that are numbers"): (lambda c: {**c, "label_names": [1, 2]}, "classes"),
    ("hf", "names by words"): (lambda c: {**c, "id2label": {"first": "cat"}}, "config.json"),
    ("hf", "names that are a list"): (lambda c: {**c, "id2label": ["cat"]}, "config.json"),
    ("hf", "an eps of words"): (lambda c: {**c, "layer_norm_eps": "small"}, "layer_norm_eps"),
    ("unilm", "no mean"): (lambda c: {k: v for k, v in c.items() if k != "mean"}, "config.json"),
    ("unilm", "a crop of zero"): (lambda c: {**c, "crop_pct": 0}, "crop"),
    ("timm", "no JSON"): (b"{", "no JSON object"),
    ("hf", "a key twice"): (lambda text: text.replace(b"{", b'{"model_type": "beit", ', 1), "stands twice"),
}


@pytest.mark.parametrize("library, how", CONFIGS)
def test_a_release_with_a_damaged_config_is_refused(tmp_path, library, how):
    change, words = CONFIGS[library, how]
    weights = sample("mim", SMALL)
    write_release(tmp_path / "release", {"timm": to_timm, "hf": to_hf, "unilm": to_unilm}[library](weights), weights)
    assert read_weights(tmp_path / "release").kind == "mim"
    written(tmp_path / "release" / "config.json", change)
    refused(lambda: read_weights(tmp_path / "release"), "release", words)


# ---------------------------------------------------------------------------------- tokenizer releases

TOKENIZER = TokenizerSettings(
    channels=16,
    channel_mults=(1, 1, 1, 1),
    blocks_per_level=1,
    z_channels=16,
    num_codes=64,
    code_dim=8,
    l2_normalized=True,
)


def settings_with(**fields):
    return lambda card: {**card, "settings": {**card["settings"], **fields}}


CARDS = {
    "no JSON": (b"{", "not readable as JSON"),
    "brackets without end": (b"[" * 100_000, "nested too deep"),
    "a list": (b"[]", "describes no"),
    "another version": (with_fields(format_version=99), "describes no"),
    "no settings": (lambda c: {k: v for k, v in c.items() if k != "settings"}, "settings"),
    "an unknown setting": (settings_with(colour="red"), "settings.colour"),
    "a setting in words": (settings_with(channels="wide"), "settings.channels"),
    "a network without channels": (settings_with(channels=0), "settings.channels 0"),
    "a network beyond memory": (settings_with(channels=10**7), "settings"),
    "a network beyond any number": (settings_with(channels=10**15), "settings"),
    "a billion blocks": (settings_with(blocks_per_level=10**9), "blocks"),
    "no levels": (settings_with(channel_mults=[]), "channel_mults"),
    "negative levels": (settings_with(channel_mults=[1, -1]), "channel_mults"),
    "a changed setting": (settings_with(kmeans_iters=11), "so a file was changed"),
    "another number of codes than its settings": (with_fields(num_codes=99), "num_codes is 99"),
    "another stride than its settings": (with_fields(stride_px=99), "stride_px is 99"),
    "no fingerprint": (lambda c: {k: v for k, v in c.items() if k != "fingerprint"}, "fingerprint"),
    "another fingerprint": (with_fields(fingerprint="0" * 64), "so a file was changed"),
    "facts that are a list": (with_fields(extra=[1]), "extra no object"),
}


@pytest.fixture(scope="session")
def tokenizer_release(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    save_tokenizer(folder, build_tokenizer(TOKENIZER).state_dict(), TOKENIZER, {"judge": "none"})
    return folder


@pytest.mark.parametrize("how", CARDS)
def test_a_tokenizer_with_a_damaged_card_is_refused(tokenizer_release, tmp_path, how):
    change, words = CARDS[how]
    folder = Path(shutil.copytree(tokenizer_release, tmp_path / "tokenizer"))
    written(folder / "tokenizer.json", change)
    refused(lambda: load_tokenizer(folder), str(folder), words)


def cast_file(path: Path, dtype: torch.dtype) -> None:
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in read_tensor_file(path).items()
    }
    save_file(tensors, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


TOKENIZER_FILES = {
    "cut short": (lambda f: cut_file(f, 0.5), "not a readable safetensors"),
    "with a flipped byte": (lambda f: put_bytes(f, flipped(f.read_bytes(), 0.9)), "so a file was changed"),
    "missing": (lambda f: f.unlink(), "holds no tokenizer.safetensors"),
    "a pickle": (lambda f: pickled({"a": torch.ones(2)}, f), "not a readable safetensors"),
    "of other tensors": (lambda f: save_file({"a": torch.ones(2)}, f), "settings ask for"),
    "of half precision": (lambda f: cast_file(f, torch.half), "so a file was changed"),
    "of whole numbers": (lambda f: cast_file(f, torch.long), "is torch.int64"),
}


@pytest.mark.parametrize("how", TOKENIZER_FILES)
def test_a_tokenizer_with_a_damaged_file_is_refused(tokenizer_release, tmp_path, how):
    change, words = TOKENIZER_FILES[how]
    folder = Path(shutil.copytree(tokenizer_release, tmp_path / "tokenizer"))
    change(folder / "tokenizer.safetensors")
    refused(lambda: load_tokenizer(folder), str(folder), words)


# ------------------------------------------------------------------------- run folders and checkpoints

STEPS = (3, 6)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A run folder with two checkpoints of a classifier, as a run without ZeRO writes them."""
    folder = tmp_path_factory.mktemp("run")
    recipe = json.loads(json.dumps(dataclasses.asdict(load_recipe(FinetuneRecipe, "finetune_vitb16", []).recipe)))
    recipe["model"] = dataclasses.asdict(SMALL)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"stage": "finetune", "recipe": recipe, "sources": {}}))
    provenance = {
        "commit": "c",
        "images_fingerprint": "f" * 64,
        "num_samples": 9,
        "classes": ["cat", "dog"],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "init": "scratch",
        "init_facts": {},
        "fresh": [],
    }
    write_json(folder / "provenance.json", provenance)
    weights = sample("classifier", SMALL)
    tensors = weights.tensors | {"head.weight": torch.ones(2, 24), "head.bias": torch.zeros(2)}
    for step in STEPS:
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        torch.save(
            {"module": {name: tensor + step for name, tensor in tensors.items()}},
            checkpoint / "mp_rank_00_model_states.pt",
        )
        torch.save({"python": [3, list(range(5)), None], "step": step}, checkpoint / "rank_00000.pt")
        cursor = {"fingerprint": "f" * 64, "seed": 0, "samples": 8 * step}
        write_json(checkpoint / "progress.json", {"step": step, "cursor": cursor, "world_size": 1, "zero_stage": 0})
        for name in ("settings.yaml", "provenance.json"):
            shutil.copy(folder / name, checkpoint / name)
        files = {path.name: [path.stat().st_size, sha256_of_file(path)] for path in sorted(checkpoint.iterdir())}
        write_json(checkpoint / "manifest.json", {"files": files})
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_the_checkpoints_that_are_damaged_below_are_whole(run_folder):
    newest = run_folder / "checkpoints" / "step_00000006"
    assert newest_whole(run_folder) == newest and read_run(run_folder).tensors["head.bias"].tolist() == [6, 6]


FILE_DAMAGE = {
    "with a flipped byte": lambda f: put_bytes(f, flipped(f.read_bytes())),
    "cut short": lambda f: cut_file(f, 0.7),
    "emptied": lambda f: put_bytes(f, b""),
    "missing": lambda f: f.unlink(),
    "a byte longer": lambda f: put_bytes(f, f.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("how", FILE_DAMAGE)
@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "rank_00000.pt", "progress.json", "settings.yaml", "provenance.json"]
)
def test_a_checkpoint_with_a_damaged_file_is_passed_over_and_an_only_one_refused(run_folder, caplog, name, how):
    older, newest = (run_folder / "checkpoints" / f"step_{step:08d}" for step in STEPS)
    FILE_DAMAGE[how](newest / name)
    assert name in verify(newest)
    assert newest_whole(run_folder) == older
    assert "step_00000006 is damaged" in caplog.text and name in caplog.text
    assert read_run(run_folder).tensors["head.bias"].tolist() == [3, 3], (
        "weights of the older one, never of the damaged one"
    )
    shutil.rmtree(older)
    assert newest_whole(run_folder) is None
    refused(lambda: read_run(run_folder), str(run_folder), "none of them whole")


MANIFESTS = {
    "missing": None,
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "without files": b"{}",
    "of no files": b'{"files": {}}',
    "of files in a list": b'{"files": [1, 2]}',
    "of files without a hash": lambda m: {"files": {name: entry[:1] for name, entry in m["files"].items()}},
    "of files that are numbers": lambda m: {"files": dict.fromkeys(m["files"], 5)},
    "of another hash": lambda m: {"files": {name: [entry[0], "0" * 64] for name, entry in m["files"].items()}},
    "of another size": lambda m: {"files": {name: [entry[0] + 1, entry[1]] for name, entry in m["files"].items()}},
    "nested without end": b'{"files": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_a_checkpoint_with_a_damaged_manifest_is_passed_over(run_folder, how):
    older, newest = (run_folder / "checkpoints" / f"step_{step:08d}" for step in STEPS)
    if MANIFESTS[how] is None:
        (newest / "manifest.json").unlink()
    else:
        written(newest / "manifest.json", MANIFESTS[how])
        assert verify(newest)
    assert newest_whole(run_folder) == older


@pytest.mark.parametrize("name", ["../../x", "../step_00000003/progress.json", "/etc/passwd", "..", "a\0b"])
def test_a_checkpoints_manifest_cannot_name_a_file_outside_of_it(run_folder, name):
    newest = run_folder / "checkpoints" / "step_00000006"
    (run_folder / "x").write_bytes(b"outside")
    there = (
        run_folder / "x"
        if name == "../../x"
        else Path("/etc/passwd")
        if name == "/etc/passwd"
        else newest / "progress.json"
    )
    entry = [there.stat().st_size, sha256_of_file(there)]
    written(newest / "manifest.json", lambda m: {"files": m["files"] | {name: entry}})
    assert verify(newest) and newest_whole(run_folder).name == "step_00000003"


def test_a_folder_that_is_no_checkpoint_is_not_listed(run_folder):
    for name in (".tmp-step_00000009", "step_9", "step_000000099", "set_aside_step_00000009_x", "universal"):
        shutil.copytree(run_folder / "checkpoints" / "step_00000006", run_folder / "checkpoints" / name)
    (run_folder / "checkpoints" / "step_00000012").write_text("a file")
    assert [folder.name for folder in list_checkpoints(run_folder)] == ["step_00000006", "step_00000003"]


SETTINGS = {
    "empty": b"",
    "a list": b"- stage\n",
    "without a stage": b"recipe: {}\n",
    "of a stage that is a list": b"stage: [pretrain]\nrecipe: {}\n",
    "of a recipe that is a word": b"stage: pretrain\nrecipe: mine\n",
    "cut short": lambda text: text[: len(text) // 2] + b"\n  x: [",
    "bytes that are no text": b"\xff\xfe\x00",
    "a Python object": b"stage: !!python/object/apply:os.system ['true']\nrecipe: {}\n",
    "brackets without end": b"[" * 1500,
}


@pytest.mark.parametrize("how", SETTINGS)
def test_a_run_with_damaged_settings_is_refused(run_folder, how):
    path, change = run_folder / "settings.yaml", SETTINGS[how]
    put_bytes(path, change if isinstance(change, bytes) else change(path.read_bytes()))
    refused(lambda: read_settings(run_folder), str(run_folder / "settings.yaml"), "is not what a run wrote there")
    refused(lambda: read_run(run_folder), str(run_folder / "settings.yaml"))


PROVENANCES = {
    "no JSON": b"{",
    "a list": b"[]",
    "a key twice": b'{"commit": "a", "commit": "b"}',
    "classes in a word": b'{"classes": "cat"}',
    "classes of numbers": b'{"classes": [1, 2]}',
    "mean of words": b'{"mean": ["a", "b", "c"]}',
    "a fingerprint that is a number": b'{"images_fingerprint": 5}',
    "facts that are a list": b'{"init_facts": [1]}',
    "brackets without end": b"[" * 100_000,
}


@pytest.mark.parametrize("how", PROVENANCES)
def test_a_run_with_a_damaged_record_of_its_origin_is_refused(run_folder, how):
    written(run_folder / "provenance.json", PROVENANCES[how])
    refused(lambda: read_provenance(run_folder), str(run_folder / "provenance.json"), "is not what a run wrote there")


RESEALED = {
    "settings of another stage": (
        "settings.yaml",
        lambda text: text.replace(b"stage: finetune", b"stage: dreaming"),
        "dreaming",
    ),
    "a recipe with an unknown setting": (
        "settings.yaml",
        lambda text: text.replace(b"  model:\n", b"  model:\n    colour: red\n"),
        "recipe.model.colour",
    ),
    "a recipe with a width in words": (
        "settings.yaml",
        lambda text: text.replace(b"    width: 24\n", b"    width: wide\n"),
        "recipe.model.width",
    ),
    "no classes": ("provenance.json", lambda text: text.replace(b'"classes"', b'"clases"'), "does not tell classes"),
}


@pytest.mark.parametrize("how", RESEALED)
def test_a_checkpoint_whose_records_were_exchanged_with_their_hashes_is_refused(run_folder, how):
    name, change, words = RESEALED[how]
    newest = run_folder / "checkpoints" / "step_00000006"
    put_bytes(newest / name, change((newest / name).read_bytes()))
    entry = [(newest / name).stat().st_size, sha256_of_file(newest / name)]
    written(newest / "manifest.json", lambda m: {"files": m["files"] | {name: entry}})
    refused(lambda: read_run(run_folder), words)


def test_what_a_checkpoints_pickle_names_is_told_without_running_it(tmp_path):
    """DeepSpeed's files hold classes of its own beside the tensors; any other name in them is not read."""
    assert foreign_classes(pickled({"a": torch.ones(2), "n": [1, "x"]}, tmp_path / "plain.pt")) == []
    path = pickled(
        {"a": torch.ones(2), "settings": ViewSettings(), "x": Payload(tmp_path / "ran")}, tmp_path / "objects.pt"
    )
    assert foreign_classes(path, frozenset({"peco_ds.config.ViewSettings"})) == ["io.open"]
    for damaged in (
        cut_file(path, 0.5),
        put_bytes(tmp_path / "bare.pt", pickle.dumps({"x": Payload(tmp_path / "ran")})),
    ):
        refused(lambda: foreign_classes(damaged), str(damaged), "not a readable weights file")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------- the whole


def test_the_entries_of_the_stages_answer_damaged_sets_in_one_line(photograph, tokenizer_release, tmp_path):
    """The readers above are those the stages use: the same damage, met by pretrain.py and tokenize_shards.py."""
    from peco_ds import pretrain, tokenize_shards

    shutil.copytree(tokenizer_release, tmp_path / "tokenizer")
    token_set(
        tmp_path,
        [("codes.npy", CODES), ("views.npy", ROWS)],
        image=saved(photograph, "PNG"),
        tokenizer=load_tokenizer(tokenizer_release)[1].fingerprint,
    )
    sizes = (
        "model.image_px=32 model.patch_px=8 model.width=24 model.heads=3 mask.count=4 "
        "mask.min_block=2 objective.num_codes=64 views.tokenizer_px=32 "
        "views.tokenizer_precision=fp32 views.scale=[0.2,1.0] views.count=2"
    )
    length = (
        "schedule.epochs=null schedule.steps=4 schedule.warmup_epochs=null "
        "checkpoint.every_epochs=null run.global_batch=4 run.micro_batch=4"
    )
    overrides = [
        f"data.root={tmp_path}",
        "data.images=images",
        "data.tokens=tokens",
        *sizes.split(),
        *length.split(),
        "--dry_run",
    ]
    assert pretrain.main(["--recipe", "peco_vitb16", *overrides]) == 0
    for stage, name, change, words in (
        (pretrain, "images/manifest.json", first_shard(name="../x.tar"), "'../x.tar' is no plain file name"),
        (tokenize_shards, "images/manifest.json", first_shard(name="../x.tar"), "'../x.tar' is no plain file name"),
        (pretrain, "tokens/manifest.json", with_fields(num_codes=63), "a vocabulary of 63"),
        (tokenize_shards, "tokens/manifest.json", first_shard(bytes=-1), "shards.0.bytes"),
        (pretrain, "tokenizer/tokenizer.json", with_fields(num_codes=63), "num_codes is 63"),
        (tokenize_shards, "tokenizer/tokenizer.json", b"{", "not readable as JSON"),
    ):
        before = (tmp_path / name).read_bytes()
        written(tmp_path / name, change)
        refused(lambda: stage.main(["--recipe", "peco_vitb16", *overrides]), name.rpartition("/")[0], words)
        (tmp_path / name).write_bytes(before)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3, "stage": 1}}')
    refused(
        lambda: pretrain.main(
            ["--recipe", "peco_vitb16", "--deepspeed_config", str(tmp_path / "zero.json"), *overrides]
        ),
        "zero.json",
        "stands twice",
    )


TABLES = (
    BAD_IMAGES,
    LABELS,
    LISTS,
    TARS,
    INDEXES,
    ANY_MANIFEST,
    OF_TOKENS,
    RECORDS,
    SOFT_RECORDS,
    RECIPES,
    BLOCKS,
    JSONS,
    WEIGHTS,
    TENSORS,
    CONFIGS,
    CARDS,
    TOKENIZER_FILES,
    FILE_DAMAGE,
    MANIFESTS,
    SETTINGS,
    PROVENANCES,
    RESEALED,
)


def test_the_tables_hold_at_least_sixty_kinds_of_damage():
    assert sum(map(len, TABLES)) >= 250 and all(TABLES)
