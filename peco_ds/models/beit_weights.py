"""The canonical form of a BEiT-family model's weights, whatever file they came from and whatever layout they go to.

Names are those of the released BEiT code, which timm kept: `cls_token`, `patch_embed.proj.*`, `blocks.N.*`; then, by
kind,

mim         `mask_token`, `rel_pos_bias.relative_position_bias_table` (one for all blocks), `norm.*`, `lm_head.*`
features    `norm.*`, or `fc_norm.*` of a mean-pooled backbone, and a table in every block
            (`blocks.N.attn.relative_position_bias_table`) or one for all
classifier  a table in every block, `fc_norm.*` (mean pooling) or `norm.*` (class token), `head.*`

and `pos_embed` [1, 1 + N, D] of a backbone with absolute positions. One without relative bias or layer scale has tables
of zeros and scales of ones in their place, with which it computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from peco_ds.config import ModelSettings
from peco_ds.schema import IMAGENET_MEAN, IMAGENET_STD

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
TABLE = "blocks.{}.attn.relative_position_bias_table"
PLACES = "pos_embed"
# Names among `facts`.
TOKENIZER_LICENCE, JUDGE_LICENCE = "tokenizer's licence", "judge's licence"


def default_crop(image_px: int) -> float:
    """Share of the resized image's side that BEiT's evaluation sees: all of it from 384 px on."""
    return 1.0 if image_px >= 384 else 0.875


@dataclass(frozen=True)
class BeitWeights:
    """Tensors under the names above, in the dtype they are stored in, and what no tensor tells."""

    kind: Literal["mim", "features", "classifier"]
    model: ModelSettings
    tensors: dict[str, torch.Tensor]
    # One line for logs and cards: file or run, with a hash or a step.
    source: str
    # Class names in label order, where they are known.
    classes: tuple[str, ...] | None = None
    # Statistics of images in [0, 1] that the model expects.
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    # Share of the resized image's side that is seen in evaluation.
    crop: float = 0.875
    # For the model card: name -> text.
    facts: dict = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.tensors["head.weight"]) if "head.weight" in self.tensors else 0

    @property
    def num_codes(self) -> int:
        return len(self.tensors["lm_head.weight"]) if "lm_head.weight" in self.tensors else 0

    @property
    def pooling(self) -> Literal["mean", "class"]:
        return "mean" if "fc_norm.weight" in self.tensors else "class"
