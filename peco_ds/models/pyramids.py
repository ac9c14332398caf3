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


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
