"""Masked image models: images with masked patches -> logits over the codebook at the masked patches.

MaskedImageModel       BEiT: backbone, mask token, token head; the encoder sees a mask token at each masked place
AggregatingImageModel  BEiT v2: a second branch beside it, which makes the class token carry what the image shows
VisibleImageModel      MAE's asymmetry: the encoder sees only the visible patches, a small decoder fills in the rest

A release holds `backbone.*`, and `mask_token` and `lm_head.*` where they work on the backbone's own tokens; the other
parts only serve pre-training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from peco_ds.config import AggregationSettings, EncodingSettings, ModelSettings
from peco_ds.models.masked_decoder import MaskedDecoder, bias_at, tokens_at, visible_first
from peco_ds.models.vit import (
    ActivationCheckpointing,
    TransformerBlock,
    build_backbone,
    patches_of,
    run_blocks,
    scale_by_depth,
    trunc_normal,
    with_class_token,
)


class MimOutput(NamedTuple):
    logits: torch.Tensor  # [B, M, V] at the masked patches, in the order of `masked`
    # [B, 1 + N, D] after the norm before the token head, class token first.
    features: torch.Tensor
    aggregated_logits: torch.Tensor | None = None  # [B, M, V] of a second branch


def build_mim(
    model: ModelSettings,
    encoding: EncodingSettings,
    aggregation: AggregationSettings,
    num_codes: int,
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> MaskedImageModel | VisibleImageModel:
    """The model that a recipe asks for: `forward(images_norm, masked) -> MimOutput`, `features(images_norm) -> [B, 1 +
    N, D]`.

    Args:
        num_codes: V.
        activation_checkpointing: the part of each transformer block that the backward pass computes again.
    """
    if encoding.kind == "visible":
        return VisibleImageModel(model, encoding, num_codes, activation_checkpointing=activation_checkpointing)
    if aggregation.early_block:
        return AggregatingImageModel(model, aggregation, num_codes, activation_checkpointing=activation_checkpointing)
    return MaskedImageModel(model, num_codes, activation_checkpointing=activation_checkpointing)


class MaskedImageModel(nn.Module):
    """BEiT's pre-training model.

    Args:
        settings: size of the backbone.  num_codes: V.  activation_checkpointing: see `build_mim`.
    Source: BEiT (arXiv 2106.08254), released `modeling_pretrain.py`.
    """

    def __init__(
        self, settings: ModelSettings, num_codes: int, *, activation_checkpointing: ActivationCheckpointing = "none"
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(settings, activation_checkpointing=activation_checkpointing)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.width))
        self.lm_head = nn.Linear(settings.width, num_codes)
        trunc_normal(self.mask_token, settings.init_std)
        trunc_normal(self.lm_head.weight, settings.init_std)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images_norm: torch.Tensor, masked: torch.Tensor) -> MimOutput:
        """
        Args:
            images_norm: [B, 3, S, S], ImageNet statistics; cast to the parameters' dtype here.
            masked: int64 [B, M], masked patches of each image; the same count M for all, so that shapes are static
                and no boolean index makes the host wait for the device. An image with fewer repeats one of its own.
        """
        features = self.features(images_norm, masked)
        return MimOutput(self.lm_head(tokens_at(features, masked)), features)

    def features(self, images_norm: torch.Tensor, masked: torch.Tensor | None = None) -> torch.Tensor:
        """[B, 1 + N, D] after the final norm, with the patches of `masked` (none if None) masked."""
        tokens = self._embed(images_norm, masked)
        return self.backbone.norm(run_blocks(self.backbone.blocks, tokens, self.backbone.rel_pos_bias()))

    def _embed(self, images_norm: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
        """[B, 1 + N, D]: class token and patches, the masked ones replaced by the mask token."""
        patches = patches_of(self.backbone, images_norm)
        if masked is not None:
            is_masked = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device).scatter_(
                1, masked, True
            )
            patches = torch.where(is_masked.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        return with_class_token(self.backbone, patches)


class AggregatingImageModel(MaskedImageModel):
    """BEiT v2's pre-training model: final class token and early patch tokens go through extra blocks and the same norm
    and token head.

    The early patch tokens lack what the late blocks add, so the branch predicts well only if the class token carries
    it.

    Source: BEiT v2 (arXiv 2208.06366), section 2.3; released `beit2/modeling_pretrain.py`. As there, an extra block has
        the stochastic depth and the depth-scaled projections of the backbone's block in its place, but its other
        weights keep PyTorch's initial values: the class sets its blocks up after BEiT's initialisation has run.
    """

    def __init__(
        self,
        settings: ModelSettings,
        aggregation: AggregationSettings,
        num_codes: int,
        *,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__(settings, num_codes, activation_checkpointing=activation_checkpointing)
        first, self.early_block = aggregation.early_block, aggregation.early_block
        last_place = max(settings.depth, first + aggregation.blocks) - 1
        self.aggregation_blocks = nn.ModuleList(
            TransformerBlock(
                settings.width,
                settings.heads,
                mlp_ratio=settings.mlp_ratio,
                layer_scale=settings.layer_scale,
                drop_path=settings.drop_path * place / last_place,
                drop_path_by=settings.drop_path_by,
                activation_checkpointing=activation_checkpointing,
                attention=settings.attention,
                fold_layer_scale=settings.fold_layer_scale,
            )
            for place in range(first, first + aggregation.blocks)
        )
        scale_by_depth(self.aggregation_blocks, first + 1)

    def forward(self, images_norm: torch.Tensor, masked: torch.Tensor) -> MimOutput:
        """As `MaskedImageModel.forward`, with the second branch's logits."""
        backbone, bias = self.backbone, self.backbone.rel_pos_bias()
        blocks = list(backbone.blocks)
        early = run_blocks(blocks[: self.early_block], self._embed(images_norm, masked), bias)
        late = run_blocks(blocks[self.early_block :], early, bias)
        second = run_blocks(self.aggregation_blocks, torch.cat([late[:, :1], early[:, 1:]], dim=1), bias)
        features = backbone.norm(late)
        picked = torch.cat([tokens_at(features, masked), backbone.norm(tokens_at(second, masked))])
        logits, aggregated_logits = self.lm_head(picked).chunk(2)
        return MimOutput(logits, features, aggregated_logits)


