"""The canonical form of a segmenter's weights: the names of `Segmenter`, and what no tensor tells."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from peco_ds.config import ModelSettings, SegmentationSettings, SegmenterSettings
from peco_ds.models.segmenter import Segmenter, build_segmenter
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class SegmenterWeights:
    """Tensors under the names of `Segmenter.state_dict()`, in the dtype they are stored in."""

    model: ModelSettings
    segmenter: SegmenterSettings
    tensors: dict[str, torch.Tensor]
    # One line for logs and cards: file or run, with a hash or a step.
    source: str
    # Class names in label order, where they are known.
    classes: tuple[str, ...] | None = None
    # Statistics of images in [0, 1] that the model expects.
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    # For the model card: name -> text.
    facts: dict = field(default_factory=dict)
    # How the run measured it; None: no run tells.
    evaluation: SegmentationSettings | None = None
    # As that of `BeitWeights`, in what a dry run says.
    kind = "segmenter"

    @property
    def num_classes(self) -> int:
        return len(self.tensors["decode_head.conv_seg.weight"])


def segmenter_of(weights: SegmenterWeights) -> Segmenter:
    """The network in eval mode, float32."""
    model = build_segmenter(weights.model, weights.segmenter, weights.num_classes)
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.tensors.items()}
    )
    return model.eval()
