"""Objectives of masked pre-training, by the name a recipe gives them.

An objective is a function of tensors: `objective(outputs, targets) -> loss, stats`. `outputs` has `.logits` [B, M, V],
`.features` [B, 1 + N, D] and `.aggregated_logits` [B, M, V] or None; `targets` has `.codes` and `.masked`, int64 [B,
M], and for soft targets `.topk_codes` and `.topk_probs` [B, N, T]. A place of `targets.codes` that is `schema.IGNORED`
only fills a row up and counts nowhere. Adding an objective is a file here and a line in `peco_ds.registry`.
"""

from collections.abc import Callable

from peco_ds.config import ObjectiveSettings
from peco_ds.registry import OBJECTIVES


def build_objective(settings: ObjectiveSettings) -> Callable:
    """The objective that a recipe asks for: (outputs, targets) -> scalar loss, {name: scalar on the device}."""
    return OBJECTIVES[settings.name].build(settings)
