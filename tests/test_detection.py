"""AP as pycocotools counts it: perfect, made-up and no detections; masks at their places; every image once."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_objects import pack
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.drawing import draw_objects
from peco_ds.config import ObjectAugmentSettings
from peco_ds.data.objects import PADDING, ObjectSet, detection_batches
from peco_ds.errors import UserError
from peco_ds.evaluation.detection import average_precision, coco_rows, detection_quality, paste_masks, read_annotations
from peco_ds.evaluation.detection_images import detections_image
from peco_ds.models.mask_rcnn import Detection

CPU = torch.device("cpu")
PLAIN = ObjectAugmentSettings(short_px=96, long_px=128)


@pytest.fixture
def drawn(tmp_path):
    path = draw_objects(tmp_path, "set", 7, seed=4, empty=(2,))
    return ObjectSet(pack(tmp_path / "set", path, tmp_path / "out"))


def perfect(annotations):
    return [
        {
            "image_id": each["image_id"],
            "category_id": each["category_id"],
            "bbox": each["bbox"],
            "score": 0.9,
            "segmentation": annotations.annToRLE(each),
        }
        for each in annotations.dataset["annotations"]
        if not each["iscrowd"]
    ]


def made_up(annotations, seed=0):
    """True objects shifted, some missing, some of another class, and boxes of nothing."""
    draw, rows = np.random.default_rng(seed), []
    ids = sorted(annotations.cats)
    for row in perfect(annotations):
        if draw.random() < 0.2:
            continue
        left, top, width, height = (side + draw.normal() * 4 for side in row["bbox"])
        wrong = draw.random() < 0.15
        category = int(draw.choice(ids)) if wrong else row["category_id"]
        rows.append({**row, "category_id": category, "bbox": [left, top, width, height], "score": float(draw.random())})
    return rows


def reference(annotations, rows, kind, image_ids):
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(annotations, annotations.loadRes(rows), kind)
        scorer.params.imgIds = image_ids
        scorer.evaluate(), scorer.accumulate(), scorer.summarize()
    return scorer.stats


def test_ap_of_made_up_detections_of_the_coco_samples_is_pycocotools_own(coco_samples):
    annotations = COCO(str(coco_samples / "annotations" / "instances_val2017.json"))
    image_ids = sorted(annotations.imgs)
    quality = average_precision(annotations, made_up(annotations), image_ids)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        stats = reference(annotations, made_up(annotations), kind, image_ids)
        for place, key in enumerate(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")):
            assert quality.get(f"{name}_{key}", -100) == pytest.approx(100 * stats[place], abs=1e-4)
    assert 5 < quality["box_ap"] < 95


def test_perfect_detections_score_100_and_none_score_0(coco_samples):
    annotations = COCO(str(coco_samples / "annotations" / "instances_val2017.json"))
    image_ids = sorted(annotations.imgs)
    quality = average_precision(annotations, perfect(annotations), image_ids)
    assert quality["box_ap"] == quality["mask_ap"] == pytest.approx(100)
    assert average_precision(annotations, [], image_ids)["box_ap"] == 0


def test_a_pasted_mask_covers_its_box_and_nothing_else():
    boxes = torch.tensor([[10.0, 20.0, 38.0, 48.0], [-5.0, -5.0, 20.0, 20.0]])
    masks = torch.ones(2, 28, 28)
    masks[0, :, 14:] = 0
    found = paste_masks(masks, boxes, 60, 50)
    assert found.shape == (2, 60, 50)
    inside = torch.zeros(60, 50, dtype=torch.bool)
    inside[20:48, 10:24] = True
    assert torch.equal(found[0], inside)
    assert found[1, :20, :20].all() and not found[1, 20:].any()


def test_rows_are_in_the_originals_pixels_under_the_original_ids():
    detection = Detection(
        torch.tensor([[10.0, 20.0, 30.0, 40.0]]), torch.tensor([0.5]), torch.tensor([2]), torch.ones(1, 28, 28)
    )
    (row,) = coco_rows(detection, 42, (96, 128), (192, 256), (3, 17))
    assert row["bbox"] == [20, 40, 40, 40] and row["category_id"] == 17 and row["image_id"] == 42
    assert row["segmentation"]["size"] == [192, 256]
    json.dumps(row)


def found_by(images, batch):
    """What is annotated, as a perfect detector would give it."""
    found = []
    for place, sample in enumerate(batch.samples):
        height, width = batch.images_u8[place].shape[1:]
        if sample == PADDING:
            found.append(Detection(*(torch.ones(1, 4), torch.ones(1), torch.ones(1).long(), torch.ones(1, 28, 28))))
            continue
        entry, objects = images.entry(sample)
        scale = torch.tensor([width / entry["width"], height / entry["height"]]).repeat(2)
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([images.label_of[each["category_id"]] for each in objects], dtype=torch.int64)
        found.append(Detection(boxes * scale, torch.ones(len(boxes)), labels, torch.ones(len(boxes), 28, 28)))
    return found


def test_a_detector_that_is_not_finite_has_no_score(drawn):
    world = SimpleNamespace(rank=0, size=1, device=CPU, is_main=True, gather_objects=lambda value: [value])
    batches = detection_batches(drawn, PLAIN, world, batch=1, num_workers=0)

    def forward(images_u8):
        nothing = torch.zeros(0)
        return [Detection(nothing.view(0, 4), nothing, nothing.long(), nothing.view(0, 28, 28), is_finite=False)]

    with pytest.raises(UserError, match="not finite on image .*so there is no score"):
        detection_quality(forward, batches, drawn, read_annotations(drawn.annotation_file), world)


@pytest.mark.parametrize(("ranks", "batch"), ((1, 1), (1, 3), (2, 2), (3, 1), (3, 4)))
def test_every_image_counts_once_whatever_the_ranks_and_batches(drawn, ranks, batch):
    annotations, texts, seen, qualities = read_annotations(drawn.annotation_file), [], [], []
    # The last rank first: rank 0 gets the rows of all.
    for rank in reversed(range(ranks)):
        world = SimpleNamespace(
            rank=rank, size=ranks, device=CPU, is_main=rank == 0, gather_objects=lambda value: keep(value)
        )

        def keep(value, rank=rank):
            if isinstance(value, str):
                texts.append(value)
            return list(texts) if isinstance(value, str) else [value]

        batches = list(detection_batches(drawn, PLAIN, world, batch=batch, num_workers=0))
        seen += [sample for each in batches for sample in each.samples if sample != PADDING]
        results = iter([found_by(drawn, each) for each in batches])
        quality, rows = detection_quality(lambda _: next(results), batches, drawn, annotations, world)  # noqa: B023
        qualities.append(quality)
    assert sorted(seen) == list(range(7))
    assert qualities[-1]["images"] == 7 and qualities[-1]["box_ap"] == pytest.approx(100)
    assert len(rows) == len(annotations.dataset["annotations"])


def test_the_image_of_detections_shows_both_sides(drawn):
    rows = perfect(read_annotations(drawn.annotation_file))
    with_rows, without = (detections_image(drawn, each, 3) for each in (rows, []))
    assert with_rows.shape == without.shape == (3, 3 * 320, 2 * 426)
    assert torch.equal(with_rows[..., :426], without[..., :426])
    assert not torch.equal(with_rows[..., 426:], without[..., 426:])


def test_an_annotation_file_that_is_damaged_is_refused(drawn):
    drawn.annotation_file.write_text("{")
    with pytest.raises(UserError, match="annotations.json: cannot be read as COCO annotations"):
        read_annotations(drawn.annotation_file)


def test_an_image_that_cannot_be_read_is_an_error_in_evaluation(drawn):
    shard = next(drawn.folder.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 255
    shard.write_bytes(data)
    world = SimpleNamespace(rank=0, size=1, device=CPU)
    with pytest.raises(UserError, match="AP needs every image of the set"):
        list(detection_batches(ObjectSet(drawn.folder), PLAIN, world, batch=1, num_workers=0))
