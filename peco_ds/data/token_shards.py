"""Token records: writing them whole or not at all, and opening a set only if it belongs to the images and the
tokenizer at hand.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import webdataset

from peco_ds.config import ViewSettings
from peco_ds.data.atomic_files import flush_folder, flush_to_disk, temporary_file
from peco_ds.data.indexed_tar import ShardSet, build_index, index_name
from peco_ds.data.retry import UnreadableRecord, read_with_retries
from peco_ds.data.views import fault_of_views
from peco_ds.errors import UserError
from peco_ds.own_files import TAR_OWNER
from peco_ds.remote_paths import Place
from peco_ds.schema import (
    VIEW_COLUMNS,
    ImageManifest,
    Shard,
    TokenManifest,
    json_text,
    read_manifest,
    sha256_of_file,
    write_json,
)


@dataclass(frozen=True)
class TokenRecord:
    """What is stored for one image."""

    key: str
    codes: np.ndarray  # uint16 [K, N], row-major patches
    views: np.ndarray  # float32 [K, len(VIEW_COLUMNS)]
    topk_codes: np.ndarray | None = None  # uint16 [K, N, T]
    # float16 [K, N, T], probabilities of the full softmax: a row sums to the mass kept.
    topk_probs: np.ndarray | None = None
    members: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """False for an image that could not be read when it was tokenized: its views have no box."""
        return bool(self.views[0, VIEW_COLUMNS.index("height")] > 0)

    def __post_init__(self) -> None:
        arrays = {
            "codes.npy": self.codes,
            "views.npy": self.views,
            "topk_codes.npy": self.topk_codes,
            "topk_probs.npy": self.topk_probs,
        }
        self.members.update({name: array for name, array in arrays.items() if array is not None})


def write_token_shard(
    folder: Path,
    name: str,
    records: Iterable[TokenRecord],
    committing: Callable[[], AbstractContextManager] = nullcontext,
    register: Callable[[Shard, bool], None] = lambda _shard, _stands: None,
) -> Shard:
    """Write `folder/name` and its index under temporary names, fsync, rename.

    The index last, so a shard with an index is whole.

    Args:
        name: the image shard's file name.
        records: in the image shard's order.
        committing: what to hold while both take their final names.
        register: called under it with the shard and whether its files stand there already; where they do not, before
            they take their names.
    Raises: UserError for a key that stands twice; OSError that names the file.
    """
    tar, index = folder / name, folder / index_name(name)
    records = iter(_with_keys_of_their_own(records, name))
    # The first record starts the loader processes. Forked later, they would hold the temporary file's lock.
    first = list(islice(records, 1))
    with temporary_file(tar) as file:
        # With mtime 0 and one owner the same tokens give the same bytes, hence the same sha256.
        with webdataset.TarWriter(file, user=TAR_OWNER, group=TAR_OWNER, mtime=0) as writer:
            for record in chain(first, records):
                writer.write({"__key__": record.key, **record.members})
        flush_to_disk(file)
        found = {**build_index(file.name), "tar": name}
        shard = Shard(
            name=name,
            samples=len(found["samples"]),
            bytes=os.path.getsize(file.name),
            sha256=sha256_of_file(file.name),
            index_sha256=hashlib.sha256(json_text(found).encode()).hexdigest(),
        )
        with committing():
            # Where another writer was quicker, its files stay, so that a finished shard is never absent.
            stands = _stand_there(tar, shard.sha256, index, json_text(found))
            register(shard, stands)
            if not stands:
                index.unlink(missing_ok=True)
                os.replace(file.name, tar)
                write_json(index, found)
                flush_folder(folder)
    return shard


def _with_keys_of_their_own(records: Iterable[TokenRecord], name: str) -> Iterator[TokenRecord]:
    """The records. Raises: UserError at a key that stands twice: no reader of tars would tell the two apart."""
    seen: set[str] = set()
    for record in records:
        if record.key in seen:
            raise UserError(
                f"image shard {name}: two images have the key {record.key!r}; make the image set again (pack_images.py)"
            )
        seen.add(record.key)
        yield record


def _stand_there(tar: Path, sha256: str, index: Path, index_text: str) -> bool:
    try:
        return index.read_text(encoding="utf-8") == index_text and sha256_of_file(tar) == sha256
    except (OSError, ValueError):
        return False


@lru_cache(maxsize=64)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns come first, type, and where the values start.

    Remembered: the records of a set have the same few headers, and parsing one takes as long as a mask.
    """
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, column_major, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("pickled objects, which could run anything and are not read")
    return shape, column_major, dtype, file.tell()


