"""What a tokenizer is judged on: the central square of every picture, exactly once over all ranks, with its label where the set has any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from peco_ds.data.decode import DecodeError
from peco_ds.data.labelled import PADDING, rank_samples
from peco_ds.data.loaders import Pictures, RawBatch, load_raw
from peco_ds.data.views import center_view, cut
from peco_ds.errors import UserError


class SquareBatch(NamedTuple):
    images_01: torch.Tensor  # float32 [B, 3, S, S] on the device; black where a row is padding
    labels: torch.Tensor  # int64 [B] on the CPU; -1: padding, or a set without labels
    samples: torch.Tensor  # int64 [B] on the CPU, global sample numbers; -1: padding


@dataclass
class _SquareMaker:
    """Sample numbers -> central squares. Travels to the workers, so it holds no open file."""

    pictures: Pictures
    size_px: int

    def __call__(self, samples: np.ndarray) -> RawBatch:
        images_u8 = torch.zeros(len(samples), 3, self.size_px, self.size_px, dtype=torch.uint8)
        labels = torch.full((len(samples),), PADDING)
        for row, sample in enumerate(map(int, samples)):
            if sample == PADDING:
                continue
            try:
                _, image = self.pictures.decode(sample)
            except DecodeError as error:
                raise UserError(f"{self.pictures.folder}: unreadable picture {error}; repair the set or pack it again") from None
            images_u8[row] = cut(image, center_view(*image.shape[1:]), self.size_px)
            if self.pictures.manifest.classes:
                labels[row] = self.pictures.label(sample)
        return RawBatch(cuts={self.size_px: images_u8}, labels=labels, samples=torch.from_numpy(samples))


def square_batches(pictures: Pictures, *, rank: int, world_size: int, batch: int, size_px: int, num_workers: int, device: torch.device) -> Iterator[SquareBatch]:
    """The squares that `held_out_pictures` cuts, of a set of any size. Every rank gets equally many batches of equal size, filled up with padding.

    Raises: UserError for a picture that cannot be read, or a label that is not one of the set's.
    """
    for raw in load_raw(_SquareMaker(pictures, size_px), list(rank_samples(pictures.num_samples, rank, world_size, batch)), num_workers):
        yield SquareBatch(raw.cuts[size_px].to(device, non_blocking=True).float() / 255, raw.labels, raw.samples)
