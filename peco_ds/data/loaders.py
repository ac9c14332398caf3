"""One function a stage -> typed batches, in an order that no worker, rank or micro-batch can change.

Workers decode and cut; jitter and normalisation run in batches on the device. An image that cannot be read is named
and counted and its place taken by the next one of the set; a token record that cannot be trusted, or a shard that is no
longer the one of the manifest, stops the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.config import DataSettings, MaskSettings, ViewSettings
from peco_ds.data.decode import DecodeError, decode_rgb
from peco_ds.data.device_feed import device_batches
from peco_ds.data.indexed_tar import DamagedRecord, ShardSet
from peco_ds.data.masking import draw_masked
from peco_ds.data.order import SampleOrder, view_at
from peco_ds.data.retry import UnreadableRecord, read_with_retries
from peco_ds.data.token_shards import TokenRecord, TokenSet
from peco_ds.data.views import center_view, cut, draw_view, jitter, room_for_cuts, to_backbone, to_tokenizer
from peco_ds.data.workers import RawBatch
from peco_ds.data_paths import data_path
from peco_ds.errors import UserError
from peco_ds.schema import IGNORED, IMAGE_EXTENSIONS, VIEW_COLUMNS, ImageManifest, read_manifest

logger = logging.getLogger("peco_ds")

# view row of an image that could not be read: a box without height
UNREADABLE = np.zeros(len(VIEW_COLUMNS), dtype=np.float32)


class Codes(NamedTuple):
    """What a tokenizer says of whole views, on the device."""

    codes: torch.Tensor  # int64 [B, N]
    # int64 [B, N, T], where soft targets are asked for
    topk_codes: torch.Tensor | None = None
    # float32 [B, N, T], as stored in 16 bits; a row sums to the mass kept
    topk_probs: torch.Tensor | None = None


def codes_of(tokenizer, images_11: torch.Tensor, views: ViewSettings) -> Codes:
    """What a tokenizer says of crops, as token shards keep it.

    Args:
        tokenizer: an `ImageTokenizer` in eval mode.
        images_11: float [B, 3, T, T] in [-1, 1].
        views: says whether soft codes are wanted.
    """
    if not views.topk:
        return Codes(tokenizer.tokenize(images_11))
    soft = tokenizer.tokenize_soft(images_11, views.topk, temperature=views.topk_temperature)
    return Codes(soft.codes, soft.topk_codes, soft.topk_probs.half().float())


class MaskedTargets(NamedTuple):
    """What an objective compares a model's outputs with."""

    # int64 [B, M], of the masked patches; IGNORED where `masked` only repeats its last one
    codes: torch.Tensor
    masked: torch.Tensor  # int64 [B, M]
    # int64 [B, N, T], of all patches: a target may mix in what its neighbours are
    topk_codes: torch.Tensor | None
    topk_probs: torch.Tensor | None  # float32 [B, N, T]


class MaskedBatch(NamedTuple):
    """What a masked pre-training step needs, on the device."""

    images_norm: torch.Tensor  # float32 [B, 3, S, S], ImageNet statistics
    # int64 [B, M], masked patches, increasing; an image with fewer repeats its last one
    masked: torch.Tensor
    targets: MaskedTargets
    keys: list[str]


class CropBatch(NamedTuple):
    """What a tokenizer training step needs."""

    images_11: torch.Tensor  # float32 [B, 3, T, T] on the device
    keys: list[str]


class ImageSet:
    """Decoded images of an image set by global sample number.

    Args:
        folder: of image shards, with its manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, ImageManifest)
        self.shards = ShardSet(folder, self.manifest)
        self.num_samples = self.shards.num_samples

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
        try:
            return key, decode_rgb(next(iter(members.values())))
        except DecodeError as error:
            raise DecodeError(f"{key}: {error}") from None

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
        shard, _ = self.shards.locate(sample)
        place = f"{self.folder / self.manifest.shards[shard].name}: {key}"
        if "cls" not in members:
            raise UserError(
                f"{place}: has no .cls, but the set has {len(self.manifest.classes)} classes; make the set "
                "again with a label for every image"
            )
        text = members["cls"].strip()
        if not text.isdigit() or len(text) > 9 or int(text) >= len(self.manifest.classes):
            raise UserError(
                f"{place}: .cls holds {text[:20]!r}, the set has classes 0 to "
                f"{len(self.manifest.classes) - 1}; make the set again"
            )
        return int(text)

    def decode_or_next(self, sample: int) -> tuple[int, str, torch.Tensor, list[str]]:
        """As `decode`, or the next readable image of the set.

        The same substitute on every rank and after every restart.

        Returns: sample number used, key, image, and what was unreadable on the way.
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

    Its state is kept in checkpoints, so that no restart grants the first few anew.

    Args:
        max_share: of the images read; the first `tolerated` are always allowed.
    """

    tolerated = 10

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        # readings of an image that failed: one image counts once an epoch
        self.count = 0
        self.read = 0
        self._named: set[str] = set()  # since this start

    def add(self, read: int, bad: list[str]) -> None:
        """One batch: images in it, and a text for each unreadable one.

        Raises: UserError when they have become too many.
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


