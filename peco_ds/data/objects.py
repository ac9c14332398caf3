"""Images with objects: random ones with boxes and masks for training, plain and each exactly once for measuring AP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.config import DetectRecipe, ObjectAugmentSettings
from peco_ds.data.coco_annotations import check_object
from peco_ds.data.decode import DecodeError
from peco_ds.data.device_feed import device_batches
from peco_ds.data.image_set import BadImages, ImageSet
from peco_ds.data.instance_packing import ANNOTATIONS_NAME, CATEGORIES_NAME, INSTANCES, can_be_learnt
from peco_ds.data.labelled import PADDING, rank_samples
from peco_ds.data.object_augment import draw_placement, place_image, place_objects, plain_placement
from peco_ds.data.order import AUGMENT, OBJECTS, SampleOrder, generator
from peco_ds.data.retry import UnreadableRecord, read_with_retries
from peco_ds.data.workers import RawBatch
from peco_ds.errors import UserError
from peco_ds.remote_paths import Place, local_copy
from peco_ds.schema import IMAGE_EXTENSIONS, parse_json, read_json, short

# The largest seed of a device's generator, plus one.
_MAX_SEED = 2**62


class ObjectSet(ImageSet):
    """Images with COCO annotations (pack_images.py --labels instances), by global sample number.

    Raises: UserError if the set was packed without.
    """

    read_ahead = (*IMAGE_EXTENSIONS, INSTANCES)

    def __init__(self, folder: Place, what: str = "data.images") -> None:
        super().__init__(folder)
        try:
            self.categories = read_json(self.folder / CATEGORIES_NAME)["categories"]
            self.category_ids = tuple(int(category["id"]) for category in self.categories)
            self.classes = tuple(str(category["name"]) for category in self.categories)
        except FileNotFoundError:
            raise UserError(
                f"{what} {self.folder}: holds images without boxes and masks; pack them with pack_images.py --labels "
                "instances --annotations FILE"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{what} {self.folder / CATEGORIES_NAME}: cannot be read ({error}); pack the set again"
            ) from None

    @property
    def annotation_file(self) -> Path:
        """The file that the set was packed from."""
        return local_copy(self.folder / ANNOTATIONS_NAME)

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Category id -> label from 1; 0 is the background."""
        return {number: label for label, number in enumerate(self.category_ids, start=1)}

    def entry(self, sample: int) -> tuple[dict, list[dict]]:
        """An image's entry of the annotation file and its objects.

        Raises: UserError naming the key if the record holds none, or something else.
        """
        try:
            key, members = read_with_retries(self.shards, sample, (INSTANCES,))
        except UnreadableRecord as error:
            raise UserError(f"{error}; its objects are needed: repair the set or the file system") from None
        place = f"{self.folder}: {key}"
        try:
            record = parse_json(members[INSTANCES].decode())
            image, objects = record["image"], record["annotations"]
            assert type(image["id"]) is int and all(type(entry) is dict for entry in objects)
            for entry in objects:
                check_object(place, entry, image, set(self.category_ids))
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(
                f"{place}: its {INSTANCES} cannot be read ({type(error).__name__} {short(str(error))}); pack the set "
                "again"
            ) from None
        return image, objects


def object_sets(
    images: Place, val_images: Place, names: tuple[str, str] = ("data.images", "data.val_images")
) -> tuple[ObjectSet, ObjectSet]:
    """A set to train on and a set to measure on.

    Raises: UserError if one is missing or without annotations, or their categories differ.
    """
    image_set, held_out = ObjectSet(images, names[0]), ObjectSet(val_images, names[1])
    if (image_set.category_ids, image_set.classes) != (held_out.category_ids, held_out.classes):
        raise UserError(
            f"{names[1]} {held_out.folder}: its categories are not those of {image_set.folder}, or stand in another "
            "order; pack both from files with the same categories"
        )
    return image_set, held_out


class ObjectTargets(NamedTuple):
    """What one image should give, on the device."""

    boxes: torch.Tensor  # float32 [N, 4], x1 y1 x2 y2 in pixels of the image; N may be 0
    labels: torch.Tensor  # int64 [N], from 1
    masks: torch.Tensor  # uint8 [N, H, W]
    # For the choice of anchors and proposals: it belongs to the image, whatever rank sees it.
    seed: int


class ObjectBatch(NamedTuple):
    """The batch of a detector's training step, on the device."""

    # Each uint8 [3, H, W], of any shape.
    images_u8: tuple[torch.Tensor, ...]
    targets: tuple[ObjectTargets, ...]
    keys: list[str]


class DetectionBatch(NamedTuple):
    """The batch that AP is measured on, on the device."""

    images_u8: tuple[torch.Tensor, ...]
    # For each image: its sample number (PADDING: it only fills up the batch), its id, and height and width of its
    # original.
    samples: list[int]
    image_ids: list[int]
    original_sizes: list[tuple[int, int]]


