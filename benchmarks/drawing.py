"""Drawn rectangles and discs on noise, with COCO annotations: something a small detector learns in minutes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Ids with gaps, as COCO's.
RECTANGLE, DISC = 3, 17
CATEGORIES = [{"id": RECTANGLE, "name": "rectangle"}, {"id": DISC, "name": "disc"}]


def draw_objects(
    folder: Path,
    split: str,
    count: int,
    *,
    seed: int,
    empty: Sequence[int] = (),
    shapes: Sequence[tuple[int, int]] = ((120, 96), (96, 120)),
) -> Path:
    """Write `count` images below `folder/split`, of these heights and widths in turn, those numbered in `empty` without
    an object.

    Returns: the annotation file.
    """
    draw = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for number in range(count):
        height, width = shapes[number % len(shapes)]
        image = Image.fromarray(draw.integers(0, 90, (height, width, 3), dtype=np.uint8))
        name, image_id = f"{number:04d}.png", 10 + number
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for _ in range(0 if number in empty else int(draw.integers(1, 4))):
            annotation = _draw_one(ImageDraw.Draw(image), draw, height, width)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **annotation})
        image.save(folder / split / name)
    path = folder / f"{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def _draw_one(pen, draw: np.random.Generator, height: int, width: int) -> dict:
    wide, high = map(int, draw.integers(20, 44, 2))
    round_one = bool(draw.integers(2))
    high = wide if round_one else high
    left, top = int(draw.integers(width - wide)), int(draw.integers(height - high))
    colour, place = tuple(map(int, draw.integers(140, 256, 3))), [left, top, left + wide - 1, top + high - 1]
    if round_one:
        pen.ellipse(place, fill=colour)
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        edge = np.stack([left + wide / 2 * (1 + np.cos(angles)), top + high / 2 * (1 + np.sin(angles))], axis=1)
        shape, area = edge.ravel().tolist(), float(np.pi / 4 * wide * high)
    else:
        pen.rectangle(place, fill=colour)
        right, bottom = left + wide, top + high
        shape, area = [left, top, right, top, right, bottom, left, bottom], float(wide * high)
    category = DISC if round_one else RECTANGLE
    return {"category_id": category, "bbox": [left, top, wide, high], "area": area, "segmentation": [shape]}
