"""The segmentation model: backbone, four branches, UperNet, and in training the auxiliary head."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from peco_ds.config import ModelSettings, SegmenterSettings
from peco_ds.models.dense_backbone import DenseBackbone, build_dense_backbone
from peco_ds.models.pyramids import FourBranches
from peco_ds.models.sync_norm import AllReduce, SyncBatchNorm, on_one_rank
from peco_ds.models.uper_head import FcnHead, UperHead
from peco_ds.models.vit import ActivationCheckpointing


class SegmenterOutput(NamedTuple):
    logits: torch.Tensor  # float32 [B, C, 4 h, 4 w] for h x w patches
    # float32 [B, C, h, w] of the auxiliary head; None in eval mode, or where there is none.
    auxiliary: torch.Tensor | None = None


class Segmenter(nn.Module):
    """images_norm [B, 3, H, W], sides of whole patches and at most the tables' -> SegmenterOutput."""

    def __init__(
        self, backbone: DenseBackbone, pyramid: FourBranches, decode_head: UperHead, auxiliary_head: FcnHead | None
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.decode_head = backbone, pyramid, decode_head
        self.auxiliary_head = auxiliary_head

    def forward(self, images_norm: torch.Tensor) -> SegmenterOutput:
        maps = self.pyramid(self.backbone(images_norm))
        if self.auxiliary_head is None or not self.training:
            return SegmenterOutput(self.decode_head(maps))
        return SegmenterOutput(self.decode_head(maps), self.auxiliary_head(maps[2]))


def build_segmenter(
    model: ModelSettings,
    settings: SegmenterSettings,
    num_classes: int,
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
    all_reduce: AllReduce = on_one_rank,
) -> Segmenter:
    """A freshly initialised segmenter for crops of model.image_px.

    Args:
        activation_checkpointing: of each block in the backward pass.
        all_reduce: for the batch norms' statistics over ranks.
    Source: BEiT (arXiv 2106.08254), released `semantic_segmentation` configs.
    """
    norm, width = partial(SyncBatchNorm, all_reduce=all_reduce), model.width
    head = (num_classes, settings.dropout, norm)
    return Segmenter(
        build_dense_backbone(model, settings.taps, activation_checkpointing=activation_checkpointing),
        FourBranches(width, norm),
        UperHead(width, settings.head_width or width, *head),
        FcnHead(width, settings.auxiliary_width, *head) if settings.auxiliary_weight else None,
    )
