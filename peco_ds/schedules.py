"""The learning rate as a pure function of the optimiser step, and the subset size of stochastic depth."""

from __future__ import annotations

import math


def cosine_with_warmup(
    step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int, warmup_from: float = 0.0
) -> float:
    """Linear from `warmup_from` times the peak over `warmup_steps`, then half a cosine from `peak` to `floor`.

    Args:
        step: optimiser step about to be taken, from 0.
    Returns: the learning rate of that step. The warm-up starts at 0 as in the released BEiT code (its `warmup_lr` is
        parsed but never used), so step 0 of a warmed-up run changes only the optimiser's moments.
    Source: BEiT (arXiv 2106.08254), appendix; released code `utils.cosine_scheduler`. One difference: with w warm-up
        steps, step i has peak i / w here and peak i / (w - 1) there, so the peak is reached at step w, not at w - 1 and
        again at w. It stays so that runs go on as they began.
    """
    if step < warmup_steps:
        return peak * (warmup_from + (1.0 - warmup_from) * step / max(1, warmup_steps))
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * min(1.0, progress)))


def linear_with_warmup(step: int, *, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    """A straight line from `peak` at step 0 to `floor`; over `warmup_steps` times a factor that rises from 1e-6.

    Args:
        step: optimiser step about to be taken, from 0.
    Source: the poly schedule of power 1 of mmcv before version 2, which BEiT segments with. Its warm-up is multiplied
        onto a rate that falls already; mmsegmentation 1.x lets it fall only afterwards.
    """
    rate = floor + (peak - floor) * (1 - min(step, total_steps) / total_steps)
    return rate * (1 - (1 - step / warmup_steps) * (1 - 1e-6)) if step < warmup_steps else rate


def drops_with_warmup(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, warmup_from: float, drops: tuple[float, ...]
) -> float:
    """Linear from `warmup_from` times the rate over `warmup_steps`; times 0.1 at each share `drops` of the run.

    The warm-up is a factor on the rate, as in detection code, so a drop inside it counts too.
    """
    rate = peak * 0.1 ** sum(step >= math.floor(share * total_steps + 1e-6) for share in drops)
    if step < warmup_steps:
        rate *= warmup_from + (1.0 - warmup_from) * step / warmup_steps
    return rate


def images_taken(images: int, drop_path: float) -> int:
    """The number of a pass's images that take a branch under model.drop_path_by = subset; at least 1."""
    return max(1, round(images * (1 - drop_path)))
