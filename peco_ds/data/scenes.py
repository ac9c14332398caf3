"""Scenes, images with the class of every pixel: random crops for training, whole ones for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.config import SegmentRecipe
from peco_ds.data.decode import DecodeError, decode_map, decode_rgb
from peco_ds.data.device_feed import device_batches
from peco_ds.data.image_set import BadImages, ImageSet
from peco_ds.data.indexed_tar import DamagedRecord
from peco_ds.data.labelled import PADDING, rank_samples, refuse_one_class
from peco_ds.data.order import AUGMENT, SampleOrder, generator
from peco_ds.data.retry import UnreadableRecord, read_with_retries
from peco_ds.data.scene_augment import IGNORED_PIXEL, Scene, SceneCrop
from peco_ds.data.views import normalize
from peco_ds.data.workers import RawBatch
from peco_ds.errors import UserError
from peco_ds.remote_paths import Place
from peco_ds.schema import IMAGE_EXTENSIONS, IMAGENET_MEAN, IMAGENET_STD, MAP_EXTENSION, SceneMaps


class SceneBatch(NamedTuple):
    """The batch of a segmentation's training step, on the device."""

    images_norm: torch.Tensor  # float32 [B, 3, S, S]; 0 where a crop is padded
    labels: torch.Tensor  # int64 [B, S, S]; IGNORED_PIXEL: not labelled, or padding
    keys: list[str]


class EvalScene(NamedTuple):
    """One whole scene, or none where this rank only keeps the others company."""

    image_u8: torch.Tensor  # uint8 [3, H, W] on the device
    labels: torch.Tensor  # uint8 [H, W] on the device
    sample: int  # global sample number; PADDING: none


class SceneSet(ImageSet):
    """An image set of `pack_images.py --labels scenes`, by global sample number.

    Raises: UserError if its images have no class maps.
    """

    read_ahead = (*IMAGE_EXTENSIONS, MAP_EXTENSION)

    def __init__(self, folder: Place, what: str = "data.images") -> None:
        super().__init__(folder)
        if self.manifest.maps is None or not self.manifest.classes:
            raise UserError(
                f"{what} {self.folder}: holds images without class maps; pack images and maps with pack_images.py "
                "--labels scenes"
            )
        self._numbers = label_table(self.manifest.maps, len(self.manifest.classes))

    def scene(self, sample: int) -> tuple[str, Scene]:
        """Key and scene, the map's numbers turned into class numbers.

        Raises: DecodeError (names the key) if the record is damaged, cannot be read, or is no image with a map of its
            size; UserError if its whole shard is missing.
        """
        try:
            key, members = read_with_retries(self.shards, sample, (*IMAGE_EXTENSIONS, MAP_EXTENSION))
        except (DamagedRecord, UnreadableRecord) as error:
            self.shards.check_shards([self.shards.locate(sample)[0]], "size")
            raise DecodeError(str(error)) from None
        found = members.pop(MAP_EXTENSION, None)
        if found is None or not members:
            raise DecodeError(f"{key}: has no {'image' if found else MAP_EXTENSION}")
        try:
            image, numbers = decode_rgb(next(iter(members.values()))), decode_map(found)
        except DecodeError as error:
            raise DecodeError(f"{key}: {error}") from None
        if image.shape[1:] != numbers.shape:
            raise DecodeError(f"{key}: the map is of another size than the image")
        return key, Scene(image, self._numbers[numbers.long()])

    def scene_or_next(self, sample: int) -> tuple[str, Scene, list[str]]:
        """As `scene`, or the next readable one of the set, the same on every rank and after every restart.

        Returns: key, scene, and a text for each unreadable one on the way.
        """
        bad: list[str] = []
        for step in range(self.num_samples):
            try:
                return *self.scene((sample + step) % self.num_samples), bad
            except DecodeError as error:
                bad.append(str(error))
        raise UserError(f"{self.folder}: none of {self.num_samples} scenes can be read; first: {bad[0]}")


def label_table(maps: SceneMaps, num_classes: int) -> torch.Tensor:
    """uint8 [256]: the class of each number in a map, IGNORED_PIXEL for no class."""
    table = torch.full((256,), IGNORED_PIXEL, dtype=torch.uint8)
    first = 1 if maps.reduce_zero_label else 0
    table[first : first + num_classes] = torch.arange(num_classes, dtype=torch.uint8)
    table[[IGNORED_PIXEL, *maps.ignored]] = IGNORED_PIXEL
    return table


def scene_sets(images: Place, val_images: Place) -> tuple[SceneSet, SceneSet, tuple[str, ...]]:
    """A set to train on, a set to measure on, and the class names of both.

    Raises: UserError if one is missing or has no class maps, they have one class, or their classes differ.
    """
    sets = SceneSet(images), SceneSet(val_images, "data.val_images")
    refuse_one_class(sets[0], "data.images", "labelled pixels are", "pack maps with two or more classes")
    classes, others = (tuple(found.manifest.classes or ()) for found in sets)
    if classes != others:
        raise UserError(
            f"data.val_images {sets[1].folder}: its classes are not those of {sets[0].folder}, or stand in another "
            "order; pack both with one --classes file"
        )
    return *sets, classes


