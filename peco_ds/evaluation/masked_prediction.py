"""What a masked pre-trained model fills in, made visible by the tokenizer's decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peco_ds.data.loaders import MaskedBatch
from peco_ds.data.views import from_backbone
from peco_ds.evaluation.reconstruction import to_u8


@torch.no_grad()
def masked_prediction_columns(model, tokenizer, batch: MaskedBatch, codes: torch.Tensor) -> list[torch.Tensor]:
    """Picture | masked | decoded prediction | decoded true tokens.

    Args:
        model: of `build_mim`.
        tokenizer: an ImageTokenizer that makes pictures.
        batch: B pictures with their hidden patches.
        codes: int64 [B, N], the true codes of all patches. The prediction keeps them where the picture is shown.
    Returns: four uint8 [B, 3, S, S] at the backbone's size, on the CPU.
    """
    side = batch.images_norm.shape[-1]
    grid = int(codes.shape[1] ** 0.5)
    pictures_11 = from_backbone(batch.images_norm)
    hidden = torch.zeros(codes.shape, device=codes.device).scatter_(1, batch.masked, 1.0).view(-1, 1, grid, grid)
    grey_11 = torch.where(F.interpolate(hidden, size=side) > 0, 0.0, pictures_11)
    predicted = codes.scatter(1, batch.masked, model(batch.images_norm, batch.masked).logits.argmax(dim=-1))
    decoded = [
        F.interpolate(tokenizer.decode_codes(c, (grid, grid)), size=side, mode="bilinear", antialias=True)
        for c in (predicted, codes)
    ]
    return [to_u8(images).cpu() for images in (pictures_11, grey_11, *decoded)]
