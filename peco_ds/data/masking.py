"""Which patches are hidden: block masks and random masks, from an explicit generator."""

from __future__ import annotations

import math

import numpy as np

from peco_ds.data.order import MASK, generator

_TRIES = 10  # attempts for each block


def draw_masked(*, seed: int, epoch: int, sample: int, grid: int, kind: str, count: int, min_block: int, min_aspect: float, exact: bool = True) -> np.ndarray:
    """Hidden positions of one picture, as a pure function of (seed, epoch, sample).

    Args:
        grid: patches a side.  kind: "block" or "random".  count: patches hidden.  exact: False: of blocks at most `count` patches; see `block_mask`.
    Returns: int64 [M], increasing row-major patch numbers; M = count, or 1 <= M <= count for blocks that are not exact.
    """
    draw = generator(MASK, seed, epoch, sample)
    if kind == "random":
        return np.sort(draw.choice(grid * grid, count, replace=False)).astype(np.int64)
    return np.flatnonzero(block_mask(draw, grid, count, min_block, min_aspect, exact=exact)).astype(np.int64)


def block_mask(draw: np.random.Generator, grid: int, count: int, min_block: int, min_aspect: float, *, exact: bool = True) -> np.ndarray:
    """Rectangles of patches until `count` are hidden or ten tries add nothing, then filled up at random to exactly `count`.

    Args:
        exact: False: not filled up. Where no block fits at all one patch is hidden, so that every picture has something to predict.
    Returns: bool [grid, grid]; True = hidden.
    Source: blocks as BEiT (arXiv 2106.08254, algorithm 1; released `masking_generator.py`): area uniform between `min_block` and what is missing,
        aspect log-uniform, sides strictly smaller than the grid, a block is taken if it adds at least one and at most the missing number
        of patches. The exact count is BEiT v2's: a fixed number of hidden patches keeps shapes static.
    """
    mask = np.zeros((grid, grid), dtype=bool)
    missing = count
    while missing > 0:
        added = _add_block(draw, mask, missing, min_block, min_aspect)
        if added == 0:
            break
        missing -= added
    if not exact:
        missing = 1 if missing == count else 0
    if missing > 0:
        shown = np.flatnonzero(~mask)
        mask.flat[draw.choice(shown, missing, replace=False)] = True
    assert 0 < mask.sum() <= count and (mask.sum() == count or not exact)
    return mask


def _add_block(draw: np.random.Generator, mask: np.ndarray, missing: int, min_block: int, min_aspect: float) -> int:
    """Hide one more block in place; returns how many patches it added, 0 if no try fitted."""
    grid = mask.shape[0]
    log_aspect = math.log(1.0 / min_aspect)
    for _ in range(_TRIES):
        # Towards the end fewer patches are missing than the smallest block has; the reference then draws between the two.
        area = draw.uniform(min(min_block, missing), max(min_block, missing))
        aspect = math.exp(draw.uniform(-log_aspect, log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < grid and 0 < width < grid):
            continue
        top, left = draw.integers(grid - height + 1), draw.integers(grid - width + 1)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= missing:
            block[:] = True
            return new
    return 0
