"""Batches of each stage, from one function a stage, in an order that does not depend on workers, ranks or micro-batch.

Workers decode and cut; jitter and normalisation run in batches on the device. An image that cannot be read is named
and counted and its place taken by the next one of the set; a token record that cannot be trusted, or a shard that is no
longer the one of the manifest, stops the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.config import DataSettings, PretrainRecipe, TokenizerRecipe, ViewSettings
from peco_ds.data.decode import DecodeError
from peco_ds.data.device_feed import device_batches
from peco_ds.data.image_set import BadImages, ImageSet
from peco_ds.data.masking import draw_masked
from peco_ds.data.order import SampleOrder, view_at
from peco_ds.data.token_shards import TokenRecord, TokenSet
from peco_ds.data.views import center_view, cut, draw_view, jitter, room_for_cuts, to_backbone, to_tokenizer
from peco_ds.data.workers import RawBatch
from peco_ds.data_paths import data_path
from peco_ds.errors import UserError
from peco_ds.schema import IGNORED, NO_CODE, VIEW_COLUMNS

logger = logging.getLogger("peco_ds")

# The view row of an image that could not be read: a box without height.
UNREADABLE = np.zeros(len(VIEW_COLUMNS), dtype=np.float32)


class Codes(NamedTuple):
    """A tokenizer's codes of whole views, on the device."""

    codes: torch.Tensor  # int64 [B, N]
    # int64 [B, N, T], where soft targets are asked for.
    topk_codes: torch.Tensor | None = None
    # float32 [B, N, T], rounded to the 16 bits that are stored; a row sums to the probability mass kept.
    topk_probs: torch.Tensor | None = None


def codes_of(tokenizer, images_11: torch.Tensor, views: ViewSettings) -> Codes:
    """A tokenizer's codes of crops, as token shards keep them.

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
    """The targets that an objective compares a model's outputs with."""

    # int64 [B, M], codes of the masked patches; IGNORED where `masked` only repeats its last entry.
    codes: torch.Tensor
    masked: torch.Tensor  # int64 [B, M]
    # int64 [B, N, T], soft codes of all patches: a target may mix in those of its neighbours.
    topk_codes: torch.Tensor | None
    topk_probs: torch.Tensor | None  # float32 [B, N, T]


class MaskedBatch(NamedTuple):
    """The batch of a masked pre-training step, on the device."""

    images_norm: torch.Tensor  # float32 [B, 3, S, S], ImageNet statistics
    # int64 [B, M], masked patches, increasing; an image with fewer repeats its last one.
    masked: torch.Tensor
    targets: MaskedTargets
    keys: list[str]


class CropBatch(NamedTuple):
    """The batch of a tokenizer's training step."""

    images_11: torch.Tensor  # float32 [B, 3, T, T] on the device
    keys: list[str]


