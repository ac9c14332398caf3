"""VQGAN with a Gumbel-softmax choice of codes, as settings and plans see it; the network is models/gumbel_tokenizer.py.

Source of the sizes: VQGAN (arXiv 2012.09841), the released f8.
"""

from __future__ import annotations

from dataclasses import replace

from peco_ds.config import TokenizerSettings
from peco_ds.costs import Cost, TokenizerCost
from peco_ds.kinds.vqgan import RELEASE, decoder_cost, encoder_cost, num_blocks
from peco_ds.registry import TokenizerKind, later


def _cost(settings: TokenizerSettings, image_px: int) -> TokenizerCost:
    """Cost of the network; the layer of logits counts as the search."""
    codes = (image_px // settings.stride_px) ** 2
    logits = Cost((settings.code_dim + 1) * settings.num_codes, 0, settings.code_dim * codes, tensors=2)
    return TokenizerCost(
        encoder_cost(settings, image_px) + logits,
        decoder_cost(settings, image_px),
        codebook_elements=0,
        search_macs=codes * settings.code_dim * settings.num_codes,
    )


KIND = TokenizerKind(
    network=later("peco_ds.models.gumbel_tokenizer:GumbelTokenizer"),
    learns_from=None,
    tensors=num_blocks,
    cost=_cost,
    release=replace(
        RELEASE,
        signs=("quantize.proj.weight", "quantize.embed.weight"),
        read=later("peco_ds.models.taming_layout:read_gumbel"),
        planned=TokenizerSettings(kind="gumbel", channel_mults=(1, 1, 2, 4)),
    ),
)
