"""A tokenizer of two ViTs around a codebook, as settings and plans see it; the network is models/vqvit_tokenizer.py.

Source: PeCo (arXiv 2111.12710), Table 12, the row whose encoder and decoder are ViT-B. The transformers are those of
    BEiT v2 (arXiv 2208.06366).
"""

from __future__ import annotations

from peco_ds.config import TokenizerSettings
from peco_ds.costs import IMAGE_CHANNELS, TokenizerCost
from peco_ds.kinds import vqkd
from peco_ds.registry import TokenizerKind, later


def patch_values(settings: TokenizerSettings) -> int:
    """Numbers of a patch of the image, which the decoder gives for every code."""
    return IMAGE_CHANNELS * settings.vit.patch_px**2


def _cost(settings: TokenizerSettings, image_px: int) -> TokenizerCost:
    return vqkd.transformers_cost(settings, image_px, out_width=patch_values(settings))


KIND = TokenizerKind(
    network=later("peco_ds.models.vqvit_tokenizer:VqvitTokenizer"),
    stride_px=lambda settings: settings.vit.patch_px,
    only_px=lambda settings: settings.vit.image_px,
    check=vqkd.check,
    tensors=lambda settings: settings.vit.depth + settings.vit.decoder_depth,
    cost=_cost,
)
