"""The loss of segmentation: cross-entropy of every pixel, from the decode head and the auxiliary one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

# The label of a pixel that no loss and no metric counts.
IGNORED_PIXEL = 255


def pixel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, over: Literal["all", "valid"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of pixels, and the share of labelled ones that are right; both scalars.

    Args:
        logits: float32 [B, C, h, w], brought to the labels' size here.
        labels: int64 [B, H, W]; IGNORED_PIXEL: not labelled.
        over: divide by all pixels or by the labelled ones. By all, an image counts less the more of it is ignored.
    Source: mmsegmentation 0.11, which BEiT used, divides by all; its `avg_non_ignore` divides by the labelled ones.
    """
    logits = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED_PIXEL, reduction="sum")
    valid = labels != IGNORED_PIXEL
    labelled = valid.sum().clamp_min(1)
    right = ((logits.detach().argmax(1) == labels) & valid).sum() / labelled
    return total / (labels.numel() if over == "all" else labelled), right


def segmentation_loss(
    outputs, labels: torch.Tensor, *, over: Literal["all", "valid"], auxiliary_weight: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Decode loss + auxiliary_weight x auxiliary loss, and the parts for the log.

    Args:
        outputs: `.logits` and `.auxiliary` (None: the decode loss alone), as `SegmenterOutput`.
    """
    loss, right = pixel_cross_entropy(outputs.logits, labels, over=over)
    stats = {"decode_loss": loss.detach(), "accuracy": right}
    if outputs.auxiliary is not None:
        auxiliary, _ = pixel_cross_entropy(outputs.auxiliary, labels, over=over)
        stats["auxiliary_loss"] = auxiliary.detach()
        loss = loss + auxiliary_weight * auxiliary
    return loss, stats
