"""Batches for evaluating a tokenizer: the central square of every image, exactly once over all ranks, with its label
where the set has any.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.data.device_feed import device_batches
from peco_ds.data.image_set import ImageSet
from peco_ds.data.labelled import CropMaker, rank_samples
from peco_ds.data.views import center_view, cut
from peco_ds.data.workers import RawBatch


class SquareBatch(NamedTuple):
    # float32 [B, 3, S, S] on the device; black where a row is padding
    images_01: torch.Tensor
    # int64 [B] on the CPU; -1: padding, or a set without labels
    labels: torch.Tensor
    # int64 [B] on the CPU, global sample numbers; -1: padding
    samples: torch.Tensor


def _central_square(size_px: int, image_u8: torch.Tensor) -> torch.Tensor:
    return cut(image_u8, center_view(*image_u8.shape[1:]), size_px)


def read_square(images: ImageSet, sample: int, size_px: int) -> torch.Tensor:
    """One of the squares that `square_batches` cuts, as uint8 [3, S, S].

    Raises: UserError as `square_batches`.
    """
    make = CropMaker(images, partial(_central_square, size_px), size_px)
    return make(np.array([sample])).cuts[size_px][0]


def square_batches(images: ImageSet, size_px: int, world, *, batch: int, num_workers: int) -> Iterator[SquareBatch]:
    """The squares that `held_out_images` cuts, of a set of any size.

    Every rank gets equally many batches of equal size, filled up with padding.

    Args:
        world: has rank, size, device.
        batch: images a forward pass.
    Raises: UserError for an image that cannot be read, or a label that is not one of the set's.
    """

    def prepare(raw: RawBatch) -> torch.Tensor:
        return raw.cuts[size_px].to(world.device, non_blocking=True).float() / 255

    def finish(images_01: torch.Tensor, raw: RawBatch) -> SquareBatch:
        return SquareBatch(images_01, raw.labels, raw.samples)

    make = CropMaker(images, partial(_central_square, size_px), size_px)
    yield from device_batches(
        make,
        list(rank_samples(images.num_samples, world.rank, world.size, batch)),
        prepare,
        finish,
        num_workers=num_workers,
        device=world.device,
    )
