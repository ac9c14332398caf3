"""DALL-E's discrete VAE, as settings and plans see it; the network is models/dalle_tokenizer.py.

Source of the sizes: DALL-E (arXiv 2102.12092).
"""

from __future__ import annotations

from dataclasses import replace

from peco_ds.config import TokenizerSettings
from peco_ds.costs import IMAGE_CHANNELS, Cost, TokenizerCost, conv
from peco_ds.kinds.vqgan import num_blocks
from peco_ds.registry import Release, TokenizerKind, later


def _cost(settings: TokenizerSettings, image_px: int) -> TokenizerCost:
    """Cost of the encoder: blocks of four convolutions at a quarter of the width, and pooling between two groups.

    The layer of logits is the search. The decoder, which nothing here trains or runs at scale, is left out.
    """
    width, size = settings.channels, image_px
    cost = conv(IMAGE_CHANNELS, width, 7, size)
    for level, mult in enumerate(settings.channel_mults):
        out = settings.channels * mult
        for _ in range(settings.blocks_per_level):
            hidden = out // 4
            cost += conv(width, hidden, 3, size) + conv(hidden, hidden, 3, size).times(2) + conv(hidden, out, 1, size)
            # The shortcut runs beside these convolutions, so it does not count as a further layer.
            cost += replace(conv(width, out, 1, size), convolutions=0) if width != out else Cost()
            width = out
        size //= 1 if level == len(settings.channel_mults) - 1 else 2
    logits = Cost((width + 1) * settings.num_codes, 0, width * size**2, tensors=2)
    grid = image_px // settings.stride_px
    return TokenizerCost(cost + logits, Cost(), codebook_elements=0, search_macs=grid**2 * width * settings.num_codes)


KIND = TokenizerKind(
    network=later("peco_ds.models.dalle_tokenizer:DalleTokenizer"),
    learns_from=None,
    decoder_optional=True,
    tensors=num_blocks,
    cost=_cost,
    release=Release(
        signs=("blocks.input.w", "blocks.output.conv.w"),
        files="DALL-E's encoder.pkl",
        read=later("peco_ds.models.dalle_tokenizer:read_dvae"),
        join=later("peco_ds.models.dalle_tokenizer:both_sides"),
        origin="github.com/openai/DALL-E",
        licence="MIT, modified",
        judge=lambda settings: {"judge": "none"},
        # The released files hold whole modules.
        objects=(
            "dall_e.encoder.Encoder",
            "dall_e.encoder.EncoderBlock",
            "dall_e.decoder.Decoder",
            "dall_e.decoder.DecoderBlock",
            "dall_e.utils.Conv2d",
            "torch.nn.modules.container.Sequential",
            "torch.nn.modules.activation.ReLU",
            "torch.nn.modules.pooling.MaxPool2d",
            "torch.nn.modules.upsampling.Upsample",
            "torch.nn.modules.linear.Identity",
        ),
        planned=TokenizerSettings(
            kind="dvae", channels=256, channel_mults=(1, 2, 4, 8), attention=False, code_dim=128, decoder=False
        ),
    ),
)