@dataclass
class MaskedMaker:
    """Positions of the run -> the parts of a masked pre-training batch.

    Travels to the workers, so it holds no open file.
    """

    images: ImageSet
    # None: views are drawn here and the codes are computed in the training loop.
    tokens: TokenSet | None
    order: SampleOrder
    recipe: PretrainRecipe

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
            own_view = view if sample == first else self._view(epoch, sample)
            if self.tokens is None:
                return sample, key, image, own_view, None, bad
            record = self.tokens.read(sample, key, own_view)
            if record.is_usable:
                return sample, key, image, own_view, record, bad
            bad.append(f"{key}: the tokenizer could not read it")
            if len(bad) > self.images.num_samples:
                raise UserError(
                    f"{self.tokens.folder}: no image of the set was readable when it was tokenized; tokenize again"
                )
            sample = (sample + 1) % self.images.num_samples

    def __call__(self, positions: np.ndarray) -> RawBatch:
        raw, recipe = RawBatch(), self.recipe
        kinds = {backbone_crop(recipe.model.image_px)} | (
            {tokenizer_crop(recipe.views)} if self.tokens is None else set()
        )
        raw.cuts, rows = {kind: room_for_cuts(len(positions), kind[0]) for kind in kinds}, []
        stored: list[tuple[np.ndarray, ...]] = []
        # What needs no pixel is drawn for the whole batch at once: between two images, whose pixels have filled the
        # caches, it takes several times as long.
        chosen = [(self.order.epoch_of(position), self.order.sample_at(position)) for position in positions.tolist()]
        self._ask_for([sample for _, sample in chosen])
        first_views = [self._view(epoch, sample) for epoch, sample in chosen]
        for place, ((epoch, sample), view) in enumerate(zip(chosen, first_views)):
            sample, key, image, view, record, bad = self._read(epoch, sample, view)
            chosen[place] = epoch, sample
            if record is not None:
                row = record.views[0]
                stored.append(self._stored(record))
            else:
                row = draw_view(recipe.views, *image.shape[1:], sample=sample, view=view)
            for kind in kinds:
                raw.cuts[kind][place] = cut(image, row, *kind)
            rows.append(row)
            raw.keys.append(key)
            raw.bad += bad
        masked = [
            self._filled(draw_masked(recipe.mask, recipe.model.grid, seed=recipe.run.seed, epoch=epoch, sample=sample))
            for epoch, sample in chosen
        ]
        raw.rows = torch.from_numpy(np.stack(rows))
        raw.masked = torch.from_numpy(np.stack(masked))
        raw.stored = tuple(torch.from_numpy(np.stack(values)) for values in zip(*stored))
        return raw

    def _ask_for(self, samples: list[int]) -> None:
        self.images.prefetch(samples)
        if self.tokens is not None:
            self.tokens.prefetch(samples)

    def _view(self, epoch: int, sample: int) -> int:
        return view_at(self.recipe.run.seed, epoch, sample, self.recipe.views.count)

    def _stored(self, record: TokenRecord) -> tuple[np.ndarray, ...]:
        """Hard codes of a record's one view and, where the recipe asks for them, its likeliest soft ones."""
        hard = record.codes[0].astype(np.int64)
        kept = self.recipe.views.topk
        if not kept:
            return (hard,)
        # `TokenSet` refuses a set without them.
        assert record.topk_codes is not None and record.topk_probs is not None
        return (
            hard,
            record.topk_codes[0, :, :kept].astype(np.int64),
            record.topk_probs[0, :, :kept].astype(np.float32),
        )

    def _filled(self, masked: np.ndarray) -> np.ndarray:
        missing = self.recipe.mask.count - len(masked)
        return np.concatenate([masked, np.full(missing, masked[-1])]) if missing else masked


# The side of a crop in px, and the interpolation it is resized with.
CropKind = tuple[int, str]


def backbone_crop(image_px: int) -> CropKind:
    return image_px, "bicubic"


def tokenizer_crop(views: ViewSettings) -> CropKind:
    return views.tokenizer_px, views.tokenizer_interpolation


