"""Token records: writing them whole or not at all, and opening a set only if it belongs to the pictures and the tokenizer at hand."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import webdataset

from peco_ds.config import ViewSettings
from peco_ds.data.indexed_tar import ShardSet, index_name, write_index
from peco_ds.errors import UserError
from peco_ds.schema import VIEW_COLUMNS, ImageManifest, Shard, TokenManifest, read_manifest, sha256_of_file


@dataclass(frozen=True)
class TokenRecord:
    """What is stored for one picture."""

    key: str
    codes: np.ndarray  # uint16 [K, N], row-major patches
    views: np.ndarray  # float32 [K, len(VIEW_COLUMNS)]
    topk_codes: np.ndarray | None = None  # uint16 [K, N, T]
    topk_probs: np.ndarray | None = None  # float16 [K, N, T], of the full softmax: a row sums to the mass kept
    members: dict = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """False for a picture that could not be read when it was tokenized: its views have no box."""
        return bool(self.views[0, VIEW_COLUMNS.index("height")] > 0)

    def __post_init__(self) -> None:
        arrays = {"codes.npy": self.codes, "views.npy": self.views, "topk_codes.npy": self.topk_codes, "topk_probs.npy": self.topk_probs}
        self.members.update({name: array for name, array in arrays.items() if array is not None})


def write_token_shard(folder: Path, name: str, records: Iterable[TokenRecord]) -> Shard:
    """Write `folder/name` and its index under temporary names, fsync, rename; the index last, so a shard with an index is whole.

    Args:
        name: the image shard's file name.  records: in the image shard's order.
    """
    tar, index = folder / name, folder / index_name(name)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            # mtime 0 and one owner: the same tokens give the same bytes, hence the same sha256.
            with webdataset.TarWriter(file, user="peco", group="peco", mtime=0) as writer:
                for record in records:
                    writer.write({"__key__": record.key, **record.members})
            file.flush()
            os.fsync(file.fileno())
        index.unlink(missing_ok=True)
        os.replace(temporary, tar)
    finally:
        temporary.unlink(missing_ok=True)
    samples, index_sha256 = write_index(tar, index)
    return Shard(name=name, samples=samples, bytes=tar.stat().st_size, sha256=sha256_of_file(tar), index_sha256=index_sha256)


def read_npy(data: bytes, *, what: str, dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """Parse an .npy member without unpickling anything.

    Args:
        what: shard, key and member, for the message.  shape: None matches any length.
    Raises: UserError if the bytes are no such array.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{what}: not an .npy array ({error}); make the token shard again") from None
    fits = array.dtype == dtype and array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape))
    if not fits:
        raise UserError(f"{what}: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; make the token shard again")
    return array


class TokenSet:
    """Random access to the records of a folder of token shards.

    Args:
        folder: of token shards.  images: manifest of the image set they must belong to.
        num_codes, grid, views: what the recipe asks for.  tokenizer_fingerprint: refuse tokens of any other tokenizer; None: any.
    Raises: UserError naming what does not fit.
    """

    def __init__(self, folder: Path, images: ImageManifest, *, num_codes: int, grid: int, views: ViewSettings, tokenizer_fingerprint: str | None = None) -> None:
        self.folder = folder
        self.manifest = manifest = read_manifest(folder, TokenManifest)
        self._refuse_wrong_ties(images, num_codes, grid, views, tokenizer_fingerprint)
        self.shards = ShardSet(folder, manifest)
        self.num_samples = self.shards.num_samples
        self._num_patches = grid * grid

    def _refuse_wrong_ties(self, images, num_codes, grid, views, tokenizer_fingerprint) -> None:
        found, folder = self.manifest, self.folder
        if tokenizer_fingerprint is not None and found.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{folder}: made by tokenizer {found.tokenizer_fingerprint[:12]}, this run names tokenizer {tokenizer_fingerprint[:12]}; "
                "tokenize again or set data.tokenizer to the one that made them"
            )
        for shard in images.shards:
            made_from = found.image_shards.get(shard.name)
            if made_from is None:
                raise UserError(f"{folder}: no tokens for image shard {shard.name}; run tokenize_shards.py on this image set")
            if made_from != shard.sha256:
                raise UserError(f"{folder}: image shard {shard.name} has sha256 {shard.sha256[:12]}, the tokens were made from {made_from[:12]}; tokenize this image set")
        if found.images_fingerprint != images.fingerprint() or [s.name for s in found.shards] != [s.name for s in images.shards]:
            raise UserError(f"{folder}: made from image set {found.images_fingerprint[:12]}, this run reads {images.fingerprint()[:12]}; tokenize this image set")
        if found.num_codes != num_codes:
            raise UserError(f"{folder}: codes of a vocabulary of {found.num_codes}, the recipe has objective.num_codes {num_codes}; set it to {found.num_codes}")
        if tuple(found.grid) != (grid, grid):
            raise UserError(
                f"{folder}: codes on a {found.grid[0]}x{found.grid[1]} grid, the backbone has {grid}x{grid} patches; "
                "tokenize with views.tokenizer_px = stride x grid, or change model.image_px or model.patch_px"
            )
        if views.count > found.num_views:
            raise UserError(f"{folder}: {found.num_views} views are stored for each picture, views.count asks for {views.count}; lower it or tokenize with more")
        if views.topk > found.topk:
            raise UserError(f"{folder}: {found.topk} soft codes are stored for each patch, views.topk asks for {views.topk}; lower it or tokenize with more")
        for name, recorded in asdict(found.views).items():
            if getattr(views, name) != recorded:
                raise UserError(f"{folder}: views were recorded with views.{name} = {recorded}, the recipe has {getattr(views, name)}; set it to the recorded one or tokenize again")

    def read(self, sample: int, expected_key: str | None = None) -> TokenRecord:
        """The record of a global sample number.

        Raises: UserError (with shard and key) for a damaged record, a key that is not the picture's, or a code out of range.
        """
        key, members = self.shards.read(sample)
        shard, _ = self.shards.locate(sample)
        place = f"{self.folder / self.manifest.shards[shard].name}: {key}"
        if expected_key is not None and key != expected_key:
            raise UserError(f"{place}: the picture at this place is {expected_key}; the shards do not belong together, tokenize again")
        num_views = self.manifest.num_views
        for name in ("codes.npy", "views.npy"):
            if name not in members:
                raise UserError(f"{place}: has no {name}; make the token shard again")
        codes = read_npy(members["codes.npy"], what=f"{place}.codes.npy", dtype=np.uint16, shape=(num_views, self._num_patches))
        views = read_npy(members["views.npy"], what=f"{place}.views.npy", dtype=np.float32, shape=(num_views, len(VIEW_COLUMNS)))
        if codes.max(initial=0) >= self.manifest.num_codes:
            raise UserError(f"{place}.codes.npy: code {codes.max()} in a vocabulary of {self.manifest.num_codes}; make the token shard again")
        soft = {}
        if self.manifest.topk:
            shape = (num_views, self._num_patches, self.manifest.topk)
            for name, dtype in (("topk_codes", np.uint16), ("topk_probs", np.float16)):
                soft[name] = read_npy(members.get(f"{name}.npy", b""), what=f"{place}.{name}.npy", dtype=dtype, shape=shape)
        return TokenRecord(key, codes, views, **soft)
