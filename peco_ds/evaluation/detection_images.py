"""Images of a set with their annotated boxes and masks, and beside each the same image with what was found."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from peco_ds.data.coco_annotations import masks_of

# Boxes of less than this score are not drawn.
MIN_SCORE = 0.5
# Height and width of one image in the grid.
_CELL_PX = 320, 426
_COLOURS = ("red", "lime", "blue", "orange", "magenta", "cyan", "yellow", "purple", "brown", "deeppink")


def detections_image(images, rows: list[dict], count: int, *, min_score: float = MIN_SCORE) -> torch.Tensor:
    """The first `count` images that can be read, one below the other.

    Args:
        images: an `ObjectSet`.  rows: what was found, in COCO's result format, of any images.
    Returns: uint8 [3, H, W]: annotated on the left, found on the right.
    """
    found: dict[int, list[dict]] = {}
    for row in rows:
        if row["score"] >= min_score:
            found.setdefault(row["image_id"], []).append(row)
    lines = []
    for sample in range(min(count, images.num_samples)):
        _, image = images.decode(sample)
        entry, objects = images.entry(sample)
        both = [drawn(image, each, images) for each in (objects, found.get(entry["id"], []))]
        lines.append(torch.cat([_fitted(each) for each in both], dim=2))
    return torch.cat(lines, dim=1)


def drawn(image_u8: torch.Tensor, objects: list[dict], images) -> torch.Tensor:
    """An image under the boxes, masks and names of objects, in COCO's format.

    Args:
        image_u8: uint8 [3, H, W].
    """
    if not objects:
        return image_u8
    labels = [images.label_of[entry["category_id"]] for entry in objects]
    colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
    masks = torch.from_numpy(masks_of(objects, *image_u8.shape[1:])).bool()
    image_u8 = draw_segmentation_masks(image_u8, masks, alpha=0.4, colors=colours)
    boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float)
    boxes[:, 2:] += boxes[:, :2]
    height, width = image_u8.shape[1:]
    boxes = torch.stack([boxes[:, 0].clamp(0, width), boxes[:, 1].clamp(0, height), *_ends(boxes, height, width)], 1)
    names = [
        images.classes[label - 1] + (f" {entry['score']:.2f}" if "score" in entry else "")
        for label, entry in zip(labels, objects)
    ]
    return draw_bounding_boxes(image_u8, boxes, labels=names, colors=colours, width=2)


def _ends(boxes: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return boxes[:, 2].clamp(0, width), boxes[:, 3].clamp(0, height)


def _fitted(image_u8: torch.Tensor) -> torch.Tensor:
    """Inside one cell, white around."""
    height, width = _CELL_PX
    factor = min(height / image_u8.shape[1], width / image_u8.shape[2])
    size = [max(1, int(side * factor)) for side in image_u8.shape[1:]]
    small = F.interpolate(image_u8[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    cell = torch.full((3, height, width), 255, dtype=torch.uint8)
    cell[:, : size[0], : size[1]] = small
    return cell
