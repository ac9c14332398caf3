"""COCO's annotation files: read, every object held against its image, and one text an image for its record.

Only what the format promises is checked here; which objects are trained on is decided where they are read
(`objects.py`). No torch is imported.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from peco_ds.errors import UserError
from peco_ds.schema import read_json, sha256_of_file, short

# A box may reach so far beyond its image: published ones are rounded.
BOX_TOLERANCE_PX = 2.0
# Two numbers a corner, three corners.
_POLYGON_NUMBERS = 6


@dataclass(frozen=True)
class CocoAnnotations:
    """An annotation file, checked; entries are kept as they stand in it."""

    path: Path
    sha256: str
    categories: list[dict]
    # By id.
    images: dict[int, dict]
    # Image id -> its objects.
    objects: dict[int, list[dict]]

    def text_of(self, image_id: int) -> str:
        """The record of one image: its entry and its objects, as JSON."""
        return json.dumps({"image": self.images[image_id], "annotations": self.objects[image_id]})


def read_coco(path: Path, what: str = "--annotations") -> CocoAnnotations:
    """Read a COCO annotation file of boxes and masks (instances_train2017.json and the like).

    Args:
        what: the option or setting that named the file, for messages.
    Raises: UserError naming the first entry that is missing, contradicts another, or is no object of its image.
    """
    place = f"{what} {path}"
    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{place}: cannot be read as JSON ({reason}); give a COCO file of instances, as instances_train2017.json"
        ) from None
    parts = ("categories", "images", "annotations")
    missing = next((part for part in parts if not isinstance(raw, dict) or not isinstance(raw.get(part), list)), None)
    if missing is not None:
        raise UserError(f"{place}: has no list {missing!r}; give a COCO file of instances, as instances_train2017.json")
    categories, images, annotations = (raw[part] for part in parts)
    _check_entries(place, "category", categories, name=str)
    _check_entries(place, "image", images, file_name=str, height=int, width=int)
    _check_entries(place, "annotation", annotations, image_id=int, category_id=int)
    if not categories or not images:
        raise UserError(f"{place}: holds no {'category' if not categories else 'image'}; give a whole COCO file")
    names = Counter(category["name"] for category in categories)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{place}: two categories are named {short(twice)}; give each a name of its own")
    by_id = {image["id"]: image for image in images}
    objects: dict[int, list[dict]] = {image_id: [] for image_id in by_id}
    known = {category["id"] for category in categories}
    for entry in annotations:
        check_object(place, entry, by_id.get(entry["image_id"]), known)
        objects[entry["image_id"]].append(entry)
    return CocoAnnotations(path, sha256_of_file(path), categories, by_id, objects)


def _check_entries(place: str, kind: str, entries: list, **wanted: type) -> None:
    """Every entry is an object with a whole `id` of its own and the wanted fields."""
    seen = set()
    for number, entry in enumerate(entries):
        fields = {"id": int, **wanted}
        fault = (
            next((name for name, of in fields.items() if type(entry.get(name)) is not of), None)
            if isinstance(entry, dict)
            else "id"
        )
        if fault is not None:
            found = entry.get(fault) if isinstance(entry, dict) else entry
            raise UserError(
                f"{place}: {kind} {number} of the list has {fault} {short(found)}, which is no "
                f"{'whole number' if fields[fault] is int else 'text'}; correct the file"
            )
        if entry["id"] in seen:
            raise UserError(f"{place}: {kind} id {entry['id']} stands twice; give each an id of its own")
        seen.add(entry["id"])
        if kind == "image" and not (0 < entry["height"] < 2**20 and 0 < entry["width"] < 2**20):
            raise UserError(
                f"{place}: image {entry['id']} has size {entry['width']} x {entry['height']}; correct the file"
            )


def check_object(place: str, entry: dict, image: dict | None, categories: set[int]) -> None:
    """Whether an annotation is an object of its image.

    Boxes without area are let through, since published files hold some; they are not trained on.

    Args:
        image: its entry; None: the file has none of that id.  categories: ids that the file knows.
    Raises: UserError naming annotation, image, value and remedy.
    """
    where = f"{place}: annotation {entry['id']}"
    if image is None:
        raise UserError(
            f"{where} belongs to image {entry['image_id']}, which the file does not list; add the image or drop the "
            "annotation"
        )
    where += f" of {short(image['file_name'])}"
    if entry["category_id"] not in categories:
        raise UserError(
            f"{where} has category {entry['category_id']}, which the file does not list; add the category or "
            "correct the annotation"
        )
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise UserError(f"{where}: bbox {short(box)} is not four finite numbers x, y, width, height; correct it")
    left, top, width, height = box
    slack = BOX_TOLERANCE_PX
    inside = left >= -slack and top >= -slack and width >= 0 and height >= 0
    if not (inside and left + width <= image["width"] + slack and top + height <= image["height"] + slack):
        raise UserError(
            f"{where}: bbox {box} (x, y, width, height) lies outside the image of {image['width']} x "
            f"{image['height']} px; correct it"
        )
    if entry.get("iscrowd", 0) not in (0, 1):
        raise UserError(f"{where}: iscrowd {short(entry['iscrowd'])} is neither 0 nor 1; correct it")
    fault = _mask_fault(entry.get("segmentation"), image)
    if fault:
        raise UserError(f"{where}: segmentation {fault}; correct it, or give files with a mask for every object")


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _mask_fault(segmentation, image: dict) -> str:
    """Why a segmentation is no mask of its image; "" if it is one."""
    if isinstance(segmentation, list):
        if not segmentation:
            return "is empty"
        for polygon in segmentation:
            if not (isinstance(polygon, list) and all(map(_is_number, polygon))):
                return f"has the polygon {short(polygon)}, which is no list of finite numbers"
            if len(polygon) < _POLYGON_NUMBERS or len(polygon) % 2:
                return (
                    f"has a polygon of {len(polygon)} numbers; a polygon has x and y of three points at least, "
                    f"so {_POLYGON_NUMBERS} or more, and an even number"
                )
            reach = max(image["width"], image["height"]) * 2
            if any(abs(value) > reach for value in polygon):
                return f"has a polygon that leaves the image of {image['width']} x {image['height']} px far behind"
        return ""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [image["height"], image["width"]]:
            found = str(size)[:40] if isinstance(size, list) and len(size) == 2 else short(size)
            return f"has a run-length mask of size {found}, not {[image['height'], image['width']]}"
        runs = counts if isinstance(counts, list) else _runs_of_text(counts) if isinstance(counts, str) else None
        if runs is None or not all(type(run) is int and run >= 0 for run in runs):
            return "has run lengths that cannot be read"
        if sum(runs) != image["height"] * image["width"]:
            return f"has run lengths of {sum(runs)} pixels in all, the image has {image['height'] * image['width']}"
        return ""
    return f"is {short(segmentation)}, neither polygons nor a run-length mask"


def _runs_of_text(text: str) -> list[int] | None:
    """Run lengths out of COCO's compressed text; None if it is none.

    Five bits a character from code 48 on, the lowest first, the sixth says that more follow; from the third on a run is
    the difference to the run before the last.
    Source: the layout is that of `rleFrString` in COCO's mask API.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs


