"""The images of an image set, decoded one by one, and the count of those that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from peco_ds.data.decode import DecodeError, decode_rgb
from peco_ds.data.indexed_tar import DamagedRecord, ShardSet
from peco_ds.data.retry import UnreadableRecord, read_with_retries
from peco_ds.data.workers import RawBatch
from peco_ds.errors import UserError
from peco_ds.remote_paths import Place, place_of
from peco_ds.schema import IMAGE_EXTENSIONS, ImageManifest, read_manifest

logger = logging.getLogger("peco_ds")


class ImageSet:
    """Decoded images of an image set by global sample number.

    Attributes:
        read_ahead: extensions of the members that a batch of the set reads, but for labels.
    Args:
        folder: of image shards, with its manifest.
    """

    read_ahead: tuple[str, ...] = IMAGE_EXTENSIONS

    def __init__(self, folder: str | Place) -> None:
        self.folder = place_of(folder)
        self.manifest = read_manifest(folder, ImageManifest)
        self.shards = ShardSet(folder, self.manifest)
        self.num_samples = self.shards.num_samples

    def facts(self) -> dict:
        """What a record of a measurement says about the images."""
        return {
            "folder": str(self.folder),
            "images": self.num_samples,
            "rejected": len(self.manifest.rejected),
            "left_out": self.manifest.left_out,
            "fingerprint": self.manifest.fingerprint(),
        }

    def decode(self, sample: int) -> tuple[str, torch.Tensor]:
        """Key and uint8 [3, H, W].

        Raises: DecodeError (names the key) if the record is damaged, cannot be read or is no image; UserError if its
            whole shard is missing or has another size than the manifest says: that is no single bad image.
        """
        try:
            key, members = read_with_retries(self.shards, sample, IMAGE_EXTENSIONS)
        except (DamagedRecord, UnreadableRecord) as error:
            self.shards.check_shards([self.shards.locate(sample)[0]], "size")
            raise DecodeError(str(error)) from None
        if not members:
            raise DecodeError(f"{key}: has no image ({', '.join(IMAGE_EXTENSIONS)})")
        if len(members) > 1:
            # Which one stands first is chance.
            raise DecodeError(f"{key}: has two images ({', '.join(members)}); pack or index the set again")
        try:
            return key, decode_rgb(next(iter(members.values())))
        except DecodeError as error:
            raise DecodeError(f"{key}: {error}") from None

    def prefetch(self, samples: Iterable[int], *, labels: bool = False) -> None:
        """As `ShardSet.prefetch`. Args: labels: they are read too."""
        self.shards.prefetch(samples, (*self.read_ahead, "cls") if labels else self.read_ahead)

    def key(self, sample: int) -> str:
        return self.shards.key(sample)

    def label(self, sample: int) -> int:
        """Class number of an image of a labelled set.

        Raises: UserError naming key and value if the record has no label, or one outside the manifest's classes.
        """
        try:
            key, members = read_with_retries(self.shards, sample, ("cls",))
        except UnreadableRecord as error:
            raise UserError(f"{error}; its label is needed: repair the set or the file system") from None
        classes = self.manifest.classes
        assert classes is not None
        shard, _ = self.shards.locate(sample)
        place = f"{self.folder / self.manifest.shards[shard].name}: {key}"
        if "cls" not in members:
            raise UserError(
                f"{place}: has no .cls, but the set has {len(classes)} classes; make the set "
                "again with a label for every image"
            )
        text = members["cls"].strip()
        if not text.isdigit() or len(text) > 9 or int(text) >= len(classes):
            raise UserError(
                f"{place}: .cls holds {text[:20]!r}, the set has classes 0 to {len(classes) - 1}; make the set again"
            )
        return int(text)

    def decode_or_next(self, sample: int) -> tuple[int, str, torch.Tensor, list[str]]:
        """As `decode`, or the next readable image of the set, the same one on every rank and after every restart.

        Returns: the sample number used, key, image, and a text for each unreadable image on the way.
        """
        bad: list[str] = []
        for step in range(self.num_samples):
            candidate = (sample + step) % self.num_samples
            try:
                return candidate, *self.decode(candidate), bad
            except DecodeError as error:
                bad.append(str(error))
        raise UserError(f"{self.folder}: none of {self.num_samples} images can be read; first: {bad[0]}")


class BadImages:
    """Names and counts the unreadable images that this rank met in the whole run, and stops the run when they are too
    many.

    Its state is kept in checkpoints, so that a restart does not allow the first few again.

    Args:
        max_share: of the images read; the first `tolerated` are always allowed.
    """

    tolerated = 10

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        # Failed readings of images: an image counts once an epoch.
        self.count = 0
        self.read = 0
        # Images that were named in the log since this start.
        self._named: set[str] = set()

    def add(self, read: int, bad: list[str]) -> None:
        """Count one batch: the number of images in it, and a text for each unreadable one.

        Raises: UserError when there are too many.
        """
        self.read += read
        self.count += len(bad)
        for text in bad:
            if text not in self._named:
                self._named.add(text)
                logger.warning("unreadable image, the next one takes its place: %s", text)
        if bad and self.count > max(self.tolerated, self._max_share * self.read):
            raise UserError(
                f"{self.count} of {self.read} readings of images failed on this rank, more than "
                f"{self.tolerated} and more than data.max_bad_share {self._max_share}; last: {bad[-1]}; "
                "repair the image set or raise the share"
            )

    def add_batch(self, raw: RawBatch) -> None:
        """As `add`."""
        self.add(len(raw.keys), raw.bad)

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"count": self.count, "read": self.read}

    def load_state(self, states: list[dict[str, int]]) -> None:
        """Continue from the states of one rank, of several where the number of ranks has shrunk, or of none."""
        self.count, self.read = (sum(state[name] for state in states) for name in ("count", "read"))
