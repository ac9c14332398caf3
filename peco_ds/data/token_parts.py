"""A token set in the making: shard by shard, by many jobs, restartable; the manifest when all shards are there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from peco_ds.data.token_shards import TokenRecord, write_token_shard
from peco_ds.errors import UserError
from peco_ds.schema import MANIFEST_NAME, ImageManifest, Shard, TokenManifest, ViewRecipe, read_manifest, sha256_of_json, write_json, write_manifest

_PARTS = ".parts"  # one small file a finished shard: its entry in the manifest and what it was made from


class TokenParts:
    """The shards of a token set that are there already, and the writing of those that are not.

    Args:
        folder: of the token set.  images: what is tokenized.  The rest: what the codes are; a shard made with anything else is made again.
    Raises: UserError if the folder holds a finished set that was made otherwise.
    """

    def __init__(self, folder: Path, images: ImageManifest, *, tokenizer_fingerprint: str, num_codes: int, grid: int, num_views: int, topk: int, topk_temperature: float, views: ViewRecipe) -> None:
        self.folder = folder
        self._images = images
        self._common = dict(
            images_fingerprint=images.fingerprint(),
            tokenizer_fingerprint=tokenizer_fingerprint,
            num_codes=num_codes,
            grid=(grid, grid),
            num_views=num_views,
            topk=topk,
            topk_temperature=topk_temperature,
            views=views,
        )
        self._made_from = sha256_of_json({**self._common, "views": asdict(views)})
        self._refuse_another_set()

    def _refuse_another_set(self) -> None:
        """A finished set may be in use by a run; it is not overwritten shard by shard under its old manifest."""
        if not (self.folder / MANIFEST_NAME).is_file():
            return
        found = read_manifest(self.folder, TokenManifest)
        for name, value in self._common.items():
            if getattr(found, name) != value:
                raise UserError(f"{self.folder}: holds a finished token set with {name} = {getattr(found, name)}, this one has {value}; set data.tokens to another folder, or remove that one")

    def _part_file(self, number: int) -> Path:
        return self.folder / _PARTS / f"{Path(self._images.shards[number].name).stem}.json"

    def _part(self, number: int) -> Shard | None:
        """The entry of a finished shard that was made from the same things and is still there, else None."""
        try:
            part = json.loads(self._part_file(number).read_text())
            shard = Shard(**part["shard"])
            whole = part["made_from"] == self._made_from and (self.folder / shard.name).stat().st_size == shard.bytes
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return shard if whole else None

    def is_done(self, number: int) -> bool:
        return self._part(number) is not None

    def write(self, number: int, records: Iterable[TokenRecord]) -> None:
        """Write shard `number` whole.

        Raises: UserError if the records are not as many as the image shard's.
        """
        (self.folder / _PARTS).mkdir(parents=True, exist_ok=True)
        image_shard = self._images.shards[number]
        shard = write_token_shard(self.folder, image_shard.name, records)
        assert shard.samples == image_shard.samples, f"{shard.name}: {shard.samples} records for {image_shard.samples} pictures"
        write_json(self._part_file(number), {"made_from": self._made_from, "shard": asdict(shard)})

    def finish(self) -> TokenManifest:
        """Write the manifest.

        Raises: UserError naming the first shard that is missing.
        """
        shards = [self._part(number) for number in range(len(self._images.shards))]
        missing = [self._images.shards[number].name for number, shard in enumerate(shards) if shard is None]
        if missing:
            raise UserError(f"{self.folder}: {len(missing)} of {len(shards)} shards are not tokenized yet, first {missing[0]}; run their parts, then --finish again")
        manifest = TokenManifest(shards=shards, samples=sum(s.samples for s in shards), image_shards={s.name: s.sha256 for s in self._images.shards}, **self._common)
        write_manifest(self.folder, manifest)
        return manifest
