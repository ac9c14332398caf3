"""Build a token set in a store: each shard is made on a disk of this machine, sent whole, and removed there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peco_ds.data.indexed_tar import index_name
from peco_ds.data.token_parts import PARTS, TokenParts
from peco_ds.data.token_shards import TokenRecord
from peco_ds.errors import UserError
from peco_ds.remote_paths import Place, RemotePath
from peco_ds.schema import MANIFEST_NAME, ImageManifest, Shard, TokenManifest, parse_json


class StoreTokenParts(TokenParts):
    """As `TokenParts`, of a place in a store; `folder` is one of this machine, for as long as the process lives.

    The part file of a shard is sent before its tar and the index after it, so a shard with an index is whole.
    """

    def __init__(self, store: RemotePath, images: ImageManifest, **made_of) -> None:
        self.store = store
        self._own = tempfile.TemporaryDirectory(prefix="peco_ds_", ignore_cleanup_errors=True)
        folder = Path(self._own.name)
        with suppress(FileNotFoundError):
            (folder / MANIFEST_NAME).write_bytes((store / MANIFEST_NAME).read_bytes())
        with self._named_as_people_know(folder):
            super().__init__(folder, images, **made_of)

    @contextmanager
    def _named_as_people_know(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(str(error).replace(str(folder), str(self.store))) from None

    def _refuse_foreign_shards(self) -> None:
        listing = self.store.listing()
        if listing is None:
            raise UserError(f"{self.store}: a web server takes no files; set data.tokens to an object store or folder")
        parts = set((self.store / PARTS).listing() or {})
        for number, shard in enumerate(self._images.shards):
            stands = next((name for name in (shard.name, index_name(shard.name)) if name in listing), None)
            if stands and self._part_file(number).name not in parts and shard.name not in self._finished:
                raise UserError(
                    f"{self.store / stands}: stands there already and was not made by tokenize_shards.py in "
                    "this place; give another one, or move it away"
                )

    def _part_of_store(self, number: int) -> dict:
        """Raises: FileNotFoundError; ValueError where it is damaged."""
        return parse_json((self.store / PARTS / self._part_file(number).name).read_text())

    def _part(self, number: int) -> Shard | None:
        try:
            shard = self._shard_of(number, self._part_of_store(number))
            if shard is None or (self.store / shard.name).status().st_size != shard.bytes:
                return None
            return shard if (self.store / index_name(shard.name)).is_file() else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, number: int, records: Iterable[TokenRecord]) -> None:
        """As `TokenParts.write`. Raises: StoreFault too."""
        name = self._images.shards[number].name
        with self._named_as_people_know(self.folder):
            super().write(number, records)
        part = self._part_file(number)
        (self.store / index_name(name)).unlink(missing_ok=True)
        for sent, path in (
            (self.store / PARTS / part.name, part),
            (self.store / name, self.folder / name),
            (self.store / index_name(name), self.folder / index_name(name)),
        ):
            sent.upload(path)
            path.unlink()

    def read_counts(self, number: int) -> dict[str, int]:
        return self._counts_of(number, self._part_of_store(number))

    def finish(self, num_parts: int = 1) -> TokenManifest:
        (self.folder / PARTS).mkdir(exist_ok=True)
        with self._named_as_people_know(self.folder):
            manifest = super().finish(num_parts)
        (self.store / MANIFEST_NAME).upload(self.folder / MANIFEST_NAME)
        return manifest


def token_parts_at(place: Place, images: ImageManifest, **made_of) -> TokenParts:
    """Args: as `TokenParts`."""
    make = StoreTokenParts if isinstance(place, RemotePath) else TokenParts
    return make(place, images, **made_of)  # type: ignore[arg-type]
