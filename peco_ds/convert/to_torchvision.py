"""Release a detector: weights, numbers, and a module of torch and torchvision that builds the network from them."""

from __future__ import annotations

from pathlib import Path

from peco_ds.convert import torchvision_detector
from peco_ds.convert.release import CONFIG, WEIGHTS, Release, licence_of
from peco_ds.models.detector_weights import DetectorWeights

MODULE = "detector.py"
# Marks our config.json, which no library reads.
LAYOUT = "torchvision_detection"


def detector_release(weights: DetectorWeights) -> Release:
    return Release(
        "torchvision",
        {WEIGHTS: weights.tensors},
        {CONFIG: detector_config(weights)},
        _USAGE,
        texts={MODULE: Path(torchvision_detector.__file__).read_text(encoding="utf-8")},
    )


def detector_config(weights: DetectorWeights) -> dict:
    """The numbers that `torchvision_detector.Detector` is built from, and the categories in label order."""
    model, detector = weights.model, weights.detector
    return {
        "layout": LAYOUT,
        "backbone": {
            "patch_px": model.patch_px,
            "width": model.width,
            "depth": model.depth,
            "heads": model.heads,
            "hidden": int(model.width * model.mlp_ratio),
            "table_grid": model.grid,
            "taps": list(detector.taps),
            "window": detector.window,
            "global_blocks": list(detector.global_blocks) if detector.window else [],
            "layer_scale": bool(model.layer_scale),
            "absolute_positions": "backbone.pos_embed" in weights.tensors,
        },
        "pyramid": {"kind": detector.pyramid, "channels": detector.channels, "branch_norm": detector.branch_norm},
        "heads": {
            "norm": detector.head_norm,
            "rpn_convs": detector.rpn_convs,
            "box_convs": detector.box_convs,
            "box_layers": detector.box_layers,
            "box_width": detector.box_width,
            "mask_convs": detector.mask_convs,
            "detections": detector.detections,
        },
        "image_mean": list(weights.mean),
        "image_std": list(weights.std),
        "short_px": weights.short_px,
        "long_px": weights.long_px,
        "square_px": weights.square_px,
        "categories": [
            {"id": number, "name": name} for number, name in zip(weights.category_ids, weights.classes, strict=True)
        ],
    }


_USAGE = f"""`{MODULE}` needs torch, torchvision and safetensors:

```python
import sys

from torchvision.io import read_image

sys.path.insert(0, "PATH_OF_THIS_FOLDER")
from detector import load

model = load("PATH_OF_THIS_FOLDER")
found = model([read_image("image.jpg")])[0]
for box, label, score in zip(found["boxes"], found["labels"], found["scores"]):
    print(model.categories[label - 1]["name"], float(score), box.tolist())
masks = found["masks"] >= 0.5    # [N, 1, H, W]
```"""


def detector_card(release: Release, weights: DetectorWeights) -> str:
    """Markdown with the front matter that model hubs read."""
    model, detector = weights.model, weights.detector
    attention = f"windows of {detector.window} patches" if detector.window else "attention over the whole image"
    facts = {
        "weights": weights.source,
        "backbone": f"ViT, width {model.width}, depth {model.depth}, {model.heads} heads, patch {model.patch_px}, "
        + attention,
        "maps": f"{detector.pyramid}, {detector.channels} channels, of blocks "
        f"{', '.join(str(tap + 1) for tap in detector.taps)}, counted from 1",
        "categories": f"{len(weights.classes)}, with their ids in {CONFIG}",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in (facts | weights.facts).items())
    return f"""---
library_name: {release.library}
tags:
- object-detection
- image-segmentation
- {release.library}
license: other
---
# {weights.facts.get("recipe", weights.source)}

Object detection with masks: Mask R-CNN (arXiv 1703.06870) on a vision transformer of the BEiT family (arXiv
2106.08254).

| | |
|---|---|
{table}

{release.usage}

Input: short side {weights.short_px} px, long side at most {weights.long_px} px, RGB, mean {list(weights.mean)},
standard deviation {list(weights.std)}; `{MODULE}` resizes and normalises.

{licence_of(weights.facts)}
"""
