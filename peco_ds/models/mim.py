"""Backbone + mask token + token head: pictures with hidden patches -> logits over the codebook at the hidden patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peco_ds.config import ModelSettings
from peco_ds.models.vit import build_backbone, trunc_normal


class MimOutput(NamedTuple):
    logits: torch.Tensor  # [B, M, V] at the hidden patches, in the order of `masked`
    features: torch.Tensor  # [B, 1 + N, D] after the final norm, class token first


class MaskedImageModel(nn.Module):
    """BEiT's pre-training model.

    Args:
        settings: size of the backbone.  num_codes: V.  checkpoint_blocks: recompute each block in the backward pass.
    Source: BEiT (arXiv 2106.08254), released `modeling_pretrain.py`.
    """

    def __init__(self, settings: ModelSettings, num_codes: int, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.backbone = build_backbone(settings)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.width))
        self.lm_head = nn.Linear(settings.width, num_codes)
        self.checkpoint_blocks = checkpoint_blocks
        trunc_normal(self.mask_token, settings.init_std)
        trunc_normal(self.lm_head.weight, settings.init_std)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images_norm: torch.Tensor, masked: torch.Tensor) -> MimOutput:
        """
        Args:
            images_norm: [B, 3, S, S], ImageNet statistics; cast to the parameters' dtype here.
            masked: int64 [B, M], hidden patches of each picture; the same count M for all, so that shapes are static and no
                boolean index makes the host wait for the device.
        """
        features = self.features(images_norm, masked)
        index = (masked + 1).unsqueeze(-1).expand(-1, -1, features.shape[-1])  # + 1: the class token comes first
        return MimOutput(self.lm_head(features.gather(1, index)), features)

    def features(self, images_norm: torch.Tensor, masked: torch.Tensor | None = None) -> torch.Tensor:
        """[B, 1 + N, D] after the final norm, with the patches of `masked` (none if None) hidden from the encoder."""
        backbone = self.backbone
        x = backbone.patch_embed(images_norm.to(self.mask_token.dtype))
        if masked is not None:
            hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, masked, True)
            x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([backbone.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        bias = backbone.rel_pos_bias()
        for block in backbone.blocks:
            if self.checkpoint_blocks and self.training:
                # Non-reentrant: the recomputed forward takes the same kernels as the first, so no loss changes.
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, shared_rel_pos_bias=bias)
        return backbone.norm(x)
