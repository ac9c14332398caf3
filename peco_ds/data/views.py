"""Paired crops of an image, one for the backbone and one for the tokenizer, drawn once and replayed from a record.

A view is a row of numbers (`schema.VIEW_COLUMNS`), drawn once and recorded. Both crops of the source image follow from
the row: same box, same flip, same colour jitter, each at its own size. Crops are cut and resized once to uint8 on the
CPU; jitter runs on whole batches on the device, in integer steps, so a replayed crop equals the recorded one pixel for
pixel whatever the batch.

Source: BEiT's two-view transform (arXiv 2106.08254; released `datasets.py`). One difference, for speed: BEiT jitters
    the whole image before it cuts. Here the crop is jittered, so contrast pivots on the mean grey of the crop and not
    of the image.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from peco_ds.config import ViewSettings
from peco_ds.data.order import VIEW, generator, uniform
from peco_ds.errors import UserError
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD, VIEW_COLUMNS

# 0 is brightness, 1 contrast, 2 saturation.
_JITTER_ORDERS = tuple(itertools.permutations(range(3)))
_BOX = slice(0, 4)
_FLIP = VIEW_COLUMNS.index("flip")
_FACTORS = slice(VIEW_COLUMNS.index("brightness"), VIEW_COLUMNS.index("saturation") + 1)
_ORDER = VIEW_COLUMNS.index("jitter_order")


def draw_view(views: ViewSettings, height: int, width: int, *, sample: int, view: int) -> np.ndarray:
    """One view of one image, as a pure function of (views.seed, sample, view).

    Args:
        views: says how boxes, flips and jitter are drawn.
        height, width: of the upright source image, px.
    Returns: float32 [len(VIEW_COLUMNS)].
    Source: random resized crop as torchvision's (ten tries, then the central crop of the nearest allowed aspect).
    """
    draw = generator(VIEW, views.seed, sample, view)
    row = np.empty(len(VIEW_COLUMNS), dtype=np.float32)
    row[_BOX] = _draw_box(draw, height, width, views.scale, views.ratio)
    row[_FLIP] = draw.random() < views.flip
    row[_FACTORS] = draw.uniform(1 - views.color_jitter, 1 + views.color_jitter, 3)
    row[_ORDER] = draw.integers(len(_JITTER_ORDERS))
    return row


def _draw_box(draw, height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * uniform(draw, *scale)
        aspect = math.exp(uniform(draw, low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draw.integers(height - h + 1)), int(draw.integers(width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def center_view(height: int, width: int) -> np.ndarray:
    """The central square, upright and unjittered: what held-out images are judged on."""
    side = min(height, width)
    return np.array([(height - side) // 2, (width - side) // 2, side, side, 0, 1, 1, 1, 0], dtype=np.float32)


def fault_of_views(rows: np.ndarray, first: int = 0) -> str:
    """What is wrong with recorded rows [K, len(VIEW_COLUMNS)], which `draw_view` never draws; "" if nothing is.

    A row of zeros marks an image that could not be read.

    Args:
        first: number of the first row's view.
    """
    if not np.isfinite(rows).all():
        return "holds a number that is not finite"
    for number, row in enumerate(rows.tolist(), first):
        if not any(row):
            continue
        top, left, height, width = row[_BOX]
        if not all(value.is_integer() for value in row[_BOX]) or min(top, left) < 0 or min(height, width) < 1:
            return f"view {number} has the box {row[_BOX]}, which is in no image"
        if row[_FLIP] not in (0, 1) or row[_ORDER] not in range(len(_JITTER_ORDERS)) or min(row[_FACTORS]) < 0:
            return (
                f"view {number} has flip {row[_FLIP]:g}, factors {row[_FACTORS]} and jitter order "
                f"{row[_ORDER]:g}, which no view has"
            )
    return ""


def cut(image: torch.Tensor, row: np.ndarray, size_px: int, interpolation: str = "bicubic") -> torch.Tensor:
    """Crop to the view's box, resize with antialiasing, flip. `jitter` follows on whole batches.

    Args:
        image: uint8 [3, H, W].
        row: a view.
        interpolation: "bicubic", torch's on uint8; or "lanczos", which torch has not and Pillow does.
    Returns: uint8 [3, size_px, size_px], channels last in memory where the image is, as decoders make it.
    Raises: UserError if the box is not in the image: the row was recorded of another one.
    """
    top, left, height, width = map(int, row[_BOX].tolist())
    crop = image[:, top : top + height, left : left + width]
    if crop.shape[1:] != (height, width):
        raise UserError(
            f"view box {row[_BOX].tolist()} (top, left, height, width) is not in an image of "
            f"{image.shape[1]} x {image.shape[2]}: it was recorded of another one; tokenize this image set"
        )
    if (height, width) != (size_px, size_px):
        crop = _RESIZE[interpolation](crop, size_px)
    return crop.flip(-1) if row[_FLIP] else crop


def room_for_cuts(count: int, size_px: int) -> torch.Tensor:
    """An empty uint8 tensor [count, 3, size_px, size_px], channels last in memory.

    The device turns it into planes while it converts pixels to floats, at no cost; a worker would spend a tenth of its
    time on that.
    """
    return torch.empty(count, size_px, size_px, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


def _bicubic(crop: torch.Tensor, size_px: int) -> torch.Tensor:
    # The batch axis is put before the rows, not before the channels: torch then sees that the channels are last, and
    # leaves them there.
    one = crop.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(one, size=(size_px, size_px), mode="bicubic", antialias=True)[0]


def _lanczos(crop: torch.Tensor, size_px: int) -> torch.Tensor:
    image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
    return torch.from_numpy(np.array(image.resize((size_px, size_px), Image.Resampling.LANCZOS))).permute(2, 0, 1)


_RESIZE = {"bicubic": _bicubic, "lanczos": _lanczos}


def jitter(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of each image in its own recorded order.

    Args:
        images: uint8 [B, 3, S, S] on any device.
        rows: float32 [B, len(VIEW_COLUMNS)] on the CPU, so that looking at them waits for nothing; pinned, so that
            their copy does not either.
    Returns: uint8 [B, 3, S, S]. Each of the three steps ends in uint8, as the reference on PIL images does, so no
        rounding of a batched reduction can leak into a pixel.
    """
    if bool((rows[:, _FACTORS] == 1).all()):
        return images
    rows = rows.to(images.device, non_blocking=True)
    orders = _jitter_orders(images.device)[rows[:, _ORDER].long()]  # [B, 3]: the operation at each place
    factors = rows[:, _FACTORS].gather(1, orders)
    x = images.to(torch.float32, memory_format=torch.contiguous_format)
    for place in range(3):
        operation = orders[:, place].view(-1, 1, 1, 1)
        factor = factors[:, place].view(-1, 1, 1, 1)
        # ITU-R 601 luma in 16-bit fixed point. No sum exceeds 2^24, up to which float32 holds every whole number:
        # exact, so its mean is the same on every device and in every batch.
        red, green, blue = x.unbind(1)
        grey = (
            (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).div_(65536).floor_().unsqueeze(1)
        )
        mean = (grey.sum(dim=(1, 2, 3), dtype=torch.float64) / grey[0].numel() + 0.5).floor().float().view(-1, 1, 1, 1)
        pivot = torch.where(operation == 2, grey, torch.where(operation == 1, mean, 0.0))
        x = (x - pivot).mul_(factor).add_(pivot).clamp_(0, 255).floor_()
    return x.to(torch.uint8)


@lru_cache
def _jitter_orders(device: torch.device) -> torch.Tensor:
    return torch.tensor(_JITTER_ORDERS, device=device)


def to_backbone(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32, ImageNet statistics (BEiT's choice when it trains on ImageNet-1K)."""
    return normalize(images, IMAGENET_MEAN, IMAGENET_STD)


def normalize(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32; mean and std of images in [0, 1]."""
    mean, std = _on_device(tuple(mean), images.device), _on_device(tuple(std), images.device)
    return (_floats(images).div_(255).sub_(mean)).div_(std)


def from_backbone(images_norm: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_backbone`: float32 [B, 3, S, S] in [-1, 1]."""
    mean, std = (_on_device(values, images_norm.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images_norm * std + mean) * 2 - 1


@lru_cache
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    # Made once a device: a copy from the host in every batch would make the host wait for the work queued on the
    # device.
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def to_tokenizer(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32 in [-1, 1], the tokenizer's range."""
    return _floats(images).div_(127.5).sub_(1.0)


def _floats(images: torch.Tensor) -> torch.Tensor:
    """A new float32 tensor, channels first in memory."""
    return images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