def read_npy(data: bytes, *, what: str, dtype, shape: tuple[int | None, ...], row: int | None = None) -> np.ndarray:
    """Parse an .npy member without unpickling anything.

    The header is read first: nothing of another type is looked at, and memory is taken for no more than was delivered.

    Args:
        what: shard, key and member, for the message.
        shape: None matches any length.
        row: return only this row of the first axis, as [1, ...].
    Raises: UserError if the bytes are no such array.
    """
    try:
        # The field that holds the header's length has two bytes in format version 1, four in later ones.
        size_bytes = 2 if data[6:7] == b"\x01" else 4
        header_end = 8 + size_bytes + int.from_bytes(data[8 : 8 + size_bytes], "little")
        found_shape, column_major, found_dtype, start = _parse_npy_header(data[:header_end])
    except Exception as error:
        # The header is a Python literal; its reader fails on other bytes in many ways.
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{what}: not an .npy array ({reason or type(error).__name__}); make the token shard again"
        ) from None
    fits = (
        found_dtype == dtype
        and not column_major
        and len(found_shape) == len(shape)
        and all(want in (None, have) for want, have in zip(shape, found_shape))
    )
    if not fits:
        order = ", columns first" if column_major else ""
        raise UserError(
            f"{what}: {found_dtype} {found_shape}{order}, expected {np.dtype(dtype)} {shape}; make the "
            "token shard again"
        )
    left, wanted = len(data) - start, math.prod(found_shape) * found_dtype.itemsize
    if left != wanted:
        raise UserError(f"{what}: not an .npy array ({left} bytes for {wanted}); make the token shard again")
    values = np.frombuffer(data, dtype, offset=start).reshape(found_shape)
    # A copy, because a view of the bytes could not be written to.
    return (values if row is None else values[row : row + 1]).copy()


