"""Cross-entropy on class probabilities: what mixup, cutmix and label smoothing leave of a label."""

from __future__ import annotations

import torch
from timm.loss import SoftTargetCrossEntropy

_cross_entropy = SoftTargetCrossEntropy()


def soft_label_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Args:
        logits: [B, C]; taken to float32 here.  targets: float32 [B, C], each row sums to 1.
    Returns: mean loss; {"train_top1"}: percent of images whose first guess is the largest part of the mixture.
    """
    logits = logits.float()
    top1 = 100 * (logits.argmax(dim=-1) == targets.argmax(dim=-1)).float().mean()
    return _cross_entropy(logits, targets), {"train_top1": top1}
