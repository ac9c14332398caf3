"""The formats on disk: image shards, token shards, their manifests, tokenizer and view records.

Letters: B images, N patches an image, M masked patches an image, K views, V codes, T soft codes a patch.

Image shard   `<shard>.tar`: `<key>.jpg|jpeg|png|webp` and, where labelled, `<key>.cls` (ASCII integer), or of scenes
              `<key>.seg.png`: the class of every pixel, as published, of the image's size.
Token shard   same shard name, same keys, same order: `<key>.codes.npy` uint16 [K, N] row-major, `<key>.views.npy`
              float32 [K, len(VIEW_COLUMNS)], and optionally `<key>.topk_codes.npy` uint16 [K, N, T],
              `<key>.topk_probs.npy` float16 [K, N, T].
Index         `<shard>.index.json` beside each tar: byte offset, size and CRC-32 of every member.
Manifest      `manifest.json`, one a folder: what the folder holds and what it was made from.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from peco_ds.errors import UserError
from peco_ds.own_files import written_whole
from peco_ds.remote_paths import Place, RemotePath, fault_of_shard_url, is_url, place_of

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# Statistics of images in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Of the class map beside an image.
MAP_EXTENSION = "seg.png"

# One row a view. Box in source pixels after EXIF rotation; flip is 0 or 1; the three factors multiply (1 = unchanged);
# jitter_order is the index of the order in which the three adjustments are applied, in itertools.permutations order.
VIEW_COLUMNS = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation", "jitter_order")

# The facts of a tokenizer's card that the cards of models trained on its codes need.
TOKENIZER_FACTS = ("recipe", "origin", "licence", "judge", "judge_licence")

# The target of a place that only fills up a row, since the masks of a batch may differ in size.
IGNORED = -100
# In the place of a code where the tokenizer's numbers are not finite, since the arg max of NaN would be a code like any
# other. Never stored.
NO_CODE = -1

_strict = ConfigDict(extra="forbid", allow_inf_nan=False)


def _file_name(name: str) -> str:
    """Check that a name from a manifest holds no folder.

    It becomes a file to read, to write or to remove; with a folder in it, that could be any file.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name[:80]!r} is no plain file name")
    return name


def _place(path: str) -> str:
    if is_url(path):
        if fault := fault_of_shard_url(path):
            raise ValueError(fault)
        return path
    if path and (not path.startswith("/") or ".." in path.split("/") or "\0" in path):
        raise ValueError(f"{path[:80]!r} is no absolute path without '..'")
    return path


_Count = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, config=_strict)
class Shard:
    """One tar of a set, with the size and hashes to verify it by."""

    # Relative to the manifest unless `path` is given.
    name: Annotated[str, AfterValidator(_file_name)]
    samples: _Count
    bytes: _Count
    sha256: _Sha256
    index_sha256: _Sha256
    # Set when the tar lies elsewhere and was indexed in place, as a path or a URL; its index lies beside the manifest.
    path: Annotated[str, AfterValidator(_place)] = ""
    # Of such a tar: when it was last changed before it was indexed; 0: not known, or a tar of the set's own.
    modified_ns: _Count = 0
    # Of a tar in a store, indexed in place: what the store marked its content by; "": nothing.
    etag: str = ""


@dataclass(frozen=True, config=_strict)
class SceneMaps:
    """How the numbers in class maps are read; 255 is never a class."""

    # 0 is no class, k is class k - 1 (ADE20K).
    reduce_zero_label: bool
    # Further numbers that are no class.
    ignored: list[Annotated[int, Field(ge=0, le=255)]] = field(default_factory=list)


