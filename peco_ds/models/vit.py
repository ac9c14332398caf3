"""The backbone: timm's `Beit` with one relative position bias shared by all blocks, BEiT's initialisation.

Everything below the mask token is timm's own code, so a release for timm is a change of names. Sizes: B 768 x 12 x 12 heads, L 1024 x 24 x 16,
H 1280 x 32 x 16 with patch 14.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from timm.models.beit import Beit, Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from peco_ds.config import ModelSettings

TransformerBlock = Block  # the unit that ZeRO-3 gathers at once


def build_backbone(settings: ModelSettings) -> Beit:
    """A `Beit` without head that ends in its final norm: [B, 3, S, S] -> [B, 1 + N, D].

    Source: BEiT (arXiv 2106.08254) and its released `modeling_pretrain.py`: shared bias table, no absolute position embedding,
        q and v bias but no key bias, layer scale, LayerNorm eps 1e-6.
    """
    backbone = Beit(**timm_arguments(settings))
    init_as_beit(backbone, settings.init_std)
    return backbone


def timm_arguments(settings: ModelSettings, *, shared_bias: bool = True, num_classes: int = 0, pooling: str = "class") -> dict:
    """Keyword arguments that make timm's `Beit` this backbone.

    Args:
        shared_bias: one table for all blocks (pre-training) or one a block (fine-tuning, releases).
        pooling: "class" keeps the final norm on every token; "mean" moves it behind the pooling, as `fc_norm`.
    """
    return dict(
        img_size=settings.image_px,
        patch_size=settings.patch_px,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=settings.mlp_ratio,
        init_values=settings.layer_scale,
        drop_path_rate=settings.drop_path,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=shared_bias,
        use_rel_pos_bias=not shared_bias,
        num_classes=num_classes,
        global_pool="avg" if pooling == "mean" else "token",
    )


@torch.no_grad()
def init_as_beit(backbone: Beit, std: float) -> None:
    """Truncated normal cut at one standard deviation, then attention output and second MLP weights of block i (from 1) over sqrt(2 i).

    Must run on whole parameters, so before ZeRO-3 partitions them: under `zero.Init` the in-place division is lost without a word.
    Source: released BEiT `modeling_pretrain.py` (`trunc_normal_` with a = -std, b = std; `fix_init_weight`).
    """
    init_projections(backbone, std)
    trunc_normal(backbone.cls_token, std)
    scale_by_depth(backbone.blocks)


@torch.no_grad()
def init_projections(module: nn.Module, std: float) -> None:
    """Weights of every linear layer and convolution inside: truncated normal; biases: zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            trunc_normal(part.weight, std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@torch.no_grad()
def scale_by_depth(blocks: Iterable[Block], first: int = 1) -> None:
    """Attention output and second MLP weights of block i over sqrt(2 i); `first` is the i of the first one."""
    for number, block in enumerate(blocks, start=first):
        block.attn.proj.weight.div_(math.sqrt(2.0 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))


def trunc_normal(tensor: torch.Tensor, std: float) -> None:
    """Normal(0, std) cut at +-std: its own standard deviation is 0.54 of `std`."""
    nn.init.trunc_normal_(tensor, std=std, a=-std, b=std)


def run_blocks(blocks: Iterable[Block], x: torch.Tensor, bias: torch.Tensor, *, recompute: bool) -> torch.Tensor:
    """Tokens [B, T, D] through blocks that share a relative position bias.

    Args:
        bias: [H, T, T], or one a picture [B, H, T, T].  recompute: keep a block's input alone and run it again in the backward pass.
    """
    for block in blocks:
        # Non-reentrant: the recomputed forward takes the same kernels as the first, so no loss changes.
        x = checkpoint(block, x, bias, use_reentrant=False) if recompute else block(x, shared_rel_pos_bias=bias)
    return x
