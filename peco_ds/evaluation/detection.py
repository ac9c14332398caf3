"""Box and mask AP of a detector as COCO defines them: pycocotools on the original annotation file, original ids.

Each rank turns what it found into rows of COCO's result format; rank 0 scores the rows of all ranks, so every image
counts once and the numbers do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from peco_ds.data.labelled import PADDING
from peco_ds.errors import UserError, describe_os_error
from peco_ds.models.mask_rcnn import paste_masks

# Names of COCO's first six numbers.
_AP = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
# Masks pasted at once: of an image of 640 x 480 px, 80 MB.
_PASTED = 64


def coco_rows(detection, image_id: int, shown: tuple[int, int], original: tuple[int, int], ids) -> list[dict]:
    """What was found in one image, in COCO's result format.

    Args:
        detection: a `Detection` in an image of `shown` = (height, width).  original: height and width of the original
            image, whose pixels the rows are in.  ids: category id of each label, from label 1.
    """
    height, width = original
    scale = torch.tensor([width / shown[1], height / shown[0]], device=detection.boxes.device).repeat(2)
    boxes = detection.boxes * scale
    rows = []
    for first in range(0, len(boxes), _PASTED):
        some = slice(first, first + _PASTED)
        pasted = paste_masks(detection.masks[some], boxes[some], height, width).cpu().numpy()
        for mask, box, score, label in zip(
            pasted, boxes[some].tolist(), detection.scores[some].tolist(), detection.labels[some].tolist()
        ):
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            rows.append(
                {
                    "image_id": image_id,
                    "category_id": ids[label - 1],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "score": score,
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
    return rows


@torch.no_grad()
def found_rows(forward, batches: Iterable, category_ids: tuple[int, ...]) -> list[dict]:
    """Rows of this rank's images.

    Args:
        forward: images_u8 -> one `Detection` an image.
        batches: `data.objects.DetectionBatch`es.
    Raises: UserError if the model's numbers on an image are not finite.
    """
    rows: list[dict] = []
    for batch in batches:
        for place, detection in enumerate(forward(batch.images_u8)):
            if batch.samples[place] != PADDING:
                shown = batch.images_u8[place].shape[1], batch.images_u8[place].shape[2]
                image_id, original = batch.image_ids[place], batch.original_sizes[place]
                if not detection.is_finite:
                    raise UserError(
                        f"the detector gives values that are not finite on image {image_id}, so there is no score; "
                        "take weights of an earlier step, or more precision (fp32)"
                    )
                rows += coco_rows(detection, image_id, shown, original, category_ids)
    return rows


def read_annotations(path: Path) -> COCO:
    """An annotation file for `average_precision`.

    Raises: UserError if it cannot be read.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(path))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read as COCO annotations ({reason}); pack the set again") from None


def average_precision(annotations: COCO, rows: list[dict], image_ids: list[int]) -> dict[str, float]:
    """COCO's six APs of boxes and of masks, in percent.

    Args:
        rows: in COCO's result format.  image_ids: the images that count; others of the file do not.
    Returns: box_ap, box_ap50, ..., mask_ap_large; a size of which the images have no object is left out.
    Source: COCO's evaluation, as pycocotools computes it.
    """
    quality = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            found = _results(annotations, rows)
            scorer = COCOeval(annotations, found, kind)
            scorer.params.imgIds = sorted(image_ids)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        for number, value in zip(_AP, scorer.stats[: len(_AP)]):
            if value >= 0:
                quality[f"{name}_{number}"] = round(100 * float(value), 4)
    return quality


def _results(annotations: COCO, rows: list[dict]) -> COCO:
    """The rows as pycocotools takes them; unlike its own `loadRes`, none are allowed."""
    if rows:
        # A copy: pycocotools writes into the rows.
        return annotations.loadRes([dict(row) for row in rows])
    found = COCO()
    found.dataset = {"images": annotations.dataset["images"], "categories": annotations.dataset["categories"]}
    found.dataset["annotations"] = []
    found.createIndex()
    return found


def detection_quality(
    forward, batches: Iterable, images, annotations: COCO | None, world
) -> tuple[dict[str, float], list[dict]]:
    """AP of boxes and masks over a set, and how many images it is of. Collective.

    Args:
        forward, batches: as of `found_rows`; each image of `images` once over all ranks.
        images: the `ObjectSet`.  annotations: its file; needed on rank 0.
        world: has is_main, gather_objects.
    Returns: the numbers, the same on every rank; and on rank 0 the rows of all ranks.
    """
    rows = found_rows(forward, batches, images.category_ids)
    # Text takes a fifth of the objects' memory, on every rank.
    texts = world.gather_objects(json.dumps(rows))
    quality: dict[str, float] = {}
    if world.is_main:
        assert annotations is not None
        ids = [images.entry(sample)[0]["id"] for sample in range(images.num_samples)]
        rows = [row for text in texts for row in json.loads(text)]
        quality = average_precision(annotations, rows, ids)
        quality["images"] = len(set(ids))
    return world.gather_objects(quality)[0], rows
