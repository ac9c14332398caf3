"""Packed sets of drawn objects (`benchmarks/drawing.py`) for tests, and a detector that is small enough for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.drawing import draw_objects
from peco_ds import pack_images


def pack(images: Path, annotations: Path, out: Path, *extra: str) -> Path:
    pack_images.main(
        [
            *("--images", str(images), "--labels", "instances", "--annotations", str(annotations)),
            *("--out", str(out), "--workers", "1", "--samples_per_shard", "10", *extra),
        ]
    )
    return out


SMALL_DETECTOR = (
    "data.images=images/train data.val_images=images/val data.num_workers=0 data.shuffle_window_shards=2 "
    "model.image_px=128 model.width=48 model.depth=4 model.heads=3 model.drop_path=0 model.init_std=0.1 "
    "model.layer_scale=1 detector.taps=[0,1,2,3] detector.channels=32 detector.box_width=64 detector.rois=64 "
    "detector.mask_convs=1 detector.layer_decay=0.8 augment.short_px=96 augment.long_px=128 run.precision=fp32 "
    "run.global_batch=4 run.micro_batch=2 run.log_every_steps=1 evaluation.every_epochs=0 evaluation.grid_images=2 "
    "optim.lr=1e-3 optim.clip_norm=1 schedule.epochs=null schedule.steps=4 schedule.warmup_steps=2 "
    "checkpoint.every_epochs=null"
).split()


@dataclass(frozen=True)
class DrawnSets:
    """A data root with images/train (half of it without objects) and images/val, and overrides of detect_vitb16."""

    root: Path
    val_images: int
    overrides: list[str]


def make_drawn_sets(root: Path) -> DrawnSets:
    """In an empty folder. 7 to measure on: no number of ranks divides them."""
    # Of one shape: where images are filled up, an untrained network's scores are equal but for rounding, and what is
    # proposed there would differ between ranks.
    train = draw_objects(root, "train", 16, seed=0, empty=tuple(range(0, 16, 2)), shapes=((96, 128),))
    val = draw_objects(root, "val", 7, seed=1, empty=(2,))
    pack(root / "train", train, root / "images" / "train")
    pack(root / "val", val, root / "images" / "val")
    return DrawnSets(root, 7, [f"data.root={root}", *SMALL_DETECTOR])


def draw_like_coco(root: Path) -> Path:
    """Drawn images under the names, the 80 categories and the two crowds of the COCO samples."""
    (root / "annotations").mkdir()
    ids = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    for seed, (split, count) in enumerate((("train2017", 5), ("val2017", 9))):
        path = draw_objects(root, split, count, seed=seed)
        raw = json.loads(path.read_text())
        raw["categories"] = [{"id": number, "name": f"class {number}"} for number in ids]
        for place, annotation in enumerate(raw["annotations"]):
            crowd = split == "val2017" and place < 2
            size = next([i["height"], i["width"]] for i in raw["images"] if i["id"] == annotation["image_id"])
            runs = {"size": size, "counts": [100, 300, size[0] * size[1] - 400]}
            annotation |= {"iscrowd": 1, "segmentation": runs} if crowd else {}
        path.unlink()
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(raw))
    return root