@dataclass(frozen=True, config=_strict)
class ImageManifest:
    shards: list[Shard]
    samples: _Count
    # Names in label order; None for an unlabelled set.
    classes: list[str] | None = None
    # "path: reason" for each image that could not be packed
    rejected: list[str] = field(default_factory=list)
    # Source and options of the packing, for people.
    packed_as: dict[str, str] = field(default_factory=dict)
    # Reason -> number of files, or of members of tars, that are not in the set for it.
    left_out: dict[str, _Count] = field(default_factory=dict)
    # Remark -> number of images that are in the set all the same.
    remarks: dict[str, _Count] = field(default_factory=dict)
    # Set where every image has a class map; `classes` are then those of pixels.
    maps: SceneMaps | None = None
    kind: Literal["images"] = "images"
    format_version: int = FORMAT_VERSION

    def fingerprint(self) -> str:
        """sha256 over shard names, sizes and contents: two sets with one fingerprint hold the same samples in one
        order.
        """
        return self._fingerprint

    # Cached, because a start asks for it several times.
    @cached_property
    def _fingerprint(self) -> str:
        with garbage_collection_paused():
            return sha256_of_json([[s.name, s.samples, s.sha256] for s in self.shards])


@dataclass(frozen=True, config=_strict)
class ViewRecipe:
    """How the recorded views were drawn; a pure function of (seed, sample number, view number)."""

    tokenizer_px: Annotated[int, Field(ge=1)]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    color_jitter: float
    seed: _Count
    # Sets that were made before there was a choice do not tell:
    tokenizer_interpolation: Literal["bicubic", "lanczos"] = "bicubic"
    tokenizer_precision: Literal["bf16", "fp16", "fp32"] = "fp32"


@dataclass(frozen=True, config=_strict)
class TokenManifest:
    shards: list[Shard]
    samples: _Count
    images_fingerprint: str
    # Shard name -> sha256 of the image tar that it was made from.
    image_shards: dict[str, str]
    tokenizer_fingerprint: str
    # At most 65,536, since codes are stored as uint16.
    num_codes: Annotated[int, Field(ge=1, le=65536)]
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    num_views: Annotated[int, Field(ge=1)]
    views: ViewRecipe
    topk: _Count = 0
    topk_temperature: float = 1.0
    # TOKENIZER_FACTS, as far as they were known when the set was made
    tokenizer_facts: dict[str, str] = field(default_factory=dict)
    kind: Literal["tokens"] = "tokens"
    format_version: int = FORMAT_VERSION


_Manifest = TypeVar("_Manifest", ImageManifest, TokenManifest)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's garbage collector.

    While a manifest of a hundred thousand shards is read, the collector would go through all objects of the process
    again and again and free nothing, which takes half of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@garbage_collection_paused()
def read_manifest(folder: str | Place, manifest_type: type[_Manifest]) -> _Manifest:
    """Read and check `folder/manifest.json`.

    Raises: UserError if the folder or the manifest is missing, is not JSON, is of another kind or version, misses a
        field, has one of another type or range or a shard name that leads out of the folder, or contradicts itself.
    """
    folder = place_of(folder)
    path = folder / MANIFEST_NAME
    kind = manifest_type.kind
    maker = "pack_images.py" if kind == "images" else "tokenize_shards.py"
    if isinstance(path, RemotePath):
        try:
            return _parse_manifest(path, path.read_bytes(), manifest_type, maker)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no {MANIFEST_NAME} of {kind} shards there, or no such bucket or host; correct the address, "
                f"or make the set with {maker}"
            ) from None
    assert isinstance(folder, Path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of {kind} shards; make it with {maker} or correct the path")
    if not path.is_file():
        tars = len(list(folder.glob("*.tar")))
        held = (
            f"{tars} tar files but no {MANIFEST_NAME}, so they cannot be trusted"
            if tars
            else f"no shards and no {MANIFEST_NAME}"
        )
        raise UserError(
            f"{folder}: holds {held}; make it with {maker}"
            + ("" if tars or kind != "images" else f" --images {folder} --out ANOTHER_FOLDER")
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); make it again with {maker}") from None
    return _parse_manifest(path, data, manifest_type, maker)


def _parse_manifest(path: Place, data: bytes, manifest_type: type[_Manifest], maker: str) -> _Manifest:
    kind = manifest_type.kind
    try:
        # As a file that is opened as text: any of the three ends of a line is one.
        text = data.decode("utf-8")
        raw = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); make it again with {maker}") from None
    found = raw.get("kind") if isinstance(raw, dict) else None
    if found != kind:
        raise UserError(
            f"{path}: describes {short(found)}, but {kind!r} are needed here; give a folder made by {maker}"
        )
    if type(raw.get("format_version")) is not int or raw["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {short(raw.get('format_version'))}, this release reads "
            f"{FORMAT_VERSION}; make it again with {maker}"
        )
    # It is as large as the object that is made next.
    del raw
    try:
        # As JSON and strictly: a number in quotes is no number, while a list stands for a tuple.
        manifest = TypeAdapter(manifest_type).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; make it again with {maker}") from None
    fault = _contradiction(manifest)
    if fault:
        raise UserError(f"{path}: {fault}; make it again with {maker}")
    return manifest


