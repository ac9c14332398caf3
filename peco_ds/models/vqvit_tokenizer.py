"""image -> codes -> image: a ViT on either side of a codebook.

Source: PeCo (arXiv 2111.12710), Table 12: ViT-B as encoder and decoder. The paper says no more of it; the transformers
    are VQ-KD's, and a linear layer, tanh and a linear layer give a patch's pixels.
"""

from __future__ import annotations

import torch

from peco_ds.config import TokenizerSettings
from peco_ds.kinds.vqvit import patch_values
from peco_ds.models.peco_tokenizer import TokenizerOutput
from peco_ds.models.vqkd_tokenizer import TransformerTokenizer


class VqvitTokenizer(TransformerTokenizer):
    """Codes of images, decoded to the pixels of their patches.

    Args:
        seed: decides at which encoder outputs dead codes restart.
    """

    def __init__(self, settings: TokenizerSettings, *, seed: int = 0) -> None:
        super().__init__(settings, patch_values(settings), seed=seed)

    def forward(self, images_11: torch.Tensor) -> TokenizerOutput:
        """Images [B, 3, S, S] in [-1, 1] -> reconstruction, codes, commitment; in training mode the codebook counts."""
        quantized = self.codebook(self.encode(images_11))
        return TokenizerOutput(self.decode(quantized.quantized), quantized.codes, quantized.commitment)

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Code vectors [B, C, grid, grid] -> images float32 [B, 3, S, S], about [-1, 1]."""
        side, grid = self.settings.vit.patch_px, quantized.shape[-1]
        patches = super().decode(quantized).unflatten(2, (3, side, side)).unflatten(1, (grid, grid))
        # [B, rows, columns, 3, side, side] -> [B, 3, rows, side, columns, side]
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), 3, grid * side, grid * side)

    def decode_codes(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.decode(self.codebook.lookup(codes, grid))
