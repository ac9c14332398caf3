"""VQGAN's autoencoder around a codebook, as settings and plans see it; the network is models/peco_tokenizer.py.

Source of the sizes: VQGAN (arXiv 2012.09841), the f16 configuration of its released code. PeCo (arXiv 2111.12710)
    describes the same network at other widths; recipes/peco_tokenizer.yaml holds them.
"""

from __future__ import annotations

from peco_ds.config import TokenizerSettings
from peco_ds.costs import IMAGE_CHANNELS, Cost, TokenizerCost, attention, conv, norm_swish, residual
from peco_ds.registry import Release, TokenizerKind, later


def encoder_cost(settings: TokenizerSettings, image_px: int) -> Cost:
    widths = [settings.channels * multiplier for multiplier in settings.channel_mults]
    width, size = settings.channels, image_px
    cost = conv(IMAGE_CHANNELS, width, 3, size)
    for level, out in enumerate(widths):
        last = level == len(widths) - 1
        for _ in range(settings.blocks_per_level):
            cost += residual(width, out, size)
            width = out
            if last and settings.attention:
                cost += attention(width, size)
        if not last:
            cost += conv(width, width, 3, size // 2, in_size=size)
            size //= 2
    cost += _middle(settings, width, size)
    cost += norm_swish(width, size) + conv(width, settings.z_channels, 3, size)
    return cost + conv(settings.z_channels, settings.code_dim, 1, size)


def decoder_sizes(settings: TokenizerSettings) -> tuple[list[int], int]:
    """The decoder's width at every level, that of the image first, and its residual blocks of a level."""
    channels = settings.decoder_channels or settings.channels
    blocks = settings.decoder_blocks_per_level or settings.blocks_per_level + 1
    return [channels * multiplier for multiplier in settings.channel_mults], blocks


def decoder_cost(settings: TokenizerSettings, image_px: int) -> Cost:
    widths, blocks = decoder_sizes(settings)
    width, size = widths[-1], image_px // settings.stride_px
    cost = conv(settings.code_dim, settings.z_channels, 1, size) + conv(settings.z_channels, width, 3, size)
    cost += _middle(settings, width, size)
    for level, out in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            cost += residual(width, out, size)
            width = out
            if level == len(widths) - 1 and settings.attention:
                cost += attention(width, size)
        if level:
            size *= 2
            cost += conv(width, width, 3, size)
    return cost + norm_swish(width, size) + conv(width, IMAGE_CHANNELS, 3, size)


def _middle(settings: TokenizerSettings, width: int, size: int) -> Cost:
    cost = residual(width, width, size).times(2)
    return cost + attention(width, size) if settings.attention else cost


def num_blocks(settings: TokenizerSettings) -> int:
    return settings.blocks_per_level * len(settings.channel_mults)


def judged_by_lpips(settings: TokenizerSettings) -> dict[str, str]:
    return {"judge": "LPIPS on VGG16", "judge_licence": "BSD-2-Clause (LPIPS's release)"}


RELEASE = Release(
    signs=("quantize.embedding.weight", "encoder.conv_in.weight"),
    files="taming-transformers' last.ckpt",
    read=later("peco_ds.models.taming_layout:read_vqgan"),
    origin="github.com/CompVis/taming-transformers",
    licence="MIT",
    judge=judged_by_lpips,
    # The last two are the averages by which taming's EMA quantiser trains its codes.
    left_out=("loss.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg"),
    # Lightning's checkpoints name the callback that wrote them and its best score.
    objects=(
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
    ),
)


def _cost(settings: TokenizerSettings, image_px: int) -> TokenizerCost:
    return TokenizerCost(
        encoder_cost(settings, image_px),
        decoder_cost(settings, image_px),
        codebook_elements=settings.num_codes * (2 * settings.code_dim + 1),
        search_macs=(image_px // settings.stride_px) ** 2 * settings.code_dim * settings.num_codes,
    )


KIND = TokenizerKind(
    network=later("peco_ds.models.peco_tokenizer:PecoTokenizer"),
    tensors=num_blocks,
    cost=_cost,
    release=RELEASE,
)