def masked_batches(
    images: ImageSet,
    tokens: TokenSet | Callable[[torch.Tensor], Codes],
    positions: Iterable[np.ndarray],
    recipe: PretrainRecipe,
    device: torch.device,
    bad: BadImages | None = None,
) -> Iterator[MaskedBatch]:
    """Batches of masked pre-training.

    Args:
        tokens: a token set, or a tokenizer `images_11 [B, 3, T, T] -> Codes` that computes them online.
        positions: position arrays, one a batch (`order.rank_positions`).
        recipe: its data, views, mask, model's size and run.seed are read.
        bad: the run's count of unreadable images; None: one of this call's own.
    Yields: MaskedBatch on `device`.
    """
    stored = tokens if isinstance(tokens, TokenSet) else None
    order = SampleOrder(images.shards.shard_sizes, recipe.run.seed, recipe.data.shuffle_window_shards)
    make = MaskedMaker(images, stored, order, recipe)

    def prepare(raw: RawBatch) -> tuple:
        assert raw.masked is not None
        crops = {kind: jitter(crops.to(device, non_blocking=True), raw.rows) for kind, crops in raw.cuts.items()}
        known = tuple(values.to(device, non_blocking=True) for values in raw.stored)
        return (
            to_backbone(crops[backbone_crop(recipe.model.image_px)]),
            raw.masked.to(device, non_blocking=True),
            known or (to_tokenizer(crops[tokenizer_crop(recipe.views)]),),
        )

    def finish(ready: tuple, raw: RawBatch) -> MaskedBatch:
        images_norm, masked, known = ready
        # An online tokenizer runs here and not ahead: beside the step on another stream it would take the same GPU's
        # time, and memory of its own for its activations.
        if isinstance(tokens, TokenSet):
            codes = Codes(*known)
        else:
            images_norm, codes = without_lost(images_norm, tokens(*known))
        return MaskedBatch(images_norm, masked, masked_targets(codes, masked), raw.keys)

    bad = bad or BadImages(recipe.data.max_bad_share)
    yield from device_batches(
        make, positions, prepare, finish, num_workers=recipe.data.num_workers, device=device, in_turn=bad.add_batch
    )


def without_lost(images_norm: torch.Tensor, codes: Codes) -> tuple[torch.Tensor, Codes]:
    """Turn an image that has NO_CODE into NaN, and its codes into some that exist.

    Its loss is then not finite, so that the step is skipped, counted and named by its keys on all ranks, and nothing
    has to be read back from the device.
    """
    is_lost = (codes.codes == NO_CODE).any(dim=1)
    images_norm = images_norm.masked_fill(is_lost[:, None, None, None], math.nan)
    return images_norm, codes._replace(codes=codes.codes.clamp(min=0))


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
        self.images.prefetch(self.order.sample_at(int(position)) for position in positions)
        for place, position in enumerate(positions):
            epoch = self.order.epoch_of(int(position))
            sample, key, image, bad = self.images.decode_or_next(self.order.sample_at(int(position)))
            row = draw_view(self.views, *image.shape[1:], sample=sample, view=epoch)
            cuts[place] = cut(image, row, *tokenizer_crop(self.views))
            rows.append(row)
            raw.keys.append(key)
            raw.bad += bad
        raw.cuts = {tokenizer_crop(self.views): cuts}
        raw.rows = torch.from_numpy(np.stack(rows))
        return raw


def crop_batches(
    images: ImageSet,
    order: SampleOrder,
    positions: Iterable[np.ndarray],
    recipe: PretrainRecipe | TokenizerRecipe,
    device: torch.device,
    bad: BadImages | None = None,
) -> Iterator[CropBatch]:
    """Batches of tokenizer training, as recipe.data and recipe.views say; `bad` as in `masked_batches`.

    Yields: CropBatch on `device`.
    """

    def prepare(raw: RawBatch) -> torch.Tensor:
        return to_tokenizer(jitter(raw.cuts[tokenizer_crop(recipe.views)].to(device, non_blocking=True), raw.rows))

    def finish(images_11: torch.Tensor, raw: RawBatch) -> CropBatch:
        return CropBatch(images_11, raw.keys)

    bad = bad or BadImages(recipe.data.max_bad_share)
    yield from device_batches(
        _CropMaker(images, order, recipe.views),
        positions,
        prepare,
        finish,
        num_workers=recipe.data.num_workers,
        device=device,
        in_turn=bad.add_batch,
    )


