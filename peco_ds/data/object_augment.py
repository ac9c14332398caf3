"""An image and its objects, resized, cut, flipped: random for training, plain for measuring.

An operation moves image, boxes and masks alike. Coordinates are continuous: pixel i covers [i, i + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from peco_ds.config import ObjectAugmentSettings
from peco_ds.data.coco_annotations import masks_of


@dataclass(frozen=True)
class Placement:
    """How an image comes from its original: resized to `height` x `width`, then the cut box, then maybe flipped."""

    height: int
    width: int
    top: int
    left: int
    cut_height: int
    cut_width: int
    flip: bool = False


def resized_shape(height: int, width: int, short_px: int, long_px: int) -> tuple[int, int]:
    """Height and width of an image whose short side becomes `short_px`, or whose long side `long_px` where that is
    less; rounded, 1 at least.
    """
    factor = min(short_px / min(height, width), long_px / max(height, width))
    # Rounding never takes a side beyond its bound.
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def plain_placement(height: int, width: int, settings: ObjectAugmentSettings) -> Placement:
    """For measuring: the whole image."""
    height, width = resized_shape(height, width, settings.short_px, settings.long_px)
    return Placement(height, width, 0, 0, height, width)


def draw_placement(height: int, width: int, settings: ObjectAugmentSettings, draw: np.random.Generator) -> Placement:
    """A random one of a training image.

    Source: 800 / 1333 and flip: Mask R-CNN's usual schedule. scale_jitter: arXiv 2012.07177, with a cut at a random
        place where the image passes the square.
    """
    if settings.kind == "resize":
        plain = plain_placement(height, width, settings)
        return Placement(plain.height, plain.width, 0, 0, plain.height, plain.width, draw.random() < settings.flip)
    square = settings.long_px
    factor = draw.uniform(*settings.scale) * square / max(height, width)
    height, width = max(1, round(height * factor)), max(1, round(width * factor))
    cut_height, cut_width = min(height, square), min(width, square)
    top, left = (int(draw.integers(spare + 1)) for spare in (height - cut_height, width - cut_width))
    return Placement(height, width, top, left, cut_height, cut_width, draw.random() < settings.flip)


def place_image(image_u8: torch.Tensor, place: Placement) -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, cut_height, cut_width]; bilinear, antialiased where it shrinks."""
    resized = image_u8
    if image_u8.shape[1:] != (place.height, place.width):
        resized = F.interpolate(
            image_u8[None], (place.height, place.width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    cut = resized[:, place.top : place.top + place.cut_height, place.left : place.left + place.cut_width]
    return (cut.flip(2) if place.flip else cut).contiguous()


def place_objects(
    objects: list[dict], height: int, width: int, place: Placement
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The objects of an original image of `height` x `width` that are left after a placement.

    An object whose box lost all of its area, or whose mask has no pixel left, is gone.

    Args:
        objects: COCO annotations.
    Returns: boxes float32 [N, 4] (x1, y1, x2, y2), masks uint8 [N, cut_height, cut_width], places int64 [N] in
        `objects`.
    """
    scale = place.width / width, place.height / height
    masks = torch.from_numpy(masks_of(objects, place.height, place.width, scale=scale))
    masks = masks[:, place.top : place.top + place.cut_height, place.left : place.left + place.cut_width]
    boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= torch.tensor(scale).repeat(2)
    boxes -= torch.tensor([place.left, place.top], dtype=torch.float64).repeat(2)
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, place.cut_width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, place.cut_height)
    if place.flip:
        masks = masks.flip(2)
        boxes[:, 0::2] = place.cut_width - boxes[:, [2, 0]]
    boxes = boxes.float()
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (masks != 0).flatten(1).any(1)
    return boxes[kept], masks[kept].contiguous(), kept.nonzero()[:, 0]
