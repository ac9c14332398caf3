"""Build a token set shard by shard, by many jobs that can be restarted; the manifest follows when all shards exist."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict

from peco_ds.data.atomic_files import find_temporary_files, lock_file, remove_abandoned
from peco_ds.data.indexed_tar import index_name
from peco_ds.data.own_shards import ShardWriterOf
from peco_ds.data.token_shards import TokenRecord, write_token_shard
from peco_ds.errors import UserError
from peco_ds.own_files import naming
from peco_ds.schema import (
    MANIFEST_NAME,
    TOKENIZER_FACTS,
    ImageManifest,
    Shard,
    TokenManifest,
    ViewRecipe,
    read_json,
    read_manifest,
    sha256_of_file,
    sha256_of_json,
    write_json,
    write_manifest,
)

# One small file for each finished shard: its entry in the manifest, and what it was made from.
PARTS = ".parts"
_WRITER = ShardWriterOf("tokenize_shards.py", first_ends=(".codes.npy",))


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


class _MadeOf(TypedDict):
    """Fields of a `TokenManifest`: what the codes are, and of which images."""

    images_fingerprint: str
    tokenizer_fingerprint: str
    num_codes: int
    grid: tuple[int, int]
    num_views: int
    topk: int
    topk_temperature: float
    views: ViewRecipe


class TokenParts:
    """The shards of a token set that are there already, and the writing of those that are not.

    Any number of processes may write into the folder, and any of them may be killed at any time: a shard counts as done
    when tar, index and part file are there and belong together. Two that write one shard cost time, nothing else.

    Args:
        folder: of the token set.  images: what is tokenized.
        tokenizer_facts: what the tokenizer's card says of it; the texts among TOKENIZER_FACTS are kept in the manifest,
            and sets that differ in them are still equal.
        The rest: what the codes are; a shard made with anything else is made again.
    Raises: UserError if the folder holds a finished set that was made otherwise.
    """

    def __init__(
        self,
        folder: Path,
        images: ImageManifest,
        *,
        tokenizer_fingerprint: str,
        num_codes: int,
        grid: int,
        num_views: int,
        topk: int,
        topk_temperature: float,
        views: ViewRecipe,
        tokenizer_facts: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self._images = images
        self._facts = {
            name: fact for name in TOKENIZER_FACTS if isinstance(fact := tokenizer_facts.get(name), str) and fact
        }
        self._common = _MadeOf(
            images_fingerprint=images.fingerprint(),
            tokenizer_fingerprint=tokenizer_fingerprint,
            num_codes=num_codes,
            grid=(grid, grid),
            num_views=num_views,
            topk=topk,
            topk_temperature=topk_temperature,
            views=views,
        )
        self._tidy = False
        self._made_from = sha256_of_json({**self._common, "views": asdict(views)})
        # Name -> sha256 of the shards that a manifest in the folder describes.
        self._finished: dict[str, str] = {}
        self._refuse_another_set()
        self._refuse_foreign_shards()

    def _refuse_another_set(self) -> None:
        """A finished set may be in use by a run; it is not overwritten shard by shard under its old manifest."""
        if not os.path.lexists(self.folder / MANIFEST_NAME):
            return
        found = read_manifest(self.folder, TokenManifest)
        self._finished = {shard.name: shard.sha256 for shard in found.shards}
        for name, value in self._common.items():
            if getattr(found, name) != value:
                raise UserError(
                    f"{self.folder}: holds a finished token set with {name} = {getattr(found, name)}, this one "
                    f"has {value}; set data.tokens to another folder, or remove that one"
                )

    def _refuse_foreign_shards(self) -> None:
        """What stands where a shard would be written and is recorded nowhere is the user's: most likely the images.

        One listing of each folder, not a look for each of a hundred thousand shards; what is recorded is looked at when
        it is to be replaced (`check_place`).
        """
        # A file system may not tell small letters from capitals.
        standing = {name.casefold() for name in _names_in(self.folder)}
        parts = set(_names_in(self.folder / PARTS))
        for number, shard in enumerate(self._images.shards if standing else ()):
            stands = shard.name.casefold() in standing or index_name(shard.name).casefold() in standing
            if stands and self._part_file(number).name not in parts and shard.name not in self._finished:
                self.check_place(number)

    def check_place(self, number: int) -> None:
        """Raises: UserError if tokenizing shard `number` would replace a file that no record here names."""
        name = self._images.shards[number].name
        _WRITER.refuse_foreign(self.folder, name, self._recorded_sha256(number))

    def _recorded_sha256(self, number: int) -> str | None:
        """sha256 of a shard's tar by its part file or the manifest.

        "": there is a part file that cannot be read; None: neither names the shard.
        """
        name, part_file = self._images.shards[number].name, self._part_file(number)
        if not part_file.is_file():
            return self._finished.get(name)
        try:
            return str(read_json(part_file)["shard"]["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return self._finished.get(name, "")

    def _part_file(self, number: int) -> Path:
        return self.folder / PARTS / f"{Path(self._images.shards[number].name).stem}.json"

    def _part(self, number: int) -> Shard | None:
        """The entry of a finished shard that was made from the same things and is still there, else None.

        A part file that cannot be read counts as none.
        """
        try:
            shard = self._shard_of(number, read_json(self._part_file(number)))
            # The index holds every member's checksum. A writer that replaces a tar removes the index first.
            whole = (
                shard is not None
                and (tar := (self.folder / shard.name).stat()).st_size == shard.bytes
                and sha256_of_file(self.folder / index_name(shard.name)) == shard.index_sha256
                # A tar that was written to after its part file.
                and (
                    tar.st_mtime_ns <= self._part_file(number).stat().st_mtime_ns
                    or sha256_of_file(self.folder / shard.name) == shard.sha256
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return shard if whole else None

    def _shard_of(self, number: int, part: dict) -> Shard | None:
        """The shard that a part file describes; None where it was made from other things.

        Raises: KeyError, TypeError, ValueError where it is no part file.
        """
        images, shard = self._images.shards[number], Shard(**part["shard"])
        expected = images.name, images.samples, ""
        fits = part["made_from"] == self._made_from and (shard.name, shard.samples, shard.path) == expected
        return shard if fits else None

    def _naming_lock(self) -> AbstractContextManager[bool]:
        """The lock that one process at a time holds while files take their final names."""
        return lock_file(self.folder / PARTS / "lock", wait=True)

    def _remove_leftovers(self) -> None:
        """Remove temporary files of writers that were killed before this start.

        Done once: a search for every shard would take time that grows with the square of their number.
        """
        if self._tidy:
            return
        found = [*find_temporary_files(self.folder), *find_temporary_files(self.folder / PARTS)]
        if found:
            # Under the lock no other process is between a JSON file's temporary name and its final one.
            with self._naming_lock():
                remove_abandoned(found)
        self._tidy = True

    def is_done(self, number: int) -> bool:
        return self._part(number) is not None

    def write(self, number: int, records: Iterable[TokenRecord]) -> None:
        """Write shard `number` whole.

        Raises: UserError if the records are not as many as the image shard's.
        """
        part_file = self._part_file(number)
        part_file.parent.mkdir(parents=True, exist_ok=True)
        self.check_place(number)
        image_shard = self._images.shards[number]
        self._remove_leftovers()
        unreadable = 0

        def counted() -> Iterator[TokenRecord]:
            nonlocal unreadable
            for record in records:
                unreadable += not record.is_usable
                yield record

        def register(shard: Shard, stands: bool) -> None:
            assert shard.samples == image_shard.samples, (
                f"{shard.name}: {shard.samples} records for {image_shard.samples} images"
            )
            if not stands:
                self._clear_place(number)
            part = {"made_from": self._made_from, "shard": asdict(shard), "unreadable": unreadable}
            write_json(part_file, {**part, "of": len(self._images.shards)})

        try:
            write_token_shard(self.folder, image_shard.name, counted(), self._naming_lock, register)
        except OSError as error:
            raise naming(error, self.folder / image_shard.name) from None

    def _clear_place(self, number: int) -> None:
        """Remove what is to be replaced while its record still names it: the next record will be of another tar."""
        self.check_place(number)
        name = self._images.shards[number].name
        for path in (self.folder / index_name(name), self.folder / name):
            path.unlink(missing_ok=True)

    def read_counts(self, number: int) -> dict[str, int]:
        """How many images of a finished shard were read and were unreadable, as a state of `image_set.BadImages`."""
        return self._counts_of(number, read_json(self._part_file(number)))

    def _counts_of(self, number: int, part: dict) -> dict[str, int]:
        unreadable = part.get("unreadable")
        return {"count": unreadable if type(unreadable) is int else 0, "read": self._images.shards[number].samples}

    def finish(self, num_parts: int = 1) -> TokenManifest:
        """Write the manifest.

        Args:
            num_parts: parts that the work was shared by, of which an error names those that are to be done again.
        Raises: UserError naming the first shard that is missing.
        """
        parts = [self._part(number) for number in range(len(self._images.shards))]
        shards = [part for part in parts if part is not None]
        missing = [number for number, part in enumerate(parts) if part is None]
        if missing:
            again = ",".join(str(part) for part in sorted({number % num_parts for number in missing}))
            of_parts = f" ({again} of --parts {num_parts})" if num_parts > 1 else ""
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(parts)} shards are not tokenized yet, first "
                f"{self._images.shards[missing[0]].name}; run their parts{of_parts}, then --finish again"
            )
        manifest = TokenManifest(
            shards=shards,
            samples=sum(s.samples for s in shards),
            image_shards={s.name: s.sha256 for s in self._images.shards},
            tokenizer_facts=self._facts,
            **self._common,
        )
        with self._naming_lock():
            # Those of writers that were killed since `_remove_leftovers` ran.
            remove_abandoned([*find_temporary_files(self.folder), *find_temporary_files(self.folder / PARTS)])
            write_manifest(self.folder, manifest)
        return manifest