def masks_of(objects: list[dict], height: int, width: int, *, scale: tuple[float, float] = (1.0, 1.0)):
    """The masks of an image's objects.

    Polygons are drawn at the wanted size; run-length masks are drawn at their own and resized by nearest neighbours.

    Args:
        height, width: of the wanted masks, px.  scale: (x, y), from the annotations' pixels to the wanted ones.
    Returns: numpy uint8 [N, height, width], 0 and 1.
    """
    import numpy as np
    from pycocotools import mask as coco_mask

    masks = np.zeros((len(objects), height, width), dtype=np.uint8)
    for mask, entry in zip(masks, objects):
        shape = entry["segmentation"]
        if isinstance(shape, list):
            factors = np.asarray(scale)
            polygons = [(np.asarray(polygon, dtype=float).reshape(-1, 2) * factors).ravel() for polygon in shape]
            runs = coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
            mask[:] = coco_mask.decode(coco_mask.merge(runs))
            continue
        rows, columns = shape["size"]
        runs = coco_mask.frPyObjects(shape, rows, columns) if isinstance(shape["counts"], list) else shape
        whole = coco_mask.decode(runs)
        down = np.minimum((np.arange(height) + 0.5) / scale[1], rows - 1).astype(int)
        across = np.minimum((np.arange(width) + 0.5) / scale[0], columns - 1).astype(int)
        mask[:] = whole[down[:, None], across]
    return masks
