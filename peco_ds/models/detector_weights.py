"""The canonical form of a detector's weights: the names of `Detector`, and what no tensor tells."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from peco_ds.config import DetectorSettings, ModelSettings
from peco_ds.models.mask_rcnn import Detector, build_detector
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class DetectorWeights:
    """Tensors under the names of `Detector.state_dict()`."""

    model: ModelSettings
    detector: DetectorSettings
    tensors: dict[str, torch.Tensor]
    # One line for logs and cards: run, with a step.
    source: str
    # Name and id of each category, in label order.
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    # Images are resized to this short side, or to this long one where that is less; then filled up to this square. 0:
    # to the largest of a batch.
    short_px: int
    long_px: int
    square_px: int = 0
    # Statistics of images in [0, 1] that the model expects.
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    # For the model card: name -> text.
    facts: dict = field(default_factory=dict)


def detector_of(weights: DetectorWeights) -> Detector:
    """The network in eval mode, float32."""
    model = build_detector(
        weights.model,
        weights.detector,
        len(weights.classes),
        square_px=weights.square_px,
        mean=weights.mean,
        std=weights.std,
    )
    model.load_state_dict(weights.tensors)
    return model.eval()
