"""A classifier of pixels: size and statistics of its images are its own matter, so that one may change the pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PixelClassifier(nn.Module):
    """images_01 [B, 3, S, S] in [0, 1], of any side -> logits [B, C]; differentiable with respect to the images.

    Args:
        model: images_norm [B, 3, image_px, image_px] -> logits.
        image_px: images of another side are resized to it (bicubic with antialiasing, cut off to [0, 1]).
        mean, std: of images in [0, 1].
        source: what the classifier is called where it is reported.
    The parameters are frozen. The model is in eval mode.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, *, image_px: int, mean: tuple[float, ...], std: tuple[float, ...], source: str
    ) -> None:
        super().__init__()
        self.model, self.image_px, self.source = model.requires_grad_(False), image_px, source
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.eval()

    def forward(self, images_01: torch.Tensor) -> torch.Tensor:
        side = (self.image_px, self.image_px)
        if images_01.shape[-2:] != side:
            images_01 = F.interpolate(images_01, size=side, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model((images_01 - self.mean) / self.std)