@dataclass
class _ViewsMaker:
    """Sample numbers -> all K recorded views of each image; every image is decoded once."""

    images: ImageSet
    views: ViewSettings

    def __call__(self, samples: np.ndarray) -> RawBatch:
        raw, kind = RawBatch(), tokenizer_crop(self.views)
        rows: list[np.ndarray] = []
        cuts = room_for_cuts(len(samples) * self.views.count, kind[0])
        self.images.prefetch(map(int, samples))
        for sample in samples:
            key = self.images.key(int(sample))
            try:
                _, image = self.images.decode(int(sample))
            except DecodeError as error:
                # Token records keep the images' places: an unreadable one is recorded without a box and never used.
                raw.bad.append(str(error))
                image = None
            for view in range(self.views.count):
                if image is None:
                    row = UNREADABLE
                    cuts[len(rows)] = 0
                else:
                    row = draw_view(self.views, *image.shape[1:], sample=int(sample), view=view)
                    cuts[len(rows)] = cut(image, row, *kind)
                rows.append(row)
            raw.keys.append(key)
        raw.cuts = {kind: cuts}
        raw.rows = torch.from_numpy(np.stack(rows))
        return raw


class ViewsBatch(NamedTuple):
    """All K views of b images."""

    keys: list[str]
    rows: np.ndarray  # float32 [b, K, len(VIEW_COLUMNS)]
    # float32 [b * K, 3, T, T] on the device; the views of an image are adjacent.
    images_11: torch.Tensor


def view_batches(
    images: ImageSet,
    samples: list[np.ndarray],
    recipe: PretrainRecipe,
    device: torch.device,
    bad: BadImages | None = None,
) -> Iterator[ViewsBatch]:
    """Batches of tokenizing, as recipe.data and recipe.views say; `bad` as in `masked_batches`.

    Args:
        samples: arrays of sample numbers, one a batch.
    """

    def prepare(raw: RawBatch) -> torch.Tensor:
        return to_tokenizer(jitter(raw.cuts[tokenizer_crop(recipe.views)].to(device, non_blocking=True), raw.rows))

    def finish(images_11: torch.Tensor, raw: RawBatch) -> ViewsBatch:
        assert raw.rows is not None
        return ViewsBatch(raw.keys, raw.rows.numpy().reshape(len(raw.keys), recipe.views.count, -1), images_11)

    bad = bad or BadImages(recipe.data.max_bad_share)
    yield from device_batches(
        _ViewsMaker(images, recipe.views),
        samples,
        prepare,
        finish,
        num_workers=recipe.data.num_workers,
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


class HeldOutImages(NamedTuple):
    """What a tokenizer is judged on while it trains, on the CPU."""

    images_u8: torch.Tensor  # uint8 [n, 3, S, S]
    labels: torch.Tensor  # int64 [n]; -1 in a set without labels
    # Names in label order; empty for a set without labels.
    classes: tuple[str, ...]


def held_out_images(images: ImageSet, data: DataSettings, max_images: int, size_px: int) -> HeldOutImages:
    """Central squares of the held-out images: of data.val_images (spread over the set), or the last data.holdout of
    the training set.

    Returns: squares of size_px; unreadable ones are named and left out.
    Raises: UserError if there is none, or for a label that is not one of the set's.
    """
    if data.val_images:
        images = ImageSet(data_path(data, data.val_images))
        samples = np.unique(np.linspace(0, images.num_samples - 1, max_images).astype(int))
    else:
        samples = np.arange(images.num_samples - min(data.holdout, max_images), images.num_samples)
    crops, labels, classes = [], [], tuple(images.manifest.classes or ())
    for sample in samples:
        try:
            _, image = images.decode(int(sample))
        except DecodeError as error:
            logger.warning("unreadable held-out image, left out: %s", error)
            continue
        crops.append(cut(image, center_view(*image.shape[1:]), size_px))
        labels.append(images.label(int(sample)) if classes else -1)
    if not crops:
        raise UserError(
            "no held-out image to judge the tokenizer on; set data.val_images to an image set or "
            "data.holdout to a number of images"
        )
    return HeldOutImages(torch.stack(crops), torch.tensor(labels), classes)