@dataclass
class _TrainMaker:
    """Positions of the run -> random images and their objects. Travels to the workers, so it holds no open file."""

    images: ObjectSet
    order: SampleOrder
    augment: ObjectAugmentSettings
    seed: int

    def __call__(self, positions: np.ndarray) -> RawBatch:
        raw, seeds = RawBatch(), []
        self.images.prefetch(self.order.sample_at(position) for position in map(int, positions))
        for row, position in enumerate(map(int, positions)):
            sample, epoch = self.order.sample_at(position), self.order.epoch_of(position)
            substitute, key, image, bad = self.images.decode_or_next(sample)
            _, objects = self.images.entry(substitute)
            objects = [entry for entry in objects if can_be_learnt(entry)]
            height, width = image.shape[1:]
            place = draw_placement(height, width, self.augment, generator(AUGMENT, self.seed, epoch, sample))
            boxes, masks, kept = place_objects(objects, height, width, place)
            labels = [self.images.label_of[objects[number]["category_id"]] for number in kept.tolist()]
            parts = place_image(image, place), boxes, torch.tensor(labels, dtype=torch.int64), masks
            raw.cuts |= {(row, part): tensor for part, tensor in enumerate(parts)}
            seeds.append(int(generator(OBJECTS, self.seed, epoch, sample).integers(_MAX_SEED)))
            raw.keys.append(key)
            raw.bad += bad
        raw.samples = torch.tensor(seeds)
        return raw


def object_batches(
    images: ObjectSet,
    positions: Iterable[np.ndarray],
    recipe: DetectRecipe,
    device: torch.device,
    bad: BadImages | None = None,
) -> Iterator[ObjectBatch]:
    """Batches of detector training: crowds and boxes without area left out.

    An unreadable image is named and counted, and the next one takes its place with its own objects.

    Args:
        positions: position arrays, one a batch (`order.rank_positions`).
        recipe: its data, augment and run.seed are read.
        bad: the run's count of unreadable images; None: one of this call's own.
    Yields: ObjectBatch on `device`.
    """
    data, seed = recipe.data, recipe.run.seed
    order = SampleOrder(images.shards.shard_sizes, seed, data.shuffle_window_shards)

    def prepare(raw: RawBatch) -> tuple:
        rows = range(len(raw.keys))
        return tuple(tuple(raw.cuts[row, part].to(device, non_blocking=True) for part in range(4)) for row in rows)

    def finish(ready: tuple, raw: RawBatch) -> ObjectBatch:
        assert raw.samples is not None
        targets = tuple(
            ObjectTargets(boxes, labels, masks, seed)
            for (_, boxes, labels, masks), seed in zip(ready, raw.samples.tolist())
        )
        return ObjectBatch(tuple(row[0] for row in ready), targets, raw.keys)

    bad = bad or BadImages(data.max_bad_share)
    yield from device_batches(
        _TrainMaker(images, order, recipe.augment, seed),
        positions,
        prepare,
        finish,
        num_workers=data.num_workers,
        device=device,
        in_turn=bad.add_batch,
    )


@dataclass
class _PlainMaker:
    """Sample numbers -> whole images, resized."""

    images: ObjectSet
    augment: ObjectAugmentSettings

    def __call__(self, samples: np.ndarray) -> RawBatch:
        raw, rows = RawBatch(samples=torch.from_numpy(samples)), []
        self.images.prefetch(sample for sample in map(int, samples) if sample != PADDING)
        for row, sample in enumerate(map(int, samples)):
            if sample == PADDING:
                blank = self.augment.short_px
                raw.cuts[row] = torch.zeros(3, blank, blank, dtype=torch.uint8)
                rows.append((PADDING, blank, blank))
                continue
            try:
                _, image = self.images.decode(sample)
            except DecodeError as error:
                raise UserError(
                    f"{self.images.folder}: unreadable image {error}; AP needs every image of the set, repair it or "
                    "pack it again"
                ) from None
            entry, _ = self.images.entry(sample)
            height, width = image.shape[1:]
            raw.cuts[row] = place_image(image, plain_placement(height, width, self.augment))
            rows.append((entry["id"], height, width))
        raw.labels = torch.tensor(rows)
        return raw


def detection_batches(
    images: ObjectSet, augment: ObjectAugmentSettings, world, *, batch: int, num_workers: int
) -> Iterator[DetectionBatch]:
    """This rank's share of a set; every image exactly once over all ranks.

    Every rank gets equally many batches of equally many images, filled up with blank ones, since under ZeRO-3 a
    forward pass is collective.

    Args:
        world: has rank, size, device.  batch: images a forward pass.
    Raises: UserError for an image that cannot be read.
    """
    places = rank_samples(images.num_samples, world.rank, world.size, batch)

    def prepare(raw: RawBatch) -> tuple:
        assert raw.samples is not None
        return tuple(raw.cuts[row].to(world.device, non_blocking=True) for row in range(len(raw.samples)))

    def finish(images_u8: tuple, raw: RawBatch) -> DetectionBatch:
        assert raw.samples is not None and raw.labels is not None
        rows = raw.labels.tolist()
        sizes = [(height, width) for _, height, width in rows]
        return DetectionBatch(images_u8, raw.samples.tolist(), [row[0] for row in rows], sizes)

    yield from device_batches(
        _PlainMaker(images, augment), list(places), prepare, finish, num_workers=num_workers, device=world.device
    )