@dataclass
class MaskedMaker:
    """Positions of the run -> what a masked pre-training batch is made of.

    Travels to the workers, so it holds no open file.
    """

    images: ImageSet
    # None: views are drawn here and codes computed in the loop
    tokens: TokenSet | None
    order: SampleOrder
    views: ViewSettings
    mask: MaskSettings
    image_px: int
    grid: int
    seed: int

    def _read(
        self, epoch: int, sample: int, view: int
    ) -> tuple[int, str, torch.Tensor, int, TokenRecord | None, list[str]]:
        """The first image from `sample` on that can be read here and could be read by the tokenizer.

        Its view of this epoch (`view` if it is the first), and the record of that view.
        """
        bad: list[str] = []
        first = sample
        while True:
            sample, key, image, unreadable = self.images.decode_or_next(sample)
            bad += unreadable
            own_view = view if sample == first else view_at(self.seed, epoch, sample, self.views.count)
            record = self.tokens.read(sample, key, own_view) if self.tokens is not None else None
            if record is None or record.is_usable:
                return sample, key, image, own_view, record, bad
            bad.append(f"{key}: the tokenizer could not read it")
            if len(bad) > self.images.num_samples:
                raise UserError(
                    f"{self.tokens.folder}: no image of the set was readable when it was tokenized; tokenize again"
                )
            sample = (sample + 1) % self.images.num_samples

    def __call__(self, positions: np.ndarray) -> RawBatch:
        raw = RawBatch()
        looks = {backbone_look(self.image_px)} | ({tokenizer_look(self.views)} if self.tokens is None else set())
        raw.cuts, rows = {look: room_for_cuts(len(positions), look[0]) for look in looks}, []
        stored: list[tuple[np.ndarray, ...]] = []
        # What needs no pixel is drawn for the whole batch at once: between two images, whose pixels have filled the
        # caches, it takes several times as long.
        chosen = [(self.order.epoch_of(position), self.order.sample_at(position)) for position in positions.tolist()]
        first_views = [view_at(self.seed, epoch, sample, self.views.count) for epoch, sample in chosen]
        for place, ((epoch, sample), view) in enumerate(zip(chosen, first_views)):
            sample, key, image, view, record, bad = self._read(epoch, sample, view)
            chosen[place] = epoch, sample
            if record is not None:
                row = record.views[0]
                stored.append(self._stored(record))
            else:
                row = draw_recorded_view(image, self.views, sample, view)
            for look in looks:
                raw.cuts[look][place] = cut(image, row, *look)
            rows.append(row)
            raw.keys.append(key)
            raw.bad += bad
        mask = self.mask
        drawn = dict(
            seed=self.seed,
            grid=self.grid,
            kind=mask.kind,
            count=mask.count,
            min_block=mask.min_block,
            min_aspect=mask.min_aspect,
            exact=mask.exact,
        )
        masked = [self._filled(draw_masked(epoch=epoch, sample=sample, **drawn)) for epoch, sample in chosen]
        raw.rows = torch.from_numpy(np.stack(rows))
        raw.masked = torch.from_numpy(np.stack(masked))
        raw.stored = tuple(torch.from_numpy(np.stack(values)) for values in zip(*stored))
        return raw

    def _stored(self, record: TokenRecord) -> tuple[np.ndarray, ...]:
        """Hard codes of a record's one view and, where the recipe asks for them, its likeliest soft ones."""
        hard = record.codes[0].astype(np.int64)
        kept = self.views.topk
        return (
            (hard, record.topk_codes[0, :, :kept].astype(np.int64), record.topk_probs[0, :, :kept].astype(np.float32))
            if kept
            else (hard,)
        )

    def _filled(self, masked: np.ndarray) -> np.ndarray:
        return (
            masked
            if len(masked) == self.mask.count
            else np.concatenate([masked, np.full(self.mask.count - len(masked), masked[-1])])
        )


# side of a crop in px, and the interpolation it is resized with
Look = tuple[int, str]