class VisibleImageModel(nn.Module):
    """The encoder sees only the class token and the visible patches, which saves compute; a decoder predicts the codes
    of the masked patches.

    PeCo's text discusses MAE's asymmetry and does not say that its ViT-H was trained so: this is our reading of an open
    question. The encoder is the BEiT backbone with its relative position bias at the visible places; it has no other
    information about positions.

    Source: MAE (arXiv 2111.06377), section 3, with codes as targets.
    """

    def __init__(
        self,
        settings: ModelSettings,
        encoding: EncodingSettings,
        num_codes: int,
        *,
        activation_checkpointing: ActivationCheckpointing = "none",
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(settings, activation_checkpointing=activation_checkpointing)
        self.decoder = MaskedDecoder(settings, encoding, num_codes, activation_checkpointing=activation_checkpointing)

    def forward(self, images_norm: torch.Tensor, masked: torch.Tensor) -> MimOutput:
        """
        Args:
            images_norm: [B, 3, S, S], ImageNet statistics; cast to the parameters' dtype here.
            masked: int64 [B, M], M different masked patches of each image.
        Returns: logits and features of the decoder; D is its width.
        """
        backbone = self.backbone
        patches = patches_of(backbone, images_norm)
        order = visible_first(masked, patches.shape[1])
        places = order[:, : patches.shape[1] - masked.shape[1]]
        visible = patches.gather(1, places.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        bias = bias_at(backbone.rel_pos_bias().to(visible.dtype), places)
        encoded = backbone.norm(run_blocks(backbone.blocks, with_class_token(backbone, visible), bias))
        return MimOutput(*self.decoder(encoded, order, masked))

    def features(self, images_norm: torch.Tensor) -> torch.Tensor:
        """[B, 1 + N, D] of the whole image after the backbone's final norm."""
        backbone = self.backbone
        tokens = with_class_token(backbone, patches_of(backbone, images_norm))
        return backbone.norm(run_blocks(backbone.blocks, tokens, backbone.rel_pos_bias()))
