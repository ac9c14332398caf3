"""Show the predictions of a masked pre-trained model as images, through the tokenizer's decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peco_ds.data.loaders import MaskedBatch
from peco_ds.data.views import from_backbone
from peco_ds.evaluation.reconstruction import to_u8


@torch.no_grad()
def masked_prediction_columns(model, tokenizer, batch: MaskedBatch, codes: torch.Tensor) -> list[torch.Tensor]:
    """Image | masked | decoded prediction | decoded true tokens.

    Args:
        model: from `build_mim`.
        tokenizer: an ImageTokenizer that makes images.
        batch: B images with their masked patches.
        codes: int64 [B, N], the true codes of all patches. The prediction keeps them where the image is visible.
    Returns: four uint8 [B, 3, S, S] at the backbone's size, on the CPU.
    """
    side = batch.images_norm.shape[-1]
    grid = int(codes.shape[1] ** 0.5)
    images_11 = from_backbone(batch.images_norm)
    is_masked = torch.zeros(codes.shape, device=codes.device).scatter_(1, batch.masked, 1.0).view(-1, 1, grid, grid)
    grey_11 = torch.where(F.interpolate(is_masked, size=side) > 0, 0.0, images_11)
    predicted = codes.scatter(1, batch.masked, model(batch.images_norm, batch.masked).logits.argmax(dim=-1))
    decoded = [
        F.interpolate(tokenizer.decode_codes(c, (grid, grid)), size=side, mode="bilinear", antialias=True)
        for c in (predicted, codes)
    ]
    return [to_u8(images).cpu() for images in (images_11, grey_11, *decoded)]
