"""Cross-entropy on the tokenizer's codes at masked patches: BEiT, PeCo, both terms of BEiT v2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from peco_ds.config import ObjectiveSettings
from peco_ds.schema import IGNORED


def hard_tokens(outputs, targets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross-entropy over the masked patches of the batch, of each branch; the branches are summed.

    Args:
        outputs: has `.logits` [B, M, V] and `.aggregated_logits`, the same or None; any float dtype, the softmax runs
            in float32.
        targets: has `.codes` int64 [B, M], of the masked patches; IGNORED where there is none.
    Returns: scalar loss, and on the device {"accuracy": share of masked patches whose code is the most likely one};
        with a second branch its "aggregated_accuracy" too, and the terms of the loss, "mim_loss" and "aggregated_loss".
    Source: BEiT (arXiv 2106.08254), eq. 3; BEiT v2 (arXiv 2208.06366), released `engine_for_pretraining.py` for the
        sum.
    """
    loss, accuracy = code_loss(outputs.logits, targets.codes), code_accuracy(outputs.logits, targets.codes)
    if outputs.aggregated_logits is None:
        return loss, {"accuracy": accuracy}
    aggregated = code_loss(outputs.aggregated_logits, targets.codes)
    stats = {
        "aggregated_accuracy": code_accuracy(outputs.aggregated_logits, targets.codes),
        "mim_loss": loss.detach(),
        "aggregated_loss": aggregated.detach(),
    }
    return loss + aggregated, {"accuracy": accuracy, **stats}


def build(settings: ObjectiveSettings) -> Callable:
    """As every objective: it has no settings of its own."""
    return hard_tokens


def code_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits [B, M, V] and codes int64 [B, M], without the places that are IGNORED."""
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), ignore_index=IGNORED)


def code_accuracy(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Share of codes int64 [B, M] that are the largest of logits [B, M, V], without the places that are IGNORED."""
    hits = (logits.detach().argmax(dim=-1) == codes).sum()  # IGNORED is no code, so it is never hit
    return hits / (codes != IGNORED).sum()
