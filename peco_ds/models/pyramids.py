"""From a ViT's maps, which all have one stride, to the strides that dense heads work on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class FourBranches(nn.Module):
    """Four maps [B, D, h, w] -> four of 4, 2, 1 and 1/2 times their height and width: with patch 16, strides 4 to 32.

    Sub-modules have the released names. An odd h or w loses its last row or column in the fourth map.

    Args:
        norm: channels -> the norm of the first branch: batch norm in segmentation, group norm in detection.
    Source: BEiT (arXiv 2106.08254), released `semantic_segmentation/backbone/beit.py` (fpn1 to fpn4).
    """

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(_doubled(width), norm(width), nn.GELU(), _doubled(width))
        self.fpn2 = nn.Sequential(_doubled(width))
        self.fpn4 = nn.MaxPool2d(2)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        first, second, third, fourth = maps
        return [self.fpn1(first), self.fpn2(second), third, self.fpn4(fourth)]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place: [B, C, H, W] -> the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """The last map [B, D, h, w] -> maps of 4, 2, 1 and 1/2 times its height and width, all of `channels`.

    Source: ViTDet (arXiv 2203.16527): two deconvolutions, one, none, a max pool; then a 1x1 and a 3x3 convolution, each
        with a norm.
    """

    def __init__(self, width: int, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.scaled = nn.ModuleList(
            [
                nn.Sequential(_doubled(width, half), norm(half), nn.GELU(), _doubled(half, quarter)),
                _doubled(width, half),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.out = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inside, channels, 1, bias=False),
                norm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                norm(channels),
            )
            for inside in (quarter, half, width, width)
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [out(scaled(maps[-1])) for scaled, out in zip(self.scaled, self.out)]


def _doubled(width: int, out: int | None = None) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, out or width, kernel_size=2, stride=2)
