"""Contracts of everything that lies on disk: image shards, token shards, their manifests, tokenizer and view records.

Letters: B images, N patches an image, M masked patches an image, K views, V codes.

Image shard   `<shard>.tar`: `<key>.jpg|jpeg|png|webp` and, where labelled, `<key>.cls` (ASCII integer).
Token shard   same shard name, same keys, same order: `<key>.codes.npy` uint16 [K, N] row-major, `<key>.views.npy` float32
              [K, len(VIEW_COLUMNS)], and optionally `<key>.topk_codes.npy` uint16 [K, N, T], `<key>.topk_probs.npy` float16 [K, N, T].
Index         `<shard>.index.json` beside each tar: byte offset, size and CRC-32 of every member.
Manifest      `manifest.json`, one a folder: what the folder holds and what it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, field
from pathlib import Path
from typing import Literal, Optional

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from peco_ds.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pictures in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# One row a view. Box in source pixels after EXIF rotation; flip is 0 or 1; the three factors multiply (1 = unchanged);
# jitter_order is the index of the order in which the three adjustments are applied, in itertools.permutations order.
VIEW_COLUMNS = ("top", "left", "height", "width", "flip", "brightness", "contrast", "saturation", "jitter_order")

_strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_strict)
class Shard:
    """One tar of a set and what is needed to trust it."""

    name: str  # file name, relative to the manifest unless `path` is given
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    path: str = ""  # set when the tar lies elsewhere and was indexed in place; its index lies beside the manifest


@dataclass(frozen=True, config=_strict)
class ImageManifest:
    shards: list[Shard]
    samples: int
    classes: Optional[list[str]] = None  # names in label order; None for an unlabelled set
    rejected: list[str] = field(default_factory=list)  # "path: reason" for each picture that could not be packed
    packed_as: dict[str, str] = field(default_factory=dict)  # source and options of the packing, for people
    kind: Literal["images"] = "images"
    format_version: int = FORMAT_VERSION

    def fingerprint(self) -> str:
        """sha256 over shard names, sizes and contents: two sets with one fingerprint hold the same samples in one order."""
        return sha256_of_json([[s.name, s.samples, s.sha256] for s in self.shards])


@dataclass(frozen=True, config=_strict)
class ViewRecipe:
    """How the recorded views were drawn; a pure function of (seed, sample number, view number)."""

    tokenizer_px: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    color_jitter: float
    seed: int


@dataclass(frozen=True, config=_strict)
class TokenManifest:
    shards: list[Shard]
    samples: int
    images_fingerprint: str
    image_shards: dict[str, str]  # shard name -> sha256 of the image tar it was made from
    tokenizer_fingerprint: str
    num_codes: int
    grid: tuple[int, int]
    num_views: int
    views: ViewRecipe
    topk: int = 0
    topk_temperature: float = 1.0
    kind: Literal["tokens"] = "tokens"
    format_version: int = FORMAT_VERSION


def read_manifest(folder: str | Path, manifest_type: type):
    """Read and check `folder/manifest.json`.

    Raises: UserError if the folder or the manifest is missing, is not JSON, is of another kind or version, or misses a field.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    kind = manifest_type.__dataclass_fields__["kind"].default
    maker = "pack_images.py" if kind == "images" else "tokenize_shards.py"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of {kind} shards; make it with {maker} or correct the path")
    if not path.is_file():
        tars = len(list(folder.glob("*.tar")))
        held = f"{tars} tar files but no {MANIFEST_NAME}, so they cannot be trusted" if tars else f"no shards and no {MANIFEST_NAME}"
        raise UserError(f"{folder}: holds {held}; make it with {maker}" + ("" if tars or kind != "images" else f" --images {folder} --out ANOTHER_FOLDER"))
    try:
        raw = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); make it again with {maker}") from None
    found = raw.get("kind") if isinstance(raw, dict) else None
    if found != kind:
        raise UserError(f"{path}: describes {found!r}, but {kind!r} are needed here; give a folder made by {maker}")
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format version {raw.get('format_version')!r}, this release reads {FORMAT_VERSION}; make it again with {maker}")
    try:
        return TypeAdapter(manifest_type).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg']}; make it again with {maker}") from None


def write_manifest(folder: str | Path, manifest) -> Path:
    """Write `folder/manifest.json` whole or not at all; the last act of whoever makes a set."""
    return write_json(Path(folder) / MANIFEST_NAME, asdict(manifest))


def write_json(path: Path, value) -> Path:
    """Write JSON to a temporary name, fsync, rename: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def sha256_of_json(value) -> str:
    """sha256 of the canonical JSON text of a value (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
