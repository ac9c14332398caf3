"""Cross-entropy on the tokenizer's codes at hidden patches: BEiT, PeCo."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def hard_tokens(outputs, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross-entropy over all hidden patches of the batch.

    Args:
        outputs: has `.logits` [B, M, V], any float dtype; the softmax runs in float32.
        targets: int64 [B, M], codes of the hidden patches.
    Returns: scalar loss, and {"accuracy": share of hidden patches whose code is the most likely one}, on the device.
    Source: BEiT (arXiv 2106.08254), eq. 3.
    """
    logits = outputs.logits.flatten(0, 1).float()
    loss = F.cross_entropy(logits, targets.flatten())
    accuracy = (logits.detach().argmax(dim=-1) == targets.flatten()).float().mean()
    return loss, {"accuracy": accuracy}
