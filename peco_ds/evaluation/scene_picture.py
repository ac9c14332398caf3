"""Scenes with their labels and a model's predictions, side by side in colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peco_ds.data.scene_augment import IGNORED_PIXEL, Scene, resize_scene
from peco_ds.evaluation.reconstruction import comparison_grid

# Height and width of each image in the grid, in px.
SHOWN_PX = 256
_COLUMNS = ("image", "labels", "prediction")


def palette() -> torch.Tensor:
    """uint8 [256, 3]: a colour for each class, far apart for neighbours in the list; black for no class.

    Source: the colour map of PASCAL VOC, whose bits spread a number's low bits over the three channels; it starts with
        the class number plus one, since VOC's first colour is black.
    """
    numbers = torch.arange(256)
    colours = torch.zeros(256, 3, dtype=torch.int64)
    spread = (numbers + 1) % 256
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((spread >> (3 * place + channel)) & 1) << (7 - place)
    colours[IGNORED_PIXEL] = 0
    return colours.to(torch.uint8)


def scene_grid(scenes: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """uint8 [3, H, W]: a row for each scene, named columns.

    Args:
        scenes: (image uint8 [3, h, w], labels uint8 [h, w], predictions uint8 [h, w]) each.
    """
    rows = [[_square(image, labels) for labels in (None, truth, found)] for image, truth, found in scenes]
    columns = [torch.stack(column) for column in zip(*rows)]
    return comparison_grid(columns, names=_COLUMNS)


def _square(image: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """The image, or its labels in colours, within a white square of SHOWN_PX."""
    scene = resize_scene(Scene(image, image[0] if labels is None else labels), SHOWN_PX, SHOWN_PX)
    shown = scene.image_u8 if labels is None else palette()[scene.labels.long()].permute(2, 0, 1)
    height, width = shown.shape[1:]
    return F.pad(shown, (0, SHOWN_PX - width, 0, SHOWN_PX - height), value=255)
