"""The small decoder for an encoder that sees only visible patches, and the selection of masked and visible places.

Selections are gathers of places that differ within an image, and products with one-hot rows: no gradients are added in
an order that the device picks, so a run that was stopped continues bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import nn

from peco_ds.config import EncodingSettings, ModelSettings
from peco_ds.models.attention import ALIGNMENT
from peco_ds.models.vit import (
    ActivationCheckpointing,
    PositionBias,
    TransformerBlock,
    init_projections,
    run_blocks,
    scale_by_depth,
    trunc_normal,
)


class MaskedDecoder(nn.Module):
    """Linear to its own width, a mask token at each masked place, blocks with a relative position bias of their own,
    norm, token head.

    Source: MAE (arXiv 2111.06377), section 3 and released `models_mae.py` for width, depth, heads and the place of the
        mask token. Blocks are the backbone's but have neither layer scale nor stochastic depth, as MAE's; positions are
        relative, as the backbone's; initial values are BEiT's.
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
        width, heads = encoding.decoder_width, encoding.decoder_heads
        self.embed = nn.Linear(settings.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.rel_pos_bias = PositionBias((settings.grid, settings.grid), heads)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width,
                heads,
                mlp_ratio=settings.mlp_ratio,
                activation_checkpointing=activation_checkpointing,
                attention=settings.attention,
            )
            for _ in range(encoding.decoder_depth)
        )
        self.norm = LayerNorm(width, eps=1e-6)
        self.lm_head = nn.Linear(width, num_codes)
        init_projections(self, settings.init_std)
        trunc_normal(self.mask_token, settings.init_std)
        scale_by_depth(self.blocks)

    def forward(
        self, encoded: torch.Tensor, order: torch.Tensor, masked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            encoded: [B, 1 + n, D] of class token and visible patches.
            order: `visible_first`.
            masked: int64 [B, M], n + M = N.
        Returns: logits [B, M, V] at `masked`, and the tokens [B, 1 + N, decoder width] after the norm.
        """
        x = self.embed(encoded)
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), masked.shape[1], -1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
        back = order.argsort(dim=1).unsqueeze(-1).expand_as(patches)
        tokens = torch.cat([x[:, :1], patches.gather(1, back)], dim=1)
        features = self.norm(run_blocks(self.blocks, tokens, self.rel_pos_bias()))
        return self.lm_head(tokens_at(features, masked)), features


def tokens_at(tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """[B, M, D]: tokens [B, 1 + N, D], class token first, at the patch numbers int64 [B, M]."""
    return tokens.gather(1, (patches + 1).unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def visible_first(masked: torch.Tensor, num_patches: int) -> torch.Tensor:
    """int64 [B, N]: the visible patches of each image, then the masked ones of `masked` [B, M], each increasing."""
    is_masked = torch.zeros(len(masked), num_patches, dtype=torch.uint8, device=masked.device).scatter_(1, masked, 1)
    return is_masked.argsort(dim=1, stable=True)


def bias_at(bias: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """The bias between class token and some patches: [H, 1 + N, 1 + N] at int64 [B, n] -> [B, H, 1 + n, 1 + n]."""
    heads, tokens, _ = bias.shape
    # The class token comes first.
    places = F.pad(patches + 1, (1, 0))
    one_hot = (places.unsqueeze(-1) == torch.arange(tokens, device=places.device)).to(bias.dtype)
    rows = one_hot.flatten(0, 1) @ bias.transpose(0, 1).flatten(1)  # [B (1 + n), H (1 + N)]
    both = rows.view(len(places), -1, tokens) @ one_hot.transpose(1, 2)
    picked = both.view(len(places), places.shape[1], heads, places.shape[1]).transpose(1, 2)
    # A GPU's kernel wants rows that start at multiples of its alignment. Otherwise every layer would make, and keep, an
    # aligned copy of its own.
    return (
        F.pad(picked, (0, -picked.shape[-1] % ALIGNMENT))[..., : picked.shape[-1]]
        if picked.is_cuda
        else picked.contiguous()
    )
