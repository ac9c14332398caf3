"""Frozen ViTs that judge or teach, as plans see them; read by models/vit_feature_nets.py."""

from __future__ import annotations

import re

from peco_ds.costs import FP32_BYTES, IMAGE_CHANNELS, Blocks, FrozenCost, FrozenStage
from peco_ds.registry import FeatureNetFamily, later

_SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def _cost(weights: str, architecture: str, image_px: int) -> FrozenCost:
    """The cost of the ViT that timm's name says.

    A file's own sizes are not read, so without a name it is ViT-B/16, that of MoCo v3, DINO and CLIP which the recipes
    name.
    """
    found = re.search(r"(tiny|small|base|large|huge)_patch(\d+)", architecture)
    size, patch_px, image_px = found[1] if found else "base", int(found[2]) if found else 16, image_px or 224
    width, depth, heads = _SIZES[size]
    tokens = (image_px // patch_px) ** 2 + 1
    block = FrozenStage(
        Blocks(1, tokens, width, 4 * width, heads),
        # Query, key, value and attention's output; the input of GELU.
        saved=tokens * (4 * width + 4 * width),
        # Only one layer runs at a time.
        working=tokens * 2 * 4 * width,
        features=(tokens - 1) * width,
        # Inputs of both norms.
        saved_bytes=tokens * 2 * width * FP32_BYTES,
    )
    return FrozenCost(
        f"ViT-{size[0].upper()}/{patch_px}" + ("" if found else " (assumed: no architecture is named)"),
        depth * (12 * width**2 + 13 * width) + (IMAGE_CHANNELS * patch_px**2 + 1 + 1 + tokens + 2) * width,
        image_px,
        IMAGE_CHANNELS * image_px**2 * width,
        (block,) * depth,
    )


FAMILY = FeatureNetFamily(
    recognises=lambda weights, architecture: True,
    load=later("peco_ds.models.vit_feature_nets:load_vit"),
    cost=_cost,
)
