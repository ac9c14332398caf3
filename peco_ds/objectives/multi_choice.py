"""Cross-entropy on soft codes, refined by what similar patches are: mc-BEiT."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from peco_ds.config import ObjectiveSettings
from peco_ds.objectives.hard_tokens import code_accuracy
from peco_ds.schema import IGNORED

# Elements of dense choices at a time: 256 MiB in float32.
BLOCK_ELEMENTS = 2**26


class MultiChoice:
    """Every masked patch predicts a mixture of its own soft code and of those of patches with similar features.

    With q the choices [N, V] of one image and f its patch features: W = softmax(f f^T / similarity_temperature) of
    L2-normalised f, targets t = omega * W q + (1 - omega) * q, loss = mean over masked patches of -sum_v t_v log
    softmax(logits)_v. All of it in float32.

    Args:
        settings: `similarity_gradient` says whether the gradient reaches f through W, as it does in the released code.
    Source: mc-BEiT (arXiv 2203.15371), released `engine_for_pretraining.py`, whose omega is the weight of the refined
        part; the paper's stands on the other side. There q is the whole softmax over V codes; here it comes from the
        likeliest T of them, see `dense_choices`.
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        self._settings = settings

    def __call__(self, outputs, targets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            outputs: has `.logits` [B, M, V], `.features` [B, 1 + N, D], `.aggregated_logits` [B, M, V] or None; any
                float dtype.
            targets: has `.codes` int64 [B, M], IGNORED where `.masked` int64 [B, M] only repeats a place; `.topk_codes`
                int64 [B, N, T], different within a patch, `.topk_probs` float32 [B, N, T].
        Returns: scalar loss, summed over the branches; stats on the device as `hard_tokens`, and "kept_mass": share of
            the tokenizer's softmax that the T codes of a patch hold.
        """
        features = outputs.features if self._settings.similarity_gradient else outputs.features.detach()
        mixture = refinement(features[:, 1:], targets.masked, self._settings)
        counted = targets.codes != IGNORED
        mixture = (mixture * counted.unsqueeze(-1)) / counted.sum()
        loss = self._cross_entropy(outputs.logits, mixture, targets)
        stats = {
            "accuracy": code_accuracy(outputs.logits, targets.codes),
            "kept_mass": targets.topk_probs.sum(dim=-1).mean(),
        }
        if outputs.aggregated_logits is None:
            return loss, stats
        aggregated = self._cross_entropy(outputs.aggregated_logits, mixture, targets)
        stats |= {
            "aggregated_accuracy": code_accuracy(outputs.aggregated_logits, targets.codes),
            "mim_loss": loss.detach(),
            "aggregated_loss": aggregated.detach(),
        }
        return loss + aggregated, stats

    def _cross_entropy(self, logits: torch.Tensor, mixture: torch.Tensor, targets) -> torch.Tensor:
        """-sum over i, j, v of mixture[i, j] q[j, v] log softmax(logits)[i, v], some images at a time: q is never
        there whole.
        """
        patches, num_codes = targets.topk_codes.shape[1], logits.shape[-1]
        images = max(1, BLOCK_ELEMENTS // (patches * num_codes))
        parts = zip(*(tensor.split(images) for tensor in (logits, mixture, targets.topk_codes, targets.topk_probs)))
        return sum(
            checkpoint(_block_loss, *part, self._settings.rest, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        )


def refinement(features: torch.Tensor, masked: torch.Tensor, settings: ObjectiveSettings) -> torch.Tensor:
    """Rows of omega * W + (1 - omega) * identity at the masked patches: how much of each patch's choice goes into a
    target.

    Args:
        features: [B, N, D], any float dtype, normalised here.  masked: int64 [B, M].
    Returns: float32 [B, M, N]; each row sums to 1.
    """
    features = F.normalize(features.float(), dim=-1)
    # Rows by a product with one-hot vectors: a place that fills a row up is there twice, and no gradient shall be added
    # in an order of the device's choice.
    own = (masked.unsqueeze(-1) == torch.arange(features.shape[1], device=masked.device)).float()
    similarities = (own @ features) @ features.transpose(1, 2) / settings.similarity_temperature
    return settings.omega * similarities.softmax(dim=-1) + (1 - settings.omega) * own


def dense_choices(
    topk_codes: torch.Tensor, topk_probs: torch.Tensor, num_codes: int, rest: Literal["renormalize", "uniform"]
) -> torch.Tensor:
    """The tokenizer's choice among all V codes, from the likeliest T of them.

    Args:
        topk_codes: int64 [B, N, T], different within a patch.
        topk_probs: float [B, N, T], of the softmax over all V codes.
        rest: what becomes of the mass of the other V - T codes: "renormalize" gives it to the T in proportion,
            "uniform" to the others in equal parts.
    Returns: float32 [B, N, V]; each row sums to 1.
    """
    probs = topk_probs.float()
    mass = probs.sum(dim=-1, keepdim=True)
    others = num_codes - probs.shape[-1]
    if rest == "renormalize" or others == 0:
        return probs.new_zeros(*probs.shape[:-1], num_codes).scatter_(-1, topk_codes, probs / mass)
    # Probabilities are stored in 16 bits, so the mass may come out a little above 1.
    left = (1 - mass).clamp(min=0)
    return (left / others).repeat(1, 1, num_codes).scatter_(-1, topk_codes, probs / mass.clamp(min=1))


def _block_loss(
    logits: torch.Tensor,
    mixture: torch.Tensor,
    topk_codes: torch.Tensor,
    topk_probs: torch.Tensor,
    rest: Literal["renormalize", "uniform"],
) -> torch.Tensor:
    log_probs = logits.float().log_softmax(dim=-1)
    with torch.no_grad():
        choices = dense_choices(topk_codes, topk_probs, logits.shape[-1], rest)
    return -(mixture * (log_probs @ choices.transpose(1, 2))).sum()
