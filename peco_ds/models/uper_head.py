"""UperNet's decode head and the auxiliary FCN head, for four maps of one width.

Sub-modules have mmsegmentation's names, so a release in its layout, or the released BEiT code's, renames nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# channels -> a batch norm
Norm = Callable[[int], nn.Module]
# Places a side that the pyramid pooling module averages the coarsest map to.
POOL_SCALES = (1, 2, 3, 6)


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, ReLU; height and width stay."""

    def __init__(self, channels_in: int, channels: int, kernel: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False)
        self.bn = norm(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class UperHead(nn.Module):
    """Maps [B, D, h_i, w_i] of strides 4, 8, 16, 32 -> float32 logits [B, C, h_0, w_0].

    Args:
        width: D.  channels: of every inner map.  dropout: share of whole channels dropped before the classifier.
    Source: UperNet (arXiv 1807.10221) as mmsegmentation's `uper_head.py` and `psp_head.py` compute it.
    """

    def __init__(self, width: int, channels: int, num_classes: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvUnit(width, channels, 1, norm)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvUnit(width + len(POOL_SCALES) * channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvUnit(width, channels, 1, norm) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvUnit(channels, channels, 3, norm) for _ in range(3))
        self.fpn_bottleneck = ConvUnit(4 * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = pixel_classifier(channels, num_classes)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        laterals = [unit(found) for unit, found in zip(self.lateral_convs, maps)]
        laterals.append(self._pooled(maps[-1]))
        for finer in (2, 1, 0):
            laterals[finer] = laterals[finer] + resized(laterals[finer + 1], laterals[finer])
        outputs = [unit(lateral) for unit, lateral in zip(self.fpn_convs, laterals)] + laterals[3:]
        fused = self.fpn_bottleneck(torch.cat([resized(output, outputs[0]) for output in outputs], dim=1))
        return self.conv_seg(self.dropout(fused)).float()

    def _pooled(self, coarsest: torch.Tensor) -> torch.Tensor:
        pooled = [resized(module(coarsest), coarsest) for module in self.psp_modules]
        return self.bottleneck(torch.cat([coarsest, *pooled], dim=1))


class FcnHead(nn.Module):
    """The map of stride 16, [B, D, h, w] -> float32 logits [B, C, h, w].

    Source: mmsegmentation's `fcn_head.py` with one convolution and without concatenation, as BEiT sets it.
    """

    def __init__(self, width: int, channels: int, num_classes: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvUnit(width, channels, 3, norm))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = pixel_classifier(channels, num_classes)

    def forward(self, found: torch.Tensor) -> torch.Tensor:
        return self.conv_seg(self.dropout(self.convs(found))).float()


def pixel_classifier(channels: int, num_classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    return classifier


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x at another map's height and width; bilinear, corners not aligned."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