def _contradiction(manifest) -> str:
    """What is wrong with a manifest beyond its single fields; "" if nothing is."""
    # The index is named by the stem.
    stems = sorted(map(stem_of, (shard.name for shard in manifest.shards)))
    twice = next((stem for stem, later in zip(stems, stems[1:]) if stem == later), None)
    if twice is not None:
        return f"shards: {twice!r} stands twice"
    counted = sum(shard.samples for shard in manifest.shards)
    if counted != manifest.samples:
        return f"samples: {manifest.samples}, but its shards hold {counted}"
    if manifest.samples == 0:
        return "samples: the set holds none"
    elsewhere = next((shard.name for shard in manifest.shards if shard.path), None)
    return (
        f"shards: {elsewhere!r} has a path, but token shards lie beside their manifest"
        if manifest.kind == "tokens" and elsewhere
        else ""
    )


def stem_of(tar_name: str) -> str:
    """As `Path.stem`, which takes twenty times as long: a manifest may name a hundred thousand."""
    return tar_name[:-4] if tar_name.endswith(".tar") and len(tar_name) > 4 else Path(tar_name).stem


def read_json(path: str | Place):
    """The value of a JSON file, read strictly.

    Raises: ValueError saying why it is none: not UTF-8, not JSON, nested too deep, a key twice in one object, a number
        that is not finite. OSError if it cannot be read.
    """
    return parse_json(place_of(path).read_text(encoding="utf-8"))


def parse_json(text: str):
    """As `read_json`, for a text."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    # Of equal keys Python would keep the last, another reader the first.
    if len(found) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        raise ValueError(f"key {short(next(key for key, later in zip(keys, keys[1:]) if key == later))} stands twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def short(value) -> str:
    """A value for a one-line message."""
    if isinstance(value, (dict, list)):
        # Its text may be longer than memory, or nested without end.
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_manifest(folder: str | Path, manifest) -> Path:
    """Write `folder/manifest.json` whole or not at all; the last step in making a set."""
    return write_json(Path(folder) / MANIFEST_NAME, asdict(manifest))


def write_json(path: Path, value) -> Path:
    """Write JSON to a temporary name, fsync, rename: a reader never sees half a file.

    Raises: UserError naming a number that is not finite, which JSON has no text for and `read_json` refuses; OSError
        that names the file.
    """
    if place := _place_not_finite(value):
        raise UserError(f"{path}: not written, {place.removeprefix('.')} is not finite")
    with written_whole(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")
    return path


def json_text(value) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=1) + "\n"


def _place_not_finite(value) -> str:
    """Where a number of a JSON value is NaN or infinite, as .a.b[0] = nan; "" if none is."""
    try:
        json.dumps(value, allow_nan=False)
        return ""
    except ValueError:
        pass
    if isinstance(value, dict):
        parts = [(f".{key}", part) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [(f"[{place}]", part) for place, part in enumerate(value)]
    else:
        return f" = {value}"
    return next(f"{name}{inner}" for name, part in parts if (inner := _place_not_finite(part)))


def sha256_of_json(value) -> str:
    """sha256 of the canonical JSON text of a value (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
