"""Represent an image by its codes alone, to measure what a classifier can learn from the tokens.

PeCo classifies images straight from code vectors to show how much meaning its tokens carry. The paper leaves the
pooling open; two plain ones are used here, and both are reported.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def bag_of_codes(codes: torch.Tensor, num_codes: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The codes of an image without their positions: square roots of their shares, so that every image has length 1.

    Args:
        codes: integers [n, N].
    Returns: int64 [b] -> float32 [b, V].
    """

    def rows(index: torch.Tensor) -> torch.Tensor:
        chosen = codes[index].to(device, torch.int64)
        share = torch.full((1, 1), 1.0 / chosen.shape[1], device=device).expand(chosen.shape)
        return torch.zeros(len(chosen), num_codes, device=device).scatter_add_(1, chosen, share).sqrt()

    return rows


def mean_code_vector(
    codes: torch.Tensor, vectors: torch.Tensor, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The mean of an image's code vectors.

    Args:
        codes: integers [n, N].  vectors: [V, C], the codebook.
    Returns: int64 [b] -> float32 [b, C].
    """
    vectors = vectors.to(device, torch.float32)
    return lambda index: vectors[codes[index].to(device, torch.int64)].mean(dim=1)