@dataclass
class _CropMaker:
    """Positions of the run -> random crops and their labels. Travels to the workers, so it holds no open file."""

    images: SceneSet
    order: SampleOrder
    crop: SceneCrop
    crop_px: int
    seed: int

    def __call__(self, positions: np.ndarray) -> RawBatch:
        raw, side = RawBatch(), self.crop_px
        images = torch.zeros(len(positions), 3, side, side, dtype=torch.uint8)
        labels = torch.full((len(positions), side, side), IGNORED_PIXEL, dtype=torch.uint8)
        sizes = torch.zeros(len(positions), 2, dtype=torch.int64)
        self.images.prefetch(self.order.sample_at(position) for position in map(int, positions))
        for place, position in enumerate(map(int, positions)):
            sample = self.order.sample_at(position)
            key, scene, bad = self.images.scene_or_next(sample)
            scene = self.crop(scene, generator(AUGMENT, self.seed, self.order.epoch_of(position), sample))
            height, width = scene.labels.shape
            images[place, :, :height, :width] = scene.image_u8
            labels[place, :height, :width] = scene.labels
            sizes[place] = torch.tensor([height, width])
            raw.keys.append(key)
            raw.bad += bad
        raw.cuts, raw.stored = {side: images}, (labels, sizes)
        return raw


def scene_batches(
    images: SceneSet,
    positions: Iterable[np.ndarray],
    recipe: SegmentRecipe,
    device: torch.device,
    bad: BadImages | None = None,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Iterator[SceneBatch]:
    """Batches of segmentation training.

    An unreadable scene is named and counted, and the next one takes its place.

    Args:
        positions: position arrays of one length, one a batch (`order.rank_positions`).
        recipe: its data, augment, model.image_px and run.seed are read.
        bad: the run's count of unreadable scenes; None: one of this call's own.
        mean, std: statistics of images in [0, 1] that the weights expect.
    Yields: SceneBatch on `device`.
    """
    data, crop_px, seed = recipe.data, recipe.model.image_px, recipe.run.seed
    order = SampleOrder(images.shards.shard_sizes, seed, data.shuffle_window_shards)
    make = _CropMaker(images, order, SceneCrop(recipe.augment, crop_px), crop_px, seed)

    def prepare(raw: RawBatch) -> tuple[torch.Tensor, torch.Tensor]:
        images_norm = normalize(raw.cuts[crop_px].to(device, non_blocking=True), mean, std)
        labels, sizes = (values.to(device, non_blocking=True) for values in raw.stored)
        places = torch.arange(crop_px, device=device)
        inside = (places[:, None] < sizes[:, :1, None]) & (places < sizes[:, 1:, None])
        # Padded after normalisation, so with the mean colour.
        return images_norm * inside[:, None], labels.long()

    bad = bad or BadImages(data.max_bad_share)
    yield from device_batches(
        make,
        positions,
        prepare,
        lambda ready, raw: SceneBatch(*ready, raw.keys),
        num_workers=data.num_workers,
        device=device,
        in_turn=bad.add_batch,
    )


@dataclass
class _WholeMaker:
    """One sample number -> the whole scene."""

    images: SceneSet

    def __call__(self, samples: np.ndarray) -> RawBatch:
        (sample,) = map(int, samples)
        if sample == PADDING:
            scene = Scene(torch.zeros(3, 1, 1, dtype=torch.uint8), torch.full((1, 1), IGNORED_PIXEL, dtype=torch.uint8))
        else:
            try:
                _, scene = self.images.scene(sample)
            except DecodeError as error:
                raise UserError(
                    f"{self.images.folder}: unreadable scene {error}; mIoU needs every scene of the set, repair it or "
                    "pack it again"
                ) from None
        return RawBatch(
            cuts={0: scene.image_u8[None]}, stored=(scene.labels,), samples=torch.from_numpy(samples.astype(np.int64))
        )


def evaluation_scenes(images: SceneSet, world, *, num_workers: int) -> Iterator[EvalScene]:
    """This rank's share of a set, one scene at a time; every scene exactly once over all ranks.

    Every rank gets equally many, filled up with padding, since under ZeRO-3 a forward pass is collective.

    Args:
        world: has rank, size, device.
    Raises: UserError for a scene that cannot be read.
    """

    def prepare(raw: RawBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return raw.cuts[0][0].to(world.device, non_blocking=True), raw.stored[0].to(world.device, non_blocking=True)

    def finish(ready: tuple[torch.Tensor, torch.Tensor], raw: RawBatch) -> EvalScene:
        assert raw.samples is not None
        return EvalScene(*ready, int(raw.samples))

    places = rank_samples(images.num_samples, world.rank, world.size, 1)
    yield from device_batches(
        _WholeMaker(images), list(places), prepare, finish, num_workers=num_workers, device=world.device
    )
