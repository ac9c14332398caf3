"""Random training crops of an image and its class map: resize, crop, flip, photometric distortion.

Value for value those of mmsegmentation 0.11 and OpenCV, which BEiT and PeCo segment with, except that OpenCV rounds an
interpolated byte in fixed point: it may differ by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from peco_ds.config import SceneAugmentSettings

# A crop of which one class takes too much is drawn again so many times; the last one is taken as it is.
REDRAWS = 10
IGNORED_PIXEL = 255
# OpenCV's hue of 8 bits: two degrees a step.
_HUES = 180


class Scene(NamedTuple):
    image_u8: torch.Tensor  # uint8 [3, H, W]
    labels: torch.Tensor  # uint8 [H, W]; IGNORED_PIXEL: not labelled


class SceneCrop:
    """A scene of any size -> a random crop, each side at most crop_px.

    Args:
        crop_px: a side that is shorter is left for padding, which comes after normalisation.
    """

    def __init__(self, augment: SceneAugmentSettings, crop_px: int) -> None:
        self._augment, self._crop_px = augment, crop_px

    def __call__(self, scene: Scene, draw: np.random.Generator) -> Scene:
        augment = self._augment
        factor = draw.uniform(*augment.ratio)
        scene = resize_scene(scene, int(augment.long_px * factor), int(augment.short_px * factor))
        scene = random_crop(scene, self._crop_px, augment.max_class_share, draw)
        if draw.random() < augment.flip:
            scene = Scene(scene.image_u8.flip(-1), scene.labels.flip(-1))
        if augment.photometric:
            scene = scene._replace(image_u8=photometric(scene.image_u8, draw))
        return scene


def bounded_size(height: int, width: int, long_px: int, short_px: int) -> tuple[int, int]:
    """The largest size of the same aspect whose sides keep within both bounds; at least 1 px.

    Source: mmcv's `imrescale` with a tuple, `int(side * scale + 0.5)`.
    """
    scale = min(long_px / max(height, width), short_px / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_scene(scene: Scene, long_px: int, short_px: int) -> Scene:
    """Image bilinear without antialiasing, labels nearest."""
    height, width = scene.labels.shape
    size = bounded_size(height, width, long_px, short_px)
    labels = F.interpolate(scene.labels[None, None], size=size, mode="nearest")[0, 0]
    return Scene(resize_image(scene.image_u8, size), labels)


def resize_image(image_u8: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [3, H, W] -> uint8 [3, *size], bilinear without antialiasing."""
    if tuple(image_u8.shape[1:]) == size:
        return image_u8
    values = F.interpolate(image_u8[None].float(), size=size, mode="bilinear", align_corners=False)
    return values[0].round().clamp(0, 255).to(torch.uint8)


def random_crop(scene: Scene, crop_px: int, max_class_share: float, draw: np.random.Generator) -> Scene:
    """A crop of at most crop_px a side, drawn again where one class has `max_class_share` of its labelled pixels or
    it holds a single class.

    Source: mmsegmentation's `RandomCrop` with `cat_max_ratio`; its tenth redraw is taken unchecked.
    """

    def box() -> tuple[slice, slice]:
        starts = [int(draw.integers(max(side - crop_px, 0) + 1)) for side in scene.labels.shape]
        return slice(starts[0], starts[0] + crop_px), slice(starts[1], starts[1] + crop_px)

    place = box()
    if max_class_share < 1:
        for _ in range(REDRAWS):
            counts = torch.bincount(scene.labels[place].flatten(), minlength=IGNORED_PIXEL + 1)[:IGNORED_PIXEL]
            if (counts > 0).sum() > 1 and counts.max() < max_class_share * counts.sum():
                break
            place = box()
    return Scene(scene.image_u8[:, *place], scene.labels[place])


def photometric(image_u8: torch.Tensor, draw: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each changed by a coin of its own and cut to bytes at once.

    Contrast comes before saturation and hue or after them, by a coin too. There is no swap of channels.

    Args:
        image_u8: uint8 [3, H, W], RGB.
    Source: mmsegmentation's `PhotoMetricDistortion`.
    """
    image = image_u8.permute(1, 2, 0).numpy()
    if draw.integers(2):
        image = _bytes(image, shift=draw.uniform(-32, 32))
    contrast_first = draw.integers(2)
    if contrast_first and draw.integers(2):
        image = _bytes(image, factor=draw.uniform(0.5, 1.5))
    if draw.integers(2):
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = _bytes(hsv[..., 1], factor=draw.uniform(0.5, 1.5))
        image = hsv_to_rgb(hsv)
    if draw.integers(2):
        hsv = rgb_to_hsv(image)
        # The upper end of the draw is left out.
        hsv[..., 0] = (hsv[..., 0].astype(np.int64) + int(draw.integers(-18, 18))) % _HUES
        image = hsv_to_rgb(hsv)
    if not contrast_first and draw.integers(2):
        image = _bytes(image, factor=draw.uniform(0.5, 1.5))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _bytes(values: np.ndarray, *, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Cut off after the point, not rounded."""
    return np.clip(values.astype(np.float32) * np.float32(factor) + np.float32(shift), 0, 255).astype(np.uint8)


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> uint8 hue in [0, 180), saturation and value in [0, 255], as OpenCV gives them."""
    red, green, blue = (image[..., channel].astype(np.float32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    difference = value - np.minimum(np.minimum(red, green), blue)
    divisor = np.where(difference > 0, difference, 1)
    sixths = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = np.floor(sixths * (_HUES / 6) + 0.5)
    hue = np.where(hue < 0, hue + _HUES, hue)
    saturation = np.floor(255 * difference / np.where(value > 0, value, 1) + 0.5)
    return np.stack([hue, saturation, value], axis=-1).astype(np.uint8)


def hsv_to_rgb(image: np.ndarray) -> np.ndarray:
    """The reverse of `rgb_to_hsv`; rounded."""
    sixths = image[..., 0].astype(np.float32) * np.float32(6 / _HUES)
    saturation, value = (image[..., channel].astype(np.float32) / 255 for channel in (1, 2))
    sector = np.floor(sixths)
    rest = sixths - sector
    low = value * (1 - saturation)
    falling, rising = value * (1 - saturation * rest), value * (1 - saturation * (1 - rest))
    sector = sector.astype(np.int64) % 6
    red, green, blue = (
        np.choose(sector, parts)
        for parts in (
            (value, falling, low, low, rising, value),
            (rising, value, value, falling, low, low),
            (low, low, rising, value, value, falling),
        )
    )
    return np.floor(np.stack([red, green, blue], axis=-1) * 255 + 0.5).clip(0, 255).astype(np.uint8)