def backbone_look(image_px: int) -> Look:
    return image_px, "bicubic"


def tokenizer_look(views: ViewSettings) -> Look:
    return views.tokenizer_px, views.tokenizer_interpolation


def draw_recorded_view(image: torch.Tensor, views: ViewSettings, sample: int, view: int) -> np.ndarray:
    """The row that tokenize_shards.py records for this view; drawn anew it is the same."""
    return draw_view(
        *image.shape[1:],
        seed=views.seed,
        sample=sample,
        view=view,
        scale=views.scale,
        ratio=views.ratio,
        flip=views.flip,
        color_jitter=views.color_jitter,
    )


def masked_batches(
    image_set: ImageSet,
    tokens: TokenSet | Callable[[torch.Tensor], Codes],
    positions,
    *,
    data: DataSettings,
    views: ViewSettings,
    mask: MaskSettings,
    image_px: int,
    grid: int,
    seed: int,
    device: torch.device,
    bad: BadImages | None = None,
) -> Iterator[MaskedBatch]:
    """Batches of masked pre-training.

    Args:
        tokens: a token set, or a tokenizer `images_11 [B, 3, T, T] -> Codes` that computes them online.
        positions: iterable of position arrays, one a batch (`order.rank_positions`).
        bad: the run's count of unreadable images; None: one of this call's own.
    Yields: MaskedBatch on `device`.
    """
    stored = tokens if isinstance(tokens, TokenSet) else None
    order = SampleOrder(image_set.shards.shard_sizes, seed, data.shuffle_window_shards)
    make = MaskedMaker(image_set, stored, order, views, mask, image_px, grid, seed)

    def prepare(raw: RawBatch) -> tuple:
        images = {look: jitter(images.to(device, non_blocking=True), raw.rows) for look, images in raw.cuts.items()}
        known = tuple(values.to(device, non_blocking=True) for values in raw.stored)
        return (
            to_backbone(images[backbone_look(image_px)]),
            raw.masked.to(device, non_blocking=True),
            known or (to_tokenizer(images[tokenizer_look(views)]),),
        )

    def finish(ready: tuple, raw: RawBatch) -> MaskedBatch:
        images_norm, masked, known = ready
        # An online tokenizer runs here and not ahead: beside the step on another stream it would take the same GPU's
        # time, and memory of its own for its activations.
        codes = Codes(*known) if stored is not None else tokens(*known)
        return MaskedBatch(images_norm, masked, masked_targets(codes, masked), raw.keys)

    bad = bad or BadImages(data.max_bad_share)
    yield from device_batches(
        make, positions, prepare, finish, num_workers=data.num_workers, device=device, in_turn=bad.add_batch
    )


def masked_targets(codes: Codes, masked: torch.Tensor) -> MaskedTargets:
    """Args: masked: int64 [B, M], increasing; repeated at the end of a row that has fewer."""
    masked_codes = codes.codes.gather(1, masked)
    masked_codes[:, 1:].masked_fill_(masked[:, 1:] == masked[:, :-1], IGNORED)
    return MaskedTargets(masked_codes, masked, codes.topk_codes, codes.topk_probs)


@dataclass
class _CropMaker:
    """Positions of the run -> one random crop of each image, another one every epoch."""

    images: ImageSet
    order: SampleOrder
    views: ViewSettings

    def __call__(self, positions: np.ndarray) -> RawBatch:
        raw, cuts, rows = RawBatch(), room_for_cuts(len(positions), self.views.tokenizer_px), []
        for place, position in enumerate(positions):
            epoch = self.order.epoch_of(int(position))
            sample, key, image, bad = self.images.decode_or_next(self.order.sample_at(int(position)))
            row = draw_recorded_view(image, self.views, sample, epoch)
            cuts[place] = cut(image, row, *tokenizer_look(self.views))
            rows.append(row)
            raw.keys.append(key)
            raw.bad += bad
        raw.cuts = {tokenizer_look(self.views): cuts}
        raw.rows = torch.from_numpy(np.stack(rows))
        return raw


def crop_batches(
    images: ImageSet,
    order: SampleOrder,
    positions,
    *,
    data: DataSettings,
    views: ViewSettings,
    device: torch.device,
    bad: BadImages | None = None,
) -> Iterator[CropBatch]:
    """Batches of tokenizer training; `bad` as in `masked_batches`. Yields: CropBatch on `device`."""

    def prepare(raw: RawBatch) -> torch.Tensor:
        return to_tokenizer(jitter(raw.cuts[tokenizer_look(views)].to(device, non_blocking=True), raw.rows))

    def finish(images_11: torch.Tensor, raw: RawBatch) -> CropBatch:
        return CropBatch(images_11, raw.keys)

    bad = bad or BadImages(data.max_bad_share)
    yield from device_batches(
        _CropMaker(images, order, views),
        positions,
        prepare,
        finish,
        num_workers=data.num_workers,
        device=device,
        in_turn=bad.add_batch,
    )


