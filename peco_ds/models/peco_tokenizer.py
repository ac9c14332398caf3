"""image -> codes -> image: a convolutional autoencoder around a codebook.

Source: PeCo (arXiv 2111.12710), supplement: residual blocks, attention at the smallest resolution, GroupNorm, the
    decoder as the inverse of the encoder; for the layers of each, VQGAN (arXiv 2012.09841), which PeCo names, and its
    released `imagenet_vqgan.yaml`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from peco_ds.config import TokenizerSettings
from peco_ds.kinds.vqgan import decoder_sizes
from peco_ds.models.image_tokenizer import CodebookTokenizer
from peco_ds.models.vq import Codebook


class TokenizerOutput(NamedTuple):
    # float32 [B, 3, H, W], trained towards [-1, 1], not clipped.
    reconstruction: torch.Tensor
    codes: torch.Tensor  # int64 [B, N], row-major
    commitment: torch.Tensor  # float32 [], unweighted


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups; fewer, but still a divisor, where there are not enough channels for them."""
    groups = next(number for number in range(min(32, channels), 0, -1) if channels % number == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H, W]: norm, swish, 3x3, twice.

    A 1x1 convolution on the shortcut where the width changes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


class AttentionBlock(nn.Module):
    """Single-head attention of every position to every other, [B, C, H, W] -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = tokens.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves the grid.

    Padded at the right and the bottom only: symmetric padding would need an odd size to see every pixel.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid: nearest neighbour, then a convolution, which avoids checkerboard artefacts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def residual_stack(in_channels: int, out_channels: int, number: int, *, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for index in range(number):
        layers.append(ResidualBlock(in_channels if index == 0 else out_channels, out_channels))
        if attention:
            layers.append(AttentionBlock(out_channels))
    return layers


def middle(channels: int, *, attention: bool) -> list[nn.Module]:
    between = [AttentionBlock(channels)] if attention else []
    return [ResidualBlock(channels, channels), *between, ResidualBlock(channels, channels)]


class Encoder(nn.Sequential):
    """Images [B, 3, H, W] -> [B, z_channels, H / stride, W / stride]."""

    def __init__(self, settings: TokenizerSettings) -> None:
        widths = [settings.channels * mult for mult in settings.channel_mults]
        layers: list[nn.Module] = [nn.Conv2d(3, settings.channels, 3, padding=1)]
        previous, last = settings.channels, len(widths) - 1
        for level, width in enumerate(widths):
            layers += residual_stack(
                previous, width, settings.blocks_per_level, attention=settings.attention and level == last
            )
            if level != last:
                layers.append(Downsample(width))
            previous = width
        layers += middle(previous, attention=settings.attention)
        layers += [group_norm(previous), nn.SiLU(), nn.Conv2d(previous, settings.z_channels, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """[B, z_channels, h, w] -> images [B, 3, h * stride, w * stride]."""

    def __init__(self, settings: TokenizerSettings) -> None:
        widths, blocks = decoder_sizes(settings)
        previous, last = widths[-1], len(widths) - 1
        layers: list[nn.Module] = [nn.Conv2d(settings.z_channels, previous, 3, padding=1)]
        layers += middle(previous, attention=settings.attention)
        for level in range(last, -1, -1):
            width = widths[level]
            layers += residual_stack(previous, width, blocks, attention=settings.attention and level == last)
            if level != 0:
                layers.append(Upsample(width))
            previous = width
        layers += [group_norm(previous), nn.SiLU(), nn.Conv2d(previous, 3, 3, padding=1)]
        super().__init__(*layers)


class PecoTokenizer(CodebookTokenizer):
    """Encoder, codebook, decoder. Training calls only `forward`, and every parameter takes part in it.

    Args:
        seed: decides at which encoder outputs dead codes restart.
    """

    def __init__(self, settings: TokenizerSettings, *, seed: int = 0) -> None:
        super().__init__(settings)
        self.encoder = Encoder(settings)
        self.to_code = nn.Conv2d(settings.z_channels, settings.code_dim, 1)
        self.codebook = Codebook.from_settings(settings, seed=seed)
        self.from_code = nn.Conv2d(settings.code_dim, settings.z_channels, 1)
        self.decoder = Decoder(settings)

    def forward(self, images_11: torch.Tensor) -> TokenizerOutput:
        """Images [B, 3, H, W] in [-1, 1] -> reconstruction, codes, commitment.

        In training mode the codebook counts.
        """
        quantized = self.codebook(self.encode(images_11))
        return TokenizerOutput(self.decode(quantized.quantized), quantized.codes, quantized.commitment)

    def trunk(self, images_11: torch.Tensor) -> torch.Tensor:
        self.check_sides(images_11)
        return self.encoder(images_11.to(self.to_code.weight.dtype))

    def to_features(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.to_code(outputs.to(self.to_code.weight.dtype))

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Code vectors [B, C, h, w] -> images float32 [B, 3, h * stride, w * stride], about [-1, 1]."""
        return self.decoder(self.from_code(quantized.to(self.from_code.weight.dtype))).float()

    def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.decode(self.codebook.lookup(codes, grid))