class TokenSet:
    """Random access to the records of a folder of token shards.

    Args:
        folder: of token shards.  images: manifest of the image set they must belong to.
        num_codes, grid, views: what the recipe asks for.
        tokenizer_fingerprint: refuse tokens of any other tokenizer; None: any.
    Raises: UserError naming what does not fit.
    """

    def __init__(
        self,
        folder: Place,
        images: ImageManifest,
        *,
        num_codes: int,
        grid: int,
        views: ViewSettings,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest = read_manifest(folder, TokenManifest)
        self._refuse_wrong_ties(images, num_codes, grid, views, tokenizer_fingerprint)
        self.shards = ShardSet(folder, manifest)
        self.num_samples = self.shards.num_samples
        self._num_patches = grid * grid
        # Soft codes are many times as large as hard ones, so they are read only where they are asked for.
        self._soft = views.topk > 0
        self._members = ("codes.npy", "views.npy", *(("topk_codes.npy", "topk_probs.npy") if self._soft else ()))

    def _refuse_wrong_ties(self, images, num_codes, grid, views, tokenizer_fingerprint) -> None:
        found, folder = self.manifest, self.folder
        if tokenizer_fingerprint is not None and found.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{folder}: made by tokenizer {found.tokenizer_fingerprint[:12]}, this run names tokenizer "
                f"{tokenizer_fingerprint[:12]}; "
                "tokenize again or set data.tokenizer to the one that made them"
            )
        for shard in images.shards:
            made_from = found.image_shards.get(shard.name)
            if made_from is None:
                raise UserError(
                    f"{folder}: no tokens for image shard {shard.name}; run tokenize_shards.py on this image set"
                )
            if made_from != shard.sha256:
                raise UserError(
                    f"{folder}: image shard {shard.name} has sha256 {shard.sha256[:12]}, the tokens were made "
                    f"from {made_from[:12]}; tokenize this image set"
                )
        if found.images_fingerprint != images.fingerprint() or [s.name for s in found.shards] != [
            s.name for s in images.shards
        ]:
            raise UserError(
                f"{folder}: made from image set {found.images_fingerprint[:12]}, this run reads "
                f"{images.fingerprint()[:12]}; tokenize this image set"
            )
        if found.num_codes != num_codes:
            raise UserError(
                f"{folder}: codes of a vocabulary of {found.num_codes}, the recipe has objective.num_codes "
                f"{num_codes}; set it to {found.num_codes}"
            )
        if tuple(found.grid) != (grid, grid):
            raise UserError(
                f"{folder}: codes on a {found.grid[0]}x{found.grid[1]} grid, the backbone has {grid}x{grid} patches; "
                "tokenize with views.tokenizer_px = stride x grid, or change model.image_px or model.patch_px"
            )
        if views.count > found.num_views:
            raise UserError(
                f"{folder}: {found.num_views} views are stored for each image, views.count asks for "
                f"{views.count}; lower it or tokenize with more"
            )
        if views.topk > found.topk:
            remedy = "lower it or tokenize with more" if found.topk else f"tokenize with views.topk={views.topk}"
            raise UserError(
                f"{folder}: {found.topk} soft codes are stored for each patch, views.topk asks for "
                f"{views.topk}; {remedy}"
            )
        if views.topk and views.topk_temperature != found.topk_temperature:
            raise UserError(
                f"{folder}: soft codes of temperature {found.topk_temperature}, the recipe has "
                f"views.topk_temperature {views.topk_temperature}; set it to {found.topk_temperature} or "
                "tokenize again"
            )
        for name, recorded in asdict(found.views).items():
            if getattr(views, name) != recorded:
                raise UserError(
                    f"{folder}: views were recorded with views.{name} = {recorded}, the recipe has "
                    f"{getattr(views, name)}; set it to the recorded one or tokenize again"
                )

    def prefetch(self, samples: Iterable[int]) -> None:
        """As `ShardSet.prefetch`."""
        self.shards.prefetch(samples, self._members)

    def read(self, sample: int, expected_key: str | None = None, view: int | None = None) -> TokenRecord:
        """The record of a global sample number.

        Args:
            view: read only this view, as a record with K = 1; the others are neither copied nor checked, but for the
                checksum of the whole record.
        Raises: UserError (with shard and key) for a damaged record, a key that is not the image's, or a code out of
            range.
        """
        try:
            key, members = read_with_retries(self.shards, sample, self._members)
        except UnreadableRecord as error:
            raise UserError(f"{error}; repair the file system or copy the token set again") from None
        shard, _ = self.shards.locate(sample)
        place = f"{self.folder}/{self.manifest.shards[shard].name}: {key}"
        if expected_key is not None and key != expected_key:
            raise UserError(
                f"{place}: the image at this place is {expected_key}; the shards do not belong together, tokenize again"
            )
        num_views = self.manifest.num_views
        for name in ("codes.npy", "views.npy"):
            if name not in members:
                raise UserError(f"{place}: has no {name}; make the token shard again")
        codes = read_npy(
            members["codes.npy"],
            what=f"{place}.codes.npy",
            dtype=np.uint16,
            shape=(num_views, self._num_patches),
            row=view,
        )
        views = read_npy(
            members["views.npy"],
            what=f"{place}.views.npy",
            dtype=np.float32,
            shape=(num_views, len(VIEW_COLUMNS)),
            row=view,
        )
        if codes.max(initial=0) >= self.manifest.num_codes:
            raise UserError(
                f"{place}.codes.npy: code {codes.max()} in a vocabulary of {self.manifest.num_codes}; make "
                "the token shard again"
            )
        fault = fault_of_views(views, first=view or 0)
        if fault:
            raise UserError(f"{place}.views.npy: {fault}; make the token shard again")
        soft = {}
        if self._soft:
            shape = (num_views, self._num_patches, self.manifest.topk)
            for name, dtype in (("topk_codes", np.uint16), ("topk_probs", np.float16)):
                soft[name] = read_npy(
                    members.get(f"{name}.npy", b""), what=f"{place}.{name}.npy", dtype=dtype, shape=shape, row=view
                )
            if soft["topk_codes"].max(initial=0) >= self.manifest.num_codes:
                raise UserError(
                    f"{place}.topk_codes.npy: code {soft['topk_codes'].max()} in a vocabulary of "
                    f"{self.manifest.num_codes}; make the token shard again"
                )
            # Written so that NaN fails too.
            if (
                not ((soft["topk_probs"] >= 0) & (soft["topk_probs"] <= 1)).all()
                or not soft["topk_probs"].any(axis=-1).all()
            ):
                raise UserError(f"{place}.topk_probs.npy: holds what is no probability; make the token shard again")
            if (np.diff(np.sort(soft["topk_codes"], axis=-1), axis=-1) == 0).any():
                raise UserError(f"{place}.topk_codes.npy: names a code twice for one patch; make the token shard again")
        return TokenRecord(key, codes, views, **soft)