@dataclass
class _ViewsMaker:
    """Sample numbers -> all K recorded views of each image; every image is decoded once."""

    images: ImageSet
    views: ViewSettings

    def __call__(self, samples: np.ndarray) -> RawBatch:
        raw, rows, look = RawBatch(), [], tokenizer_look(self.views)
        cuts = room_for_cuts(len(samples) * self.views.count, look[0])
        for sample in samples:
            key = self.images.key(int(sample))
            try:
                _, image = self.images.decode(int(sample))
            except DecodeError as error:
                # Token records keep the images' places: an unreadable one is recorded without a box and never used.
                raw.bad.append(str(error))
                image = None
            for view in range(self.views.count):
                row = UNREADABLE if image is None else draw_recorded_view(image, self.views, int(sample), view)
                cuts[len(rows)] = 0 if image is None else cut(image, row, *look)
                rows.append(row)
            raw.keys.append(key)
        raw.cuts = {look: cuts}
        raw.rows = torch.from_numpy(np.stack(rows))
        return raw


class ViewsBatch(NamedTuple):
    """All K views of b images."""

    keys: list[str]
    rows: np.ndarray  # float32 [b, K, len(VIEW_COLUMNS)]
    # float32 [b * K, 3, T, T] on the device, views of an image adjacent
    images_11: torch.Tensor


def view_batches(
    images: ImageSet,
    samples: list[np.ndarray],
    *,
    data: DataSettings,
    views: ViewSettings,
    device: torch.device,
    bad: BadImages | None = None,
) -> Iterator[ViewsBatch]:
    """Batches of tokenizing: `samples` is a list of arrays of sample numbers, one a batch.

    `bad` as in `masked_batches`.
    """

    def prepare(raw: RawBatch) -> torch.Tensor:
        return to_tokenizer(jitter(raw.cuts[tokenizer_look(views)].to(device, non_blocking=True), raw.rows))

    def finish(images_11: torch.Tensor, raw: RawBatch) -> ViewsBatch:
        return ViewsBatch(raw.keys, raw.rows.numpy().reshape(len(raw.keys), views.count, -1), images_11)

    bad = bad or BadImages(data.max_bad_share)
    yield from device_batches(
        _ViewsMaker(images, views),
        samples,
        prepare,
        finish,
        num_workers=data.num_workers,
        device=device,
        in_turn=bad.add_batch,
    )


def training_order(images: ImageSet, data: DataSettings, seed: int) -> SampleOrder:
    """The order of a run over an image set, without the last `data.holdout` images when they are the held-out set.

    Raises: UserError if nothing would be left to train on.
    """
    holdout = 0 if data.val_images else data.holdout
    ends = np.cumsum(images.shards.shard_sizes)
    if holdout >= images.num_samples:
        raise UserError(f"data.holdout {holdout}: the set has {images.num_samples} images; keep fewer")
    kept = np.minimum(ends, images.num_samples - holdout)
    return SampleOrder(np.diff(kept, prepend=0), seed, data.shuffle_window_shards)


def held_out_images(images: ImageSet, data: DataSettings, max_images: int, size_px: int) -> torch.Tensor:
    """Central squares of the held-out images: of data.val_images (spread over the set), or the last data.holdout of
    the training set.

    Returns: uint8 [n, 3, size_px, size_px]; unreadable ones are named and left out.
    Raises: UserError if there is none.
    """
    if data.val_images:
        images = ImageSet(data_path(data, data.val_images))
        samples = np.unique(np.linspace(0, images.num_samples - 1, max_images).astype(int))
    else:
        samples = np.arange(images.num_samples - min(data.holdout, max_images), images.num_samples)
    crops = []
    for sample in samples:
        try:
            _, image = images.decode(int(sample))
        except DecodeError as error:
            logger.warning("unreadable held-out image, left out: %s", error)
            continue
        crops.append(cut(image, center_view(*image.shape[1:]), size_px))
    if not crops:
        raise UserError(
            "no held-out image to judge the tokenizer on; set data.val_images to an image set or "
            "data.holdout to a number of images"
        )
    return torch.stack(crops)
