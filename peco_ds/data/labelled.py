"""Labelled batches: augmented and mixed for training, plain and each image exactly once for evaluation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.config import FinetuneRecipe
from peco_ds.data.augment import BatchMix, CenterCrop, TrainCrop, drawn_from
from peco_ds.data.decode import DecodeError
from peco_ds.data.device_feed import device_batches
from peco_ds.data.image_set import BadImages, ImageSet
from peco_ds.data.order import AUGMENT, SampleOrder
from peco_ds.data.views import normalize
from peco_ds.data.workers import RawBatch
from peco_ds.errors import UserError
from peco_ds.remote_paths import Place
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, short

# The label and the sample number of a row that only fills up a batch.
PADDING = -1


class LabelledBatch(NamedTuple):
    """The batch of a classifier's training step, on the device."""

    images_norm: torch.Tensor  # float32 [B, 3, S, S]
    targets: torch.Tensor  # float32 [B, C], each row sums to 1
    keys: list[str]


class EvalBatch(NamedTuple):
    """The batch that a classifier or its features are measured on, on the device."""

    # float32 [B, 3, S, S]; black where a row is padding
    images_norm: torch.Tensor
    labels: torch.Tensor  # int64 [B]; -1: padding
    # int64 [B], global sample numbers; -1: padding
    samples: torch.Tensor


class CropSettings(NamedTuple):
    """The images that a classifier is measured on, as its weights expect them."""

    image_px: int
    # Share of the resized short side that is seen, in (0, 1].
    crop: float
    # Statistics of images in [0, 1].
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def check_labels(images: ImageSet, what: str) -> tuple[str, ...]:
    """Class names of a labelled set, in label order.

    Args:
        what: the setting or option that named the set, for the message.
    Raises: UserError if the set has no labels, or one class.
    """
    if not images.manifest.classes:
        raise UserError(
            f"{what} {images.folder}: holds images without labels; pack class folders with "
            "pack_images.py --labels folders, or index tars with .cls members"
        )
    refuse_one_class(images, what, "images are", "pack a folder with two or more class folders")
    return tuple(images.manifest.classes)


def refuse_one_class(images: ImageSet, what: str, things: str, remedy: str) -> None:
    """Raises: UserError if a set has one class: whatever is trained on it is always right."""
    classes = images.manifest.classes or []
    if len(classes) == 1:
        raise UserError(
            f"{what} {images.folder}: all {things} of one class, {classes[0]!r}, so there is nothing to tell apart; "
            f"{remedy}"
        )


def labelled_sets(
    images: Place, val_images: Place, names: tuple[str, str] = ("data.images", "data.val_images")
) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """A set to train on, a set to measure on, and the class names of both.

    Args:
        names: the settings or options that named the sets, for messages.
    Raises: UserError if one is missing or unlabelled, or their classes differ.
    """
    image_set, held_out = ImageSet(images), ImageSet(val_images)
    classes = check_labels(image_set, names[0])
    if difference := _difference(classes, check_labels(held_out, names[1])):
        raise UserError(
            f"{names[1]} {held_out.folder}: its classes are not those of {image_set.folder}: {difference}; pack both "
            "from the same class folders"
        )
    return image_set, held_out, classes


def _difference(classes: tuple[str, ...], others: tuple[str, ...]) -> str:
    """How the second list differs from the first, in a few words; "" where they are equal."""
    for missing, names, where in (
        (set(classes) - set(others), others, "not in it"),
        (set(others) - set(classes), classes, "in it alone"),
    ):
        if missing:
            name = min(missing)
            composed = unicodedata.normalize("NFC", name) in {unicodedata.normalize("NFC", other) for other in names}
            form = ", its letters are composed otherwise in Unicode" if composed else ""
            return f"{len(missing)} of the classes, as {short(name)}, are {where}{form}"
    places = (place for place, (one, other) in enumerate(zip(classes, others)) if one != other)
    place = next(places, None)
    return "" if place is None else f"class {place} is {short(others[place])} there and {short(classes[place])} here"


@dataclass
class _TrainMaker:
    """Positions of the run -> augmented images and labels. Travels to the workers, so it holds no open file."""

    images: ImageSet
    order: SampleOrder
    crop: TrainCrop
    image_px: int
    seed: int

    def __call__(self, positions: np.ndarray) -> RawBatch:
        raw, cuts, labels, used = RawBatch(slice_number=int(positions[0]) // len(positions)), [], [], []
        shown = -1
        self.images.prefetch(map(self.order.sample_at, map(int, positions)), labels=True)
        for position in map(int, positions):
            sample = self.order.sample_at(position)
            # Repeats of an image stand side by side, so it is decoded once.
            if sample != shown:
                substitute, key, image, bad = self.images.decode_or_next(sample)
                label, shown = self.images.label(substitute), sample
                raw.bad += bad
            with drawn_from(AUGMENT, self.seed, self.order.epoch_of(position), sample, self.order.repeat_of(position)):
                cuts.append(self.crop(image))
            labels.append(label)
            used.append(substitute)
            raw.keys.append(key)
        raw.cuts = {self.image_px: torch.stack(cuts)}
        raw.labels, raw.samples = torch.tensor(labels), torch.tensor(used)
        return raw


def training_batches(
    images: ImageSet,
    positions: Iterable[np.ndarray],
    recipe: FinetuneRecipe,
    device: torch.device,
    bad: BadImages | None = None,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Iterator[LabelledBatch]:
    """Batches of classifier training.

    An unreadable image is named and counted, and the next one takes its place with its own label.

    Args:
        images: a labelled set (`check_labels`); its classes are the targets' columns.
        positions: position arrays of one length, one a batch (`order.rank_positions`).
        recipe: its data, augment, classifier.smoothing, model.image_px and run.seed are read.
        bad: the run's count of unreadable images; None: one of this call's own.
        mean, std: statistics of images in [0, 1] that the weights expect.
    Yields: LabelledBatch on `device`.
    Raises: UserError for a label that is not one of the set's, too many unreadable images, or an augmentation that
        timm does not know.
    """
    data, augment, image_px, seed = recipe.data, recipe.augment, recipe.model.image_px, recipe.run.seed
    order = SampleOrder(images.shards.shard_sizes, seed, data.shuffle_window_shards, augment.repeats)
    make = _TrainMaker(images, order, TrainCrop(augment, image_px), image_px, seed)
    assert images.manifest.classes is not None
    num_classes = len(images.manifest.classes)
    mix = BatchMix(
        augment, smoothing=recipe.classifier.smoothing, num_classes=num_classes, seed=seed, mean=mean, std=std
    )

    def prepare(raw: RawBatch) -> tuple[torch.Tensor, torch.Tensor]:
        assert raw.labels is not None
        images_u8, labels = raw.cuts[image_px].to(device, non_blocking=True), raw.labels.to(device, non_blocking=True)
        return mix(images_u8, labels, slice_number=raw.slice_number)

    def finish(ready: tuple[torch.Tensor, torch.Tensor], raw: RawBatch) -> LabelledBatch:
        return LabelledBatch(*ready, raw.keys)

    bad = bad or BadImages(data.max_bad_share)
    yield from device_batches(
        make, positions, prepare, finish, num_workers=data.num_workers, device=device, in_turn=bad.add_batch
    )


@dataclass
class CropMaker:
    """Sample numbers -> a crop of each image, and its label where the set has any.

    Travels to the workers, so it holds no open file.
    """

    images: ImageSet
    # uint8 [3, H, W] -> uint8 [3, image_px, image_px]
    crop: Callable[[torch.Tensor], torch.Tensor]
    image_px: int

    def __call__(self, samples: np.ndarray) -> RawBatch:
        images_u8 = torch.zeros(len(samples), 3, self.image_px, self.image_px, dtype=torch.uint8)
        labels = torch.full((len(samples),), PADDING)
        self.images.prefetch((sample for sample in map(int, samples) if sample != PADDING), labels=True)
        for row, sample in enumerate(map(int, samples)):
            if sample == PADDING:
                continue
            try:
                _, image = self.images.decode(sample)
            except DecodeError as error:
                raise UserError(
                    f"{self.images.folder}: unreadable image {error}; accuracy needs every image of the "
                    "set, repair it or pack it again"
                ) from None
            images_u8[row] = self.crop(image)
            if self.images.manifest.classes:
                labels[row] = self.images.label(sample)
        return RawBatch(cuts={self.image_px: images_u8}, labels=labels, samples=torch.from_numpy(samples))


def evaluation_batches(
    images: ImageSet, crops: CropSettings, world, *, batch: int, num_workers: int
) -> Iterator[EvalBatch]:
    """Central crops of this rank's share of a labelled set; every image exactly once over all ranks.

    Every rank gets equally many batches of equal size, filled up with padding, since under ZeRO-3 a forward pass is
    collective.

    Args:
        world: has rank, size, device.
        batch: images a forward pass; fewer where a rank's whole share is smaller.
    Yields: EvalBatch on `world.device`; a rank's samples are consecutive and increasing.
    Raises: UserError for an image that cannot be read, or a label that is not one of the set's.
    """
    image_px, device = crops.image_px, world.device
    places = rank_samples(images.num_samples, world.rank, world.size, batch)

    def prepare(raw: RawBatch) -> EvalBatch:
        assert raw.labels is not None and raw.samples is not None
        images_norm = normalize(raw.cuts[image_px].to(device, non_blocking=True), crops.mean, crops.std)
        return EvalBatch(
            images_norm, raw.labels.to(device, non_blocking=True), raw.samples.to(device, non_blocking=True)
        )

    make = CropMaker(images, CenterCrop(image_px, crops.crop), image_px)
    yield from device_batches(
        make, list(places), prepare, lambda batch, _: batch, num_workers=num_workers, device=device
    )


def rank_samples(num_samples: int, rank: int, world_size: int, batch: int) -> np.ndarray:
    """int64 [batches, batch]: the sample numbers of each forward pass of a rank, PADDING where there is none."""
    share = -(-num_samples // world_size)
    batch = min(batch, share)
    samples = np.full(-(-share // batch) * batch, PADDING)
    first = min(rank * share, num_samples)
    mine = min(share, num_samples - first)
    samples[:mine] = np.arange(first, first + mine)
    return samples.reshape(-1, batch)
